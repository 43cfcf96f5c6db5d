"""Make a folder to work in, from the project's own files: blanks to fill, or a bug to find.

    python exercises/start.py                          # ./my_exercises, twelve blanks
    python exercises/start.py ex4 --exercise 4         # one blank
    python exercises/start.py hunt --bug random --seed 3     # no blank, but one planted bug
    python exercises/start.py checked/ada --from handed_in/ada    # a teacher's check

See exercises/README.md. Nothing is kept twice: the solutions are the files one folder up.
"""

import argparse
import ast
import random
import shutil
import sys
from pathlib import Path

from bugs import BUGS, plant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# In the paper's order: file, function, what it is
EXERCISES = [("lm.py", "get_log_probs", "log-probs of the tokens, shifted by one"),
             ("lm.py", "get_response_mask", "which tokens of a response are actions"),
             ("reward.py", "preference_loss", "the loss of the reward model"),
             ("lm.py", "last_token_index", "where the score is read"),
             ("reward.py", "normalize", "references have mean 0"),
             ("ppo.py", "kl_penalized_rewards", "score and KL penalty as rewards per token"),
             ("ppo.py", "compute_gae", "generalised advantage estimation"),
             ("ppo.py", "whiten", "mean 0 and variance 1, over the mask"),
             ("ppo.py", "policy_loss", "the clipped objective"),
             ("ppo.py", "value_loss", "the clipped value loss"),
             ("judge.py", "judge_pairwise", "both orders of every pair"),
             ("judge.py", "wilson_interval", "the interval of a win rate")]

HUNT = '''"""Write here the test that fails on the planted bug, and passes once you have mended it.

Take numbers that you can work out with a pencil. This one passes, and shows the form.
"""

import torch

from lm import masked_mean


def test_masked_mean_by_hand():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[1, 1], [1, 0]])
    assert masked_mean(x, mask).item() == 3.0  # (1 + 2 + 6) / 3
'''


def copy_project(folder):
    """Copy the project's own files, those of engine/ too, so that the folder runs by itself."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")):
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    return folder


def find(source, name):
    """The function of that name at the top level of source (lines), or None."""
    for node in ast.parse("\n".join(source)).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node


def blank(source, number):
    """The lines of a file with the body of exercise `number` replaced; its docstring stays."""
    _, name, title = EXERCISES[number - 1]
    node = find(source, name)
    start = node.body[0].end_lineno  # the docstring
    return [*source[:start], f'    raise NotImplementedError("Exercise {number}: {title}")',
            *source[node.end_lineno :]]


def without_example(source):
    """The lines of a file up to its worked example, which holds parts of the answers."""
    return source[: source.index('if __name__ == "__main__":')]


def put_in(source, number, folder):
    """The lines of a file with the function of exercise `number` as it is in folder: that function
    and nothing else. It stays blank, with a word about it, where it can't be read."""
    file, name, _ = EXERCISES[number - 1]
    try:
        theirs = (folder / file).read_text(encoding="utf-8").split("\n")
        found = find(theirs, name)
        if not found:
            raise ValueError(f"no function {name}")
    except (OSError, ValueError, SyntaxError) as error:
        print(f"exercise {number} stays blank: {folder / file}: {error}")
        return source
    node = find(source, name)
    return [*source[: node.lineno - 1], *theirs[found.lineno - 1 : found.end_lineno],
            *source[node.end_lineno :]]


def choose_bug(text, seed):
    if text == "random":
        return random.Random(seed).randrange(len(BUGS))
    if text.isdecimal() and int(text) < len(BUGS):
        return int(text)
    raise SystemExit(f"start: --bug {text}: expected 0 .. {len(BUGS) - 1}, or random")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="start",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="my_exercises", type=Path)
    parser.add_argument("--exercise", type=int, choices=range(1, len(EXERCISES) + 1), metavar="N",
                        help="blank this one only (1 - 12)")
    parser.add_argument("--bug", help="a number of exercises/bugs.py, or random")
    parser.add_argument("--seed", help="of --bug random: one seed, one bug", default=None)
    parser.add_argument("--from", dest="filled", type=Path, metavar="FOLDER",
                        help="take the functions of the exercises, and only them, from there")
    args = parser.parse_args(arguments)
    if args.bug is not None and (args.exercise or args.filled):
        parser.error("--bug goes with neither --exercise nor --from")
    if args.filled and not args.filled.is_dir():
        parser.error(f"--from {args.filled}: no such folder")
    bug = None if args.bug is None else BUGS[choose_bug(args.bug, args.seed)]
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise SystemExit(f"start: {args.folder} is not empty: nothing is ever overwritten; name "
                         "another folder")

    copy_project(args.folder)
    # an ini file of its own, or pytest would take the project's for it
    (args.folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n", encoding="utf-8")
    if bug:
        plant(bug, args.folder)
        (args.folder / "test_hunt.py").write_text(HUNT, encoding="utf-8")
        print(f"{args.folder}: one bug is in there. exercises/README.md says how to hunt.")
        return
    shutil.copyfile(HERE / "test_exercises.py", args.folder / "test_exercises.py")
    numbers = [args.exercise] if args.exercise else range(1, len(EXERCISES) + 1)
    for file in {EXERCISES[number - 1][0] for number in numbers}:
        source = without_example((args.folder / file).read_text(encoding="utf-8").split("\n"))
        for number in numbers:
            if EXERCISES[number - 1][0] == file:
                source = blank(source, number)
                source = put_in(source, number, args.filled) if args.filled else source
        (args.folder / file).write_text("\n".join(source), encoding="utf-8")
    for number in numbers:
        print("exercise {:2}: {}: {}, {}".format(number, *EXERCISES[number - 1]))
    print(f"Now: cd {args.folder} && pytest -k exercise_{numbers[0]:02}")


if __name__ == "__main__":
    sys.exit(main())
