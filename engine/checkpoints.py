"""What a checkpoint holds: the tensors that training changes, by name."""

import torch

from engine.adapters import trainable_named
from engine.settings import SettingError


def flatten(parts, copy=False, into={}):
    """Modules and optimizers by name -> {"policy/head.bias": tensor, "optimizer/0/exp_avg": tensor,
    ...} on the CPU: trainable parameters and Adam's averages. into: an older copy to overwrite."""
    tensors = {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            rows = [(key, p.detach()) for key, p in trainable_named(part)]
        else:
            rows = [(f"{i}/{key}", average) for i, averages in part.state_dict()["state"].items()
                    for key, average in averages.items()]
        for key, tensor in rows:
            key = f"{name}/{key}"
            tensors[key] = into[key].copy_(tensor) if key in into else tensor.to("cpu", copy=copy)
    return tensors


def put_back(parts, tensors):
    """The reverse of flatten, in place. Names and shapes are compared first: a library of another
    version may have others, and half of a checkpoint is none."""
    expected = {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            expected |= {f"{name}/{key}": p.shape for key, p in trainable_named(part)}
            continue
        parameters = (p for group in part.param_groups for p in group["params"])
        for i, p in enumerate(parameters):
            if f"{name}/{i}/step" in tensors:  # Adam has no averages before its first step
                shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                expected |= {f"{name}/{i}/{key}": shape for key, shape in shapes.items()}
    found = {key: tensor.shape for key, tensor in tensors.items()}
    if found != expected:
        wrong = min(key for key in found.keys() | expected.keys()
                    if found.get(key) != expected.get(key))
        raise SettingError(f"a checkpoint has other weights than this program ({wrong}): begin "
                           "anew with --restart")
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            for key, p in trainable_named(part):
                p.data.copy_(tensors[f"{name}/{key}"])
            continue
        states = {}
        for key in (key for key in tensors if key.startswith(f"{name}/")):
            _, i, average = key.split("/")
            states.setdefault(int(i), {})[average] = tensors[key]
        part.load_state_dict({**part.state_dict(), "state": states})
