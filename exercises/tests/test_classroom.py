"""exercises/start.py: what it blanks, what it leaves alone, and that its tests know the answers."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import check
import hunts
import start
from bugs import BUGS, plant
from hunts import HERE, ROOT, copy_project, in_a_folder
from start import EXERCISES, NUMBERS
from test_bugs import TESTS, python_files, run_tests  # noqa: F401 (a fixture)


def lines_of(folder, number):
    """The lines of the function of an exercise, decorators included, in the folder."""
    file, name, _ = EXERCISES[number - 1]
    source = (folder / file).read_text(encoding="utf-8").split("\n")
    node = start.find(source, name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return source[first - 1 : node.end_lineno]


def handed_out():
    """The text of each of our files that a made folder has, by its name: the root files."""
    return {name: text for name, text in python_files(ROOT).items() if "/" not in name}


def differing(folder):
    ours, theirs = handed_out(), python_files(folder)
    assert len(ours) == 8 and not {name for name in theirs if "/" in name}
    return {name for name in ours if ours[name] != theirs.get(name)}


@pytest.mark.parametrize("number", NUMBERS)
def test_one_blank(number, tmp_path):
    start.main([str(tmp_path / "one"), "--exercise", str(number)])
    file, name, title = EXERCISES[number - 1]
    assert differing(tmp_path / "one") == {file}
    real, blank = lines_of(ROOT, number), lines_of(tmp_path / "one", number)
    ours, theirs = (ast.parse("\n".join(lines)).body[0] for lines in (real, blank))
    assert ast.dump(ours.args) == ast.dump(theirs.args), "the signature stays"
    also = [f"    {start.ALSO[number]}"] if number in start.ALSO else []
    asked = ast.get_docstring(theirs, clean=False).split("\n")
    assert ast.get_docstring(ours, clean=False).split("\n") == [x for x in asked if x not in also]
    kept = len(blank) - 2 - len(also)  # the lines before the last one of the docstring
    assert blank == [*real[:kept], *also, real[kept],
                     f'    raise NotImplementedError("Exercise {number}: {title}")']
    kept, given = ("\n".join(lines) for lines in (
        start.without_example(hunts.read(ROOT / file)), hunts.read(tmp_path / "one" / file)))
    assert kept.replace("\n".join(real), "") == given.replace("\n".join(blank), ""), "only that one"


def test_no_line_of_a_solution_is_left(tmp_path):
    start.main([str(tmp_path / "all")])
    left = Counter(line.strip() for text in python_files(tmp_path / "all").values()
                   for line in text.split("\n"))
    whole = Counter(line.strip() for text in handed_out().values() for line in text.split("\n"))
    for number in NUMBERS:
        solution = lines_of(ROOT, number)[len(lines_of(tmp_path / "all", number)) - 1 :]
        for line in filter(None, map(str.strip, solution)):
            assert left[line] < whole[line], f"exercise {number}: {line!r} is still somewhere"
    assert not {"bugs.py", "start.py"} & {path.name for path in tmp_path.rglob("*")}
    code = re.sub(r'""".*?"""', "", (tmp_path / "all" / "reward.py").read_text(), flags=re.S)
    assert "logsigmoid" not in code, "a worked example gives the answer away"


def test_several_blanks_and_hard_ones(tmp_path):
    """Three folders with one blank each would hand out the answers to one another."""
    start.main([str(tmp_path / "three"), "--exercise", "9", "6", "7", "--hard"])
    text = (tmp_path / "three" / "ppo.py").read_text(encoding="utf-8")
    assert [n for n in NUMBERS if f'"Exercise {n}:' in text] == [6, 7, 9]
    tree = {node.name: ast.get_docstring(node) for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)}
    assert "delta" not in tree["compute_gae"] and "max(" not in tree["policy_loss"]
    assert "rsqrt" in tree["whiten"] or "variance" in tree["whiten"], "not blank: as it is"
    told = (tmp_path / "three" / "README.md").read_text(encoding="utf-8")
    assert "δ_t" not in told and "1.7204375" in told, "no equation, but its numbers"
    assert set(start.DOCSTRINGS) == {name for _, name, _ in EXERCISES}


def test_a_made_folder_explains_itself(tmp_path):
    start.main([str(tmp_path / "all")])
    told = (tmp_path / "all" / "README.md").read_text(encoding="utf-8")
    for number, (file, name, _) in enumerate(EXERCISES, 1):
        assert f"| {number} | `{file}`, `{name}` |" in told
    assert "ROWS" not in told and "FIRST" not in told and "exercise_01" in told
    needed = (tmp_path / "all" / "requirements.txt").read_text(encoding="utf-8").split()
    assert "pytest" in needed and any(line.startswith("torch") for line in needed)
    for file in {file for file, _, _ in EXERCISES}:
        text = (tmp_path / "all" / file).read_text(encoding="utf-8")
        assert "worked example" not in text, f"{file} announces an example that is not there"
    hints = (tmp_path / "all" / "hints.md").read_text(encoding="utf-8")
    for number, (_, name, _) in enumerate(EXERCISES, 1):
        section = hints.split(f"## {number} `{name}`")[1].split("##")[0]
        assert len(re.findall(r"^\d\. ", section, re.M)) == 3


def test_git_add_loses_no_work_in_silence():
    """What .gitignore names is left out by `git add .` without a word."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not [line for line in ignored if "exercises" in line]


@pytest.mark.parametrize("number", [0, 40, 50, len(BUGS) - 1])
def test_a_bug_is_planted_and_not_named(number, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hunts, "run_baseline", lambda folder: None)
    start.main([str(tmp_path / "hunt"), "--bug", str(number)])
    bug = BUGS[number]
    (name,) = differing(tmp_path / "hunt")
    assert name == bug.file
    assert python_files(tmp_path / "hunt")[name] == (ROOT / name).read_text(
        encoding="utf-8").replace(bug.old, bug.new)
    found = {path.relative_to(tmp_path / "hunt").as_posix()
             for path in (tmp_path / "hunt").rglob("*") if path.is_file()}
    assert found == {*handed_out(), "pytest.ini", "test_hunt.py", "conftest.py", "README.md",
                     "requirements.txt", "made.json"}, "no test that names it"
    times = {path.stat().st_mtime for path in (tmp_path / "hunt").rglob("*") if path.is_file()}
    assert len(times) == 1, "the youngest file would be the one with the bug"
    said = capsys.readouterr().out
    assert name not in said and not any(bug.name in said for bug in BUGS)


def test_a_random_bug_is_that_of_its_seed_and_level():
    chosen = [hunts.choose_bug("random", str(seed)).name for seed in range(40)]
    assert chosen == [hunts.choose_bug("random", str(seed)).name for seed in range(40)]
    assert len(set(chosen)) > 20
    levels = json.loads((ROOT / "exercises" / "levels.json").read_text(encoding="utf-8"))
    assert set(levels) == {bug.name for bug in BUGS if in_a_folder(bug)}, "run exercises/levels.py"
    assert {levels[name] for name in chosen} == {1, 2}
    for level in (1, 2, 3):
        some = {hunts.choose_bug("random", str(seed), level).name for seed in range(40)}
        assert {levels[name] for name in some} == {level}


def test_a_made_folder_knows_what_it_is(tmp_path, monkeypatch, capsys):
    """So that nobody has to repeat what start.py was told."""
    planted, asked = [], []
    monkeypatch.setattr(hunts, "make", lambda folder, bug: planted.append(bug))
    monkeypatch.setattr(hunts, "referee", lambda folder, bug: asked.append(bug))
    start.main([str(tmp_path / "all")])
    start.main([str(tmp_path / "three"), "--exercise", "9", "6", "7"])
    start.main([str(tmp_path / "open"), "--open"])
    start.main([str(tmp_path / "hunt"), "--bug", "random", "--level", "2"])
    assert check.tasks_of(tmp_path / "all") == check.tasks_of(tmp_path) == list(NUMBERS)
    assert check.tasks_of(tmp_path / "three") == [6, 7, 9]
    assert check.tasks_of(tmp_path / "open") == ["open 1", "open 2"]
    assert check.tasks_of(tmp_path / "hunt") == []
    (tmp_path / "hunt" / "test_hunt.py").write_text("", encoding="utf-8")
    hunts.main([str(tmp_path / "hunt")])
    hunts.main([str(tmp_path / "hunt"), "--bug", "3"])
    (tmp_path / "hunt" / "made.json").write_text("{", encoding="utf-8")
    hunts.main([str(tmp_path / "hunt")])
    assert asked == [*planted, BUGS[3], None]
    assert "give --bug" in capsys.readouterr().out


def test_a_syntax_error_is_one_line(tmp_path):
    start.main([str(tmp_path / "made"), "--exercise", "8"])
    (tmp_path / "made" / "ppo.py").write_text("x = 1\ndef whiten(:\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("made_conftest", tmp_path / "made/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with pytest.raises(pytest.Collector.CollectError) as stop:
        conftest.pytest_pycollect_makemodule(tmp_path / "made" / "test_exercises.py")
    assert str(stop.value) == "ppo.py, line 2: invalid syntax: `def whiten(:`"


OF_ENGINE = next(n for n, bug in enumerate(BUGS) if not in_a_folder(bug))


@pytest.mark.parametrize("arguments", [["--exercise", "13"], ["--exercise", "0"], ["--bug", "999"],
                                       ["--bug", "-1"], ["--bug", "x"], ["--level", "1"],
                                       ["--bug", str(OF_ENGINE)],
                                       ["--bug", "1", "--exercise", "2"], ["--open", "--hard"],
                                       ["--bug", "1", "--level", "2"]])
def test_wrong_arguments_make_no_folder(arguments, tmp_path):
    with pytest.raises(SystemExit) as stop:
        start.main([str(tmp_path / "new"), *arguments])
    assert stop.value.code not in (0, None) and not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(SystemExit, match="not empty"):
            start.main([str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "exercises" / "start.py",
                           "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--exercise" in done.stdout
    assert not re.search(r"\b(torch|transformers)\b", done.stderr)


# ---------------------------------------------------------------------------- a class is marked

BLANK = r"(def {}\(.*?)    raise NotImplementedError\([^\n]*\n"


def hand_in(folder, bodies, before="", encoding="utf-8"):
    """A student's folder: {number: body of the function}, and lines before the first function."""
    start.main([str(folder)])
    for number, text in bodies.items():
        file, name, _ = EXERCISES[number - 1]
        path = folder / file
        source = path.read_text(encoding="utf-8")
        source, n = re.subn(BLANK.format(name), lambda m: m[1] + text, source, flags=re.S)
        assert n == 1
        path.write_text(source, encoding="utf-8")
    if before:
        path.write_text(path.read_text(encoding="utf-8").replace(
            "\n# -----", f"\n{before}\n# -----", 1), encoding=encoding)
    return folder


def taken(folder, tmp_path):
    """The fresh folder of a check of this hand-in, and what was said about it."""
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        blanks = check.take(folder, tmp_path / "fresh", log)
    files = python_files(tmp_path / "fresh")
    for name, text in files.items():
        compile(text, name, "exec")
    return files, blanks, (tmp_path / "log").read_text(encoding="utf-8")


def test_only_the_function_is_taken_from_what_is_handed_in(tmp_path):
    ada = hand_in(tmp_path / "ada", {8: "    return x * 0.0  # two spaces\n"})
    path = ada / "ppo.py"
    path.write_text(path.read_text(encoding="utf-8").replace("steps = []", "worst = []")
                    + "\nraise SystemExit('run on import')\n", encoding="utf-8")
    (ada / "judge.py").write_text("def judge_pairwise(:\n", encoding="utf-8")
    (ada / "lm.py").unlink()
    (ada / "test_exercises.py").write_text("", encoding="utf-8")
    files, blanks, said = taken(ada, tmp_path)
    assert "return x * 0.0  # two spaces" in files["ppo.py"]
    assert "SystemExit" not in files["ppo.py"] and "worst = " not in files["ppo.py"]
    assert "Exercise 11" in files["judge.py"] and "Exercise 1:" in files["lm.py"]
    assert "exercise 11: blank: SyntaxError" in said and "exercise 1: blank: FileNotF" in said
    assert blanks == [n for n in NUMBERS if n != 8]
    assert files["test_exercises.py"] == (ROOT / "exercises/test_exercises.py").read_text(
        encoding="utf-8"), "the tests are ours, not what was handed in"


def test_what_a_function_needs_comes_with_it(tmp_path):
    """A helper, what that needs, an import, a file of one's own; with a byte order mark."""
    before = ("from math import sqrt\nimport mine\nfrom mine import deep\nEPS = 1e-8\n"
              "from cmath import *\n"
              "UNUSED = 1 / 0\n\n\ndef root(x):\n    return helper(x) ** .5\n\n\n"
              "def helper(x, eps=EPS):\n    return x + eps\n\n\ndef masked_mean(x, mask):\n"
              "    return 0\n\n")
    text = "    from other import g\n    return mine.f(deep(root(sqrt(x))), masked_mean)\n"
    ada = hand_in(tmp_path / "ada", {8: text}, before, encoding="utf-8-sig")
    path = ada / "ppo.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (ada / "other.py").write_text("g = 1\n", encoding="utf-8")
    (ada / "mine.py").write_text("def f(*x):\n    return x\n\n\ndeep = f\n", encoding="utf-8")
    files, blanks, said = taken(ada, tmp_path)
    assert 8 not in blanks and "exercise 8: taken from ppo.py, with" in said
    for needed in ("from math import sqrt", "import mine", "EPS = 1e-8", "def root", "def helper"):
        assert needed in files["ppo.py"]
    assert files["ppo.py"].index("EPS = 1e-8") < files["ppo.py"].index("def helper")
    assert "1 / 0" not in files["ppo.py"] and "def masked_mean" not in files["ppo.py"]
    assert "mine.py" in files and "other.py" in files and "from cmath import *" in files["ppo.py"]


def test_a_helper_that_was_put_into_another_of_our_files(tmp_path):
    ada = hand_in(tmp_path / "ada", {8: "    return tidy(x)\n"}, "from lm import tidy\n")
    (ada / "lm.py").write_text((ada / "lm.py").read_text(encoding="utf-8")
                               + "\n\nSCALE = 2\n\n\ndef tidy(x):\n    return x * SCALE\n",
                               encoding="utf-8")
    files, blanks, _ = taken(ada, tmp_path)
    assert 8 not in blanks and "from lm import tidy" in files["ppo.py"]
    assert files["lm.py"].index("SCALE = 2") < files["lm.py"].index("def tidy(x)")


def test_what_is_not_installed_is_said(tmp_path):
    ada = hand_in(tmp_path / "ada", {8: "    return nowhere.x\n"}, "import nowhere_to_be_found as "
                  "nowhere\n")
    _, blanks, said = taken(ada, tmp_path)
    assert 8 in blanks and "it imports nowhere_to_be_found, which is not installed here" in said


def test_the_last_of_two_functions_counts_and_its_decorators(tmp_path):
    ada = hand_in(tmp_path / "ada", {})
    (ada / "ppo.py").write_text((ada / "ppo.py").read_text(encoding="utf-8") + "\n\n"
                                "@torch.no_grad()\ndef whiten(x, mask):\n    return 7\n",
                                encoding="utf-8")
    files, blanks, _ = taken(ada, tmp_path)
    assert 8 not in blanks and files["ppo.py"].count("def whiten(") == 1
    assert "@torch.no_grad()\ndef whiten(x, mask):\n    return 7" in files["ppo.py"]


def test_a_check_never_marks_old_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "mark", lambda handed_in, fresh, seconds: ["pass"] * 11 + ["time"])
    (tmp_path / "class" / "ada" / "my_exercises").mkdir(parents=True)
    (tmp_path / "class" / "bob.zip").write_bytes(b"")
    for number in (1, 2):
        check.main(["class"])
        table = (tmp_path / f"checked-{number}" / "marks.csv").read_text(encoding="utf-8")
        head, row = table.splitlines()
        assert head.split(",") == ["student", *(f"{n} {EXERCISES[n - 1][1]}" for n in NUMBERS),
                                   "passed"]
        assert row == "ada," + "pass," * 11 + "time,11"
    assert "bob.zip: no folder, so it is not marked" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already"):
        check.main(["class", "--output", "checked-1"])
    for wrong in (["nowhere"], []):
        with pytest.raises(SystemExit) as stop:
            check.main(wrong)
        assert stop.value.code


def test_a_hunt_is_passed_over_and_what_was_given_is_not_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hunts, "run_baseline", lambda folder: None)
    monkeypatch.setattr(check, "verdicts", lambda *_: {"test_exercise_07_gae": "PASSED"})
    start.main(["class/ada", "--exercise", "6", "7", "9"])
    start.main(["class/bob", "--bug", "3"])
    path = Path("class/ada/ppo.py")
    path.write_text(re.sub(BLANK.format("compute_gae"), r"\1    return 0\n", path.read_text(
        encoding="utf-8"), flags=re.S), encoding="utf-8")
    check.main(["class"])
    said = capsys.readouterr().out
    assert "class/bob: this is a hunt, so it is not marked: use hunts.py" in said
    assert "ada: 1 of 3 done" in said
    rows = Path("checked-1/marks.csv").read_text(encoding="utf-8").splitlines()
    assert rows[1:] == ["ada," + "given," * 5 + "blank,pass,given,blank," + "given," * 3 + "1"]
    assert "whiten" not in Path("checked-1/ada.log").read_text(encoding="utf-8")
    shutil.rmtree("class/ada")
    with pytest.raises(SystemExit, match="nothing to mark"):
        check.main(["class"])


# ---------------------------------------------------------------------------- slow: its own tests


def groups(found):
    return {int(re.search(r"exercise_(\d\d)", name)[1]) for name, _ in found}


@pytest.mark.slow
def test_a_class_is_marked(tmp_path, monkeypatch, capsys):
    """Ada has all, Bob a loop without end and a wrong one, Cy can't be imported, Di is nested."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT, tmp_path / "class" / "ada", ignore=lambda *_: {".git", "tests", "runs"})
    hand_in(tmp_path / "class" / "bob", {1: "    import os\n    os._exit(3)\n",
                                        2: "    while True:\n        pass\n",
                                        8: "    return x\n", 12: "    return '×', 1\n"})
    hand_in(tmp_path / "class" / "cy", {8: "    return x * BAD\n"}, "BAD = 1 / 0\n")
    hand_in(tmp_path / "class" / "di" / "my_exercises", {8: "    return x\n"})
    check.main(["class", "--seconds", "20"])
    rows = [row.split(",") for row in (tmp_path / "checked-1/marks.csv").read_text().splitlines()]
    marks = {name: (words[:-1], words[-1]) for name, *words in rows[1:]}
    assert marks["ada"] == (["pass"] * 12, "12")
    expected = ["blank"] * 12
    expected[0], expected[1], expected[7], expected[11] = "stopped", "time", "fail", "fail"
    assert marks["bob"] == (expected, "0")
    assert marks["cy"][0][7] == "stopped" and marks["cy"][1] == "0"
    assert marks["di"][0][7] == "fail"
    log = (tmp_path / "checked-1" / "bob.log").read_text()
    assert "0 of 12 done" in log and "still blank" not in log and "During handling" not in log


@pytest.mark.slow
def test_open_tasks_are_marked(tmp_path, monkeypatch, capsys):
    """Ada has both; Bob's second one has no end; Cy has the exercises 7 and 8, still blank."""
    monkeypatch.chdir(tmp_path)
    source = (HERE / "tests/open_answers.py").read_text(encoding="utf-8").split("\n# (what")[0]
    start.main(["class/ada", "--open"])
    start.main(["class/bob", "--open"])
    start.main(["class/cy", "--exercise", "7", "8"])
    Path("class/ada/open_tasks.py").write_text(source, encoding="utf-8")
    endless = source.replace("for _ in range(epochs):", "while True:")
    Path("class/bob/open_tasks.py").write_text(endless.replace("return -r", "return r"),
                                               encoding="utf-8")
    check.main(["class", "--seconds", "20"])
    rows = Path("checked-1/marks.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0].endswith(",open 1,open 2,passed")
    assert rows[1] == "ada," + "given," * 12 + "pass,pass,2"
    assert rows[2] == "bob," + "given," * 12 + "fail,time,0"
    assert rows[3] == "cy," + "given," * 6 + "blank,blank," + "given," * 6 + "0"
    said = capsys.readouterr().out
    assert "ada: 2 of 2 done" in said and "cy: 0 of 2 done" in said


@pytest.mark.slow
def test_folders_beside_each_other_are_tested_on_their_own_files(tmp_path):
    """From the folder above them, where no ini file says so; and what is done is counted."""
    start.main([str(tmp_path / "six"), "--exercise", "6"])
    start.main([str(tmp_path / "eight-nine"), "--exercise", "8", "9"])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=line", "six", "eight-nine"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert "six: 0 of 1 done; not yet: 6" in done.stdout, done.stdout
    assert "eight-nine: 0 of 2 done; not yet: 8 9" in done.stdout, done.stdout
    found = set(re.findall(r"Exercise (\d+):", done.stdout))
    assert found == {"6", "8", "9"} and "11 failed" in done.stdout, "each on its own files"


@pytest.mark.slow
def test_a_hunt_has_a_baseline_and_a_referee(tmp_path, capsys):
    number = next(n for n, bug in enumerate(BUGS) if bug.name.startswith("lambda is ignored"))
    start.main([str(tmp_path / "hunt"), "--bug", str(number)])
    assert (tmp_path / "hunt" / "baseline" / "metrics.jsonl").stat().st_size > 100
    assert not (tmp_path / "hunt" / "clean").exists()
    capsys.readouterr()
    hunts.main([str(tmp_path / "hunt"), "--bug", str(number)])
    said = capsys.readouterr().out
    assert "not mended yet" in said and "with the bug: passes (expected: fails)" in said
    assert "lambda" not in said and "ppo" not in said, "no answer is given away"
    shutil.copyfile(ROOT / "ppo.py", tmp_path / "hunt" / "ppo.py")
    hunts.main([str(tmp_path / "hunt")])
    assert "the folder: mended" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_each_blank_alone_fails_its_own_tests(number, tmp_path, run_tests):
    folder = tmp_path / "one"
    start.main([str(folder), "--exercise", str(number)])
    found = run_tests(folder, [folder / "test_exercises.py"])
    tests = re.findall(r"def (test_exercise_\d\d\w*)", (folder / "test_exercises.py").read_text())
    own = {name for name in tests if name.startswith(f"test_exercise_{number:02}_")}
    assert {name.split("::")[1] for name, _ in found} == own and own
    for name, message in found:
        assert f"Exercise {number}: {EXERCISES[number - 1][2]}" in message


BUGS_OF_EXERCISES = [(number, bug) for number in NUMBERS for bug in BUGS
                     if bug.file == EXERCISES[number - 1][0]
                     and bug.old in "\n".join(lines_of(ROOT, number))]


@pytest.mark.bugs
@pytest.mark.parametrize("number, bug", BUGS_OF_EXERCISES, ids=lambda x: getattr(x, "name", x))
def test_a_students_bug_is_named(number, bug, tmp_path, run_tests):
    plant(bug, copy_project(tmp_path))
    shutil.copyfile(ROOT / "exercises" / "test_exercises.py", tmp_path / "test_exercises.py")
    found = run_tests(tmp_path, [tmp_path / "test_exercises.py"])
    assert groups(found) == {number}, f"exercise {number} has {bug.name}: {found}"
    # a known mistake is named without numbers; what is not known shows both, and says what is right
    assert any(re.search(rf"^(Failed: )?You |{bug.hint}", message)
               for _, message in found), f"no mistake is named, nothing of {bug.hint!r}: {found}"


def test_the_readme_counts_and_names_them_right():
    readme = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    assert f"{len(BUGS)} bugs to find" in readme
    assert f"{sum(map(in_a_folder, BUGS))} of these" in readme
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(\d+) [a-z ]*bugs", front)) <= {str(len(BUGS))}
    assert set(hunts.REFEREE) == {name for file, names in TESTS.items() for name in names
                                  if not file.startswith("engine/")}
    for number, (file, name, _) in enumerate(EXERCISES, 1):
        assert f"| {number} | `{file[:-3]}.{name}` |" in readme


def test_ninety_minutes_add_up():
    minutes = {int(number): int(n) for number, n in re.findall(
        r"^\| (\d+) \| `.*?\| (\d+) \|", (ROOT / "exercises/README.md").read_text("utf-8"), re.M)}
    assert set(minutes) == set(NUMBERS)
    plan = (ROOT / "exercises/teaching.md").read_text(encoding="utf-8").split("## 90 minutes")[1]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", plan, re.M)
    assert sum(int(n) for n, _ in rows) == 90
    for n, what in rows:
        number = re.match(r"exercise (\d+)", what)
        assert not number or int(n) == minutes[int(number[1])], what


def test_every_exercise_has_bugs_to_find():
    assert {number for number, _ in BUGS_OF_EXERCISES} == set(NUMBERS)

