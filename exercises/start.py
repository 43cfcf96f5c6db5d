"""Make a folder to work in, from the project's own files: blanks to fill, or a bug to find.

    python exercises/start.py                          # ./my_exercises, twelve blanks
    python exercises/start.py ex --exercise 6 7 9      # three blanks
    python exercises/start.py ex --hard                # docstrings without the formula
    python exercises/start.py open --open              # two tasks that are in none of our files
    python exercises/start.py hunt --bug random --seed 3     # no blank, but one planted bug

See exercises/README.md; check.py marks what comes back. Nothing is kept twice: the solutions are
the files one folder up, and the numbers in a folder's README are those of the map, docs/map.md.
"""

import argparse
import ast
import random
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import hunts
from hard import DOCSTRINGS
from hunts import HERE, ROOT, copy_project, read, write

sys.path.append(str(ROOT / "docs"))
from equations import MAP  # noqa: E402

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
NUMBERS = range(1, len(EXERCISES) + 1)
# What the map has no row of: section, equation, numbers
PENCIL = {4: ("3.4", "the last real token of each row", "mask 0 0 1 1 1 0 → index 4"),
          11: ("4.1", "asked in both orders: 1, ½ or 0", "A and then B → 1, A and A → ½"),
          12: ("4.1", "(share − p)² = z² p (1 − p) / n", "60 of 90: 0.564 – 0.755")}


# What the tests ask for and the docstring leaves to the comments of the solution, which are blanked
ALSO = {1: "The result is float32 at least, however few digits the logits come with (bfloat16).",
        2: "eos_token_id: an id, or a list of several that all end a row.",
        6: "What lies off the mask is never read: it may be NaN."}


@lru_cache
def tree_of(text):
    return ast.parse(text)


def find(source, name):
    """The function of that name at the top level of source (lines), or None. Of several it is the
    last one, as for Python."""
    named = [node for node in tree_of("\n".join(source)).body
             if isinstance(node, ast.FunctionDef) and node.name == name]
    return named[-1] if named else None


def first_line(node):
    """Number of the line where a statement begins, with its decorators."""
    return min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))])


def blank(source, number, hard=False):
    """The lines of a file with the body of exercise `number` replaced. Its docstring stays, with
    what else is asked for at its end; hard: there is one without the formula instead."""
    _, name, title = EXERCISES[number - 1]
    node = find(source, name)
    words = node.body[0]
    docstring = source[words.lineno - 1 : words.end_lineno]
    if hard:
        docstring = f'    """{DOCSTRINGS[name].strip()}\n    """'.split("\n")
    if number in ALSO:
        docstring = [*docstring[:-1], f"    {ALSO[number]}", docstring[-1]]
    return [*source[: words.lineno - 1], *docstring,
            f'    raise NotImplementedError("Exercise {number}: {title}")',
            *source[node.end_lineno :]]


def without_example(source):
    """The lines of a file up to its worked example, which holds parts of the answers; and without
    the sentence that announces it."""
    kept = "\n".join(source[: source.index('if __name__ == "__main__":')])
    return re.sub(r"\s*`python \w+\.py` prints a worked example\.", "", kept).split("\n")


def requirements():
    """What pip has to install for a made folder: the project's dependencies without `datasets`,
    which reads the data of real runs, and pytest."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = ast.literal_eval(re.search(r"^dependencies = (\[.*?\])", text, re.M | re.S)[1])
    return [*(name for name in needed if not name.startswith("datasets")), "pytest", ""]


def pencil_rows(numbers, hard):
    """A row of the made README for each exercise: from the paper's map, or from PENCIL."""
    rows = {name: (row["paper"], row["equation"], row["pencil"])
            for row in MAP for name in row["functions"]}
    for number in numbers:
        file, name, _ = EXERCISES[number - 1]
        section, equation, pencil = PENCIL.get(number) or rows[f"{file[:-3]}.{name}"]
        pencil = pencil.replace("R as above", "R = (−.01, .025, 1.975)")
        equation = "–" if hard else equation
        yield f"| {number} | `{file}`, `{name}` | {section} | {equation} | {pencil} |"


def make_blanks(folder, numbers, hard):
    hunts.write_record(folder, numbers)
    for file in sorted({EXERCISES[number - 1][0] for number in numbers}):
        source = without_example(read(folder / file))
        for number in numbers:
            if EXERCISES[number - 1][0] == file:
                source = blank(source, number, hard)
        write(folder / file, source)
    shutil.copyfile(HERE / "test_exercises.py", folder / "test_exercises.py")
    shutil.copyfile(HERE / "hints.md", folder / "hints.md")
    summary = (HERE / "made/conftest.py").read_text(encoding="utf-8")
    write(folder / "conftest.py", [summary.replace("range(1, 13)", repr(numbers))])
    text = (HERE / "made/blanks.md").read_text(encoding="utf-8")
    text = text.replace("ROWS", "\n".join(pencil_rows(numbers, hard)))
    write(folder / "README.md", [text.replace("FIRST", f"{numbers[0]:02}")])
    for number in numbers:
        print("exercise {:2}: {}: {}, {}".format(number, *EXERCISES[number - 1]))
    print(f"Now: cd {folder} && pytest -k exercise_{numbers[0]:02}")


def make_open(folder):
    hunts.write_record(folder, ["open 1", "open 2"])
    for name in ("open_tasks.py", "test_open_tasks.py", "conftest.py"):
        shutil.copyfile(HERE / "made" / name, folder / name)
    shutil.copyfile(HERE / "made/open.md", folder / "README.md")
    print(f"two open tasks. Now: cd {folder} && pytest")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="start",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="my_exercises", type=Path)
    parser.add_argument("--exercise", type=int, nargs="+", choices=NUMBERS, metavar="N",
                        help="blank these only (1 - 12); default: all")
    parser.add_argument("--hard", action="store_true", help="docstrings without the formula")
    parser.add_argument("--open", action="store_true", help="the two open tasks instead of blanks")
    parser.add_argument("--bug", help="a number of exercises/bugs.py, or random")
    parser.add_argument("--seed", help="of --bug random: one seed, one bug", default=None)
    parser.add_argument("--level", type=int, choices=(1, 2, 3), help="of --bug random: seen in a "
                        "worked example, in a short run, or by reading only; default: 1 or 2")
    args = parser.parse_args(arguments)
    if (args.bug is not None) + args.open + bool(args.exercise or args.hard) > 1:
        parser.error("--bug, --open and --exercise (or --hard) make different folders: name one")
    if args.level and args.bug != "random":
        parser.error("--level goes with --bug random")
    if args.bug == "random" and args.seed is None:
        args.seed = str(random.randrange(10**6))  # one that the folder can note down
    bug = None if args.bug is None else hunts.choose_bug(args.bug, args.seed, args.level)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise SystemExit(f"start: {args.folder} is not empty: nothing is ever overwritten; name "
                         "another folder")

    copy_project(args.folder)
    write(args.folder / "requirements.txt", requirements())
    if bug:
        hunts.write_record(args.folder, [], [args.bug, args.seed, args.level])
        hunts.make(args.folder, bug)
    elif args.open:
        make_open(args.folder)
    else:
        make_blanks(args.folder, sorted(set(args.exercise or NUMBERS)), args.hard)


if __name__ == "__main__":
    sys.exit(main())
