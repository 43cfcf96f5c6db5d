"""What any long run needs and no equation mentions: folder, checkpoints, resume, progress.

A run that is killed at any moment and resumed ends bit for bit where it would have ended: nothing
random has a state (batches.generator_for); what is no training loop is simply done again, since it
depends on seed and weights alone; and each training loop takes its steps from `Run.steps`, which
first puts weights, optimisers and metrics back as the last checkpoint has them.
"""

import hashlib
import json
import math
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from engine.checkpoints import flatten, put_back
from engine.processes import agreed, gather, n_processes, rank
from engine.settings import JUDGES, SettingError


RARELY = 20  # where saving or copying the state takes over a second, one second in so many
# names that nobody else's files have
PARTIAL, LOCK = ".rlhf_minimal_partial", ".rlhf_minimal_lock"
# what --restart removes. What makes a run count as finished goes first; config.json, which says
# that the rest is ours, is written over at the end: cut short, --restart can begin again
OURS = ("results.json", "report.md", "metrics.jsonl", "samples.jsonl", "curves.png", "sft",
        "reward_model", "policy", "critic", "checkpoints", PARTIAL)
# ours at the top level: where pip has put them, the modules of other packages lie beside them
MODULES = ("rlhf_minimal", "sft", "reward", "ppo", "judge", "lm", "tldr", "toy")
# settings that name files, or repositories of the hub
SOURCES = ("comparisons", "posts", "base_model", "sft_model", "reward_model", "tokenizer", "judge")
HANGUP = getattr(signal, "SIGHUP", None)  # a terminal that was closed; Windows has none
MAY_DIFFER = {"resume", "restart", "output_dir", "save_seconds", "files", "from_hub", "environment"}


def digest(path):
    """SHA-256 of the content of a file, or of all files in a folder, shortened."""
    sha = hashlib.sha256()
    for file in (path, *sorted(path.rglob("*"))):
        if file.is_file() and file.stat().st_size:  # an empty file has no memory to map
            with file.open("rb") as stream:
                sha.update(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    return sha.hexdigest()[:16]


def describe(settings):
    """What config.json holds: settings, versions, and a digest of each file a result depends on."""
    root = Path(__file__).resolve().parent.parent
    cloned = (root / "pyproject.toml").exists()
    top = root.glob("*.py") if cloned else [root / f"{name}.py" for name in MODULES]
    sources = sorted([*top, *root.glob("engine/*.py")])
    files = {path.relative_to(root).as_posix(): path for path in sources}
    given = filter(None, map(settings.get, SOURCES))
    files |= {name: Path(name) for name in given if name not in JUDGES and Path(name).exists()}
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=root, capture_output=True)
    return {**settings, "processes": n_processes(),
            "files": {name: digest(path) for name, path in files.items()},
            "environment": {"git_commit": commit.stdout.decode().strip() or None,
                            "python": platform.python_version(),
                            "threads": torch.get_num_threads(),
                            **{name: version(name) for name in ("torch", "transformers")}}}


def describe_hub(config, data):
    """The same for what was loaded from the hub, where a repository may change any day: the commit
    of a model as the cache has it, and a digest of the rows (posts, held out, comparisons, held
    out), which `datasets` may have from its own cache."""
    rows, found = {config["posts"]: data[:2], config["comparisons"]: data[2:]}, {}
    for name in filter(None, map(config.get, SOURCES)):
        if name in JUDGES or Path(name).exists():
            continue
        commit = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
        if name in rows:
            found[name] = hashlib.sha256(json.dumps(rows[name]).encode()).hexdigest()[:16]
        elif commit.is_file():
            found[name] = commit.read_text()
    return found


def check_folder(folder, config, restart=False, resume=False):
    """Raise SettingError for a folder that may not be written to, or a run to resume that was begun
    with other settings or files. Changes nothing; returns what is to be said about versions."""
    name, folder = f"--output_dir {folder}", Path(folder)
    try:
        found = {*os.listdir(folder)} - {LOCK, PARTIAL}
    except FileNotFoundError:
        return []
    except OSError:  # it may be written to, and still hold files of others
        raise SettingError(f"{name}: expected a folder, found a file or a folder that may not be "
                           "listed; choose another one") from None
    if not found:
        return []
    try:
        old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        from_hub, versions = {**old.get("from_hub", {})}, {**old["environment"]}
        old = {**old, **old["files"], **from_hub}
    # a model's folder has a config.json too
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SettingError(f"{name} holds other files ({min(found)}, ...): nothing is ever deleted "
                           "there, choose a new folder") from None
    if not restart and not resume:
        raise SettingError(f"{name} already holds a run: choose a new folder, go on with --resume, "
                           "or throw that run away with --restart")
    now = {**config, **config["files"], **config.get("from_hub", {})}
    unknown = from_hub.keys() if "from_hub" not in config else set()  # before it is loaded
    for key in sorted((old.keys() | now.keys()) - MAY_DIFFER - unknown) if resume else ():
        if old.get(key) != now.get(key):
            raise SettingError(f"{name}: can't be resumed, {key} was {old.get(key)} and is now "
                               f"{now.get(key)}; put it back, or begin anew with --restart")
    return [f"note: this run began with {key} {versions.get(key)}, here it is {value}: the result "
            "may differ in the last digits" for key, value in config["environment"].items()
            if resume and versions.get(key) != value and key != "git_commit"]


def recorded(folder, name):
    """A setting of the run in a folder, None where there is none."""
    try:
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def choose_folder(preset, resume):
    """runs/<preset>-<n> with the first n that is free, or to resume the last one that is not. A
    free one is made at once: of two runs that begin together, each has its own."""
    n = 1
    while Path(f"runs/{preset}-{n}").exists():
        n += 1
    if resume:
        return f"runs/{preset}-{max(1, n - 1)}"
    with suppress(FileExistsError):  # another run was faster
        if "RANK" not in os.environ:  # processes of one run all choose the same
            Path(f"runs/{preset}-{n}").mkdir(parents=True)
        return f"runs/{preset}-{n}"
    return choose_folder(preset, resume)


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
        if rank() == 0:
            check_folder(folder, config, restart, resume)
        self.folder, self.seed, self.save_seconds = Path(folder), config["seed"], save_seconds
        self.device, self.dtype = device, dtype
        self.lines, self.warnings, self.seconds = [], {}, {}
        self.stage, self.step, self.stopping = "start", 0, False
        # what to go back to: step, number of metrics, tensors (None: the parts as they are)
        self.before, self.parts = None, {}
        self.copied = None  # when the last snapshot began, and the seconds it took
        self.started = time.perf_counter()
        self.lock = FileLock(self.folder / LOCK)  # the system frees it, whatever kills us
        if rank():
            return  # the first process writes for all
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise SettingError(f"--output_dir {folder}: another process is writing there, wait for "
                               "it or choose another folder") from None
        except OSError as error:
            raise SettingError(f"--output_dir {folder}: cannot write there ({error.strerror}), "
                               "choose another folder") from None
        # again, now that nobody else writes there
        for note in check_folder(folder, config, restart, resume):
            print(note)
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
                    part.save_pretrained(path)

    def steps(self, stage, total, snapshot=False, **parts):
        """Yield the steps of a stage under a progress bar, from where its last checkpoint stands.

        parts: the modules and optimizers that the stage changes. snapshot: a step changes them more
        than once, so a copy from before it is kept in case it goes wrong.
        """
        with agreed():  # nobody saves before everybody has restored
            first, saved, took = self.restore(stage, parts), time.perf_counter(), 0
        start = saved - self.seconds.get(stage, 0)
        with tqdm(range(first, total), desc=stage, initial=first, total=total, mininterval=0.5,
                  disable=rank() > 0 or None, leave=False) as self.bar:
            for step in self.bar:
                self.stage, self.step, self.parts = stage, step, parts
                if snapshot:
                    self.take_snapshot()
                else:
                    self.before = step, len(self.lines), None
                yield step
                self.seconds[stage] = time.perf_counter() - start
                done = step + 1 == total
                waited = time.perf_counter() - saved
                due = done or waited >= max(self.save_seconds, RARELY * took if took > 1 else 0)
                # all stop together, and not before the first process has saved
                flags = torch.stack(gather(torch.tensor([self.stopping, due]))).any(0)
                self.stopping, due = flags.tolist()
                if due or self.stopping:
                    begun = time.perf_counter()
                    with agreed():  # what is finished needs its optimizers no more
                        self.save(stage, step + 1, flatten(
                            {name: part for name, part in parts.items()
                             if not done or isinstance(part, torch.nn.Module)}))
                    saved = time.perf_counter()
                    took = saved - begun
                if self.stopping:
                    raise KeyboardInterrupt
        self.before = self.copied = None

    def take_snapshot(self):
        """A copy of the state before this step, in case the step goes wrong half-way, over the last
        copy. Where that takes long, the last one has to do for a while."""
        start = time.perf_counter()
        if self.copied and self.copied[1] > 1 and start - self.copied[0] < RARELY * self.copied[1]:
            return
        old = self.before[2] if self.copied else {}
        self.before = self.step, len(self.lines), flatten(self.parts, copy=True, into=old)
        self.copied = start, time.perf_counter() - start

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
        stops at once; where something becomes NaN or infinite, the state before it is saved."""
        def stop(number, _):
            # between the stages there is nothing to save; torchrun sends each signal once more
            again = self.stopping and n_processes() == 1 and number != HANGUP
            if again or not self.before:
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
            which = "it"
            if self.before:
                step, n_lines, tensors = self.before
                which = f"step {step}" if step < self.step else which
                self.lines = self.lines[:n_lines]
                with agreed():  # torchrun ends all when one has ended
                    self.save(self.stage, step, tensors or flatten(self.parts))
            raise SettingError(
                f"{self.stage} step {self.step}: {error}; the state before {which} is saved in "
                f"{self.folder / 'checkpoints'}. Lower {self.stage}_lr and begin anew") from None
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
    first, *_, last = 2 * run.history("ppo")
    if last["kl_per_summary"] > KL_BOUND:
        run.warn("kl", f"ppo step {last['step']}: KL {last['kl_per_summary']:.0f} nats per summary,"
                 f" beyond {KL_BOUND}: the reward model has not seen such summaries and may be "
                 "fooled; raise kl_beta or lower ppo_lr")
    for name, unit, part in (("length", "tokens", 4), ("entropy", "nats per token", 10)):
        if last[name] < first[name] / part:
            run.warn(name, f"ppo step {last['step']}: {name} {last[name]:.2g} {unit}, down from "
                     f"{first[name]:.2g}: the policy has collapsed; raise kl_beta or lower ppo_lr")
