"""Bugs to find: make a folder with one (start.py calls this), and say whether it was found.

    python exercises/hunts.py handed_in/ada

The referee says: the folder is mended, or not; test_hunt.py passes without the bug, and fails with
it. It takes about a minute, and names nothing, so students may ask it themselves. Which bug it is,
the folder's made.json says as start.py was told: where that is lost, give --bug (and --seed, and
--level) again.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bugs import BUGS, plant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REFEREE = [f"tests/test_{name}.py" for name in
           ("tldr", "toy", "lm", "reward", "ppo", "judge", "loop")]


def read(path):
    """The lines of a file; utf-8-sig drops the mark that some Windows editors begin a file with."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def write(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")


def copy_project(folder, engine=False):
    """Copy the project's root files, which run by themselves; engine: those of engine/ as well."""
    for path in (*ROOT.glob("*.py"), *(ROOT.glob("engine/*.py") if engine else ())):
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    # an ini file of its own, or pytest would take the project's for it
    write(folder / "pytest.ini", ["[pytest]", "pythonpath = .", ""])
    return folder


def write_record(folder, tasks, hunt=None):
    """made.json: what is to be written in this folder, numbers of exercises or "open 1", "open 2";
    and of a hunt what start.py was told, [bug, seed, level], which names no bug."""
    write(folder / "made.json", [json.dumps({"tasks": tasks, "hunt": hunt}), ""])


def read_record(folder):
    """{"tasks": ..., "hunt": ...} of a made folder, or None where it has no such file."""
    try:
        made = json.loads((folder / "made.json").read_text(encoding="utf-8-sig"))
        return {"tasks": list(made["tasks"]), "hunt": made["hunt"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make(folder, bug):
    """Plant the bug, and lay beside it what a run without any bug says."""
    run_baseline(folder)
    plant(bug, folder)
    shutil.copyfile(HERE / "made/test_hunt.py", folder / "test_hunt.py")
    shutil.copyfile(HERE / "made/conftest.py", folder / "conftest.py")
    shutil.copyfile(HERE / "made/hunt.md", folder / "README.md")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:  # or the youngest file would be the one with the bug
        os.utime(path, (files[0].stat().st_mtime,) * 2)
    print(f"{folder}: one bug is in there. Its README.md says how to hunt.")


def run_baseline(folder):
    """A short run of all stages, while there is no bug yet: folder/baseline."""
    command = [sys.executable, "-B", "rlhf_minimal.py", "--fast_dev_run", "--output_dir", "clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("start: `python rlhf_minimal.py --fast_dev_run` fails without a bug; is "
                         f"all of requirements.txt installed?\n{done.stderr.strip()}")
    (folder / "baseline").mkdir()
    write(folder / "baseline/printed.txt", [done.stdout])
    for name in ("metrics.jsonl", "results.json", "samples.jsonl"):
        shutil.move(folder / "clean" / name, folder / "baseline" / name)
    shutil.rmtree(folder / "clean")


def in_a_folder(bug):
    """Is the bug in a file that a made folder has? Those of engine/ are for `pytest -m bugs`."""
    return not bug.file.startswith("engine/")


def choose_bug(text, seed, level=None):
    """A bug, by its number or at random: of this level, and without one of level 1 or 2."""
    if text == "random":
        measured = json.loads((HERE / "levels.json").read_text(encoding="utf-8"))
        wanted = [level] if level else [1, 2]
        return random.Random(seed).choice([bug for bug in BUGS if in_a_folder(bug)
                                           and measured.get(bug.name, 3) in wanted])
    if not (text.isdecimal() and int(text) < len(BUGS)):
        raise SystemExit(f"start: --bug {text}: expected 0 .. {len(BUGS) - 1}, or random")
    if not in_a_folder(BUGS[int(text)]):
        raise SystemExit(f"start: --bug {text} is one of engine/, which a made folder does not "
                         "have: choose another")
    return BUGS[int(text)]


def passes(folder, tests, cwd):
    """Do all of these tests pass on the files of folder? Nothing else is said."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               "-m", "not slow and not bugs and not layout", "-o", f'pythonpath="{folder}"', *tests]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=cwd, env=one_core, capture_output=True, timeout=900)
    except subprocess.TimeoutExpired:  # a loop without end, say
        return False
    return done.returncode == 0


def referee(hunt, bug):
    """Say whether it is mended, and whether test_hunt.py sees the bug; no name, no place."""
    mended = passes(hunt, REFEREE, ROOT)
    print("the folder: " + ("mended" if mended else "not mended yet, or something else broke"))
    with tempfile.TemporaryDirectory() as name:
        for words, planted in [("without", None), ("with", bug)][: 2 if bug else 1]:
            copy = copy_project(Path(name).resolve() / words)
            if planted:
                plant(planted, copy)
            shutil.copyfile(hunt / "test_hunt.py", copy / "test_hunt.py")
            verdict = "passes" if passes(copy, ["test_hunt.py"], copy) else "fails"
            expected = "fails" if planted else "passes"
            print(f"test_hunt.py {words} the bug: {verdict} (expected: {expected})")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="hunts",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a hunt that was handed in")
    parser.add_argument("--bug", help="which one was planted, as it was given to start.py; default:"
                        " what made.json says")
    parser.add_argument("--seed", help="as it was given to start.py", default=None)
    parser.add_argument("--level", help="as it was given to start.py", type=int, choices=(1, 2, 3))
    args = parser.parse_args(arguments)
    if not (args.folder / "test_hunt.py").exists():
        parser.error(f"{args.folder}: expected the folder of a hunt, with test_hunt.py in it")
    made = read_record(args.folder)
    bug, seed, level = args.bug, args.seed, args.level
    if bug is None and made and made["hunt"]:
        bug, seed, level = made["hunt"]
    if bug is None:
        print(f"{args.folder}: no made.json says which bug it is, so test_hunt.py is tried without "
              "it only; or give --bug")
    referee(args.folder.resolve(), choose_bug(bug, seed, level) if bug else None)


if __name__ == "__main__":
    sys.exit(main())
