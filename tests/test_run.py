"""A whole run of the tiny world: its folder, --resume, what is refused, the command line.

The killed runs are real processes that get a real SIGKILL: forks of this one, which has done
nothing but import.
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_minimal
import toy
from reward import RewardModel
from rlhf_minimal import Run, parse_settings

ROOT = Path(rlhf_minimal.__file__).resolve().parent
TINY = ("--seed 4 --toy_posts 96 --toy_comparisons 64 --toy_held_out 12 --toy_width 16 "
        "--toy_heads 2 --toy_layers 1 --ppo_episodes 24 --ppo_batch_size 8 --ppo_epochs 1 "
        "--judge_every 2 --judge_during 4 --judge_posts 8 --best_of_n 2 "
        "--response_length 8").split()
MODELS = "sft", "reward_model", "critic", "policy"


def run_in(folder, *arguments):
    return rlhf_minimal.main([*TINY, *arguments, "--output_dir", str(folder)])


def copy_root_files(folder):
    """What a hand-out has: the root files alone."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The program believes that it stands here, without an engine, and may be edited."""
    monkeypatch.setattr(rlhf_minimal, "ROOT", copy_root_files(tmp_path / "project"))
    monkeypatch.setitem(sys.modules, "engine", None)  # an import of it is an error
    return tmp_path / "project"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped, by the command line of a hand-out, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    project = copy_root_files(folder / "project")
    done = subprocess.run([sys.executable, project / "rlhf_minimal.py", *TINY, "--output_dir",
                           folder / "whole"], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder / "whole", out=done.stdout)


def refused(arguments):
    """The one line that the program ends in."""
    with pytest.raises(SystemExit) as stop:
        rlhf_minimal.main([str(word) for word in arguments])
    line = stop.value.code
    assert line.startswith("rlhf_minimal: ") and "\n" not in line, line
    return line


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def outcome(folder):
    """What has to be the same, bit for bit, whatever happened on the way."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {**{name: (folder / name / "model.safetensors").read_bytes() for name in MODELS},
            **{name: (folder / name).read_text(encoding="utf-8")
               for name in ("metrics.jsonl", "samples.jsonl")},
            "results": {key: value for key, value in results.items()
                        if not key.endswith(("seconds", "bytes"))}}


def same_outcome(one, two):
    one, two = outcome(one), outcome(two)
    assert [name for name in one if one[name] != two[name]] == [], "differ from the other run's"


# ---------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_every_file_also_without_an_engine(finished):
    folder = finished.folder
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "results.json", *MODELS}
    sft, policy = (AutoModelForCausalLM.from_pretrained(folder / name)
                   for name in ("sft", "policy"))
    assert any((one != two).any() for one, two in zip(sft.parameters(), policy.parameters()))
    for name in MODELS:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
    reward_model = RewardModel.from_pretrained(folder / "reward_model")
    assert reward_model.reference_mean != 0 and not reward_model.training
    results = json.loads((folder / "results.json").read_text())
    for key in ("preset seed reward_accuracy reward_accuracy_longest_wins sft_vs_reference "
                "ppo_vs_reference ppo_vs_sft best_of_n_vs_reference kl_per_summary reward_sft "
                "reward_ppo mean_length_sft mean_length_ppo seconds peak_memory_bytes "
                "reward_accuracy_true_taste reward_accuracy_post_blind ideal_vs_reference "
                "fact_accuracy").split():
        assert key in results
    for key in ("sft_vs_reference", "ppo_vs_reference", "ppo_vs_sft"):
        assert results[key]["judge"] == "labeler" and results[key]["n"] == 8
        assert results[key]["low"] <= results[key]["win_rate"] <= results[key]["high"]
    assert results["ideal_vs_reference"]["win_rate"] == 1.0
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    assert [(x["stage"], x["step"]) for x in lines if x["stage"] in ("ppo", "judge")] == [
        ("ppo", 0), ("ppo", 1), ("judge", 2), ("ppo", 2)]
    assert {x["stage"] for x in lines} == {"sft", "reward", "ppo", "judge"}
    assert {"sft", "reward", "ppo", "total"} <= results["seconds"].keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 4 and config["lam"] == 0.95 and config["device"] == "cpu"
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert len(samples) == 8 and {"post", "reference", "sft", "ppo"} <= samples[0].keys()
    assert "Win rates, judged by: labeler" in finished.out and str(folder) in finished.out


def test_texts_in_and_texts_out(finished):
    """What run_all does with posts, on the models that it has left."""
    settings = parse_settings(TINY)
    posts, held_out, compared, _ = toy.make_data(settings)
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(finished.folder / "policy")
    rows = toy.make_comparisons(compared, [], [], 0)
    pairs = rlhf_minimal.encode_pairs(rows, tokenizer, settings)
    assert [[row["chosen"], row["rejected"]] for row in rows] == [
        [tokenizer.decode(ids[:-1]).strip() for ids in sides] for _, *sides in pairs]
    scores = rlhf_minimal.score(
        tokenizer, settings, RewardModel.from_pretrained(finished.folder / "reward_model"), posts,
        [post["summary"] for post in posts])
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4), "references have mean 0"
    write = partial(rlhf_minimal.write, tokenizer, settings, policy, held_out)
    assert write() == write(0.0, "any stream") and len(write()) == len(held_out)
    assert write(1.0, "a", 0) == write(1.0, "a", 0) != write(1.0, "a", 1), "a stream has its name"


def test_a_second_run_of_the_seed_is_the_same_and_is_told_with_a_report(
        finished, tmp_path, monkeypatch, capsys):
    told = []

    def report(run, results, samples, *rest):
        told.append((results["seed"], len(samples)))
        run.write("report.md", "# a report")

    for name in ("engine", "engine.report"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["engine.report"].report = report
    run_in(tmp_path / "two")
    assert told == [(4, 8)]
    same_outcome(finished.folder, tmp_path / "two")
    capsys.readouterr()
    monkeypatch.setattr(rlhf_minimal, "run_all", pytest.fail)
    assert run_in(tmp_path / "two", "--resume") is None
    assert "is finished, nothing to resume" in capsys.readouterr().out


def test_a_fresh_run_has_a_fresh_folder_and_resume_takes_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for taken, fresh, last in ((0, 1, 1), (1, 2, 1), (2, 3, 2)):
        if taken:
            Path(f"runs/tiny-{taken}").mkdir(parents=True)
        assert parse_settings([]).output_dir == f"runs/tiny-{fresh}"
        assert parse_settings(["--resume"]).output_dir == f"runs/tiny-{last}"


# ---------------------------------------------------------------------------- --resume


def kill_at(moment, place):
    """In this process: SIGKILL in the middle of the moment-th write of a run; what it was goes to
    the file place. Returns [- number of writes so far]; moment 0 only counts."""
    left = [moment]

    def event(owner, name, what, half):
        really = getattr(owner, name)

        def wrapped(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                with open(place, "a", encoding="utf-8") as file:
                    file.write(f"{what} {arguments[1]}\n")
                half(really, *arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*arguments, **named)

        setattr(owner, name, wrapped)

    def half_a_line(really, run, *_):
        with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"stage": "sf')

    def half_a_model(really, run, name, *parts):
        parts[0].save_pretrained(run.folder / "unfinished")
        file = run.folder / "unfinished" / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)

    rlhf_minimal.os = SimpleNamespace(replace=os.replace, listdir=os.listdir)  # its own, not everybody's
    event(rlhf_minimal.os, "replace", "before", lambda *_: None)
    event(rlhf_minimal.os, "replace", "after", lambda really, *paths: really(*paths))
    event(Path, "write_text", "file", lambda really, path, text: really(path, text[:30]))
    event(Run, "save", "model", half_a_model)
    event(Run, "log", "line", half_a_line)
    return left


def forked(folder, moment=None, seconds=None):
    """A run that goes on in folder, as a process; True if it ended, False if it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with open(f"{folder}.log", "a") as file, contextlib.redirect_stdout(file):
            try:
                sys.modules["engine"], rlhf_minimal.ROOT = None, folder.parent / "project"
                left = kill_at(moment, f"{folder}.killed") if moment is not None else [0]
                run_in(folder, "--resume")
                if moment == 0:
                    Path(f"{folder}.events").write_bytes(str(-left[0]).encode())
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, Path(f"{folder}.log").read_text()[-2000:]
    return not killed


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_killed_and_resumed_ends_bit_for_bit_the_same(finished, tmp_path):
    """At a moment of each stage and inside two saves, one after the other in one folder."""
    copy_root_files(tmp_path / "project")
    folder, draw = tmp_path / "run", random.Random(os.environ.get("KILLS_SEED", 1))
    # Events: config.json 3, metrics.jsonl 3, SFT 3 lines, its model 3; then without config.json and
    # with SFT done: metrics.jsonl 3, reward model 8 lines and 3; with that done, PPO 4 lines and 6
    for moment in (10, 10 + draw.randrange(8), 12, 15 + draw.randrange(5), 8 + draw.randrange(9)):
        assert not forked(folder, moment), "it was to be killed"
    assert forked(folder)
    same_outcome(finished.folder, folder)
    assert Path(f"{folder}.killed").read_text().split()[:2] == ["model", "sft"]


@needs_fork
@pytest.mark.slow
def test_killed_thirty_times_and_resumed_ends_bit_for_bit_the_same(finished, tmp_path):
    """Twenty at events, ten by the clock; a folder that is done gives place to the next."""
    copy_root_files(tmp_path / "project")
    draw, kills, chain, began = random.Random(7), 0, 0, time.perf_counter()
    assert forked(tmp_path / "count", 0)
    seconds = time.perf_counter() - began
    events = int((tmp_path / "count.events").read_text())
    same_outcome(finished.folder, tmp_path / "count")
    while kills < 30:
        folder, ended = tmp_path / f"run{chain}", False
        while not ended:
            if kills % 3 == 2:
                ended = forked(folder, seconds=draw.uniform(0.2, 1) * seconds)
            else:
                ended = forked(folder, draw.randrange(5, events))
            kills += not ended
        same_outcome(finished.folder, folder)
        chain += 1
    places = "".join(path.read_text() for path in tmp_path.glob("*.killed"))
    for place in ("line sft", "line reward", "line ppo", "model", "before", "after", "file"):
        assert place in places, f"never killed there: {place}"


@pytest.fixture
def begun(root, tmp_path):
    """The folder of a run that has done nothing yet."""
    Run(parse_settings([*TINY, "--output_dir", str(tmp_path / "run")]))
    return tmp_path / "run"


def test_stages_that_are_done_are_left_out_and_lines_of_the_others_go(begun):
    lines = [json.dumps({"stage": stage, "step": 0}) for stage in ("sft", "reward", "ppo", "judge")]
    for done, left in (("critic", 0), ("sft", 1), ("reward_model", 2), ("policy", 4)):
        (begun / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "pp')
        (begun / done).mkdir()
        run = Run(parse_settings([*TINY, "--resume", "--output_dir", str(begun)]))
        assert run.lines == lines[:left], f"{done} is done"
        assert (begun / "metrics.jsonl").read_text() == "".join(x + "\n" for x in lines[:left])


@pytest.mark.parametrize("words, said", [
    (["--kl_beta", "0.1"], "kl_beta was 0.05 and is now 0.1"),
    (["--seed", "5"], "seed was 4 and is now 5"),
    (["--fast_dev_run"], "fast_dev_run was False and is now True")])
def test_another_setting_refuses_a_resume_by_name(words, said, begun):
    before = everything(begun)
    line = refused([*TINY, *words, "--resume", "--output_dir", begun])
    assert said in line and "--restart" in line and everything(begun) == before


def test_an_edited_source_file_refuses_a_resume_by_name(begun, root, monkeypatch):
    monkeypatch.setattr(rlhf_minimal, "run_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # nothing was edited: it goes on
        run_in(begun, "--resume")
    for name in ("rlhf_minimal", "sft", "reward", "ppo", "judge", "lm", "tldr", "toy"):
        before = everything(begun)
        source = (root / f"{name}.py").read_text(encoding="utf-8")
        (root / f"{name}.py").write_text(source + "# edited\n", encoding="utf-8")
        line = refused([*TINY, "--resume", "--output_dir", begun])
        assert f"can't be resumed, {name}.py was " in line, line
        assert everything(begun) == before
        (root / f"{name}.py").write_text(source, encoding="utf-8")


# ---------------------------------------------------------------------------- folders


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--restart"]])
def test_other_peoples_files_stay(flags, tmp_path):
    (tmp_path / "sft").mkdir()
    for name in ("thesis.tex", "config.json", "sft/model.safetensors", "results.json"):
        (tmp_path / name).write_text('{"model_type": "gpt2"}')
        before = everything(tmp_path)
        line = refused([*TINY, *flags, "--output_dir", tmp_path])
        assert "holds other files: nothing is ever deleted there" in line
        assert everything(tmp_path) == before


def test_a_folder_with_a_run_needs_resume_or_restart(begun):
    (begun / "notes.txt").write_text("mine")
    (begun / "sft2").mkdir()
    for name in (*MODELS, "unfinished"):
        (begun / name).mkdir()
        (begun / name / "model.safetensors").write_text("old")
    for name in ("results.json", "samples.jsonl", "report.md", "curves.png"):
        (begun / name).write_text("old")
    before = everything(begun)
    line = refused([*TINY, "--output_dir", begun])
    assert "already holds a run" in line and everything(begun) == before
    Run(parse_settings([*TINY, "--seed", "5", "--restart", "--output_dir", str(begun)]))
    assert {path.name for path in begun.iterdir()} == {
        "config.json", "metrics.jsonl", "notes.txt", "sft2"}, "no more than what a run leaves goes"
    assert json.loads((begun / "config.json").read_text())["seed"] == 5


# ---------------------------------------------------------------------------- what ends a run


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_nan_ends_in_one_line_and_what_was_done_is_there(stage, tmp_path, finished, root):
    folder = tmp_path / "run"
    done = MODELS[: {"sft": 0, "reward": 1, "ppo": 2}[stage]]
    Run(parse_settings([*TINY, f"--{stage}_lr", "1e6", "--output_dir", str(folder)]))
    for name in done:
        shutil.copytree(finished.folder / name, folder / name)
    line = refused([*TINY, f"--{stage}_lr", "1e6", "--resume", "--output_dir", folder])
    assert "finite" in line and "--restart" in line
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", *done}


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, root, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf_minimal, "run_all", stop)
    line = refused([*TINY, "--restart", "--output_dir", tmp_path / "a run"])
    words = shlex.split(line.split("Go on with: ")[1])
    assert words[0] == "python" and "--restart" not in words
    Run(parse_settings(words[2:]))  # the same settings, or it would be refused
    assert parse_settings(words[2:]).resume


@pytest.mark.parametrize("words, said", [
    ("--ppo_lr=-1", "--ppo_lr"), ("--ppo_lr nan", "--ppo_lr"), ("--kl_beta inf", "--kl_beta"),
    ("--lam 2", "--lam"), ("--gamma=-0.1", "--gamma"), ("--seed=-1", "--seed"),
    ("--temperature 0", "--temperature"), ("--clip_range 0", "--clip_range"),
    ("--ppo_batch_size 0", "--ppo_batch_size"), ("--response_length=-48", "--response_length"),
    ("--missing_eos nan", "--missing_eos"), ("--toy_posts 99999999999", "--toy_posts"),
    ("--preset student", "engine"), ("--ppo_lr fast", "--ppo_lr"), ("--seed 1.5", "--seed"),
    ("--lam", "--lam"), *([] if torch.cuda.is_available() else [
        ("--device cuda", "--device cuda: expected auto, cpu")]),
    ("--return_sequences 3", "--return_sequences 3: expected a divisor of ppo_batch_size"),
    ("--toy_width 18", "--toy_width 18: expected a multiple of 2 x toy_heads"),
    ("--toy_posts 999999999", "can't give"), ("--query_length 3", "query_length 3 is too small"),
    ("--device tpu", "--device tpu: expected auto, cpu"),
    ("--device cuda:7", "--device cuda:7: expected auto, cpu")])
def test_what_makes_no_sense_ends_in_one_line(words, said, tmp_path, root):
    line = refused([*TINY, *shlex.split(words), "--output_dir", tmp_path / "run"])
    assert said in line, line


@pytest.mark.parametrize("words", [
    "--missing_eos=-2.5", "--toy_length_bias=-0.1", "--kl_beta 0", "--judge_every 0", "--ppo_lr 0",
    "--gamma 0", "--lam 1", "--seed 9223372036854775807", "--judge longest",
    "--judge reward_model", "--temperature 0.001"])
def test_what_makes_sense_is_taken(words):
    settings = vars(parse_settings(shlex.split(words)))
    name, value = words[2:].replace("=", " ").split()
    assert settings[name] == type(settings[name])(value)


# ---------------------------------------------------------------------------- the command line


def help_text():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse_settings(["--help"])
    return out.getvalue()


def test_help_fits_two_screens_and_has_every_setting():
    lines = help_text().splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 110
    for name in vars(parse_settings([])):
        (line,) = [line for line in lines if line.split()[:1] == [f"--{name}"]]
        assert len(line.split()) > 2, f"what is {name}?"
    assert "paper: 0.05 (B.1)" in " ".join(lines)


def test_a_setting_of_a_students_own(finished, tmp_path, root, monkeypatch):
    """With default 0, with and without a comment: in --help, taken, kept, and held to on resume."""
    source = (root / "ppo.py").read_text(encoding="utf-8")
    (tmp_path / "edited.py").write_text(source.replace(
        "    clip_range: float", "    entropy_weight: float = 0.0  # new\n    my_length: int = 0\n"
        "    clip_range: float", 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited", edited)
    spec.loader.exec_module(edited)
    for name in ("PPOConfig", "train_ppo"):
        monkeypatch.setattr(rlhf_minimal, name, getattr(edited, name))
    assert any(line.split()[0] == "--entropy_weight" and "new (default: 0.0)" in line
               for line in help_text().splitlines() if line.strip())
    settings = parse_settings(["--my_length", "3"])
    assert (settings.entropy_weight, settings.my_length) == (0.0, 3)
    run_in(tmp_path / "run", "--entropy_weight", "0.5")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["entropy_weight"] == 0.5
    assert "entropy_weight was 0.5 and is now 0.0" in refused(
        [*TINY, "--resume", "--output_dir", tmp_path / "run"])
    Run(parse_settings([*TINY, "--resume", "--entropy_weight", "0.5", "--output_dir",
                        str(tmp_path / "run")]))
    same_outcome(finished.folder, tmp_path / "run")


@pytest.mark.parametrize("words", [
    "--preset student", "--comparisons a/b --posts c/d", "--judge some/model", "--kl_betta 1",
    "--ppo 1", "--summarize post.txt --output_dir run", "extra"])
def test_real_models_and_data_are_the_engines(words, monkeypatch):
    seen = []
    for name in ("engine", "engine.main"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["engine.main"].main = lambda arguments: seen.append(arguments) or "its results"
    assert rlhf_minimal.main(shlex.split(words)) == "its results"
    assert seen == [shlex.split(words)]


@pytest.mark.slow
def test_default_run_learns(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "rlhf_minimal.py", "--output_dir",
                           tmp_path / "run"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    with open(tmp_path / "run" / "metrics.jsonl") as lines:
        rewards = [row["reward"] for row in map(json.loads, lines) if row["stage"] == "ppo"]
    assert sum(rewards[-5:]) > sum(rewards[:5]), "PPO must raise the reward"
    assert 0 < results["kl_per_summary"] < 15
    # bounds far from what the README's table reports: this is a smoke test, not a measurement
    assert results["ppo_vs_reference"]["low"] > results["sft_vs_reference"]["high"]
    assert results["ppo_vs_sft"]["low"] > 0.5
    assert results["reward_accuracy"] > results["reward_accuracy_longest_wins"] + 0.03
    assert results["reward_accuracy"] > results["reward_accuracy_post_blind"] + 0.03
    assert min(results["fact_accuracy"].values()) > 0.85
    assert (tmp_path / "run" / "report.md").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lm.py", "sft.py", "reward.py", "ppo.py", "judge.py",
                                    "tldr.py", "variants/rloo.py", "variants/dpo.py"])
def test_worked_examples_print(script, tmp_path):
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
