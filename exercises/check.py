"""Mark what students hand in: a fresh folder and a log for each, and marks.csv for all.

    python exercises/check.py handed_in                    # into ./checked-1, then ./checked-2, ...
    python exercises/check.py handed_in --seconds 120      # a test may take so long

Each folder in handed_in is a student. Of their files only the functions of the exercises are taken,
with the helpers and imports that these need. It runs what students wrote: use a container.
"""

import argparse
import ast
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from hunts import HERE, copy_project, read, write
from start import EXERCISES, NUMBERS, blank, find, first_line, tree_of


# ---------------------------------------------------------------------------- what is taken over


def definitions(source):
    """{name: the statement at the top level that gives it a meaning}; the last one counts."""
    found = {}
    for node in tree_of("\n".join(source)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            for part in ast.walk(node):
                if isinstance(part, ast.alias):  # a star may be any name: keep each of them
                    name = part.asname or part.name.split(".")[0]
                    found[f"*{node.lineno}" if name == "*" else name] = node
                elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found[part.id] = node
    return found


def names_read(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)
            and isinstance(part.ctx, ast.Load)}


def text_of(source, node):
    return source[first_line(node) - 1 : node.end_lineno]


def helpers(node, theirs, ours):
    """The statements of their file that node needs and ours lacks, in the order of their file."""
    defined, known = definitions(theirs), definitions(ours)
    needed, left = {}, names_read(node) | {name for name in defined if name[0] == "*"}
    while left:
        name = left.pop()
        if name in defined and name not in known and name not in needed:
            needed[name] = defined[name]
            left |= names_read(defined[name])
    return sorted(set(needed.values()), key=lambda other: other.lineno)


def bring_modules(node, handed_in, fresh):
    """Bring what an import of theirs asks for: a file of their own, or a function that they wrote
    into another of our files. ValueError where it asks for what is not installed here."""
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
        alias.name for alias in node.names]
    for module in modules:
        path = Path(*module.split(".")).with_suffix(".py")
        if (fresh / path).exists() and isinstance(node, ast.ImportFrom):
            ours, theirs = read(fresh / path), read(handed_in / path)
            for alias in node.names:
                wanted = definitions(theirs).get(alias.name)
                if wanted and alias.name not in definitions(ours):
                    for other in [*helpers(wanted, theirs, ours), wanted]:
                        bring_modules(other, handed_in, fresh)
                        ours += ["", *text_of(theirs, other)]
            write(fresh / path, ours)
        elif (handed_in / path).exists() and not (fresh / path).exists():
            source = read(handed_in / path)
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            write(fresh / path, source)
            for other in tree_of("\n".join(source)).body:
                bring_modules(other, handed_in, fresh)
        elif not (fresh / path).exists() and not importlib.util.find_spec(module.split(".")[0]):
            raise ValueError(f"it imports {module}, which is not installed here")


def put_in(number, handed_in, fresh):
    """The function of exercise `number` in place of ours, with what it needs. Returns what to say:
    ValueError, OSError or SyntaxError where it can't be taken."""
    file, name, _ = EXERCISES[number - 1]
    theirs = read(handed_in / file)
    found = find(theirs, name)
    if not found:
        raise ValueError(f"no function {name} in {file}")
    ours = read(fresh / file)
    needed = helpers(found, theirs, ours)
    for other in [*needed, found]:
        for part in ast.walk(other):  # an import may stand inside a function, too
            bring_modules(part, handed_in, fresh)
    ours = read(fresh / file)  # it may have got something from another file
    node = find(ours, name)
    brought = [line for other in [*needed, found] for line in text_of(theirs, other)]
    write(fresh / file, [*ours[: first_line(node) - 1], *brought, *ours[node.end_lineno :]])
    if "NotImplementedError" in names_read(found):
        return "blank"
    return f"taken from {file}" + (f", with {len(needed)} things it needs" if needed else "")


def take(handed_in, fresh, log):
    """Our files with their functions. Returns the numbers that are blank."""
    copy_project(fresh)
    shutil.copyfile(HERE / "test_exercises.py", fresh / "test_exercises.py")
    for number in NUMBERS:
        path = fresh / EXERCISES[number - 1][0]
        write(path, blank(read(path), number))
    blanks = []
    for number in NUMBERS:
        try:
            said = put_in(number, handed_in, fresh)
        except (OSError, ValueError, SyntaxError) as error:
            said = f"blank: {type(error).__name__}: {error}"
        if said.startswith("blank"):
            blanks.append(number)
        print(f"exercise {number}: {said}", file=log)
    return blanks


# ---------------------------------------------------------------------------- running their code


def run_tests(folder, tests, log, seconds):
    """pytest -v on some tests, added to log. False when nothing was said for so many seconds, and
    the process was ended: then its last line is the test that did not come back."""
    command = [sys.executable, "-B", "-u", "-m", "pytest", "-v", "--tb=short", "-p",
               "no:cacheprovider", "--no-header", "--color=no", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    start = log.tell()
    with subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, env=environment) as process:
        said, since = b"", time.monotonic()
        while process.poll() is None:
            if Path(log.name).read_bytes() != said:
                said, since = Path(log.name).read_bytes(), time.monotonic()
            # until the first test runs, torch is imported, which takes its time on a busy machine
            if time.monotonic() - since > (seconds if b"::test" in said[start:] else 5 * seconds):
                process.kill()
                return False
            time.sleep(0.2)
    return True


def verdicts(folder, log_path, seconds, blanks):
    """{name of each test: PASSED, FAILED, ERROR, "time" or "stopped"}, but for those of blanks. A
    test that doesn't come back ends pytest; then its exercise is over, and the others go on in a
    new pytest."""
    text = (folder / "test_exercises.py").read_text(encoding="utf-8")
    tests = re.findall(r"^def (test_exercise_(\d\d)\w+)", text, re.M)
    left, found = [name for name, number in tests if int(number) not in blanks], {}
    while left:
        start = log_path.stat().st_size
        with open(log_path, "a", encoding="utf-8") as log:
            ended = run_tests(folder, [f"test_exercises.py::{name}" for name in left], log, seconds)
        said = log_path.read_bytes()[start:].decode(errors="replace")
        found |= re.findall(r"^test_exercises\.py::(\w+) (PASSED|FAILED|ERROR)", said, re.M)
        left = [name for name in left if name not in found]
        if ended and not re.search(r"collected \d+ items?$", said, re.M):  # it can't be imported
            return found | dict.fromkeys(left, "stopped")
        if left:
            number = left[0][: len("test_exercise_01")]
            same = [name for name in left if name.startswith(number)]
            found |= dict.fromkeys(same, "stopped" if ended else "time")
            left = [name for name in left if name not in same]
    return found


def mark(handed_in, fresh, seconds):
    """Check one student; returns a word for each exercise."""
    log_path = fresh.with_name(fresh.name + ".log")
    with open(log_path, "w", encoding="utf-8") as log:
        blanks = take(handed_in, fresh, log)
    found = verdicts(fresh, log_path, seconds, blanks)
    words = []
    for number in NUMBERS:
        own = {word for name, word in found.items() if f"exercise_{number:02}" in name}
        word = "pass" if own == {"PASSED"} else next(iter(own - {"PASSED", "FAILED"}), "fail")
        words.append("blank" if number in blanks else word)
    with open(log_path, "a", encoding="utf-8") as log:
        log.write(f"\n{words.count('pass')} of {len(words)} done\n")
    return words


def place_of(folder):
    """Where a student's files are: in the folder, or in one that was zipped with it."""
    inner = [path.parent for file, _, _ in EXERCISES for path in folder.rglob(file)]
    return min(inner, key=lambda path: len(path.parts), default=folder)


def check_all(handed_in, output, seconds):
    students = sorted(path for path in handed_in.iterdir() if path.is_dir())
    for path in sorted(set(handed_in.iterdir()) - set(students)):
        print(f"{path}: no folder, so it is not marked")
    if not students:
        raise SystemExit(f"check: {handed_in} has no folder in it; expected one for each student")
    if output is None:
        output = next(path for path in map(Path, map("checked-{}".format, count(1)))
                      if not path.exists())
    if output.exists():
        raise SystemExit(f"check: {output} is there already: each check makes fresh folders")
    output.mkdir(parents=True)
    with open(output / "marks.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["student", *(f"{n} {EXERCISES[n - 1][1]}" for n in NUMBERS), "passed"])
        for student in students:
            words = mark(place_of(student), output / student.name, seconds)
            table.writerow([student.name, *words, words.count("pass")])
            file.flush()
            print(f"{student.name}: {words.count('pass')} of {len(words)} done", flush=True)
    print(f"{output / 'marks.csv'}, and a log for each student beside it")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="check",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("handed_in", type=Path, help="a folder with one of each student")
    parser.add_argument("--output", type=Path, help="a new folder; default: checked-1, -2, ...")
    parser.add_argument("--seconds", type=float, default=60, help="for one test (default 60)")
    args = parser.parse_args(arguments)
    if not args.handed_in.is_dir():
        parser.error(f"{args.handed_in}: no such folder")
    check_all(args.handed_in, args.output, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
