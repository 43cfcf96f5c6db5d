"""Who wrote the better summary? Judges, win rates and best of n (Stiennon et al. 2020).

Read beside it: section 3.3 and App. C.5 with Table 6 (how people compared two summaries, and what
they looked for), 4.1 and Fig. 1 (the measure: how often a policy's summary is preferred to the
human reference), App. F (what of that is length), G.3 and Table 10 (best of n). A judge is any
callable: judge(posts, summaries_a, summaries_b) -> a list of "A" | "B" | None, None = it abstains.
A post is a dict: "subreddit", "title", "post" and "summary" (the reference); in the tiny world also
"facts", which only its labeler may look at.

What differs from the paper, and why:

- The judge. The paper paid people. Here the tiny world's labeler, the reward model or mere length
  judges, and a win rate means nothing without the name of its judge. What a judge is worth is
  measured first, on the labels of held-out comparisons (judge_the_judge).
- Both orders. The paper does not say which summary stood first. Language models as judges (engine/)
  favour a place, so every pair is asked twice, and two answers that contradict each other are a
  tie.
- No confidence. People answered on nine points, from "A is far better" to "B is far better".
- The interval. The paper's error bars are one standard error (footnote 4); these are Wilson's,
  95 %, which stay inside [0, 1] and do not vanish where all answers are the same.
- Length control. The paper fits one regression to the comparisons of all its policies; here each
  pair of policies has its own, with a weak prior that keeps it finite on few posts.

`python judge.py` prints a worked example.
"""

import math
from dataclasses import asdict, dataclass
from statistics import fmean as mean

import torch

import toy
from reward import preference_accuracy, preference_loss, score_summaries


@dataclass
class JudgeConfig:
    judge: str = "labeler"  # labeler, longest or reward_model; paper: people (3.3)
    judge_posts: int = 500  # held-out posts, at the end; T = 0 as in Fig. 8
    judge_every: int = 10  # PPO updates between win rates; 0 = only at the end
    judge_during: int = 100  # held-out posts for the win rates during PPO
    best_of_n: int = 16  # samples to choose from; paper: up to 2048 (G.3)


# ---------------------------------------------------------------------------- asking in both orders


def judge_pairwise(judge, posts, ours, theirs):
    """Ask about every pair in both orders: a list of 1.0 (ours is better) | 0.5 | 0.0 | None.

    A win takes both orders; two answers that contradict each other are a tie, 0.5; None is where
    the judge abstains in either order. posts, ours, theirs: lists of equal length, one call of the
    judge for each order. Raises ValueError on unequal lengths and on a verdict that is none of the
    three.
    """
    if not len(posts) == len(ours) == len(theirs):
        raise ValueError(f"{len(posts)} posts, {len(ours)} ours and {len(theirs)} theirs: unequal")
    # First ours is A, then it is B. Huang et al. 2024 (N+) draw one of the two orders for each
    # pair instead: half the cost, but then one answer can't show that the place decided it.
    both_orders = [list(judge(posts, ours, theirs)), list(judge(posts, theirs, ours))]
    for verdicts in both_orders:
        # Nothing is guessed: `startswith("A")` would take "ANSWER: B" for an A
        wrong = [verdict for verdict in verdicts if verdict not in ("A", "B", None)]
        if wrong or len(verdicts) != len(posts):
            raise ValueError(f'not {len(posts)} x "A", "B" or None: {len(verdicts)}, {wrong[:3]}')
    # (ours is A, and chosen) + (ours is B, and chosen): 2, 1 or 0 of two. A judge that looks at
    # nothing but the place, "A" and "A", comes to exactly one half.
    return [None if None in (first, second) else ((first == "A") + (second == "B")) / 2
            for first, second in zip(*both_orders)]


# ---------------------------------------------------------------------------- counting, section 4.1


@dataclass(frozen=True)
class WinRate:
    """Outcomes of judge_pairwise, counted. A rate over nothing is NaN."""

    wins: int  # number of 1.0: ours was chosen in both orders
    losses: int  # number of 0.0: theirs was chosen in both orders
    ties: int  # number of 0.5: the two orders contradict each other, or the summaries are equal
    abstentions: int  # number of None: shown, and never silently a loss or a tie
    total: int  # wins + losses + ties + abstentions: all that were asked
    win_rate: float  # (wins + ties / 2) / (wins + losses + ties)
    conditional_win_rate: float  # wins / (wins + losses)
    decision_rate: float  # (wins + losses) / total
    low: float  # where the 95 % interval of win_rate begins: wilson_interval
    high: float  # and where it ends


def rate(count, total):
    """count / total, NaN for total = 0: a rate over nothing is not 0."""
    return count / total if total else math.nan


def wilson_interval(share, n, z=1.959964):
    """(low, high), Wilson's interval of a share among n, 95 % at this z; (NaN, NaN) for n = 0.

    Its ends are the two p from which the share is z standard errors away, where the standard error
    is that of p: (share - p)^2 = z^2 p (1 - p) / n.
    """
    if n == 0:
        return math.nan, math.nan
    # The solutions of that quadratic equation. The plain interval, share +- z standard errors of
    # the share, would leave [0, 1], and be a point where all answers are the same.
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(center - half, 0.0), min(center + half, 1.0)  # rounding: -1e-18 is 0


def win_rate(outcomes):
    """Outcomes of judge_pairwise -> WinRate; ValueError on any other outcome."""
    wins, losses, ties, abstentions = (outcomes.count(x) for x in (1.0, 0.0, 0.5, None))
    answered = wins + losses + ties  # an abstention is neither a loss nor a tie
    if answered + abstentions < len(outcomes):
        raise ValueError("an outcome is 1.0, 0.5, 0.0 or None, as judge_pairwise gives them")
    share = rate(wins + ties / 2, answered)  # so that the two sides' rates add up to 1
    # The interval counts each answered post once: the two orders of a pair are one sample, not two.
    # With ties it is a little too wide, since a half varies less than a win or a loss.
    return WinRate(wins, losses, ties, abstentions, len(outcomes), share, rate(wins, wins + losses),
                   rate(wins + losses, len(outcomes)), *wilson_interval(share, answered))


# ---------------------------------------------------------------------------- length, appendix F

# Penalties of the two weights of length_controlled_win_rate, 1e-6 / 2 * a^2 + 1e-2 / 2 * b^2. The
# second is a normal prior on b of standard deviation 10, since a judge that goes by length alone
# would have b = infinity; the first only keeps 100 % of wins finite.
RIDGE = torch.tensor([[1e-6], [1e-2]], dtype=torch.float64)  # (2, 1)


def length_controlled_win_rate(outcomes, our_lengths, their_lengths):
    """App. F: the win rate that is left at equal lengths, sigmoid(a), from the logistic regression

        P(win) = sigmoid(a + b * log(our length / their length))

    One outcome of judge_pairwise and two positive lengths, in one unit, per post. None is dropped
    and a tie is a target of 1/2; NaN when nothing is answered. Raises ValueError on unequal
    numbers of items, an outcome that is none of the four or a length that is not positive.
    """
    # What it can't do: if ours are longer everywhere, nothing tells length from quality
    if not (len(outcomes) == len(our_lengths) == len(their_lengths)
            and all(0 < length < math.inf for length in [*our_lengths, *their_lengths])):
        raise ValueError("each of outcomes needs a positive one of our_lengths and their_lengths")
    if math.isnan(win_rate(outcomes).win_rate):  # nothing answered; checks the outcomes as well
        return math.nan
    rows = [(target, 1.0, math.log(ours / theirs)) for target, ours, theirs
            in zip(outcomes, our_lengths, their_lengths) if target is not None]
    targets, features = torch.tensor(rows, dtype=torch.float64).split([1, 2], 1)  # (N, 1), (N, 2)
    weights = torch.zeros_like(RIDGE)  # a, b: (2, 1)
    # Newton's method on the penalised log-likelihood, which is concave: it has one maximum, and the
    # start does not matter. About ten steps are enough; more cost nothing here.
    for _ in range(200):
        p = torch.sigmoid(features @ weights)  # (N, 1)
        gradient = features.T @ (targets - p) - RIDGE * weights  # (2, 1)
        curvature = features.T @ (p * (1 - p) * features) + RIDGE * torch.eye(2)  # (2, 2)
        step = torch.linalg.solve(curvature, gradient)
        weights += step / step.norm().clamp(min=1)  # at most 1 long: on flat ground it overshoots
    # At equal lengths the logarithm is 0, and a alone is left
    return torch.sigmoid(weights[0]).item()


# ---------------------------------------------------------------------------- best of n, G.3


def best_of_n(write, reward_of, model, posts, n):
    """The best of n samples by the reward model, for each post: a policy that needs no training.

    write(model, posts, temperature, stream) -> summaries, drawn from the random stream of that
    name (lm.generator_for); reward_of(posts, summaries) -> a list of floats.
    """
    # A policy to compare PPO with, not a way to choose what PPO trains on: the best sample is no
    # draw from the model any more, and PPO's ratio and KL are about draws.
    repeated = [post for post in posts for _ in range(n)]
    samples = write(model, repeated, 0.7, "best of n")  # T = 0.7 (G.3); at 0 all n are the same
    scores = reward_of(repeated, samples)
    rows = range(0, len(samples), n)  # where each post's samples begin
    return [samples[max(range(row, row + n), key=scores.__getitem__)] for row in rows]


def best_of_n_kl(n):
    """KL of best-of-n from the policy it samples: log n - (n-1)/n nats (Table 10). ValueError for
    n < 1."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    # Exact where no two samples have equal scores, else an upper bound. It depends neither on the
    # policy nor on the score: the best of n has rank u in (0, 1) with density n u^(n-1), as all n
    # lie below it; the KL is the mean of the logarithm of that density.
    return math.log(n) - (n - 1) / n


# ---------------------------------------------------------------------------- judges with a score


def reward_model_judge(score):
    """The judge that prefers the higher score: score(posts, summaries) -> a list of floats. Where
    that is the reward model's, a win only shows that PPO raised the score it was trained on.

    Equal summaries or scores are an "A" in both orders, hence a tie; a NaN is an abstention.
    """
    def judge(posts, summaries_a, summaries_b):
        rows = zip(summaries_a, summaries_b, score(posts, summaries_a), score(posts, summaries_b),
                   strict=True)  # a score too few is an error, not a pair too few
        # a NaN is neither >= nor <, which leaves None
        return ["A" if a == b or x >= y else "B" if x < y else None for a, b, x, y in rows]

    return judge


def quality_judge(quality):
    """The same judge from quality(post, summary) -> float, for one summary at a time."""
    return reward_model_judge(lambda posts, summaries: list(map(quality, posts, summaries)))


JUDGES = ("labeler", "longest", "reward_model")


def make_judge(name, reward_of):
    """One of JUDGES. labeler: the higher toy.true_quality wins (+1 for a right fact, -2 for a wrong
    one, less for asides and extra words). longest: more characters win, which any other judge has
    to beat (App. F). reward_of: (posts, summaries) -> a list of floats, for reward_model."""
    if name == "reward_model":
        return reward_model_judge(reward_of)
    return quality_judge({"labeler": toy.true_quality, "longest": lambda _, text: len(text)}[name])


# ---------------------------------------------------------------------------- a run's win rates


def mean_words(summaries):
    return mean(len(summary.split()) for summary in summaries)


def judged(judge, name, posts, ours, theirs):
    """Our summaries against theirs: the entry of results.json, and the outcome for each post.
    name is the judge's, and stands beside its numbers."""
    outcomes = judge_pairwise(judge, posts, ours, theirs)
    counted = win_rate(outcomes)
    lengths = [[len(text) + 1 for text in side] for side in (ours, theirs)]  # "" has no logarithm
    return {"n": counted.total - counted.abstentions, "judge": name, **asdict(counted),
            "length_controlled": length_controlled_win_rate(outcomes, *lengths),
            "mean_length": mean_words(ours), "mean_length_other": mean_words(theirs)}, outcomes


# Below, ask(posts, ours, theirs) is `judged` with a judge and its name filled in.


def judge_the_judge(ask, comparisons, most=500):
    """How often the judge agrees with the labels of held-out comparisons, every so many of them (of
    many more than `most`, about `most`): what its win rates are worth."""
    comparisons = comparisons[:: max(1, len(comparisons) // most)]
    # In 3.3 labelers agree with the authors on 77 % of pairs, and the authors with each other on
    # 73 %: of a good judge of real summaries expect about that. Ties count half.
    sides = ([row[key] for row in comparisons] for key in ("post", "chosen", "rejected"))
    entry, _ = ask(*sides)  # a "win" is the summary that people chose
    print(f"judge {entry['judge']}: agrees with {entry['win_rate']:.3f} ({entry['low']:.3f} - "
          f"{entry['high']:.3f}) of {len(comparisons)} held-out labels, {entry['abstentions']} "
          "abstentions")
    return {"judge_agreement": entry}


def judge_during(log, update, ask, posts, summaries, sft_summaries):
    """Log the win rates of the policy after a PPO update, at T = 0, on a few held-out posts."""
    # The paper had people judge a few finished runs (Fig. 5). A judge that costs nothing can show
    # within a run whether preference still grows with the reward.
    line = {"length": mean_words(summaries)}
    references = [post["summary"] for post in posts]
    for name, theirs in (("reference", references), ("sft", sft_summaries[: len(posts)])):
        entry, _ = ask(posts, summaries, theirs)
        line |= {f"vs_{name}_{key}": entry[key] for key in ("win_rate", "low", "high", "n")}
    if "facts" in posts[0]:  # the tiny world, where the taste itself can be read off
        line["true_quality"] = mean(map(toy.true_quality, posts, summaries))
    log("judge", update, **line, judge=entry["judge"])


def compare_summaries(ask, posts, sft_summaries, ppo_summaries, best):
    """The measure of Fig. 1: each policy against the references, and PPO against SFT.

    best: the best-of-n summaries of the first len(best) posts. Returns the entries of results.json
    and the outcomes, two dicts by comparison; outcomes are lists with one for each post.
    """
    references = [post["summary"] for post in posts]
    pairs = {"sft_vs_reference": (sft_summaries, references),
             "ppo_vs_reference": (ppo_summaries, references),
             "ppo_vs_sft": (ppo_summaries, sft_summaries),
             "best_of_n_vs_reference": (best, references[: len(best)])}
    if "facts" in posts[0]:  # the tiny world: how far anyone can get with this judge
        pairs["ideal_vs_reference"] = (list(map(toy.ideal_summary, posts)), references)
    results, outcomes = {}, {}
    for name, (ours, theirs) in pairs.items():
        results[name], outcomes[name] = ask(posts[: len(ours)], ours, theirs)
    return results, outcomes


def describe_samples(results, outcomes, posts, sft_texts, texts, reward_of):
    """Add mean rewards and lengths to results, and return a dict for each post: what samples.jsonl
    holds. outcomes: as compare_summaries returns them."""
    references = [post["summary"] for post in posts]
    rewards_sft, rewards_ppo = reward_of(posts, sft_texts), reward_of(posts, texts)
    results |= {"reward_sft": mean(rewards_sft), "reward_ppo": mean(rewards_ppo),
                "mean_length_sft": mean_words(sft_texts), "mean_length_ppo": mean_words(texts),
                "mean_length_reference": mean_words(references)}
    columns = {"post": [{key: post[key] for key in ("subreddit", "title", "post")}
                        for post in posts],
               "reference": references, "sft": sft_texts, "ppo": texts,
               "reward_sft": rewards_sft, "reward_ppo": rewards_ppo,
               "ppo_vs_reference": outcomes["ppo_vs_reference"],
               "ppo_vs_sft": outcomes["ppo_vs_sft"],
               "judge": [results["ppo_vs_sft"]["judge"]] * len(posts)}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


COMPARED = (("sft_vs_reference", "SFT against reference"),
            ("ppo_vs_reference", "PPO against reference"), ("ppo_vs_sft", "PPO against SFT"),
            ("best_of_n_vs_reference", "best-of-n against reference"),
            ("ideal_vs_reference", "the ideal against reference"))
HEADER = ("", "win rate", "95 % interval", "posts", "words ours / theirs")


def win_rate_table(results):
    """HEADER and a row for each of the comparisons that were judged, all strings."""
    rows = [(name, results[key]) for key, name in COMPARED if key in results]
    return [HEADER] + [(name, f"{r['win_rate']:.3f}", f"{r['low']:.3f} - {r['high']:.3f}",
                        str(r["n"]), f"{r['mean_length']:.1f} / {r['mean_length_other']:.1f}")
                       for name, r in rows]


# ---------------------------------------------------------------------------- the reward model, 4.3


def length_accuracy(pairs):
    """Share of pairs (query, chosen, rejected) whose longer summary was chosen; a tie counts half.
    The baseline that any reward model must beat: labelers like longer summaries (App. F)."""
    gaps = [len(chosen) - len(rejected) for _, chosen, rejected in pairs]
    return sum(0.5 if gap == 0 else gap > 0 for gap in gaps) / len(gaps)


def count_tokens(pairs, vocabulary_size):
    """(N, V+1): how often each token is in the chosen summary minus in the rejected one, and a
    tenth of the difference in length (so that one step of Adam moves it as little as the rest)."""
    counts = [[torch.bincount(torch.tensor(ids), minlength=vocabulary_size).float()
               for ids in summaries] for _, *summaries in pairs]
    gaps = torch.stack([chosen - rejected for chosen, rejected in counts])
    return torch.cat([gaps, gaps.sum(1, keepdim=True) / 10], 1)


def post_blind_accuracy(train_pairs, held_out_pairs, vocabulary_size):
    """Held-out accuracy of a preference model that never sees the post: logistic regression on the
    counts of each token and the length, fitted to the same pairs. What a reward model has beyond
    it, it has from reading the post. Ours, not the paper's."""
    x = count_tokens(train_pairs, vocabulary_size)  # (N, V+1)
    weights = torch.zeros(vocabulary_size + 1, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(200):  # ours, as the weak ridge; the loss is convex, so the start is no matter
        gaps = x @ weights
        loss = preference_loss(gaps, torch.zeros_like(gaps)) + 1e-4 * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gaps = count_tokens(held_out_pairs, vocabulary_size) @ weights.detach()
    return preference_accuracy(gaps, torch.zeros_like(gaps))


def measure_reward_model(reward_model, pairs, held_out, rows, tokenizer, warn, batch_size=256):
    """What results.json holds about the reward model: its accuracy on held-out comparisons beside
    those of judges that never read the post. pairs: the comparisons it was trained on; held_out:
    the held-out ones, both (query, chosen, rejected) as token ids; rows: the held-out ones as
    texts. warn: called with a text where the accuracy may be that of chance."""
    queries, better, worse = zip(*held_out)
    chosen, rejected = (score_summaries(reward_model, queries, side, tokenizer.pad_token_id,
                                        batch_size) for side in (better, worse))
    n, accuracy = len(rows), preference_accuracy(chosen, rejected)
    results = {"reward_accuracy": accuracy,
               "reward_accuracy_longest_wins": length_accuracy(held_out), "reward_accuracy_n": n}
    print(f"reward model: accuracy {accuracy:.3f} on {n} held-out comparisons, "
          f"pick-the-longer {results['reward_accuracy_longest_wins']:.3f}")
    if wilson_interval(accuracy, n)[0] <= 0.5:
        warn(f"the reward model is no better than chance, {accuracy:.3f} on {n} held-out "
             "comparisons (the 95 % interval reaches 0.5): what PPO makes of it means nothing; "
             "train it on more or cleaner comparisons")
    # In the tiny world the taste is known. gap: that of chosen minus that of rejected, below 0
    # where the labeler slipped; ceiling: the accuracy to expect of one who knows the taste
    if "gap" in rows[0]:
        gaps = torch.tensor([row["gap"] for row in rows])
        agrees = ((chosen > rejected) == (gaps > 0))[gaps != 0]
        results |= {
            "reward_accuracy_post_blind": post_blind_accuracy(pairs, held_out, len(tokenizer)),
            "reward_accuracy_true_taste": agrees.float().mean().item(),
            "reward_accuracy_ceiling": toy.label_ceiling(rows),
            "label_agreement": (gaps[gaps != 0] > 0).float().mean().item()}
    return results


if __name__ == "__main__":
    always_a = judge_pairwise(lambda posts, a, b: ["A"] * 3, ["post"] * 3, ["x"] * 3, ["y"] * 3)
    print(f"A judge that always says A, in both orders: {win_rate(always_a).win_rate}")
    print(f"60 wins, 30 losses, 10 ties: {win_rate([1.0] * 60 + [0.0] * 30 + [0.5] * 10)}")
    print(f"95 % interval of 60 / 90: {wilson_interval(60 / 90, 90)}")
    print(f"Best of 16 is at most {best_of_n_kl(16):.6f} nats from its policy")
