"""The pencil examples of the page: what `python ppo.py` prints, function by function, and tests."""

import ast
import contextlib
import functools
import importlib
import io
import re
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"


def short(text):
    """Printed numbers with six digits: nobody does more with a pencil."""
    return re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda m: f"{float(m[0]) + 0.0:.6g}", text)


def ids(node, kind):
    return {sub.id for sub in ast.walk(node)
            if isinstance(sub, ast.Name) and isinstance(sub.ctx, kind)}


def run(statement, space):
    """What a statement prints, in float64: in float32 the fifth digit may be rounding already."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(ast.Module([statement], []), "example", "exec"), space)
    finally:
        torch.set_default_dtype(before)
    return short(out.getvalue())


def of(source):
    """The worked example under `if __name__`, run line by line: {function: {statement: output}}.

    What is printed belongs to the function that it calls, or that made what it shows; else to one
    that calls the same of another file, or has a parameter of that name; else to the one before."""
    space = dict(vars(importlib.import_module(source.module)))
    done, found, name = [], {}, None
    functions = {name: node for name, node in source.functions.items()
                 if isinstance(node, ast.FunctionDef)}
    for statement in source.example:
        output = run(statement, space)
        needed, chain = ids(statement, ast.Load), [statement]  # what it was made from
        for earlier in reversed(done):
            if ids(earlier, ast.Store) & needed:
                needed = needed - ids(earlier, ast.Store) | ids(earlier, ast.Load)
                chain.append(earlier)
        done.append(statement)
        if not output:
            continue
        used = [ids(one, ast.Load) & set(source.home) for one in chain]
        calls = next((names for names in used if names), set())
        made = set().union(*(ids(one, ast.Store) for one in chain))
        near = ([other for other in functions if other in calls]
                or [other for other, node in functions.items() if calls & ids(node, ast.Load)]
                or [other for other, node in functions.items()
                    if made and made <= {arg.arg for arg in node.args.args}] or [name])
        name = near[0]
        others = set().union(*used) & set(functions) - set(found)
        for other in {name} | others:  # others: on the way, and without an example so far
            found.setdefault(other, {}).update(
                {one: found[other].get(one, "") for one in chain} | {statement: output})
    assert None not in found, f"an example of {source.module}.py belongs to no function"
    return found


@functools.cache
def tests():
    """{name: (its lines, its file)} of all tests of the plain house."""
    found = {}
    for path in sorted(TESTS.glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                first = min(line.lineno for line in [node, *node.decorator_list])
                found[node.name] = source.split("\n")[first - 1 : node.end_lineno], path.name
    return found
