"""`pytest -m bugs`: each bug of exercises/bugs.py, planted in a copy, makes the fast tests fail.

The first test that fails has to point at the cause: its name or its message matches the bug's hint.
A bug that no test sees fails here, and so does one whose text is not in its file just once.
"""

import contextlib
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest

from bugs import BUGS, plant
from hunts import copy_project

pytestmark = pytest.mark.bugs
ROOT = Path(__file__).parent.parent
# the tests that concern a file, the ones on paper before the loop
TESTS = {"tldr.py": ["test_tldr.py"], "toy.py": ["test_toy.py"], "sft.py": ["test_loop.py"],
         "reward.py": ["test_reward.py"], "judge.py": ["test_judge.py", "test_loop.py"],
         "lm.py": ["test_lm.py", "test_loop.py"], "ppo.py": ["test_ppo.py", "test_loop.py"],
         "engine/batches.py": ["test_batches.py", "test_loop.py"]}
# Imported once, by a process that each bug then is a fork of: seconds saved a bug
SLOW_TO_IMPORT = ["torch", "pytest", "datasets", *(
    f"transformers.models.{name}.modeling_{name}" for name in
    ("llama", "gpt2", "gptj", "gpt_neox", "qwen2"))]


class Failures:
    """A plugin of pytest that keeps name and message of each failure."""

    def __init__(self):
        self.found = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.found.append((report.nodeid, crash.message if crash else report.longreprtext))

    def pytest_collectreport(self, report):
        if report.failed:
            self.found.append((report.nodeid, report.longreprtext))


def python_files(folder):
    """The text of each file that a folder of the project runs with, by its path."""
    paths = (*folder.glob("*.py"), *folder.glob("engine/*.py"))
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in paths}


def write_failures(folder, tests, *options):
    """In a process of its own: run the tests on the modules in folder."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    plugin = Failures()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main([*map(str, tests), "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={folder}",
                     "-m", "not slow and not bugs", *options], plugins=[plugin])
    names = {path: path.removesuffix(".py").replace("/", ".") for path in python_files(ROOT)}
    ours = {path: sys.modules[name] for path, name in names.items() if name in sys.modules}
    assert ours and all(Path(ours[path].__file__) == Path(folder, path) for path in ours)
    Path(folder, "failures.json").write_text(json.dumps(plugin.found))


@pytest.fixture(scope="module")
def run_tests():
    """run_tests(folder, tests, *options of pytest) -> [(name, message) of each failure]"""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(SLOW_TO_IMPORT)

    def run(folder, tests, *options):
        process = context.Process(target=write_failures, args=(folder, tests, *options))
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            pytest.fail("the tests took more than two minutes")
        assert process.exitcode == 0, "the tests could not be run"
        return json.loads((folder / "failures.json").read_text())

    return run


@pytest.mark.parametrize("number", range(len(BUGS)), ids=lambda n: f"{n} {BUGS[n].name}")
def test_the_fast_tests_catch(number, tmp_path, run_tests):
    bug = BUGS[number]
    plant(bug, copy_project(tmp_path))
    tests = [ROOT / "tests" / name for name in TESTS[bug.file]]
    found = run_tests(tmp_path, tests, "-x")
    assert found, f"no test of {' and '.join(TESTS[bug.file])} sees this bug in {bug.file}"
    (name, message), *_ = found
    assert re.search(bug.hint, f"{name}\n{message}"), (
        f"{name} fails, but says nothing of {bug.hint!r}:\n{message}")


def test_without_a_bug_nothing_fails(tmp_path, run_tests):
    names = sorted({name for names in TESTS.values() for name in names})
    assert run_tests(copy_project(tmp_path), [ROOT / "tests" / name for name in names]) == []


def test_bugs_are_different_and_complete():
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        assert all(bug._replace(new="x")) and bug.old != bug.new
        text = (ROOT / bug.file).read_text(encoding="utf-8").replace(bug.old, bug.new)
        compile(text, bug.name, "exec")  # it runs: the program with the bug is one
