"""Nothing lost: exact resume, whole writes, guarded folders, and runs that go wrong out loud."""

import copy
import gc
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import PROGRAM, ROOT, TOKENIZER, config, toy_model
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lm
from engine import folder as folder_file
from engine import main, origin, ppo, reward, sampling, sft, start
from engine.batches import one_step
from engine.checkpoints import flatten, is_finished, put_back
from engine.folder import Run
from engine.settings import SettingError
from lm import generator_for

HERE = Path(__file__).resolve().parent
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")]
CONFIG = {"seed": 0, "kl_beta": 0.05, "files": {"ppo.py": "a1"}, "environment": {"torch": "2.13"}}


def new_run(folder, config=CONFIG, **flags):
    return Run(folder, config, **flags)


class Killed(Exception):
    pass


def learn(run, stop_after=None, total=12):
    """A small training loop like those of sft.py, reward.py and ppo.py; returns its weights."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters())
    steps = run.steps("sft", total, model=model, optimizer=optimizer) if run else range(total)
    for step in steps:
        x = torch.randn(8, 3, generator=generator_for(0, "x", step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        with one_step(optimizer, 0.1 * lm.cosine_schedule(step, total)) as update:
            update.add(loss)
        if run:
            run.log("sft", step, loss=loss.item())
        if step == stop_after:
            raise Killed
    return [p.detach().clone() for p in model.parameters()]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def interrupted(folder, stop_after=7, **flags):
    """A run that got so far, with a checkpoint after every step."""
    run = new_run(folder, save_seconds=0, **flags)
    with pytest.raises(Killed):
        learn(run, stop_after)
    run.lock.release()


# ---------------------------------------------------------------------------- resume


def test_a_resumed_loop_ends_where_an_uninterrupted_one_does(tmp_path):
    plain = learn(None)  # without any of folder.py
    whole = new_run(tmp_path / "whole")
    assert equal(learn(whole), plain)
    interrupted(tmp_path / "run", 3)
    interrupted(tmp_path / "run", 7, resume=True)
    run = new_run(tmp_path / "run", resume=True)
    assert equal(learn(run), plain), "weights, Adam's averages or the place in the data were lost"
    assert run.lines == whole.lines and [row["step"] for row in run.history("sft")] == [*range(12)]
    for one in (run, whole):
        assert (one.folder / "metrics.jsonl").read_text() == "\n".join(whole.lines) + "\n"


def test_a_finished_stage_is_put_back_and_not_trained_again(tmp_path):
    first = new_run(tmp_path / "run")
    plain = learn(first)
    first.lock.release()
    again = new_run(tmp_path / "run", resume=True)
    assert equal(learn(again, stop_after=0), plain)  # would raise Killed at its first step
    assert again.lines == first.lines
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not any(key.startswith("optimizer") for key in load_file(checkpoint))


def test_lines_logged_after_the_last_checkpoint_and_torn_ones_are_dropped(tmp_path):
    interrupted(tmp_path / "run", 5)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "step": 6, "loss": 0.3}\n{"stage": "sf')
    run = new_run(tmp_path / "run", resume=True)
    learn(run)
    assert [row["step"] for row in run.history("sft")] == [*range(12)]


def test_seconds_go_on_from_where_they_were(tmp_path, monkeypatch):
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(folder_file, "RARELY", 0)  # by this clock, saving takes hours
    monkeypatch.setattr(folder_file.time, "perf_counter", lambda: next(clock))
    interrupted(tmp_path / "run", 5)
    monkeypatch.undo()
    run = new_run(tmp_path / "run", resume=True)
    run.started -= 10**9  # what this process did before the loop was done before, too
    learn(run)
    for seconds in (run.seconds["sft"], run.total_seconds()["total"]):
        assert 5000 < seconds < 10**6


def test_what_a_kill_left_half_written_goes_with_the_next_write(tmp_path):
    """safetensors, for one, writes a temporary file beside the file that it is asked for."""
    run = new_run(tmp_path / "run")
    with pytest.raises(Killed), run.whole("model.safetensors") as path:
        (path.parent / ".tmpX").write_text("half a file")
        path.write_text("half")
        raise Killed
    run.write("results.json", {})
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not any(".tmp" in path.name or "partial" in path.name
                   for path in (tmp_path / "run").rglob("*"))


@pytest.mark.parametrize("seconds, saved", [(0.5, 5), (2, 1)])
def test_what_takes_long_to_save_is_saved_rarely(seconds, saved, tmp_path, monkeypatch):
    """Five steps of a second each. Saving takes half a second: after each. Two: 40 s must pass."""
    clock, saves, save = SimpleNamespace(now=0.0), [], Run.save

    def slow_save(self, *rest):
        clock.now += seconds
        saves.append(clock.now)
        save(self, *rest)

    def step(number):
        clock.now += 1

    monkeypatch.setattr(folder_file.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(Run, "save", slow_save)
    run, model = new_run(tmp_path / "run", save_seconds=0), torch.nn.Linear(2, 2)
    for number in run.steps("sft", 5, model=model):
        step(number)
        run.log("sft", number, loss=0.0)
    assert len(saves) == saved + (saved == 1), "and at the end"


@pytest.mark.parametrize("harm", [
    lambda data: data[: len(data) // 2],
    lambda data: b"",
    lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    lambda data: data[:9] + bytes([data[9] ^ 4]) + data[10:],  # in the header
], ids=["truncated", "empty", "bit flipped in the data", "bit flipped in the header"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, number, tmp_path, capsys):
    interrupted(tmp_path / "run", 7)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[::-1][:number]
    for path in newest:
        path.write_bytes(harm(path.read_bytes()))
    run, starts = new_run(tmp_path / "run", resume=True), []
    really = run.log
    run.log = lambda stage, step, **rest: (starts.append(step), really(stage, step, **rest))
    assert equal(learn(run), learn(None))
    out = capsys.readouterr().out
    assert all(str(path) in out for path in newest) and out.count(" is damaged") == number
    # of the checkpoints 6 and 7 the first is used; with both gone: from the beginning
    assert starts[0] == (6 if number == 1 else 0)
    assert not any(path.exists() for path in newest), "it would count as one of the last two"


def test_two_checkpoints_are_kept_and_none_goes_before_the_next_is_safe(tmp_path, monkeypatch):
    interrupted(tmp_path / "run", 7)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name[:12] for path in kept] == ["sft-00000006", "sft-00000007"]

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder_file, "save_file", full)
    run = new_run(tmp_path / "run", resume=True, save_seconds=0)
    with pytest.raises(SafetensorError):
        learn(run)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept
    run.lock.release()
    monkeypatch.undo()
    assert equal(learn(new_run(tmp_path / "run", resume=True)), learn(None))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run")
    run.write("results.json", {"old": 1})
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.write("results.json", {"new": 2})
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"old": 1}


def test_what_is_trained_is_saved_and_nothing_else(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert set(folder_file.flatten({"m": model})) == {"m/1.weight", "m/1.bias"}
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight  # GPT-2's embedding and head; safetensors refuses both
    assert "m/b.weight" not in folder_file.flatten({"m": tied})


def test_numbers_that_json_lacks_become_null(tmp_path):
    run = new_run(tmp_path / "run")
    run.write("results.json", {"a": {"win_rate": math.nan, "n": 0}, "b": math.inf, "c": 1.5})
    text = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": {"win_rate": None, "n": 0}, "b": None, "c": 1.5}


# ---------------------------------------------------------------------------- the folder


def test_a_folder_with_a_run_needs_resume_or_restart(tmp_path):
    interrupted(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(SettingError, match="--resume.*--restart"):
        new_run(tmp_path / "run")
    assert sorted((tmp_path / "run").rglob("*")) == before
    new_run(tmp_path / "run", restart=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", origin.LOCK, "notes.txt"}
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"restart": True}])
@pytest.mark.parametrize("name, content", [
    ("thesis.tex", "mine"), ("config.json", '{"model_type": "gpt2"}'), ("config.json", "torn"),
    ("config.json", "[1]"), ("config.json", '{"files": 3, "environment": {}}'),
    ("config.json", '{"files": {}, "environment": 3}'), ("config.json", "[" * 100_000),
    (".partial", "mine"), (".lock", "mine"), ("new", "mine")])
def test_other_peoples_files_stay(name, content, flags, tmp_path):
    for folders in ([], ["sub"]):  # a hidden file alone is something, too
        for folder in folders:
            (tmp_path / folder).mkdir()
        (tmp_path / name).write_text(content)
        with pytest.raises(SettingError, match="holds other files"):
            new_run(tmp_path, **flags)
        assert {path.name for path in tmp_path.iterdir()} == {name, *folders}
        assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("change, message", [
    ({"kl_beta": 0.1}, "kl_beta was 0.05 and is now 0.1"),
    ({"files": {"ppo.py": "b2"}}, "ppo.py was a1 and is now b2"),
    ({"files": {"ppo.py": "a1", "new.py": "c3"}}, "new.py was None and is now c3"),
    ({"lam": 0.95}, "lam was None and is now 0.95"),
])
def test_resume_with_other_settings_or_files_is_refused_in_one_line(change, message, tmp_path):
    interrupted(tmp_path / "run")
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "run").rglob("*"))]
    with pytest.raises(SettingError) as error:
        new_run(tmp_path / "run", {**CONFIG, **change}, resume=True)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert before == [(path, path.stat().st_mtime_ns)
                      for path in sorted((tmp_path / "run").rglob("*"))]
    may_differ = {"output_dir": "elsewhere", "save_seconds": 5, "micro_batch_size": 3,
                  "checkpoint_activations": True}
    new_run(tmp_path / "run", {**CONFIG, **may_differ}, resume=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG


def test_another_version_is_said_once_and_not_refused(tmp_path, capsys):
    interrupted(tmp_path / "run")
    config = {**CONFIG, "environment": {"torch": "2.14"}}
    origin.check_folder(tmp_path / "run", config, resume=True)  # as prepare_run does first
    new_run(tmp_path / "run", config, resume=True)
    assert capsys.readouterr().out.count("torch 2.13, here it is 2.14: the result may differ") == 1


def test_two_at_once_in_one_folder(tmp_path):
    first = new_run(tmp_path / "run")
    with pytest.raises(SettingError, match="another process"):
        new_run(tmp_path / "run", resume=True)
    first.lock.release()
    new_run(tmp_path / "run", resume=True)


def test_each_file_a_result_depends_on_is_in_the_config(tmp_path):
    (tmp_path / "rows.jsonl").write_text("1")
    settings = {"seed": 0, "posts": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path)}
    files = origin.describe(settings)["files"]
    sources = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"lm.py", "ppo.py", "rlhf_minimal.py", "engine/folder.py", "engine/batches.py"} < sources
    assert {*files} == sources | {settings["posts"]}
    assert str(tmp_path) not in files, "the run's own folder changes all the time"
    (tmp_path / "rows.jsonl").write_text("2")
    changed = origin.describe(settings)["files"]
    assert [name for name in files if files[name] != changed[name]] == [
        settings["posts"]]


@pytest.mark.parametrize("name", ["ppo.py", "engine/batches.py", "engine/new.py", "new.py"])
def test_an_edited_or_new_source_file_refuses_a_resume_in_one_line(name, tmp_path, monkeypatch):
    """By the whole program, on a copy of its files: before anything is loaded or written."""
    copied = tmp_path / "project"
    for path in SOURCES:
        target = copied / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(ROOT / "pyproject.toml", copied)
    monkeypatch.setattr(origin, "__file__", str(copied / "engine" / "origin.py"))
    monkeypatch.setattr(start, "load_given", lambda *_: 1 / 0)
    arguments = ["--resume", "--output_dir", str(tmp_path / "run")]
    config = origin.describe(vars(main.parse(arguments)))
    new_run(tmp_path / "run", config).lock.release()
    with pytest.raises(ZeroDivisionError):
        main.main(arguments)  # nothing was edited: it goes on
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "run").rglob("*"))]
    with (copied / name).open("a") as file:
        file.write("# edited\n")
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    line = stop.value.code
    assert line.startswith(f"{PROGRAM}: --output_dir ") and line.isprintable(), line
    was, now = config["files"].get(name), origin.digest(copied / name)
    assert was != now and f"can't be resumed, {name} was {was} and is now {now}" in line, line
    assert before == [(path, path.stat().st_mtime_ns)
                      for path in sorted((tmp_path / "run").rglob("*"))]


def test_without_output_dir_resume_takes_the_last_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [origin.choose_folder("tiny", resume) for resume in (False, True)]
    assert names == ["runs/tiny-1"] * 2
    Path("runs/tiny-2").mkdir()
    assert origin.choose_folder("tiny", False) == "runs/tiny-3"
    Path("runs/tiny-3").rmdir()
    assert origin.choose_folder("tiny", True) == "runs/tiny-2"
    assert origin.choose_folder("full", True) == "runs/full-1"


def test_fresh_runs_that_begin_together_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exists, both = Path.exists, threading.Barrier(2, timeout=10)

    def at_once(path):
        found = exists(path)
        if path.name == "tiny-1" and not found:
            both.wait()  # both have seen that it is free
        return found

    monkeypatch.setattr(Path, "exists", at_once)
    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(lambda _: origin.choose_folder("tiny", False), range(2)))
    assert sorted(names) == ["runs/tiny-1", "runs/tiny-2"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    names = [origin.choose_folder("tiny", False) for _ in range(2)]
    assert names == ["runs/tiny-3"] * 2, "processes of one run must choose the same"


def test_a_chosen_folder_goes_again_if_nothing_came_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, left in ((None, []), ("config.json", ["tiny-1"])):
        def refused(settings):
            if name:
                Path(settings.output_dir, name).touch()
            raise SettingError("no")

        monkeypatch.setattr(main, "run_all", refused)
        with pytest.raises(SystemExit):
            main.main([])
        assert os.listdir("runs") == left


def test_what_is_installed_has_every_file_that_a_run_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    modules, packages = (project["setuptools"][key] for key in ("py-modules", "packages"))
    assert sorted(modules) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert set(origin.MODULES) <= set(modules) and "engine" in packages
    assert {path.parent.name for path in ROOT.glob("engine/*/*.py")} == {"tests"}, (
        "a folder that packages doesn't name")


# ---------------------------------------------------------------------------- attacks


class Part:
    """A model that can be saved: its weights are its name."""

    def __init__(self, name):
        self.name = name

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text(self.name)


@pytest.mark.parametrize("harm", [
    lambda folder: (folder / "model.safetensors").unlink(), shutil.rmtree,
    lambda folder: (folder / "model.safetensors").write_text("sm"),
    lambda folder: (folder / "model-00002-of-00002.safetensors").write_text("another's")])
def test_what_became_of_a_models_folder_is_made_good_on_a_resume(harm, tmp_path):
    run = new_run(tmp_path / "run")
    run.save_model("sft", Part("small"))
    harm(run.folder / "sft")
    run.save_model("sft", Part("small"))
    (file,) = (run.folder / "sft").iterdir()
    assert file.read_text() == "small"


def finished_run(folder):
    for name in ("sft", "reward_model", "policy", "critic"):
        (folder / name).mkdir(parents=True)
        save_file({"a": torch.zeros(9)}, folder / name / "model.safetensors")
    for name in ("results.json", "report.md"):
        (folder / name).touch()


@pytest.mark.parametrize("left, expected", [
    ({"results.json", "report.md", "checkpoints"}, True), ({"results.json", "report.md"}, True),
    ({"results.json"}, True),  # somebody threw the report away: no reason to train again
    ({"results.json", "checkpoints"}, False), ({"report.md", "checkpoints"}, False),
    (set(), False)])
def test_a_run_is_finished_when_its_report_is_there(left, expected, tmp_path):
    finished_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in {"results.json", "report.md", "checkpoints"} - left:
        path = tmp_path / name
        path.rmdir() if path.is_dir() else path.unlink()
    assert is_finished(tmp_path) == expected


@pytest.mark.parametrize("harm", [
    lambda file: file.unlink(), lambda file: shutil.rmtree(file.parent),
    lambda file: os.truncate(file, 90), lambda file: os.truncate(file, 0)])
def test_a_finished_run_with_a_damaged_model_is_said(harm, tmp_path):
    finished_run(tmp_path)
    harm(tmp_path / "policy" / "model.safetensors")
    with pytest.raises(SettingError, match="policy/ was damaged since.*--restart"):
        is_finished(tmp_path)


def trained_parts():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("old, new", [
    ("model/bias", "model/offset"), ("model/bias", None), ("optimizer/0/exp_avg", "optimizer/0/m"),
    ("optimizer/0/step", None), ("optimizer/1/exp_avg", "optimizer/2/exp_avg"),
    ("optimizer/1/exp_avg_sq", "adam/1/exp_avg_sq"), ("model/bias", (2,)),
    ("optimizer/0/exp_avg", (3, 1)), ("model/weight", (1, 1))])
def test_a_checkpoint_with_other_names_or_shapes_is_not_put_back_in_part(old, new):
    tensors = flatten(trained_parts())
    tensor = tensors.pop(old)
    if isinstance(new, str):
        tensors[new] = tensor
    elif new:
        tensors[old] = torch.zeros(new)
    parts = trained_parts()
    before = {key: value.clone() for key, value in flatten(parts).items()}
    with pytest.raises(SettingError, match="a checkpoint has other weights.*begin anew"):
        put_back(parts, tensors)
    assert all(torch.equal(before[key], value) for key, value in flatten(parts).items())


def test_a_checkpoint_is_put_back_with_and_without_averages():
    tensors, parts = flatten(trained_parts()), trained_parts()
    put_back(parts, tensors)
    assert all(torch.equal(tensors[key], value) for key, value in flatten(parts).items())
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("model")}
    put_back(parts, weights)  # of a stage that was finished
    assert flatten(parts).keys() == weights.keys()


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "n_processes", lambda: 2)
    new_run(tmp_path / "run", origin.describe({"seed": 0})).lock.release()
    monkeypatch.undo()
    with pytest.raises(SettingError, match="processes was 2 and is now 1; put it back"):
        origin.check_folder(tmp_path / "run", origin.describe({"seed": 0}), resume=True)


def test_what_changed_on_the_hub_since_the_start_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origin, "HF_HUB_CACHE", str(tmp_path / "cache"))
    ref = tmp_path / "cache" / "models--them--judge" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("c0ffee")
    settings = dict.fromkeys(origin.SOURCES)
    settings |= {"seed": 0, "posts": "us/posts", "comparisons": "us/rows", "judge": "them/judge"}
    data = [[{"post": "a"}], [{"post": "b"}], [{"chosen": "c"}], [{"chosen": "d"}]]

    def after_loading(data):
        config = origin.describe(settings)
        return config | {"from_hub": origin.describe_hub(config, data)}

    config = after_loading(data)
    assert config["from_hub"].keys() == {"us/posts", "us/rows", "them/judge"}
    assert config["from_hub"]["them/judge"] == "c0ffee"
    new_run(tmp_path / "run", config).lock.release()
    # what the hub has is known only once it is loaded
    origin.check_folder(tmp_path / "run", origin.describe(settings), resume=True)
    origin.check_folder(tmp_path / "run", after_loading(copy.deepcopy(data)), resume=True)
    for part, name in enumerate(("us/posts", "us/posts", "us/rows", "us/rows")):
        changed = copy.deepcopy(data)
        changed[part].append({"post": "new"})
        with pytest.raises(SettingError, match=f"{name} was .* and is now "):
            origin.check_folder(tmp_path / "run", after_loading(changed), resume=True)
    ref.write_text("decaf")
    with pytest.raises(SettingError, match="them/judge was c0ffee and is now decaf"):
        origin.check_folder(tmp_path / "run", after_loading(data), resume=True)


def test_a_folder_named_like_a_word_is_no_file_of_the_run(tmp_path, monkeypatch):
    """`--output_dir tiny` beside the preset of that name, say."""
    monkeypatch.chdir(tmp_path)
    settings = vars(main.parse(["--judge", "longest", "--summarize", "post.txt"]))
    files = origin.describe(settings)["files"]
    for name in ("tiny", "auto", "longest", "post.txt"):
        Path(name).mkdir()
        Path(name, "x").write_text("x")
    assert origin.describe(settings)["files"] == files


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"restart": True}])
def test_a_folder_that_may_not_be_listed_is_not_taken_for_empty(flags, tmp_path, monkeypatch):
    interrupted(tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(SettingError, match="may not be listed"):
        new_run(tmp_path / "run", **flags)
    monkeypatch.undo()
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("cut", [0, 1, len(folder_file.OURS) - 1])
def test_a_restart_that_is_cut_short_can_begin_again(cut, tmp_path, monkeypatch):
    interrupted(tmp_path / "run")
    finished_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    left, remove = [cut], Run.remove

    def kill(run, name):
        if not left[0]:
            raise Killed
        left[0] -= 1
        remove(run, name)

    changed = {**CONFIG, "kl_beta": 0.1}
    monkeypatch.setattr(Run, "remove", kill)
    with pytest.raises(Killed):
        new_run(tmp_path / "run", changed, restart=True)
    monkeypatch.undo()
    gc.collect()  # the lock of a process that is gone
    assert cut == 0 or not is_finished(tmp_path / "run")
    with pytest.raises(SettingError, match="kl_beta was 0.05 and is now 0.1"):
        new_run(tmp_path / "run", changed, resume=True)
    run = new_run(tmp_path / "run", changed, restart=True)
    assert {path.name for path in run.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", origin.LOCK, "notes.txt"}
    assert json.loads((run.folder / "config.json").read_text()) == changed


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_of_a_link_only_the_link_is_removed(tmp_path):
    interrupted(tmp_path / "run")
    (tmp_path / "large disk").mkdir()
    (tmp_path / "large disk" / "mine").touch()
    (tmp_path / "run" / "policy").symlink_to(tmp_path / "large disk")
    new_run(tmp_path / "run", restart=True)
    assert not (tmp_path / "run" / "policy").is_symlink()
    assert (tmp_path / "large disk" / "mine").exists()


def test_installed_only_our_own_modules_count(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "engine" / "origin.py"))
    (tmp_path / "engine").mkdir()
    for path in (*(f"{name}.py" for name in origin.MODULES), "engine/rows.py", "six.py"):
        (tmp_path / path).write_text("x")
    expected = {*(f"{name}.py" for name in origin.MODULES), "engine/rows.py"}
    assert {*origin.describe({})["files"]} == expected
    (tmp_path / "pyproject.toml").touch()  # a clone
    assert {*origin.describe({})["files"]} == expected | {"six.py"}


def test_the_declared_minimums_are_what_was_tested():
    """With transformers 5.0 - 5.23 fast tests failed, and Python 3.10 gets no later one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert not declared["transformers"].specifier.contains("5.23.9")
    assert not declared["torch"].specifier.contains("2.12.9")
    assert not SpecifierSet(project["requires-python"]).contains("3.10.99")
    for name, requirement in declared.items():
        found = Version(metadata.version(name)).base_version
        assert requirement.specifier.contains(found), f"{name} {found} is older than declared"


@pytest.mark.slow
def test_results_are_there_before_the_report_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["--fast_dev_run", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(main, "report", lambda *_: 1 / 0)
        main.main(arguments)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["ppo_vs_sft"] and (tmp_path / "run" / "checkpoints").exists()
    main.main([*arguments, "--resume"])
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["ppo_vs_sft"] == results["ppo_vs_sft"]
    assert (tmp_path / "run" / "report.md").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_modules_of_the_current_folder_are_not_imported_in_place_of_ours(tmp_path):
    for name in ("run", "lm", "toy", "judge", "json", "shlex"):  # -m looks for engine there
        (tmp_path / f"{name}.py").write_text("raise ZeroDivisionError")
    done = subprocess.run([sys.executable, "-m", "engine", "--seed", "-1"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith(f"{PROGRAM}: --seed -1"), done.stderr


# ---------------------------------------------------------------------------- numbers out of range


def test_a_number_out_of_its_range_is_one_line_before_any_work(tmp_path, monkeypatch):
    """By the whole program; test_engine_settings.py has every range."""
    monkeypatch.chdir(tmp_path)
    for name in ("run_all", "summarize", "choose_folder"):
        monkeypatch.setattr(main, name, lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        main.main(["--lam", "2"])
    line = stop.value.code  # a text: the exit status is 1
    assert line.startswith(f"{PROGRAM}: --lam 2.0: expected 0 to 1") and line.isprintable(), line
    assert "--help" in line and not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------- Ctrl-C


SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, folder_file.HANGUP) if number]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_saves_after_the_step_and_the_second_stops_at_once(
        number, processes, tmp_path, monkeypatch):
    """torchrun sends each signal that it gets once more, so there nothing stops at once; neither
    does a hang-up, which a system that shuts down may follow with a SIGTERM, or the reverse."""
    monkeypatch.setattr(folder_file, "n_processes", lambda: processes)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    patient = processes == 2 or number == folder_file.HANGUP
    for times, saved in ((1, ["sft-00000003"]), (2, ["sft-00000003"] if patient else [])):
        run, reached = new_run(tmp_path / str(times)), []
        with pytest.raises(KeyboardInterrupt), run.guarded():
            model = torch.nn.Linear(1, 1)
            for step in run.steps("sft", 9, model=model):
                if step == 2:
                    for _ in range(times):
                        os.kill(os.getpid(), number)
                        time.sleep(0.01)
                reached.append(step)
        assert reached == ([0, 1, 2] if saved else [0, 1])
        assert [p.name[:12] for p in (run.folder / "checkpoints").iterdir()] == saved
        assert handlers == [signal.getsignal(number) for number in SIGNALS]
        new_run(tmp_path / str(times), resume=True)  # the folder is free again


def test_between_the_stages_the_first_signal_stops(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.guarded():
        list(run.steps("sft", 2, model=torch.nn.Linear(1, 1)))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        pytest.fail("went on")


class NobodyReads:
    """A pipe whose other end, `| tee`, was ended by the same Ctrl-C."""
    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = fileno = lambda self: self.write("")


def test_ctrl_c_saves_where_nobody_reads_any_more(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", save_seconds=10**6)
    with pytest.raises(KeyboardInterrupt), run.guarded():
        for step in run.steps("sft", 9, model=torch.nn.Linear(1, 1)):
            if step == 2:
                monkeypatch.setattr(sys, "stdout", NobodyReads())
                monkeypatch.setattr(sys, "stderr", NobodyReads())
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                run.warn("kl", "too far")
    monkeypatch.undo()
    assert [p.name[:12] for p in (run.folder / "checkpoints").iterdir()] == ["sft-00000003"]
    assert run.warnings == {"kl": "too far"}


def test_ctrl_c_ends_with_130_where_nobody_reads(monkeypatch):
    monkeypatch.setattr(main, "run_all", stopped_by_ctrl_c)
    monkeypatch.setattr(sys, "stderr", NobodyReads())
    with pytest.raises(SystemExit) as stop:
        main.main(["--output_dir", "x"])
    assert stop.value.code == 130


@pytest.mark.skipif(not folder_file.HANGUP, reason="Windows")
def test_a_run_under_nohup_goes_on_when_the_terminal_closes(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = new_run(tmp_path / "run")
        with run.guarded():
            for _ in run.steps("sft", 3, model=torch.nn.Linear(1, 1)):
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.01)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_has_no_signals_and_needs_none(tmp_path):
    """As a notebook or a server may start it."""
    run = new_run(tmp_path / "run")

    def trained():
        with run.guarded():
            return learn(run)

    with ThreadPoolExecutor(1) as pool:
        assert equal(pool.submit(trained).result(), learn(None))


def stopped_by_ctrl_c(settings):
    raise KeyboardInterrupt


@pytest.mark.parametrize("typed, words", [
    ("--seed 3 --restart", "--seed 3 --output_dir runs/tiny-1"),
    ("--resume --output_dir r --missing_eos -1", "--output_dir r --missing_eos -1"),
    ("--output_dir r --judge 'a b' --restart", "--output_dir r --judge 'a b'")])
def test_ctrl_c_prints_the_command_that_goes_on(typed, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "run_all", stopped_by_ctrl_c)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    for folder, script in ((tmp_path, ROOT / "engine"), (ROOT, "-m engine")):
        monkeypatch.setattr(main, "choose_folder", lambda *_: "runs/tiny-1")
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as stop:
            main.main(shlex.split(typed))
        assert stop.value.code == 130
        command = capsys.readouterr().err.strip().split(" with: ")[1]
        assert command == f"python {script} {words} --resume"
        settings = main.parse(shlex.split(command.split(str(script))[1]))
        assert settings.resume and not settings.restart
        assert settings.output_dir == ("r" if " r" in typed else "runs/tiny-1")


def test_the_command_of_several_processes_starts_as_many(monkeypatch, capsys):
    monkeypatch.setattr(main, "run_all", stopped_by_ctrl_c)
    monkeypatch.setattr(main, "n_processes", lambda: 3)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main.main(["--output_dir", "r"])
    assert capsys.readouterr().err.strip().endswith(
        " with: torchrun --nproc_per_node 3 -m engine --output_dir r --resume")


def test_main_reads_its_own_arguments_only(monkeypatch, tmp_path):
    """In a notebook sys.argv is the kernel's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(main, "run_all", lambda settings: settings.preset)
    assert main.main() == main.main([]) == "tiny"


def test_a_terminal_that_lacks_a_letter_prints_another(monkeypatch, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(main, "run_all", lambda _: print("my cat \u2764 caf\u00e9"))
    main.main(["--output_dir", str(tmp_path)])
    out.flush()
    assert out.buffer.getvalue().decode("cp1252").strip() == "my cat ? caf\u00e9"


def test_a_disk_error_is_one_line_with_the_command_that_goes_on(tmp_path, monkeypatch):
    for error in (OSError(28, "No space left on device"), SafetensorError("No space left")):
        def full(settings):
            raise error

        monkeypatch.setattr(main, "run_all", full)
        with pytest.raises(SystemExit) as stop:
            main.main(["--output_dir", str(tmp_path / "a b")])
        line = str(stop.value.code)
        assert "No space left" in line and "\n" not in line
        assert shlex.split(line)[-3:] == ["--output_dir", str(tmp_path / "a b"), "--resume"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_too_little_memory_is_one_line_with_what_helps(error, tmp_path, monkeypatch):
    def too_large(settings):
        raise error

    monkeypatch.setattr(main, "run_all", too_large)
    with pytest.raises(SystemExit) as stop:
        main.main(["--output_dir", str(tmp_path)])
    line = stop.value.code
    assert line.startswith(f"{PROGRAM}: out of memory. What helps: ") and line.isprintable()
    for word in ("--micro_batch_size", "--checkpoint_activations", f"{tmp_path} --resume"):
        assert word in line


# ---------------------------------------------------------------------------- NaN and collapse

QUERIES = [[3, 4, 5], [6, 7], [5], [8, 3, 3, 4]] * 4


@pytest.fixture
def model():
    return toy_model()


def stopped_by(run, train):
    with pytest.raises(SettingError) as error, run.guarded():
        train()
    assert "\n" not in str(error.value)
    return str(error.value)


def saved_weights(run, stage):
    newest = sorted((run.folder / "checkpoints").glob(f"{stage}-*"))[-1]
    tensors = load_file(newest)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    return tensors, json.loads(bytes(tensors["state"].tolist()))


@pytest.mark.parametrize("quantity, spoil", [
    ("loss", lambda loss: loss * math.nan),
    # finite, but its gradient is 0 * inf
    ("gradient of the loss", lambda loss: loss + torch.sqrt(loss - loss.detach()).sum()),
])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_nan_stops_and_the_last_checkpoint_stays(stage, quantity, spoil, model, tmp_path,
                                                 monkeypatch):
    run, before, calls = new_run(tmp_path / "run", save_seconds=0), {}, []
    network = model if stage == "sft" else reward.RewardModel(model)

    def spoiled(really):
        def loss(*arguments):
            calls.append(1)
            if len(calls) == 3:
                before.update({k: v.clone() for k, v in network.named_parameters()})
                return spoil(really(*arguments))
            return really(*arguments)
        return loss

    if stage == "sft":
        monkeypatch.setattr(sft, "masked_mean", spoiled(sft.masked_mean))
        line = stopped_by(run, lambda: sft.train_sft(
            run, model, QUERIES, [[7, 2, 9]] * 16, 0,
            SimpleNamespace(micro_batch_size=0, sft_lr=1e-2, sft_batch_size=2, sft_epochs=1)))
    else:
        monkeypatch.setattr(reward, "preference_loss", spoiled(reward.preference_loss))
        line = stopped_by(run, lambda: reward.train_reward(
            run, network, [(q, [1, 7, 9], [1, 2, 9]) for q in QUERIES], 0,
            SimpleNamespace(micro_batch_size=0, reward_lr=1e-2, reward_batch_size=2,
                            reward_epochs=1)))
    assert line.startswith(f"{stage} step 2: {quantity} is NaN or infinite; what was saved before "
                           f"stays in {run.folder}")
    tensors, state = saved_weights(run, stage)
    assert state["step"] == 2 and [json.loads(row)["step"] for row in state["lines"]] == [0, 1]
    assert all(torch.equal(tensors[f"model/{k}"], v) for k, v in before.items())


@pytest.mark.parametrize("name, place", [
    ("policy_loss", "policy loss"), ("value_loss", "value loss"), ("score", "reward"),
    ("policy_gradient", "gradient of the policy loss")])
def test_nan_in_the_middle_of_an_update_is_in_no_checkpoint(name, place, model, tmp_path,
                                                            monkeypatch):
    run, policy, seen = new_run(tmp_path / "run", save_seconds=0), copy.deepcopy(model), []

    def spoiled(really, call):
        def loss(*arguments, **k):
            seen.append(1)
            value = really(*arguments, **k)
            if len(seen) != call:
                return value
            if name == "score":
                return value * math.nan
            if name == "policy_gradient":
                return value[0] + torch.sqrt(value[0] - value[0].detach()), value[1]
            return value[0] * math.nan, value[1]
        return loss

    # two epochs a step: call 4 is the second epoch of step 1, after one of its updates
    if name == "score":
        monkeypatch.setattr(ppo, "final_scores", spoiled(ppo.final_scores, 2))
    else:
        which = name.replace("gradient", "loss")
        monkeypatch.setattr(ppo, which, spoiled(getattr(ppo, which), 4))
    reward_model = reward.RewardModel(model)
    few = config(ppo_episodes=24, ppo_batch_size=8, ppo_epochs=2)
    line = stopped_by(run, lambda: ppo.train_ppo(run, policy, reward_model, QUERIES, TOKENIZER,
                                                 few))
    assert line.startswith(f"ppo step 1: {place} is NaN or infinite"), line
    tensors, state = saved_weights(run, "ppo")
    monkeypatch.undo()
    # the state after step 0 of a run in which nothing went wrong
    fine, other = new_run(tmp_path / "fine", save_seconds=0), copy.deepcopy(model)

    def stop(update):
        if update == 2:
            raise Killed

    with pytest.raises(Killed):
        ppo.train_ppo(fine, other, reward_model, QUERIES, TOKENIZER, few, stop)
    expected, fine_state = saved_weights(fine, "ppo")
    assert state["step"] == fine_state["step"] == 1
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[k], expected[k]) for k in expected if k != "state")


def test_nan_weights_are_found_before_a_token_is_drawn(model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="logit is NaN"):
            sampling.sample(model, torch.tensor([[3, 4]]), torch.ones(1, 2), 3, eos_token_id=9,
                      pad_token_id=0, temperature=temperature)


def row(step, **changes):
    return {"stage": "ppo", "step": step, "kl_per_summary": 2.0, "length": 20.0, "entropy": 1.0,
            **changes}


@pytest.mark.parametrize("changes, words", [
    ({"kl_per_summary": 40.5}, "KL 40 nats per summary, beyond 40"),
    ({"length": 4.9}, "length 4.9 tokens, down from 20"),
    ({"entropy": 0.09}, "entropy 0.09 nats per token, down from 1"),
])
def test_a_policy_that_runs_away_or_collapses_is_said_once(changes, words, tmp_path, capsys):
    run = new_run(tmp_path / "run")
    run.lines = [json.dumps(row(0))]
    folder_file.warn_of_collapse(run)
    run.lines.append(json.dumps(row(1, kl_per_summary=39.9, length=5.1, entropy=0.11)))
    folder_file.warn_of_collapse(run)
    assert not run.warnings
    for step in (2, 3):
        run.lines.append(json.dumps(row(step, **changes)))
        folder_file.warn_of_collapse(run)
    assert [*run.warnings.values()][0].startswith("ppo step 2: ") and len(run.warnings) == 1
    assert words in [*run.warnings.values()][0]
    assert "".join(capsys.readouterr()).count("warning: ") == 1


def test_warnings_come_back_with_the_checkpoint(tmp_path):
    run = new_run(tmp_path / "run", save_seconds=0)
    for step in run.steps("ppo", 4, model=torch.nn.Linear(1, 1)):
        run.warn("kl", "too far")
        if step == 2:
            break
    run.lock.release()
    again = new_run(tmp_path / "run", resume=True)
    list(again.steps("ppo", 4, model=torch.nn.Linear(1, 1)))
    assert again.warnings == {"kl": "too far"}


@pytest.mark.slow
def test_an_abstaining_judge_and_a_blind_reward_model_are_in_terminal_and_report(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "load_judge",
                        lambda *_, **__: lambda posts, a, b: [None] * len(posts))
    main.main(["--fast_dev_run", "--judge", "mute", "--output_dir", str(tmp_path / "run")])
    out = "".join(capsys.readouterr())
    report = (tmp_path / "run" / "report.md").read_text()
    for text in ("abstained on all 25 posts", "no better than chance"):
        assert text in out and text in report
    results = json.loads((tmp_path / "run" / "results.json").read_text(),
                         parse_constant=pytest.fail)
    assert results["ppo_vs_sft"]["win_rate"] is None and results["ppo_vs_sft"]["n"] == 0


# ---------------------------------------------------------------------------- each stage


def train_stage(stage, run, model):
    """Everything that a stage changes, after it."""
    torch.manual_seed(1)  # for the reward model's head
    reward_model = reward.RewardModel(model)
    if stage == "sft":
        sft.train_sft(run, model, QUERIES, [[7, 2, 9], [3, 9]] * 8, 0,
                     SimpleNamespace(micro_batch_size=0, sft_lr=1e-2, sft_batch_size=4,
                                     sft_epochs=2))
        changed = [model]
    elif stage == "reward":
        reward.train_reward(run, reward_model, [(q, [1, 7, 9], [1, 2, 9]) for q in QUERIES], 0,
                            SimpleNamespace(micro_batch_size=0, reward_lr=1e-2,
                                            reward_batch_size=4, reward_epochs=2))
        changed = [reward_model]
    else:
        critic = ppo.train_ppo(run, model, reward_model, QUERIES, TOKENIZER,
                               config(ppo_episodes=48, ppo_batch_size=8, ppo_epochs=2))
        changed = [model, critic]
    return [p.detach().clone() for module in changed for p in module.parameters()]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_each_stage_resumes_exactly(stage, model, tmp_path):
    whole = new_run(tmp_path / "whole")
    expected = train_stage(stage, whole, copy.deepcopy(model))
    run = new_run(tmp_path / "run", save_seconds=0)
    really = run.log

    def log(stage, step, **metrics):
        really(stage, step, **metrics)
        if step == 3:
            raise Killed

    run.log = log
    with pytest.raises(Killed):
        train_stage(stage, run, copy.deepcopy(model))
    run.lock.release()
    again = new_run(tmp_path / "run", resume=True)
    assert equal(train_stage(stage, again, copy.deepcopy(model)), expected)
    assert again.lines == whole.lines


@pytest.mark.slow
def test_resume_of_a_finished_run_says_so_and_does_nothing(tmp_path, capsys):
    arguments = ["--fast_dev_run", "--output_dir", str(tmp_path / "run")]
    main.main(arguments)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "run").rglob("*"))]
    capsys.readouterr()
    main.main([*arguments, "--resume"])
    out = capsys.readouterr().out
    assert "finished, nothing to resume" in out and "win rate" not in out
    assert before == [(path, path.stat().st_mtime_ns)
                      for path in sorted((tmp_path / "run").rglob("*"))]
    left = tmp_path / "run" / "checkpoints" / "ppo-00000001-0.safetensors"
    left.parent.mkdir()  # killed after results.json was written and before these were removed
    left.touch()
    main.main([*arguments, "--resume"])
    assert not left.parent.exists()
    with pytest.raises(SystemExit) as stop:
        main.main([*arguments, "--resume", "--kl_beta", "0.1"])
    assert "kl_beta was 0.05 and is now 0.1" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        main.main([*arguments, "--resume", "--restart"])
    assert "expected one of them" in stop.value.code


# ---------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_twenty_ppo_updates_leave_no_memory_behind(model, tmp_path):
    def live(update):
        if update >= 4:
            gc.collect()
            sizes.append(sum(t.numel() * t.element_size() for t in gc.get_objects()
                             if issubclass(type(t), torch.Tensor)))

    sizes, run = [], new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES, TOKENIZER,
                  config(ppo_episodes=24 * 16, ppo_batch_size=16), live)
    # a batch has the width of its longest summary: noise of less than one batch of 16 x 10 tokens
    assert len(sizes) == 21 and max(sizes) - min(sizes) < 16 * 10 * 8 * 12, sizes
    assert sizes[-1] <= max(sizes[:5]) * 1.01, sizes


# ---------------------------------------------------------------------------- slow: as it happens


def outcome(folder):
    """All that must be equal bit for bit, and what may not be left behind."""
    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items()
                    if not k.endswith(("seconds", "per_second", "bytes"))}
        return value

    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files = {name: (folder / name).read_bytes() for name in names
             if name.endswith((".safetensors", "metrics.jsonl", "samples.jsonl", "tokenizer.json"))}
    report = (folder / "report.md").read_text().split("\n", 1)[1]  # the title is the folder's name
    assert not any("checkpoints" in name or "partial" in name for name in names)
    return names, files, report, timeless(json.loads((folder / "results.json").read_text()))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill.py forks")
@pytest.mark.parametrize("mode, kills", [("time", 50), ("write", 30)])
def test_killed_many_times_and_resumed_ends_bit_for_bit_the_same(mode, kills, tmp_path):
    import kill
    halves = [tmp_path / name for name in ("one", "two")]  # at a time: two cores, half the wait

    def killed(folder):
        folder.mkdir()
        return subprocess.run([sys.executable, HERE / "kill.py", folder, mode, str(kills // 2)],
                              text=True, capture_output=True, timeout=800)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(killed, halves))
    kinds = set()
    for folder, process in zip(halves, done):
        logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert process.returncode == 0, process.stdout + process.stderr + logs
        assert "Traceback" not in logs
        if mode == "write":
            kinds |= set((folder / "kinds.txt").read_text().splitlines())
        whole = outcome(folder / "whole")
        chains = [path for path in folder.glob("chain*") if path.is_dir()]
        assert chains
        for chain in chains:
            for one, two in zip(whole, outcome(chain)):
                assert one == two, chain
    assert mode == "time" or kinds == set(kill.WRITES)


def run_script(*arguments, **options):
    return subprocess.Popen([sys.executable, ROOT / "engine", *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def small(folder):
    import kill
    return [*kill.SMALL, "--output_dir", str(folder)]


def wait_for(path, text, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text(errors="replace"):
            return
        time.sleep(0.01)
    pytest.fail(f"no {text} in {path}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_then_the_printed_command_then_the_same_end(number, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    _, errors = run_script(*small(whole)).communicate(timeout=100)
    process = run_script(*small(folder), "--save_seconds", "3600")  # only Ctrl-C saves
    wait_for(folder / "metrics.jsonl", '"ppo"')
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert any(path.name.startswith("ppo") for path in (folder / "checkpoints").iterdir())
    command = re.search(r"python (.*)", errors)[1]
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == outcome(whole)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0 and "finished, nothing to resume" in done.stdout


@pytest.mark.slow
def test_a_second_process_in_the_folder_is_refused(tmp_path):
    first = run_script(*small(tmp_path / "run"))
    wait_for(tmp_path / "run" / "metrics.jsonl", "reward")
    first.send_signal(signal.SIGSTOP)  # it keeps the folder, asleep
    try:
        second = run_script(*small(tmp_path / "run"), "--resume")
        _, errors = second.communicate(timeout=60)
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert second.returncode == 1 and "another process" in errors and "Traceback" not in errors
    assert first.returncode == 0


def full_disk(folder):
    """The start of a process for which every file ends at 150 kB: less than a checkpoint."""
    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    return {"preexec_fn": limit}, lambda: None


def small_disk(folder):
    """A real disk of 400 kB, where the user may mount one."""
    folder.parent.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder.parent],
            capture_output=True).returncode:
        pytest.skip("no right to mount")
    return {}, lambda: subprocess.run(
        ["mount", "-o", "remount,size=100m", folder.parent], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts of Linux")
@pytest.mark.parametrize("disk", [full_disk, small_disk])
def test_a_full_disk_stops_in_one_line_and_loses_nothing(disk, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "disk" / "run"
    run_script(*small(whole)).communicate(timeout=100)
    options, mend = disk(folder)
    try:
        process = run_script(*small(folder), **options)
        _, errors = process.communicate(timeout=100)
        lines = [line for line in errors.splitlines() if line.startswith(f"{PROGRAM}: ")]
        assert process.returncode == 1 and "Traceback" not in errors and len(lines) == 1, errors
        assert "--resume" in lines[0] and not (folder / "results.json").exists()
        mend()
        process = run_script(*small(folder), "--resume")
        assert process.communicate(timeout=100) and process.returncode == 0
        assert outcome(folder) == outcome(whole)
    finally:
        if disk is small_disk:
            subprocess.run(["umount", folder.parent])


@pytest.mark.slow
def test_a_nan_in_a_real_run_is_one_line(tmp_path):
    process = run_script(*small(tmp_path / "run"), "--sft_lr", "1e6")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in errors
    assert re.search(rf"{PROGRAM}: sft step \d+: .* NaN or infinite", errors), errors
