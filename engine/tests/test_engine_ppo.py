"""engine/ppo.py: a batch of summaries and how it is cut: whose numbers are whose, what a minibatch
counts, and a ratio that is 1 before the first update.

The equations are ppo.py's, and are tested there.
"""

import math
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from common import CONFIGS, Told, build, close, config

import lm
from engine import ppo, sampling
from engine.adapters import add_adapter
from engine.packing import response_log_probs
from engine.reward import RewardModel
from lm import generator_for

# ---------------------------------------------------------------------------- a batch of summaries

EOS, PAD = 2, 0
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
# ragged, and in no order of length
POSTS = [[5, 5, 5], [6, 7, 8, 9, 10, 11, 12, 13], [3], [20, 21, 22, 23, 24], [30] * 12, [31, 32],
         [33, 34, 35, 36, 37, 38], [39, 4, 5, 6]]


def settings(k=1, **changes):
    """Those of two updates of eight posts each, with k summaries."""
    return config(**{"return_sequences": k, "ppo_batch_size": 8 * k, "ppo_episodes": 16 * k,
                     "ppo_epochs": 2, "response_length": 7, "temperature": .7, "ppo_lr": 3e-4,
                     **changes})


def written(post, number):
    """The summary that stands for the number-th sample of a post; some never end, one is EOS."""
    return ([7 + number] * (len(post) % 4) + [post[0], EOS])[: 4] if len(post) > 1 else [EOS]


def write_them(monkeypatch, in_turn=False):
    """Sampling gives these summaries, whatever the model. in_turn: a post comes once for each."""
    seen = Counter()

    def sample(model, ids, mask, *_, k, **settings):
        summaries = []
        for row, real in zip(ids, mask.bool()):
            post = row[real].tolist()
            summaries += [written(post, seen[str(post)] + j) for j in range(k)]
            seen[str(post)] += in_turn
        return lm.pad(summaries, PAD, left=False)[0]

    monkeypatch.setattr(sampling, "sample", sample)


@pytest.mark.parametrize("k, changes, parts", [
    (1, {}, 1), (3, {}, 1), (1, {"micro_batch_size": 3}, 3), (3, {"micro_batch_size": 9}, 3),
    (3, {"micro_batch_size": 3, "rollout_batch_size": 6}, 8),
    # minibatches are of rows: one batch, whatever is in memory at a time
    (1, {"ppo_minibatches": 2, "micro_batch_size": 3}, 1),
    (3, {"ppo_minibatches": 4, "rollout_batch_size": 5}, 1)])
def test_each_row_of_a_rollout_is_a_summary_of_its_post(k, changes, parts, monkeypatch):
    write_them(monkeypatch, in_turn=k > 1 and "ppo_minibatches" in changes)
    model = build(CONFIGS["gpt_neox"]())
    reward_model = RewardModel(model)
    batch = ppo.rollout(model, model, reward_model, reward_model, POSTS, TOKENIZER,
                        settings(k, **changes), None)
    assert len(batch) == parts
    seen = []
    for part in batch:
        ids, real, width = part.inputs
        for i, post in enumerate(part.post.tolist()):
            query, response = POSTS[post], written(POSTS[post], i % k)
            row = ids[i][real[i].bool()].tolist()
            assert row == query + response, f"row {i} is not summary {i % k} of post {post}"
            assert real[i, -width:].sum() == part.mask[i].sum() == len(response)
            assert part.ended[i] == (EOS in response)
            alone = torch.tensor([row])
            with torch.no_grad():  # each number is that of this row
                log_probs = response_log_probs(model, alone, alone * 0 + 1, len(response), .7)[0]
                value = reward_model(alone, alone * 0 + 1)[0]
            n = len(response)
            close(part.log_probs[i, :n], log_probs, "log-probs of another row", 1e-4)
            close(part.values[i, :n], value[-n - 1 : -1],
                  "values of another row, or not of the state before its action", 1e-4)
            close(part.scores[i], value[-1] if part.ended[i] else -1.,
                  "another's score, or no minus_one where no EOS was drawn", 1e-4)
            close(part.rewards[i].sum(), part.scores[i] - .05 * part.kl[i], "R(x, y)", 1e-5)
        seen += part.post.tolist()
    assert sorted(seen) == [post for post in range(8) for _ in range(k)], "each post k times"
    if parts > 1:
        assert seen != sorted(seen), "by length: not in the order of the queries"


def test_a_batch_is_whitened_as_one_however_it_is_cut(monkeypatch):
    write_them(monkeypatch)
    model = build(CONFIGS["gpt_neox"]()).double()
    reward_model = RewardModel(model).double()
    found = {}
    for rows in (0, 2, 3):
        batch = ppo.rollout(model, model, reward_model, reward_model, POSTS, TOKENIZER,
                            settings(micro_batch_size=rows), None)
        before = torch.cat([part.advantages[part.mask] for part in batch])
        ppo.whiten_batch(batch)
        for part in batch:
            assert part.advantages.shape == part.mask.shape
            assert (part.advantages[~part.mask] == 0).all()
        white = torch.cat([part.advantages[part.mask] for part in batch])
        close(white, (before - before.mean()) / (before.var(correction=0) + 1e-8).sqrt(),
              "mean and variance of all actions of the update, not of a microbatch", 1e-9)
        found[rows] = {post: row[keep].tolist() for part in batch for post, row, keep in zip(
            part.post.tolist(), part.advantages, part.mask)}
    for rows in (2, 3):
        for post, expected in found[0].items():
            close(found[rows][post], expected, "the cut shows in an advantage", 1e-6)


@pytest.mark.parametrize("name, field", [("reward", "final_scores"), ("return", "response_values"),
                                         ("KL", "response_log_probs")])
def test_a_rollout_with_a_number_that_is_none_names_it(name, field, monkeypatch):
    write_them(monkeypatch)
    model = build(CONFIGS["gpt_neox"]())
    reward_model = RewardModel(model)
    true, calls = getattr(ppo, field), []

    def spoiled(*arguments, **k):
        calls.append(field)
        x = true(*arguments, **k)
        return x * math.nan if len(calls) == 5 else x

    monkeypatch.setattr(ppo, field, spoiled)
    # a spoiled log-prob is in the KL and in the reward of the action; the score is asked first
    with pytest.raises(FloatingPointError, match=f"^{name} is NaN or infinite"):
        ppo.rollout(model, model, reward_model, reward_model, POSTS, TOKENIZER,
                    settings(micro_batch_size=1), None)


def loud_model(architecture):
    """Random, with logits up to 17 (a trained model's), where bfloat16 has steps of 1/8."""
    config = CONFIGS[architecture]()
    config.tie_word_embeddings = False
    model = build(config)
    with torch.no_grad():
        largest = model(torch.arange(3, 40)[None]).logits.abs().max()
        model.get_output_embeddings().weight.mul_(17 / largest)
        assert model(torch.arange(3, 40)[None]).logits.abs().max() == pytest.approx(17, abs=.01)
    return model


def in_precision(precision, architecture):
    """A policy, a reward model, and the context to compute in."""
    policy = loud_model(architecture)
    reward_model = RewardModel(policy)
    if precision == "bfloat16 weights":
        policy.bfloat16()
        reward_model.trunk.bfloat16()
    if precision == "bfloat16 products":  # as engine.devices.mixed_precision has it on a GPU
        return policy, reward_model, torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    return policy, reward_model, nullcontext()


def gap(log_probs, part):
    return (log_probs - part.log_probs)[part.mask].abs().max().item()


@torch.no_grad()
def gap_in_other_pieces(policy, part):
    """What the same tokens' log-probs differ by with more padding, or with each row on its own."""
    ids, real, width = part.inputs
    wider = [torch.nn.functional.pad(x, (5, 3)) for x in (ids, real)]
    gaps = [gap(response_log_probs(policy, *wider, width + 3, .7)[:, :width], part)]
    for row, keep, expected, mask in zip(ids, real.bool(), part.log_probs, part.mask):
        alone = row[keep][None]
        log_probs = response_log_probs(policy, alone, alone * 0 + 1, int(mask.sum()), .7)
        gaps.append((log_probs[0] - expected[mask]).abs().max().item())
    return max(gaps)


@pytest.mark.parametrize("architecture, precision, k", [
    ("gpt_neox", "float32", 3), ("gptj", "bfloat16 products", 1), ("qwen2", "bfloat16 weights", 3)])
def test_the_ratio_is_1_by_construction(architecture, precision, k):
    """What rollout measures is what the update reads again, row by row with the same padding. In
    bfloat16 the same tokens in other pieces have other log-probs, by more than the check allows."""
    policy, reward_model, context = in_precision(precision, architecture)
    with context:
        batch = ppo.rollout(policy, policy, reward_model, reward_model, POSTS, TOKENIZER,
                            settings(k, micro_batch_size=3 * k, rollout_batch_size=2 * k),
                            torch.Generator().manual_seed(0))
        assert len(batch) == 3
        others = []
        for part in batch:
            log_probs = response_log_probs(policy, *part.inputs, .7, k)
            assert log_probs.requires_grad, "as the policy's step computes them"
            ppo.check_first_update(log_probs.detach(), part)
            assert gap(log_probs.detach(), part) == 0, (
                "not the same rows, width and order of operations as in the rollout: the ratio "
                "begins somewhere else than at 1")
            others.append(gap_in_other_pieces(policy, part))
    if precision == "float32":
        assert max(others) < 1e-4
    elif torch.backends.cpu.get_cpu_capability() == "AVX512":  # others may add in one order always
        assert max(others) > 1e-3, "this model would not notice if it were measured otherwise"


CUTS = [{"k": 1, "micro_batch_size": 3, "rollout_batch_size": 2},
        {"k": 3, "micro_batch_size": 7, "rollout_batch_size": 9},
        {"k": 3, "micro_batch_size": 4, "checkpoint_activations": True},
        {"k": 3, "micro_batch_size": 4, "ppo_minibatches": 2},
        {"k": 1, "micro_batch_size": 3, "lora_rank": 2, "checkpoint_activations": True},
        {"k": 3, "micro_batch_size": 6, "rollout_batch_size": 12, "lora_rank": 2}]
FAST = [("float32", CUTS[0]), ("bfloat16 products", CUTS[1]), ("bfloat16 weights", CUTS[0])]


@pytest.mark.parametrize("precision, changes", [
    *FAST, *(pytest.param(precision, cut, marks=pytest.mark.slow) for cut in CUTS
             for precision in ("float32", "bfloat16 products", "bfloat16 weights")
             if (precision, cut) not in FAST)])
def test_train_ppo_starts_at_a_ratio_of_1(precision, changes, monkeypatch):
    """Whatever the update is cut into: with the tolerance that train_ppo has, and exactly."""
    policy, reward_model, context = in_precision(precision, "llama")
    if "lora_rank" in changes:
        policy = add_adapter(policy, changes["lora_rank"], 0)
        reward_model = RewardModel(policy)
        # adapters stay in float32, and half precision around them is what run_all has
        context = torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32",
                                 cache_enabled=False)
    gaps, losses = [], []
    check, loss_of = ppo.check_first_update, ppo.policy_loss

    def checked(log_probs, part, *tolerance):
        gaps.append(max(gap(log_probs, part),
                        (log_probs - part.ref_log_probs)[part.mask].abs().max().item()))
        check(log_probs, part, *tolerance)

    def policy_loss(log_probs, old, *rest):
        losses.append((log_probs - old)[rest[1]].abs().max().item())
        return loss_of(log_probs, old, *rest)

    monkeypatch.setattr(ppo, "check_first_update", checked)
    monkeypatch.setattr(ppo, "policy_loss", policy_loss)
    run = Told(n=2)
    with context:
        ppo.train_ppo(run, policy, reward_model, POSTS, TOKENIZER,
                      settings(**{"ppo_lr": 1e-2, **changes}))
    n, lines = changes.get("ppo_minibatches", 1), run.lines
    parts = len(losses) // 4  # of a pass: two updates of two passes
    assert len(gaps) * n == parts >= 3 * n, (
        "every microbatch of the first step is checked, and none of the others")
    assert max(gaps) == 0, "ratio 1 and KL 0 before the first update"
    assert max(losses[: parts // n]) == 0
    assert max(losses[2 * parts :][: parts // n]) == 0, "in the second update as well"
    assert min(losses[parts : 2 * parts]) > 1e-3, "and then the policy moves"
    assert lines[0]["kl_per_summary"] == 0 != lines[1]["kl_per_summary"], (
        "the KL to the reference is 0 at first, and then it is not")


# ---------------------------------------------------------------------------- minibatches


def part_of(*actions, first=0, k=1):
    """Rows with so many actions each, numbered from first on; all other numbers are 0."""
    mask = torch.arange(max(actions)) < torch.tensor(actions)[:, None]
    zeros, row = torch.zeros(mask.shape), torch.zeros(len(mask))
    return ppo.Microbatch(
        post=first + torch.arange(len(mask)), input_ids=mask.long(), attention_mask=mask.long(),
        mask=mask, ended=row, log_probs=zeros, ref_log_probs=zeros, values=zeros, scores=row,
        kl=row, rewards=zeros, advantages=zeros, returns=zeros, k=k)


def minibatches(batch, *stream, **changes):
    return list(ppo.minibatches(batch, config(**changes), generator_for(*stream)))


@pytest.mark.parametrize("changes, sizes", [
    ({}, [[6]]), ({"ppo_minibatches": 2}, [[3], [3]]), ({"ppo_minibatches": 6}, [[1]] * 6),
    ({"micro_batch_size": 4}, [[4, 2]]),
    ({"ppo_minibatches": 2, "micro_batch_size": 2}, [[2, 1], [2, 1]])])
def test_minibatches_take_every_row_once_with_its_share(changes, sizes):
    actions = [3, 1, 12, 7, 20, 5]
    found = minibatches([part_of(*actions)], 0, **changes)
    assert [[len(part.mask) for part, _ in minibatch] for minibatch in found] == sizes
    parts = [part for minibatch in found for part, _ in minibatch]
    rows = [row for part in parts for row in part.post.tolist()]
    assert sorted(rows) == list(range(6)), "each row once in a pass"
    for minibatch in found:
        counts = [sum(actions[row] for row in part.post.tolist()) for part, _ in minibatch]
        close(torch.stack([share for _, share in minibatch]), [n / sum(counts) for n in counts],
              "the share of the minibatch's tokens: not of its rows, not of the batch's", 1e-15)
    for part in parts:
        assert all(len(x) == len(part.post) for name, x in vars(part).items() if name != "k")
        assert part.mask.sum(1).tolist() == [actions[row] for row in part.post.tolist()]


@pytest.mark.parametrize("batch", [[part_of(3, 2), part_of(5, 5, first=2)], [part_of(3, 2, k=2)]])
def test_pieces_that_were_cut_before_are_one_minibatch(batch):
    (found,) = minibatches(batch, 0)
    assert [part for part, _ in found] == batch
    close(torch.stack([share for _, share in found]), [1 / 3, 2 / 3] if len(batch) > 1 else [1.],
          "5 and 10 of 15 tokens")


def test_minibatches_come_in_another_order_each_pass():
    def order(n_minibatches, *stream):
        return [part.post.tolist() for minibatch in minibatches(
            [part_of(*range(1, 9))], *stream, ppo_minibatches=n_minibatches)
            for part, _ in minibatch]

    for n_minibatches in (1, 2, 4, 8):
        passes = [order(n_minibatches, 0, "ppo epoch", 0, epoch) for epoch in range(6)]
        assert len({str(order) for order in passes}) == 6
        assert passes[2] == order(n_minibatches, 0, "ppo epoch", 0, 2), "the same when resumed"
    together = {frozenset(map(frozenset, order(2, 0, epoch))) for epoch in range(6)}
    assert len(together) > 1, "other rows together, too"


def test_shares_are_of_the_tokens_of_all_processes(monkeypatch):
    # 3 and 5 tokens here, 8 elsewhere: 3/16 and 5/16 here
    monkeypatch.setattr(ppo, "sum_over_processes", lambda x: x + 8)
    (minibatch,) = minibatches([part_of(3), part_of(5)], 0)
    assert [share.item() for _, share in minibatch] == [3 / 16, 5 / 16]
