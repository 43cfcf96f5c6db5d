"""One group of tests for each exercise: `pytest -k exercise_07`. Every number is done by hand.

A result that comes from a likely mistake is told as that mistake. The project's own tests ask for
more: shapes that are refused, NaN behind the mask, gradients.
"""

import math

import pytest
import torch

import judge
import lm
import ppo
import reward


def check(result, expected, mistakes=(), otherwise=""):
    """result is expected, or else one of the mistakes [(wrong result, why)], or else unknown."""
    result = torch.as_tensor(result).detach().double()

    def is_like(numbers):
        numbers = torch.tensor(numbers).double()
        return result.shape == numbers.shape and torch.allclose(
            result, numbers, atol=2e-4, rtol=0, equal_nan=True)

    if not is_like(expected):
        for wrong, why in mistakes:
            if is_like(wrong):
                pytest.fail(why, pytrace=False)
        pytest.fail(f"{otherwise}\nshape {tuple(result.shape)}: {result.tolist()}\nexpected "
                    f"{expected}", pytrace=False)


def t(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---------------------------------------------------------------------------- 1 log-probs

LOGITS = t([[[2, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 1]]])
LABELS = torch.tensor([[0, 1, 2, 1]])
# log(e^2 + 2) = 2.239545; log(e + 2) = 1.551445; log(e^3 + 2) = 3.094923
LOG_PROBS = [-2.239545, -1.551445, -3.094923]


def test_exercise_01_shift():
    check(lm.get_log_probs(LOGITS, LABELS), [LOG_PROBS], [
        ([[-.239545, -.551445, -.094923, -1.098612]],
         "logits at p were read at label p: they predict token p + 1"),
        ([[-.551445, -.094923, -1.098612]],
         "logits at p were read at label p: they predict token p + 1, so drop the *last* logits "
         "and the *first* label"),
        ([[-x for x in LOG_PROBS]], "a log-probability is negative: the sign"),
        ([[2, 1, 3]], "the logits themselves: log_softmax is missing"),
        ([[0, 0, 0]], "the logits themselves: log_softmax is missing"),
    ], "log_softmax of the logits at p, read at token p + 1")


def test_exercise_01_temperature():
    check(lm.get_log_probs(LOGITS, LABELS, .7), [[-2.965876, -1.820142, -4.312870]], [
        ([LOG_PROBS], "the temperature is not used"),
        ([[-1.800917, -1.389727, -2.319066]], "the logits were multiplied by the temperature"),
        ([[-3.199350, -2.216350, -4.421319]], "the log-probs were divided by the temperature: "
         "divide the logits, or the probabilities no longer sum to 1"),
    ], "log_softmax(logits / temperature)")


def test_exercise_01_precision():
    check(lm.get_log_probs(t([[[1e4, 0], [0, 0]]]), torch.tensor([[0, 1]])), [[-1e4]], [
        ([[-math.inf]], "log(softmax(x)) is -inf for an unlikely token: use log_softmax"),
    ], "an unlikely token")
    half = torch.tensor([[[20, 19.5, 3], [0, 0, 0]]], dtype=torch.bfloat16)
    check(lm.get_log_probs(half, torch.tensor([[0, 1]])), [[-.974077]], otherwise=
          "log_softmax in bfloat16 is off in the third digit: go to float32 first")


# ---------------------------------------------------------------------------- 2 response mask


def test_exercise_02_mask():
    responses = torch.tensor([[5, 9, 0, 0], [9, 0, 0, 0], [5, 6, 7, 8], [5, 9, 7, 9], [0, 5, 9, 9]])
    mask = lm.get_response_mask(responses, 9)
    assert mask.dtype == torch.bool, f"a mask of {mask.dtype}: expected torch.bool"
    check(mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], [
        ([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]],
         "EOS was left out: it is an action, or the policy never learns to stop"),
        ([[1, 1, 1, 1]] * 5, "what follows EOS is still in the mask"),
        ([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]],
         "the mask was made from ids != pad; the padding may have any id, also that of EOS"),
        ([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
         "up to the *last* EOS: the first one ends the summary"),
    ], "True up to and including the first EOS (9), all True without one")


# ---------------------------------------------------------------------------- 3 preference loss


def test_exercise_03_loss():
    # log(1 + e^-1) = .313262, log(1 + e^.5) = .974077, log 2 = .693147
    check(reward.preference_loss(t([2, 0, -1]), t([1, .5, -1])), .660162, [
        (.826829, "chosen and rejected are swapped"),
        (1.980486, "a sum over the pairs: take the mean"),
        ([.313262, .974077, .693147], "one loss a pair: take the mean"),
        (-.660162, "the sign: a loss gets smaller as the chosen one gets better"),
        (-.536200, "the sigmoid without its logarithm"),
    ], "-log sigmoid(chosen - rejected), mean over the pairs")


def test_exercise_03_large_gaps():
    check(reward.preference_loss(torch.tensor([-200.]), torch.tensor([0.])), 200., [
        (math.inf, "-log(sigmoid(d)) is inf at a large gap: there is a function logsigmoid"),
        (math.nan, "NaN at a large gap: there is a function logsigmoid"),
    ], "a gap of 200 the wrong way costs 200")


# ---------------------------------------------------------------------------- 4 last token


def test_exercise_04_last_token():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8, [0, 0, 0, 1, 0, 0, 0, 0],
                         [1, 1, 1, 0, 0, 0, 0, 0]])
    check(lm.last_token_index(mask), [6, 7, 3, 2], [
        ([7] * 4, "the last column is padding in shorter rows: the last *real* token"),
        ([4, 7, 0, 2], "number of real tokens - 1: right only without padding on the left"),
        ([-1, -1, -1, 2], "the first pad of the row is that on the left: look for the last 1"),
        ([7, 8, 4, 3], "one too far: that is the first padding token"),
        ([2, 0, 3, 0], "that is the first real token"),
    ], "the index of the last 1 in each row")


# ---------------------------------------------------------------------------- 5 normalisation


class SumOfTokens(torch.nn.Module):
    """A reward model whose score is half the sum of all token ids, less reference_mean."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.register_buffer("reference_mean", torch.zeros(()))

    def score(self, input_ids, attention_mask, *_, **__):
        return (input_ids * attention_mask).sum(1) / 2 - self.reference_mean


def test_exercise_05_mean():
    # references that score 1.5, 2.5, .5 and 3.5: mean 2
    model, queries, references = SumOfTokens(), [[0]] * 4, [[3], [4, 1], [1], [7]]
    reward.normalize(model, queries, references, 0)
    check(model.reference_mean, 2., [
        (0., "reference_mean has not changed: `x = x + 1` on a local name changes no model"),
        (-2., "the sign: a score has reference_mean taken off"),
        (8., "the sum of the scores, not their mean"),
    ], "the mean score of the references")
    check(reward.score_summaries(model, queries, references, 0), [-.5, .5, -1.5, 1.5], otherwise=
          "after it the references score 0 on average; their spread stays")
    reward.normalize(model, queries, references, 0)
    check(model.reference_mean, 2., [
        (0., "a second time undoes it: the new scores have the old mean taken off already"),
        (4., "a second time doubles it")], "normalising twice is normalising once")


# ---------------------------------------------------------------------------- 6 rewards per token


def test_exercise_06_rewards():
    # KL per token .2, -.5, .5 and, behind the end, junk; beta .05, score 2
    rewards = ppo.kl_penalized_rewards(t([2]), t([[-1, -2, -.5, -3]]), t([[-1.2, -1.5, -1, -1]]),
                                       torch.tensor([[1, 1, 1, 0]]), .05)
    every = "the score is paid at every token: long summaries win; once, at the last action"
    check(rewards, [[-.01, .025, 1.975, 0]], [
        ([[.01, -.025, 2.025, 0]], "the sign of the KL: it is a *penalty*"),
        ([[1.99, 2.025, 1.975, 2]], every), ([[1.99, 2.025, 1.975, 0]], every),
        ([[1.99, 2.025, 1.975, 2.1]], every),
        ([[-.01, .025, -.025, 2]], "the score is paid at the last column, which is padding here"),
        ([[-.01, .025, -.025, 2.1]], "the score is paid at the last column, which is padding here"),
        ([[-.01, .025, 1.975, .1]], "padding pays KL: zero off the mask"),
        ([[-.001, -.00625, 1.99375, 0]], "the log-ratio was squared: the paper's penalty is not"),
        ([[0, 0, 2, 0]], "the KL is missing"),
        ([[-.01, .025, -.025, 0]], "the score is missing"),
        ([[-.2, .5, 1.5, 0]], "beta is missing"),
    ], "-beta (log_probs - ref_log_probs) at each action, the score on top at the last one")


def test_exercise_06_each_row_ends_at_its_own_place():
    same = t([[-1, -1, -1]] * 3)
    rewards = ppo.kl_penalized_rewards(t([1, 2, 3]), same, same,
                                       torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]), .05)
    check(rewards, [[1, 0, 0], [0, 2, 0], [0, 0, 3]], [
        ([[0, 0, 1], [0, 0, 2], [0, 0, 3]], "the score is paid at the last column"),
    ], "each row's score at its own last action")


# ---------------------------------------------------------------------------- 7 GAE


def test_exercise_07_gae():
    # delta, backwards: 1 - .8 = .2; 0 + .8 - .6 = .2; 0 + .6 - .5 = .1, lambda .95
    advantages, returns = ppo.compute_gae(t([[0, 0, 1]]), t([[.5, .6, .8]]), torch.ones(1, 3))
    check(advantages, [[.4705, .39, .2]], [
        ([[.5, .4, .2]], "lambda is ignored (this is lambda = 1)"),
        ([[.1, .2, .2]], "these are the deltas: the recursion is missing (this is lambda = 0)"),
        ([[.9025, .95, 1]], "V is missing: delta = R + gamma V' - V"),
        ([[.9705, .99, 1]], "these are the returns: advantages do not have V added"),
    ], "A = delta + gamma lambda A', from the last action backwards")
    check(returns, [[.9705, .99, 1]], [
        ([[.4705, .39, .2]], "these are the advantages: returns = advantages + values"),
        ([[1, 1, 1]], "these are sums of rewards: returns = advantages + values"),
    ], "returns = advantages + values")


def test_exercise_07_gamma():
    # gamma .9, lambda .5. delta: 2 - 1; -1 + .9 + .5 = .4; 1 - .45 - .5 = .05
    advantages, _ = ppo.compute_gae(t([[1, -1, 2]]), t([[.5, -.5, 1]]), torch.ones(1, 3), .9, .5)
    check(advantages, [[.4325, .85, 1]], [
        ([[.4275, .95, 1]], "gamma does not discount V'"),
        ([[.5, .9, 1]], "gamma does not discount A': gamma lambda A'"),
        ([[.86, 1.3, 1]], "lambda is ignored"),
    ], "gamma discounts V' and, with lambda, A'")


def test_exercise_07_padding():
    advantages, returns = ppo.compute_gae(t([[0, 0, 1, 50, -50]]), t([[.5, .6, .8, 9, -9]]),
                                          torch.tensor([[1, 1, 1, 0, 0]]))
    leak = "values or rewards behind the end leak in: V = A = 0 after the last action (padding)"
    check(advantages, [[.4705, .39, .2, 0, 0]], [
        ([[2.634244, 2.667625, 2.5975, -6.95, -41]], leak),
        ([[2.634244, 2.667625, 2.5975, 0, 0]], leak), ([[8.593, 8.94, 9.2, 0, 0]], leak),
    ], "the summary ends after three actions: what stands in the padding is never read")
    check(returns, [[.9705, .99, 1, 0, 0]], otherwise="returns are zero off the mask (padding)")


def test_exercise_07_constants():
    values = t([[.5, .6]]).requires_grad_()
    for x in ppo.compute_gae(t([[0, 1]]), values, torch.ones(1, 2)):
        assert not x.requires_grad, "advantages and returns are constants: no gradient into V"


# ---------------------------------------------------------------------------- 8 whitening


def test_exercise_08_whiten():
    # 1, 2, 3 and 5: mean 2.75, variance 2.1875
    x, mask = t([[1, 2, 3, 100], [5, 100, 100, 100]]), t([[1, 1, 1, 0], [1, 0, 0, 0]])

    def rows(a, b, c, d):
        return [[a, b, c, 0], [d, 0, 0, 0]]

    pads = "padding is in the mean"
    check(ppo.whiten(x, mask), rows(-1.183216, -.507093, .169031, 1.521278), [
        (rows(-1.035511, -1.014955, -.994399, -.953287), pads),
        (rows(-1.035750, -1.015189, -.994629, -.953507), pads + " and in the variance"),
        (rows(-1.024695, -.439155, .146385, 1.317465), "the variance is divided by n - 1, which is "
         "NaN for one token: divide by n"),
        (rows(1.566784, 2.242907, 2.919031, 4.271278), "the mean was added back"),
        (rows(-1.75, -.75, .25, 2.25), "the standard deviation is missing"),
        (rows(-.8, -.342857, .114286, 1.028571), "divided by the variance: take its root"),
        (rows(-1.224745, 0, 1.224745, 0), "mean and variance of each row: take the whole batch"),
    ], "(x - mean) / standard deviation over the mask, 0 elsewhere")


def test_exercise_08_no_variance():
    check(ppo.whiten(t([[3, 3]]), torch.ones(1, 2)), [[0, 0]], [
        ([[math.nan, math.nan]], "0 / 0 where all are equal: 1e-8 belongs under the root"),
    ], "equal numbers become 0")


# ---------------------------------------------------------------------------- 9 clipped objective

RATIOS, ADVANTAGES = t([[1.5, 1.5, .5, .5, 1.1]]), t([[1, -1, 1, -1, 2]])


def test_exercise_09_loss():
    # max(-A rho, -A clip(rho, .8, 1.2)): -1.2, 1.5, -.5, .8, -2.2
    loss, clip_fraction = ppo.policy_loss(RATIOS.log() - 3, t([[-3] * 5]), ADVANTAGES,
                                          torch.ones(1, 5))
    check(loss, -.32, [
        (.32, "the wrong sign: a loss is minimised"), (.56, "the wrong sign: a loss is minimised"),
        (-.56, "the smaller of the two losses: take the larger one"),
        (-.44, "never clipped, or always: then a policy that overshot can't come back"),
        (-.38, "only large ratios are clipped"),
        (-.176970, "the ratio is upside down: pi / pi_old"),
        (-1.6, "a sum: take the mean over the mask"),
    ], "mean of max(-A rho, -A clip(rho))")
    check(clip_fraction, .4, [
        (.8, "every ratio outside the range counts: only where the clipped loss is the larger"),
    ], "the share of actions whose clipped loss is strictly larger")


def test_exercise_09_mask():
    same, mask = t([[-1] * 4, [-2] * 4]), t([[1, 1, 1, 0], [1, 0, 0, 0]])
    loss, _ = ppo.policy_loss(same, same, -t([[1, 2, 3, 50], [4, 50, 50, 50]]), mask)
    check(loss, 2.5, [
        (26.25, "you divided by T, the width, and counted padding: masked_mean"),
        (1.25, "you divided by T, the width, not by the number of real tokens: masked_mean"),
        (3., "the mean of the row means: all tokens count the same"),
    ], "the mean over the four real tokens")


def test_exercise_09_gradient():
    log_probs = t([[.5]]).log().requires_grad_()
    ppo.policy_loss(log_probs, t([[0]]), t([[1]]), torch.ones(1, 1))[0].backward()
    check(log_probs.grad, [[-.5]], [
        ([[0]], "no gradient at ratio 0.5 and A = 1: a policy that overshot can't come back; take "
         "the larger of the plain and the clipped loss")], "-A rho")


# ---------------------------------------------------------------------------- 10 value loss


def test_exercise_10_loss():
    # clipped to 1 +- .2: 1.2, 1.1, .8; the larger squared errors are .64, .81, 2.25
    loss, clip_fraction = ppo.value_loss(t([[1.5, 1.1, .5]]), t([[1] * 3]), t([[2] * 3]),
                                         torch.ones(1, 3))
    check(loss, .616667, [
        (1.233333, "the 1/2 is missing"),
        (.416667, "the smaller error: take the larger one"),
        (.551667, "never clipped, or clipped around the returns: around the old values"),
        (.481667, "always clipped: take the larger of the two errors"),
    ], "half the mean of max((V - R)^2, (clip(V) - R)^2)")
    check(clip_fraction, 1 / 3, otherwise="the share whose clipped error is strictly larger")


def test_exercise_10_around_the_old_value():
    # V 1, old .5, return 1: clipped to .7, error .09
    loss, _ = ppo.value_loss(t([[1]]), t([[.5]]), t([[1]]), torch.ones(1, 1))
    check(loss, .045, [
        (0., "never clipped, or clipped around the returns: around the old values"),
        (.09, "the 1/2 is missing")], "clip(V, old - .2, old + .2)")


def test_exercise_10_mask():
    zeros, mask = t([[0] * 4] * 2), t([[1, 1, 1, 0], [1, 0, 0, 0]])
    loss, _ = ppo.value_loss(zeros, zeros, t([[1, 2, 3, 50], [4, 50, 50, 50]]), mask)
    check(loss, 3.75, [
        (1.875, "you divided by T, the width, not by the number of real tokens: masked_mean"),
        (5.166667, "the mean of the row means: all tokens count the same"),
        (626.875, "padding was counted"),
    ], "half the mean of 1, 4, 9 and 16")


# ---------------------------------------------------------------------------- 11 both orders


def prepared(*answers):
    """A judge that gives these answers in turn, one list for each call."""
    answers = iter(answers)
    return lambda posts, a, b: next(answers)


def test_exercise_11_a_judge_that_looks_at_the_place():
    outcomes = judge.judge_pairwise(lambda posts, a, b: ["A"] * 2, ["p"] * 2, ["x"] * 2, ["y"] * 2)
    assert outcomes != [1.0, 1.0], (
        "a judge that always says A makes us win: ask in the second order too, and count an A "
        "there for the other side")
    check(outcomes, [.5, .5], otherwise="a judge that always says A: a tie")


def test_exercise_11_the_longer_one():
    def longer(posts, a, b):
        return ["A" if len(x) >= len(y) else "B" for x, y in zip(a, b)]

    outcomes = judge.judge_pairwise(longer, ["p"] * 3, ["xxx", "x", "x"], ["y", "yyy", "y"])
    check(outcomes, [1, 0, .5], [
        ([.5, .5, 1], "the second order was not turned round: a B there is a vote for us"),
        ([.5, .5, .5], "the second order was not turned round: a B there is a vote for us"),
        ([1, 0, 1], "only the first order counts"),
        ([0, 1, .5], "ours and theirs are exchanged"),
    ], "longer, shorter, equal")


def test_exercise_11_abstentions():
    outcomes = judge.judge_pairwise(prepared([None, "A", "A"], ["B", None, "B"]), ["p"] * 3,
                                    ["x"] * 3, ["y"] * 3)
    assert outcomes == [None, None, 1.0], (
        f"{outcomes}: who abstains in either order abstains: None, neither a tie nor a loss")


def test_exercise_11_answers_in_prose():
    try:
        outcomes = judge.judge_pairwise(prepared(["Answer: B"], ["A"]), ["p"], ["x"], ["y"])
    except ValueError:
        return
    pytest.fail(f"{outcomes}: 'Answer: B' is no verdict, and nothing is guessed: a ValueError",
                pytrace=False)


# ---------------------------------------------------------------------------- 12 interval


def test_exercise_12_interval():
    check(judge.wilson_interval(60 / 90, 90), [.564223, .755465], [
        ([.569275, .764058], "share +- z standard errors: Wilson's is asymmetric and stays in "
         "[0, 1]"),
        ([.615385, .714286], "one standard error is not 95 %: z = 1.96"),
    ], "Wilson's interval of 60 among 90")


def test_exercise_12_edges():
    check(judge.wilson_interval(0., 10), [0, .277533], [
        ([0, 0], "none of 10 is not surely none: Wilson's interval is no point here")],
        "0 among 10: [0, z^2 / (n + z^2)]")
    check(judge.wilson_interval(1., 10), [.722467, 1], otherwise="10 among 10")
    check(judge.wilson_interval(math.nan, 0), [math.nan] * 2, otherwise="nothing: NaN, not 0")
