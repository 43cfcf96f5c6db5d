"""What this device can do: where to compute, in which precision, with how much memory."""

import contextlib
import math
import os
import sys

import torch
from torch import nn

from engine.processes import n_processes
from engine.settings import SettingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(wanted="auto"):
    """The device to compute on; auto: a CUDA GPU if there is one, else the CPU. A Mac's GPU (mps)
    has to be asked for: it is untested here. SettingError for a device that isn't there."""
    # memory in pieces that can grow: batches of many widths leave fewer gaps
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there.get(wanted.split(":")[0]):
        found = ", ".join(name for name in there if there[name])
        raise SettingError(f"--device {wanted}: it isn't there (found: {found}); pass one of "
                           "those, or auto")
    return wanted


def pick_dtype(wanted, device):
    """The type that matrices are multiplied in, as torch has it. auto: bfloat16 on a GPU whose
    hardware multiplies in it (compute capability 8 and later: an older one, like a T4, says that it
    supports bfloat16 and then emulates it, slowly), float32 elsewhere."""
    kind = device.split(":")[0]
    modern = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        return torch.bfloat16 if modern else torch.float32
    if wanted not in DTYPES:
        raise SettingError(f"--dtype {wanted}: expected auto, {', '.join(DTYPES)}")
    if wanted != "float32" and kind == "mps" or wanted == "float16" and kind == "cpu":
        raise SettingError(f"--dtype {wanted}: {kind} can't train in it; pass auto or float32")
    if wanted == "bfloat16" and kind == "cuda" and not modern:
        raise SettingError("--dtype bfloat16: this GPU only emulates it; pass float16 or float32")
    return DTYPES[wanted]


def mixed_precision(device, dtype):
    """Within this context matrices are multiplied in dtype, whatever the weights are in. What is
    trained stays in float32: a small step on a bfloat16 weight would be rounded away. No cache of
    weights in dtype: it would outlive the step that changes them."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(as_cpu(device.split(":")[0]), dtype, cache_enabled=False)


def full_precision(device):
    """Within this context nothing is rounded to half precision by the context above."""
    return torch.autocast(as_cpu(device.type), enabled=False)


def as_cpu(kind):
    return "cpu" if kind == "meta" else kind  # of the memory plan's tensors


def wide(x):
    """x in float64, or in float32 on a device that has no float64 (mps)."""
    return x.float() if x.device.type == "mps" else x.double()


class Float32Linear(nn.Linear):
    """A linear layer that is computed in float32 whatever its weights are in."""

    def forward(self, x):
        with full_precision(x.device):
            bias = None if self.bias is None else self.bias.float()
            # contiguous: else, where the weights are frozen, torch makes a product of each row, and
            # reads all of the weights each time
            return nn.functional.linear(x.float().contiguous(), self.weight.float(), bias)


def no_dropout(model):
    """Switch dropout off for good, in its modules and where a layer does it by hand (OPT)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is float and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    return model


def prepare(model):
    """Switch dropout off in a loaded language model, and change two things of it that matter in
    half precision.

    Its logits are made in float32, since log-probs are differences of them: two to three digits of
    17.6 are not enough. And the GELU of GPT-2 and GPT-J, several operations that autocast runs in
    float32, becomes torch's own of the same formula: one operation, which is estimated to save a
    third of the time of an update at 6B.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Float32Linear  # the same weights, under the same names
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ in ("NewGELUActivation", "FastGELUActivation"):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return no_dropout(model)


LARGE = 50  # logits of real models stay below; from 64 on two bfloat16 numbers are 1/2 apart


@torch.no_grad()
def largest_logit(model, tokenizer):
    """The largest logit of a short text, which says whether half precision is enough."""
    ids = tokenizer("SUBREDDIT: r/AskReddit", return_tensors="pt")["input_ids"].to(model.device)
    return model(input_ids=ids, use_cache=False).logits.abs().max().item()


def available_memory(device):
    """Free bytes on the device, and its name."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    if device == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return free, "this Mac's GPU"
    if not hasattr(os, "sysconf"):  # Windows tells it otherwise
        return math.inf, "this CPU"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free / n_processes(), "this CPU"


def peak_memory_bytes():
    """Largest resident memory of this process (Linux counts in KiB, macOS in bytes)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
