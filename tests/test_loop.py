"""The training loops: what they change, what they must not, and each step against a slow oracle.

First what can be said in one sentence of each loop, so that a test that fails names the trouble;
then the whole of each, written anew with for-loops over rows and tokens.
"""

import copy
import math
from statistics import fmean as mean
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

import lm
import ppo
import reward
import rlhf_minimal
import sft
import toy
from lm import generator_for
from test_lm import build
from test_ppo import log_probs_of, scores_of, slow_rollout

TOKENIZER = SimpleNamespace(eos_token_id=9, pad_token_id=0)
QUERIES = [[3, 4, 5], [6, 7], [5], [8, 3, 3, 4]] * 2
RESPONSES = [[7, 2, 9], [9], [1, 2, 3, 4, 9], [5, 5]] * 2  # the last was cut, and has no EOS
PAIRS = [(query, chosen, rejected) for query, chosen, rejected in
         zip(QUERIES, RESPONSES, [[9], [7, 1, 9], [2, 9], [1, 1, 1, 9]] * 2)]


class Vocabulary(SimpleNamespace):
    def __len__(self):
        return 12


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toy.make_model(Vocabulary(eos_token_id=9, pad_token_id=0), 16, 2, 2)


def config(**changes):
    return SimpleNamespace(**{
        **vars(sft.SFTConfig()), **vars(reward.RewardConfig()), **vars(ppo.PPOConfig()),
        "sft_lr": 1e-2, "sft_batch_size": 4, "reward_lr": 1e-2, "reward_batch_size": 4,
        "ppo_episodes": 16, "ppo_batch_size": 8, "response_length": 6, "ppo_lr": 1e-2, **changes})


class Log(list):
    """Lines as a run has them in metrics.jsonl."""

    def __call__(self, stage, step, **metrics):
        self.append({"stage": stage, "step": step, **metrics})


def train(stage, model, log, *, seed=0, reward_model=None, **changes):
    """Run one loop on the queries and responses above; returns what it trains: one or two."""
    if stage == "sft":
        sft.train_sft(model, QUERIES, RESPONSES, 0, config(**changes), seed, log)
        return (model,)
    reward_model = reward_model or reward.RewardModel(model).to(model.dtype)
    if stage == "reward":
        reward.train_reward(reward_model, PAIRS, 0, config(**changes), seed, log)
        return (reward_model,)
    return model, ppo.train_ppo(model, reward_model, QUERIES, TOKENIZER, config(**changes), seed,
                                log)


def weights(*modules):
    return torch.cat([x.flatten().clone() for module in modules
                      for x in (*module.parameters(), *module.buffers())])


# ---------------------------------------------------------------------------- PPO, sentence by one


def test_critic_starts_as_the_whole_reward_model(model):
    reward_model = reward.RewardModel(model)
    reward_model.reference_mean.fill_(0.7)
    reward_model.head.bias.data.fill_(0.3)
    _, critic = train("ppo", model, Log(), reward_model=reward_model, ppo_lr=0.0)
    assert torch.equal(weights(critic), weights(reward_model)), "head and reference_mean too"


def test_ppo_trains_policy_and_critic_and_nothing_else(model):
    reward_model = reward.RewardModel(model)
    before, of_rewards = weights(model), weights(reward_model)
    policy, critic = train("ppo", model, Log(), reward_model=reward_model)
    assert not torch.equal(before, weights(policy)), (
        "the policy never changed: is its optimiser on its own weights?")
    assert not torch.equal(of_rewards, weights(critic)), "the critic never changed"
    assert torch.equal(of_rewards, weights(reward_model)), "training changed the reward model"
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (model, reward_model, critic)]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2] or pointers[1] & pointers[2])


def test_the_ratio_starts_at_1_in_each_update_and_then_the_policy_moves(model, monkeypatch):
    gaps, log, loss_of = [], Log(), ppo.policy_loss

    def policy_loss(log_probs, old_log_probs, advantages, mask, *rest):
        gaps.append((log_probs - old_log_probs)[mask].abs().max().item())
        return loss_of(log_probs, old_log_probs, advantages, mask, *rest)

    monkeypatch.setattr(ppo, "policy_loss", policy_loss)
    train("ppo", model, log, ppo_epochs=2)
    assert max(gaps[0], gaps[2]) < 1e-4, "the ratio starts at 1"
    assert min(gaps[1], gaps[3]) > 1e-3, (
        "and then the policy moves away from pi_old: the old log-probs stay, and so the ratio can "
        "leave 1")
    first, last = log
    assert abs(first["kl_per_summary"]) < 1e-4 and abs(last["kl_per_summary"]) > 1e-3, (
        "KL 0 to the SFT model, and not 0 after an update: is the reference the policy itself?")
    assert first["kl_to_old_policy"] > 1e-3 and first["policy_clip_fraction"] > 0


def test_learning_rate_of_update_u_is_linear(model):
    log = Log()
    train("ppo", model, log, ppo_episodes=32, ppo_lr=1.5e-5, ppo_epochs=1)
    assert [row["lr"] for row in log] == pytest.approx([1.5e-5, 1.125e-5, 7.5e-6, 3.75e-6]), (
        "linear_schedule: U = 4")


def test_ppo_raises_the_probability_of_what_is_rewarded(model):
    class Sevens(reward.RewardModel):
        def score(self, input_ids, attention_mask):
            return (input_ids[:, -6:] == 7).sum(1).float()

    log = Log()
    ppo.train_ppo(model, Sevens(model), [[3, 4], [5]], TOKENIZER, config(
        ppo_episodes=480, ppo_batch_size=32, ppo_lr=5e-3, kl_beta=0.01), 0, log)
    rewards = [row["reward"] for row in log]
    assert mean(rewards[-4:]) > mean(rewards[:4]) + 1, rewards


def test_the_win_rate_is_taken_after_each_update_with_the_critic_that_was_given(model):
    counts, reward_model, given = [], reward.RewardModel(model), reward.RewardModel(model)
    assert given is ppo.train_ppo(
        model, reward_model, QUERIES, TOKENIZER, config(ppo_epochs=1, ppo_episodes=24), 0, Log(),
        evaluate=counts.append, critic=given)
    assert counts == [1, 2, 3]


# ---------------------------------------------------------------------------- the optimisers

# the loop, its networks' names; Adam's betas and epsilon, the bound on the norm of the gradient
STAGES = {"sft": (sft, (0.9, 0.95), 1e-8, 1.0), "reward": (reward, (0.9, 0.999), 1e-8, math.inf),
          "ppo": (ppo, (0.9, 0.999), 1e-5, 0.02)}


@pytest.mark.parametrize("stage", STAGES)
def test_each_step_has_its_own_gradient_clipped_at_its_norm(stage, model, monkeypatch):
    """At rate 0 and with all rows in one batch, every step of a network has the same gradient."""
    module, betas, eps, bound = STAGES[stage]
    for p in model.parameters():
        p.data.mul_(2)  # for gradients above 1
    found = {}

    class Watched(torch.optim.Adam):
        def step(self):
            (group,) = self.param_groups
            found.setdefault((group["betas"], group["eps"], len(group["params"])), []).append(
                torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None]))

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    shape = {f"{stage}_epochs": 3, "sft_batch_size": 99, "reward_batch_size": 99,
             "ppo_episodes": 8, "max_grad_norm": bound}  # more than there are is all
    torch.manual_seed(1)  # for the head
    train(stage, copy.deepcopy(model), Log(), **shape)
    clipped, found = found, {}
    with monkeypatch.context() as patch:
        patch.setattr(module, "clip_grad_norm_", lambda *_, **__: None)
        torch.manual_seed(1)
        train(stage, copy.deepcopy(model), Log(), **shape)
    assert {key[:2] for key in found} == {(betas, eps)}, "Adam's numbers are others"
    assert len(found) == (2 if stage == "ppo" else 1)
    for key, steps in found.items():
        norm = steps[0].norm().item()
        assert len(steps) == 3 and norm > min(bound, 1)
        for plain, bounded in zip(steps, clipped[key], strict=True):
            assert torch.allclose(plain, steps[0], atol=norm * 1e-4), "old gradients are in it"
            assert torch.allclose(bounded, plain * min(1, bound / norm), atol=norm * 1e-4), (
                f"the gradient norm is not what clips it: {bounded.norm()}, {bound} at most")


# ---------------------------------------------------------------------------- SFT and reward model


def test_sft_loss_is_the_mean_over_response_tokens(model):
    log = Log()
    ids, mask, width = lm.join(QUERIES[:2], [[7, 2, 9], [9]], 0)
    logits = model(input_ids=ids, attention_mask=mask,
                   position_ids=lm.get_position_ids(mask)).logits.double().log_softmax(-1)
    by_hand = [logits[0, width - 1 + t, y].item() for t, y in enumerate((7, 2, 9))]
    by_hand.append(logits[1, width - 1, 9].item())  # four tokens in all, EOS counted
    sft.train_sft(model, QUERIES[:2], [[7, 2, 9], [9]], 0, config(sft_lr=0.0), 0, log)
    assert [line["loss"] for line in log] == pytest.approx([-sum(by_hand) / 4], abs=1e-4)


def test_reward_model_learns_and_is_normalised(model, tmp_path):
    torch.manual_seed(2)
    (reward_model,) = train("reward", model, log := Log(), reward_epochs=8)
    assert len(log) == 16 and log[-1]["accuracy"] == 1.0
    better, worse = (reward.score_summaries(reward_model, QUERIES, [pair[i] for pair in PAIRS], 0)
                     for i in (1, 2))
    assert (better > worse).all(), "the preferred summary must score higher"
    spread = reward.score_summaries(reward_model, QUERIES, RESPONSES, 0).std()
    for time in ("first", "second"):
        reward.normalize(reward_model, QUERIES, RESPONSES, 0)
        scores = reward.score_summaries(reward_model, QUERIES, RESPONSES, 0)
        assert abs(scores.mean()) < 1e-5, f"references have mean 0 after the {time} time"
        assert scores.std() == pytest.approx(spread), "their spread stays"
    reward_model.save_pretrained(tmp_path)
    again = reward.RewardModel.from_pretrained(tmp_path)
    assert torch.equal(scores, reward.score_summaries(again, QUERIES, RESPONSES, 0)), "saved too"


# ---------------------------------------------------------------------------- slow oracles


@pytest.fixture
def exact():
    """A policy of 12 tokens and its reward model; GPT-2, as Llama's norms are in float32 always."""
    model = build(GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=32,
                             initializer_range=0.2)).double()
    torch.manual_seed(3)
    reward_model = reward.RewardModel(model).double()
    reward_model.reference_mean.fill_(0.1)
    return model, reward_model


class SlowAdam:
    """Kingma & Ba 2015, algorithm 1, after the gradient was clipped to a norm."""

    def __init__(self, module, betas, eps, bound):
        self.weights, self.betas, self.eps, self.bound = [*module.parameters()], betas, eps, bound
        self.m, self.v = ([torch.zeros_like(p) for p in self.weights] for _ in range(2))
        self.t = 0

    def step(self, loss, lr):
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients if g is not None))
        self.t, (b1, b2) = self.t + 1, self.betas
        for i, (p, g) in enumerate(zip(self.weights, gradients)):
            if g is not None:
                g = g * min(1, self.bound / (norm + 1e-6))
                self.m[i] = b1 * self.m[i] + (1 - b1) * g
                self.v[i] = b2 * self.v[i] + (1 - b2) * g ** 2
                m, v = self.m[i] / (1 - b1 ** self.t), self.v[i] / (1 - b2 ** self.t)
                p.data -= lr * m / (v.sqrt() + self.eps)


def cosine(step, total):
    return (1 + math.cos(math.pi * step / total)) / 2


def close_weights(trained, expected):
    for name, x in trained.named_parameters():
        y = expected.get_parameter(name)
        assert torch.allclose(x, y, rtol=1e-8, atol=1e-9), (
            f"{name} is {(x - y).abs().max():.1e} from what the oracle has")


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_sft_and_reward_model_against_an_oracle(stage, exact):
    ours = exact[stage == "reward"]
    slow = copy.deepcopy(ours)
    adam = SlowAdam(slow, *STAGES[stage][1:])
    shape = {"sft_batch_size": 3, "reward_batch_size": 3, f"{stage}_epochs": 2}
    log, losses, hits = Log(), [], []
    train(stage, ours, log, seed=5, reward_model=ours, **shape)
    for step in range(4):
        order = torch.randperm(8, generator=generator_for(5, stage, step // 2)).tolist()
        rows = order[step % 2 * 3 :][:3]
        if stage == "sft":
            found = [x for row in rows for x in log_probs_of(slow, QUERIES[row], RESPONSES[row])]
            loss = -sum(found) / len(found)
        else:
            gaps = [scores_of(slow, query, chosen)[-1] - scores_of(slow, query, rejected)[-1]
                    for query, chosen, rejected in (PAIRS[row] for row in rows)]
            loss = sum(torch.log(1 + torch.exp(-gap)) for gap in gaps) / 3
            hits.append(sum(gap.item() > 0 for gap in gaps) / 3)
        losses.append(loss.item())
        adam.step(loss, 1e-2 * cosine(step, 4))
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-8)
    assert [line["accuracy"] for line in log if "accuracy" in line] == pytest.approx(hits)
    close_weights(ours, slow)


def slow_ppo(policy, reward_model, responses, seed, c):
    """Section 3.4 and App. B.1 as this page of loops: no tensor has a batch. responses: those that
    were sampled, for each update. Returns policy, critic and the losses of each update."""
    reference, critic, lines = copy.deepcopy(policy), copy.deepcopy(reward_model), []
    policy_adam, critic_adam = (SlowAdam(model, (0.9, 0.999), 1e-5, c.max_grad_norm)
                                for model in (policy, critic))
    n_updates, place = c.ppo_episodes // c.ppo_batch_size, 0
    for update in range(n_updates):
        queries = [QUERIES[(place + i) // c.return_sequences % len(QUERIES)]
                   for i in range(c.ppo_batch_size)]
        rows = slow_rollout(policy, reference, reward_model, critic,
                            zip(queries, responses[update]), 9, c)
        place += len(rows)
        lr, steps = c.ppo_lr * (1 - update / n_updates), []
        for epoch in range(c.ppo_epochs):
            shuffled = torch.randperm(len(rows), generator=generator_for(
                seed, "ppo epoch", update, epoch)).tolist()
            size = math.ceil(len(rows) / c.ppo_minibatches)
            for start in range(0, len(rows), size):
                part = [rows[i] for i in shuffled[start : start + size]]
                policy_losses, value_losses = [], []
                for row in part:
                    news = log_probs_of(policy, row.query, row.y, c.temperature)
                    for new, old, a in zip(news, row.old, row.advantages):
                        ratio = torch.exp(new - old)
                        held = min(max(ratio.item(), 1 - c.clip_range), 1 + c.clip_range)
                        policy_losses.append(-a * ratio if -a * ratio >= -a * held
                                             else 0 * ratio - a * held)
                    for v, old, r in zip(scores_of(critic, row.query, row.y), row.values,
                                         row.returns):
                        low, high = old - c.clip_range_value, old + c.clip_range_value
                        held = min(max(v.item(), low), high)
                        value_losses.append((v - r) ** 2 / 2 if (v - r) ** 2 >= (held - r) ** 2
                                            else 0 * v + (held - r) ** 2 / 2)
                loss_p = sum(policy_losses) / len(policy_losses)
                loss_v = sum(value_losses) / len(value_losses)
                policy_adam.step(loss_p, lr)
                critic_adam.step(c.value_weight * loss_v, lr)
                steps.append((loss_p.item(), loss_v.item()))
        lines.append([mean(row.score for row in rows), *map(mean, zip(*steps))])
    return policy, critic, lines


@pytest.mark.parametrize("changes", [
    {"ppo_minibatches": 3, "return_sequences": 2, "temperature": 0.7, "gamma": 0.9},
    {"ppo_minibatches": 2, "return_sequences": 4, "max_grad_norm": 0.05, "lam": 0.5,
     "missing_eos": -3.0}])
def test_ppo_against_an_oracle(changes, exact, monkeypatch):
    """Three updates of two passes, with a large rate: the clips hold back, and beta counts."""
    drawn, sample, log = [], ppo.sample, Log()

    def watched(*arguments, **named):
        assert named["generator"].initial_seed() == generator_for(
            5, "ppo", len(drawn)).initial_seed(), "each update draws from a stream of its own"
        drawn.append(sample(*arguments, **named))
        return drawn[-1]

    monkeypatch.setattr(ppo, "sample", watched)
    changes = {"ppo_batch_size": 8, "ppo_episodes": 24, "ppo_epochs": 2, "ppo_lr": 5e-3,
               "kl_beta": 0.4, "clip_range": 0.1, "clip_range_value": 0.15, "value_weight": 0.3,
               "response_length": 5, **changes}
    slow = copy.deepcopy(exact[0])
    policy, critic = train("ppo", exact[0], log, seed=5, reward_model=exact[1], **changes)
    slow_policy, slow_critic, lines = slow_ppo(
        slow, exact[1], [ids.tolist() for ids in drawn], 5, config(**changes))
    ends = {9 in row for ids in drawn for row in ids.tolist()}
    assert ends == {True, False} and all(line["policy_clip_fraction"] > 0 < line[
        "value_clip_fraction"] for line in log), "a case that would not notice much"
    for line, expected in zip(log, lines, strict=True):
        assert [line["reward"], line["policy_loss"], line["value_loss"]] == pytest.approx(
            expected, rel=1e-7, abs=1e-9)
    close_weights(policy, slow_policy)
    close_weights(critic, slow_critic)


# ---------------------------------------------------------------------------- the tiny world


def test_the_labelers_price_of_a_word_reaches_the_labels():
    """Half of the posts have summaries of 2 and 5 words, or one of 2 against the reference."""
    def writes(posts, temperature, name, i):
        return [("My boss.", "My boss sold my car.")[i]] * len(posts)

    posts = toy.make_posts(8, 0)
    settings = SimpleNamespace(temperature=1.0, toy_length_bias=2.0, seed=0)
    rows, _ = rlhf_minimal.compare(settings, posts, "train", writes)
    assert len(rows) == 8
    for row in rows:
        more_words = len(row["chosen"].split()) - len(row["rejected"].split())
        assert row["log_odds"] == pytest.approx((row["gap"] + 2.0 * more_words) / toy.NOISE)
    assert any(len(row["chosen"].split()) != len(row["rejected"].split()) for row in rows)
