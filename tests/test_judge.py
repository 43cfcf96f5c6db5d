"""judge.py on paper: both orders, win rates, length control, best of n, and a run's win rates."""

import dataclasses
import math
import random
import re
import runpy
from functools import partial

import pytest
import torch

import judge
import toy
from judge import (best_of_n, best_of_n_kl, judge_pairwise, length_controlled_win_rate, make_judge,
                   quality_judge, reward_model_judge, wilson_interval, win_rate)
from test_reward import BY_TOKEN, table_reward

NAN = math.nan


def always(*verdicts):
    """A judge that gives these verdicts, whatever it is shown."""
    return lambda posts, a, b: list(verdicts)


def in_turn(first, second):
    """A judge with prepared answers: first when asked about ours, theirs; second the next time."""
    answers = iter([first, second])
    return lambda posts, a, b: next(answers)


def some_posts(n):
    return [{"subreddit": "tifu", "title": f"T{i}", "post": f"post {i}"} for i in range(n)]


# ---------------------------------------------------------------------------- both orders


def test_the_pairs_of_item_53_and_all_others():
    #            asked (ours, theirs)          asked (theirs, ours)
    first = ["A", "A", "B", "B", None, "A", "B", None, None]
    second = ["B", "A", "A", "B", "B", None, None, "A", None]
    # ours twice; the first place twice; theirs twice; the second place twice; abstained
    expected = [1.0, 0.5, 0.0, 0.5, None, None, None, None, None]
    outcomes = judge_pairwise(in_turn(first, second), some_posts(9), ["x"] * 9, ["y"] * 9)
    assert outcomes[0:4:2] == [1.0, 0.0], (
        "ours is A in the first order and B in the second one: is the second order turned round?")
    assert outcomes[1:4:2] == [0.5, 0.5], "the first place, or the second, twice: both orders count"
    assert outcomes == expected, "to abstain in one order is to abstain: None, not a tie"


def test_each_order_is_one_call_with_all_pairs():
    calls, posts, ours, theirs = [], some_posts(2), ["x", "y"], ["z", "w"]
    judge_pairwise(lambda *asked: calls.append(asked) or ["A", "A"], posts, ours, theirs)
    assert calls == [(posts, ours, theirs), (posts, theirs, ours)]
    assert judge_pairwise(always(), [], [], []) == []


@pytest.mark.parametrize("verdicts, said", [
    *((["A", wrong], re.escape(repr(wrong))) for wrong in (
        "a", "C", "", " A", "A.", "Answer: A", "tie", 1, True, 0.5, NAN, False, ["A"], ("A", "B"))),
    *((["A"] * number, f"not 2 x .* {number}") for number in (0, 1, 3))])
def test_a_verdict_that_is_none_of_the_three_and_a_wrong_number_of_verdicts(verdicts, said):
    for answers in ((verdicts, ["A", "B"]), (["A", "B"], verdicts)):  # in either order
        with pytest.raises(ValueError, match=said):
            judge_pairwise(in_turn(*answers), some_posts(2), ["x", "y"], ["z", "w"])


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 3, 3), (0, 1, 1)])
def test_unequal_numbers_of_items(sizes):
    posts, ours, theirs = sizes
    for verdicts in (posts, ours, theirs):  # the judge's answer does not decide on it
        with pytest.raises(ValueError, match=f"{posts} posts, {ours} ours and {theirs} theirs"):
            judge_pairwise(always(*"A" * verdicts), some_posts(posts), ["x"] * ours, ["y"] * theirs)


# ---------------------------------------------------------------------------- counting


def outcomes_of(wins=0, losses=0, ties=0, abstentions=0):
    return [1.0] * wins + [0.0] * losses + [0.5] * ties + [None] * abstentions


@pytest.mark.parametrize("counts, rates, interval", [
    # checklist item 51: (60 + 10/2) / 100, 60 / 90, 90 / 100
    ((60, 30, 10, 0), (0.65, 0.666667, 0.9), (0.552544, 0.736358)),
    # (6 + 2/2) / 11, 6 / 9, 9 / 16; 11 answered. z^2 = 3.841459: center (.636364 + 3.841459/22) /
    # (1 + 3.841459/11) = .601068, half 1.959964/1.349224 * sqrt(.636364*.363636/11 + 3.841459/484)
    ((6, 3, 2, 5), (0.636364, 0.666667, 0.5625), (0.353801, 0.848335)),
    # a rate over nothing is NaN
    ((0, 0, 0, 0), (NAN, NAN, NAN), (NAN, NAN)), ((0, 0, 0, 3), (NAN, NAN, 0), (NAN, NAN)),
    ((0, 0, 4, 0), (0.5, NAN, 0), (0.150039, 0.849961)),
    # item 52, then .8 + 1.96 * sqrt(.8 * .2 / 10) would be 1.048; 3.841459 / (10 + 3.841459), where
    # the plain interval is a point, and its mirror image; 1 / (1 + 3.841459)
    ((60, 30, 0, 90), (0.666667, 0.666667, 0.5), (0.564223, 0.755465)),
    ((8, 2, 0, 0), (0.8, 0.8, 1), (0.490162, 0.943318)), ((0, 10, 0, 0), (0, 0, 1), (0, 0.277533)),
    ((10, 0, 0, 0), (1, 1, 1), (0.722467, 1)), ((1, 0, 0, 0), (1, 1, 1), (0.206549, 1))])
def test_wins_losses_ties_and_abstentions(counts, rates, interval):
    outcomes = outcomes_of(*counts)
    random.Random(0).shuffle(outcomes)
    result = win_rate(outcomes)
    assert dataclasses.astuple(result)[:5] == (*counts, sum(counts))
    found = result.win_rate, result.conditional_win_rate, result.decision_rate
    assert found == pytest.approx(rates, abs=1e-6, nan_ok=True), (
        "a tie is half a win, an abstention neither a loss nor a tie")
    assert (result.low, result.high) == pytest.approx(interval, abs=1e-6, nan_ok=True), (
        "Wilson's 95 % interval among the answered posts: two orders of a pair are one sample")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.wins = 61


def test_the_interval_stays_inside_and_solves_its_equation():
    for n in (1, 3, 7, 30, 1001):
        for share in (0.0, 0.5 / n, 1.0):
            low, high = wilson_interval(share, n)
            assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1, "rounding, an interval"
            for p in (low, high):
                assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)


# ---------------------------------------------------------------------------- length, appendix F


def simulate(a, b, n, mean, seed=0):
    """Outcomes from P(win) = sigmoid(a + b * log ratio), with the log ratios around mean."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio = mean + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
    theirs = 20 + 30 * torch.rand(n, generator=generator, dtype=torch.float64)
    wins = torch.bernoulli(torch.sigmoid(a + b * log_ratio), generator=generator)
    return wins.tolist(), (theirs * log_ratio.exp()).tolist(), theirs.tolist()


@pytest.mark.parametrize("a, b, mean, plain, controlled, tolerance", [
    # sigmoid(.4 +- .05) = [.586618, .610639]. At log ratio .3 it is sigmoid(.85) = .700567, with
    # the spread of .4 around that about sigmoid(.85 / sqrt(1 + pi / 8 * (1.5 * .4)^2)) = .689
    (0.4, 1.5, 0.3, 0.689, 0.598688, 0.012),  # checklist item 54
    # what comes from length alone vanishes: sigmoid(+-.8 / sqrt(1 + pi / 8 * .64)) = .675, .325
    (0.0, 2.0, 0.4, 0.675, 0.5, 0.02), (0.0, 2.0, -0.4, 0.325, 0.5, 0.02),
    (1.0, 0.0, 0.4, 0.731059, 0.731059, 0.015)])  # sigmoid(1): nothing to do with length, it stays
def test_the_regression_finds_the_weights_that_were_drawn_from(
        a, b, mean, plain, controlled, tolerance):
    outcomes, ours, theirs = simulate(a, b, 20_000, mean)
    assert win_rate(outcomes).win_rate == pytest.approx(plain, abs=0.01)
    found = length_controlled_win_rate(outcomes, ours, theirs)
    assert found == pytest.approx(controlled, abs=tolerance)
    if b == 1.5:  # it is right as well: at twice our length, equal is log 2 further to the left
        moved = length_controlled_win_rate(outcomes, [2 * x for x in ours], theirs)
        assert (math.log(moved / (1 - moved)) - a) / -math.log(2) == pytest.approx(b, abs=0.1)


def test_two_lengths_are_solved_by_hand():
    """With two ratios the two weights fit both shares exactly: a + b * log 2 = logit(900/1000) and
    a - b * log 2 = logit(600/1000), so a = (2.197225 + .405465) / 2 and sigmoid(a) = .786057."""
    outcomes = outcomes_of(900, 100) + outcomes_of(600, 400)
    ours, theirs = [20.0] * 1000 + [10.0] * 1000, [10.0] * 1000 + [20.0] * 1000
    assert length_controlled_win_rate(outcomes, ours, theirs) == pytest.approx(0.786057, abs=1e-5)
    # 70 + 20/2 of 100 at equal lengths: nothing to control
    outcomes = outcomes_of(70, 10, 20, 50)
    equal = length_controlled_win_rate(outcomes, [7] * 150, [7] * 150)
    assert equal == pytest.approx(0.8, abs=1e-6)


def test_what_the_regression_counts_and_what_does_not_matter():
    outcomes, ours, theirs = simulate(0.4, 1.5, 300, 0.3)
    expected = length_controlled_win_rate(outcomes, ours, theirs)
    # one tie twice = a win and a loss at the same lengths
    both = length_controlled_win_rate(outcomes + [1.0, 0.0], ours + [9, 9], theirs + [3, 3])
    ties = length_controlled_win_rate(outcomes + [0.5, 0.5], ours + [9, 9], theirs + [3, 3])
    assert ties == pytest.approx(both, abs=1e-12) and ties != pytest.approx(expected, abs=1e-6)
    silent = length_controlled_win_rate([None] * 9 + outcomes, [50] * 9 + ours, [1] * 9 + theirs)
    assert silent == pytest.approx(expected, abs=1e-12), "an abstention counts for nothing"
    scaled = length_controlled_win_rate(outcomes, [5 * x for x in ours], [5 * x for x in theirs])
    assert scaled == pytest.approx(expected, abs=1e-9), "the unit of length"
    other = length_controlled_win_rate([1 - x for x in outcomes], theirs, ours)
    assert other == pytest.approx(1 - expected, abs=1e-9), "who is called ours"


def test_separable_outcomes_stay_finite():
    n = 200
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (1 + 50 * torch.rand(2, n, generator=generator, dtype=torch.float64)).tolist()
    longest = [float(x > y) for x, y in zip(ours, theirs)]
    # decided by length alone: at equal lengths nobody wins more often
    assert length_controlled_win_rate(longest, ours, theirs) == pytest.approx(0.5, abs=0.2)
    assert length_controlled_win_rate([1.0] * n, ours, theirs) > 0.99
    assert length_controlled_win_rate([0.0] * n, ours, theirs) < 0.01
    for outcome in (1.0, 0.5, 0.0):  # one answer, a billion times longer and yet beaten
        for ratio in (2, 1e-6, 1e9):
            assert 0 <= length_controlled_win_rate([outcome], [ratio], [1]) <= 1
    # Nearly separable: 2 ties at a log ratio of -.1, 500 losses at .8 and 500 at 2.9. Full Newton
    # steps run away to sigmoid(1e6) = 1; the minimum is at a = -1.126329, sigmoid(a) = .244839.
    outcomes = outcomes_of(losses=1000, ties=2)
    lengths = [math.exp(x) for x in [0.8] * 500 + [2.9] * 500 + [-0.1] * 2]
    edge = length_controlled_win_rate(outcomes, lengths, [1.0] * 1002)
    assert edge == pytest.approx(0.244839, abs=1e-5)
    assert math.isnan(length_controlled_win_rate([], [], []))
    assert math.isnan(length_controlled_win_rate([None], [3], [4]))


@pytest.mark.parametrize("ours, theirs", [
    ([0, 1], [1, 1]), ([1, 1], [1, 0]), ([-2, 1], [1, 1]), ([1, 1], [NAN, 1]),
    ([math.inf, 1], [1, 1]), ([1], [1, 1]), ([1, 1], [1]), ([1], [1]), ([1, 1, 1], [1, 1, 1])])
def test_outcomes_and_lengths_that_are_none(ours, theirs):
    for outcomes in ([1.0, 0.0], [None, None]):
        with pytest.raises(ValueError, match="our_lengths and their_lengths"):
            length_controlled_win_rate(outcomes, ours, theirs)
    for wrong in (0.75, 2, -1.0, "A", "1.0", NAN):
        for count in (win_rate, lambda outcomes: length_controlled_win_rate(outcomes, [1], [1])):
            with pytest.raises(ValueError, match="outcome"):
                count([wrong])


# ---------------------------------------------------------------------------- best of n, scores


def test_best_of_n_kl_of_item_48():
    for n, kl in ((1, 0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (2048, 6.625107)):
        assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)
    for n in (0, -1, 0.5):
        with pytest.raises(ValueError, match="n must be"):
            best_of_n_kl(n)


def test_best_of_n_takes_the_best_by_score():
    written, samples = [], ["a", "bbb", "bb", "c", "cccc", "cc"]
    best = best_of_n(lambda *asked: written.append(asked) or samples,
                     lambda posts, texts: list(map(len, texts)), "model", ["p", "q"], 3)
    assert best == ["bbb", "cccc"]
    assert written == [("model", ["p"] * 3 + ["q"] * 3, 0.7, "best of n")]  # T = 0.7: G.3


def test_quality_judge():
    posts = [{"post": "cat"}, {"post": "dog"}, {"post": "cow"}, {"post": "emu"}]
    taste = quality_judge(lambda post, summary: float(post["post"] in summary))
    ours = ["a cat", "a cat", "a cow", "one emu"]
    theirs = ["a dog", "a dog", "a cow", "two emu"]
    # mentions its post; the other one does; equal summaries; unequal ones of equal quality
    assert taste(posts, ours, theirs) == ["A", "B", "A", "A"]
    assert taste(posts, theirs, ours) == ["B", "A", "A", "A"]
    assert judge_pairwise(taste, posts, ours, theirs) == [1.0, 0.0, 0.5, 0.5]
    calls = []
    reader = reward_model_judge(lambda *asked: calls.append(asked) or list(map(len, asked[1])))
    assert reader(["p", "q"], ["aa", "b"], ["a", "bb"]) == ["A", "B"], "whole batches are scored"
    assert sorted(calls) == [(["p", "q"], ["a", "bb"]), (["p", "q"], ["aa", "b"])]


def test_reward_model_judge_without_a_score():
    """A NaN compares as False with everything: it must not read as a preference or a tie."""
    scores = {"x": NAN, "y": 1.0, "z": NAN}
    reader = reward_model_judge(lambda posts, summaries: [scores[s] for s in summaries])
    posts = some_posts(4)
    assert judge_pairwise(reader, posts, list("xyxx"), list("yxzx")) == [None, None, None, 0.5]
    for short in (lambda posts, summaries: [1.0], lambda posts, summaries: [1.0] * 3):
        with pytest.raises(ValueError):
            reward_model_judge(short)(posts[:2], ["x", "y"], ["y", "x"])


POSTS = toy.make_posts(2, 0)
IDEALS, REFERENCES = list(map(toy.ideal_summary, POSTS)), [post["summary"] for post in POSTS]


@pytest.mark.parametrize("name, posts, ours, theirs, expected", [
    ("longest", some_posts(3), ["aaa", "bb", "cccc"], ["a", "b", "ccc"], [1.0] * 3),
    ("longest", some_posts(3), ["aa", "b", "c"], ["a b", "b", "ccc"], [0.0, 0.5, 0.0]),
    ("labeler", POSTS, IDEALS, REFERENCES, [1.0, 1.0]),
    ("labeler", POSTS, [REFERENCES[0], "Nonsense."], [IDEALS[0], ""], [0.0, 0.0]),
    ("reward_model", some_posts(4), list("abcd"), list("bbba"), [0.0, 0.5, 1.0, 1.0]),
])
def test_make_judge(name, posts, ours, theirs, expected):
    """Either side may be ours: an un-swap mistake turns 1.0 into 0.0 or 0.5."""
    assert name in judge.JUDGES and len(judge.JUDGES) == 3
    asked = make_judge(name, lambda posts, summaries: list(map(ord, summaries)))
    assert judge_pairwise(asked, posts, ours, theirs) == expected
    assert judge_pairwise(asked, posts, theirs, ours) == [1 - x for x in expected]


# ---------------------------------------------------------------------------- a run's win rates


def spied_ask():
    """ask(posts, ours, theirs) of the ruler, and what it was asked."""
    asked = []
    ask = partial(judge.judged, make_judge("longest", None), "longest")
    return lambda *arguments: asked.append(arguments) or ask(*arguments), asked


def test_judged_is_one_entry_of_the_results_and_the_outcomes():
    ask, _ = spied_ask()
    entry, outcomes = ask(some_posts(4), ["a b c", "a b", "a", "a b"], ["a", "b", "a b c d", "c d"])
    assert outcomes == [1.0, 1.0, 0.0, 0.5]
    assert (entry["n"], entry["judge"], entry["total"]) == (4, "longest", 4)
    assert entry["win_rate"] == pytest.approx(2.5 / 4)
    assert (entry["low"], entry["high"]) == wilson_interval(2.5 / 4, 4)
    assert (entry["mean_length"], entry["mean_length_other"]) == (2.0, 2.0)  # words
    # lengths in characters, and one more, since log("") is none: 6 : 2, 4 : 2, 2 : 8, 4 : 4
    assert entry["length_controlled"] == length_controlled_win_rate(
        outcomes, [6, 4, 2, 4], [2, 2, 8, 4])
    assert ask(["p"], ["a"], [""])[1] == [1.0]
    entry, outcomes = judge.judged(always("A", None), "mute", some_posts(2), ["a"] * 2, ["b"] * 2)
    assert (entry["n"], entry["abstentions"], outcomes) == (1, 1, [0.5, None])


def test_who_agrees_with_the_labels(capsys):
    ask, asked = spied_ask()
    rows = [{"post": {"post": "p"}, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in (("longer", "ok"), ("ok", "longer"), ("longer", "ok"))]
    results = judge.judge_the_judge(ask, rows)
    assert results["judge_agreement"]["win_rate"] == pytest.approx(2 / 3)
    assert "judge longest: agrees with 0.667" in capsys.readouterr().out
    judge.judge_the_judge(ask, rows * 4, 5)  # every second of the 12
    assert asked[1][1] == ["longer", "longer", "ok"] * 2


def test_win_rates_during_a_run():
    ask, asked = spied_ask()
    lines = []

    def log(stage, step, **metrics):
        lines.append({"stage": stage, "step": step, **metrics})

    posts = [{"post": "p", "summary": "two words"}, {"post": "q", "summary": "one"}]
    ours, sft = ["three words here", "zero"], ["three words, here", "o", "of a third post"]
    judge.judge_during(log, 7, ask, posts, ours, sft)
    (line,) = lines
    assert (line["stage"], line["step"], line["judge"]) == ("judge", 7, "longest")
    assert line["length"] == 2.0 and "true_quality" not in line
    assert (line["vs_reference_win_rate"], line["vs_sft_win_rate"]) == (1.0, 0.5)
    assert (line["vs_sft_low"], line["vs_sft_high"]) == wilson_interval(0.5, 2)
    assert line["vs_sft_n"] == 2 and asked[1][2] == sft[:2], "of these posts only"
    judge.judge_during(log, 8, ask, POSTS, IDEALS, sft)
    assert lines[1]["true_quality"] == 5.0  # the labeler's highest


def test_every_policy_against_the_references_and_what_is_said_of_it():
    ask, asked = spied_ask()
    posts = [{"subreddit": "s", "title": "t", "post": post, "summary": text, "secret": 1}
             for post, text in (("p", "ref 1"), ("q", "r e f"))]
    sft, ppo, best = ["sft", "sft sft"], ["ppo ppo", "ppo ppo"], ["best of n"]
    results, outcomes = judge.compare_summaries(ask, posts, sft, ppo, best)
    references = ["ref 1", "r e f"]
    assert asked == [(posts, sft, references), (posts, ppo, references), (posts, ppo, sft),
                     (posts[:1], best, references[:1])]
    assert outcomes == {"sft_vs_reference": [0.0, 1.0], "ppo_vs_reference": [1.0, 1.0],
                        "ppo_vs_sft": [1.0, 0.5], "best_of_n_vs_reference": [1.0]}
    assert results.keys() == outcomes.keys() and results["ppo_vs_sft"]["win_rate"] == 0.75
    header, *table = judge.win_rate_table(results)
    # Wilson at 1 of 2: .5 +- .5 / sqrt(1 + 2 / 3.841459) = .5 +- .405469
    assert header == judge.HEADER and table[0] == (
        "SFT against reference", "0.500", "0.095 - 0.905", "2", "1.5 / 2.5")
    assert [row[0].split()[0] for row in table] == ["SFT", "PPO", "PPO", "best-of-n"]

    samples = judge.describe_samples(
        results, outcomes, posts, sft, ppo, lambda posts, texts: [len(text) / 4 for text in texts])
    assert samples == [
        {"post": {"subreddit": "s", "title": "t", "post": "p"}, "reference": "ref 1", "sft": "sft",
         "ppo": "ppo ppo", "reward_sft": 0.75, "reward_ppo": 1.75, "ppo_vs_reference": 1.0,
         "ppo_vs_sft": 1.0, "judge": "longest"},
        {"post": {"subreddit": "s", "title": "t", "post": "q"}, "reference": "r e f",
         "sft": "sft sft", "ppo": "ppo ppo", "reward_sft": 1.75, "reward_ppo": 1.75,
         "ppo_vs_reference": 1.0, "ppo_vs_sft": 0.5, "judge": "longest"}]
    means = {"reward_sft": 1.25, "reward_ppo": 1.75, "mean_length_sft": 1.5, "mean_length_ppo": 2.0,
             "mean_length_reference": 2.5}
    assert {key: value for key, value in results.items() if key not in outcomes} == means

    results, _ = judge.compare_summaries(ask, POSTS, sft, ppo, best)
    assert results.keys() == {*outcomes, "ideal_vs_reference"} and asked[-1][1] == IDEALS
    assert judge.win_rate_table(results)[-1][0] == "the ideal against reference"


# ---------------------------------------------------------------------------- the reward model


def test_length_and_post_blind_baselines():
    # longer chosen, shorter chosen, equal: (1 + 0 + 1/2) / 3
    pairs = [([1], [2, 3, 9], [2, 9]), ([1], [9], [2, 9]), ([1], [4, 9], [2, 9])]
    assert judge.length_accuracy(pairs) == pytest.approx(0.5), "equal lengths count half"
    seven_wins = [([1], [7, 9], [2, 9]), ([4], [3, 7, 9], [3, 5, 9])] * 20
    assert judge.post_blind_accuracy(seven_wins, seven_wins[:2], 12) == 1.0
    post_decides = [([1], [7, 9], [2, 9]), ([4], [2, 9], [7, 9])] * 20  # form says nothing
    assert judge.post_blind_accuracy(post_decides, post_decides, 12) <= 0.5
    assert judge.count_tokens([([1], [2, 2, 3], [3, 1])], 4).tolist() == [
        [0, -1, 2, 0, pytest.approx(0.1)]], "a tenth of the difference in length"


def test_what_is_measured_of_the_reward_model(capsys):
    class Ten(list):
        pad_token_id = 0

    model, tokenizer = table_reward(BY_TOKEN), Ten(range(10))
    # scores at the last token: 2 > 1; 3 = 3, no hit; 1 < 8; 8 > 4. Lengths: longer, equal, longer,
    # shorter
    held_out = [([5], [1, 2], [1]), ([5, 6], [3], [3]), ([5], [1, 1, 1], [8]), ([5], [8], [3, 4])]
    warned, rows = [], [{}] * 4
    results = judge.measure_reward_model(model, None, held_out, rows, tokenizer, warned.append, 3)
    expected = {"reward_accuracy": 0.5, "reward_accuracy_longest_wins": 0.625,
                "reward_accuracy_n": 4}
    assert results == expected
    assert "accuracy 0.500 on 4 held-out comparisons, pick-the-longer 0.625" in (
        capsys.readouterr().out)
    assert len(warned) == 1 and "no better than chance, 0.500 on 4 held-out" in warned[0]
    # 8 of 10 has an interval that begins at .490162, 80 of 100 one that begins at .71
    for n, warnings in ((2, 2), (20, 2)):
        some = (held_out[:1] * 4 + held_out[2:3]) * n
        judge.measure_reward_model(model, None, some, [{}] * 5 * n, tokenizer, warned.append)
        assert len(warned) == warnings
    # the taste: of the three pairs that differ in it the first is scored as it says, and one label
    # is not. The ceiling: sigmoid(1) = .731059 and sigmoid(2) = .880797
    rows = [{"gap": gap, "log_odds": odds} for gap, odds in ((1, 1), (2, -2), (0, 1), (-.5, -2))]
    pairs = [(query, worse, better) for query, better, worse in held_out]  # others than held out
    results = judge.measure_reward_model(model, pairs, held_out, rows, tokenizer, warned.append)
    assert results == {**expected, "reward_accuracy_true_taste": pytest.approx(1 / 3),
                       "label_agreement": pytest.approx(2 / 3),
                       "reward_accuracy_ceiling": pytest.approx(0.805928),
                       "reward_accuracy_post_blind": judge.post_blind_accuracy(
                           pairs, held_out, 10)}


def test_the_example(capsys):
    runpy.run_path(judge.__file__, run_name="__main__")
    shown = capsys.readouterr().out
    # always A; item 51 (half-wins, conditional, decisions); item 52; item 48
    for number in ("both orders: 0.5", "win_rate=0.65", "conditional_win_rate=0.666666",
                   "decision_rate=0.9", "0.564223", "0.75546", "1.835089"):
        assert number in shown
