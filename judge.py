"""Who wrote the better summary? Win rates (Stiennon et al. 2020, sections 3.3 and 4.1, app. F).

A judge is any callable: judge(posts, summaries_a, summaries_b) -> a list of "A" | "B" | None, where
None means that it abstains. The paper paid people; here the tiny world's labeler, a language model,
the reward model or a ruler judges, and a win rate means nothing without the name of its judge.
`python judge.py` prints a worked example.
"""

import math
from collections import namedtuple
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from lm import get_position_ids, load_language_model, pad
from tldr import build_prompt, truncate_post


@dataclass
class JudgeConfig:
    judge: str = HfArg(default=None, help="labeler | longest | reward_model | hub id or folder")
    judge_posts: int = HfArg(default=500, help="held-out posts, at the end; T = 0 as in Fig. 8")
    judge_every: int = HfArg(default=10, help="PPO updates between win rates; 0 = only at the end")
    judge_during: int = HfArg(default=100, help="held-out posts for the win rates during PPO")
    best_of_n: int = HfArg(default=16, help="samples to choose from; paper: up to 2048 (G.3)")


# ---------------------------------------------------------------------------- asking in both orders


def judge_pairwise(judge, posts, ours, theirs):
    """Ask about every pair in both orders: a list of 1.0 (ours is better) | 0.5 | 0.0 | None.

    The paper does not say how positions were assigned. Judges favour one of them, so a win takes
    both orders; answers that contradict each other are a tie, and None is where either abstains.
    Raises ValueError on unequal numbers of items or a verdict that is none of the three.
    """
    if not len(posts) == len(ours) == len(theirs):
        raise ValueError(f"{len(posts)} posts, {len(ours)} ours and {len(theirs)} theirs: unequal")
    both_orders = [list(judge(posts, ours, theirs)), list(judge(posts, theirs, ours))]
    for verdicts in both_orders:
        # Nothing is guessed: `startswith("A")` would take "ANSWER: B" for an A
        wrong = [verdict for verdict in verdicts if verdict not in ("A", "B", None)]
        if wrong or len(verdicts) != len(posts):
            raise ValueError(f'not {len(posts)} x "A", "B" or None: {len(verdicts)}, {wrong[:3]}')
    return [None if None in (first, second) else ((first == "A") + (second == "B")) / 2
            for first, second in zip(*both_orders)]


# ---------------------------------------------------------------------------- counting


# ties: the two orders contradict each other, or the summaries are equal
# total: all that were asked; answered = wins + losses + ties
# win_rate: (wins + ties / 2) / answered; low, high: its 95 % interval
# conditional_win_rate: wins / (wins + losses)
# decision_rate: (wins + losses) / total
WinRate = namedtuple("WinRate", "wins losses ties abstentions total "
                                "win_rate conditional_win_rate decision_rate low high")


def rate(count, total):
    return count / total if total else math.nan  # a rate over nothing is not 0


def wilson_interval(share, n, z=1.959964):
    """Wilson's interval of a share among n, 95 % at this z; (NaN, NaN) for n = 0.

    Unlike share +- z * s.e. it stays within [0, 1] and does not shrink to a point at 0 or 1.
    """
    if n == 0:
        return math.nan, math.nan
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(center - half, 0.0), min(center + half, 1.0)  # rounding: -1e-18 is 0


def win_rate(outcomes):
    """Outcomes of judge_pairwise -> WinRate; ValueError on any other outcome.

    n of the interval is the number of answered posts: two orders of a pair are one sample. With
    ties it is a little too wide, since a half varies less than a win or a loss.
    """
    wins, losses, ties, abstentions = (outcomes.count(x) for x in (1.0, 0.0, 0.5, None))
    answered = wins + losses + ties  # an abstention is neither a loss nor a tie
    if answered + abstentions < len(outcomes):
        raise ValueError("an outcome is 1.0, 0.5, 0.0 or None, as judge_pairwise gives them")
    share = rate(wins + ties / 2, answered)
    return WinRate(wins, losses, ties, abstentions, len(outcomes), share, rate(wins, wins + losses),
                   rate(wins + losses, len(outcomes)), *wilson_interval(share, answered))


# ---------------------------------------------------------------------------- length, appendix F

# Penalty ridge / 2 * weight^2 on a and b. A judge that goes by length alone has b = infinity; 0.01
# is a prior of standard deviation 10 on b. That on a only keeps 100 % of wins finite.
RIDGE = torch.tensor([[1e-6], [1e-2]], dtype=torch.float64)  # (2, 1)


def length_controlled_win_rate(outcomes, our_lengths, their_lengths):
    """App. F: the win rate that is left at equal lengths, sigmoid(a), from the logistic regression

        P(win) = sigmoid(a + b * log(our length / their length))

    One outcome of judge_pairwise and two positive lengths, in one unit, per post. None is dropped
    and a tie is a target of 1/2; NaN when nothing is answered. If ours are longer everywhere, no
    regression can tell length from quality. Raises ValueError on unequal numbers of items, an
    outcome that is none of the four or a length that is not positive.
    """
    if not (len(outcomes) == len(our_lengths) == len(their_lengths)
            and all(0 < length < math.inf for length in [*our_lengths, *their_lengths])):
        raise ValueError("each of outcomes needs a positive one of our_lengths and their_lengths")
    if math.isnan(win_rate(outcomes).win_rate):  # nothing answered; checks the outcomes as well
        return math.nan
    rows = [(target, 1.0, math.log(ours / theirs)) for target, ours, theirs
            in zip(outcomes, our_lengths, their_lengths) if target is not None]
    targets, features = torch.tensor(rows, dtype=torch.float64).split([1, 2], 1)  # (N, 1), (N, 2)
    weights = torch.zeros_like(RIDGE)  # a, b: (2, 1)
    for _ in range(200):  # Newton's method
        p = torch.sigmoid(features @ weights)
        gradient = features.T @ (targets - p) - RIDGE * weights  # (2, 1)
        curvature = features.T @ (p * (1 - p) * features) + RIDGE * torch.eye(2)  # (2, 2)
        step = torch.linalg.solve(curvature, gradient)
        weights += step / step.norm().clamp(min=1)  # at most 1 long: on flat ground it overshoots
    return torch.sigmoid(weights[0]).item()


def best_of_n_kl(n):
    """KL of best-of-n from the policy it samples: log n - (n-1)/n nats (Table 10).

    Exact where no two samples have equal scores, else an upper bound. ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


# ---------------------------------------------------------------------------- judges with a score


def reward_model_judge(score):
    """The judge that prefers the higher score; score(posts, summaries) -> a list of floats.

    Equal summaries or scores are an "A" in both orders, hence a tie; a NaN is an abstention.
    """
    def judge(posts, summaries_a, summaries_b):
        rows = zip(summaries_a, summaries_b, score(posts, summaries_a), score(posts, summaries_b),
                   strict=True)  # a score too few is an error, not a pair too few
        return ["A" if a == b or x >= y else "B" if x < y else None for a, b, x, y in rows]

    return judge


def quality_judge(quality):
    """The same from quality(post, summary) -> float, one pair at a time."""
    return reward_model_judge(lambda posts, summaries: list(map(quality, posts, summaries)))


# ---------------------------------------------------------------------------- a language model

# The labelers' criteria in the order of Table 6: essence, clarity, accuracy, purpose, conciseness,
# style. The comparison is fixed: no setting of a run changes what "better" means.
QUESTION = """\
Which of two summaries of a forum post is better? A good summary tells the essence of the post, is
clear, is accurate (it says nothing that the post does not say), serves the purpose of the post, is
concise, and keeps the style of the post.

{post}

Summary A: {summary_a}

Summary B: {summary_b}

Which summary is better? Reply with exactly one letter, A or B."""


def answer_tokens(tokenizer):
    """(2, K): the ids of "A" and of "B", in each spelling ("A", " A") with one token for each."""
    pairs = [[tokenizer(space + letter, add_special_tokens=False)["input_ids"] for letter in "AB"]
             for space in ("", " ")]
    # A set, since "A" and " A" are the same token to some tokenizers
    spellings = {(*a, *b) for a, b in pairs
                 if len(a) == len(b) == 1 and a != b and tokenizer.unk_token_id not in a + b}
    if not spellings:
        raise ValueError('expected a tokenizer in which "A" and "B" are single, distinct tokens')
    return torch.tensor(sorted(spellings)).T


def tokens_around(tokenizer):
    """The token ids before and after the question: a user's turn, or plain text with a cue.

    No text of a user is in here, so that whatever looks like a control token is one.
    """
    place = "{question}"
    text = f"{tokenizer.bos_token or ''}{place}\n\nAnswer:"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(  # a template without that switch ignores it
            [{"role": "user", "content": place}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False)
    before, _, after = text.partition(place)
    if "<think>" in after and "</think>" not in after:
        raise ValueError("this judge thinks before it answers: choose one that answers at once")
    return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]


@torch.no_grad()
def answer_probabilities(model, prompts, answers, batch_size):
    """Lists of token ids -> (N, 2): P(A) and P(B) as the next token, summed over their spellings.

    One forward pass and no generate(): the checkpoint's own temperature, top-p and repetition
    penalty play no part, no prose is parsed, and the same question always gets the same answer.
    """
    probabilities = torch.zeros(len(prompts), 2)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of similar length
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # Left-padded, the last position is the answer's in every row. The mask hides the pad id.
        ids, mask = (x.to(model.device) for x in pad([prompts[i] for i in rows], 0, left=True))
        logits = model(input_ids=ids, attention_mask=mask, position_ids=get_position_ids(mask),
                       logits_to_keep=1, use_cache=False).logits[:, -1]  # (B, V)
        # float32, since bfloat16 has three digits; (B, V) -> (B, 2, K) -> (B, 2)
        probabilities[rows] = logits.float().softmax(-1)[:, answers].sum(-1).cpu()
    return probabilities


def language_model_judge(model, tokenizer, batch_size=8, min_probability=0.5, max_length=2048):
    """The judge that compares P(A) and P(B) of a language model in eval mode.

    It abstains where P(A) + P(B) < min_probability: the model was going to say something else. A
    question of more tokens than max_length or the model's limit loses the end of its post, never of
    a summary; ValueError where that is not enough, where the tokenizer lacks an "A" or a "B", or
    where the model can't but think before it answers.
    """
    answers = answer_tokens(tokenizer)
    before, after = tokens_around(tokenizer)
    positions = getattr(model.config, "max_position_embeddings", max_length)  # what it has seen
    room = min(max_length, positions, tokenizer.model_max_length) - len(before) - len(after)

    def get_prompt(post, summary_a, summary_b):
        def encode(text):
            shown = build_prompt({**post, "post": text}).removesuffix("\n\nTL;DR:")
            # One pass: chained `replace` calls would fill in a "{summary_b}" found in the post
            question = QUESTION.format(post=shown, summary_a=summary_a, summary_b=summary_b)
            # split_special_tokens: a typed "<|im_end|>" is text, it does not end the judge's turn
            return tokenizer(question, add_special_tokens=False, split_special_tokens=True,
                             verbose=False)["input_ids"]

        text = truncate_post(post["post"], lambda text: len(encode(text)) <= room)
        if text is None:
            raise ValueError(f"{room} tokens are too few even without the post: raise max_length")
        return before + encode(text) + after

    def judge(posts, summaries_a, summaries_b):
        verdicts = ["A"] * len(posts)  # equal summaries need no question
        asked = [i for i in range(len(posts)) if summaries_a[i] != summaries_b[i]]
        prompts = [get_prompt(posts[i], summaries_a[i], summaries_b[i]) for i in asked]
        probabilities = answer_probabilities(model, prompts, answers, batch_size)
        for i, (p_a, p_b) in zip(asked, probabilities.tolist()):
            # "not >=" instead of "<": a NaN is an abstention too
            verdicts[i] = None if not p_a + p_b >= min_probability else "A" if p_a >= p_b else "B"
        return verdicts

    return judge


def load_judge(name, score=None, small=False):
    """JudgeConfig.judge -> a judge; score(posts, summaries) -> floats is for "reward_model".

    Raises ValueError on "labeler" or None, and on "reward_model" without a score. small: a model of
    the same architecture with random weights.
    """
    if name in (None, "labeler") or name == "reward_model" and score is None:
        raise ValueError(f"judge {name}: the labeler exists in the tiny world only, reward_model "
                         "needs a score; else name longest, a hub id or a folder")
    if name == "longest":  # in characters; what every other judge has to beat
        return quality_judge(lambda post, summary: len(summary))
    if name == "reward_model":
        return reward_model_judge(score)
    # Qwen/Qwen2.5-3B-Instruct, the full preset's, is licensed for non-commercial research only;
    # Qwen/Qwen3-4B-Instruct-2507 is under Apache-2.0.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # bfloat16 is slow on most CPUs
    tokenizer, model = load_language_model(name, device, dtype, small=small)
    return language_model_judge(model.requires_grad_(False), tokenizer)


if __name__ == "__main__":
    always_a = judge_pairwise(lambda posts, a, b: ["A"] * 3, ["post"] * 3, ["x"] * 3, ["y"] * 3)
    print(f"A judge that always says A, in both orders: {win_rate(always_a).win_rate}")
    print(f"60 wins, 30 losses, 10 ties: {win_rate([1.0] * 60 + [0.0] * 30 + [0.5] * 10)}")
    print(f"95 % interval of 60 / 90: {wilson_interval(60 / 90, 90)}")
    print(f"Best of 16 is at most {best_of_n_kl(16):.6f} nats from its policy")
