"""The figures of Stiennon et al. 2020, in the tiny world, where the labeler's taste is known.

    python figures/make.py all             # every picture and its numbers, beside this script
    python figures/make.py win-rate tokens # some of them, which share their models
    python figures/make.py all --quick     # two seeds, few points: only the shapes

Below, in this order: one seed of the tiny world with its models, the figures, the script. A figure
is a function of such a world that gives its points as dicts; the script calls it for each seed,
writes all points as JSON and draws their means.
"""

import argparse
import copy
import json
import math
import multiprocessing
import random
import sys
import time
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean as mean
from types import SimpleNamespace

import torch
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))  # the repository's own files

import ppo
import toy
from engine.report import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from figures.drawing import Panel, draw
from judge import best_of_n, best_of_n_kl, judge_pairwise, length_accuracy, quality_judge
from lm import encode_responses, generator_for, write_summaries
from reward import RewardConfig, RewardModel, normalize, preference_accuracy, score_summaries
from reward import train_reward
from sft import SFTConfig, train_sft
from tldr import build_prompt, encode_prompts
from variants.dpo import train_dpo
from variants.rloo import train_rloo

HELD_OUT = 1500  # comparisons to measure accuracy on
WEAK = 500  # comparisons for the weak reward models of best_of_many
BIAS = 0.5  # taste a word, of the labelers of length_bias: two words are worth a fact
# The colour of each line, or of each number where a panel has one line of each
COLORS = {
    "reward": BLUE, "predicted": BLUE, "values": BLUE, "separate, from the reward model": BLUE,
    "width 16": BLUE, "width 32": BLUE, "width 64": BLUE, "reward model, 500 comparisons": BLUE,
    "reward model, 4000 comparisons": BLUE, "reward model, 12000 comparisons": BLUE,
    "mean of five, 500 comparisons": PURPLE, "worst of five, 500 comparisons": SKY,
    "unbiased labeler, beta 0.05": GREEN, "unbiased labeler, beta 0.0": GREEN,
    "biased labeler, beta 0.05": VERMILION, "biased labeler, beta 0.0": VERMILION,
    "biased, length taken out, beta 0.05": BLUE,
    "true": GREEN, "labeler": GREEN, "another labeler": GREEN, "who knows the taste": GREEN,
    "log_ratio": VERMILION, "ROUGE-L": ORANGE, "SFT": SKY, "RLOO": VERMILION, "DPO": ORANGE,
    "PPO": PURPLE, "advantages": PURPLE, "shared with the policy": PURPLE,
    "best of 16": BLACK, "longest": GREY, "separate, from scratch": GREY}


# ---------------------------------------------------------------------------- the tiny world


def settings(**changed):
    """The default settings of all stages, but for those that are given."""
    every = SimpleNamespace()
    for part in (SFTConfig(), RewardConfig(), ppo.PPOConfig()):
        vars(every).update(vars(part))
    vars(every).update(changed)
    return every


def unlogged(stage, step, **metrics):
    """A log for stages whose lines no figure shows."""


class World:
    """One seed of the tiny world: its posts, and models by width, trained once and kept."""

    def __init__(self, seed, quick):
        self.seed, self.quick, self.widths = seed, quick, (64,) if quick else (16, 32, 64)
        self.sizes = (500, 4000) if quick else (500, 1000, 2000, 4000, 12000)  # of reward data
        n = 6600 if quick else 16400  # a sixth of the pairs are identical summaries
        posts = toy.make_posts(300 + n + 12800, seed)
        self.held_out, self.compared, self.posts = posts[:300], posts[300:-12800], posts[-12800:]
        self.tokenizer = toy.make_tokenizer([f"{build_prompt(post)} {post['summary']}"
                                             for post in self.posts[:5000]])

    def queries(self, posts):
        return encode_prompts(posts, self.tokenizer, 512)

    def encode(self, posts, summaries=None):
        """Queries and responses as token ids; the references where no summaries are given."""
        texts = summaries or [post["summary"] for post in posts]
        return self.queries(posts), encode_responses(texts, self.tokenizer, 128)

    def write(self, model, posts, temperature=0.0, *stream):
        """A summary of each post as text, greedy or drawn from the random stream of that name."""
        return write_summaries(model, self.tokenizer, self.queries(posts), 48, temperature,
                               generator_for(self.seed, *stream))

    def score(self, model, posts, summaries=None):
        return score_summaries(model, *self.encode(posts, summaries), self.tokenizer.pad_token_id)

    def preferred(self, posts, summaries):
        """1, 1/2 or 0 for each: does the labeler really prefer it to the reference?"""
        references = [post["summary"] for post in posts]
        return judge_pairwise(quality_judge(toy.true_quality), posts, summaries, references)

    @cache
    def sft(self, width):
        torch.manual_seed(self.seed)
        model = toy.make_model(self.tokenizer, width)
        train_sft(model, *self.encode(self.posts), self.tokenizer.pad_token_id, settings(),
                  self.seed, unlogged)
        return model

    @cache
    def samples(self):
        """Summaries to compare, as toy.make_comparisons takes them."""
        return [self.write(self.sft(64), self.compared[: len(self.compared) // k], 1.0, k)
                for k in (2, 4)]

    @cache
    def comparisons(self, bias=0.0):
        """Rows and encoded pairs: one set for models of all widths, as in the paper. bias: of the
        labeler, taste a word."""
        rows = toy.make_comparisons(self.compared, *self.samples(), self.seed, bias)
        random.Random(self.seed).shuffle(rows)
        sides = [encode_responses([row[key] for row in rows], self.tokenizer, 128)
                 for key in ("chosen", "rejected")]
        return rows, list(zip(self.queries([row["post"] for row in rows]), *sides))

    @cache
    def reward_model(self, width, n=None, bias=0.0, member=0):
        """Trained on n comparisons that are not held out, by default the most. member: of an
        ensemble, whose heads begin differently and which see the same pairs in another order."""
        torch.manual_seed(self.seed + 1000 * member)  # for the head
        model, (_, pairs) = RewardModel(self.sft(width)), self.comparisons(bias)
        train_reward(model, pairs[HELD_OUT:][: n or self.sizes[-1]], self.tokenizer.pad_token_id,
                     settings(), self.seed + 1000 * member, unlogged)
        normalize(model, *self.encode(self.posts[:1000]), self.tokenizer.pad_token_id)
        return model

    @cache
    def ppo(self, width, model=None, critic=None, evaluate=lambda *_: None, **changed):
        """Policy, critic and log of PPO against a reward model, by default that of all pairs.

        critic(policy) -> what to begin with instead of a copy of the model; evaluate(policy,
        update) is called after each update; changed: settings that are not the defaults.
        """
        policy, lines = copy.deepcopy(self.sft(width)), []
        critic = ppo.train_ppo(
            policy, model or self.reward_model(width), self.queries(self.posts), self.tokenizer,
            settings(**changed), self.seed,
            lambda stage, step, **metrics: lines.append({"step": step, **metrics}),
            partial(evaluate, policy), critic and critic(policy))
        return policy, critic, lines

    def rollout(self, policy, model, critic):
        """ppo.rollout on the held-out posts at T = 1, and the token ids of its summaries, without
        what follows them."""
        batch = ppo.rollout(policy, self.sft(64), model, critic, self.queries(self.held_out),
                            self.tokenizer, settings(), generator_for(self.seed, "measure"))
        responses = batch.input_ids[:, -batch.mask.shape[1] :]  # (B, T)
        return batch, [row[keep].tolist() for row, keep in zip(responses, batch.mask)]


# ---------------------------------------------------------------------------- the paper's figures


def win_rates(world):
    """After Fig. 1: greedy summaries against the references; best of 16 at T = 0.7, as in G.3. Not
    the paper's point, that a small model with feedback beats a ten times larger one without: here
    imitation is as good at each width, and it is the reward model that needs it."""
    posts = world.held_out
    for width in world.widths:
        score, sft, policy = (partial(world.score, world.reward_model(width)), world.sft(width),
                              world.ppo(width)[0])
        best = best_of_n(world.write, lambda *texts: score(*texts).tolist(), sft, posts[:100], 16)
        for line, texts in (("best of 16", best), ("SFT", world.write(sft, posts)),
                            ("PPO", world.write(policy, posts))):
            yield {"line": line, "width": width,
                   "preferred": mean(world.preferred(posts[: len(texts)], texts))}


def over_optimization(world):
    """Fig. 5: PPO against a reward model of few comparisons. As in the paper, the end of runs with
    less and less KL penalty; and the last of them on its way."""
    # 6,000: with 1,000 or 2,000 (seed 0) the truth fell from the first update on, and with 12,000
    # (seed 1) it hardly fell within these 80. A quick world has 4,000 in all.
    model, rows = world.reward_model(64, 4000 if world.quick else 6000), []

    def measure(beta, policy, update):
        during = beta == 0 and update in (0, 3, 6, 10, 15, 20, 30, 40, 60, 80)
        if during or update == 80:
            numbers = {"kl_beta": beta} | measure_policy(world, model, policy)
            if during:
                point = f"during {update}"
                rows.append({"line": "a run without penalty", "point": point} | numbers)
            if update in (0, 80):  # the SFT model is where every run begins
                point = f"end of {beta}" if update else "start"
                rows.append({"line": "end of runs", "point": point} | numbers)

    measure(0.0, world.sft(64), 0)
    for beta in (0.0,) if world.quick else (0.0, 0.05, 0.2):
        world.ppo(64, model, evaluate=partial(measure, beta), kl_beta=beta, ppo_episodes=80 * 64,
                  return_sequences=4)
    return rows


def measure_policy(world, model, policy):
    """What a reward model thinks of a policy's samples for the held-out posts, and what the labeler
    does, without bias."""
    batch, ids = world.rollout(policy, model, model)  # the critic's values are not looked at
    posts, eos = world.held_out, world.tokenizer.eos_token_id
    texts = [world.tokenizer.decode([token for token in row if token != eos],
                                    clean_up_tokenization_spaces=False).strip() for row in ids]
    gaps = batch.scores - world.score(model, posts)  # to the scores of the references
    return {"kl_per_summary": batch.kl.mean().item(), "predicted": gaps.sigmoid().mean().item(),
            "true": mean(world.preferred(posts, texts)),
            "words": mean(len(text.split()) for text in texts)}


class WithoutLength(RewardModel):
    """A trained reward model less a price for each word of a text: of a post as well, which is the
    same for all its summaries."""

    def __init__(self, model, price, tokenizer):
        super().__init__(model.trunk)
        self.head, self.price = model.head, price
        words = [token.startswith("\u0120") for token in tokenizer.convert_ids_to_tokens(
            range(len(tokenizer)))]  # byte-level BPE's space, with which each word begins here
        self.register_buffer("is_word", torch.tensor(words))

    def forward(self, input_ids, attention_mask):
        n_words = (self.is_word[input_ids] * attention_mask).cumsum(1)  # (B, L)
        return super().forward(input_ids, attention_mask) - self.price * n_words


def length_bias(world):
    """App. F, taken further: labelers who pay for length beside their taste. The control is the
    biased reward model with their length term taken out again."""
    tokenizer, biased = world.tokenizer, world.reward_model(64, None, BIAS)
    control = WithoutLength(biased, BIAS / toy.NOISE, tokenizer)
    normalize(control, *world.encode(world.posts[:1000]), tokenizer.pad_token_id)
    rows = []

    def measure(line, model, policy, update):
        if update % 10 == 0:
            rows.append({"line": line, "update": update} | measure_policy(world, model, policy))

    for name, model in (("unbiased labeler", world.reward_model(64)), ("biased labeler", biased),
                        ("biased, length taken out", control)):
        for beta in (0.05,) if world.quick or model is control else (0.05, 0.0):
            line = f"{name}, beta {beta}"
            measure(line, model, world.sft(64), 0)
            evaluate = partial(measure, line, model)
            policy, _, _ = world.ppo(64, model, evaluate=evaluate, kl_beta=beta)
            rows[-1]["summaries"] = world.write(policy, world.held_out[:3])
    return rows


def best_of_many(world):
    """Fig. 7 and Table 10: from one pool of samples for each post, at T = 0.7. And one that is not
    in the paper: five weak reward models together, by their mean or by the least of them."""
    posts, total = world.held_out[:60], 64 if world.quick else 256
    pool = [post for post in posts for _ in range(total)]
    texts = world.write(world.sft(64), pool, 0.7, "pool")
    # What picks, a number for each sample; and what its pick is worth to the labeler, or to itself
    proxies = {"labeler": list(map(toy.true_quality, pool, texts)),
               "ROUGE-L": [rouge_l(text, post["summary"]) for post, text in zip(pool, texts)],
               "longest": [len(text.split()) for text in texts]}
    true = torch.tensor(world.preferred(pool, texts)).view(-1, total)
    predicted = {}  # only a reward model predicts how often its pick is preferred
    for size in (world.sizes[-1], WEAK):
        model, line = world.reward_model(64, size), f"reward model, {size} comparisons"
        proxies[line] = world.score(model, pool, texts)
        gaps = proxies[line].view(-1, total) - world.score(model, posts)[:, None]
        predicted[line] = torch.sigmoid(gaps)
    five = torch.stack([world.score(world.reward_model(64, WEAK, member=member), pool, texts)
                        for member in range(5)])  # (5, samples)
    proxies |= {f"mean of five, {WEAK} comparisons": five.mean(0),
                f"worst of five, {WEAK} comparisons": five.amin(0)}
    for line, proxy in proxies.items():
        proxy = torch.as_tensor(proxy).view(-1, total)  # (posts, samples)
        for n in [2**i for i in range(9) if 2**i <= total]:
            row = {"line": line, "n": n, "kl": best_of_n_kl(n),
                   "true": expected_best_of(n, proxy, true)}
            if line in predicted:
                row["predicted"] = expected_best_of(n, proxy, predicted[line])
            yield row


def rouge_l(summary, reference):
    """F1 of the longest common subsequence of words, 0 to 1 (Lin 2004)."""
    ours, theirs = summary.split(), reference.split()
    longest = [0] * (len(theirs) + 1)  # [j]: of ours up to here and the first j words of theirs
    for word in ours:
        above = longest[:]
        for j, other in enumerate(theirs):
            longest[j + 1] = above[j] + 1 if word == other else max(above[j + 1], longest[j])
    return 2 * longest[-1] / max(1, len(ours) + len(theirs))


def expected_best_of(n, proxies, golds):
    """Gold value of the best of n by proxy, estimated without bias from all N >= n samples of each
    post: sum over k of C(k-1, n-1) / C(N, n) times the gold of the k-th by proxy, ascending.

    proxies, golds: (posts, N) -> the mean over the posts. Paper: App. G.3.
    """
    total = proxies.shape[1]
    weights = [math.comb(k, n - 1) / math.comb(total, n) for k in range(total)]  # k = 0: the worst
    ordered = golds.double().gather(1, proxies.argsort(dim=1, stable=True))
    return (ordered @ torch.tensor(weights, dtype=torch.float64)).mean().item()


def reward_data(world):
    """Fig. 6: accuracy on held-out labels, beside a second labeler and the best possible."""
    rows, pairs = world.comparisons()
    rows, pairs = rows[:HELD_OUT], pairs[:HELD_OUT]
    queries, chosen, rejected = zip(*pairs)
    right = [1 / (1 + math.exp(-row["log_odds"])) for row in rows]  # chance of this label
    for n in world.sizes:
        accuracies = {"who knows the taste": toy.label_ceiling(rows),
                      # both label it so, or both the other way round
                      "another labeler": mean(p * p + (1 - p) * (1 - p) for p in right)}
        for width in world.widths[::-1]:
            scores = [score_summaries(world.reward_model(width, n), queries, side,
                                      world.tokenizer.pad_token_id) for side in (chosen, rejected)]
            accuracies[f"width {width}"] = preference_accuracy(*scores)
        accuracies["longest"] = length_accuracy(pairs)
        for line, accuracy in accuracies.items():
            yield {"line": line, "comparisons": n, "accuracy": accuracy}


def value_networks(world):
    """Fig. 11 (G.1): where the critic's weights come from. A trunk shared with the policy gets a
    step of Adam for each of the two losses in turn."""
    first = world.ppo(64)[2]
    for line, critic in (
            ("separate, from the reward model", None),
            ("separate, from scratch", lambda policy: new_critic(world)),
            ("shared with the policy", lambda policy: new_critic(world, policy.base_model))):
        log = world.ppo(64, critic=critic)[2] if critic else first
        # one seed draws the same posts for all three: what differs is the critic
        for row, beside in zip(log, first):
            yield {"line": line, "step": row["step"], "reward": row["reward"],
                   "difference": row["reward"] - beside["reward"],
                   "point": row["step"] // 4}  # of four updates, 256 summaries


def new_critic(world, trunk=None):
    """A critic with a new head, on a new trunk or on a given one, which it then shares."""
    torch.manual_seed(world.seed)
    critic = RewardModel(toy.make_model(world.tokenizer, 64))
    critic.trunk = trunk or critic.trunk
    return critic


def what_came_after(world):
    """Not in the paper: RLOO and DPO (variants/) beside it, from the same SFT model, comparisons
    and, but for DPO, reward model; greedy summaries, best of 16 as in win_rates."""
    posts, model, pad_id = world.held_out, world.reward_model(64), world.tokenizer.pad_token_id
    _, pairs = world.comparisons()
    dpo, rloo = copy.deepcopy(world.sft(64)), copy.deepcopy(world.sft(64))
    # rate and batch: the better of 1e-4, 3e-4 and 1e-3 with batches of 32 on seed 0
    train_dpo(dpo, pairs[HELD_OUT:][: world.sizes[-1]], pad_id, 3e-4, 32, world.seed, unlogged)
    train_rloo(rloo, model, world.queries(world.posts), world.tokenizer,
               settings(return_sequences=4), world.seed, unlogged)
    best = best_of_n(world.write, lambda *texts: world.score(model, *texts).tolist(),
                     world.sft(64), posts[:100], 16)
    for line, texts in (
            ("SFT", world.write(world.sft(64), posts)), ("best of 16", best),
            ("PPO", world.write(world.ppo(64)[0], posts)), ("RLOO", world.write(rloo, posts)),
            ("DPO", world.write(dpo, posts))):
        yield {"line": line, "words": mean(len(text.split()) for text in texts),
               "preferred": mean(world.preferred(posts[: len(texts)], texts))}


def tokens(world):
    """3.4: what each token of one summary is paid and worth, before advantages are whitened."""
    policy, critic, _ = world.ppo(64)
    batch, ids = world.rollout(policy, world.reward_model(64), critic)
    i = batch.ended.long().argmax()  # the first that ended
    advantages, _ = ppo.compute_gae(batch.rewards, batch.values, batch.mask)
    numbers = {"log_ratio": batch.log_probs[i] - batch.ref_log_probs[i],  # (T,) each
               "reward": batch.rewards[i], "values": batch.values[i], "advantages": advantages[i]}
    for t in range(len(ids[i])):
        row = {"token position": t, "token": world.tokenizer.decode(ids[i][t]).strip("<|>")}
        yield row | {name: number[t].item() for name, number in numbers.items()}


# What gives the points of one seed; the claim; panels: x, lines, label and scale of x, label of y
PREFERRED = "fraction preferred to the reference"
FIGURES = {
    "win-rate": (win_rates, "PPO beats imitation at width 64, and loses to it at width 16", [
        ("width", ["preferred"], "width of the model", "log", PREFERRED)]),
    "over-optimization": (over_optimization, "Some reward helps, too much of it harms", [
        ("kl_per_summary", ["predicted", "true"], "KL from SFT (nats per summary)", "symlog",
         PREFERRED)]),
    "length-bias": (length_bias, "Labelers who pay for length get length", [
        ("update", ["words"], "PPO update", "linear", "words of a summary"),
        ("update", ["predicted"], "PPO update", "linear", PREFERRED + ", predicted"),
        ("update", ["true"], "PPO update", "linear", PREFERRED + ", truly")]),
    "best-of-n": (best_of_many, "Best of n: picking the longest equals the best reward model", [
        ("n", ["true"], "samples to pick from, n", "log", PREFERRED + ", truly"),
        ("kl", ["predicted", "true"], "KL from SFT, log n - (n-1)/n (nats)", "linear", PREFERRED)]),
    "reward-data": (reward_data, "More comparisons make a better reward model", [
        ("comparisons", ["accuracy"], "comparisons to train on", "log", "accuracy, held out")]),
    "value-network": (value_networks, "A critic of its own, begun as the reward model, is best", [
        ("step", ["reward"], "PPO update", "linear", "reward (references = 0)"),
        ("step", ["difference"], "PPO update", "linear", "reward, minus the first line's")]),
    "contrast": (what_came_after, "RLOO trusts the reward model as PPO does; DPO needs none", [
        ("seed", ["preferred"], "seed of the tiny world", "linear", PREFERRED),
        ("seed", ["words"], "seed of the tiny world", "linear", "words of a summary")]),
    "tokens": (tokens, "One summary as PPO sees it, token by token", [
        ("token position", ["log_ratio"], "", "linear", "log PPO/SFT (nats)"),
        ("token position", ["reward"], "", "linear", "reward"),
        ("token position", ["values"], "", "linear", "value"),
        ("token position", ["advantages"], "", "linear", "advantage")])}


# ---------------------------------------------------------------------------- the script


def points(names, quick, seed):
    """Rows of each figure for one seed."""
    world, rows = World(seed, quick), {}
    for name in names:
        start = time.perf_counter()
        rows[name] = [{"seed": seed, **row} for row in FIGURES[name][0](world)]
        tqdm.write(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", sys.stderr)
    return rows


def ticks(rows, x, scale):
    """Numbers to read on a scale that is not linear, instead of powers of ten."""
    some = {row[x] for row in rows}
    marks = sorted(some)  # few, on a logarithmic scale
    if scale == "symlog":
        marks = [mark for mark in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if mark < max(some)]
    return {"xticks": marks, "xticklabels": marks}


def write_figure(path, rows, title, panels):
    """The rows as JSON and, over all seeds, as a picture; of tokens, which differ, the first."""
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bars = "token" in rows[0]
    if bars:
        rows = [row for row in rows if row["seed"] == rows[0]["seed"]]
    drawn = []
    for x, keys, xlabel, xscale, ylabel in panels:
        axes = {"xlabel": xlabel, "xscale": xscale, "ylabel": ylabel}
        if bars:
            axes |= {"xticks": range(len(rows)), "xticklabels": [row["token"] for row in rows]}
        elif xscale != "linear":
            axes |= ticks(rows, x, xscale)
        # Fig. 5: each seed has its peak at another KL, which their mean hides
        drawn.append(Panel(rows, x, keys, COLORS, axes, bars, each_seed=x == "kl_per_summary"))
    draw(path.with_suffix(".png"), (2, 2) if bars else (1, len(panels)), drawn, title)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="The paper's figures, in the tiny world.")
    parser.add_argument("names", nargs="+", choices=[*FIGURES, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 2 3 4 5 6 7; quick: 0 1")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and points")
    parser.add_argument("--output_dir", default=HERE, type=Path, help="for PNG and JSON")
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        sys.exit('figures: matplotlib is not installed: pip install -e ".[plots]"')
    options.output_dir.mkdir(parents=True, exist_ok=True)
    # seeds 0 and 1 were looked at while the settings of over_optimization were chosen
    seeds = options.seeds or ([0, 1] if options.quick else range(2, 8))
    rows = {name: [] for name in FIGURES if name in options.names or "all" in options.names}
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        results = pool.imap(partial(points, list(rows), options.quick), seeds)
        for result in tqdm(results, "seeds", len(seeds), disable=None):
            for name in rows:  # drawn anew with each seed
                _, title, panels = FIGURES[name]
                rows[name] += result[name]
                write_figure(options.output_dir / name, rows[name], title, panels)


if __name__ == "__main__":
    main()
