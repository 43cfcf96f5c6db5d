"""What a checkpoint holds, by name, and whether what a run left is whole."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.adapters import trainable_named
from engine.settings import SettingError


def flatten(parts):
    """Modules and optimizers by name -> {"policy/head.bias": tensor, "optimizer/0/exp_avg": tensor,
    ...} on the CPU: trainable parameters and Adam's averages."""
    tensors = {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            tensors |= {f"{name}/{key}": p.detach().cpu() for key, p in trainable_named(part)}
        else:
            tensors |= {f"{name}/{i}/{key}": average.cpu()
                        for i, averages in part.state_dict()["state"].items()
                        for key, average in averages.items()}
    return tensors


def put_back(parts, tensors):
    """The reverse of flatten, in place. Names and shapes are compared first: a library of another
    version may have others, and half of a checkpoint is none."""
    expected, averages = {}, {name: {} for name in parts}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            expected |= {f"{name}/{key}": p.shape for key, p in trainable_named(part)}
            continue
        for i, p in enumerate(p for group in part.param_groups for p in group["params"]):
            if f"{name}/{i}/step" in tensors:  # Adam has no averages before its first step
                shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                expected |= {f"{name}/{i}/{key}": shape for key, shape in shapes.items()}
                averages[name][i] = {key: tensors.get(f"{name}/{i}/{key}") for key in shapes}
    wrong = {key: tensor.shape for key, tensor in tensors.items()}.items() ^ expected.items()
    if wrong:
        raise SettingError("a checkpoint has other weights than this program "
                           f"({min(wrong)[0]}): begin anew with --restart")
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            for key, p in trainable_named(part):
                p.data.copy_(tensors[f"{name}/{key}"])
        else:
            part.load_state_dict({**part.state_dict(), "state": averages[name]})


def is_finished(folder):
    """Whether a run has all of its results; SettingError where a model was damaged since."""
    folder = Path(folder)
    # results.json comes first, then report.md, and then the checkpoints go
    in_work = (folder / "checkpoints").exists() and not (folder / "report.md").exists()
    if in_work or not (folder / "results.json").exists():
        return False
    for name in ("sft", "reward_model", "policy", "critic"):
        try:
            files = [*(folder / name).glob("*.safetensors")]
            for file in files:
                safe_open(file, "pt")  # compares the length of a file with its header
        except (OSError, SafetensorError):
            files = None
        if not files:
            raise SettingError(f"--output_dir {folder}: finished, but {name}/ was damaged since, "
                               "and no checkpoint is left: begin anew with --restart")
    return True
