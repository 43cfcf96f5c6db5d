"""Several networks on one frozen model, each with low-rank adapters of its own.

The paper trains all weights of four networks. Adapters (LoRA, Hu et al. 2021) are how four networks
of 6B fit on one GPU: W x + B A x, where W is frozen and shared, and A (r, in) and B (out, r) are a
network's own. Nothing is ever merged into a half-precision W: of a small update that would keep a
part only, the rest is rounded away. What is saved is merged in float32.
"""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.devices import no_dropout
from engine.settings import SettingError


def trunk_of(model):
    """A language model without its lm head (Llama 4 keeps it under another name than it says)."""
    if isinstance(model, Adapted):
        return model.base_model
    return model.base_model if model.base_model is not model else model.model


class Adapted(nn.Module):
    """One of the networks on a shared model: it reads through the adapter of its name."""

    def __init__(self, shared, name, trunk=False):
        super().__init__()
        # the model with all its adapters; ours; without the lm head?
        self.shared, self.name, self.is_trunk = shared, name, trunk

    @property
    def network(self):
        """The plain model, with all adapters in its layers."""
        model = self.shared.get_base_model()
        return trunk_of(model) if self.is_trunk else model

    @property
    def base_model(self):
        """The same without its lm head."""
        return Adapted(self.shared, self.name, trunk=True)

    def __getattr__(self, name):
        if name in ("config", "dtype", "device"):
            return getattr(self.network, name)
        return super().__getattr__(name)

    def forward(self, *arguments, **named):
        # All that follows until the next network is asked goes through our adapter, and a backward
        # pass that computes activations again comes before that.
        if self.shared.active_adapter != self.name:
            self.shared.set_adapter(self.name)
        return self.network(*arguments, **named)

    def copy(self, name, trunk=False):
        """Another network that starts as this one: another adapter with the same weights."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        self.shared.add_adapter(name, copy.deepcopy(self.shared.peft_config[self.name]))
        weights = get_peft_model_state_dict(self.shared, adapter_name=self.name,
                                            save_embedding_layers=False)
        set_peft_model_state_dict(self.shared, weights, adapter_name=name)
        return Adapted(self.shared, name, trunk or self.is_trunk)

    def merged(self):
        """Weights of the plain architecture with the adapter added, in float32, on the CPU."""
        weights = {}
        for name, p in self.network.state_dict().items():
            if "lora_" not in name:
                weights[name.replace(".base_layer.", ".")] = p.to("cpu", torch.float32, copy=True)
        for name, module in self.network.named_modules():
            if hasattr(module, "get_delta_weight"):
                weights[f"{name}.weight"] += module.get_delta_weight(self.name).cpu().float()
        return weights

    def save_pretrained(self, folder):
        """A plain model in float32, which AutoModelForCausalLM loads without peft."""
        self.network.save_pretrained(folder, state_dict=self.merged())
        config = copy.deepcopy(self.config)
        config.dtype = torch.float32  # not that of the frozen weights
        config.save_pretrained(folder)


def add_adapter(model, rank, seed, name="policy"):
    """Freeze a model and give its linear layers adapters, which start as zero: the first network on
    it. The one matrix without is the one that makes the logits."""
    try:
        from peft import LoraConfig, get_peft_model  # here, because importing it takes a second
    except ImportError:
        raise SettingError('--lora_rank needs peft: pip install -e ".[lora]"') from None
    torch.manual_seed(seed)  # A starts at random, B as zero
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    shared = get_peft_model(model, config, adapter_name=name)
    for module in shared.modules():  # autocast sees to the types: a cast to float32 first is waste
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return Adapted(shared, name)


def copy_network(model, name, trunk=False):
    """Another network to train that starts as model does: with a copy of all its weights or, where
    it has an adapter, with a copy of that. trunk: of a language model, without its lm head."""
    if isinstance(model, Adapted):
        return model.copy(name, trunk)
    if isinstance(getattr(model, "trunk", None), Adapted):  # a reward model: head and trunk
        shared, model.trunk = model.trunk, None
        other = copy.deepcopy(model).requires_grad_(True)
        model.trunk, other.trunk = shared, shared.copy(name)
        return other
    return copy.deepcopy(trunk_of(model) if trunk else model).requires_grad_(True)


def trainable_named(model):
    """Name and parameter of all that a step may change. With adapters that goes by the name: peft
    switches requires_grad on for the network that was asked last, and off for the others."""
    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    if not adapted:
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    key = f".{adapted[0].name}."
    return [(name, p) for name, p in model.named_parameters()
            if ("lora_" in name and key in name) or (name.startswith("head.") and p.requires_grad)]


def trainable(model):
    return [p for _, p in trainable_named(model)]


def freeze(model):
    """No step may change the model from here on."""
    for p in trainable(model):
        p.requires_grad_(False)
        p.grad = None  # of its training: as large as the weights
    return model


def plain_weights(model):
    """A network's weights as its architecture names them, an adapter added in float32."""
    return model.merged() if isinstance(model, Adapted) else model.state_dict()


def checkpoint_activations(model, context_fn=noop_context_fn):
    """Keep the input of each layer only, and compute the rest again in the backward pass.
    context_fn: torch.utils.checkpoint's, two contexts, of the first time and of the second."""
    network = no_dropout(model.network if isinstance(model, Adapted) else model)
    if not network.supports_gradient_checkpointing:
        raise SettingError(f"--checkpoint_activations: {network.config.model_type} can't do that")

    def switch(module, _):
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # the layer's own switch: off while sampling, where it would cost the cache
                layer.training = torch.is_grad_enabled()

    network.activation_checkpointing_enable(
        {"use_reentrant": False, "context_fn": context_fn,
         "preserve_rng_state": False})  # nothing in a layer is random
    # transformers asks for gradients of the embeddings, which this form of it does without
    network.disable_input_require_grads()
    network.register_forward_pre_hook(switch)
