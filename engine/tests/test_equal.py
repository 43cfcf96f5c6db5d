"""The two houses are equal: three updates of each stage, from the same start, by both loops.

Bit for bit in float32 where the engine neither packs nor cuts anything. Else sums have another
order, and where a gradient is nearly zero Adam makes a large step of a rounding error: so these are
compared in float64, to 1e-5 of the largest number of a tensor. Whoever changes a loop sees here
that the other one has to follow.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import ppo
import reward
import sft
from engine import packing
from engine import ppo as engine_ppo
from engine import reward as engine_reward
from engine import sft as engine_sft
from engine.processes import rank, start_processes
from engine.settings import ModelConfig

VOCAB, EOS = 40, 2
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": None,
         "eos_token_id": EOS, "pad_token_id": 0, "initializer_range": 0.2,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, "t1")),
    eos_token=f"t{EOS}", pad_token="t0")


def language_model(kind):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()


def token_lists(n, low, high, seed, end=()):
    """n lists of between low and high token ids, none of them a pad or an EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (n,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() + list(end)
            for length in lengths]


class Run:
    """What the engine's loops ask of a run, and the lines that either house logs."""

    def __init__(self):
        self.seed, self.lines, self.warnings = 5, [], {}

    def steps(self, stage, total, **parts):
        return range(total)

    def log(self, stage, step, **metrics):
        self.lines.append(json.loads(json.dumps({"stage": stage, "step": step, **metrics})))

    def history(self, stage):
        return [line for line in self.lines if line["stage"] == stage]

    def warn(self, kind, text):
        pass


def settings(**changes):
    values = {**vars(sft.SFTConfig()), **vars(reward.RewardConfig()), **vars(ppo.PPOConfig()),
              **vars(ModelConfig()), "checkpoint_activations": False, "sft_lr": 0.01,
              "reward_lr": 0.01, "ppo_lr": 0.01, "response_length": 7, "temperature": 0.7,
              "kl_beta": 0.3, "clip_range": 0.1, "clip_range_value": 0.1, "gamma": 0.97,
              "ppo_batch_size": 12, "ppo_episodes": 36, "ppo_epochs": 2}
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def precision():
    """Call it with exact: float32 if so, else float64, until the test ends."""
    yield lambda exact: torch.set_default_dtype(torch.float32 if exact else torch.float64)
    torch.set_default_dtype(torch.float32)


def same(ours, theirs, exact):
    """Equal tensors, or equal to 1e-5 of the largest number."""
    assert ours.shape == theirs.shape
    if exact:
        assert torch.equal(ours, theirs)
    else:
        assert ours.dtype == torch.float64
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-3)


def same_models(ours, theirs, exact):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        same(tensor, theirs[name], exact)


def same_lines(ours, theirs, exact):
    assert len(ours) == len(theirs) > 0
    for line, other in zip(ours, theirs):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == (other[name] if isinstance(value, str) else pytest.approx(
                other[name], rel=1e-12 if exact else 1e-5, abs=0 if exact else 1e-6)), name


CUTS = [{}, {"micro_batch_size": 3}]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_sft(kind, cut, precision):
    precision(not cut)
    queries, responses = token_lists(26, 3, 9, 2), token_lists(26, 1, 6, 3, [EOS])
    config = settings(sft_batch_size=8, **cut)  # two rows are left over
    plain, other, run = language_model(kind), language_model(kind), [Run(), Run()]
    sft.train_sft(plain, queries, responses, 0, config, 5, run[0].log)
    engine_sft.train_sft(run[1], other, queries, responses, 0, config)
    assert len(run[0].lines) == 3
    same_models(plain, other, exact=not cut)
    same_lines(run[0].lines, run[1].lines, exact=not cut)


def reward_models(kind, packs):
    """A reward model of each house with the same weights. packs: may the engine read the two
    summaries of a pair in one row?"""
    torch.manual_seed(4)
    plain = reward.RewardModel(language_model(kind))
    other = engine_reward.RewardModel(language_model(kind))
    other.load_state_dict(plain.state_dict())
    other.trunk.packs = (1000, packs)
    return plain, other


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_reward(kind, packs, cut, precision):
    precision(not cut and not packs)
    pairs = list(zip(token_lists(26, 3, 9, 2), token_lists(26, 1, 6, 3, [EOS]),
                     token_lists(26, 1, 6, 6, [EOS])))
    config = settings(reward_batch_size=8, **cut)
    (plain, other), run = reward_models(kind, packs), [Run(), Run()]
    reward.train_reward(plain, pairs, 0, config, 5, run[0].log)
    engine_reward.train_reward(run[1], other, pairs, 0, config)
    assert len(run[0].lines) == 3
    same_models(plain, other, exact=not cut and not packs)
    same_lines(run[0].lines, run[1].lines, exact=not cut and not packs)


def watched(module, monkeypatch):
    """The batches that the rollouts of a house make, in the order of the updates."""
    batches, rollout = [], module.rollout

    def watch(*arguments, **named):
        batches.append(rollout(*arguments, **named))
        return batches[-1]

    monkeypatch.setattr(module, "rollout", watch)
    return batches


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("changes", [
    {}, {"ppo_minibatches": 3}, {"return_sequences": 3},
    {"return_sequences": 3, "packs": True}, {"return_sequences": 3, "ppo_minibatches": 2},
    {"micro_batch_size": 3}, {"micro_batch_size": 3, "ppo_minibatches": 2},
    {"micro_batch_size": 3, "return_sequences": 3, "packs": True}], ids=str)
def test_ppo(kind, changes, monkeypatch, precision):
    changes = dict(changes)
    packs = changes.pop("packs", False)
    exact = not packs and "micro_batch_size" not in changes
    precision(exact)
    config, queries = settings(**changes), token_lists(7, 3, 9, 2)  # 7: the updates go round
    plain, other, run = language_model(kind), language_model(kind), [Run(), Run()]
    plain_rewards, other_rewards = reward_models(kind, packs)
    other.packs = (1000, packs)
    plain_batches = watched(ppo, monkeypatch)
    engine_batches = watched(engine_ppo, monkeypatch)
    critic = ppo.train_ppo(plain, plain_rewards, queries, TOKENIZER, config, 5, run[0].log)
    other_critic = engine_ppo.train_ppo(run[1], other, other_rewards, queries, TOKENIZER, config)

    assert len(plain_batches) == len(engine_batches) == 3
    for batch, parts in zip(plain_batches, engine_batches):
        compare_samples(batch, parts, config.return_sequences, exact)
    same_models(plain, other, exact)
    same_models(critic, other_critic, exact)
    same_lines(run[0].lines, run[1].lines, exact)
    assert not torch.equal(plain.lm_head.weight, language_model(kind).lm_head.weight)
    assert not torch.equal(critic.head.weight, plain_rewards.head.weight)
    # and all of it was tried: the clip, and summaries with and without an end
    for name in ("policy_clip_fraction", "value_clip_fraction", "ended"):
        assert any(0 < line[name] < 1 for line in run[0].lines)


def compare_samples(batch, parts, k, exact):
    """The rows of a plain batch and of the engine's parts of it: the same summaries, with the same
    numbers. Parts may be narrower than the batch, and have the posts in another order."""
    place = {}
    for part in parts:
        seen = {}
        for row, post in enumerate(part.post.tolist()):
            place[post, seen.setdefault(post, 0)] = part, row
            seen[post] += 1
    assert len(place) == len(batch.mask)
    for row in range(len(batch.mask)):
        part, other = place[row // k, row % k]
        mask, other_mask = batch.mask[row], part.mask[other]
        T, other_T = len(mask), len(other_mask)
        assert batch.input_ids[row, -T:][mask].tolist() == part.input_ids[other, -other_T:][
            other_mask].tolist()
        for name in ("log_probs", "ref_log_probs", "values", "rewards", "returns", "advantages"):
            same(getattr(batch, name)[row][mask], getattr(part, name)[other][other_mask], exact)
        for name in ("scores", "kl", "ended"):
            same(getattr(batch, name)[row].double(), getattr(part, name)[other].double(), exact)


def test_packing_is_really_tried():
    """A model of each kind reads two summaries beside each other where it may."""
    for kind in ("gpt2", "llama"):
        assert packing.shares_post(language_model(kind), 2, 20) == 2


# ---------------------------------------------------------------------------- two processes


def all_stages(train_sft, train_reward, train_ppo, policy, model):
    """The three stages one after the other, by one house; returns what they trained."""
    queries = token_lists(12, 3, 9, 2)
    responses, others = (token_lists(12, 1, 6, seed, [EOS]) for seed in (3, 6))
    config = settings(sft_batch_size=8, sft_epochs=3, reward_batch_size=8, reward_epochs=3)
    train_sft(policy, queries, responses, 0, config)
    train_reward(model, list(zip(queries, responses, others)), 0, config)
    critic = train_ppo(policy, model, queries, TOKENIZER, config)
    return {f"{name}/{key}": tensor for name, part in (
        ("policy", policy), ("reward", model), ("critic", critic))
        for key, tensor in part.state_dict().items()}


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch, precision):
    """Each process draws its own summaries, so here both houses get those of the plain one."""
    precision(False)
    run, batches = Run(), watched(ppo, monkeypatch)
    policy, (model, _) = language_model("llama"), reward_models("llama", False)
    weights = all_stages(
        lambda *given: sft.train_sft(*given, 5, run.log),
        lambda *given: reward.train_reward(*given, 5, run.log),
        lambda *given: ppo.train_ppo(*given, 5, run.log), policy, model)
    texts = []  # of each update, by post
    for batch in batches:
        T = batch.mask.shape[1]
        texts.append([[row[:-T][real[:-T] == 1].tolist(), row[-T:][mask].tolist()] for
                      row, real, mask in zip(batch.input_ids, batch.attention_mask, batch.mask)])
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", __file__, str(tmp_path)], check=True, timeout=300,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    for name, tensor in load_file(tmp_path / "weights.safetensors").items():
        same(weights[name], tensor, exact=False)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    same_lines(run.lines, lines, exact=False)


def in_one_of_two(folder):
    """What each of the two processes does: the engine's stages, on its share of the rows."""
    start_processes("cpu")
    torch.set_default_dtype(torch.float64)
    updates = iter(json.loads((folder / "texts.json").read_text()))

    def given(model, tokenizer, queries, *_):
        texts = {tuple(query): response for query, response in next(updates)}
        return [texts[tuple(query)] for query in queries]

    engine_ppo.sample_responses, run = given, Run()
    policy, (_, model) = language_model("llama"), reward_models("llama", False)
    weights = all_stages(partial(engine_sft.train_sft, run),
                         partial(engine_reward.train_reward, run),
                         partial(engine_ppo.train_ppo, run), policy, model)
    if rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()},
                  folder / "weights.safetensors")
        (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.lines))


if __name__ == "__main__":
    in_one_of_two(Path(sys.argv[1]))
