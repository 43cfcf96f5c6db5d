"""What any long run needs and no equation mentions: folder, checkpoints, resume, progress.

A run that is killed at any moment and resumed ends bit for bit where it would have ended: nothing
random has a state (batches.generator_for); what is no training loop is simply done again, since it
depends on seed and weights alone; and each training loop takes its steps from `Run.steps`, which
first puts weights, optimisers and metrics back as the last checkpoint has them.
"""

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from engine.adapters import save_plain
from engine.checkpoints import flatten, put_back
from engine.origin import LOCK, PARTIAL, check_folder, digest
from engine.processes import agreed, exchange, n_processes, rank
from engine.settings import SettingError


RARELY = 20  # where saving takes over a second, one second in so many
# what --restart removes. What makes a run count as finished goes first; config.json, which says
# that the rest is ours, is written over at the end: cut short, --restart can begin again
OURS = ("results.json", "report.md", "metrics.jsonl", "samples.jsonl", "curves.png", "sft",
        "reward_model", "policy", "critic", "checkpoints", PARTIAL)
HANGUP = getattr(signal, "SIGHUP", None)  # a terminal that was closed; Windows has none


def finite(value):
    """The same with None for NaN and infinity, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text):
    """Print beside a progress bar. Nothing else is lost where nobody reads any more: at Ctrl-C
    `| tee` ends before us."""
    with suppress(OSError):
        if rank() == 0:
            tqdm.write(text, file=sys.stderr)


class Run:
    """The folder of one run. Stages ask it for their steps and tell it their metrics."""

    def __init__(self, folder, config, restart=False, resume=False, save_seconds=30,
                 device="cpu", dtype=torch.float32):
        self.folder, self.seed, self.save_seconds = Path(folder), config["seed"], save_seconds
        self.device, self.dtype = device, dtype
        self.lines, self.warnings, self.seconds = [], {}, {}
        self.stage, self.step, self.stepping, self.stopping = "start", 0, False, False
        self.started = time.perf_counter()
        self.lock = FileLock(self.folder / LOCK)  # the system frees it, whatever kills us
        if rank():
            return  # the first process writes for all
        for note in check_folder(folder, config, restart, resume):
            print(note)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise SettingError(f"--output_dir {folder}: another process is writing there, wait for "
                               "it or choose another folder") from None
        except OSError as error:
            raise SettingError(f"--output_dir {folder}: cannot write there ({error.strerror}), "
                               "choose another folder") from None
        for name in OURS if restart else ():
            self.remove(name)
        if restart or not (self.folder / "config.json").exists():
            self.write("config.json", config)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        self.write("metrics.jsonl", "")  # the lines so far are in the checkpoints

    def remove(self, name):
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():  # of a link, only the link is ours
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def whole(self, name):
        """A path to write a file or folder to that gets its name at the end, so that a kill or a
        full disk leaves all of it or nothing. name: a string, or a function of that path."""
        self.remove(PARTIAL)  # left by a kill
        # in a folder of its own: what writes it may have a temporary file beside it, too
        partial = self.folder / PARTIAL / "new"
        partial.parent.mkdir()
        yield partial
        for path in (partial, *partial.rglob("*")):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())  # a power cut must not leave a name without content
        os.replace(partial, self.folder / (name if isinstance(name, str) else name(partial)))
        partial.parent.rmdir()

    def write(self, name, content):
        """Write text, or anything else as JSON, to a file of the folder."""
        text = content if isinstance(content, str) else json.dumps(finite(content), indent=2) + "\n"
        if rank() == 0:
            with self.whole(name) as path:
                path.write_text(text, encoding="utf-8")

    def save_model(self, name, *parts):
        """Write a model and its tokenizer to a folder; on a resume again, since what a stage left
        there may have been cut or deleted."""
        if rank() == 0:
            self.remove(name)
            with self.whole(name) as path:
                for part in parts:
                    if isinstance(part, PreTrainedModel):
                        save_plain(part, path)
                    else:
                        part.save_pretrained(path)

    def steps(self, stage, total, **parts):
        """Yield the steps of a stage under a progress bar, from where its last checkpoint stands.
        parts: the modules and optimizers that the stage changes."""
        with agreed():  # nobody saves before everybody has restored
            first = self.restore(stage, parts)
        start = time.perf_counter() - self.seconds.get(stage, 0)
        next_save = time.perf_counter() + self.save_seconds
        with tqdm(range(first, total), desc=stage, initial=first, total=total, mininterval=0.5,
                  disable=rank() > 0 or None, leave=False) as self.bar:
            for step in self.bar:
                self.stage, self.step, self.stepping = stage, step, True
                yield step
                self.seconds[stage] = time.perf_counter() - start
                done = step + 1 == total
                due = done or time.perf_counter() >= next_save
                # all stop together, and not before the first process has saved
                flags = torch.tensor(exchange((self.stopping, due)))
                self.stopping, due = flags.any(0).tolist()
                if due or self.stopping:
                    begun = time.perf_counter()
                    with agreed():  # what is finished needs its optimizers no more
                        self.save(stage, step + 1, flatten(
                            {name: part for name, part in parts.items()
                             if not done or isinstance(part, torch.nn.Module)}))
                    now = time.perf_counter()
                    rest = RARELY * (now - begun) if now - begun > 1 else 0
                    next_save = now + max(self.save_seconds, rest)
                if self.stopping:
                    raise KeyboardInterrupt
        self.stepping = False

    def total_seconds(self):
        """Seconds by stage, and of all processes that worked on this run, without lost work."""
        return {**self.seconds, "total": time.perf_counter() - self.started}

    def save(self, stage, step, tensors):
        """Write a checkpoint, whose name tells the digest of its content, and keep the last two."""
        state = {"step": step, "seconds": self.total_seconds(), "warnings": self.warnings,
                 "lines": self.lines}
        tensors["state"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        name = f"checkpoints/{stage}-{step:08d}"
        if rank():
            return
        with self.whole(lambda path: f"{name}-{digest(path)}.safetensors") as path:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        for old in sorted((self.folder / "checkpoints").glob(f"{stage}-*"))[:-2]:
            old.unlink()

    def restore(self, stage, parts):
        """Put parts and metrics back from the newest undamaged checkpoint; returns its step."""
        for path in sorted((self.folder / "checkpoints").glob(f"{stage}-*"), reverse=True):
            if path.stem.endswith(digest(path)):
                tensors = load_file(path)
                state = json.loads(bytes(tensors.pop("state").tolist()))
                put_back(parts, tensors)
                self.lines, self.warnings = state["lines"], state["warnings"]
                self.seconds = state["seconds"]
                self.started = time.perf_counter() - self.seconds["total"]
                self.write("metrics.jsonl", "".join(line + "\n" for line in self.lines))
                return state["step"]
            print(f"{path} is damaged: going on from the one before it, or else from the beginning "
                  f"of {stage}")
            path.unlink(missing_ok=True)  # another process may have been faster
        return 0

    @contextmanager
    def guarded(self):
        """Ctrl-C, SIGTERM and a closed terminal save after the step they fall into, a second one
        stops at once; where something becomes NaN or infinite, what was saved before stays."""
        def stop(number, _):
            # between the stages there is nothing to save; torchrun sends each signal once more
            again = self.stopping and n_processes() == 1 and number != HANGUP
            if again or not self.stepping:
                raise KeyboardInterrupt
            self.stopping = True
            say("finishing this step, then saving; once more to stop at once")

        caught = [signal.SIGINT, signal.SIGTERM]
        if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # nohup ignores it
            caught.append(HANGUP)
        if threading.current_thread() is not threading.main_thread():  # of a notebook, say
            caught = []  # Python lets only the main thread have them
        handlers = {number: signal.signal(number, stop) for number in caught}
        try:
            yield
        except FloatingPointError as error:
            raise SettingError(f"{self.stage} step {self.step}: {error}; what was saved before "
                               f"stays in {self.folder / 'checkpoints'}. Lower {self.stage}_lr and "
                               "begin anew") from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.lock.release()

    @contextmanager
    def timed(self, stage):
        """Time what is no loop of steps, into seconds[stage]."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def log(self, stage, step, **metrics):
        """Append a line to metrics.jsonl and show the numbers beside the progress bar."""
        self.lines.append(json.dumps(finite({"stage": stage, "step": step, **metrics})))
        if rank() == 0:
            with open(self.folder / "metrics.jsonl", "ab", buffering=0) as file:
                file.write(self.lines[-1].encode() + b"\n")
        shown = {key: f"{value:.3g}" for key, value in metrics.items() if isinstance(value, float)}
        self.bar.set_postfix(dict(list(shown.items())[:4]), refresh=False)

    def history(self, stage):
        """The logged lines of one stage, as dicts."""
        return [line for line in map(json.loads, self.lines) if line["stage"] == stage]

    def warn(self, kind, text):
        """Say text in the terminal and in the report, once for each kind."""
        if kind not in self.warnings:
            self.warnings[kind] = text
            say(f"warning: {text}")


KL_BOUND = 40  # nats per summary; the paper's own runs end below 20 (Table 9)


def warn_of_collapse(run):
    """Say out loud what the curves of a run gone wrong show. The bounds are ours."""
    updates = run.history("ppo")
    first, last = updates[0], updates[-1]
    if last["kl_per_summary"] > KL_BOUND:
        run.warn("kl", f"ppo step {last['step']}: KL {last['kl_per_summary']:.0f} nats per summary,"
                 f" beyond {KL_BOUND}: the reward model has not seen such summaries and may be "
                 "fooled; raise kl_beta or lower ppo_lr")
    for name, unit, part in (("length", "tokens", 4), ("entropy", "nats per token", 10)):
        if last[name] < first[name] / part:
            run.warn(name, f"ppo step {last['step']}: {name} {last[name]:.2g} {unit}, down from "
                     f"{first[name]:.2g}: the policy has collapsed; raise kl_beta or lower ppo_lr")
