"""Several processes that take the step of one.

`torchrun --nproc_per_node N -m engine ...`: each process has all models and its share of each
batch; gradients are summed by torch.distributed, and what is summed is never an average of
averages, so N processes take the step that one process would take on the same batch. (Where PPO has
several minibatches each process divides its own rows: others meet in one than in one process.)

What is no training step (comparisons of the tiny world, judging, measuring) each process does for
itself, from the same seed and the same weights (sums are equal to the last bit on all of them, so
are Adam's steps): they get the same texts and numbers, and only the first one writes them.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.settings import SettingError


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(device):
    """This process's device; under torchrun also the group that sums and gathers talk in."""
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(device := f"cuda:{os.environ['LOCAL_RANK']}")
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=1))
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # one voice
    return device


def sum_over_processes(*tensors):
    """Replace each tensor by its sum over the processes; returns the first."""
    for tensor in tensors if n_processes() > 1 else ():
        dist.all_reduce(tensor)
    return tensors[0]


def exchange(value):
    """What the processes have here, in order of rank."""
    values = [value]
    if n_processes() > 1:
        values = [None] * n_processes()
        dist.all_gather_object(values, value)
    return values


def gather(tensor):
    """The same of tensors, which may differ in length."""
    return [part.to(tensor.device) for part in exchange(tensor.cpu())]


def share_out(function, judge, *lists):
    """function(judge, *lists) -> a list with an entry for each row, of which each process makes its
    share; all of them get the whole. SettingError for whatever goes wrong in a judge."""
    with agreed():
        try:
            own = function(judge, *(rows[rank() :: n_processes()] for rows in lists))
        except SettingError:
            raise
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise SettingError(f"--judge: it failed with {text}; what was saved before "
                               "stays, when that is mended go on with --resume") from error
    result = [None] * len(lists[0])
    for i, part in enumerate(exchange(own)):
        result[i :: n_processes()] = part
    return result


@contextmanager
def agreed():
    """What goes wrong with one process in this block ends all of them, after it, with the same
    exception; alone it would leave the others waiting at their next sum. No sum or gather inside.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    faults = exchange(error and (type(error), str(error)))
    if error:
        raise error
    for kind, text in filter(None, faults):
        raise kind(text)


all_or_none = agreed()  # @all_or_none: the whole body of a function within agreed()
