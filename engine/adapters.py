"""Low-rank adapters, which train a few weights beside frozen ones, and less memory for activations.

The paper trains all weights. Adapters (LoRA, Hu et al. 2021) are how a model of 6B fits on one GPU.
"""

import copy

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.settings import SettingError


def trainable(model):
    """The parameters that a step may change."""
    return [p for p in model.parameters() if p.requires_grad]


def add_adapter(model, rank):
    """Freeze model and give its linear layers trainable low-rank adapters, which start as zero.
    Returns the PeftModel around it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SettingError('--lora_rank needs peft: pip install -e ".[lora]"') from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank,
                                            target_modules="all-linear"))


def has_adapter(model):
    return hasattr(model, "merge_and_unload")


def merge_adapter(model):
    """Add a model's adapter, if it has one, to the frozen weights, in place; the plain model."""
    return model.merge_and_unload() if has_adapter(model) else model


class WithoutAdapter(nn.Module):
    """A model as it was before add_adapter, sharing all weights with the one that has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    def forward(self, *arguments, **named):
        with self.model.disable_adapter():
            return self.model(*arguments, **named)


def share_trunks(policy, reward_model, rank, seed):
    """Policy and critic as adapters on the frozen weights of the SFT model and the reward model:
    two networks in memory instead of four. Returns policy, reference and critic; from then on
    reward_model reads through WithoutAdapter as well."""
    torch.manual_seed(seed)  # adapters start at random (their product with zero)
    policy = add_adapter(policy, rank)
    trunk, reward_model.trunk = reward_model.trunk, None
    critic = copy.deepcopy(reward_model)  # the head and the mean of the references; no trunk
    critic.trunk = add_adapter(trunk, rank)
    critic.head.requires_grad_(True)
    reward_model.trunk = WithoutAdapter(critic.trunk)
    return policy, WithoutAdapter(policy), critic


def checkpoint_activations(model):
    """Keep the input of each layer only, and compute the rest again in the backward pass."""
    def switch(module, _):
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # the layer's own switch: off while sampling, where it would cost the cache; its
                # dropouts stay off as well
                layer.training = torch.is_grad_enabled()

    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.20 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.register_forward_pre_hook(switch)
