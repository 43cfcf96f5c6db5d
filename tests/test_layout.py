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
PLAIN = [name for room in ROOMS for name in room]
VARIANTS, ENGINE = sorted(ROOT.glob("variants/*.py")), sorted(ROOT.glob("engine/*.py"))
MOST_LINES = 1050  # of code, in the eight files of the plain house
LOOPS = re.compile(r"train_\w+|rollout|run_all")
layout = pytest.mark.layout


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node):
    """(module, name) of each import in it, the project's own and others."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found += [(alias.name.split(".")[0], None) for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            found += [(part.module.split(".")[0], alias.name) for alias in part.names]
    return found


def functions(path):
    return {node.name: node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)}


# ---------------------------------------------------------------------------- arrows, always


@pytest.mark.parametrize("name", PLAIN)
def test_arrows_point_one_way(name):
    (room,) = [i for i, names in enumerate(ROOMS) if name in names]
    later = {other for names in ROOMS[room:] for other in names}
    ours = {module for module, _ in imports(tree(ROOT / f"{name}.py"))
            if (ROOT / module).is_dir() or (ROOT / f"{module}.py").exists()}
    assert ours - later <= ({"engine"} if name == "rlhf_minimal" else set())


def test_only_main_knows_the_engine():
    whole = tree(ROOT / "rlhf_minimal.py")
    (main,) = [node for node in whole.body if getattr(node, "name", "") == "main"]
    whole.body.remove(main)
    assert "engine" not in {module for module, _ in imports(whole)}


@pytest.mark.parametrize("path", VARIANTS + ENGINE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_engine_and_the_variants_lean_on_the_plain_house(path):
    found = [(module, name) for module, name in imports(tree(path)) if module in PLAIN]
    if path in ENGINE:  # equations and settings, never a loop
        assert not [name for _, name in found if name and LOOPS.fullmatch(name)]
    else:
        assert "engine" not in {module for module, _ in imports(tree(path))} and found


def test_each_step_of_an_optimiser_stands_in_its_loop():
    for path in (*(ROOT / f"{name}.py" for name in ("sft", "reward", "ppo")), *VARIANTS):
        (loop,) = [node for name, node in functions(path).items() if name.startswith("train_")]
        for call in (".backward()", ".step()", ".zero_grad()"):
            assert call in ast.unparse(loop), f"{path.name} hides {call}"


# ---------------------------------------------------------------------------- sizes, `-m layout`


def lines_of(source):
    """Numbers of lines with code, and of lines with a comment or in a docstring."""
    comments, code, doc = set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            doc |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# ---"):
            comments.add(token.start[0])
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code |= set(range(token.start[0], token.end[0] + 1))
    written = {i for i, line in enumerate(source.split("\n"), 1) if line.strip()}
    return code - doc, (comments | doc) & written


def code_of(path):
    return lines_of(path.read_text(encoding="utf-8"))[0]


@layout
def test_sizes():
    assert sum(len(code_of(ROOT / f"{name}.py")) for name in PLAIN) <= MOST_LINES
    assert len(code_of(ROOT / "ppo.py")) <= 190
    long = {}
    for path in (*(ROOT / f"{name}.py" for name in PLAIN), *VARIANTS, *ENGINE):
        code = code_of(path)
        for name, node in functions(path).items():
            size = len(code & set(range(node.lineno, node.end_lineno + 1)))
            if size > {"rollout": 35, "train_ppo": 45}.get(name, 50):
                long[f"{path.name}: {name}"] = size
        if path in ENGINE and len(code) > 250:
            long[path.name] = len(code)
    assert not long
    assert sum(len(code_of(path)) for path in ENGINE) <= 1800


@layout
@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "judge", "lm"])
def test_heavily_commented_and_not_more(name):
    code, words = lines_of((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert 0.6 <= len(words) / len(code) <= 0.8, f"{name}.py: {len(words)} to {len(code)}"
