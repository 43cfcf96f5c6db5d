"""The engine's loops: what they change, what they must not, and what a run leaves behind."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from common import (ARCHITECTURES, ROOT, TOKENIZER, build, config, flat, new_run, same, toy_model,
                    weights)
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm
from engine import batches, main, packing, ppo, reward, sampling, sft
from lm import generator_for
from ppo import PPOConfig, compute_gae, kl_penalized_rewards
from reward import score_summaries

QUERIES = [[3, 4, 5], [6, 7], [5], [8, 3, 3, 4]] * 4


@pytest.fixture
def model():
    return toy_model()


def few(**changes):
    """Two updates of 8 summaries, two steps each."""
    return config(**{"ppo_episodes": 16, "ppo_batch_size": 8, "ppo_epochs": 2, **changes})


def watch_rows(module):
    """A list that gets the number of rows of each forward pass."""
    rows = []
    module.register_forward_pre_hook(
        lambda module, arguments, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    return rows


def test_ppo_trains_policy_and_critic_and_nothing_else(model, tmp_path):
    reward_model = reward.RewardModel(model)
    reward_model.reference_mean.fill_(0.7)
    sft, before = weights(model), weights(reward_model)
    critic = ppo.train_ppo(new_run(tmp_path / "run"), model, reward_model, QUERIES, TOKENIZER,
                           few())
    assert not same(sft, model), "the policy never changed: is its optimiser on its own weights?"
    assert not same(before, critic), "the critic never changed"
    assert same(before, reward_model), "training changed the reward model"
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (model, reward_model, critic)]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2] or pointers[1] & pointers[2])


def test_critic_starts_as_the_whole_reward_model(model, tmp_path):
    reward_model = reward.RewardModel(model)
    reward_model.reference_mean.fill_(0.7)
    reward_model.head.bias.data.fill_(0.3)
    critic = ppo.train_ppo(new_run(tmp_path / "run"), model, reward_model, QUERIES, TOKENIZER,
                           few(ppo_lr=0.0))
    ids, mask, _ = lm.join(QUERIES[:3], [[1, 9], [2, 2, 9], [9]], 0)
    real = mask.bool()
    assert torch.equal(critic(ids, mask)[real], reward_model(ids, mask)[real])


@torch.no_grad()
def test_what_a_rollout_holds(model):
    torch.manual_seed(3)
    others = [copy.deepcopy(model) for _ in range(3)]
    for other in others:
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    reference, reward_model, critic = others[0], *map(reward.RewardModel, others[1:])
    queries = [[3, 9, 4], [6, 7], [5], [8, 9, 3, 4]] * 4  # some posts hold the EOS id 9
    (batch,) = ppo.rollout(model, reference, reward_model, critic, queries,
                           SimpleNamespace(eos_token_id=9, pad_token_id=9), config(),
                           generator_for(0))
    mask, kl, width = batch.mask, batch.kl, batch.mask.shape[1]
    padded = lm.pad(queries, 9, left=True)
    drawn = sampling.sample(model, *padded, 6, eos_token_id=9, pad_token_id=9,
                      generator=generator_for(0))
    assert torch.equal(batch.input_ids, torch.cat([padded[0], drawn], 1)), (
        "drawn after posts that are padded on the left, so that their end is the last position")
    ended = [9 in row[-width:].tolist() for row in batch.input_ids]
    assert True in ended and False in ended and batch.ended.tolist() == ended, (
        "ended: an EOS in the summary, and not in the post or its padding")
    scores = reward_model.score(batch.input_ids, batch.attention_mask)
    expected = torch.where(torch.tensor(ended), scores, torch.tensor(-1.0))
    assert torch.allclose(batch.scores, expected, atol=1e-4), "-1 where no_eos, else the score"
    by_hand = [sum((new - old) * m for new, old, m in zip(*row)) for row in zip(
        *(x.tolist() for x in (batch.log_probs, batch.ref_log_probs, mask)))]
    assert kl.tolist() == pytest.approx(by_hand, abs=1e-4), (
        "KL in nats per summary: a sum over its tokens, not a mean")
    assert kl.abs().max() > 0.1, "the reference is another model here"
    rewards = kl_penalized_rewards(batch.scores, batch.log_probs, batch.ref_log_probs,
                                       mask, 0.05)
    assert torch.allclose(batch.rewards, rewards, atol=1e-4)
    advantages, returns = compute_gae(rewards, batch.values, mask)
    assert torch.allclose(batch.returns, returns, atol=1e-4), (
        "returns are advantages + values from before whitening")
    assert torch.allclose(batch.advantages, advantages, atol=1e-4)


@torch.no_grad()
def test_every_summary_of_a_post_is_trained_on(model):
    reward_model = reward.RewardModel(model)
    (batch,) = ppo.rollout(model, model, reward_model, reward_model, [[3, 4], [6]], TOKENIZER,
                           config(return_sequences=8, ppo_batch_size=16), generator_for(0))
    width = batch.mask.shape[1]
    for rows in batch.input_ids[:, -width:].split(8):
        assert len({tuple(row) for row in rows.tolist()}) > 3, (
            "8 samples of a post are hardly ever the same: best of n is no sample of the policy")


@torch.no_grad()
def test_rollouts_are_drawn_at_the_temperature_of_their_log_probs(model):
    reward_model = reward.RewardModel(model)
    (batch,) = ppo.rollout(model, model, reward_model, reward_model, QUERIES, TOKENIZER,
                           config(temperature=1e-3), generator_for(0))
    assert batch.log_probs[batch.mask].mean() > -0.1, (
        "at temperature 0.001 the most likely token is all but certain")


def test_reference_and_old_log_probs_stay_where_they_were(model, tmp_path):
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES, TOKENIZER, config())
    first, last = run.history("ppo")
    assert abs(last["kl_per_summary"]) > 1e-3, (
        "KL 0 to the SFT model after an update: is the reference the policy itself?")
    assert first["kl_to_old_policy"] > 1e-3, "four passes move the policy away from pi_old"
    assert first["policy_clip_fraction"] > 0, (
        "no ratio ever left 1 +- 0.2 in four passes: are the old log-probs computed anew?")


def changed_by(function, how):
    return lambda *args, **kwargs: how(function(*args, **kwargs))


# what training must use, and a change of it that no optimiser undoes (Adam forgives a factor)
USED_BY_PPO = {
    "final_scores": lambda scores: -scores, "penalize_missing_eos": lambda scores: -scores,
    "is_eos": lambda ends: ~ends,
    "kl_penalized_rewards": lambda rewards: -rewards,
    "compute_gae": lambda pair: (pair[0].abs(), pair[1] + 1), "whiten": torch.abs,
    "policy_loss": lambda pair: (-pair[0], pair[1]), "value_loss": lambda pair: (-pair[0], pair[1]),
    "get_response_mask": lambda mask: mask.cumsum(1) == 1, "linear_schedule": lambda factor: 0.5,
    "response_log_probs": lambda x: x * torch.linspace(1, 2, x.shape[1]),
    "response_values": lambda x: x.flip(1)}


def ppo_weights(folder, **changes):
    policy = toy_model(4)
    critic = ppo.train_ppo(new_run(folder), policy, reward.RewardModel(policy), QUERIES, TOKENIZER,
                           few(**changes))
    return flat(policy, critic)


@pytest.fixture(scope="module")
def weights_of_ppo(tmp_path_factory):
    return ppo_weights(tmp_path_factory.mktemp("ppo") / "run")


@pytest.mark.parametrize("name", [None, *USED_BY_PPO])
def test_ppo_uses_what_is_pinned(name, weights_of_ppo, tmp_path, monkeypatch):
    """With any one of the functions corrupted, other weights come out of training."""
    if name:
        monkeypatch.setattr(ppo, name, changed_by(getattr(ppo, name), USED_BY_PPO[name]))
    same_weights = torch.equal(ppo_weights(tmp_path / "run"), weights_of_ppo)
    assert same_weights == (name is None), f"PPO does not use {name}"


OTHER_SETTINGS = {
    "ppo_lr": 5e-3, "ppo_episodes": 24, "ppo_batch_size": 4, "ppo_epochs": 3, "ppo_minibatches": 2,
    "return_sequences": 2, "kl_beta": 0.5, "gamma": 0.9, "lam": 0.5, "clip_range": 0.01,
    "clip_range_value": 0.01, "value_weight": 5.0, "missing_eos": -3.0, "temperature": 0.7,
    "response_length": 4, "max_grad_norm": 1e-4}


@pytest.mark.parametrize("name", vars(PPOConfig()))
def test_ppo_uses_every_setting(name, weights_of_ppo, tmp_path):
    changed = ppo_weights(tmp_path / "run", **{name: OTHER_SETTINGS[name]})
    assert not torch.equal(changed, weights_of_ppo), f"PPO does not use {name}"


@pytest.mark.parametrize("ppo_minibatches", [1, 2])
def test_each_update_has_the_next_posts_and_logs_the_mean_of_its_steps(
        ppo_minibatches, model, tmp_path, monkeypatch):
    """Posts in their order, from the start again at the end. At learning rate 0 nothing moves, so
    that what is logged can be made of the rollout: the mean over the minibatches of all passes. Old
    values that are 1 lower here make the clip matter: values may be 0.2 above them."""
    seen, drawn, rollout, streams = [], [], ppo.rollout, []

    def watched(policy, reference, reward_model, critic, queries, *rest):
        seen.append(queries)
        drawn.append(rollout(policy, reference, reward_model, critic, queries, *rest))
        return [replace(part, values=part.values - 1) for part in drawn[-1]]

    def named(*names, **device):
        streams.append(names)
        return generator_for(*names, **device)

    monkeypatch.setattr(ppo, "rollout", watched)
    for module in (ppo, batches):
        monkeypatch.setattr(module, "generator_for", named)
    posts, run = [[3], [4, 4], [5], [6, 6], [7], [8]], new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), posts, TOKENIZER, config(
        ppo_lr=0.0, ppo_episodes=12, ppo_batch_size=4, ppo_epochs=3, micro_batch_size=3,
        ppo_minibatches=ppo_minibatches))
    assert seen == [posts[:4], [*posts[4:], *posts[:2]], posts[2:]]
    assert len(set(streams)) == len(streams) == 3 * (1 + 3), "a stream for each batch, each epoch"
    for update, (line, batch) in enumerate(zip(run.history("ppo"), drawn, strict=True)):
        assert len(batch) == (2 if ppo_minibatches == 1 else 1), "cut, or one batch of rows"
        rows = [{name: getattr(part, name)[i][part.mask[i]].tolist()  # of a summary's actions
                 for name in ("values", "returns", "advantages", "log_probs")}
                | {"score": part.scores[i].item(), "ended": part.ended[i].item()}
                for part in batch for i in range(len(part.mask))]
        steps = [order.tolist() for epoch in range(3) for order in torch.randperm(
            4, generator=generator_for(0, "ppo epoch", update, epoch)).chunk(ppo_minibatches)]

        def actions(name, some=range(4)):
            return torch.tensor([x for i in some for x in rows[i][name]])

        mean, spread = actions("advantages").mean(), actions("advantages").std(correction=0)
        by_hand = Counter()
        for some in steps:
            pairs = [((v - r) ** 2, (v - 0.8 - r) ** 2) for v, r in zip(
                actions("values", some).tolist(), actions("returns", some).tolist())]
            by_hand["value_loss"] += sum(map(max, pairs)) / len(pairs) / 2
            by_hand["value_clip_fraction"] += sum(
                clipped > plain for plain, clipped in pairs) / len(pairs)
            by_hand["policy_loss"] -= ((actions("advantages", some) - mean) / spread).mean().item()
        for name, close in (("value_loss", {"rel": 1e-4}), ("policy_loss", {"abs": 1e-4}),
                            ("value_clip_fraction", {"abs": 1e-6})):
            assert line[name] == pytest.approx(by_hand[name] / len(steps), **close), name
        assert line["reward"] == pytest.approx(sum(row["score"] for row in rows) / 4, rel=1e-4)
        assert line["length"] == pytest.approx(len(actions("values")) / 4)
        assert line["entropy"] == pytest.approx(-actions("log_probs").mean().item(), rel=1e-4)
        assert line["ended"] == pytest.approx(sum(row["ended"] for row in rows) / 4)
        assert line["kl_to_old_policy"] == 0, "at rate 0 nothing moves"
        errors = (actions("returns") - actions("values")).var(correction=0)
        unexplained = errors / actions("returns").var(correction=0)
        assert line["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-3)


def test_explained_variance_by_hand():
    """Returns 1, 3, 2, 6 (variance 3.5), errors 0, 1, -1, 2 (variance 1.25): 1 - 1.25 / 3.5."""
    mask = torch.tensor([[True, True, False]])
    batch = [SimpleNamespace(returns=torch.tensor([[a, b, 99.0]]), mask=mask,
                             values=torch.tensor([[a - x, b - y, -99.0]]))
             for a, b, x, y in ((1.0, 3.0, 0.0, 1.0), (2.0, 6.0, -1.0, 2.0))]
    assert ppo.explained_variance(batch) == pytest.approx(1 - 1.25 / 3.5)


USED_BY_OTHERS = [
    (sft, sft, "masked_mean", lambda x: -x),
    (sft, packing, "get_position_ids", lambda x: x.flip(1)),
    (sft, packing, "get_log_probs", lambda x: x * torch.linspace(1, 2, x.shape[1])),
    (sft, sft, "cosine_schedule", lambda factor: 0.5),
    (reward, reward, "preference_loss", lambda loss: -loss),
    (reward, reward, "final_scores", lambda scores: -scores),
    (reward, reward, "get_position_ids", lambda x: x.flip(1)),
    (reward, reward, "cosine_schedule", lambda factor: 0.5)]


def trained(stage, run, **changes):
    """What a stage makes of the tiny model, as one vector; what PPO was paid, at the end."""
    fresh = toy_model(4)
    settings = few(**{"sft_lr": 1e-2, "sft_batch_size": 8, "sft_epochs": 1, "reward_lr": 1e-2,
                      "reward_batch_size": 8, "reward_epochs": 1, **changes})
    if stage is sft:
        sft.train_sft(run, fresh, QUERIES, [[1, 7, 9], [2, 9], [9], [5, 5, 9]] * 4, 0, settings)
    elif stage is reward:
        fresh = reward.RewardModel(fresh)
        reward.train_reward(run, fresh, [(q, [1, 7, 9], [2, 9]) for q in QUERIES], 0, settings)
    else:
        ppo.train_ppo(run, fresh, reward.RewardModel(fresh), QUERIES, TOKENIZER, settings)
        return torch.tensor([line["reward"] for line in run.history("ppo")])
    return flat(fresh)


@pytest.mark.parametrize("stage, module, name, how", USED_BY_OTHERS)
def test_sft_and_reward_model_use_what_is_pinned(stage, module, name, how, tmp_path, monkeypatch):
    before = trained(stage, new_run(tmp_path / "before"))
    monkeypatch.setattr(module, name, changed_by(getattr(module, name), how))
    after = trained(stage, new_run(tmp_path / "after"))
    assert not torch.equal(before, after), f"training does not use {name}"


@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_the_seed_of_the_run_decides_the_order(stage, tmp_path):
    """Shuffles and samples come from the run's seed: another one, other weights."""
    one, again, other = (trained(stage, new_run(tmp_path / str(i), seed), sft_batch_size=4,
                                 reward_batch_size=4) for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(one, again) and not torch.equal(one, other), "the seed is not used"


def test_the_optimizers_are_what_the_readme_says(tmp_path, monkeypatch):
    """beta_2 is 0.95 in SFT, epsilon 1e-5 in PPO; gradients are clipped in SFT and PPO, at norm 1.
    Adam's steps look much alike whatever these are, so the arguments are looked at."""
    seen = {}

    @contextmanager
    def watched(optimizer, lr, max_grad_norm=math.inf, name="loss"):
        group = optimizer.param_groups[0]
        seen[stage, name] = type(optimizer).__name__, group["betas"], group["eps"], max_grad_norm
        with batches.one_step(optimizer, lr, max_grad_norm, name) as step:
            yield step

    for module in (sft, reward, ppo):
        monkeypatch.setattr(module, "one_step", watched)
    for stage in ("sft", "reward", "ppo"):
        trained({"sft": sft, "reward": reward, "ppo": ppo}[stage], new_run(tmp_path / stage),
                max_grad_norm=0.7)
    assert seen == {
        ("sft", "loss"): ("Adam", (0.9, 0.95), 1e-8, 1.0),
        ("reward", "loss"): ("Adam", (0.9, 0.999), 1e-8, math.inf),
        ("ppo", "policy loss"): ("Adam", (0.9, 0.999), 1e-5, 0.7),
        ("ppo", "value loss"): ("Adam", (0.9, 0.999), 1e-5, 0.7)}
    assert PPOConfig().max_grad_norm == 1.0


def test_learning_rate_of_update_u_is_linear(model, tmp_path):
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES, TOKENIZER,
                  few(ppo_episodes=32, ppo_lr=1.5e-5))
    # U = 4: checklist item 45
    assert [row["lr"] for row in run.history("ppo")] == pytest.approx(
        [1.5e-5, 1.125e-5, 7.5e-6, 3.75e-6])


def test_ppo_raises_the_probability_of_what_is_rewarded(model, tmp_path, monkeypatch):
    # score = number of 7s in the summary; the critic starts as a reward model that knows nothing
    monkeypatch.setattr(ppo, "final_scores", lambda model, ids, mask, width, k: (
        ids[:, -width:] == 7).sum(1).float())
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), [[3, 4], [5]], TOKENIZER,
                  config(ppo_episodes=320, ppo_batch_size=32, ppo_lr=5e-3, kl_beta=0.01))
    rewards = [row["reward"] for row in run.history("ppo")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5, rewards


@pytest.mark.parametrize("micro_batch_size", [0, 1])
def test_sft_loss_is_the_mean_over_response_tokens(micro_batch_size, model, tmp_path):
    run = new_run(tmp_path / "run")
    ids, mask, width = lm.join(QUERIES[:2], [[7, 2, 9], [9]], 0)
    logits = model(input_ids=ids, attention_mask=mask,
                   position_ids=lm.get_position_ids(mask)).logits.double().log_softmax(-1)
    by_hand = [logits[0, width - 1 + t, y].item() for t, y in enumerate((7, 2, 9))]
    by_hand.append(logits[1, width - 1, 9].item())  # four tokens in all, EOS counted
    rows_at_a_time = watch_rows(model)
    sft.train_sft(run, model, QUERIES[:2], [[7, 2, 9], [9]], 0,
                  SimpleNamespace(micro_batch_size=micro_batch_size, sft_lr=0.0, sft_batch_size=2,
                                  sft_epochs=1))
    assert run.history("sft")[0]["loss"] == pytest.approx(-sum(by_hand) / 4, abs=1e-4)
    assert rows_at_a_time == ([1, 1] if micro_batch_size else [2])


def test_the_reward_model_learns(model, tmp_path):
    torch.manual_seed(2)
    reward_model = reward.RewardModel(model)
    pairs = [(query, [1, 7, 9], [1, 2, 9]) for query in QUERIES] * 8  # a 7 is better than a 2
    run = new_run(tmp_path / "run")
    reward.train_reward(run, reward_model, pairs, 0, SimpleNamespace(
        micro_batch_size=0, reward_lr=3e-3, reward_batch_size=8, reward_epochs=1))
    history = run.history("reward")
    assert len(history) == 16 and history[-1]["accuracy"] == 1.0
    gap = score_summaries(reward_model, QUERIES, [[1, 7, 9]] * 16, 0) - \
        score_summaries(reward_model, QUERIES, [[1, 2, 9]] * 16, 0)
    assert (gap > 0).all(), "the preferred summary must score higher"


@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_what_a_step_of_the_reward_model_logs(micro_batch_size, model, tmp_path):
    """One step at learning rate 0 over three pairs, one of them a tie, which is no hit."""
    torch.manual_seed(2)
    reward_model, run = reward.RewardModel(model), new_run(tmp_path / "run")
    pairs = [([3, 4], [7, 9], [2, 9]), ([5], [4, 9], [4, 9]), ([6, 7, 8], [9], [2, 2, 9])]
    queries, *sides = zip(*pairs)
    chosen, rejected = (score_summaries(reward_model, queries, side, 0).double().tolist()
                        for side in sides)
    by_hand = [-math.log(1 / (1 + math.exp(b - a))) for a, b in zip(chosen, rejected)]
    assert by_hand[1] == pytest.approx(math.log(2))
    reward_model.trunk.packs = 10**6, True  # tried before: the trial would be counted as well
    rows_at_a_time = watch_rows(reward_model.trunk)
    reward.train_reward(run, reward_model, pairs, 0, SimpleNamespace(
        micro_batch_size=micro_batch_size, reward_lr=0.0, reward_batch_size=3, reward_epochs=1))
    # the two summaries of a pair are one row, so that the post is computed once
    assert rows_at_a_time == ([2, 1] if micro_batch_size else [3])
    (line,) = run.history("reward")
    assert line["loss"] == pytest.approx(sum(by_hand) / 3, abs=1e-5)
    assert line["accuracy"] == pytest.approx(
        sum(a > b for a, b in zip(chosen[::2], rejected[::2])) / 3)


@pytest.mark.parametrize("architecture, pad_token_id", [  # 9 is EOS
    ("gpt2", 0), ("gpt2", 9), ("gptj", 9), ("gpt_neox", 0), ("llama", 9), ("qwen2", 0)])
def test_ppo_on_every_architecture_also_with_pad_equal_eos(architecture, pad_token_id, tmp_path):
    model = build(ARCHITECTURES[architecture]())
    before, run = weights(model), new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES,
                  SimpleNamespace(eos_token_id=9, pad_token_id=pad_token_id), few())
    assert not same(before, model)
    assert abs(run.history("ppo")[0]["kl_per_summary"]) < 1e-4


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    main.main(["--fast_dev_run", "--seed", "4", "--output_dir", str(folder)])
    return folder


def timeless(value):
    """Without what may differ between two runs of one seed."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items()
                if not k.endswith(("seconds", "per_second", "bytes"))}
    return value


def test_a_run_leaves_every_file(finished):
    folder = finished
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "results.json", "report.md"):
        assert (folder / name).stat().st_size > 0
    for name in ("sft", "reward_model", "policy", "critic"):
        assert (folder / name / "model.safetensors").exists()
        assert (folder / name / "tokenizer.json").exists()
    results = json.loads((folder / "results.json").read_text())
    for key in ("preset", "seed", "reward_accuracy", "reward_accuracy_longest_wins",
                "sft_vs_reference", "ppo_vs_reference", "ppo_vs_sft", "kl_per_summary",
                "reward_sft", "reward_ppo", "mean_length_sft", "mean_length_ppo", "seconds",
                "peak_memory_bytes", "reward_accuracy_true_taste", "reward_accuracy_post_blind",
                "ideal_vs_reference", "fact_accuracy"):
        assert key in results, key
    for key in ("sft_vs_reference", "ppo_vs_reference", "ppo_vs_sft"):
        assert results[key]["judge"] == "labeler"
        assert results[key]["low"] <= results[key]["win_rate"] <= results[key]["high"]
        assert results[key]["n"] == 16
    assert results["ideal_vs_reference"]["win_rate"] == 1.0
    stages = {json.loads(line)["stage"] for line in open(folder / "metrics.jsonl")}
    assert stages == {"sft", "reward", "ppo", "judge"}
    assert "total" in results["seconds"]


@pytest.mark.slow
def test_one_seed_gives_one_run(finished, tmp_path):
    one, two = finished, tmp_path / "two"
    main.main(["--fast_dev_run", "--seed", "4", "--output_dir", str(two)])
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (one / name).read_text() == (two / name).read_text()
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert timeless(results[0]) == timeless(results[1])
    for name in ("sft", "reward_model", "policy", "critic"):
        assert (one / name / "model.safetensors").read_bytes() == (
            two / name / "model.safetensors").read_bytes()


def test_saved_models_load_and_the_policy_is_not_the_sft_model(finished):
    folder = finished
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("sft", "policy")]
    assert not same(weights(models[0]), models[1])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    reward_model = reward.RewardModel.from_pretrained(folder / "reward_model")
    assert reward_model.reference_mean != 0 and not reward_model.training


def test_summarize_prints_both_models_and_their_rewards(finished, tmp_path, capsys):
    (tmp_path / "post.txt").write_text("My boss sold my car. I feel angry. Should I sue?")
    main.main(["--summarize", str(tmp_path / "post.txt"), "--output_dir", str(finished)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sft", "policy"]
    assert all("reward" in line for line in lines)


def real_rows(folder, n=24):
    """Comparisons and posts of the real schema, composed here."""
    pets = ["dog", "cat", "horse", "parrot", "goat", "rabbit"]
    comparisons, posts = [], []
    for i in range(n):
        pet = pets[i % 6]
        text = (f"  So on day {i} my {pet} ate {i} cookies.\n\nI called the vet, who laughed. "
                f"The {pet} is fine, \"but\" I'm <b>angry</b>.\n{'It snored. ' * (i % 5)}")
        info = {"id": f"t3_{i}", "post": text, "title": f"My {pet} ate {i} cookies",
                "subreddit": "pets", "site": None, "article": None}
        texts = f" my {pet} ate cookies, vet laughed.", f" {pet} ate {i} cookies and is fine."
        summaries = [{"text": text, "policy": policy, "note": None}
                     for text, policy in zip(texts, ("sup1", "ref"))]
        comparisons.append({"info": info, "summaries": summaries, "choice": i % 2, "worker": "w",
                            "batch": "b", "split": "train", "extra": {"confidence": 5}})
        posts.append({"id": f"p{i}", "subreddit": "pets", "title": f"{pet} number {i}",
                      "post": text.replace("day", "evening"), "summary": f" {pet} had cookies."})
    for name, rows in (("comparisons.jsonl", comparisons), ("posts.jsonl", posts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--comparisons", str(folder / "comparisons.jsonl"), "--posts",
            str(folder / "posts.jsonl"), "--fast_dev_run", "--output_dir", str(folder / "run")]


@pytest.mark.parametrize("judge", [
    "longest", pytest.param("reward_model", marks=pytest.mark.slow)])
def test_rows_of_the_real_schema_go_through(judge, tmp_path, capsys):
    main.main([*real_rows(tmp_path), "--judge", judge])
    out = capsys.readouterr().out
    assert f"judged by: {judge}" in out and "can't write good summaries" in out
    assert "pick-the-longer" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["ppo_vs_sft"]["judge"] == judge
    assert "reward_accuracy_true_taste" not in results
    assert "<b>" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    (["--comparisons", "x.jsonl", "--posts", "y.jsonl", "--judge", "longest"], "y.jsonl"),
    (["--sft_model", "./nowhere", "--fast_dev_run"], "./nowhere"),
    (["--reward_model", "./nowhere"], "./nowhere"),
    (["--judge", "./nowhere"], "./nowhere"),
    (["--query_length", "3", "--fast_dev_run"], "query_length 3 is too small"),
    (["--summarize", "post.txt"], "--output_dir"),
    (["--output_dir", "a.txt", "--fast_dev_run"], "expected a folder, found a file"),
    (["--output_dir", "folder", "--fast_dev_run", "--restart"], "holds other files"),
    (["--output_dir", "/proc/none", "--fast_dev_run"], "cannot write there"),
])
def test_bad_settings_end_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert all(path.read_text() == "mine" for path in tmp_path.glob("**/*.txt"))


# ---------------------------------------------------------------------------- slow: as a user would


def run_script(*arguments):
    return subprocess.run([sys.executable, "-m", "engine", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_default_run_learns(tmp_path):
    done = run_script("--output_dir", tmp_path / "run")
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
