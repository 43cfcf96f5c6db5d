"""What the exercises' tests say to answers: no wrong one passes, each is told its own mistake.

exercises/test_exercises.py and the open tasks' tests, run in this process on wrong_answers.py and
open_answers.py.
"""

import importlib
import re
import sys

import pytest

import start
import test_exercises
from hunts import HERE, ROOT, read
from open_answers import WRONG_OPEN
from start import EXERCISES, NUMBERS
from test_classroom import lines_of
from wrong_answers import RIGHT, WRONG


def answered(answer, folder):
    """The module of an exercise and its function as this answer has it, in a file of its own."""
    file, name, _ = EXERCISES[answer.number - 1]
    node = start.find(read(ROOT / file), name)
    text = "\n".join(lines_of(ROOT, answer.number))
    if answer.old is None:
        docstring = node.body[0].end_lineno - start.first_line(node) + 1
        text = "\n".join([*text.split("\n")[:docstring], f"    {answer.new}"])
    else:
        assert text.count(answer.old) == 1, f"{answer.name}: write the entry anew"
        text = text.replace(answer.old, answer.new)
    path = folder / f"answer_{answer.number}.py"
    path.write_text(text, encoding="utf-8")
    module = importlib.import_module(file.removesuffix(".py"))
    names = dict(vars(module))
    exec(compile(text, str(path), "exec"), names)
    return module, name, names[name]


def told(answer, folder, monkeypatch):
    """What the tests of its exercise say to an answer: the message of each one that fails."""
    module, name, function = answered(answer, folder)
    messages = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, function)
        for test_name, test in vars(test_exercises).items():
            if test_name.startswith(f"test_exercise_{answer.number:02}"):
                try:
                    test()
                except pytest.fail.Exception as failure:  # any other exception fails this test
                    messages.append(str(failure))
    return messages


# What a message may say of any answer, since it only shows what came out
SHOWN = r"You (get \w+Error|return \[)"


@pytest.mark.parametrize("number", NUMBERS)
def test_no_wrong_answer_passes_and_none_is_told_of_another(number, tmp_path, monkeypatch):
    named = 0
    some = [answer for answer in WRONG if answer.number == number]
    for answer in some:
        messages = told(answer, tmp_path, monkeypatch)
        assert messages, f"{answer.name} passes"
        assert all("Expected: " in message for message in messages), messages
        said = [message for message in messages if message.startswith("You ")]
        right = [message for message in said if answer.said and re.search(answer.said, message)]
        named += bool(right)
        assert bool(right) == bool(answer.said), f"{answer.name}: {messages}"
        others = [message for message in said
                  if message not in right and not re.match(SHOWN, message)]
        assert not others, f"{answer.name} is told something else: {others}"
    assert len(some) >= 10 and named >= 0.7 * len(some)


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: f"{answer.number} {answer.name}")
def test_unusual_right_answers_pass(answer, tmp_path, monkeypatch):
    assert told(answer, tmp_path, monkeypatch) == []


def test_no_two_mistakes_look_alike(monkeypatch):
    """Else one who made the one would be told the other."""
    tables = []
    monkeypatch.setattr(test_exercises, "check", lambda result, expected, mistakes=(), otherwise="":
                        tables.append((expected, list(mistakes))))
    for name, test in vars(test_exercises).items():
        if name.startswith("test_exercise_"):
            test()
    assert sum(len(mistakes) for _, mistakes in tables) > 100
    for expected, mistakes in tables:
        for i, (wrong, what) in enumerate(mistakes):
            assert not test_exercises.is_like(test_exercises.t(wrong), expected), what
            for other, why in mistakes[:i]:
                alike = test_exercises.is_like(test_exercises.t(wrong), other)
                assert not alike or what == why, f"{what} or {why}"


# ---------------------------------------------------------------------------- the open tasks


def told_of_open(source, folder, monkeypatch):
    """The messages of the open tasks' tests to the functions in source."""
    (folder / "open_tasks.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(HERE / "made"))
    monkeypatch.syspath_prepend(str(folder))
    for name in ("open_tasks", "test_open_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    messages = []
    for name, test in vars(importlib.import_module("test_open_tasks")).items():
        if name.startswith("test_"):
            try:
                test()
            except pytest.fail.Exception as failure:  # any other exception fails this test
                messages.append(str(failure))
    return messages


def test_the_open_tasks_have_answers(tmp_path, monkeypatch):
    source = (HERE / "tests" / "open_answers.py").read_text(encoding="utf-8")
    assert told_of_open(source, tmp_path, monkeypatch) == []


@pytest.mark.parametrize("what, old, new, said", WRONG_OPEN, ids=[x[0] for x in WRONG_OPEN])
def test_the_open_tasks_refuse(what, old, new, said, tmp_path, monkeypatch):
    source = (HERE / "tests" / "open_answers.py").read_text(encoding="utf-8").split("\n# (what")[0]
    assert source.count(old) == 1
    messages = told_of_open(source.replace(old, new), tmp_path, monkeypatch)
    assert messages, f"{what} passes"
    named = [message for message in messages if message.startswith("You ")]
    assert bool(named) == bool(said), messages
    assert all(re.search(said, message) for message in named), f"{what} is told {named}"


def test_blank_open_tasks_are_said_to_be_blank(tmp_path, monkeypatch):
    source = (HERE / "made" / "open_tasks.py").read_text(encoding="utf-8")
    messages = told_of_open(source, tmp_path, monkeypatch)
    assert len(messages) >= 5 and all("(still blank)" in message for message in messages)


def test_open_folder(tmp_path):
    start.main([str(tmp_path / "open"), "--open"])
    assert (tmp_path / "open" / "ppo.py").read_bytes() == (ROOT / "ppo.py").read_bytes()
    blank = (tmp_path / "open" / "open_tasks.py").read_text(encoding="utf-8")
    assert blank.count("NotImplementedError") == 2
    assert not (tmp_path / "open" / "open_answers.py").exists()
