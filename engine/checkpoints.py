"""What a checkpoint holds, by name, and whether what a run left is whole."""

from collections import defaultdict
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
    expected = {f"{name}/{key}": p for name, part in parts.items()
                if isinstance(part, torch.nn.Module) for key, p in trainable_named(part)}
    averages = {key: tensor for key, tensor in tensors.items() if key not in expected}
    wrong = [key for key, p in expected.items()
             if key not in tensors or tensors[key].shape != p.shape]
    wrong += [key for key in averages if isinstance(parts.get(key.split("/")[0]), torch.nn.Module)]
    if wrong:
        raise SettingError(f"a checkpoint has other weights than this program ({min(wrong)}): begin "
                           "anew with --restart")
    for key, p in expected.items():
        p.data.copy_(tensors[key])
    for name, part in parts.items():
        if not isinstance(part, torch.nn.Module):
            state = defaultdict(dict)
            for key, tensor in averages.items():
                owner, i, average = key.split("/")
                if owner == name:
                    state[int(i)][average] = tensor
            part.load_state_dict({**part.state_dict(), "state": state})


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
