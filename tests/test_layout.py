"""The house: which way imports point (always), and how large its rooms are (`pytest -m layout`).

A change of yours may make a file longer, or say less: no plain `pytest` fails over that.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a file may import those of its own room and of later ones
ROOMS = [["rlhf_minimal"], ["ppo", "reward", "sft", "judge"], ["lm", "tldr", "toy"]]
PLAIN = [ROOT / f"{name}.py" for room in ROOMS for name in room]
VARIANTS, ENGINE = sorted(ROOT.glob("variants/*.py")), sorted(ROOT.glob("engine/*.py"))
PPO_LINES, ENGINE_FILE, FUNCTION = 190, 250, 50  # of code
LONGER = {"rollout": 35, "train_ppo": 45}  # and these functions
# The aims are 1,050 and 1,800 lines. They are missed, and these are ceilings: lower them when a line
# goes, and raise them for none
PLAIN_LINES, ENGINE_LINES = 1206, 2400
COMMENTS = 0.6, 0.9  # lines of comment and docstring for each line of code


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node):
    """{(module, name)} of each import in it; the name is None where it is the module."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {(alias.name.split(".")[0], None) for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            found |= {(part.module.split(".")[0], alias.name) for alias in part.names}
    return found


# ---------------------------------------------------------------------------- arrows, always


@pytest.mark.parametrize("path", PLAIN + VARIANTS, ids=lambda path: path.stem)
def test_arrows_point_one_way(path):
    whole = tree(path)
    if path.stem == "rlhf_minimal":  # hands over to the engine in one visible place
        (main,) = [node for node in whole.body if getattr(node, "name", "") == "main"]
        assert "engine" in {module for module, _ in imports(main)}
        whole.body.remove(main)
    (room,) = [i for i, names in enumerate(ROOMS) if path.stem in names] or [0]
    against = {"engine", "figures", "exercises", "benchmarks", "docs", *sum(ROOMS[:room], [])}
    assert not against & {module for module, _ in imports(whole)}


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_the_engine_takes_equations_and_no_loop(path):
    assert not [name for module, name in imports(tree(path))
                if ROOT / f"{module}.py" in PLAIN and name
                and re.fullmatch(r"train_\w+|rollout|run_all", name)]


# ---------------------------------------------------------------------------- sizes, `-m layout`


def lines_of(path):
    """Numbers of lines with code, and of lines with a comment or in a docstring."""
    source, comments, code, doc = path.read_text(encoding="utf-8"), set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node)):
            doc |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# ---"):
            comments.add(token.start[0])
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code |= set(range(token.start[0], token.end[0] + 1))
    written = {i for i, line in enumerate(source.split("\n"), 1) if line.strip()}
    return code - doc, (comments | doc) & written


@pytest.mark.layout
def test_sizes():
    found = {path: lines_of(path)[0] for path in PLAIN + VARIANTS + ENGINE}
    long = {path.name: len(found[path]) for path in ENGINE if len(found[path]) > ENGINE_FILE}
    for path, code in found.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                size = len(code & set(range(node.lineno, node.end_lineno + 1)))
                if size > LONGER.get(node.name, FUNCTION):
                    long[f"{path.name}: {node.name}"] = size
    for name, paths, most in (("plain house", PLAIN, PLAIN_LINES), ("engine", ENGINE, ENGINE_LINES),
                              ("ppo.py", [ROOT / "ppo.py"], PPO_LINES)):
        if (size := sum(len(found[path]) for path in paths)) > most:
            long[name] = size
    assert not long


@pytest.mark.layout
@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "judge", "lm"])
def test_heavily_commented_and_not_more(name):
    code, words = lines_of(ROOT / f"{name}.py")
    assert COMMENTS[0] <= len(words) / len(code) <= COMMENTS[1], f"{len(words)} to {len(code)}"


@pytest.mark.layout
def test_each_step_of_an_optimiser_stands_in_its_loop():
    for path in (*(ROOT / f"{name}.py" for name in ("sft", "reward", "ppo")), *VARIANTS):
        (loop,) = [node for node in tree(path).body if getattr(node, "name", "")[:6] == "train_"]
        for call in (".backward()", ".step()", ".zero_grad()"):
            assert call in ast.unparse(loop), f"{path.name} hides {call}"
