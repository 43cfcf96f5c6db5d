"""How hard is each bug to see? Runs every one of the root files, and writes levels.json: {name of
the bug: level}.

    OMP_NUM_THREADS=1 python exercises/levels.py          # those that levels.json lacks
    OMP_NUM_THREADS=1 python exercises/levels.py --all    # about ten minutes on one free core

1: a worked example (`python ppo.py`, ...) prints something else than without the bug.
2: it does not, but `python rlhf_minimal.py --fast_dev_run` does, or a number in its folder differs.
3: neither: the bug needs a case that they don't have, and has to be read.
Not for Windows without WSL: a process that has imported everything is forked for each bug.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

from bugs import BUGS, plant
from hunts import HERE, copy_project, in_a_folder

EXAMPLES = ("lm.py", "reward.py", "ppo.py", "judge.py", "sft.py", "tldr.py")
SECONDS = re.compile(r'[\d.]+ ?(s|min|MB|GB|GiB|it/s)\b')
NUMBER = re.compile(r"(-?\d+\.?\d*(?:e-?\d+)?)")  # in brackets: split keeps them, at odd places


def printed(path, arguments):
    """What a script prints, or how it fails."""
    sys.argv = [path, *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(path, run_name="__main__")
        except (Exception, SystemExit) as error:
            traceback.print_exc(limit=0, file=said)
            said.write(repr(error))
    return said.getvalue()


def observe(folder):
    """In a process of its own: write down what the worked examples and a short run give."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    examples = [printed(name, []) for name in EXAMPLES]
    run = [printed("rlhf_minimal.py", ["--fast_dev_run", "--output_dir", "out"])]
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = Path("out", name)
        run += path.read_text(encoding="utf-8").splitlines() if path.exists() else [f"no {name}"]
    path = Path("out", "results.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run += [f"{key}: {value}" for key, value in results.items()
            if not re.search("seconds$|bytes$", key)]
    run = [SECONDS.sub("", line).replace(str(folder), "") for line in run]
    Path("seen.json").write_text(json.dumps([examples, run]), encoding="utf-8")


def seen(context, bug):
    """[what the examples print, what a run gives], lists of texts, with this bug or with None."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_project(Path(name).resolve())
        if bug:
            plant(bug, folder)
        process = context.Process(target=observe, args=(folder,))
        process.start()
        process.join(180)
        process.kill()
        path = folder / "seen.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else [[], ["hangs"]]


def alike(a, b):
    """The same text, but for numbers that differ by rounding: nobody would see that."""
    ours, theirs = NUMBER.split(a), NUMBER.split(b)
    return len(ours) == len(theirs) and all(
        x == y or (i % 2 and math.isclose(float(x), float(y), rel_tol=1e-3, abs_tol=1e-6))
        for i, (x, y) in enumerate(zip(ours, theirs)))


def first_difference(ours, theirs):
    """The first pair of lines that are not alike; None if there is none."""
    ours, theirs = "\n".join(ours).split("\n"), "\n".join(theirs).split("\n")
    for a, b in zip([*ours, ""], [*theirs, ""]):
        if not alike(a, b):
            return a, b


def main():
    path = HERE / "levels.json"
    levels = {} if "--all" in sys.argv else json.loads(path.read_text(encoding="utf-8"))
    bugs = [bug for bug in BUGS if in_a_folder(bug)]
    levels = {bug.name: levels[bug.name] for bug in bugs if bug.name in levels}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    clean = seen(context, None)
    if clean != seen(context, None):
        raise SystemExit("levels: two runs without a bug differ, so nothing can be measured")
    for bug in bugs:
        if bug.name not in levels:
            now = seen(context, bug)
            differences = [first_difference(clean[i], now[i]) for i in range(2)]
            level = 1 if differences[0] else 2 if differences[1] else 3
            levels[bug.name] = level
            path.write_text(json.dumps(levels, indent=1, ensure_ascii=False) + "\n",
                            encoding="utf-8")
            print(level, bug.name, flush=True)
            if level < 3:
                without, now = differences[level - 1]
                print(f"    without: {without}\n    with:    {now}", flush=True)


if __name__ == "__main__":
    main()
