"""What any long run needs and no equation mentions: its folder, its metrics, its progress bar."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm


class SettingError(ValueError):
    """Something the user typed, in one line: what it was, what was expected, what to do."""


class Run:
    """The folder of one run. Stages ask it for their steps and tell it their metrics."""

    def __init__(self, folder, seed, restart=False):
        self.folder, self.seed, self.seconds = Path(folder), seed, {}
        if self.folder.exists() and not self.folder.is_dir():
            raise SettingError(f"--output_dir {folder}: expected a folder, found a file")
        found = sorted(path.name for path in self.folder.glob("*"))
        if found and "config.json" not in found:
            raise SettingError(f"--output_dir {folder} holds other files ({found[0]}, ...): "
                               "nothing is ever deleted there, choose a new folder")
        if found and not restart:
            raise SettingError(f"--output_dir {folder} already holds a run: choose a new folder, "
                               "or throw that run away with --restart")
        try:
            if found:
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")
        except OSError as error:
            raise SettingError(f"--output_dir {folder}: cannot write there ({error.strerror}), "
                               "choose another folder") from None

    def steps(self, stage, total):
        """Yield 0 .. total-1 under a progress bar; the time they take goes to seconds[stage]."""
        start = time.perf_counter()
        with tqdm(range(total), desc=stage, disable=None, mininterval=0.5, leave=False) as bar:
            self.bar = bar
            yield from bar
        self.seconds[stage] = time.perf_counter() - start

    @contextmanager
    def timed(self, stage):
        """Time what is no loop of steps, into seconds[stage]."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def log(self, stage, step, **metrics):
        """Append a line to metrics.jsonl and show the numbers beside the progress bar."""
        self.metrics.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        self.metrics.flush()
        if getattr(self, "bar", None) is not None:
            shown = {name: f"{value:.3g}" for name, value in metrics.items()
                     if isinstance(value, float)}
            self.bar.set_postfix(dict(list(shown.items())[:4]), refresh=False)

    def history(self, stage):
        """The logged lines of one stage, as dicts."""
        with open(self.folder / "metrics.jsonl", encoding="utf-8") as lines:
            return [line for line in map(json.loads, lines) if line["stage"] == stage]

    def write(self, name, content):
        """Write text, or anything else as JSON, to a file of the folder."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (self.folder / name).write_text(text, encoding="utf-8")


def fresh_folder(preset):
    """runs/<preset>-<n> with the first n that is free."""
    n = 1
    while Path(f"runs/{preset}-{n}").exists():
        n += 1
    return f"runs/{preset}-{n}"


def environment():
    """Package versions and git commit, for config.json."""
    import datasets
    import torch
    import transformers

    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "datasets": datasets.__version__,
            "git_commit": commit or None, "cpu_count": os.cpu_count()}


def peak_memory_bytes():
    """Largest resident memory of this process (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
