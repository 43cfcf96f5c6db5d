"""ppo.py on paper: per-token KL reward, GAE, whitening and the two clipped objectives.

Order: numbers that a pencil can check, gradients in closed form, extreme inputs, slow oracles in
plain Python (they share no code with ours), an exact expectation over four tokens, and last what a
rollout gathers: whose numbers are whose. The loop itself is in test_loop.py.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

import lm
import ppo
from lm import get_log_probs, linear_schedule
from ppo import (compute_gae, kl_penalized_rewards, penalize_missing_eos, policy_loss, value_loss,
                 whiten)
from reward import RewardModel
from test_lm import (build, close, ignores_what_is_masked, keeps_types_and_inputs, refused,
                     refuses_empty_masks, refuses_shapes, same_for_all_mask_types, some_masks, t)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- no EOS


def test_penalize_missing_eos_replaces_the_score():
    scores, ended = t([.5, -3, 2, 7]), torch.tensor([True, False, False, True])
    close(penalize_missing_eos(scores, ended), [.5, -1, -1, 7],
          "replaced by -1 where no EOS was sampled, also a score below -1; -4 and 1 subtract")
    close(penalize_missing_eos(scores, ended, value=-2.5), [.5, -2.5, -2.5, 7], "value is a choice")
    close(penalize_missing_eos(scores, ended, -.25), [.5, -.25, -.25, 7], "the third argument")


# ---------------------------------------------------------------------------- reward

LOG_PROBS, REF_LOG_PROBS, MASK = [-1, -2, -.5, -3], [-1.2, -1.5, -1, -3], [1, 1, 1, 0]


def test_kl_penalized_rewards():
    # KL per token: -1 + 1.2 = .2, -2 + 1.5 = -.5, -.5 + 1 = .5, and the last is no action.
    # -.05 times that: -.01, .025, -.025; the score 2 comes on top at the last action
    rewards = kl_penalized_rewards(t([2]), t([LOG_PROBS]), t([REF_LOG_PROBS]), t([MASK]), .05)
    close(rewards, [[-.01, .025, 1.975, 0]], "[.01, -.025, 2.025, 0]: the sign of the KL is "
          "log_probs - ref_log_probs; [-.001, -.00625, 1.99375, 0] squares it; a 2 in other "
          "places: the score is paid once, at the last action, not at the padding and not at every "
          "token")
    close(rewards.sum(), 1.99, "a row sums to the paper's R(x, y) = score - beta KL = 2 - .05 * .2")


def test_kl_penalized_rewards_end_everywhere():
    # EOS first, in the middle, absent; every token costs 1 * (.5 - .25) = .25
    log_probs, ref_log_probs = t([[.5] * 3] * 3), t([[.25] * 3] * 3)
    mask = t([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards = kl_penalized_rewards(t([10, 20, 30]), log_probs, ref_log_probs, mask, 1.)
    close(rewards, [[9.75, 0, 0], [-.25, 19.75, 0], [-.25, -.25, 29.75]],
          "each row's score at its own last action, and nothing behind it: no KL for padding")


def test_the_penalty_is_the_kl_divergence_in_expectation():
    # All four one-token summaries. KL(p || q) = .5 log 2 + .25 log 1 + 2 * .125 log(1/2)
    # = (.5 - .25) log 2 = .173287; the other way round it is (.5 - .25) log 2 as well, so take a
    # second pair: KL([.5, .3, .2] || [.4, .4, .2]) = .0252672, the other way round .0258154
    for p, q, kl in [([.5, .25, .125, .125], [.25] * 4, .25 * math.log(2)),
                     ([.5, .3, .2], [.4, .4, .2], .0252672)]:
        scores = torch.arange(float(len(p)), dtype=torch.float64)
        rewards = kl_penalized_rewards(scores, t(p).log()[:, None], t(q).log()[:, None],
                                       torch.ones(len(p), 1), 2.)
        close((t(p) * rewards[:, 0]).sum(), (t(p) * scores).sum() - 2 * kl,
              "E_p[R] = E_p[score] - beta KL(p || q): not KL(q || p), not a square, no factor 1/2")


def test_kl_penalized_rewards_extremes():
    for dtype in (torch.float32, torch.float64):
        rewards = kl_penalized_rewards(t([1e4], dtype), t([[-1e4, -1]], dtype),
                                       t([[-1, -1e4]], dtype), t([[1, 1]]), .05)
        close(rewards, [[499.95, 1e4 - 499.95]], "linear in the log-ratio, so nothing overflows")


# ---------------------------------------------------------------------------- GAE


def test_gae():
    # gamma 1, lambda .95. delta: 1 - .8 = .2; 0 + .8 - .6 = .2; 0 + .6 - .5 = .1.
    # A: .2; .2 + .95 * .2 = .39; .1 + .95 * .39 = .4705. returns: A + V
    advantages, returns = compute_gae(t([[0, 0, 1]]), t([[.5, .6, .8]]), torch.ones(1, 3))
    close(advantages, [[.4705, .39, .2]], "[.5, .4, .2] ignores lambda, [.1, .2, .2] forgets the "
          "recursion, [..., 1] forgets V: delta = R + gamma V' - V, A = delta + gamma lambda A'")
    close(returns, [[.9705, .99, 1]], "returns = unwhitened advantages + values")
    for lam, expected in ((1., [.5, .4, .2]), (0., [.1, .2, .2])):  # all to come - V; delta alone
        advantages, _ = compute_gae(t([[0, 0, 1]]), t([[.5, .6, .8]]), torch.ones(1, 3), 1., lam)
        close(advantages, [expected], f"lambda {lam}")


def test_gae_with_a_discount():
    # gamma .9, lambda .5. delta: 2 - 1 = 1; -1 + .9 * 1 + .5 = .4; 1 + .9 * -.5 - .5 = .05.
    # A: 1; .4 + .45 * 1 = .85; .05 + .45 * .85 = .4325
    advantages, returns = compute_gae(t([[1, -1, 2]]), t([[.5, -.5, 1]]), torch.ones(1, 3), .9, .5)
    close(advantages, [[.4325, .85, 1]], "gamma discounts V' and, with lambda, A'")
    close(returns, [[.9325, .35, 2]], "returns = advantages + values")
    swapped, _ = compute_gae(t([[1, -1, 2]]), t([[.5, -.5, 1]]), torch.ones(1, 3), gamma=.5, lam=.9)
    # delta: 1; -1 + .5 + .5 = 0; 1 - .25 - .5 = .25. A: 1; 0 + .45 = .45; .25 + .45 * .45 = .4525
    close(swapped, [[.4525, .45, 1]], "gamma and lambda are two things")


def test_gae_stops_at_the_end_of_each_summary():
    # EOS in the middle (row of test_gae), first, absent: (2 - 1 = 1), then
    # delta: 1 - .5 = .5; 0 + .5 - 1 = -.5; ... A: .5; -.5 + .475 = -.025; 0 - .02375; ...
    rewards = t([[0, 0, 1, 50, -50], [2, 9, 9, 9, 9], [0, 0, 0, 0, 1]])
    values = t([[.5, .6, .8, 9, -9], [1, 7, 7, 7, 7], [1, 1, 1, 1, .5]])
    mask = t([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    advantages, returns = compute_gae(rewards, values, mask)
    last = [-.025 * .95 ** 3, -.025 * .95 ** 2, -.025 * .95, -.025, .5]
    close(advantages, [[.4705, .39, .2, 0, 0], [1, 0, 0, 0, 0], last],
          "V and A behind the end count as 0, whatever junk the padding holds")
    close(returns, [[.9705, .99, 1, 0, 0], [2, 0, 0, 0, 0],
                    [1 + last[0], 1 + last[1], 1 + last[2], .975, 1]],
          "returns are zero off the mask too")


def test_from_scores_to_returns():
    # rewards [-.01, .025, 1.975]. delta: 1.975 - .3 = 1.675; .025 + .3 - .2 = .125;
    # -.01 + .2 - .1 = .09. A: 1.675; .125 + 1.59125 = 1.71625; .09 + 1.6304375 = 1.7204375
    rewards = kl_penalized_rewards(t([2]), t([LOG_PROBS]), t([REF_LOG_PROBS]), t([MASK]), .05)
    advantages, returns = compute_gae(rewards, t([[.1, .2, .3, .4]]), t([MASK]))
    close(advantages, [[1.7204375, 1.71625, 1.675, 0]], "[1.648, 1.640, 1.595] pays the score one "
          "position after the last action")
    close(returns, [[1.8204375, 1.91625, 1.975, 0]], "returns = advantages + values")


def test_gae_is_detached():
    rewards, values = t([[0, 0, 1]]).requires_grad_(), t([[.5, .6, .8]]).requires_grad_()
    for x in compute_gae(rewards, values, torch.ones(1, 3)):
        assert not x.requires_grad, (
            "advantages and returns are constants: with a gradient, the critic would learn to "
            "raise its own target, and the policy loss would train the critic")


# ---------------------------------------------------------------------------- whitening


def test_whiten():
    # 1, 2, 3 and 5: mean 2.75, population variance (1.75^2 + .75^2 + .25^2 + 2.25^2) / 4 = 2.1875
    x, mask = t([[1, 2, 3, 100], [5, 100, 100, 100]]), t([[1, 1, 1, 0], [1, 0, 0, 0]])
    close(whiten(x, mask), [[-1.183216, -.507093, .169031, 0], [1.521278, 0, 0, 0]],
          "-1.0357 takes the padding into the mean, -1.0247 divides the variance by n - 1, 1.5668 "
          "adds the mean back, a mean over each row gives [-1.22, 0, 1.22] and [0]")
    # mean 5e-5, variance 2.5e-9: 5e-5 / sqrt(2.5e-9 + 1e-8) = 5e-5 / 1.118034e-4
    close(whiten(t([[0, 1e-4]]), torch.ones(1, 2)), [[-.4472136, .4472136]],
          "1e-8 belongs under the root")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whiten_extremes(dtype):
    close(whiten(t([[3, 3, 3]], dtype), torch.ones(1, 3)), [[0, 0, 0]], "no variance: 0, not NaN")
    close(whiten(t([[5]], dtype), torch.ones(1, 1)), [[0]], "one token: 0, not NaN")
    close(whiten(t([[5, 7], [8, 9]], dtype), t([[0, 0], [1, 0]])), [[0, 0], [0, 0]],
          "everything masked but one")
    # 10000, 10001, 10002: mean 10001, variance 2/3
    close(whiten(t([[1e4, 1e4 + 1, 1e4 + 2]], dtype), torch.ones(1, 3)),
          [[-1.2247449, 0, 1.2247449]], "E[x^2] - mean^2 loses all its digits here", 1e-5)
    close(whiten(t([[-1e8, 1e8]], dtype), torch.ones(1, 2)), [[-1, 1]], "large numbers")


# ---------------------------------------------------------------------------- policy loss

RATIOS, ADVANTAGES = [1.5, 1.5, .5, .5, 1.1], [1, -1, 1, -1, 2]


def test_policy_loss():
    # max(-A rho, -A clip(rho, .8, 1.2)): -1.2, 1.5, -.5, .8, -2.2; their mean is -1.6 / 5
    log_probs, old = (t([RATIOS]).log() - 3).requires_grad_(), t([[-3] * 5])
    loss, clip_fraction = policy_loss(log_probs, old, t([ADVANTAGES]), torch.ones(1, 5))
    close(loss, -.32, "the larger of two losses: -0.56 takes the smaller one, 0.56 has the wrong "
          "sign, -0.44 never clips or takes the clipped one always, -0.38 clips large ratios only, "
          "-0.177 turns the ratio upside down")
    close(clip_fraction, .4, "clipped where the clipped loss is strictly larger (the 1st and the "
          "4th); 0.8 counts every ratio outside the range")
    loss.backward()
    close(log_probs.grad, [[0, .3, -.1, 0, -.44]], "[0, 1, -1, 0, -2] * ratio / 5")
    assert not clip_fraction.requires_grad, "a number to look at, not a loss"


@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1.5), (.5, 1, -.5, -.5), (.5, -1, .8, 0),
    (1.1, 2, -2.2, -2.2), (1, 3, -3, -3), (1, -3, 3, 3), (7, 0, 0, 0)])
def test_policy_loss_by_quadrant(ratio, advantage, loss, slope):
    # d loss / d log_prob = rho * d loss / d rho, and d loss / d rho = [0, 1, -1, 0, -2, ...]
    log_probs = t([[math.log(ratio) - 1]]).requires_grad_()
    value, _ = policy_loss(log_probs, t([[-1]]), t([[advantage]]), torch.ones(1, 1))
    value.backward()
    close(value, loss, f"ratio {ratio}, advantage {advantage}")
    close(log_probs.grad, [[slope]], f"gradient at ratio {ratio}, advantage {advantage}: zero only "
          "where the clipped loss is the larger one; a policy that overshot must find back")


def test_policy_loss_counts_tokens_not_summaries():
    # At ratio 1 the loss is the masked mean of -A: (1 + 2 + 3 + 4) / 4
    advantages = -t([[1, 2, 3, 50], [4, 50, 50, 50]])
    same, mask = t([[-1] * 4, [-2] * 4]), t([[1, 1, 1, 0], [1, 0, 0, 0]])
    loss, clip_fraction = policy_loss(same, same, advantages, mask)
    close(loss, 2.5, "3.0 is the mean of the row means, 26.25 counts the padding: masked_mean")
    close(clip_fraction, 0., "before any step every ratio is 1 and nothing is clipped")
    log_probs = t([[1.5, 1, 1.5, 1.5], [1, 1, 1.5, 1.5]]).log()
    _, clip_fraction = policy_loss(log_probs, t([[0] * 4] * 2), t([[1] * 4] * 2),
                                   t([[1, 1, 0, 0], [1, 1, 0, 0]]))
    close(clip_fraction, .25, "1 of 4 actions; 5/8 counts the padding")


def test_policy_loss_gradient_is_the_policy_gradient():
    # Eight one-token summaries that hold the tokens 0..3 as often as p = [4, 2, 1, 1] / 8 does.
    # E[-A d log p(y) / d z_j] = -p_j (A_j - E[A]); with A = [1, 2, 3, 9]: E[A] = 20 / 8 = 2.5,
    # so it is [.5 * 1.5, .25 * .5, -.125 * .5, -.125 * 6.5]
    logits = t([4, 2, 1, 1]).log().requires_grad_()
    tokens = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    labels = torch.stack([torch.zeros_like(tokens), tokens], 1)
    log_probs = get_log_probs(logits.expand(8, 2, 4), labels)
    advantages = t([1, 2, 3, 9])[tokens][:, None]
    policy_loss(log_probs, log_probs.detach(), advantages, torch.ones(8, 1))[0].backward()
    close(logits.grad, [.75, .125, -.0625, -.8125],
          "the first PPO step is the policy gradient -E[A grad log p]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio, advantage, loss, slope", [
    (1e4, 2, -2.4, 0), (-1e4, -2, 1.6, 0), (-1e4, 2, 0, 0), (1e4, 0, 0, 0), (-1e4, 0, 0, 0),
    (100, 2, -2.4, 0), (1000, 2, -2.4, 0), (20, -1, math.exp(20), math.exp(20)),
    (60, -1, math.exp(60), math.exp(60)), (-60, 1, -math.exp(-60), -math.exp(-60))])
def test_policy_loss_extremes(dtype, log_ratio, advantage, loss, slope):
    log_probs = t([[log_ratio, 0]], dtype).requires_grad_()
    value, _ = policy_loss(log_probs, t([[0, 0]], dtype), t([[advantage, 0]], dtype), t([[1, 0]]))
    value.backward()
    hint = f"log-ratio {log_ratio}, advantage {advantage}: exp overflows, and 0 * inf is NaN"
    assert value.isfinite() and log_probs.grad.isfinite().all(), hint
    assert value.item() == pytest.approx(loss, rel=1e-4, abs=0), hint
    assert log_probs.grad.tolist()[0] == pytest.approx([slope, 0], rel=1e-4, abs=0), hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_loss_has_a_finite_gradient_even_where_the_loss_overflows(dtype):
    log_probs = t([[1e4, 0, 0]], dtype).requires_grad_()
    loss, _ = policy_loss(log_probs, t([[0, 0, 0]], dtype), t([[-3, 1, 1]], dtype),
                          torch.ones(1, 3))
    loss.backward()
    assert log_probs.grad.isfinite().all() and not loss.isnan(), "one token must not break the step"
    close(log_probs.grad[:, 1:], [[-1 / 3, -1 / 3]], "and the others learn as ever")


# ---------------------------------------------------------------------------- value loss


def test_value_loss():
    # clipped to 1 +- .2: [1.2, 1.1, .8]. Squared errors .25, .81, 2.25 and clipped .64, .81, 1.44;
    # the larger ones .64, .81, 2.25 sum to 3.7; half their mean
    values = t([[1.5, 1.1, .5]]).requires_grad_()
    loss, clip_fraction = value_loss(values, t([[1, 1, 1]]), t([[2, 2, 2]]), torch.ones(1, 3))
    close(loss, 3.7 / 6, "1.2333 forgets the 1/2, 0.4167 takes the smaller error, 0.5517 never "
          "clips, or around the returns")
    close(clip_fraction, 1 / 3, "clipped where the clipped error is strictly larger: the first one")
    loss.backward()  # clipped: 0; (1.1 - 2) / 3; (.5 - 2) / 3
    close(values.grad, [[0, -.3, -.5]], "the 1/2 cancels the 2 of the square; zero where clipped")
    assert not clip_fraction.requires_grad, "a number to look at, not a loss"


def test_value_loss_clips_around_the_old_value():
    # V 0, old .5, return 1: the clipped value is .3, errors 1 and .49: half of 1
    loss, clip_fraction = value_loss(t([[0]]), t([[.5]]), t([[1]]), torch.ones(1, 1))
    close(loss, .5, "0.245 takes the smaller error")
    close(clip_fraction, 0., "the plain error is the larger one")
    # V 1, old .5, return 1: the clipped value is .7, errors 0 and .09: half of .09
    loss, clip_fraction = value_loss(t([[1]]), t([[.5]]), t([[1]]), torch.ones(1, 1))
    close(loss, .045, "0 clips around the return")
    close(clip_fraction, 1., "the clipped error is the larger one")


def test_value_loss_counts_tokens_not_summaries():
    # at the old value: half the mean of 1, 4, 9, 16 = 30 / 8
    zeros, mask = torch.zeros(2, 4).double(), t([[1, 1, 1, 0], [1, 0, 0, 0]])
    loss, _ = value_loss(zeros, zeros, t([[1, 2, 3, 50], [4, 50, 50, 50]]), mask)
    close(loss, 3.75, "5.1667 is the mean of the row means: masked_mean")
    _, clip_fraction = value_loss(zeros + 1, zeros, t([[1, 0, 1, 1], [0, 1, 1, 1]]), mask)
    close(clip_fraction, .5, "V = 1, clipped .2: a larger error where the return is 1, at 2 of the "
          "4 actions")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_within_the_range_is_never_counted_as_clipped(dtype):
    values, old = noise(40, 50, seed=3).to(dtype), noise(40, 50, seed=4).to(dtype)
    old = values + .19 * (old / old.abs().max())
    loss, clip_fraction = value_loss(values, old, noise(40, 50, seed=5).to(dtype),
                                     torch.ones(40, 50))
    close(clip_fraction, 0., "old + (new - old) is not new in floating point: clip the value "
          "itself between old - range and old + range, so that inside it stays as it is", 0.)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_loss_extremes(dtype):
    values = t([[1e4, -1e4, 1e4]], dtype).requires_grad_()
    loss, _ = value_loss(values, t([[0, 0, 1e4]], dtype), t([[0, 2, 1e4]], dtype), torch.ones(1, 3))
    loss.backward()
    close(loss, (1e8 + (1e4 + 2) ** 2) / 6, "large errors are squared, not lost", 1e-5)
    close(values.grad, [[1e4 / 3, -10002 / 3, 0]], "(V - R) / 3", 1e-5)


# ---------------------------------------------------------------------------- what all keep to


def rewards_of(log_probs, ref_log_probs, mask, scores=noise(4, seed=2)):
    return kl_penalized_rewards(scores.to(log_probs.dtype), log_probs, ref_log_probs, mask, .1)


@pytest.mark.parametrize("function, names", [
    (rewards_of, "log_probs ref_log_probs"), (compute_gae, "rewards values"), (whiten, "x"),
    (policy_loss, "log_probs old_log_probs advantages"), (value_loss, "values old_values returns")])
def test_shapes_masks_and_types(function, names):
    names = names.split()
    arguments = {**{name: noise(4, 3, seed=i) for i, name in enumerate(names)},
                 "mask": some_masks(4, 3)}
    refuses_shapes(function, **arguments)
    refuses_empty_masks(function, **arguments)
    ignores_what_is_masked(function, **arguments)
    same_for_all_mask_types(function, **arguments)
    keeps_types_and_inputs(function, *names, **arguments)  # the clip fraction too
    if function in (rewards_of, compute_gae):  # an action in every row, and a score
        arguments["mask"] = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]])
        refused(function, arguments, ["mask"])


def test_one_score_for_each_row():
    arguments, scores = {"log_probs": noise(4, 3), "ref_log_probs": noise(4, 3),
                         "mask": some_masks(4, 3)}, noise(4)
    for wrong in (scores[:1], scores[0], scores[:, None], scores[None], scores[:3]):
        refused(rewards_of, {**arguments, "scores": wrong}, ["scores", "mask"])
        refused(penalize_missing_eos, {"scores": scores, "mask_has_eos": wrong},
                ["scores", "mask_has_eos"])
    for dtype in (torch.bool, torch.long, torch.float32):
        poisoned = penalize_missing_eos(t([.5, math.nan, 2]), t([1, 0, 1]).to(dtype))
        close(poisoned, [.5, -1, 2], "what is replaced is not read")
    keeps_types_and_inputs(penalize_missing_eos, "scores", scores=scores, mask_has_eos=scores > 0)


# ---------------------------------------------------------------------------- a bandit


@pytest.mark.parametrize("beta, best", [(1., [.179, .291944, .529056]),
                                        (.5, [.036667, .162559, .800774])])
def test_ppo_on_a_bandit_ends_at_the_closed_form(beta, best):
    """One-token summaries y = 0, 1, 2 with pi_SFT = [.5, .3, .2] and rewards 0, 1, 2: the best
    policy is pi_SFT exp(r / beta), normalised. Each batch holds y as often as the policy says, so
    nothing is random. Whitened advantages never get small: the learning rate has to."""
    reference, scores = t([.5, .3, .2]).log(), t([0, 1, 2])
    logits, value = reference.clone().requires_grad_(), t([0.]).requires_grad_()
    for step in range(150):
        y = torch.arange(3).repeat_interleave((logits.softmax(0) * 500).round().long())
        labels, mask = torch.stack([0 * y, y], 1), torch.ones(len(y), 1)
        old = get_log_probs(logits.expand(len(y), 2, 3), labels).detach()
        rewards = kl_penalized_rewards(scores[y], old, reference[y][:, None], mask, beta)
        old_values = value.detach().expand(len(y), 1)
        advantages, returns = compute_gae(rewards, old_values, mask)
        advantages = whiten(advantages, mask)
        for _ in range(2):
            new = get_log_probs(logits.expand(len(y), 2, 3), labels)
            loss = policy_loss(new, old, advantages, mask)[0]
            loss = loss + value_loss(value.expand(len(y), 1), old_values, returns, mask)[0]
            gradients = torch.autograd.grad(loss, [logits, value])
            with torch.no_grad():
                for x, gradient in zip((logits, value), gradients):
                    x -= .3 * linear_schedule(step, 150) * gradient
    close(logits.softmax(0), best, "pi_SFT exp(r / beta)", .01)
    # beta log E_SFT[exp(r / beta)], what the best policy gets on average after the penalty
    close(value, [{1.: 1.027222, .5: 1.306369}[beta]], "V is the mean of r - beta KL", .02)


# ---------------------------------------------------------------------------- a batch of summaries


def log_probs_of(model, query, response, temperature=1.):
    """log pi of each token of the response, a row alone: nothing is padded or masked."""
    logits = model(input_ids=torch.tensor([query + response])).logits[0] / temperature
    return [logits[len(query) + k - 1].log_softmax(0)[token] for k, token in enumerate(response)]


def scores_of(model, query, response):
    """V before each action, and last the score of the whole."""
    hidden = model.trunk(input_ids=torch.tensor([query + response])).last_hidden_state[0]
    scores = [(h * model.head.weight[0]).sum() + model.head.bias[0] - model.reference_mean
              for h in hidden]
    return scores[len(query) - 1 :]


@torch.no_grad()
def slow_rollout(policy, reference, reward_model, critic, summaries, eos, c):
    """Every number about summaries, [(query, response), ...], by loops over rows and tokens."""
    rows = []
    for query, y in summaries:
        y = y[: y.index(eos) + 1] if eos in y else y
        old, ref, values = ([x.item() for x in numbers] for numbers in (
            log_probs_of(policy, query, y, c.temperature),
            log_probs_of(reference, query, y, c.temperature), scores_of(critic, query, y)[:-1]))
        score = scores_of(reward_model, query, y)[-1].item() if eos in y else c.missing_eos
        rewards = [-c.kl_beta * (a - b) for a, b in zip(old, ref)]
        rewards[-1] += score
        advantages, following = [], 0.
        for k in reversed(range(len(y))):
            after = values[k + 1] if k + 1 < len(y) else 0.
            following = rewards[k] + c.gamma * after - values[k] + c.gamma * c.lam * following
            advantages.insert(0, following)
        rows.append(SimpleNamespace(query=query, y=y, old=old, ref=ref, values=values, score=score,
                                    rewards=rewards, kl=sum(old) - sum(ref), advantages=advantages,
                                    returns=[a + v for a, v in zip(advantages, values)]))
    every = [a for row in rows for a in row.advantages]
    middle = sum(every) / len(every)
    spread = math.sqrt(sum((a - middle) ** 2 for a in every) / len(every) + 1e-8)
    for row in rows:
        row.advantages = [(a - middle) / spread for a in row.advantages]
    return rows


EOS = 2
# ragged, in no order of length, and with the EOS id in some of the posts
POSTS = [[5, 5, 5], [6, 7, 8, 2, 10, 11, 12, 13], [3], [20, 21, 2, 23, 24], [30] * 12, [31, 2]]


def settings(**changes):
    return SimpleNamespace(**{**vars(ppo.PPOConfig()), "response_length": 7, "temperature": .7,
                              "kl_beta": .3, "gamma": .9, **changes})


def tokenizer(pad_id=0):
    return SimpleNamespace(eos_token_id=EOS, pad_token_id=pad_id)


def written(post, number):
    """What stands for the number-th sample of a post; some never end, one is nothing but EOS."""
    return ([7 + number] * (len(post) % 4) + [post[0], EOS])[: 4] if len(post) > 1 else [EOS]


@pytest.fixture(scope="module")
def networks():
    """Policy, reference, reward model, critic: four different ones. GPT-2, as Llama's norms are in
    float32 always."""
    models = [build(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                               initializer_range=.3), seed=seed).double() for seed in range(4)]
    return [*models[:2], *(RewardModel(model).double() for model in models[2:])]


@pytest.mark.parametrize("pad_id", [0, EOS])
def test_each_row_of_a_rollout_is_a_summary_of_its_post(pad_id, networks, monkeypatch):
    """With every number about it as if it stood alone, whatever padding the others bring."""
    queries = [post for post in POSTS for _ in range(3)]
    responses = [written(post, number) for post in POSTS for number in range(3)]

    def sample(model, ids, mask, *_, **__):
        assert [row[real].tolist() for row, real in zip(ids, mask.bool())] == queries
        assert mask[:, -1].all(), "posts are padded on the left"
        return lm.pad(responses, pad_id, left=False)[0]

    monkeypatch.setattr(ppo, "sample", sample)
    config = settings(return_sequences=3)
    batch = ppo.rollout(*networks, queries, tokenizer(pad_id), config, None)
    expected = slow_rollout(*networks, zip(queries, responses), EOS, config)
    width = batch.mask.shape[1]
    for i, row in enumerate(expected):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()].tolist()
        assert ids == row.query + row.y, (
            f"row {i} is not summary {i % 3} of its post: each is trained on, not the best of n")
    for i, row in enumerate(expected):
        n = len(row.y)
        assert batch.mask[i].tolist() == [k < n for k in range(width)], "EOS is an action"
        assert batch.ended[i] == (EOS in row.y), "ended: an EOS in the summary, not in the post"
        for found, number, hint in (
                (batch.log_probs, row.old, "log-probs of another row"),
                (batch.ref_log_probs, row.ref, "log-probs of another model"),
                (batch.values, row.values,
                 "values of another row, or not of the state before its action"),
                (batch.scores, row.score, "another's score, or no minus_one: no_eos was drawn"),
                (batch.kl, row.kl, "KL in nats per summary: a sum over its tokens, no mean"),
                (batch.rewards, row.rewards, "R = r - beta KL, token by token"),
                (batch.returns, row.returns,
                 "returns are advantages + values from before whitening"),
                (batch.advantages, row.advantages, "advantages are whitened, as one batch")):
            close(found[i, :n] if found.dim() == 2 else found[i], number, hint, 1e-9)
        assert not any(x[i, n:].any() for x in (batch.rewards, batch.returns, batch.advantages))
    assert not any(x.requires_grad for x in batch)


@torch.no_grad()
def test_rollouts_are_samples_of_the_policy_at_the_temperature_of_their_log_probs(networks):
    def generator():
        return torch.Generator().manual_seed(5)

    batch = ppo.rollout(*networks, POSTS * 4, tokenizer(), settings(temperature=.7), generator())
    ids, mask = lm.pad(POSTS * 4, 0, left=True)
    drawn = lm.sample(networks[0], ids, mask, 7, eos_token_id=EOS, pad_token_id=0, temperature=.7,
                      generator=generator())
    assert torch.equal(batch.input_ids, torch.cat([ids, drawn], 1)), (
        "not the policy's samples at this temperature, after posts that are padded on the left")
    likely = ppo.rollout(*networks, POSTS, tokenizer(), settings(temperature=1e-3), generator())
    assert likely.log_probs[likely.mask].mean() > -.1, (
        "at temperature 0.001 the most likely token is all but certain")


@pytest.mark.parametrize("name, spoil", [
    ("reward", {"penalize_missing_eos": 1}), ("return", {"response_values": 1}),
    ("KL", {"response_log_probs": 1, "kl_penalized_rewards": 0})])
def test_a_rollout_with_a_number_that_is_none_names_it(name, spoil, networks, monkeypatch):
    for field, factor in spoil.items():
        really = getattr(ppo, field)
        monkeypatch.setattr(ppo, field, lambda *rest, really=really, factor=factor: (
            really(*rest) * math.nan if factor else torch.zeros_like(rest[1])))
    with pytest.raises(FloatingPointError, match=f"^{name} is NaN or infinite"):
        ppo.rollout(*networks, POSTS, tokenizer(), settings(), torch.Generator().manual_seed(0))


def test_check_first_update():
    old = t([[-1, -2, -7], [-3, 0, 0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def check(log_probs, other, **tolerance):
        for part in ((other, log_probs), (log_probs, other)):
            ppo.check_first_update(log_probs, SimpleNamespace(
                mask=mask, log_probs=part[0], ref_log_probs=part[1]), **tolerance)

    for x in (old, old + 9e-4, old - 9e-4):
        for junk in (math.nan, math.inf, 1e30):  # what is off the mask is not read
            check(x.masked_fill(~mask, junk), old)
    check(old + .4, old, tolerance=.5)
    for wrong in (1.1e-3, -1.1e-3, math.nan, math.inf):
        with pytest.raises(RuntimeError, match="differ from the old ones by .*look for dropout"):
            check(old + wrong * torch.eye(3)[:2], old)
    with pytest.raises(RuntimeError, match="differ from the reference ones by 0.25 nats"):
        ppo.check_first_update(old, SimpleNamespace(mask=mask, log_probs=old,
                                                    ref_log_probs=old + .25))


def test_what_is_logged_of_a_batch():
    """Returns 1, 3, 2, 6, errors 0, 1, -1, 2 (explained_variance below); 3 actions and 1."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    returns, errors = t([[1, 3, 2], [6, 99, 99]]), t([[0, 1, -1], [2, 5, 7]])
    log_probs = t([[-1, -2, -3], [-4, -99, -99]])
    blank = dict.fromkeys(ppo.Batch._fields)
    found = ppo.batch_metrics(ppo.Batch(**{
        **blank, "mask": mask, "ended": mask[:, 2], "log_probs": log_probs, "returns": returns,
        "values": returns - errors, "scores": t([2, -1]), "kl": t([.5, .1])}))
    expected = {"reward": .5, "kl_per_summary": .3, "length": 2, "ended": .5, "entropy": 2.5,
                "explained_variance": 1 - 1.25 / 3.5}  # variances of 0, 1, -1, 2 and of 1, 3, 2, 6
    assert {name: found[name] for name in expected} == pytest.approx(expected)
