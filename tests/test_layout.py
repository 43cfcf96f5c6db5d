"""The house: arrows point one way, functions are short, algorithms are commented and say no engine word."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP, ENGINE = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("engine/*.py"))
# a file may import those of later rooms, and of its own
ROOMS = [["rlhf_minimal", "contrast"], ["ppo", "reward", "sft", "judge"], ["lm", "tldr", "toy"], ["engine"]]
TAUGHT = ["sft", "reward", "ppo", "judge", "lm"]


def imported(path):
    """The project's own modules that a file imports, engine's as "engine"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & {name for room in ROOMS for name in room}


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_every_file_has_its_room():
    assert {path.stem for path in TOP} == {name for room in ROOMS[:3] for name in room}
    assert ENGINE


@pytest.mark.parametrize("path", TOP + ENGINE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_one_way(path):
    name = "engine" if path in ENGINE else path.stem
    (room,) = [i for i, names in enumerate(ROOMS) if name in names]
    allowed = {other for names in ROOMS[room:] for other in names}
    assert imported(path) <= allowed, f"{path.name} imports {imported(path) - allowed}"


@pytest.mark.parametrize("path", TOP + ENGINE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_over_60_lines(path):
    long = [(node.name, node.end_lineno - node.lineno + 1) for node in functions(path)
            if node.end_lineno - node.lineno >= 60]
    assert not long, f"{path.name}: {long}"


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


@pytest.mark.parametrize("name", TAUGHT)
def test_heavily_commented(name):
    code, words = lines_of((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert len(words) >= 0.6 * len(code), f"{name}.py: {len(words)} to {len(code)} lines of code"


@pytest.mark.parametrize("name", ["rollout", "train_ppo"])
def test_every_third_line_of_the_loop_is_explained(name):
    source = (ROOT / "ppo.py").read_text(encoding="utf-8")
    (node,) = [node for node in functions(ROOT / "ppo.py") if node.name == name]
    body = "\n".join(source.split("\n")[node.body[0].end_lineno : node.end_lineno])
    explained = len(re.findall("# ", body))
    code = sum(not line.strip().startswith("#") for line in body.split("\n") if line.strip())
    assert explained * 3 >= code, f"{explained} comments to {code} lines"


@pytest.mark.parametrize("name", TAUGHT)
def test_no_engine_word_in_an_algorithm(name):
    words = r"rank\(|gather\(|agreed\(|merge_and_unload|autocast|micro_batch|\.split\(n"
    found = [line for line in (ROOT / f"{name}.py").read_text(encoding="utf-8").split("\n")
             if re.search(words, line)]
    assert not found, found


def test_nothing_imports_the_figures():
    for path in TOP + ENGINE:
        assert not re.search(r"(import|from) figures", path.read_text(encoding="utf-8")), path
