"""The training loops: what they change, what they must not, and what a run leaves behind."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config

import judge
import lm
import ppo
import reward
import rlhf_minimal
import sft
import toy
from engine import batches
from engine.batches import generator_for
from engine.folder import Run
from engine.settings import ModelConfig, SettingError

torch.set_num_threads(1)
TOKENIZER = SimpleNamespace(eos_token_id=9, pad_token_id=0)
QUERIES = [[3, 4, 5], [6, 7], [5], [8, 3, 3, 4]] * 4


def new_run(folder, **flags):
    return Run(folder, {"seed": 0, "files": {}, "environment": {}}, **flags)


class Vocabulary(SimpleNamespace):
    def __len__(self):
        return 12


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toy.make_model(Vocabulary(eos_token_id=9, pad_token_id=0), 16, 2, 2)


def config(**changes):
    fields = {**vars(ppo.PPOConfig()), **vars(ModelConfig()), "ppo_episodes": 32,
              "ppo_batch_size": 16, "response_length": 6, "ppo_lr": 1e-2}
    return SimpleNamespace(**{**fields, **changes})


def watch_rows(module):
    """A list that gets the number of rows of each forward pass."""
    rows = []
    module.register_forward_pre_hook(
        lambda module, arguments, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    return rows


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before, module):
    return all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_ppo_trains_policy_and_critic_and_nothing_else(model, tmp_path):
    reward_model = reward.RewardModel(model)
    reward_model.reference_mean.fill_(0.7)
    sft, before = weights(model), weights(reward_model)
    critic = ppo.train_ppo(new_run(tmp_path / "run"), model, reward_model, QUERIES, TOKENIZER,
                           config())
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
                           config(ppo_lr=0.0))
    ids, mask, _ = lm.join(QUERIES[:3], [[1, 9], [2, 2, 9], [9]], 0)
    real = mask.bool()
    assert torch.equal(critic(ids, mask)[real], reward_model(ids, mask)[real])


def test_policy_step_leaves_critic_without_gradient_and_the_reverse(model):
    critic = reward.RewardModel(model)
    ids, mask, width = lm.join(QUERIES[:3], [[1, 9], [2, 2, 9], [9]], 0)
    log_probs = lm.response_log_probs(model, ids, mask, 3)
    response_mask = mask[:, width:]
    loss, _ = ppo.policy_loss(log_probs, log_probs.detach() - 0.1, torch.ones(3, 3), response_mask)
    loss.backward()
    assert all(p.grad is None for p in critic.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.zero_grad(set_to_none=True)
    values = ppo.response_values(critic, ids, mask, 3)
    ppo.value_loss(values, values.detach(), values.detach() + 1, response_mask)[0].backward()
    assert all(p.grad is None for p in model.parameters())
    assert critic.head.weight.grad.any()


@torch.no_grad()
def test_a_value_is_that_of_the_state_before_its_action(model):
    critic = reward.RewardModel(model)
    ids, mask, width = lm.join([[3, 4], [5]], [[1, 7, 2], [2, 7, 1]], 0)
    values = ppo.response_values(critic, ids, mask, 3)
    assert values.shape == (2, 3)
    for t in range(3):
        changed = ids.clone()
        changed[:, width + t] = 8
        now = ppo.response_values(critic, changed, mask, 3)
        assert torch.allclose(now[:, : t + 1], values[:, : t + 1], atol=1e-6), (
            f"V_{t} is the value before action {t}: it must not see it")
        assert not torch.allclose(now[:, t + 1 :], values[:, t + 1 :], atol=1e-4) or t == 2


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
    drawn = lm.sample(model, *padded, 6, eos_token_id=9, pad_token_id=9,
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
    rewards = ppo.kl_penalized_rewards(batch.scores, batch.log_probs, batch.ref_log_probs,
                                       mask, 0.05)
    assert torch.allclose(batch.rewards, rewards, atol=1e-4)
    advantages, returns = ppo.compute_gae(rewards, batch.values, mask)
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
    "response_values": lambda x: x.flip(1), "masked_mean": torch.abs}


def ppo_weights(folder, **changes):
    torch.manual_seed(4)
    policy = toy.make_model(Vocabulary(eos_token_id=9, pad_token_id=0), 16, 2, 2)
    critic = ppo.train_ppo(new_run(folder), policy, reward.RewardModel(policy), QUERIES, TOKENIZER,
                           config(**{"ppo_epochs": 2, **changes}))
    return torch.cat([p.flatten() for m in (policy, critic) for p in m.parameters()])


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
    "ppo_lr": 5e-3, "ppo_episodes": 48, "ppo_batch_size": 8, "ppo_epochs": 3, "ppo_minibatches": 2,
    "return_sequences": 2, "kl_beta": 0.5, "gamma": 0.9, "lam": 0.5, "clip_range": 0.01,
    "clip_range_value": 0.01, "value_weight": 5.0, "missing_eos": -3.0, "temperature": 0.7,
    "response_length": 4, "max_grad_norm": 1e-4}


@pytest.mark.parametrize("name", vars(ppo.PPOConfig()))
def test_ppo_uses_every_setting(name, weights_of_ppo, tmp_path):
    changed = ppo_weights(tmp_path / "run", **{name: OTHER_SETTINGS[name]})
    assert not torch.equal(changed, weights_of_ppo), f"PPO does not use {name}"


@pytest.mark.parametrize("ppo_minibatches", [1, 2])
def test_each_update_has_the_next_posts_and_logs_the_mean_of_its_steps(
        ppo_minibatches, model, tmp_path, monkeypatch):
    """Posts in their order, from the start again at the end. At learning rate 0 all passes of an
    update have the same losses: what is logged is the mean over its minibatches. Old values that
    are 1 lower here make the clip matter: values may be 0.2 above them."""
    seen, drawn, rollout, streams = [], [], ppo.rollout, []

    def watched(policy, reference, reward_model, critic, queries, *rest):
        seen.append(queries)
        drawn.append(rollout(policy, reference, reward_model, critic, queries, *rest))
        return [dataclasses.replace(part, values=part.values - 1) for part in drawn[-1]]

    def named(*names, **device):
        streams.append(names)
        return generator_for(*names, **device)

    def actions(batch, name):  # those of all microbatches, one after the other
        return torch.cat([getattr(part, name)[part.mask] for part in batch])

    def summaries(batch, name):
        return torch.cat([getattr(part, name) for part in batch])

    monkeypatch.setattr(ppo, "rollout", watched)
    for module in (ppo, batches):
        monkeypatch.setattr(module, "generator_for", named)
    posts, run = [[3], [4, 4], [5], [6, 6], [7], [8]], new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), posts, TOKENIZER, config(
        ppo_lr=0.0, ppo_episodes=12, ppo_batch_size=4, ppo_epochs=3, micro_batch_size=3,
        ppo_minibatches=ppo_minibatches))
    assert seen == [posts[:4], [*posts[4:], *posts[:2]], posts[2:]]
    assert len(set(streams)) == len(streams) == 3 * (1 + 3), "a stream for each batch, each epoch"
    assert batches.posts_per_update(config(ppo_batch_size=2, return_sequences=4)) == 1
    for line, batch in zip(run.history("ppo"), drawn, strict=True):
        assert len(batch) == 2 and sum(len(part.scores) for part in batch) == 4
        steps = [batch] if ppo_minibatches == 1 else [[part] for part in batch]  # of each pass
        advantages, by_hand = actions(batch, "advantages"), Counter()
        mean, spread = advantages.mean(), advantages.std(correction=0)
        for step in steps:
            pairs = [((v - r) ** 2, (v - 0.8 - r) ** 2) for v, r in zip(
                actions(step, "values").tolist(), actions(step, "returns").tolist())]
            by_hand["value_loss"] += sum(map(max, pairs)) / len(pairs) / 2
            by_hand["value_clip_fraction"] += sum(
                clipped > plain for plain, clipped in pairs) / len(pairs)
            by_hand["policy_loss"] -= ((actions(step, "advantages") - mean) / spread).mean().item()
        for name, close in (("value_loss", {"rel": 1e-4}), ("policy_loss", {"abs": 1e-4}),
                            ("value_clip_fraction", {"abs": 1e-6})):
            assert line[name] == pytest.approx(by_hand[name] / len(steps), **close), name
        assert line["reward"] == pytest.approx(summaries(batch, "scores").mean().item(), rel=1e-4)
        assert line["length"] == pytest.approx(len(advantages) / 4)
        assert line["entropy"] == pytest.approx(-actions(batch, "log_probs").mean().item(),
                                                rel=1e-4)
        assert line["ended"] == pytest.approx(summaries(batch, "ended").float().mean().item())
        assert line["kl_to_old_policy"] == 0, "at rate 0 nothing moves"
        returns, values = actions(batch, "returns"), actions(batch, "values")
        unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
        assert line["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-3)


def test_explained_variance_by_hand():
    """Returns 1, 3, 2, 6 (variance 3.5), errors 0, 1, -1, 2 (variance 1.25): 1 - 1.25 / 3.5."""
    mask = torch.tensor([[True, True, False]])
    batch = [SimpleNamespace(returns=torch.tensor([[a, b, 99.0]]), mask=mask,
                             values=torch.tensor([[a - x, b - y, -99.0]]))
             for a, b, x, y in ((1.0, 3.0, 0.0, 1.0), (2.0, 6.0, -1.0, 2.0))]
    assert ppo.explained_variance(batch) == pytest.approx(1 - 1.25 / 3.5)


USED_BY_OTHERS = [
    (sft, sft, "masked_mean", lambda x: -x), (sft, lm, "get_position_ids", lambda x: x.flip(1)),
    (sft, lm, "get_log_probs", lambda x: x * torch.linspace(1, 2, x.shape[1])),
    (sft, sft, "cosine_schedule", lambda factor: 0.5),
    (reward, reward, "preference_loss", lambda loss: -loss),
    (reward, reward, "final_scores", lambda scores: -scores),
    (reward, reward, "get_position_ids", lambda x: x.flip(1)),
    (reward, reward, "cosine_schedule", lambda factor: 0.5)]


@pytest.mark.parametrize("stage, module, name, how", USED_BY_OTHERS)
def test_sft_and_reward_model_use_what_is_pinned(stage, module, name, how, model, tmp_path,
                                                 monkeypatch):
    def trained(folder):
        torch.manual_seed(4)
        fresh = copy.deepcopy(model)
        settings = SimpleNamespace(micro_batch_size=0, sft_lr=1e-2, sft_batch_size=8, sft_epochs=1,
                                   reward_lr=1e-2, reward_batch_size=8, reward_epochs=1)
        if stage is sft:
            sft.train_sft(new_run(tmp_path / folder), fresh, QUERIES, [[7, 2, 9], [9]] * 8, 0,
                          settings)
        else:
            fresh = reward.RewardModel(fresh)
            pairs = [(query, [1, 7, 9], [2, 9]) for query in QUERIES]
            reward.train_reward(new_run(tmp_path / folder), fresh, pairs, 0, settings)
        return torch.cat([p.flatten() for p in fresh.parameters()])

    before = trained("before")
    monkeypatch.setattr(module, name, changed_by(getattr(module, name), how))
    assert not torch.equal(before, trained("after")), f"training does not use {name}"


def test_the_optimizers_are_what_the_readme_says(model, tmp_path, monkeypatch):
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
    settings = config(sft_lr=1e-2, sft_batch_size=8, sft_epochs=1, reward_lr=1e-2,
                      reward_batch_size=8, reward_epochs=1)
    reward_model, run = reward.RewardModel(model), new_run(tmp_path / "run")
    stage = "sft"
    sft.train_sft(run, model, QUERIES, [[7, 2, 9], [9]] * 8, 0, settings)
    stage = "reward"
    reward.train_reward(run, reward_model, [(q, [1, 9], [2, 9]) for q in QUERIES], 0, settings)
    stage = "ppo"
    ppo.train_ppo(run, model, reward_model, QUERIES, TOKENIZER, config(max_grad_norm=0.7))
    assert seen == {
        ("sft", "loss"): ("Adam", (0.9, 0.95), 1e-8, 1.0),
        ("reward", "loss"): ("Adam", (0.9, 0.999), 1e-8, math.inf),
        ("ppo", "policy loss"): ("Adam", (0.9, 0.999), 1e-5, 0.7),
        ("ppo", "value loss"): ("Adam", (0.9, 0.999), 1e-5, 0.7)}
    assert ppo.PPOConfig().max_grad_norm == 1.0


def test_a_batch_that_the_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(batches, "n_processes", lambda: 3)
    with pytest.raises(SettingError, match="sft: a batch of 2 rows does not reach for 3 processes: "
                                           "start fewer, or raise sft_batch_size"):
        batches.steps_per_epoch(10, 2, "sft")
    assert batches.steps_per_epoch(10, 3, "sft") == (3, 3)
    with pytest.raises(SettingError, match="--ppo_batch_size 8: 4 posts an update can't be shared "
                                           "evenly among 3 processes"):
        batches.posts_per_update(config(ppo_batch_size=8, return_sequences=2))
    assert batches.posts_per_update(config(ppo_batch_size=12, return_sequences=2)) == 6
    with pytest.raises(SettingError, match="--ppo_minibatches 3: expected at most the 2 posts that "
                                           "a process has in an update"):
        batches.posts_per_update(config(ppo_batch_size=12, return_sequences=2, ppo_minibatches=3))


def test_learning_rate_of_update_u_is_linear(model, tmp_path):
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES, TOKENIZER,
                  config(ppo_episodes=64, ppo_lr=1.5e-5))
    # U = 4: checklist item 45
    assert [row["lr"] for row in run.history("ppo")] == pytest.approx(
        [1.5e-5, 1.125e-5, 7.5e-6, 3.75e-6])


def test_ppo_raises_the_probability_of_what_is_rewarded(model, tmp_path, monkeypatch):
    # score = number of 7s in the summary; the critic starts as a reward model that knows nothing
    monkeypatch.setattr(ppo, "final_scores", lambda model, ids, mask, width, k: (
        ids[:, -width:] == 7).sum(1).float())
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), [[3, 4], [5]], TOKENIZER,
                  config(ppo_episodes=640, ppo_batch_size=32, ppo_lr=5e-3, kl_beta=0.01))
    rewards = [row["reward"] for row in run.history("ppo")]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 1, rewards


def test_first_update_check_names_the_trouble():
    log_probs, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]])
    fields = {"log_probs": log_probs, "ref_log_probs": log_probs, "mask": mask}
    part = SimpleNamespace(**fields)
    ppo.check_first_update(log_probs + torch.tensor([[0, 5.0]]), part)  # off the mask: fine
    ppo.check_first_update(log_probs + 0.9e-3, part)
    for name, called in (("log_probs", "the old ones"), ("ref_log_probs", "the reference ones")):
        for gap in (0.01, -0.01, 1.1e-3):
            other = SimpleNamespace(**{**fields, name: log_probs + gap})
            said = f"{called} by {abs(gap)} nats.*Look for dropout"
            with pytest.raises(RuntimeError, match=said):
                ppo.check_first_update(log_probs, other)
    with pytest.raises(RuntimeError, match="ratio"):
        ppo.check_first_update(log_probs * math.nan, part)


def test_half_precision_needs_no_wider_tolerance(model, tmp_path, monkeypatch):
    """What is compared before the first update was measured on the same rows and padding, in
    several microbatches as well: no gap at all, in any precision."""
    gaps, check = [], ppo.check_first_update

    def watched(log_probs, part):  # with the default tolerance
        check(log_probs, part)
        gaps.append(max((log_probs - other)[part.mask].abs().max().item()
                        for other in (part.log_probs, part.ref_log_probs)))

    monkeypatch.setattr(ppo, "check_first_update", watched)
    for name, dtype, mixed in (("one", torch.float32, False), ("two", torch.float32, True),
                               ("three", torch.bfloat16, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            ppo.train_ppo(new_run(tmp_path / name), copy.deepcopy(model).to(dtype),
                          reward.RewardModel(model), QUERIES, TOKENIZER,
                          config(ppo_episodes=16, ppo_epochs=2, micro_batch_size=6))
    assert gaps == [0.0] * 9, "three microbatches, before the first step only"


def test_rollout_pays_the_minus_one_only_where_no_eos_was_drawn(model):
    reward_model = reward.RewardModel(model)
    (batch,) = ppo.rollout(model, copy.deepcopy(model), reward_model, reward_model, QUERIES,
                           TOKENIZER, config(), generator_for(0))
    ended = batch.ended
    assert ended.any() and not ended.all(), "the case is not tested: choose another seed"
    assert (batch.scores[~ended] == -1).all() and (batch.scores[ended] != -1).all()
    assert torch.allclose(batch.kl, torch.zeros(len(QUERIES)), atol=1e-5)
    # KL 0 and lambda 1: the return from every action is the score, whatever the critic says
    rewards = ppo.kl_penalized_rewards(batch.scores, batch.log_probs, batch.ref_log_probs,
                                       batch.mask, 0.05)
    _, returns = ppo.compute_gae(rewards, batch.values, batch.mask, lam=1.0)
    expected = batch.scores[:, None] * batch.mask
    assert torch.allclose(returns, expected, atol=1e-4)


def test_minibatches_and_several_responses_of_a_post(model, tmp_path):
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES, TOKENIZER,
                  config(ppo_minibatches=3, return_sequences=4))
    assert len(run.history("ppo")) == 2


def test_sft_learns_the_response_and_ignores_the_query(model, tmp_path):
    torch.manual_seed(1)
    settings = SimpleNamespace(micro_batch_size=0, sft_lr=1e-2, sft_batch_size=8, sft_epochs=30)
    sft.train_sft(new_run(tmp_path / "run"), model, QUERIES, [[7, 2, 9]] * 16, 0, settings)
    ids, mask, width = lm.join(QUERIES, [[7, 2, 9]] * 16, 0)
    likely = lm.response_log_probs(model, ids, mask, 3).exp()
    assert likely.min() > 0.8, "response and EOS are to be learned"
    query = lm.response_log_probs(model, ids[:, :width], mask[:, :width], 2).exp()
    assert query[3].max() < 0.5, "query tokens are not in the loss"  # row 3 has no padding


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


def test_reward_model_learns_and_is_normalised(model, tmp_path):
    torch.manual_seed(2)
    reward_model = reward.RewardModel(model)
    pairs = [(query, [1, 7, 9], [1, 2, 9]) for query in QUERIES] * 8  # a 7 is better than a 2
    run = new_run(tmp_path / "run")
    reward.train_reward(run, reward_model, pairs, 0, SimpleNamespace(
        micro_batch_size=0, reward_lr=3e-3, reward_batch_size=8, reward_epochs=1))
    history = run.history("reward")
    assert len(history) == 16 and history[-1]["accuracy"] == 1.0
    gap = reward.score_summaries(reward_model, QUERIES, [[1, 7, 9]] * 16, 0) - \
        reward.score_summaries(reward_model, QUERIES, [[1, 2, 9]] * 16, 0)
    assert (gap > 0).all(), "the preferred summary must score higher"
    references = [[7, 9], [2, 9], [3, 4, 9], [9]] * 4
    reward.normalize(reward_model, QUERIES, references, 0)
    scores = reward.score_summaries(reward_model, QUERIES, references, 0)
    assert scores.mean().abs() < 1e-5 and scores.std() > 1e-3
    reward.normalize(reward_model, QUERIES, references, 0)  # twice is once
    assert torch.allclose(scores, reward.score_summaries(reward_model, QUERIES, references, 0),
                          atol=1e-5)
    reward_model.save_pretrained(tmp_path / "rm")
    scores = reward.score_summaries(reward_model, QUERIES, references, 0)
    again = reward.RewardModel.from_pretrained(tmp_path / "rm")
    assert torch.equal(scores, reward.score_summaries(again, QUERIES, references, 0))


@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_what_a_step_of_the_reward_model_logs(micro_batch_size, model, tmp_path):
    """One step at learning rate 0 over three pairs, one of them a tie, which is no hit."""
    torch.manual_seed(2)
    reward_model, run = reward.RewardModel(model), new_run(tmp_path / "run")
    pairs = [([3, 4], [7, 9], [2, 9]), ([5], [4, 9], [4, 9]), ([6, 7, 8], [9], [2, 2, 9])]
    queries, *sides = zip(*pairs)
    chosen, rejected = (reward.score_summaries(reward_model, queries, side, 0).double().tolist()
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


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_seed_of_the_run_decides_the_order(stage, model, tmp_path):
    """Shuffles and samples come from the run's seed: another one, other weights."""
    def trained(seed):
        torch.manual_seed(2)
        fresh, run = copy.deepcopy(model), Run(
            tmp_path / str(seed), {"seed": seed, "files": {}, "environment": {}})
        settings = config(sft_lr=1e-2, sft_batch_size=4, sft_epochs=1, reward_lr=1e-2,
                          reward_batch_size=4, reward_epochs=1)
        responses = [[1, 7, 9], [2, 9], [9], [5, 5, 9]] * 4
        if stage == "reward":
            fresh = reward.RewardModel(fresh)
            pairs = [(q, r, r[::-1]) for q, r in zip(QUERIES, responses)]
            reward.train_reward(run, fresh, pairs, 0, settings)
        elif stage == "sft":
            sft.train_sft(run, fresh, QUERIES, responses, 0, settings)
        else:
            ppo.train_ppo(run, fresh, reward.RewardModel(fresh), QUERIES, TOKENIZER, settings)
            return torch.tensor([line["reward"] for line in run.history("ppo")])  # of what it drew
        return torch.cat([p.flatten() for p in fresh.parameters()])

    assert not torch.equal(trained(1), trained(2)), "the seed is not used"


def test_each_query_gets_its_own_response(model):
    """In batches, of queries of all lengths, in any order: as if each were alone."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # sharp enough for the answer to depend on the query
    queries = [[3, 4, 5, 6, 7], [6], [5, 1], [8, 3, 3, 4], [2, 2, 7]]
    alone = []
    for query in queries:
        ids = torch.tensor([query])
        row = lm.sample(model, ids, torch.ones_like(ids), 6, eos_token_id=9, pad_token_id=0,
                        temperature=0)[0].tolist()
        alone.append(row[: row.index(9) + 1] if 9 in row else row)
    assert len({tuple(row) for row in alone}) > 2, "the answers have to differ to show anything"
    for batch_size in (1, 2, 256):
        assert lm.sample_responses(model, TOKENIZER, queries, 6, 0.0,
                                   batch_size=batch_size) == alone
    drawn = [lm.sample_responses(model, TOKENIZER, queries, 6, 1.0, generator_for(seed))
             for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2], "the draws come from the given generator"


def test_length_and_post_blind_baselines():
    # longer chosen, shorter chosen, equal: (1 + 0 + 1/2) / 3
    pairs = [([1], [2, 3, 9], [2, 9]), ([1], [9], [2, 9]), ([1], [4, 9], [2, 9])]
    assert judge.length_accuracy(pairs) == pytest.approx(0.5)
    seven_wins = [([1], [7, 9], [2, 9]), ([4], [3, 7, 9], [3, 5, 9])] * 20
    assert judge.post_blind_accuracy(seven_wins, seven_wins[:2], 12) == 1.0
    post_decides = [([1], [7, 9], [2, 9]), ([4], [2, 9], [7, 9])] * 20  # form says nothing
    assert judge.post_blind_accuracy(post_decides, post_decides, 12) <= 0.5


def test_best_of_n_takes_the_best_by_score():
    texts, asked = iter(["a", "bbb", "bb", "c", "cccc", "cc"]), []

    def write(model, posts, *how):
        asked.append((model, posts, *how))
        return [next(texts) for _ in posts]

    best = judge.best_of_n(write, lambda posts, samples: [len(s) for s in samples], "the model",
                           ["p", "q"], 3)
    assert best == ["bbb", "cccc"]
    assert asked == [("the model", [*"pppqqq"], 0.7, "best of n")], "T = 0.7 (G.3)"


ARCHITECTURES = {
    "gpt2": GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gptj": GPTJConfig(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2,
                              num_attention_heads=2, intermediate_size=32),
    "llama": LlamaConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32),
    "qwen2": Qwen2Config(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=32),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pad_token_id", [0, 9])  # 9 is EOS
def test_ppo_on_every_architecture_also_with_pad_equal_eos(name, pad_token_id, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    before = weights(model)
    run = new_run(tmp_path / "run")
    ppo.train_ppo(run, model, reward.RewardModel(model), QUERIES,
                  SimpleNamespace(eos_token_id=9, pad_token_id=pad_token_id), config())
    assert not same(before, model)
    assert abs(run.history("ppo")[0]["kl_per_summary"]) < 1e-4


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    rlhf_minimal.main(["--fast_dev_run", "--seed", "4", "--output_dir", str(folder)])
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
    rlhf_minimal.main(["--fast_dev_run", "--seed", "4", "--output_dir", str(two)])
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
    rlhf_minimal.main(["--summarize", str(tmp_path / "post.txt"), "--output_dir", str(finished)])
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
    rlhf_minimal.main([*real_rows(tmp_path), "--judge", judge])
    out = capsys.readouterr().out
    assert f"judged by: {judge}" in out and "can't write good summaries" in out
    assert "pick-the-longer" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["ppo_vs_sft"]["judge"] == judge
    assert "reward_accuracy_true_taste" not in results
    assert "<b>" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    (["--kl_betta", "1"], "--kl_betta"),
    (["--kl_beta", "much"], "kl_beta"),
    (["--preset", "huge"], "expected one of tiny, student, day, full"),
    (["--ppo_batch_size", "0"], "expected more than 0"),
    (["--ppo_batch_size", "10", "--return_sequences", "4"], "divisor"),
    (["--comparisons", "x.jsonl"], "belong together"),
    (["--comparisons", "x.jsonl", "--posts", "y.jsonl"], "--judge"),
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
        rlhf_minimal.main(arguments)
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert all(path.read_text() == "mine" for path in tmp_path.glob("**/*.txt"))


# ---------------------------------------------------------------------------- slow: as a user would


def run_script(*arguments):
    script = Path(rlhf_minimal.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True,
                          text=True, cwd=script.parent, timeout=900)


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


@pytest.mark.slow
@pytest.mark.parametrize("spoil, message", [
    (lambda row: row.update(choice=2), "choice"),
    (lambda row: row.pop("choice"), "choice"),
    (lambda row: row["summaries"].pop(), "summaries"),
    (lambda row: row["summaries"][0].update(text=None), "text"),
    (lambda row: row["info"].update(post=7), "post"),
])
def test_a_bad_row_ends_in_one_line_with_its_number(spoil, message, tmp_path):
    arguments = [*real_rows(tmp_path), "--judge", "longest"]
    lines = (tmp_path / "comparisons.jsonl").read_text().splitlines()
    row = json.loads(lines[4])
    spoil(row)
    lines[4] = json.dumps(row)
    (tmp_path / "comparisons.jsonl").write_text("\n".join(lines))
    done = run_script(*arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "comparisons.jsonl" in line and "row 5" in line and message in line


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lm.py", "sft.py", "reward.py", "ppo.py", "judge.py",
                                    "tldr.py"])
def test_worked_examples_print(script):
    folder = Path(rlhf_minimal.__file__).parent
    done = subprocess.run([sys.executable, folder / script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_labelers_price_of_a_word_reaches_the_labels():
    """Half of the posts have summaries of 2 and 5 words, or one of 2 against the reference."""
    @contextmanager
    def timed(name):
        yield

    def writes(model, posts, temperature, name, i):
        return [("My boss.", "My boss sold my car.")[i]] * len(posts)

    posts, run = toy.make_posts(8, 0), SimpleNamespace(seed=0, timed=timed)
    settings = SimpleNamespace(temperature=1.0, toy_length_bias=2.0)
    rows, _ = rlhf_minimal.compare_in_tiny_world(run, settings, posts, "train", writes, None)
    assert len(rows) == 8
    for row in rows:
        more_words = len(row["chosen"].split()) - len(row["rejected"].split())
        assert row["log_odds"] == pytest.approx((row["gap"] + 2.0 * more_words) / toy.NOISE)
    assert any(len(row["chosen"].split()) != len(row["rejected"].split()) for row in rows)
