"""What this device can do: where to compute, and in which precision."""

import math
import os
import sys
from contextlib import contextmanager

import torch

from engine.processes import n_processes


def pick_device():
    """The name of the device to compute on: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_dtype(device, frozen):
    """Half precision halves the memory of frozen weights, where it isn't slow (on a CPU it is).
    What is trained stays in float32: a small step on a bfloat16 weight is rounded away."""
    return torch.bfloat16 if frozen and device != "cpu" else torch.float32


def mixed_precision(device):
    """Within this context a GPU multiplies matrices in bfloat16, whatever the weights are in. No
    cache of weights in bfloat16: it would outlive the step that changes them."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu", cache_enabled=False)


@contextmanager
def full_precision(device):
    """Within this context nothing is rounded to bfloat16 by the context above."""
    with torch.autocast(device.type, enabled=False):
        yield


def available_memory(device):
    """Free bytes on the device, and its name."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
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
