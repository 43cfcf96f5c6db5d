"""What came after: RLOO's advantage and DPO's loss with a pencil, both loops against an oracle."""

import copy
import math

import pytest
import torch

import ppo
from lm import generator_for
from test_loop import (PAIRS, QUERIES, TOKENIZER, Log, SlowAdam, close_weights, config, cosine,
                       exact)  # noqa: F401 (a fixture)
from test_ppo import log_probs_of, slow_rollout
from variants import dpo, rloo


def test_rloo_advantages_by_hand():
    """Post one: 1, 2, 6 against the means 4, 3.5, 1.5 of the others; post two: 0, 3, -3."""
    rewards = torch.tensor([1.0, 2, 6, 0, 3, -3])
    assert rloo.rloo_advantages(rewards, 3).tolist() == [-3, -1.5, 4.5, 0, 4.5, -4.5]
    assert rloo.rloo_advantages(rewards, 2).tolist() == [-1, 1, 6, -6, 6, -6]
    rewards, post = torch.randn(4, 3), torch.randn(4, 1)
    assert torch.allclose(rloo.rloo_advantages(rewards.flatten(), 3),
                          rloo.rloo_advantages((rewards + post).flatten(), 3), atol=1e-6), (
        "a constant for each post changes no advantage")
    for wrong, k in ((torch.ones(4), 1), (torch.ones(5), 2), (torch.ones(2, 2), 2)):
        with pytest.raises(ValueError, match="k >= 2 rewards of each post"):
            rloo.rloo_advantages(wrong, k)


def test_dpo_loss_by_hand():
    """Log-ratios 1 and -1, then 1.5 and 2: differences 2 and -.5, times beta = .1 and .5."""
    four = torch.tensor([[-4.0, -2.5], [-6.0, -2], [-5.0, -4], [-5.0, -4]], requires_grad=True)
    for beta in (0.1, 0.5):
        by_hand = [math.log(1 + math.exp(-beta * x)) for x in (2, -0.5)]
        assert dpo.dpo_loss(*four, beta).item() == pytest.approx(sum(by_hand) / 2)
    # beta sigmoid(-beta d) / B down on the chosen, up on the rejected
    (gradient,) = torch.autograd.grad(dpo.dpo_loss(*four, 0.5), four)
    p = torch.tensor([0.5 / (1 + math.exp(1)) / 2, 0.5 / (1 + math.exp(-0.25)) / 2])
    assert torch.allclose(gradient[:2], torch.stack([-p, p]), atol=1e-6)
    with pytest.raises(ValueError, match="shapes must be equal"):
        dpo.dpo_loss(four[0], four[1][:1], four[2], four[3])


def test_rloo_against_an_oracle(exact, monkeypatch):  # noqa: F811
    policy, reward_model = exact
    slow, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    drawn, sample, log = [], ppo.sample, Log()

    def watched(*arguments, **named):
        drawn.append(sample(*arguments, **named))
        return drawn[-1]

    monkeypatch.setattr(ppo, "sample", watched)
    c = config(ppo_batch_size=6, ppo_episodes=18, return_sequences=3, temperature=0.7, kl_beta=0.4,
               max_grad_norm=0.5)
    rloo.train_rloo(policy, reward_model, QUERIES, TOKENIZER, c, 3, log)
    adam = SlowAdam(slow, (0.9, 0.999), 1e-5, c.max_grad_norm)
    for update, ids in enumerate(drawn):
        posts = [QUERIES[update * 2 + i // 3] for i in range(6)]
        rows = slow_rollout(slow, reference, reward_model, reward_model,
                            zip(posts, ids.tolist()), 9, c)
        rewards, loss = [sum(row.rewards) for row in rows], 0
        for i, row in enumerate(rows):
            others = [rewards[j] for j in range(6) if j // 3 == i // 3 and j != i]
            log_prob = sum(log_probs_of(slow, row.query, row.y, 0.7))
            loss = loss - (rewards[i] - sum(others) / 2) * log_prob
        adam.step(loss / sum(len(row.y) for row in rows), 1e-2 * (1 - update / 3))
        assert log[update]["reward"] == pytest.approx(sum(row.score for row in rows) / 6, rel=1e-7)
    assert len(log) == 3
    close_weights(policy, slow)


def test_dpo_against_an_oracle(exact):  # noqa: F811
    policy = exact[0]
    slow, reference, log = copy.deepcopy(policy), copy.deepcopy(policy), Log()
    dpo.train_dpo(policy, PAIRS, 0, 1e-2, 3, 4, log, beta=0.5)
    adam = SlowAdam(slow, (0.9, 0.999), 1e-8, 1.0)
    order = torch.randperm(8, generator=generator_for(4, "dpo", 0)).tolist()
    for step in range(2):  # two pairs are left over
        loss = 0
        for query, *sides in (PAIRS[row] for row in order[step * 3 :][:3]):
            better, worse = (sum(log_probs_of(slow, query, y))
                             - sum(log_probs_of(reference, query, y)) for y in sides)
            loss = loss + torch.log(1 + torch.exp(-0.5 * (better - worse))) / 3
        adam.step(loss, 1e-2 * cosine(step, 2))
        assert log[step]["loss"] == pytest.approx(loss.item(), rel=1e-8)
    assert len(log) == 2
    close_weights(policy, slow)
