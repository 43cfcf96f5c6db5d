"""What a result depends on, as config.json has it, and whether a run may write to a folder."""

import hashlib
import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from engine.processes import n_processes
from engine.settings import JUDGES, SettingError

# names that nobody else's files have
PARTIAL, LOCK = ".rlhf_minimal_partial", ".rlhf_minimal_lock"
# ours at the top level: where pip has put them, the modules of other packages lie beside them
MODULES = ("rlhf_minimal", "sft", "reward", "ppo", "judge", "lm", "tldr", "toy")
# settings that name files, or repositories of the hub
SOURCES = ("comparisons", "posts", "base_model", "sft_model", "reward_model", "tokenizer", "judge")
MAY_DIFFER = {"resume", "restart", "output_dir", "save_seconds", "files", "from_hub", "environment",
              "micro_batch_size", "checkpoint_activations"}  # the last two by rounding alone


def digest(path):
    """SHA-256 of the content of a file, or of all files in a folder, shortened."""
    sha = hashlib.sha256()
    for file in (path, *sorted(path.rglob("*"))):
        if file.is_file():
            with file.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]


def named_sources(settings, local):
    """The files and folders that settings name, or what they name on the hub instead."""
    names = [settings.get(key) for key in SOURCES]
    return [name for name in names if name and name not in JUDGES and Path(name).exists() == local]


def describe(settings):
    """What config.json holds: settings, versions, and a digest of each file a result depends on."""
    root = Path(__file__).resolve().parent.parent
    cloned = (root / "pyproject.toml").exists()
    top = root.glob("*.py") if cloned else [root / f"{name}.py" for name in MODULES]
    sources = sorted([*top, *root.glob("engine/*.py")])
    files = {path.relative_to(root).as_posix(): digest(path) for path in sources}
    files |= {name: digest(Path(name)) for name in named_sources(settings, local=True)}
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=root, capture_output=True)
    environment = {"git_commit": commit.stdout.decode().strip() or None,
                   "python": platform.python_version(), "threads": torch.get_num_threads(),
                   "torch": version("torch"), "transformers": version("transformers")}
    return {**settings, "processes": n_processes(), "files": files, "environment": environment}


def describe_hub(config, data):
    """The same for what was loaded from the hub, where a repository may change any day: the commit
    of a model as the cache has it, and a digest of the rows (posts, held out, comparisons, held
    out), which `datasets` may have from its own cache."""
    rows, found = {config["posts"]: data[:2], config["comparisons"]: data[2:]}, {}
    for name in named_sources(config, local=False):
        commit = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
        if name in rows:
            found[name] = hashlib.sha256(json.dumps(rows[name]).encode()).hexdigest()[:16]
        elif commit.is_file():
            found[name] = commit.read_text()
    return found


def read_config(folder):
    """The config.json of the run in a folder; {} where there is none."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        parts = config["files"], config["environment"]  # a model's folder has a config.json too
        return config if all(isinstance(part, dict) for part in parts) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def recorded(folder, name, default=None):
    """A setting of the run in a folder, the default where there is none."""
    return read_config(folder).get(name, default)


def by_name(config):
    """Settings, and beside them the digests of files and of what came from the hub."""
    return {**config, **config["files"], **config.get("from_hub", {})}


def check_folder(folder, config, restart=False, resume=False):
    """Raise SettingError for a folder that may not be written to, or a run to resume that was begun
    with other settings or files. Changes nothing; returns what is to be said about versions."""
    name, folder = f"--output_dir {folder}", Path(folder)
    try:
        found = {*os.listdir(folder)} - {LOCK, PARTIAL} if folder.exists() else {}
    except OSError:  # it may be written to, and still hold files of others
        raise SettingError(f"{name}: expected a folder, found a file or a folder that may not be "
                           "listed; choose another one") from None
    if not found:
        return []
    began_with = read_config(folder)
    if not began_with:
        raise SettingError(f"{name} holds other files ({min(found)}, ...): nothing is ever deleted "
                           "there, choose a new folder")
    if restart:
        return []
    if not resume:
        raise SettingError(f"{name} already holds a run: choose a new folder, go on with --resume, "
                           "or throw that run away with --restart")
    old, versions = by_name(began_with), began_with["environment"]
    for key, value in by_name(config).items():
        if key not in MAY_DIFFER and old.get(key) != value:
            raise SettingError(f"{name}: can't be resumed, {key} was {old.get(key)} and is now "
                               f"{value}; put it back, or begin anew with --restart")
    return [f"note: this run began with {key} {versions.get(key)}, here it is {value}: the result "
            "may differ in the last digits" for key, value in config["environment"].items()
            if versions.get(key) != value and key != "git_commit"]


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
