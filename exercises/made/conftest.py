"""What pytest needs to know of this folder. It counts what is done: "9 of 12 done"."""

import ast
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NUMBERS = range(1, 13)  # the blanks of this folder
passed, failed = set(), set()  # of these, by number


def pytest_pycollect_makemodule(module_path):
    """Several such folders may be tested together, and each has an lm.py, a ppo.py, ... So forget
    those of another folder before the tests of this one import theirs. And say in one line where a
    file of this folder is no Python."""
    if HERE not in module_path.resolve().parents:
        return
    for path in HERE.glob("*.py"):
        try:
            ast.parse(path.read_bytes())
        except SyntaxError as error:  # pytest would show its own way to it as well
            line = (error.text or "").strip()
            raise pytest.Collector.CollectError(
                f"{path.name}, line {error.lineno}: {error.msg}: `{line}`") from None
    ours = {".".join(path.relative_to(HERE).with_suffix("").parts) for path in HERE.rglob("*.py")}
    for name in ours - {"conftest"}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and HERE not in Path(file or "").resolve().parents:
            del sys.modules[name]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    number = re.match(r"test_exercise_(\d\d)", item.name)
    if number and item.path.resolve().parent == HERE and int(number[1]) in NUMBERS:
        (passed if report.passed else failed).add(int(number[1]))
    return report


def pytest_terminal_summary(terminalreporter):
    if passed | failed:
        left = f"; not yet: {' '.join(map(str, sorted(failed)))}" if failed else ""
        terminalreporter.write_line(
            f"{HERE.name}: {len(passed - failed)} of {len(passed | failed)} done{left}")
