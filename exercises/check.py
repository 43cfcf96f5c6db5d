"""Mark what students hand in: a fresh folder and a log for each, and marks.csv for all.

    python exercises/check.py handed_in                    # into ./checked-1, then ./checked-2, ...
    python exercises/check.py handed_in --seconds 120      # a test may take so long

Each folder in handed_in is a student. Of their files only the functions that were blank are taken
(made.json of the folder says which, else all twelve), with the helpers and imports that these need.
It runs what students wrote: use a container.
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

from hunts import HERE, copy_project, read, read_record, write
from start import EXERCISES, NUMBERS, blank, find, first_line, tree_of

# A task is the number of an exercise, or one of these: name, function, how its tests begin
OPEN = {"open 1": ("kl_estimates", "test_kl_"), "open 2": ("ppo_update", "test_ppo_")}


def tasks_of(folder):
    """What was to be written in a folder; [] in a hunt. Without made.json, all twelve."""
    made = read_record(folder)
    if made is None:
        return list(NUMBERS)
    return [task for task in (*NUMBERS, *OPEN) if task in made["tasks"]]


def place(task):
    """(file, function) of a task."""
    return ("open_tasks.py", OPEN[task][0]) if task in OPEN else EXERCISES[task - 1][:2]


def title(task):
    return task if task in OPEN else f"exercise {task}"


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


def put_in(task, handed_in, fresh):
    """The function of a task in place of ours, with what it needs. Returns what to say: ValueError,
    OSError or SyntaxError where it can't be taken."""
    file, name = place(task)
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
    things = "1 thing" if len(needed) == 1 else f"{len(needed)} things"
    return f"taken from {file}" + (f", with {things} it needs" if needed else "")


def take(handed_in, fresh, log, tasks=NUMBERS):
    """Our files with their functions for these tasks. Returns those that are blank."""
    copy_project(fresh)
    shutil.copyfile(HERE / "test_exercises.py", fresh / "test_exercises.py")
    for name in ("open_tasks.py", "test_open_tasks.py"):
        shutil.copyfile(HERE / "made" / name, fresh / name)
    for number in set(tasks) & set(NUMBERS):
        path = fresh / EXERCISES[number - 1][0]
        write(path, blank(read(path), number))
    blanks = []
    for task in tasks:
        try:
            said = put_in(task, handed_in, fresh)
        except (OSError, ValueError, SyntaxError) as error:
            said = f"blank: {type(error).__name__}: {error}"
        if said.startswith("blank"):
            blanks.append(task)
        print(f"{title(task)}: {said}", file=log)
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


def beginning(task):
    """How the names of a task's tests begin."""
    return OPEN[task][1] if task in OPEN else f"test_exercise_{task:02}_"


def verdicts(folder, log_path, seconds, file, tasks):
    """{name of each test: PASSED, FAILED, ERROR, "time" or "stopped"}, of these tasks in a file of
    tests. A test that doesn't come back ends pytest; then its task is over, and the others go on in
    a new pytest."""
    text = (folder / file).read_text(encoding="utf-8")
    left, found = [], {}
    for name in re.findall(r"^def (test_\w+)", text, re.M):
        if any(name.startswith(beginning(task)) for task in tasks):
            left.append(name)
    while left:
        start = log_path.stat().st_size
        with open(log_path, "a", encoding="utf-8") as log:
            ended = run_tests(folder, [f"{file}::{name}" for name in left], log, seconds)
        said = log_path.read_bytes()[start:].decode(errors="replace")
        found |= re.findall(r"^test_\w+\.py::(\w+) (PASSED|FAILED|ERROR)", said, re.M)
        left = [name for name in left if name not in found]
        if ended and not re.search(r"collected \d+ items?$", said, re.M):  # it can't be imported
            return found | dict.fromkeys(left, "stopped")
        if left:
            (begins,) = [beginning(task) for task in tasks if left[0].startswith(beginning(task))]
            same = [name for name in left if name.startswith(begins)]
            found |= dict.fromkeys(same, "stopped" if ended else "time")
            left = [name for name in left if name not in same]
    return found


def mark(handed_in, fresh, seconds):
    """Check one student; returns a word for each exercise, and for each open task after them."""
    log_path, tasks = fresh.with_name(fresh.name + ".log"), tasks_of(handed_in)
    with open(log_path, "w", encoding="utf-8") as log:
        blanks = take(handed_in, fresh, log, tasks)
    written = [task for task in tasks if task not in blanks]
    file = "test_open_tasks.py" if set(tasks) & set(OPEN) else "test_exercises.py"
    found = verdicts(fresh, log_path, seconds, file, written)
    words = []
    for task in (*NUMBERS, *OPEN):
        own = {word for name, word in found.items() if name.startswith(beginning(task))}
        word = "pass" if own == {"PASSED"} else next(iter(own - {"PASSED", "FAILED"}), "fail")
        words.append("given" if task not in tasks else "blank" if task in blanks else word)
    with open(log_path, "a", encoding="utf-8") as log:
        log.write(f"\n{done(words)} done\n")
    return words


def done(words):
    """What was given is not counted."""
    return f"{words.count('pass')} of {len(words) - words.count('given')}"


def place_of(folder):
    """Where a student's files are: in the folder, or in one that was zipped with it."""
    inner = [path.parent for file, _, _ in EXERCISES for path in folder.rglob(file)]
    return min(inner, key=lambda path: len(path.parts), default=folder)


def check_all(handed_in, output, seconds):
    folders = sorted(path for path in handed_in.iterdir() if path.is_dir())
    for path in sorted(set(handed_in.iterdir()) - set(folders)):
        print(f"{path}: no folder, so it is not marked")
    students = [path for path in folders if tasks_of(place_of(path))]
    for path in sorted(set(folders) - set(students)):
        print(f"{path}: this is a hunt, so it is not marked: use hunts.py")
    if folders and not students:
        raise SystemExit("check: there is nothing to mark")
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
        # the open tasks have columns where somebody has got them
        has_open = any(set(tasks_of(place_of(student))) & set(OPEN) for student in students)
        columns = [*NUMBERS, *OPEN] if has_open else list(NUMBERS)
        names = [task if task in OPEN else f"{task} {place(task)[1]}" for task in columns]
        table.writerow(["student", *names, "passed"])
        for student in students:
            words = mark(place_of(student), output / student.name, seconds)[: len(columns)]
            table.writerow([student.name, *words, words.count("pass")])
            file.flush()
            print(f"{student.name}: {done(words)} done", flush=True)
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
