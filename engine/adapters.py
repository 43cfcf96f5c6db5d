"""Several networks on one frozen model, each with low-rank adapters of its own.

The paper trains all weights of four networks. Adapters (LoRA, Hu et al. 2021) are how four networks
of 6B fit on one GPU: W x + 2 B A x, where W is frozen and shared, and A (r, in) and B (out, r) are
a network's own. Nothing is ever merged into a half-precision W: of a small update that would keep
a part only, the rest is rounded away. What is saved is merged in float32.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from engine.architectures import read, two_rows
from engine.devices import mixed_precision, no_dropout
from engine.settings import SettingError

SCALE = 2  # the usual alpha: twice the rank


def trunk_of(model):
    """A language model without its lm head (Llama 4 keeps it under another name than it says)."""
    return model.base_model if model.base_model is not model else model.model


def add_low_rank(module, inputs, output):
    """What a forward hook adds to the output of a linear layer."""
    return output + SCALE * linear(linear(inputs[0], module.lora_A), module.lora_B)


def add_adapter(model, rank, seed):
    """Freeze a model and give its linear layers adapters, which start as zero. The one matrix
    without is the one that makes the logits."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # A starts at random, B as zero
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            n_in, n_out = module.weight.shape[::1 if isinstance(module, Conv1D) else -1]
            A = (2 * torch.rand(rank, n_in, generator=generator) - 1) / n_in**0.5
            module.lora_A = nn.Parameter(A.to(module.weight.device))
            module.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=module.weight.device))
            module.register_forward_hook(add_low_rank)
    if model.device.type != "meta":
        check_adapters(model)
    return model


def check_adapters(model):
    """SettingError unless a gradient reaches each adapter: one that a layer computes around would
    stay what it is without a word. Not those of experts, of which few are asked at a time."""
    with mixed_precision(model.device.type, model.dtype):
        ids, mask = two_rows(model, 32)
        read(model, 32, mask, input_ids=ids).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if name.endswith("lora_B")
            and "expert" not in name and (p.grad is None or not p.grad.any())]
    model.zero_grad()
    if dead:
        raise SettingError(f"--lora_rank: {model.config.model_type} can't be trained by adapters "
                           f"(no gradient for {dead[:1]}); pass --lora_rank 0")


def adapted(model):
    return any("lora_" in name for name, _ in model.named_parameters())


def own(model):
    """What belongs to this network alone: all, or where it has adapters these and its head."""
    everything = not adapted(model)
    return [p for name, p in model.named_parameters()
            if everything or "lora_" in name or name in ("head.weight", "head.bias")]


def copy_network(model):
    """Another network to train that starts as model does: with a copy of all its weights or, where
    it has an adapter, with a copy of that on the same frozen model."""
    shared = {id(p): p for p in model.parameters()}
    for p in own(model):
        del shared[id(p)]
    other = copy.deepcopy(model, shared)
    for p in own(other):
        p.requires_grad_(True)
    return other


def trainable_named(model):
    """Name and parameter of all that a step may change."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trainable(model):
    return [p for _, p in trainable_named(model)]


def freeze(model):
    """No step may change the model from here on."""
    for p in trainable(model):
        p.requires_grad_(False)
        p.grad = None  # of its training: as large as the weights
    return model


def plain_weights(model):
    """A network's weights as its architecture names them; with an adapter, added in float32, on the
    CPU."""
    if not adapted(model):
        return model.state_dict()
    weights = {name: x.to("cpu", torch.float32, copy=True)
               for name, x in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            change = SCALE * (module.lora_B @ module.lora_A).detach().cpu()
            weights[f"{name}.weight"] += change.T if isinstance(module, Conv1D) else change
    return weights


def save_plain(model, folder):
    """Write a language model that AutoModelForCausalLM loads, an adapter added in float32."""
    model.save_pretrained(folder, state_dict=plain_weights(model) if adapted(model) else None)
    if adapted(model):
        config = copy.deepcopy(model.config)
        config.dtype = torch.float32  # not that of the frozen weights
        config.save_pretrained(folder)


def checkpoint_activations(model, context_fn=noop_context_fn):
    """Keep the input of each layer only, and compute the rest again in the backward pass.
    context_fn: torch.utils.checkpoint's, two contexts, of the first time and of the second."""
    network = no_dropout(model)
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
