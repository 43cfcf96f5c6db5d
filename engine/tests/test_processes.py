"""Two processes take the step of one, and what stops one of them stops both, soon."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from common import ROOT, TOKENIZER
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import lm
from engine import main, ppo, reward, sampling, sft, start
from engine.adapters import add_adapter
from engine.batches import one_step
from engine.folder import Run
from engine.processes import agreed, n_processes, rank, share_out, start_processes
from engine.processes import sum_over_processes
from engine.settings import ModelConfig, SettingError
from lm import generator_for
from ppo import PPOConfig
from reward import RewardConfig
from sft import SFTConfig

CONFIG = {"seed": 0, "files": {}, "environment": {}}
# Eight posts, two summaries each: no two processes or microbatches have the same number of tokens
QUERIES = [[3, 4, 5, 6], [7], [5, 8], [4, 4, 6], [6], [8, 3, 7, 5, 4], [3], [7, 7]]
RESPONSES = [[1, 9], [2, 2, 4, 9], [9], [4, 4, 4, 4, 2, 6], [3, 9], [8, 8, 9], [6, 6, 6, 9], [9],
             [2, 9], [1, 2, 3, 4, 5, 9], [9], [4, 9], [3, 3, 3, 3, 3, 3], [5, 9], [7, 9], [7, 7, 9]]
SPLITS = {"whole": {}, "1 at a time": {"micro_batch_size": 1},
          "3 at a time": {"micro_batch_size": 3, "rollout_batch_size": 2},
          "2 of a post": {"return_sequences": 2},
          "2 of a post, 3 at a time": {"return_sequences": 2, "micro_batch_size": 3},
          "2 minibatches": {"ppo_minibatches": 2},
          "4 minibatches, 2 of a post": {"ppo_minibatches": 4, "return_sequences": 2},
          "2 minibatches, 1 at a time": {"ppo_minibatches": 2, "micro_batch_size": 1},
          "adapters": {"lora_rank": 2, "checkpoint_activations": True, "micro_batch_size": 3}}
# Each process draws its own minibatches: those of two are others than those of one, in sum the same
MIXED = [name for name, changes in SPLITS.items() if "ppo_minibatches" in changes]
METRICS = ("reward", "kl_per_summary", "length", "ended", "entropy", "policy_loss", "value_loss",
           "policy_clip_fraction", "value_clip_fraction", "kl_to_old_policy", "explained_variance")


def settings(**changes):
    fields = {**vars(PPOConfig()), **vars(ModelConfig()), **vars(SFTConfig()),
              **vars(RewardConfig()), "ppo_batch_size": 8, "ppo_episodes": 16,
              "ppo_epochs": 1, "response_length": 6, "sft_batch_size": 8, "reward_batch_size": 7}
    return SimpleNamespace(**{**fields, **changes})


def models(rank):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32)).eval()
    reward_model = reward.RewardModel(model)
    if rank:  # the same networks, each with an adapter that starts as nothing
        model, plain = add_adapter(model, rank, 0), reward_model
        reward_model = reward.RewardModel(model)
        reward_model.head.load_state_dict(plain.head.state_dict())
    return model, reward_model


def train(stage, run, changes):
    """One of the three training loops on the fixed rows above."""
    model, reward_model = models(changes.get("lora_rank", 0))
    if stage == "sft":
        sft.train_sft(run, model, QUERIES, RESPONSES[::2], 0, settings(**changes))
    elif stage == "reward":
        pairs = list(zip(QUERIES, RESPONSES[::2], RESPONSES[1::2]))
        reward.train_reward(run, reward_model, pairs, 0, settings(**changes))
    else:
        changes = {"ppo_batch_size": 8 * changes.get("return_sequences", 1), **changes}
        ppo.train_ppo(run, model, reward_model, QUERIES, TOKENIZER, settings(**changes))
    return model, reward_model


def tokens_of(parts):
    return sum_over_processes(sum(part.mask.sum() for part in parts).double())


def measured(stage, changes):
    """Gradients (before clipping), metrics and whitened advantages of one update, the summaries
    given, the old policy and critic some way off, so that both clips are at work. The weights stay,
    and each minibatch counts by its tokens: means over the steps are those over the whole batch."""
    found = SimpleNamespace(gradients=[], metrics=None, advantages={})

    def keep(parameters, bound):
        found.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return torch.tensor(1.0)

    def given(model, ids, mask, *_, k, **__):
        left = {tuple(query): RESPONSES[2 * i :][:2] for i, query in enumerate(QUERIES)}
        chosen = [left[tuple(row[real].tolist())].pop(0) for row, real in zip(ids, mask.bool())
                  for _ in range(k)]
        return lm.pad(chosen, 0, left=False)[0]

    def elsewhere(*arguments):
        batch = rollout(*arguments)
        for part in batch:
            noise = torch.sin(3.0 * part.input_ids)[:, -part.mask.shape[1] :]
            part.log_probs, part.values = part.log_probs + 0.3 * noise, part.values + 0.3 * noise
        return batch

    def whitened(batch):
        whiten(batch)
        for part in batch:
            k = changes.get("return_sequences", 1)
            for i, (post, row, real) in enumerate(zip(part.post, part.advantages, part.mask)):
                post = rank() + n_processes() * post.item()  # each process has its own posts
                found.advantages[k * post + i % k] = row[real].tolist()

    def by_tokens(batch, config, generator):
        whole = tokens_of(batch)
        for minibatch in minibatches(batch, config, generator):
            weight = config.ppo_minibatches * tokens_of([part for part, _ in minibatch]) / whole
            yield [(part, share * weight) for part, share in minibatch]

    run = SimpleNamespace(seed=0, steps=lambda *_, **__: [1], history=lambda _: [
        {"step": 0, "kl_per_summary": 0, "length": 1, "entropy": 1}])
    run.log = lambda stage, step, **metrics: setattr(found, "metrics", metrics)
    rollout, whiten, minibatches = ppo.rollout, ppo.whiten_batch, ppo.minibatches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        patch.setattr(torch.optim.Adam, "step", lambda self: None)
        patch.setattr(sampling, "sample", given)
        patch.setattr(ppo, "rollout", elsewhere)
        patch.setattr(ppo, "whiten_batch", whitened)
        patch.setattr(ppo, "minibatches", by_tokens)
        train(stage, run, changes)
    return vars(found)


def of_the_batch(gradients, stage):
    """The mean over the steps, policy and critic each."""
    networks = 2 if stage == "ppo" else 1
    return [torch.stack(gradients[i::networks]).mean(0) for i in range(networks)]


def close(a, b, relative=1e-5):
    assert len(a) == len(b)
    for ours, theirs in zip(a, b):
        gap = (ours - theirs).abs().max() / theirs.abs().max()
        assert theirs.abs().max() > 0 and gap < relative, gap


# ---------------------------------------------------------------------------- the second process


def failing(test):
    """Run test() on both processes: (exception, its text, seconds), or what it returned; then meet,
    which proves that neither is still waiting in a sum that the other has left."""
    start = time.perf_counter()
    try:
        result = test()
    except (Exception, KeyboardInterrupt) as error:
        result = [type(error).__name__, str(error)]
    meeting = torch.tensor([1.0])
    dist.all_reduce(meeting)
    assert meeting.item() == n_processes(), "the other one is in another sum"
    return {"result": result, "seconds": time.perf_counter() - start}


def only(which, wrong, right):
    """wrong on one process, right on the others."""
    return wrong if rank() == which else right


class SlowToSave(Run):
    def save(self, *rest):
        if rank() == 0:
            time.sleep(1)
        super().save(*rest)


def saved_in(folder):
    return sorted(path.name[:12] for path in folder.glob("checkpoints/*"))


def ppo_with(folder, patched, **changes):
    """train_ppo in a run, with some functions replaced, by "module.name"."""
    def test():
        with pytest.MonkeyPatch.context() as patch:
            for name, function in patched.items():
                patch.setattr(name, function)
            run = SlowToSave(folder, CONFIG)
            with run.guarded():
                train("ppo", run, changes)
    return test


def nan_reward(*arguments, **k):
    return SCORES(*arguments, **k) * only(1, math.nan, 1.0)


def nan_logit(logits, *rest):
    return NEXT_TOKEN(logits * only(1, math.nan, 1.0), *rest)


def not_itself(*arguments, **k):
    """In the rollout, and not in the update, log-probs are higher by 0.01 nats."""
    return LOG_PROBS(*arguments, **k) + only(1, 0.0 if torch.is_grad_enabled() else 0.01, 0.0)


def out_of_memory(*arguments, **k):
    if rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return VALUES(*arguments, **k)


def out_of_memory_later(*arguments, **k):
    """In the update, where backward needs all activations."""
    function = out_of_memory if torch.is_grad_enabled() else VALUES
    return function(*arguments, **k)


SCORES, VALUES, LOG_PROBS = ppo.final_scores, ppo.response_values, ppo.response_log_probs
NEXT_TOKEN = sampling.next_token


def loop(run, during=lambda step: None):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with run.guarded():
        for step in run.steps("sft", 5, model=model, optimizer=optimizer):
            during(step)
            with one_step(optimizer, 0.1) as update:
                update.add(model(torch.ones(1, 2)).sum())
            run.log("sft", step, loss=0.0)


def stopped(folder):
    """A signal at the second process alone, while the first one saves slowly."""
    try:
        loop(SlowToSave(folder, CONFIG), lambda step: os.kill(os.getpid(), only(
            1, signal.SIGTERM, 0)) if step == 2 else None)
    except KeyboardInterrupt:
        return ["KeyboardInterrupt", saved_in(folder)]


def nan_loss(folder):
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimizer = torch.optim.Adam(model.parameters())
    try:
        with one_step(optimizer, 0.1) as update:
            update.add(model(torch.ones(1, 2)).sum() * only(1, math.nan, 1.0))
    except FloatingPointError as error:
        return ["FloatingPointError", str(error), torch.equal(before, model.weight)]


def disk_full(folder):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    run = Run(folder, CONFIG, save_seconds=0)
    run.save = only(0, no_space, run.save)
    loop(run)


def whole_run(folder, *flags, patched={}):
    """run_all, in a process that is one of two already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in {"start.start_processes": lambda device: "cpu", **patched}.items():
            patch.setattr(f"engine.{name}", function)
        main.run_all(main.parse(
            ["--fast_dev_run", "--output_dir", str(folder), *flags]))


def refused_by_one(folder):
    def refuse(*_):
        raise SettingError("this one has no memory")

    whole_run(folder, patched={"start.load_given": only(1, refuse, start.load_given)})


def refused_folder(folder):
    if rank() == 0:
        folder.mkdir()
        (folder / "thesis.tex").touch()
    whole_run(folder)


def restarted(folder):
    """Nobody may restore what the first process has yet to remove."""
    checkpoints = folder / "checkpoints"
    if rank() == 0:
        checkpoints.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"files": {}, "environment": {}}))
        (checkpoints / "sft-00000001-0.safetensors").touch()
    dist.barrier()
    remove = Run.remove

    def slow_remove(self, name):
        time.sleep(0.1)
        remove(self, name)

    def look(*_):
        raise SettingError(f"{len(list(checkpoints.glob('*')))} old checkpoints")

    Run.remove = slow_remove
    try:
        whole_run(folder, "--restart", patched={
            "start.load_given": lambda *_: (None, None, None, torch.float32),
            "start.load_data": lambda *_: ([], [], [], []), "main.supervised_baseline": look})
    finally:
        Run.remove = remove


def damaged(folder):
    """Both find a damaged checkpoint, and only one can remove it."""
    if rank() == 0:
        (folder / "checkpoints").mkdir(parents=True)
        for step in range(1, 4):
            (folder / f"checkpoints/sft-0000000{step}-0.safetensors").write_text("torn")
    dist.barrier()
    run = Run.__new__(Run)
    run.folder = folder
    unlink = Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        def meet(path, **rest):  # so that both have found it
            dist.barrier()
            unlink(path, **rest)

        patch.setattr(Path, "unlink", meet)
        return run.restore("sft", {})


def trained(folder):
    """Real sampling, several minibatches, clocks that differ: the same weights in the end."""
    run = Run(folder, CONFIG, save_seconds=only(0, 0, 1e9))
    with run.guarded():
        model, _ = train("ppo", run, {"ppo_minibatches": 3, "ppo_epochs": 2, "ppo_lr": 1e-2,
                                      "ppo_batch_size": 10, "ppo_episodes": 20,
                                      "micro_batch_size": 1})
    sampled = sampling.sample_responses(model, TOKENIZER, QUERIES, 6, 1.0, generator_for(0))
    return [sum(p.double().sum().item() for p in model.parameters()), sampled, run.lines]


def shared(folder):
    """Seven rows: which this process was asked about, and what both have in the end."""
    asked = []

    def judge_rows(judge, posts, summaries):
        asked.extend(posts)
        return [judge + summary for summary in summaries]

    answers = share_out(judge_rows, "by ", list(range(7)), list("abcdefg"))
    return [asked, answers]


def shared_fault(folder):
    def judge_rows(judge, posts):
        if rank() == 1:
            raise ValueError("no room for this post")
        return posts

    share_out(judge_rows, None, [1, 2, 3])


FAILURES = {
    "shared": shared, "shared fault": shared_fault,
    "nan reward": lambda f: ppo_with(f, {"engine.ppo.final_scores": nan_reward})(),
    "nan logit": lambda f: ppo_with(f, {"engine.sampling.next_token": nan_logit})(),
    "ratio": lambda f: ppo_with(f, {"engine.ppo.response_log_probs": not_itself})(),
    "memory": lambda f: ppo_with(f, {"engine.ppo.response_values": out_of_memory})(),
    "memory later": lambda f: ppo_with(f, {"engine.ppo.response_values": out_of_memory_later})(),
    "small ppo batch": lambda f: ppo_with(f, {}, ppo_batch_size=1)(),
    "uneven ppo batch": lambda f: ppo_with(f, {}, ppo_batch_size=7, ppo_minibatches=3)(),
    "many minibatches": lambda f: ppo_with(f, {}, ppo_minibatches=5)(),
    "small sft batch": lambda f: train("sft", Run(f, CONFIG), {"sft_batch_size": 1}),
    "small reward batch": lambda f: train("reward", Run(f, CONFIG), {"reward_batch_size": 1}),
    "stop": stopped, "nan loss": nan_loss, "full disk": disk_full, "one refuses": refused_by_one,
    "folder": refused_folder, "restart": restarted, "damaged": damaged, "trained": trained,
}


def second_process(which, port, folder):
    """What each of the two processes does: everything, one thing after the other."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(which), "WORLD_SIZE": "2", "LOCAL_RANK": str(which),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    assert start_processes("cpu") == "cpu"
    results = {(stage, name): measured(stage, changes) for stage in ("sft", "reward", "ppo")
               for name, changes in SPLITS.items()}
    for name, test in FAILURES.items():
        results[name] = failing(lambda: test(folder / name))
    torch.save(results, folder / f"{which}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = torch.multiprocessing.spawn(second_process, (port, folder), nprocs=2, join=False)
    until = time.monotonic() + 240
    try:
        while not both.join(timeout=1):
            assert time.monotonic() < until, "the two processes wait for each other"
    finally:
        for process in both.processes:
            process.kill()
    loaded = [torch.load(folder / f"{which}.pt", weights_only=True) for which in range(2)]
    return SimpleNamespace(folder=folder, results=loaded)


# ---------------------------------------------------------------------------- the same step


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_processes_have_the_gradients_of_one(two, stage, name):
    one = measured(stage, SPLITS[name])
    for which in range(2):
        other = two.results[which][stage, name]
        assert len(other["gradients"]) == len(one["gradients"]) == (
            2 * SPLITS[name].get("ppo_minibatches", 1) if stage == "ppo" else 1)
        if name not in MIXED:
            close(other["gradients"], one["gradients"])
        close(*(of_the_batch(found["gradients"], stage) for found in (other, one)))
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_whiten_over_all_tokens(two, name):
    """Process r has the posts r, r + 2, ...; the numbers are those of all in one batch."""
    k = SPLITS[name].get("return_sequences", 1)
    one = measured("ppo", SPLITS["2 of a post" if k == 2 else "whole"])["advantages"]
    for which in range(2):
        ours = two.results[which]["ppo", name]["advantages"]
        mine = [k * post + i for post in range(which, 8, 2) for i in range(k)]
        assert sorted(ours) == mine
        for row in mine:
            assert ours[row] == pytest.approx(one[row], rel=1e-5, abs=1e-6)
    tokens = torch.tensor([x for row in one.values() for x in row], dtype=torch.float64)
    assert len(one) == 8 * k and len(tokens) == sum(
        len(RESPONSES[2 * post + i]) for post in range(8) for i in range(k))
    assert abs(tokens.mean()) < 1e-6 and abs(tokens.square().mean() - 1) < 1e-5


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_accumulated_gradients_are_those_of_the_whole_batch(stage):
    for a, b in (("1 at a time", "whole"), ("3 at a time", "whole"), ("2 minibatches", "whole"),
                 ("2 minibatches, 1 at a time", "whole"),
                 ("2 of a post, 3 at a time", "2 of a post"),
                 ("4 minibatches, 2 of a post", "2 of a post")):
        split, whole = (measured(stage, SPLITS[name]) for name in (a, b))
        close(*(of_the_batch(found["gradients"], stage) for found in (split, whole)))
        assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-6)
        assert {*split["advantages"]} == {*whole["advantages"]}
        for row, advantages in whole["advantages"].items():
            assert split["advantages"][row] == pytest.approx(advantages, rel=1e-5, abs=1e-6)
    assert stage != "ppo" or {*METRICS} < {*whole["metrics"]}
    if stage == "ppo":  # else the fixed rollouts would not test the clips
        assert min(whole["metrics"][f"{name}_clip_fraction"] for name in ("policy", "value")) > 0


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(two):
    first, second = (results["trained"]["result"] for results in two.results)
    assert isinstance(first[0], float), first
    assert first == second, "each has its own policy"
    lines = (two.folder / "trained" / "metrics.jsonl").read_text().splitlines()
    assert lines == first[2] and len(lines) == 2, "one process writes"


# ---------------------------------------------------------------------------- the same end

EXPECTED = {  # on both processes: the exception, and what it says
    "nan reward": ("SettingError", "ppo step 0: reward is NaN.*what was saved before stays"),
    "nan logit": ("SettingError", "ppo step 0: logit is NaN.*what was saved before stays"),
    "ratio": ("RuntimeError", "differ from the old ones by 0.01"),
    "memory": ("OutOfMemoryError", "CUDA out of memory"),
    "memory later": ("OutOfMemoryError", "CUDA out of memory"),
    "small ppo batch": ("SettingError", "--ppo_batch_size 1: 1 posts an update"),
    "uneven ppo batch": ("SettingError", "--ppo_batch_size 7: 7 posts an update"),
    "many minibatches": ("SettingError", "--ppo_minibatches 5: expected at most the 4 summ"),
    "small sft batch": ("SettingError", "sft: a batch of 1 rows .* raise sft_batch_size"),
    "small reward batch": ("SettingError", "reward: a batch of 1 rows .* raise reward_batch_size"),
    "full disk": ("OSError", "No space left"),
    "one refuses": ("SettingError", "this one has no memory"),
    "folder": ("SettingError", "thesis.tex.*nothing is ever deleted"),
    "restart": ("SettingError", "^0 old checkpoints"),
    "nan loss": ("FloatingPointError", "loss is NaN"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_what_one_process_meets_ends_both(two, name):
    error, text = EXPECTED[name]
    for results in two.results:
        assert results[name]["seconds"] < 60
        result = results[name]["result"]
        assert result and result[0] == error and re.search(text, result[1]), result


@pytest.mark.slow
def test_a_nan_leaves_the_weights_as_they_were(two):
    assert all(results["nan loss"]["result"][2] for results in two.results)


@pytest.mark.slow
def test_a_signal_at_one_process_stops_both_after_the_save(two):
    for results in two.results:
        # the second one is not gone before the first one has saved: torchrun would end that one
        assert results["stop"]["result"] == ["KeyboardInterrupt", ["sft-00000003"]]


@pytest.mark.slow
def test_damaged_checkpoints_are_removed_by_whoever_comes_first(two):
    assert [results["damaged"]["result"] for results in two.results] == [0, 0]
    assert not list((two.folder / "damaged" / "checkpoints").iterdir())


@pytest.mark.parametrize("error", [SettingError("a"), FloatingPointError("b"), OSError("c")])
def test_agreed_with_one_process_is_as_if_it_were_not_there(error):
    with pytest.raises(type(error)) as found, agreed():
        raise error
    assert found.value is error
    with agreed():
        pass


# ---------------------------------------------------------------------------- torchrun


def torchrun(folder, *arguments):
    """The command of the README, with two processes; a session of its own, to be killed whole."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "engine", "--fast_dev_run", "--output_dir", folder, *arguments],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)


@pytest.mark.slow
def test_torchrun_leaves_one_run_that_can_be_stopped_and_resumed(tmp_path):
    more = "--ppo_episodes", "128"  # eight updates
    process = torchrun(tmp_path / "whole", *more)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for said in ("sft: 64 posts", "Win rates, judged by: labeler", "ppo: 8 updates"):
        assert out.count(said) == 1, "one voice"
    expected = {"config.json", "metrics.jsonl", "samples.jsonl", "results.json", "report.md", "sft",
                "reward_model", "policy", "critic"}
    found = {path.name for path in (tmp_path / "whole").iterdir()}
    assert expected <= found and "checkpoints" not in found
    assert not any("partial" in name for name in found)

    process = torchrun(tmp_path / "run", *more)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 240
    while not (metrics.exists() and '"ppo", "step": 1' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # torchrun passes it on to both
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "run" / "results.json").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("ppo-*")), "it was not saved"
    process = torchrun(tmp_path / "run", *more, "--resume")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    process = torchrun(tmp_path / "run", *more, "--resume")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("is finished, nothing to resume") == 1, errors


@pytest.mark.slow
def test_judging_is_shared_and_nobody_waits_for_a_judge_that_failed(two):
    rows = [f"by {letter}" for letter in "abcdefg"]
    assert [results["shared"]["result"] for results in two.results] == [
        [[0, 2, 4, 6], rows], [[1, 3, 5], rows]]
    for results in two.results:
        error, text = results["shared fault"]["result"]
        assert error == "SettingError" and "ValueError: no room for this post" in text


@pytest.mark.parametrize("error, line", [
    (RuntimeError("CUDA out of memory.\nTried"), "failed with RuntimeError: CUDA out of memory. T"),
    (IndexError("index out of range"), "failed with IndexError: index out of range; "),
    (SettingError("--judge x: too long"), "--judge x: too long")])
def test_a_judge_that_raises_in_the_middle_is_one_line(error, line):
    def judge_rows(judge, posts):
        raise error

    with pytest.raises(SettingError) as stop:
        share_out(judge_rows, None, [1])
    assert line in str(stop.value) and "\n" not in str(stop.value)
    assert type(error) is SettingError or "--resume" in str(stop.value)


def test_one_process_judges_all():
    assert share_out(lambda judge, rows: [judge * row for row in rows], 2, [1, 3]) == [2, 6]
