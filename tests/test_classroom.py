"""exercises/start.py: what it blanks, what it leaves alone, and that its tests know the answers."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

import start
from bugs import BUGS, plant
from start import EXERCISES, ROOT, copy_project
from test_bugs import TESTS, python_files, run_tests  # noqa: F401 (a fixture)

NUMBERS = range(1, len(EXERCISES) + 1)


def lines_of(folder, number):
    """The lines of the function of an exercise, decorators included, in the folder."""
    file, name, _ = EXERCISES[number - 1]
    source = (folder / file).read_text(encoding="utf-8").split("\n")
    node = start.find(source, name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return source[first - 1 : node.end_lineno]


def without(source, lines):
    source, lines = "\n".join(source), "\n".join(lines)
    assert source.count(lines) == 1
    return source.replace(lines, "").split('if __name__ == "__main__":')[0].rstrip()


def differing(folder):
    ours, theirs = python_files(ROOT), python_files(folder)
    return {name for name in ours if ours[name] != theirs.get(name)}


@pytest.mark.parametrize("number", NUMBERS)
def test_one_blank(number, tmp_path):
    start.main([str(tmp_path / "one"), "--exercise", str(number)])
    file, name, title = EXERCISES[number - 1]
    assert differing(tmp_path / "one") == {file}
    real, blank = lines_of(ROOT, number), lines_of(tmp_path / "one", number)
    ours, theirs = (ast.parse("\n".join(lines)).body[0] for lines in (real, blank))
    assert ast.dump(ours.args) == ast.dump(theirs.args), "the signature stays"
    assert ast.get_docstring(ours, clean=False) == ast.get_docstring(theirs, clean=False) != None
    assert blank == [*real[: len(blank) - 1],
                     f'    raise NotImplementedError("Exercise {number}: {title}")']
    assert without((ROOT / file).read_text(encoding="utf-8").split("\n"), real) == without(
        (tmp_path / "one" / file).read_text(encoding="utf-8").split("\n"), blank), "only that one"


def test_no_line_of_a_solution_is_left(tmp_path):
    start.main([str(tmp_path / "all")])
    left = Counter(line.strip() for text in python_files(tmp_path / "all").values()
                   for line in text.split("\n"))
    whole = Counter(line.strip() for text in python_files(ROOT).values()
                    for line in text.split("\n"))
    for number in NUMBERS:
        solution = lines_of(ROOT, number)[len(lines_of(tmp_path / "all", number)) - 1 :]
        for line in filter(None, map(str.strip, solution)):
            assert left[line] < whole[line], f"exercise {number}: {line!r} is still somewhere"
    assert not {"bugs.py", "start.py"} & {path.name for path in tmp_path.rglob("*")}
    code = re.sub(r'""".*?"""', "", (tmp_path / "all" / "reward.py").read_text(), flags=re.S)
    assert "logsigmoid" not in code, "a worked example gives the answer away"


def test_only_the_function_is_taken_from_what_is_handed_in(tmp_path, capsys):
    ada = tmp_path / "ada"
    start.main([str(ada)])
    text = (ada / "ppo.py").read_text(encoding="utf-8")
    mine = '  "tidy"\n  return x * 0.0  # two spaces\n'
    text = re.sub(r'(def whiten\(x, mask\):\n).*?NotImplementedError\("Exercise 8[^\n]*\n',
                  lambda m: m[1] + mine, text, flags=re.S)
    (ada / "ppo.py").write_text(text + "\nraise SystemExit('run on import')\n", encoding="utf-8")
    (ada / "judge.py").write_text("def judge_pairwise(:\n", encoding="utf-8")
    (ada / "lm.py").unlink()
    start.main([str(tmp_path / "checked"), "--from", str(ada)])
    checked = python_files(tmp_path / "checked")
    assert "def whiten(x, mask):\n" + mine in checked["ppo.py"]
    assert "SystemExit" not in checked["ppo.py"]
    assert "Exercise 11" in checked["judge.py"] and "Exercise 1:" in checked["lm.py"]
    said = capsys.readouterr().out
    assert "exercise 11 stays blank" in said and "exercise 1 stays blank" in said
    for text in checked.values():
        ast.parse(text)
    assert checked["test_exercises.py"] == (ROOT / "exercises/test_exercises.py").read_text(
        encoding="utf-8"), "the tests are ours, not what was handed in"


@pytest.mark.parametrize("number", [0, 40, 50, len(BUGS) - 1])  # 40: a file of engine/
def test_a_bug_is_planted_and_not_named(number, tmp_path, capsys):
    start.main([str(tmp_path / "hunt"), "--bug", str(number)])
    bug = BUGS[number]
    (name,) = differing(tmp_path / "hunt")
    assert name == bug.file
    assert python_files(tmp_path / "hunt")[name] == (ROOT / name).read_text(
        encoding="utf-8").replace(bug.old, bug.new)
    found = {path.relative_to(tmp_path / "hunt").as_posix()
             for path in (tmp_path / "hunt").rglob("*") if path.is_file()}
    assert found == {*python_files(ROOT), "pytest.ini", "test_hunt.py"}, "no test that names it"
    said = capsys.readouterr().out
    assert name not in said and not any(bug.name in said for bug in BUGS)


def test_a_random_bug_is_that_of_its_seed():
    chosen = [start.choose_bug("random", str(seed)) for seed in range(40)]
    assert chosen == [start.choose_bug("random", str(seed)) for seed in range(40)]
    assert len(set(chosen)) > 20


@pytest.mark.parametrize("arguments", [["--exercise", "13"], ["--exercise", "0"], ["--bug", "999"],
                                       ["--bug", "-1"], ["--bug", "x"], ["--from", "nowhere"],
                                       ["--bug", "1", "--exercise", "2"]])
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


# ---------------------------------------------------------------------------- slow: its own tests


def groups(found):
    return {int(re.search(r"exercise_(\d\d)", name)[1]) for name, _ in found}


@pytest.mark.slow
def test_filled_from_the_real_files_every_test_passes(tmp_path, run_tests):
    start.main([str(tmp_path / "full"), "--from", str(ROOT)])
    for number in NUMBERS:
        assert lines_of(tmp_path / "full", number) == lines_of(ROOT, number)
    assert run_tests(tmp_path / "full", [tmp_path / "full" / "test_exercises.py"]) == []


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
    assert any("\nexpected" not in message or re.search(bug.hint, message)
               for _, message in found), f"no mistake is named, nothing of {bug.hint!r}: {found}"


def test_the_readme_counts_and_names_them_right():
    readme = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    assert f"{len(BUGS)} bugs to find" in readme
    of_notebook = sum("(notebook)" in bug.name for bug in BUGS)
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"**{len(BUGS)} realistic bugs" in front and f"{of_notebook} of the notebook's" in front
    referee = re.search(r"pytest -o pythonpath=hunt tests/test_\{([a-z,]+)\}\.py", readme)[1]
    assert {f"test_{name}.py" for name in referee.split(",")} == {
        name for names in TESTS.values() for name in names}
    number = int(re.search(r"`--bug (\d+)`", readme)[1])
    assert BUGS[number].name == "the score is paid at every token (notebook)"
    for number, (file, name, _) in enumerate(EXERCISES, 1):
        assert f"| {number} | `{file[:-3]}.{name}` |" in readme


def test_every_exercise_has_bugs_to_find():
    assert {number for number, _ in BUGS_OF_EXERCISES} == set(NUMBERS)
