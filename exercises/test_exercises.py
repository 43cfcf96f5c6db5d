"""One group of tests for each exercise: `pytest -k exercise_07`. Every number is done by hand.

A result that comes from a likely mistake is told as that mistake: "You ..." is what was done, and
"Expected: ..." what is wanted. A result that is like none of them is shown beside the right one.
The project's own tests ask for more: shapes that are refused, and NaN behind the mask.
"""

import copy
import inspect
import math
import traceback

import pytest
import torch

import judge
import lm
import ppo
import reward


def t(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def fail(message):
    pytest.fail(message, pytrace=False)


def you(what, expected):
    fail(f"You {what}\nExpected: {expected}")


def changed(before, now):
    """Is a tensor or a list another one than before? Then it is put back, for the next test."""
    if isinstance(before, torch.Tensor):
        same = (before == now) | ((before != before) & (now != now))  # NaN is no change of NaN
        now.data.copy_(before)
        return not same.all()
    if isinstance(before, list) and before != now:
        now[:] = before
        return True
    return False


def call(function, *arguments):
    """(what the function gives, the exception it stops with); one of them is None."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error


def stopped(function, error):
    """What to say of an exception: its type, and the line of theirs that it comes from."""
    file = inspect.unwrap(function).__code__.co_filename
    lines = [f" in line {frame.lineno}, `{frame.line}`"
             for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"get {type(error).__name__}{lines[-1] if lines else ''}: {error}"


def ask(function, *arguments, results=1, otherwise="a result"):
    """What the function gives. In words where it stops, gives nothing, gives no tensor (results=1)
    or not two things (2), or changes what it was given. results=0: it may give anything.
    otherwise: what is expected where it stops."""
    before = [x.detach().clone() if isinstance(x, torch.Tensor) else copy.copy(x)
              for x in arguments]
    result, error = call(function, *arguments)
    if isinstance(error, NotImplementedError):
        fail(f"{error} (still blank)")
    if error:
        you(stopped(function, error), otherwise)
    if result is None:
        you("return None: there is no `return` at the end, or it returns nothing.", "a result")
    if results == 2 and not (isinstance(result, tuple) and len(result) == 2):
        you(f"return one thing, a {type(result).__name__}.", "two results: `return first, second`")
    first = result[0] if results == 2 else result
    if results and not isinstance(first, torch.Tensor):
        kind = type(first).__name__
        you(f"return a {kind}. No gradient can come back through it." if kind == "float" else
            f"return a {kind}.", "a tensor")
    names = list(inspect.signature(function).parameters)
    for name, old, new in zip(names, before, arguments):
        if changed(old, new):
            you(f"changed `{name}`, which belongs to the caller, in place.",
                f"{name} as it was; make a new one")
    return result


def numbers_of(result, otherwise="numbers"):
    """A tensor of float64, from a tensor, a number or a list of numbers."""
    numbers, error = call(torch.as_tensor, result)
    if error:
        you(f"return {str(result)[:80]}, which is not numbers alone.", otherwise)
    return numbers.detach().double()


def is_like(result, numbers):
    """Are these the numbers, and in this shape?"""
    result, numbers = numbers_of(result), t(numbers)
    return result.shape == numbers.shape and torch.allclose(
        result, numbers, atol=2e-4, rtol=0, equal_nan=True)


def check(result, expected, mistakes=(), otherwise=""):
    """result is expected, or else one of the mistakes [(wrong result, what was done)], or else it
    is shown. otherwise: what is expected, in words."""
    result = numbers_of(result, otherwise)
    if is_like(result, expected):
        return
    for wrong, what in mistakes:
        if is_like(result, wrong):
            you(what, otherwise)
    if result.numel() == t(expected).numel():
        if is_like(result.reshape(t(expected).shape), expected):
            you(f"have the right numbers in the wrong shape, {tuple(result.shape)}.",
                f"shape {tuple(t(expected).shape)}")
    rounded = [round(x, 6) for x in result.flatten().tolist()]
    fail(f"Numbers, of shape {tuple(result.shape)}: {rounded}\nexpected {expected}\n"
         f"Expected: {otherwise}")


def gradient(loss, x):
    """d loss / d x, in words where there is none."""
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
    if found is None:
        you("return numbers that carry no gradient (detach, item, a new tensor, no_grad?).",
            "a result that the networks can learn from: loss.backward() has to work")
    return found


# ---------------------------------------------------------------------------- 1 log-probs

LOGITS = t([[[2, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 1]],
            [[1, 0, 0], [0, 0, 2], [1, 1, 0], [0, 2, 0]]])
LABELS = torch.tensor([[0, 1, 2, 1], [2, 0, 2, 1]])
# log(e^2 + 2) = 2.239545; log(e + 2) = 1.551445; log(e^3 + 2) = 3.094923; log(2e + 1) = 1.861995
LOG_PROBS = [[-2.239545, -1.551445, -3.094923], [-.551445, -.239545, -.861995]]


def test_exercise_01_shift():
    own = "read the logits at their own token."
    back = "shifted the wrong way: the logits at p + 1 have seen token p already."
    check(ask(lm.get_log_probs, LOGITS, LABELS), LOG_PROBS, [
        ([[-.239545, -.551445, -.094923, -1.098612],
          [-1.551445, -2.239545, -1.861995, -.239545]], own),
        ([[-.551445, -.094923, -1.098612], [-2.239545, -1.861995, -.239545]], own),
        ([[-.239545, -.551445, -.094923], [-1.551445, -2.239545, -1.861995]], own),
        ([[-1.551445, -3.094923, -1.098612], [-.239545, -.861995, -2.239545]], back),
        ([-6.885913, -1.652985], "took the sum over the tokens, a single number a row."),
        ([[-.239545, -.551445, -.094923], [-.551445, -.239545, -.861995]],
         "took the log-prob of the likeliest token, not that of the label."),
        ([[-x for x in row] for row in LOG_PROBS], "have the wrong sign: log-probs are negative."),
        ([[0, 0, 0], [1, 2, 1]], "give the logits themselves: there is no log_softmax."),
        ([[.106507, .211942, .045279], [.576117, .786986, .422319]],
         "give probabilities, without the logarithm."),
        ([[-1.551445, -3.094923, -1.551445], [-.861995, -.239545, -.551445]],
         "take the softmax over the positions."),
    ], "log_softmax over the vocabulary of the logits at p, read at token p + 1: they predict "
       "token p + 1")


def test_exercise_01_temperature():
    right = [[-2.965876, -1.820142, -4.312870], [-.391570, -.108734, -.806320]]
    check(ask(lm.get_log_probs, LOGITS, LABELS, .7), right, [
        (LOG_PROBS, "do not use the temperature."),
        ([[-1.800917, -1.389727, -2.319066], [-.689727, -.400917, -.914924]],
         "multiplied the logits by the temperature."),
        ([[-3.199350, -2.216350, -4.421319], [-.787778, -.342207, -1.231421]],
         "divided the log-probs by the temperature: their probabilities no longer sum to 1."),
    ], "log_softmax(logits / temperature)")


def test_exercise_01_precision():
    check(ask(lm.get_log_probs, t([[[1e4, 0], [0, 0]]]), torch.tensor([[0, 1]])), [[-1e4]], [
        ([[-math.inf]], "take the logarithm of a softmax: it is -inf for an unlikely token."),
    ], "log_softmax, which is finite")
    half = torch.tensor([[[20, 19.5, 3], [0, 0, 0]]], dtype=torch.bfloat16)
    check(ask(lm.get_log_probs, half, torch.tensor([[0, 1]])), [[-.974077]], [
        ([[-.976562]], "compute in bfloat16, which has two or three digits."),
        ([[-.972656]], "compute in bfloat16, which has two or three digits."),
    ], "logits.float() before log_softmax (or cross_entropy), if they come in half precision")


def test_exercise_01_gradient():
    logits = t([[[0, 0], [5, 5]]]).requires_grad_()
    log_probs = ask(lm.get_log_probs, logits, torch.tensor([[0, 1]]))
    # 1 at the label less the probability, 1/2 each; the last logits predict nothing
    check(gradient(log_probs.sum(), logits), [[[-.5, .5], [0, 0]]], otherwise=
          "the gradient is 1 at the label less the probability")


# ---------------------------------------------------------------------------- 2 response mask


def test_exercise_02_mask():
    responses = torch.tensor([[5, 9, 0, 0], [9, 0, 0, 0], [5, 6, 7, 8], [5, 9, 7, 9], [0, 5, 9, 9]])
    mask = ask(lm.get_response_mask, responses, 9)
    check(mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], [
        ([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]],
         "left EOS out: the policy would never learn to stop."),
        ([[1, 1, 1, 1]] * 5, "kept what comes after EOS."),
        ([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]],
         "left out EOS and nothing else: what comes after it is no action, either."),
        ([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]],
         "kept what comes after the first EOS, up to the second one."),
        ([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]],
         "counted down the batch, not along each row: dim 1."),
        ([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]],
         "made the mask from ids != pad; but padding may have any id, also that of EOS."),
        ([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
         "went up to the last EOS: the first one ends the summary."),
        ([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
         "kept one token too many: the one after EOS."),
        ([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
         "cut the row without EOS: argmax of nothing but zeros is 0."),
        ([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]],
         "exchanged True and False."),
    ], "True up to and including the first EOS (9), all True without one")
    if mask.dtype != torch.bool:
        you(f"return a mask of {mask.dtype}.", "torch.bool")


def test_exercise_02_any_id():
    responses = torch.tensor([[5, 0, 0, 0], [0, 9, 0, 0], [9, 9, 9, 9]])
    check(ask(lm.get_response_mask, responses, 0), [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [
        ([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], "do not use eos_token_id: 9 is not the end."),
    ], "True up to and including the first EOS, which here is 0")


def test_exercise_02_several_ends():
    responses = torch.tensor([[5, 7, 9, 0], [9, 7, 0, 0], [5, 6, 8, 7]])
    every = "eos_token_id may be a list: the first of any of these ids ends the row (is_eos)"
    mask = ask(lm.get_response_mask, responses, [9, 7], otherwise=every)
    check(mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [
        ([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], "looked at the first of several ids only."),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], "looked at the last of several ids only."),
        ([[1, 1, 1, 1]] * 3, "kept what comes after EOS: found none of the ids."),
    ], every)


# ---------------------------------------------------------------------------- 3 preference loss


def test_exercise_03_loss():
    # log(1 + e^-1) = .313262, log(1 + e^.5) = .974077, log 2 = .693147
    check(ask(reward.preference_loss, t([2, 0, -1]), t([1, .5, -1]), results=0), .660162, [
        (.826829, "exchanged chosen and rejected."),
        (1.980486, "took the sum over the pairs."),
        ([.313262, .974077, .693147], "return one loss a pair."),
        (-.660162, "have the wrong sign: a loss gets smaller as the chosen one gets better."),
        (-.536200, "left out the logarithm of the sigmoid."),
        (.853928, "compared every chosen one with every rejected one: (B, 1) against (B,) is "
         "(B, B)."),
        (.613282, "took the mean of the gaps before the loss."),
        (.685335, "multiplied the gap by 0.1, as DPO does: here it stays as it is."),
        (.833333, "took the hinge loss."),
        (1.577979, "took the loss of each score by itself: only their difference counts."),
    ], "-log sigmoid(chosen - rejected), the mean over the pairs")


def test_exercise_03_large_gaps():
    # not 200, whose tenth would be 20, where a student may clamp
    chosen = torch.tensor([-250.]).requires_grad_()
    loss = ask(reward.preference_loss, chosen, torch.tensor([0.]))
    log = "take the logarithm of a sigmoid, which is 0 at a large gap."
    check(loss, 250., [(math.inf, log), (math.nan, log),
                       (18.420681, "add a small number to the sigmoid: logsigmoid needs none."),
                       (20., "clamp the gap: a sure mistake then has no gradient.")],
          "a gap of 250 the wrong way costs 250: logsigmoid")
    check(gradient(loss, chosen), [-1.], otherwise="its gradient is -1")


def test_exercise_03_gradient():
    scores = t([[2, 0, -1], [1, .5, -1]]).requires_grad_()
    loss = ask(reward.preference_loss, scores[0], scores[1])
    # -sigmoid(-gap) / 3: sigmoid(-1) = .268941, sigmoid(.5) = .622459, sigmoid(0) = .5
    check(gradient(loss, scores), [[-.089647, -.207486, -.166667], [.089647, .207486, .166667]],
          otherwise="the gradient on a chosen score is -sigmoid(rejected - chosen) / pairs, and "
          "the opposite on the rejected one")


# ---------------------------------------------------------------------------- 4 last token


def test_exercise_04_last_token():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8, [0, 0, 0, 1, 0, 0, 0, 0],
                         [1, 1, 1, 0, 0, 0, 0, 0]])
    last = ask(lm.last_token_index, mask)
    check(last, [6, 7, 3, 2], [
        ([7] * 4, "take the last column for all rows; in shorter ones it is padding."),
        ([4, 7, 0, 2], "counted the real tokens: right only without padding on the left."),
        ([-1, -1, -1, 2], "stand before the first pad of the row, which may be on the left."),
        ([7, 8, 4, 3], "are one too far: that is the first padding token."),
        ([2, 0, 3, 0], "took the first real token."),
        ([1, 0, 4, 5], "counted from the right end of the row."),
        ([0, 1, 0, 0, 0, 0, 0, 1], "took the argmax of each column: dim 1 is along the row."),
    ], "the index of the last 1 in each row, counted from 0")
    if last.dtype.is_floating_point or last.dtype == torch.bool:
        you(f"return {last.dtype}, which can't be used as an index.", "torch.long")


# ---------------------------------------------------------------------------- 5 normalisation


class SumOfTokens(torch.nn.Module):
    """A reward model whose score is half the sum of all token ids, less reference_mean."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.weight = torch.nn.Parameter(torch.tensor(.5))
        self.register_buffer("reference_mean", torch.zeros(()))

    def score(self, input_ids, attention_mask, *_, **__):
        return (input_ids * attention_mask).sum(1) * self.weight - self.reference_mean


# posts and references together have sums 9, 5, 2, 13, hence scores 4.5, 2.5, 1, 6.5: mean 3.625
QUERIES, REFERENCES = [[2, 2], [1], [0], [6]], [[4, 1], [4], [2], [7]]


def normalized(times):
    model = SumOfTokens()
    before = copy.deepcopy(model.state_dict())

    def normalize(reward_model, queries, references, pad_id, batch_size):
        reward.normalize(reward_model, queries, references, pad_id, batch_size)
        return reward_model

    normalize.__wrapped__ = reward.normalize
    for _ in range(times):
        ask(normalize, model, QUERIES, REFERENCES, 0, 3, results=0)
        if model.reference_mean is None:
            you("set reference_mean to None.", "a tensor, the mean score")
    for name, weights in model.state_dict().items():
        if name != "reference_mean" and not torch.equal(before[name], weights):
            you(f"changed `{name}` of the reward model.", "reference_mean changes and nothing else:"
                " the spread of the scores stays")
    if model.reference_mean.requires_grad:
        you("left a gradient in reference_mean.", "a number: score_summaries, or torch.no_grad()")
    return model


def test_exercise_05_mean():
    check(normalized(1).reference_mean, 3.625, [
        (0., "have not changed reference_mean: `x = x + 1` on a local name changes no model."),
        (-3.625, "have the wrong sign: a score has reference_mean taken off."),
        (14.5, "took the sum of the scores."),
        (2.666667, "took the first batch only, of 3."),
        (2.5, "took the median."),
        (4.5, "took the first score only."),
        (6.5, "took one score only: the last one, or the largest."),
        (1.8125, "took half of the mean: the old reference_mean is no second score."),
        (2.25, "scored the references without their posts."),
        (4.583333, "took the mean of batch means, of 3 scores and of 1."),
        (3.916667, "took the mean of batch means, of 3 scores and of 1."),
    ], "the mean score of the references, each read after its post")


def test_exercise_05_scores():
    scores = reward.score_summaries(normalized(1), QUERIES, REFERENCES, 0)
    check(scores, [.875, -1.125, -2.625, 2.875], otherwise=
          "after it the references score 0 on average; their spread stays")


def test_exercise_05_twice():
    mistakes = [
        (0., "undo it the second time: the new scores have the old mean taken off already."),
        (7.25, "double it the second time.")]
    once = normalized(1).reference_mean
    check(normalized(2).reference_mean, 3.625, mistakes if is_like(once, 3.625) else [],
          "the mean score, and normalising a second time changes nothing")


# ---------------------------------------------------------------------------- 6 rewards per token

# KL per token .2, -.5, .5 and .4, -.2; behind the end, junk
LOG_P = t([[-1, -2, -.5, -3], [-1, -1, -2, -4]])
REF = t([[-1.2, -1.5, -1, -1], [-1.4, -.8, -1, -2]])
ENDS = torch.tensor([[True, True, True, False], [True, True, False, False]])
PAYS = "-beta (log_probs - ref_log_probs) at each action, the score on top at the last one, else 0"
KL_OTHERWISE = [
    ([[.656667, .691667, .641667, 0], [-.52, -.49, 0, 0]], "shared the score out over the tokens."),
    ([[-.01, -.025, 1.975, 0], [-.02, -1.01, 0, 0]],
     "took the absolute value of each log-ratio: a single one may well be negative."),
    ([[-.01, 0, 1.975, 0], [-.02, -1, 0, 0]],
     "cut the log-ratios off at 0: a single one may well be negative."),
    ([[-.003333, .008333, 1.991667, 0], [-.01, -.995, 0, 0]], "divided the KL by the length."),
    ([[-.003679, .003383, 1.984837, 0], [-.007358, -.996321, 0, 0]],
     "weighted each token by its probability: it has been sampled with that already."),
    ([[-.041667, -.066667, 1.975, 0], [-.035714, -1.0625, 0, 0]],
     "divided the log-probs: the logarithm of a ratio is a difference."),
]


def test_exercise_06_rewards():
    # beta .05, scores 2 and -1
    rewards = ask(ppo.kl_penalized_rewards, t([2, -1]), LOG_P, REF, ENDS, .05)
    every = "pay the score at every token: long summaries win."
    column = "pay the score at the last column, which is padding here."
    check(rewards, [[-.01, .025, 1.975, 0], [-.02, -.99, 0, 0]], [
        ([[.01, -.025, 2.025, 0], [.02, -1.01, 0, 0]], "have the wrong sign of the KL."),
        ([[1.99, 2.025, 1.975, 2], [-1.02, -.99, -1, -1]], every),
        ([[1.99, 2.025, 1.975, 2.1], [-1.02, -.99, -.95, -.9]], every),
        ([[1.99, 2.025, 1.975, 0], [-1.02, -.99, 0, 0]], every),
        ([[-.01, .025, -.025, 2], [-.02, .01, 0, -1]], column),
        ([[-.01, .025, -.025, 2.1], [-.02, .01, .05, -.9]], column),
        ([[-.01, .025, 1.975, .1], [-.02, -.99, .05, .1]], "let the padding pay KL."),
        ([[-.001, -.00625, 1.99375, 0], [-.004, -1.001, 0, 0]], "squared the log-ratio."),
        ([[-.002, -.0125, 1.9875, 0], [-.008, -1.002, 0, 0]], "squared the log-ratio."),
        ([[-.000937, -.007436, 1.994673, 0], [-.003516, -1.00107, 0, 0]],
         "took an estimate of the KL that is always positive (k3)."),
        ([[-.06107, -.030327, 1.917564, 0], [-.074591, -1.040937, 0, 0]], "took exp: the ratio."),
        ([[0, 0, 2, 0], [0, -1, 0, 0]], "have no KL in it."),
        ([[-.01, .025, -.025, 0], [-.02, .01, 0, 0]], "have no score in it."),
        ([[-.2, .5, 1.5, 0], [-.4, -.8, 0, 0]], "do not use beta."),
        ([[-.01, .025, .075, 0], [-.02, -.04, 0, 0]], "multiplied the score by beta, too."),
        ([[-.01, .025, 2, 0], [-.02, -1, 0, 0]],
         "put the score in the place of the last action's KL: it is added (+=)."),
        ([[-.01, -.975, 1.975, 0], [-.02, -.99, 2, 0]],
         "wrote rewards[:, last], which takes the columns of all rows in each row: "
         "rewards[torch.arange(B), last]."),
        ([[1.99, .025, -.025, 0], [-1.02, .01, 0, 0]], "pay the score at the first action."),
        ([[-.01, .025, -.025, 2], [-.02, .01, -1, 0]],
         "pay the score one place after the last action."),
        ([[-.01, .025, .475, 0], [-.02, .51, 0, 0]], "pay all rows the mean of the scores."),
        ([[-.01, .025, .641667, 0], [-.02, -.49, 0, 0]], "divided the score by the length."),
        ([[0, 0, 1.99, 0], [0, -1.01, 0, 0]], "pay the whole KL at the last action."),
        ([1.99, -1.01], "return one reward a summary, R(x, y)."),
        *KL_OTHERWISE], PAYS)


def test_exercise_06_beta():
    # as above, beta .5
    rewards = ask(ppo.kl_penalized_rewards, t([2, -1]), LOG_P, REF, ENDS, .5)
    check(rewards, [[-.1, .25, 1.75, 0], [-.2, -.9, 0, 0]], [
        ([[-.01, .025, 1.975, 0], [-.02, -.99, 0, 0]], "do not use kl_beta: it is 0.5 here."),
        ([[-.01, .025, -.025, 2], [-.02, .01, 0, -1]], "do not use kl_beta: it is 0.5 here."),
    ], PAYS + "; beta 0.5")


def test_exercise_06_each_row_ends_at_its_own_place():
    equal = t([[-1, -1, -1]] * 3)
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    rewards = ask(ppo.kl_penalized_rewards, t([1, 2, 3]), equal, equal, mask, .05)
    check(rewards, [[1, 0, 0], [0, 2, 0], [0, 0, 3]], [
        ([[0, 0, 1], [0, 0, 2], [0, 0, 3]], "pay the score at the last column."),
        ([[1, 2, 3]] * 3, "wrote rewards[:, last], which takes the columns of all rows in each row:"
         " rewards[torch.arange(B), last]."),
    ], "each row's score at its own last action")


def test_exercise_06_padding_is_never_read():
    nan = math.nan  # where no network has written anything, anything may be
    log_probs, ref = LOG_P.masked_fill(~ENDS, nan), REF.masked_fill(~ENDS, nan)
    rewards = ask(ppo.kl_penalized_rewards, t([2, -1]), log_probs, ref, ENDS, .05)
    check(rewards, [[-.01, .025, 1.975, 0], [-.02, -.99, 0, 0]], [
        ([[-.01, .025, 1.975, nan], [-.02, -.99, nan, nan]],
         "let the padding in, which is NaN here: NaN times 0 is NaN."),
    ], "0 off the mask, whatever stands there: zero_off or torch.where")


# ---------------------------------------------------------------------------- 7 GAE

RECURSION = "delta = R + gamma V' - V, A = delta + gamma lambda A', from the last action backwards"
RETURNS = "returns = advantages + values, on the mask"


def gae(*arguments):
    return ask(ppo.compute_gae, *arguments, results=2)


def test_exercise_07_gae():
    # delta, backwards: 1 - .8 = .2; 0 + .8 - .6 = .2; 0 + .6 - .5 = .1, lambda .95;
    # in row 2: -1 - .1 = -1.1; 0 + .1 - .4 = -.3; .5 + .4 - .2 = .7
    advantages, returns = gae(t([[0, 0, 1], [.5, 0, -1]]), t([[.5, .6, .8], [.2, .4, .1]]),
                              torch.ones(2, 3, dtype=torch.bool))
    right = [[.9705, .99, 1], [-.37775, -.945, -1]]
    if is_like(returns, [[.4705, .39, .2], [-.57775, -1.345, -1.1]]) and is_like(advantages, right):
        you("return the returns first: the order is the other one.", "advantages, returns")
    check(advantages, [[.4705, .39, .2], [-.57775, -1.345, -1.1]], [
        ([[.5, .4, .2], [-.7, -1.4, -1.1]], "do not use lambda (this is lambda = 1)."),
        ([[.1, .2, .2], [.7, -.3, -1.1]], "return the deltas: there is no recursion in it."),
        ([[.9025, .95, 1], [-.4025, -.95, -1]], "have no V in delta."),
        ([[-.8895, -.41, .2], [-1.07275, -1.445, -1.1]], "have no V' in delta."),
        ([[.4025, .35, .2], [-.6025, -1.35, -1.1]],
         "exchanged gamma and lambda: lambda discounts V' here."),
        (right, "return the returns as advantages."),
        ([[1.1925, 1.15, 1], [-.4875, -1.25, -1]],
         "go on after the last action, with its own V: V' is 0 there."),
        ([[-.5, -.575, .25375], [.3, .085, -.61925]], "run the loop forwards."),
        ([[.1, .295, .48025], [.7, .365, -.75325]], "run the loop forwards."),
        ([[0, .39, .2], [0, -1.345, -1.1]],
         "never come to t = 0: range(T - 1, 0, -1) ends before it; reversed(range(T)) does not."),
        ([[4.0545, 3.11, 1.8], [.76275, -.355, -.9]], "add V in delta: it is taken off."),
        ([[.127, .66, .8], [-.52175, -.865, -.7]], "take V of the step before for V'."),
        ([[.1105, .21, .2], [.68225, -.355, -1.1]], "carry A' along with 1 - lambda."),
        ([[1.105185, .993633, .730343], [-.347417, -1.410625, -1.071119]],
         "whitened the advantages: that comes later, over the whole batch."),
    ], RECURSION)
    check(returns, right, [
        ([[.4705, .39, .2], [-.57775, -1.345, -1.1]], "return the advantages as returns, too."),
        ([[1, 1, 1], [-.5, -1, -1]], "return sums of rewards as returns."),
        ([[-.0295, -.21, -.6], [-.77775, -1.745, -1.2]], "return A - V: it is A + V."),
    ], RETURNS)


def test_exercise_07_gamma():
    # gamma .9, lambda .5. delta: 2 - 1; -1 + .9 + .5 = .4; 1 - .45 - .5 = .05;
    # in row 2: 0 + 1 = 1; 1 - .9 - 0 = .1; 0 + 0 - 1 = -1
    advantages, returns = gae(t([[1, -1, 2], [0, 1, 0]]), t([[.5, -.5, 1], [1, 0, -1]]),
                              torch.ones(2, 3, dtype=torch.bool), .9, .5)
    check(advantages, [[.4325, .85, 1], [-.7525, .55, 1]], [
        ([[.4275, .95, 1], [-.7975, .45, 1]], "do not discount V' by gamma."),
        ([[.5, .9, 1], [-.7, .6, 1]], "do not discount A' by gamma: gamma lambda A'."),
        ([[1.22, 1.3, 1], [-.1, 1, 1]], "do not use lambda."),
        ([[.4525, .45, 1], [-.5725, .95, 1]],
         "exchanged gamma and lambda: lambda discounts V' here."),
        ([[1.3775, 1.45, 1], [-.0975, .95, 1]], "do not use gamma and lam, but 1 and .95."),
        ([[1.123025, 1.255, 1], [-.183475, .955, 1]], "do not use lam, but .95."),
    ], RECURSION + "; gamma .9, lambda .5")
    check(returns, [[.9325, .35, 2], [.2475, .55, 0]], otherwise=RETURNS)


def test_exercise_07_padding():
    # row 1 is that of the first test; row 2, backwards: -1 - .4 = -1.4; .5 + .4 - .2 = .7
    advantages, returns = gae(
        t([[0, 0, 1, 50, -50], [.5, -1, 7, -7, 3]]),
        t([[.5, .6, .8, 9, -9], [.2, .4, -6, 6, 5]]),
        torch.tensor([[True, True, True, False, False], [True, True, False, False, False]]))
    leak = "let values or rewards of the padding leak in."
    check(advantages, [[.4705, .39, .2, 0, 0], [-.63, -1.4, 0, 0, 0]], [
        ([[2.634244, 2.667625, 2.5975, -6.95, -41], [2.329487, 1.71525, 9.595, -9.9, -2]], leak),
        ([[2.634244, 2.667625, 2.5975, 0, 0], [2.329487, 1.71525, 0, 0, 0]], leak),
        ([[8.593, 8.94, 9.2, 0, 0], [-6.33, -7.4, 0, 0, 0]], leak),
        ([[.4705, .39, .2, 0, 0], [5.4025, 4.95, 13, 0, 0]],
         "let all rows end where the first one ends."),
    ], "a row ends with its own last action: V = A = 0 after it, and padding is never read")
    check(returns, [[.9705, .99, 1, 0, 0], [-.43, -1, 0, 0, 0]], [
        ([[.9705, .99, 1, 9, -9], [-.43, -1, -6, 6, 5]], "left values of the padding in returns."),
    ], "returns are zero off the mask (padding)")


def test_exercise_07_constants():
    values = t([[.5, .6]]).requires_grad_()
    for x in gae(t([[0, 1]]), values, torch.ones(1, 2, dtype=torch.bool)):
        if getattr(x, "requires_grad", False):
            you("let a gradient through into V.", "constants: the critic must not learn to move its"
                " own target")


# ---------------------------------------------------------------------------- 8 whitening


def test_exercise_08_whiten():
    # 1, 2, 3 and 5: mean 2.75, variance 2.1875
    x = t([[1, 2, 3, 100], [5, 100, 100, 100]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])

    def rows(a, b, c, d, junk=0):
        return [[a, b, c, junk], [d, junk, junk, junk]]

    pads = "counted the padding, in the mean{} (the mask is forgotten)."
    zeros = "counted the padding as zeros: divide by the number of real tokens (masked_mean)."
    left = "left numbers off the mask."
    check(ask(ppo.whiten, x, mask), rows(-1.183216, -.507093, .169031, 1.521278), [
        (rows(-1.035511, -1.014955, -.994399, -.953287), pads.format("")),
        (rows(-1.035750, -1.015189, -.994629, -.953507), pads.format(" and the variance")),
        (rows(-1.035750, -1.015189, -.994629, -.953507, .999769), pads.format(" and the variance")),
        (rows(-1.024695, -.439155, .146385, 1.317465),
         "divided the variance by n - 1, which is NaN for one token."),
        (rows(1.566784, 2.242907, 2.919031, 4.271278), "added the mean back."),
        (rows(.676123, 1.352247, 2.02837, 3.380617), "do not subtract the mean."),
        (rows(-1.75, -.75, .25, 2.25), "do not divide by the standard deviation."),
        (rows(-.8, -.342857, .114286, 1.028571), "divided by the variance, not by its root."),
        (rows(-1.224745, 0, 1.224745, 0), "take mean and variance of each row."),
        (rows(-1.183216, -.507093, .169031, 1.521278, -1.859339), left),
        (rows(-1.183216, -.507093, .169031, 1.521278, 65.753001), left),
        (rows(-.185695, .309492, .80468, 1.795055), zeros),
        (rows(-1.67332, -.717137, .239046, 2.151411), zeros),
        (rows(-.262613, .437688, 1.137989, 2.538591), zeros),
        (rows(-.203053, .338421, .879895, 1.962842), zeros),
        (rows(-.217072, .361787, .940647, 2.098366), zeros),
        (rows(-.203053, .338421, .879895, 1.962842, -.744526), zeros),
        (rows(-.217072, .361787, .940647, 2.098366, -.795932), zeros),
        (rows(-.560449, -.240192, .080064, .720577),
         "took the mean of x^2 for the variance: take the mean off before you square."),
    ], "(x - mean) / standard deviation over the mask of the whole batch, with n, and 0 elsewhere")


def test_exercise_08_small_variance():
    mask = torch.ones(1, 2)  # of floats, as in ppo.whiten_batch
    check(ask(ppo.whiten, t([[3, 3]]), mask), [[0, 0]], [
        ([[math.nan, math.nan]], "divide 0 / 0 where all are equal."),
    ], "equal numbers become 0: 1e-8 under the root")
    # variance 1e-8, and as much again under the root: 1 / sqrt 2
    check(ask(ppo.whiten, t([[1e-4, -1e-4]]), mask), [[.707107, -.707107]], [
        ([[.9999, -.9999]], "add 1e-8 to the standard deviation."),
        ([[.031607, -.031607]], "add 1e-5, which is more than 1e-8."),
    ], "1e-8 is added to the variance, under the root")


# ---------------------------------------------------------------------------- 9 clipped objective

# the sixth token is padding, and would be clipped
RATIOS, ADVANTAGES = t([[1.5, 1.5, .5], [.5, 1.1, 3]]), t([[1, -1, 2], [-1, 2, 4]])
FIVE = torch.tensor([[True, True, True], [True, True, False]])
OLD = t([[-3] * 3] * 2)
CLIP = "the mean over the real tokens of max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))"


def in_order(loss, share):
    """(loss, share), which is a constant."""
    if isinstance(share, torch.Tensor) and share.requires_grad and not loss.requires_grad:
        you("return the clip fraction first: the order is the other one.", "loss, clip fraction")
    return loss, numbers_of(share, "the loss and a share")


def policy_loss(ratios, advantages, mask, *clip_range):
    log_probs = (ratios.log() + OLD[:, : ratios.shape[1]]).requires_grad_()
    loss, share = ask(ppo.policy_loss, log_probs, OLD[:, : ratios.shape[1]], advantages, mask,
                      *clip_range, results=2)
    return log_probs, *in_order(loss, share)


def test_exercise_09_loss():
    # -1.2, 1.5, -1 and .8, -2.2: their sum is -2.1
    _, loss, _ = policy_loss(RATIOS, ADVANTAGES, FIVE)
    sign = "have the wrong sign: a loss is minimised."
    check(loss, -.42, [
        (.42, sign), (.72, sign),
        (-.72, "take the smaller of the two losses."),
        (-.54, "never clip: a lucky sample may move the policy without end."),
        (-.6, "always clip: a policy that overshot can't come back."),
        (-.48, "clip large ratios only."),
        (-.416970, "have the ratio upside down: pi / pi_old."),
        (-2.1, "take the sum over the tokens."),
        (.478042, "have no exp in it: log_probs - old_log_probs is the logarithm of the ratio."),
        (-.621082, "divided the log-probs: the ratio is exp(log_probs - old_log_probs)."),
        (-.420534, "clip the log-ratio: the ratio itself stays within 1 +- clip_range."),
        (.2, "clip the ratio around 0: it stays around 1."),
        (-.35, "divided by B T, the width, not by the number of real tokens: masked_mean."),
        (-1.15, "divided by B T, the width, and counted padding: masked_mean."),
        (-.466667, "take the mean of the row means: all tokens count the same."),
        (-1.22, "take the absolute value of the advantages: a bad action counts as a good one."),
        (.141536, "whitened the advantages: they come whitened."),
        (.276, "clip the advantages: it is the ratio that is clipped."),
        ([[-1.2, 1.5, -1], [.8, -2.2, 0]], "return one loss a token."),
    ], CLIP)


def test_exercise_09_clip_fraction():
    _, loss, share = policy_loss(RATIOS, ADVANTAGES, FIVE)
    mistakes = [
        (.8, "count every ratio outside the range."),
        (2., "return a count, not a share."),
        (1 / 3, "divide the share by B T, the width: padding is not counted."),
        (.5, "count the padding in the share."),
        (.6, "count where both are equal, too, or the padding: strictly larger, real tokens."),
    ]
    # where the loss is another one, too, nothing is known about the share
    check(share, .4, mistakes if is_like(loss, -.42) else [],
          "the share of real tokens whose clipped loss is strictly larger")


def test_exercise_09_clip_range():
    # .3: -1.3, 3, -.5 and .7, -2.2, their sum is -.3
    _, loss, share = policy_loss(RATIOS, t([[1, -2, 1], [-1, 2, 4]]), FIVE, .3)
    check(loss, -.06, [
        (-.02, "do not use clip_range: it is 0.3 here."),
        (-.14, "never clip."), (-.18, "always clip."),
        (-.061808, "clip the log-ratio: the ratio itself stays within 1 +- clip_range."),
    ], CLIP + "; clip_range .3")
    check(share, .4, otherwise="the share of real tokens whose clipped loss is strictly larger")


def test_exercise_09_mask():
    ones, mask = t([[1] * 3, [1] * 3]), torch.tensor([[True] * 3, [True, False, False]])
    _, loss, _ = policy_loss(ones, -t([[1, 2, 3], [4, 50, 50]]), mask)
    check(loss, 2.5, [
        (110 / 6, "divided by B T, the width, and counted padding: masked_mean."),
        (10 / 6, "divided by B T, the width, not by the number of real tokens: masked_mean."),
        (3., "take the mean of the row means: all tokens count the same."),
    ], "the mean over the four real tokens")


def test_exercise_09_gradient():
    log_probs, loss, _ = policy_loss(RATIOS, ADVANTAGES, FIVE)
    # -A rho / 5 where the plain loss is the larger one, 0 where the clipped one is
    check(gradient(loss, log_probs), [[0, .3, -.2], [0, -.44, 0]], [
        ([[-.3, .3, -.2], [.1, -.44, 0]], "never clip."),
        ([[0, 0, 0], [0, -.44, 0]], "always clip: a policy that overshot can't come back."),
        ([[0] * 3] * 2, "let no gradient through the ratio."),
    ], "the gradient is -A rho / tokens, and 0 where the clip holds")


# ---------------------------------------------------------------------------- 10 value loss

# the fourth token is padding, and would be clipped
VALUES, OLD_VALUES = t([[1.5, 1.1], [.5, 3]]), t([[1, 1], [1, 0]])
TARGETS, THREE = t([[2, 2], [2, 3]]), torch.tensor([[True, True], [True, False]])
ERRORS = "half the mean over the real tokens of max((V - R)^2, (clip(V, old +- clip_range) - R)^2)"
NEVER = "never clip, or clip around the returns: around the old values."


def value_loss(*clip_range):
    values = VALUES.clone().requires_grad_()
    loss, share = ask(ppo.value_loss, values, OLD_VALUES, TARGETS, THREE, *clip_range, results=2)
    return values, *in_order(loss, share)


def test_exercise_10_loss():
    # clipped to 1 +- .2: 1.2, 1.1, .8; the larger squared errors are .64, .81, 2.25
    _, loss, _ = value_loss()
    check(loss, .616667, [
        (1.233333, "left out the 1/2."),
        (.416667, "take the smaller error."),
        (.551667, NEVER),
        (.481667, "always clip: take the larger of the two errors."),
        (1.85, "take the sum over the tokens."), (5.77, "take the sum over the tokens."),
        (.4625, "divided by B T, the width, not by the number of real tokens: masked_mean."),
        (1.4425, "divided by B T, the width, and counted padding: masked_mean."),
        (.74375, "take the mean of the row means: all tokens count the same."),
        ([[.32, .405], [1.125, 0]], "return one loss a token."),
        (1.033333, "took the sum of the two errors: the larger one of them counts."),
        (.963333, "put the 1/2 on one of the two errors, inside the maximum."),
        (1.126667, "put the 1/2 on one of the two errors, inside the maximum."),
        (.533333, "took absolute errors: they are squared."),
        (.2875, "took the Huber loss (smooth_l1): the errors are squared."),
        (1.62, "clip V itself to +- clip_range: it stays around the old value."),
        (1.948333, "clip the change of V, and leave out the old value: old + clip(V - old)."),
        (.623333, "clip the old value around V: it is V that is held near the old value."),
    ], ERRORS)


STRICTLY = "the share of real tokens whose clipped error is strictly larger"


def test_exercise_10_clip_fraction():
    # old 1, returns 2, six tokens: 1.5 is held at 1.2, which is worse; .5 and .6 at .8, which is
    # better; the others are not held. Squared: .64, 2.25, 1.96, .81, 1, 1.21, their sum is 7.87
    values, ones = t([[1.5, .5, .6, 1.1, 1, .9]]), t([[1] * 6])
    loss, share = ask(ppo.value_loss, values, ones, 2 * ones, ones, results=2)
    mistakes = [
        (3 / 6, "count every value outside the range."),
        (4 / 6, "count where both errors are equal, too."),
        (1., "return a count, not a share."),
    ]
    known = is_like(loss, 7.87 / 12)  # else the share is that of another loss
    check(share, 1 / 6, mistakes if known else [], STRICTLY)


def test_exercise_10_clip_fraction_of_real_tokens():
    _, loss, share = value_loss()
    mistakes = [
        (1., "return a count, not a share."),
        (.25, "divide the share by B T, the width: padding is not counted."),
        (.5, "count the padding in the share."),
    ]
    check(share, 1 / 3, mistakes if is_like(loss, .616667) else [], STRICTLY)


def test_exercise_10_clip_range():
    # clipped to 1 +- .4: 1.4, 1.1, .6; the larger squared errors are .36, .81, 2.25
    _, loss, _ = value_loss(.4)
    check(loss, .57, [(.616667, "do not use clip_range: it is 0.4 here."),
                      (1.14, "left out the 1/2."), (.551667, NEVER)], ERRORS + "; clip_range .4")


def test_exercise_10_around_the_old_value():
    # V 1, old .5, return 1: clipped to .7, error .09
    one = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = ask(ppo.value_loss, t([[1]]), t([[.5]]), t([[1]]), one, results=2)
    check(loss, .045, [(0., "take the smaller error, or never clip, or clip around the returns."),
                       (.09, "left out the 1/2."),
                       (.08, "clip to a share of the old value, .4 to .6.")],
          "clip(V, old - .2, old + .2)")


def test_exercise_10_mask():
    zeros, mask = t([[0] * 4] * 2), t([[1, 1, 1, 0], [1, 0, 0, 0]]) == 1
    returns = t([[1, 2, 3, 50], [4, 50, 50, 50]])
    loss, _ = ask(ppo.value_loss, zeros, zeros, returns, mask, results=2)
    check(loss, 3.75, [
        (1.875, "divided by B T, the width, not by the number of real tokens: masked_mean."),
        (5.166667, "take the mean of the row means: all tokens count the same."),
        (626.875, "counted the padding."),
    ], "half the mean of 1, 4, 9 and 16")


def test_exercise_10_gradient():
    values, loss, _ = value_loss()
    # (V - R) / 3 where the plain error is the larger one, 0 where the clipped one is
    check(gradient(loss, values), [[0, -.3], [-.5, 0]], [
        ([[-.166667, -.3], [-.5, 0]], NEVER), ([[0, -.3], [0, 0]], "always clip."),
        ([[0, -.6], [-1, 0]], "left out the 1/2."),
    ], "the gradient is (V - R) / tokens, and 0 where the clip holds")


# ---------------------------------------------------------------------------- 11 both orders


def judge_by(verdict):
    """A judge that asks verdict(post, a, b), post by post, in whatever order it is called."""
    return lambda posts, a, b: [verdict(*three) for three in zip(posts, a, b)]


def listed(result):
    if not isinstance(result, (list, tuple, torch.Tensor)):
        you(f"return a {type(result).__name__}.", "a list, or several results")
    return list(result)


def pairwise(*arguments):
    return listed(ask(judge.judge_pairwise, *arguments, results=0))


def refuses(arguments, what, expected):
    """judge_pairwise has to raise ValueError."""
    outcomes, error = call(judge.judge_pairwise, *arguments)
    if isinstance(error, NotImplementedError):
        fail(f"{error} (still blank)")
    if error is None:
        you(f"return {outcomes}: {what}", expected)
    if not isinstance(error, ValueError):
        you(f"{stopped(judge.judge_pairwise, error)}; {what}", expected)


def test_exercise_11_a_judge_that_looks_at_the_place():
    # always A; but of the third pair it knows the better one
    outcomes = pairwise(judge_by(lambda post, a, b: "B" if post == "q" and a == "bad" else "A"),
                        ["p", "p", "q"], ["x", "x", "good"], ["y", "y", "bad"])
    check(outcomes, [.5, .5, 1], [
        ([1, 1, 1], "let a judge that always says A make us win: the first order alone counts, or "
         "one win is enough, so there is no tie."),
        ([1, 1, .5], "did not turn the second order round: a B there is a vote for us."),
        ([1, 1, 2], "did not halve the points of the two orders."),
        ([0, 0, 1], "call a contradiction a loss: there is no tie."),
        ([0, 0, 0], "call a contradiction a loss, and exchanged ours and theirs."),
        ([.5, .5, 0], "exchanged ours and theirs."),
    ], "half a win, a tie: it said A in both orders, once for each side; and 1 for the third pair")


def test_exercise_11_the_longer_one():
    longer = judge_by(lambda _, a, b: "A" if len(a) >= len(b) else "B")
    outcomes = pairwise(longer, ["p"] * 3, ["xxx", "x", "x"], ["y", "yyy", "y"])
    check(outcomes, [1, 0, .5], [
        ([.5, .5, 1], "did not turn the second order round: a B there is a vote for us."),
        ([.5, .5, .5], "asked twice in the same order."),
        ([1, 0, 1], "let only the first order count, or make of a tie a win."),
        ([0, 1, .5], "exchanged ours and theirs."),
        ([1, 0, 0], "make of a tie a loss."),
        ([2, 0, 1], "did not halve the points of the two orders."),
        ([.5, 0, 1], "turned the lists round: the summaries change places, the pairs do not."),
    ], "1 for the longer one, 0 for the shorter one, .5 where both are as long")


def test_exercise_11_each_post_with_its_own_summaries():
    on_topic = judge_by(lambda post, a, b: "A" if post in a else "B")
    outcomes = pairwise(on_topic, ["cat", "dog"], ["a cat", "a cow"], ["a cow", "a dog"])
    check(outcomes, [1, 0], otherwise="each post goes to the judge with its own two summaries")


def test_exercise_11_abstentions():
    said = {"x1": None, "y1": "B", "x2": "A", "y2": None, "x3": "A", "y3": "B"}  # by who is first
    outcomes = pairwise(judge_by(lambda _, a, b: said[a]), ["p"] * 3, ["x1", "x2", "x3"],
                        ["y1", "y2", "y3"])
    if outcomes[:2] != [None, None] or len(outcomes) != 3:
        you(f"return {outcomes}, where the judge abstains in one order of the first pair, and in "
            "the other order of the second.", "[None, None, 1.0]: neither a tie nor a loss")
    check(outcomes[2:], [1], [([2], "did not halve the points of the two orders.")],
          "the third pair is a win")


def test_exercise_11_two_calls():
    calls = []

    def judge_of(posts, a, b):
        calls.append(len(posts))
        return ["A"] * len(posts)

    pairwise(judge_of, ["p"] * 3, ["x"] * 3, ["y"] * 3)
    if len(calls) > 2:
        you(f"ask the judge {len(calls)} times about 3 pairs.",
            "one call for each order, with the whole lists: a network judges them in batches")


def test_exercise_11_answers_in_prose():
    def prose(first):  # in the order in which this summary stands first
        return judge_by(lambda _, a, b: "Answer: B" if a == first else "A")

    refuses([prose("x"), ["p"], ["x"], ["y"]], "'Answer: B' is no verdict.",
            "a ValueError: nothing is guessed")
    refuses([judge_by(lambda *_: "a"), ["p"], ["x"], ["y"]], "'a' is no verdict, 'A' is one.",
            "a ValueError: nothing is guessed")
    refuses([prose("y"), ["p"], ["x"], ["y"]], "'Answer: B' is no verdict in the second order, "
            "either.", "a ValueError: both orders are looked at")


def test_exercise_11_unequal_lists():
    refuses([judge_by(lambda *_: "A"), ["p", "q"], ["x"], ["y"]],
            "there are two posts and one pair of summaries.", "a ValueError: nothing is dropped")


# ---------------------------------------------------------------------------- 12 interval


def interval(*arguments):
    return listed(ask(judge.wilson_interval, *arguments, results=0))


def test_exercise_12_interval():
    check(interval(60 / 90, 90), [.564223, .755465], [
        ([.569275, .764058], "took the share +- z standard errors of the share."),
        ([.615385, .714286], "took one standard error, which is no 95 %: z = 1.96."),
        ([.000971, .054173], "took the share for a count: it is divided by n already."),
        ([.571046, .762288], "have the share at the centre: Wilson's is nearer to one half."),
        ([.566439, .753249], "left out z^2 / (4 n^2) under the root."),
        ([.755465, .564223], "have them in the wrong order."),
        ([.659844, .095621], "return the centre and half of the width."),
        ([.560142, .759546], "did not divide half of the width by 1 + z^2 / n."),
        ([.611057, .708631], "left out the z before the root."),
        ([.472431, .847258], "squared the z before the root."),
        ([.554198, .745440], "forgot to square z in the centre: z^2 / (2 n)."),
        ([.565302, .754386], "forgot to square z under the root: z^2 / (4 n^2)."),
        ([.575767, .770922], "forgot to square z in the denominator: 1 + z^2 / n."),
        ([.566638, .759591], "forgot to square z, everywhere."),
        ([.444372, .875316], "forgot to square n under the root: z^2 / (4 n^2)."),
        ([.543755, .734997], "left out z^2 / (2 n) in the centre."),
        ([.563990, .755698], "took the interval of Agresti and Coull, which is a little wider."),
        ([56.422318, 75.546494], "return percentages."),
    ], "(low, high), Wilson's interval of 60 among 90")


def test_exercise_12_z():
    # a share of 5/16, with a tie in it: the centre is (5/16 + 1/16) / (9/8) = 1/3, half .155902
    check(interval(5 / 16, 8, 1.0), [.177432, .489235], [
        ([.102408, .644245], "do not use z: it is 1 here."),
    ], "one standard error for z = 1, and any share: ties are halves")


def test_exercise_12_edges():
    check(interval(0., 10), [0, .277533], [
        ([0, 0], "took the share +- z standard errors: none of 10 is not surely none.")],
        "0 among 10: [0, z^2 / (n + z^2)]")
    check(interval(1., 10), [.722467, 1], otherwise="10 among 10")
    check(interval(math.nan, 0), [math.nan] * 2, [
        ([0, 0], "return 0 for nothing asked: NaN."), ([0, 1], "return [0, 1] for nothing: NaN."),
    ], "NaN, NaN: nothing is known")
