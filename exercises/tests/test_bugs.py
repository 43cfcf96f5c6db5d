"""`pytest -m bugs exercises/tests`: each bug of exercises/bugs.py, planted in a copy, is caught.

The tests of its file are run until one fails, those first that speak of the bug: whose name or text
matches its hint. The one that fails has to point at the cause: its name or its message matches the
hint. A bug that no test sees fails here, and so does one whose text is not in its file just once.
"""

import contextlib
import gc
import json
import linecache
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest

from bugs import BUGS, plant
from hunts import ROOT, copy_project, in_a_folder

# the tests that concern a file, the ones on paper before the loop
TESTS = {"tldr.py": ["tests/test_tldr.py"],
         "toy.py": ["tests/test_toy.py"],
         "lm.py": ["tests/test_lm.py", "tests/test_loop.py"],
         "sft.py": ["tests/test_loop.py"],
         "reward.py": ["tests/test_reward.py", "tests/test_loop.py"],
         "ppo.py": ["tests/test_ppo.py", "tests/test_loop.py"],
         "judge.py": ["tests/test_judge.py", "tests/test_loop.py"],
         "engine/schema.py": ["engine/tests/test_rows.py"],
         "engine/data.py": ["engine/tests/test_data.py"],
         "engine/batches.py": ["engine/tests/test_batches.py"],
         "engine/judges.py": ["engine/tests/test_engine_judge.py"]}
# Imported once, by a process that each bug then is a fork of: seconds saved a bug
SLOW_TO_IMPORT = ["torch", "pytest", "transformers", "tokenizers", "safetensors.torch", "datasets",
                  "tqdm.auto", *(f"transformers.models.{name}.modeling_{name}" for name in
                                 ("llama", "gpt2", "gptj", "gpt_neox", "qwen2"))]


def text_of(function):
    """Its source, to the next two blank lines (inspect.getsource takes a second for all tests)."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    return "".join(lines).split("\n\n\n")[0]


class Failures:
    """A plugin of pytest: tests that speak of `hint` come first; name and message of each failure
    are kept."""

    def __init__(self, hint):
        self.hint, self.found = hint, []

    def pytest_collection_modifyitems(self, items):
        texts = {item: (item.name, text_of(item.function)) for item in items}
        for i in (1, 0):  # the name counts more than the text
            items.sort(key=lambda item: not re.search(self.hint, texts[item][i]))

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


def write_failures(folder, tests, hint, *options):
    """In a process of its own: run the tests on the modules in folder."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # or what the parent has imported would be looked at again and again
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of other packages, slow to load
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    plugin = Failures(hint)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main([*map(str, tests), "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={folder}",
                     "-m", "not slow and not bugs and not layout", *options], plugins=[plugin])
    names = {path: path.removesuffix(".py").replace("/", ".") for path in python_files(folder)}
    ours = {path: sys.modules[name] for path, name in names.items() if name in sys.modules}
    assert ours and all(Path(ours[path].__file__) == Path(folder, path) for path in ours)
    Path(folder, "failures.json").write_text(json.dumps(plugin.found))


@pytest.fixture(scope="module")
def run_tests():
    """run_tests(folder, tests, hint, *options of pytest) -> [(name, message) of each failure]"""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(SLOW_TO_IMPORT)

    def run(folder, tests, hint="", *options):
        process = context.Process(target=write_failures, args=(folder, tests, hint, *options))
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            pytest.fail("the tests took more than two minutes")
        assert process.exitcode == 0, "the tests could not be run"
        return json.loads((folder / "failures.json").read_text())

    return run


@pytest.mark.bugs
@pytest.mark.parametrize("number", range(len(BUGS)), ids=lambda n: f"{n} {BUGS[n].name}")
def test_the_fast_tests_catch(number, tmp_path, run_tests):
    bug = BUGS[number]
    plant(bug, copy_project(tmp_path, engine=not in_a_folder(bug)))
    found = run_tests(tmp_path, [ROOT / name for name in TESTS[bug.file]], bug.hint, "-x")
    assert found, f"no test of {' and '.join(TESTS[bug.file])} sees this bug in {bug.file}"
    (name, message), *_ = found
    assert re.search(bug.hint, f"{name}\n{message}"), (
        f"{name} fails, but says nothing of {bug.hint!r}:\n{message}")


@pytest.mark.bugs
def test_without_a_bug_nothing_fails(tmp_path, run_tests):
    """In a copy, that is. The tests of the loop, which take their time, are left to a run of their
    own."""
    names = {name for names in TESTS.values() for name in names} - {"tests/test_loop.py"}
    folder = copy_project(tmp_path, engine=True)
    assert run_tests(folder, [ROOT / name for name in sorted(names)]) == []


def test_bugs_are_different_and_complete(tmp_path):
    assert len(BUGS) >= 121 and len({bug.name for bug in BUGS}) == len(BUGS)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        assert all(bug._replace(new="x")) and bug.old != bug.new and bug.file in TESTS
        (tmp_path / bug.file).parent.mkdir(exist_ok=True)
        (tmp_path / bug.file).write_bytes((ROOT / bug.file).read_bytes())
        plant(bug, tmp_path)
        text = (tmp_path / bug.file).read_text(encoding="utf-8")
        compile(text, bug.name, "exec")  # it runs: the program with the bug is one
