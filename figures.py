"""What a person looks at: what is measured of a run, its report.md, and the paper's figures.

    python figures.py all              # every figure and its numbers, into figures/
    python figures.py win-rate         # one of them
    python figures.py all --quick      # two seeds, few points: only the shapes

The figures are made in the tiny world, where the labeler's taste is known. Without matplotlib (the
plots extra) a run's report has everything but the picture, and says so.
"""

import argparse
import copy
import json
import math
import multiprocessing
import random
import re
import sys
import textwrap
import time
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import lm
import ppo
import reward
import toy
from judge import best_of_n_kl, judge_pairwise, length_controlled_win_rate, quality_judge
from judge import win_rate, wilson_interval
from reward import preference_accuracy, score_summaries
from run import peak_memory_bytes, rank
from tldr import build_prompt, encode_prompts

# One colour for one thing in every picture, found by how its label begins; Okabe-Ito, which
# colour-blind readers can tell apart
COLORS = {"#0072B2": ("reward", "predicted", "width", "separate, from the reward", "values"),
          "#009E73": ("true", "labeler", "another labeler", "who knows"),
          "#D55E00": ("kl", "log_ratio", "shared"), "#E69F00": ("vs_reference", "ROUGE"),
          "#56B4E9": ("loss", "SFT", "vs_sft"), "#CC79A7": ("PPO", "advantages"),
          "#000000": ("best", "entropy"), "#666666": ("length", "longest", "separate, from scr")}


# ---------------------------------------------------------------------------- what is measured


def mean_words(summaries):
    return mean(len(summary.split()) for summary in summaries)


def length_accuracy(pairs):
    """Share of pairs (query, chosen, rejected) whose longer summary was chosen; a tie counts half.
    The baseline that any reward model must beat: labelers like longer summaries (App. F)."""
    gaps = [len(chosen) - len(rejected) for _, chosen, rejected in pairs]
    return sum(0.5 if gap == 0 else gap > 0 for gap in gaps) / len(gaps)


def post_blind_accuracy(train_pairs, held_out_pairs, vocabulary_size):
    """Held-out accuracy of a preference model that never sees the post: logistic regression on the
    counts of each token and the length, fitted to the same pairs. What a reward model has beyond
    it, it has from reading the post."""

    def features(pairs):  # (N, V+1): counts of the chosen minus those of the rejected summary
        x = torch.stack([torch.bincount(torch.tensor(ids), minlength=vocabulary_size).float()
                         for pair in pairs for ids in pair[1:]])  # (2N, V)
        x = torch.cat([x, x.sum(1, keepdim=True) / 10], 1)
        return x[::2] - x[1::2]

    x, weights = features(train_pairs), torch.zeros(vocabulary_size + 1, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(200):
        loss = -F.logsigmoid(x @ weights).mean() + 1e-4 * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gaps = features(held_out_pairs) @ weights.detach()
    return preference_accuracy(gaps, torch.zeros_like(gaps))


def measure_reward_model(run, reward_model, pairs, held_out, rows, tokenizer):
    """Accuracy on the held-out comparisons (rows) beside what never reads the post."""
    queries, *pair = zip(*held_out)
    chosen, rejected = (score_summaries(reward_model, queries, side, tokenizer.pad_token_id)
                        for side in pair)
    accuracy, longest = preference_accuracy(chosen, rejected), length_accuracy(held_out)
    results = {"reward_accuracy": accuracy, "reward_accuracy_longest_wins": longest,
               "reward_accuracy_n": len(held_out)}
    if "gap" in rows[0]:  # the tiny world
        gaps = torch.tensor([row["gap"] for row in rows])
        agrees = ((chosen > rejected) == (gaps > 0))[gaps != 0]
        results |= {"reward_accuracy_post_blind": post_blind_accuracy(pairs, held_out,
                                                                      len(tokenizer)),
                    "reward_accuracy_true_taste": agrees.float().mean().item(),
                    "reward_accuracy_ceiling": toy.label_ceiling(rows),
                    "label_agreement": (gaps[gaps != 0] > 0).float().mean().item()}
    print(f"reward model: accuracy {accuracy:.3f} on {len(held_out)} held-out comparisons, "
          f"pick-the-longer {longest:.3f}")
    if wilson_interval(accuracy, len(held_out))[0] <= 0.5:
        run.warn("reward", f"the reward model is no better than chance, {accuracy:.3f} on "
                 f"{len(held_out)} held-out comparisons (the 95 % interval reaches 0.5): what PPO "
                 "makes of it means nothing; train it on more or cleaner comparisons")
    return results


def judged(run, judge, name, posts, ours, theirs):
    """Win rate of our summaries, as results.json has it, and the outcomes; name is the judge's."""
    outcomes = judge_pairwise(judge, posts, ours, theirs)
    rate = win_rate(outcomes)
    answered = rate.total - rate.abstentions
    if not answered:
        run.warn("judge", f"the judge {name} abstained on all {rate.total} posts: its win rates are"
                 " empty; choose another one")
    lengths = [[len(text) + 1 for text in side] for side in (ours, theirs)]  # "" has no logarithm
    return {"n": answered, "judge": name, **rate._asdict(),
            "length_controlled": length_controlled_win_rate(outcomes, *lengths),
            "mean_length": mean_words(ours), "mean_length_other": mean_words(theirs)}, outcomes


def judge_the_judge(run, ask, rows):
    """How often the judge agrees with the labels of held-out comparisons: what its win rates are
    worth. Both orders, ties count half."""
    rate, _ = ask(*([row[key] for row in rows] for key in ("post", "chosen", "rejected")))
    print(f"judge {rate['judge']}: agrees with {rate['win_rate']:.3f} ({rate['low']:.3f} - "
          f"{rate['high']:.3f}) of {len(rows)} held-out labels, {rate['abstentions']} abstentions")
    return {"judge_agreement": rate}


def judge_during(run, update, ask, posts, summaries, sft_summaries):
    """Log the win rates of the policy after a PPO update."""
    line = {"length": mean_words(summaries)}
    references = [post["summary"] for post in posts]
    for name, theirs in (("reference", references), ("sft", sft_summaries[: len(posts)])):
        rate, _ = ask(posts, summaries, theirs)
        line |= {f"vs_{name}_{key}": rate[key] for key in ("win_rate", "low", "high", "n")}
    if "facts" in posts[0]:  # the tiny world
        line["true_quality"] = mean(map(toy.true_quality, posts, summaries))
    run.log("judge", update, **line, judge=rate["judge"])


def best_of_n(write, reward_of, model, posts, n):
    """Best-of-n as a policy of its own (App. G.3): n samples at T = 0.7, the best by reward."""
    repeated = [post for post in posts for _ in range(n)]
    samples = write(model, repeated, 0.7, "best of n")
    scores = reward_of(repeated, samples)
    rows = range(0, len(samples), n)
    return [samples[max(range(row, row + n), key=scores.__getitem__)] for row in rows]


def finish(run, settings, results, ask, reward_of, posts, sft_summaries, summaries, best):
    """Judge the summaries of held-out posts; complete, save, report and return the results."""
    few = posts[: settings.judge_during]
    with run.timed("judge"):
        references = [post["summary"] for post in posts]
        results["sft_vs_reference"], _ = ask(posts, sft_summaries, references)
        results["ppo_vs_reference"], vs_reference = ask(posts, summaries, references)
        results["ppo_vs_sft"], vs_sft = ask(posts, summaries, sft_summaries)
        results["best_of_n_vs_reference"], _ = ask(few, best, references[: len(few)])
        results["best_of_n_kl"] = best_of_n_kl(settings.best_of_n)
        if "facts" in posts[0]:  # the tiny world
            ideal, swapped = toy.swapped_fact_pairs(posts, run.seed)
            results["ideal_vs_reference"], _ = ask(posts, ideal, references)
            results["reward_accuracy_swapped_fact"] = preference_accuracy(
                *(torch.tensor(reward_of(posts, side)) for side in (ideal, swapped)))
        rewards = [reward_of(posts, side) for side in (sft_summaries, summaries)]
    results |= {"kl_per_summary": run.history("ppo")[-1]["kl_per_summary"],
                "reward_sft": mean(rewards[0]), "reward_ppo": mean(rewards[1]),
                "mean_length_sft": mean_words(sft_summaries),
                "mean_length_ppo": mean_words(summaries),
                "mean_length_reference": mean_words(references)}
    columns = ("post", "reference", "sft", "ppo", "reward_sft", "reward_ppo", "ppo_vs_reference",
               "ppo_vs_sft", "judge")
    shown = [{key: post[key] for key in ("subreddit", "title", "post")} for post in posts]
    samples = [dict(zip(columns, (*row, results["ppo_vs_sft"]["judge"]))) for row in zip(
        shown, references, sft_summaries, summaries, *rewards, vs_reference, vs_sft)]
    run.write("samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    results |= {"warnings": list(run.warnings.values()), "seconds": run.total_seconds(),
                "peak_memory_bytes": peak_memory_bytes()}
    if rank() == 0:
        report(run, results, samples)
        run.write("results.json", results)  # last: it marks the run as finished
        run.remove("checkpoints")
    return results


# ---------------------------------------------------------------------------- what is drawn


def draw(path, shape, panels, title=None):
    """Panels (rows, x, keys, labels) as a PNG, on white: it reads on light and on dark pages."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    fig = Figure((2 + 4 * shape[1], 2 + 3 * shape[0]), layout="constrained")
    for axis, (rows, x, keys, labels) in zip(fig.subplots(*shape, squeeze=False).flat, panels):
        draw_lines(axis, rows, x, keys)
        axis.set(**labels)
        axis.grid(alpha=0.3)
        axis.tick_params("x", rotation=90 if x == "token position" else 0)
        if labels.get("xscale") in ("log", "symlog"):
            some = {row[x] for row in rows}
            ticks = sorted(some) if labels["xscale"] == "log" else [
                tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick < max(some)]
            axis.minorticks_off()
            axis.set(xticks=ticks, xticklabels=ticks)
    fig.suptitle(title, fontweight="bold")
    fig.savefig(path, dpi=120)


def draw_lines(axis, rows, x, keys):
    """rows[key] against rows[x], one line for each key and each "line" that the rows name: the mean
    of the rows of a point, which agree on "point" or else on x, +- its standard error over seeds
    (a seed's rows are not independent: their mean counts once) or, without seeds, over rows."""
    colors = []
    for line, key in product(dict.fromkeys(row.get("line", "") for row in rows), keys):
        points = {}  # point -> seed -> [(x, y)]
        for i, row in enumerate(rows):
            if row.get("line", "") == line and None not in map(row.get, keys):
                points.setdefault(row.get("point", row[x]), {}).setdefault(
                    row.get("seed", i), []).append((row[x], row[key]))
        if points:
            label = [key] * (len(keys) > 1 or not line) + [line] * bool(line)
            colors.append(next(c for c, names in COLORS.items() if label[0].startswith(names)))
            xs, ys = zip(*sorted((mean(x for pairs in seeds.values() for x, _ in pairs),
                                  [mean(y for _, y in pairs) for pairs in seeds.values()])
                                 for seeds in points.values()))
            errors = [stdev(y) / len(y) ** 0.5 if len(y) > 1 else 0 for y in ys]
            if x == "token position":
                axis.bar(xs, [mean(y) for y in ys], color=colors[-1])
                continue
            axis.errorbar(xs, [mean(y) for y in ys], errors, color=colors[-1], capsize=2,
                          linestyle=("-", "--", ":")[colors.count(colors[-1]) - 1],
                          marker="o" if len(xs) < 40 else None, markersize=4,
                          label=", ".join(label).replace("_", " "))
    if len(colors) > 1:
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))


def draw_run(run, results):
    """Draw curves.png into the run's folder; returns the line of the report that shows it."""
    if find_spec("matplotlib") is None:
        print("no picture in the report: matplotlib is not installed (the plots extra)")
        return 'No picture: matplotlib is not installed (`pip install -e ".[plots]"`).'
    judge, update = results["ppo_vs_sft"]["judge"], "PPO update"
    draw(run.folder / "curves.png", (2, 4), [
        # a point is the mean of 50 steps: a step has few pairs
        ([row | {"point": row["step"] // (50 if stage == "reward" else 1)}
          for row in run.history(stage)], "step", keys, {"title": title, "xlabel": xlabel})
        for stage, keys, title, xlabel in (
            ("sft", ["loss"], "SFT loss (nats per token)", "step"),
            ("reward", ["loss"], "reward-model loss (nats per pair)", "step, means of 50"),
            ("ppo", ["reward"], "reward of samples (references = 0)", update),
            ("ppo", ["kl_per_summary"], "KL to SFT (nats per summary)", update),
            ("ppo", ["length"], "length of samples (tokens)", update),
            ("ppo", ["entropy"], "entropy of samples (nats per token)", update),
            ("judge", ["vs_reference_win_rate", "vs_sft_win_rate"], f"win rate (judge: {judge})",
             update),
            ("judge", ["true_quality"], "true quality, greedy (at most 5)", update))])
    return "![curves.png](curves.png)"


COMPARED = (("sft_vs_reference", "SFT against reference"),
            ("ppo_vs_reference", "PPO against reference"), ("ppo_vs_sft", "PPO against SFT"),
            ("best_of_n_vs_reference", "best-of-n against reference"),
            ("ideal_vs_reference", "the ideal against reference"))


def win_rate_table(results):
    """Rows (name, win rate, interval, n, words of both) of the comparisons that were judged."""
    for key, name in COMPARED:
        if key in results:
            r = results[key]
            yield (name, f"{r['win_rate']:.3f}", f"{r['low']:.3f} - {r['high']:.3f}", str(r["n"]),
                   f"{r['mean_length']:.1f} / {r['mean_length_other']:.1f}")


def agreement(results):
    """What a win rate is worth: how often its judge, the reward model and pick-the-longer choose as
    the labelers did, with 95 % intervals."""
    rate, n = results["judge_agreement"], results["reward_accuracy_n"]
    rows = [(f"the judge {rate['judge']}", rate["win_rate"], rate["n"])]
    rows += [("the reward model", results["reward_accuracy"], n),
             ("pick-the-longer", results["reward_accuracy_longest_wins"], n)]
    return "; ".join("{} {:.3f} ({:.3f} - {:.3f}, n = {})".format(
        name, share, *wilson_interval(share, count), count) for name, share, count in rows)


def one_line(text, width=300):
    """Text of others for a terminal: no line breaks, and nothing that could steer it (\\x1b[2J)."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.shorten(text, width, placeholder=" ...")


def report(run, results, samples):
    """Print the end of the run, and write report.md with the curves."""
    judge = results["ppo_vs_sft"]["judge"]
    header = ("", "win rate", "95 % interval", "posts", "words ours / theirs")
    table = [header, *win_rate_table(results)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for sample in samples[:3]:
        print(f"\n{one_line(sample['post']['title'])}\n{one_line(sample['post']['post'])}")
        for name in ("reference", "sft", "ppo"):
            print(f"  {name:>9}: {one_line(sample[name])}")
    print(f"\nWin rates, judged by: {judge}")
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    total = results["seconds"]["total"]
    print(f"\nKL {results['kl_per_summary']:.2f} nats per summary; reward of greedy summaries "
          f"{results['reward_sft']:.2f} -> {results['reward_ppo']:.2f}; {total:.0f} s; "
          f"see {run.folder / 'report.md'}")

    def cell(text):  # markup in a post stays text
        text = one_line(text, 2000)
        return re.sub(r"[\\`*_{}\[\]<>#|!~&]", lambda match: f"&#{ord(match[0])};", text)

    lines = [f"# Run {run.folder.name}, seed {results['seed']}", "",
             f"Win rates, judged by **{judge}** on held-out posts; 95 % Wilson intervals.", "",
             f"Agreement with the labels of held-out comparisons: {agreement(results)}.", "",
             "| " + " | ".join(header) + " |", "|---" * len(header) + "|",
             *("| " + " | ".join(row) + " |" for row in table[1:]), "",
             "| measure | value |", "|---|---|",
             *(f"| {key} | {value:.4g} |" for key, value in results.items()
               if isinstance(value, float)), "",
             *(f"**Warning:** {cell(text)}\n" for text in results["warnings"])]
    lines += [draw_run(run, results) + "\n",
              "## Samples", "", "| post | reference | SFT | PPO |", "|---|---|---|---|",
              *("| " + " | ".join(cell(text) for text in (
                  s["post"]["title"], s["reference"], s["sft"], s["ppo"])) + " |"
                for s in samples[:20]), ""]
    run.write("report.md", "\n".join(lines))


# ---------------------------------------------------------------------------- the tiny world

HELD_OUT = 1500  # comparisons to measure accuracy on
WEAK = 500  # comparisons for a reward model that can be over-optimized


def settings(**changed):
    """The default settings of all stages, but for those that are given."""
    parts = lm.SFTConfig(), lm.ModelConfig(), reward.RewardConfig(), ppo.PPOConfig()
    return SimpleNamespace(**{key: x for part in parts for key, x in vars(part).items()} | changed)


class World:
    """One seed of the tiny world: its posts, and models by width, trained once and kept."""

    def __init__(self, seed, quick):
        self.seed, self.widths = seed, (64,) if quick else (16, 32, 64)
        self.sizes = (500, 4000) if quick else (500, 1000, 2000, 4000, 12000)  # of reward data
        n = 6600 if quick else 16400  # a sixth of the pairs are identical summaries
        posts = toy.make_posts(300 + n + 12800, seed)
        self.held_out, self.compared, self.posts = posts[:300], posts[300:-12800], posts[-12800:]
        self.tokenizer = toy.make_tokenizer([f"{build_prompt(post)} {post['summary']}"
                                             for post in self.posts[:5000]])

    def run(self):
        """In memory, what a stage asks of a run.Run."""
        lines, worker = [], multiprocessing.current_process()._identity or (0,)
        return SimpleNamespace(
            seed=self.seed, history=lambda stage: lines, warn=lambda *_: None,
            log=lambda stage, step, **metrics: lines.append({"step": step, **metrics}),
            steps=lambda stage, total, **_: tqdm(range(total), f"seed {self.seed}, {stage}",
                                                 position=worker[0], leave=False, disable=None))

    def encode(self, posts, summaries=None):
        """Queries and responses as token ids; the references where no summaries are given."""
        texts = [post["summary"] for post in posts] if summaries is None else summaries
        return (encode_prompts(posts, self.tokenizer, 512),
                [lm.encode_response(text, self.tokenizer, 128) for text in texts])

    def write(self, model, posts, temperature=0.0, *stream):
        return [lm.decode_response(ids, self.tokenizer) for ids in lm.sample_responses(
            model, self.tokenizer, self.encode(posts)[0], 48, temperature,
            lm.generator_for(self.seed, *stream))]

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
        lm.train_sft(self.run(), model, *self.encode(self.posts), self.tokenizer.pad_token_id,
                     settings())
        return model

    @cache
    def comparisons(self):
        """Rows and encoded pairs: one set for models of all widths, as in the paper."""
        samples = [self.write(self.sft(64), self.compared[: len(self.compared) // k], 1.0, k)
                   for k in (2, 4)]
        rows = toy.make_comparisons(self.compared, *samples, self.seed)
        random.Random(self.seed).shuffle(rows)
        posts, *sides = ([row[key] for row in rows] for key in ("post", "chosen", "rejected"))
        return rows, list(zip(self.encode(posts)[0], *(self.encode([], s)[1] for s in sides)))

    @cache
    def reward_model(self, width, n=None):
        """Trained on n comparisons that are not held out, by default the most."""
        torch.manual_seed(self.seed)  # for the head
        model, (_, pairs) = reward.RewardModel(self.sft(width)), self.comparisons()
        reward.train_reward(self.run(), model, pairs[HELD_OUT:][: n or self.sizes[-1]],
                            self.tokenizer.pad_token_id, settings())
        reward.normalize(model, *self.encode(self.posts[:1000]), self.tokenizer.pad_token_id)
        return model

    @cache
    def ppo(self, width, model=None, critic=None, evaluate=None, **changed):
        """Policy, critic and log of PPO against a reward model, the best by default.
        critic(policy): what to begin with instead of a copy of the model; evaluate(policy, update):
        called after each update."""
        model = model or self.reward_model(width)
        policy, model, run = copy.deepcopy(self.sft(width)), copy.deepcopy(model), self.run()
        if critic:
            model.__deepcopy__ = lambda memo: critic(policy)  # how train_ppo makes its critic
        critic = ppo.train_ppo(run, policy, model, self.encode(self.posts)[0], self.tokenizer,
                               settings(**changed), evaluate and partial(evaluate, policy))
        return policy, critic, run.history("ppo")

    def rollout(self, policy, model, critic):
        """ppo.rollout on the held-out posts at T = 1, and the token ids of its summaries."""
        batch = ppo.rollout(policy, self.sft(64), model, critic, self.encode(self.held_out)[0],
                            self.tokenizer, settings(), lm.generator_for(self.seed, "measure"))
        return batch, batch["input_ids"][:, -batch["mask"].shape[1] :].tolist()


# ---------------------------------------------------------------------------- the paper's figures


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


def win_rates(world):
    """Fig. 1: greedy summaries against the references; best of 16 at T = 0.7, as in G.3."""
    posts = world.held_out
    for width in world.widths:
        score = partial(world.score, world.reward_model(width))
        best = best_of_n(world.write, lambda *texts: score(*texts).tolist(), world.sft(width),
                         posts[:100], 16)
        for line, texts in (("best of 16", best), ("SFT", world.write(world.sft(width), posts)),
                            ("PPO", world.write(world.ppo(width)[0], posts))):
            yield {"line": line, "width": width,
                   "preferred": mean(world.preferred(posts[: len(texts)], texts))}


def over_optimization(world):
    """Fig. 5: PPO against a reward model of few comparisons, measured during one run without KL
    penalty and at the end of runs with one."""
    posts, model, rows = world.held_out, world.reward_model(64, WEAK), []
    references = world.score(model, posts)

    def evaluate(beta, policy, update):
        if update in ((0, 3, 6, 10, 15, 20, 30, 40, 60, 80) if beta == 0 else (80,)):
            batch, ids = world.rollout(policy, model, model)
            texts = [lm.decode_response(row, world.tokenizer) for row in ids]
            rows.append({"kl_beta": beta, "kl_per_summary": batch["kl"].mean().item(),
                         "predicted": torch.sigmoid(batch["scores"] - references).mean().item(),
                         "true": mean(world.preferred(posts, texts)), "point": f"{beta} {update}",
                         "line": "during a run without penalty" if beta == 0 else "end of runs"})

    evaluate(0.0, world.sft(64), 0)
    for beta in (0.0, 0.03, 0.2)[: len(world.widths)]:
        world.ppo(64, model, evaluate=partial(evaluate, beta), kl_beta=beta, ppo_episodes=80 * 64,
                  return_sequences=4)
    return rows


def best_of_many(world):
    """Fig. 7 and Table 10: from one pool of samples for each post, at T = 0.7."""
    posts, total = world.held_out[:60], 256
    pool = [post for post in posts for _ in range(total)]
    texts = world.write(world.sft(64), pool, 0.7, "pool")
    proxies = {"labeler": list(map(toy.true_quality, pool, texts)),
               "ROUGE-L": [rouge_l(text, post["summary"]) for post, text in zip(pool, texts)],
               "longest": [len(text.split()) for text in texts]}
    values = {"true": torch.tensor(world.preferred(pool, texts)).view(-1, total)}
    for size in (world.sizes[-1], WEAK):
        model, line = world.reward_model(64, size), f"reward model, {size} comparisons"
        proxies[line] = world.score(model, pool, texts)
        values[line] = torch.sigmoid(proxies[line].view(-1, total)
                                     - world.score(model, posts)[:, None])
    for line, proxy in proxies.items():
        for n in (2**i for i in range(9)):
            yield {"line": line, "n": n, "kl": best_of_n_kl(n)} | {
                key: expected_best_of(n, torch.as_tensor(proxy).view(-1, total), values[name])
                for key, name in (("true", "true"), ("predicted", line)) if name in values}


def reward_data(world):
    """Fig. 6: accuracy on held-out labels, beside a second labeler and the best possible."""
    rows, pairs = (part[:HELD_OUT] for part in world.comparisons())
    queries, *sides = zip(*pairs)
    right = [1 / (1 + math.exp(-row["gap"] / toy.NOISE)) for row in rows]  # chance of this label
    for n in world.sizes:
        accuracies = {"who knows the taste": toy.label_ceiling(rows),
                      "another labeler": mean(p * p + (1 - p) * (1 - p) for p in right)}
        for width in world.widths[::-1]:
            accuracies[f"width {width}"] = preference_accuracy(*(
                score_summaries(world.reward_model(width, n), queries, side,
                                world.tokenizer.pad_token_id) for side in sides))
        for line, accuracy in (accuracies | {"longest": length_accuracy(pairs)}).items():
            yield {"line": line, "comparisons": n, "accuracy": accuracy}


def value_networks(world):
    """Fig. 11 (G.1): where the critic's weights come from. A trunk shared with the policy gets a
    step of Adam for each of the two losses in turn."""
    def from_scratch(policy, trunk=None):
        torch.manual_seed(world.seed)
        critic = reward.RewardModel(toy.make_model(world.tokenizer, 64))
        critic.trunk = trunk or critic.trunk
        return critic

    first = world.ppo(64)[2]
    for line, critic in (("separate, from the reward model", None),
                         ("separate, from scratch", from_scratch),
                         ("shared with the policy", lambda p: from_scratch(p, p.base_model))):
        # one seed draws the same posts for all three: what differs is the critic
        for row, beside in zip(world.ppo(64, critic=critic)[2] if critic else first, first):
            yield {"line": line, "step": row["step"], "reward": row["reward"],
                   "difference": row["reward"] - beside["reward"],
                   "point": row["step"] // 4}  # of four updates, 256 summaries


def tokens(world):
    """3.4: what each token of one summary is paid and worth."""
    policy, critic, _ = world.ppo(64)
    batch, ids = world.rollout(policy, world.reward_model(64), critic)
    batch["log_ratio"] = batch["log_probs"] - batch["ref_log_probs"]
    batch["reward"] = ppo.kl_penalized_rewards(
        batch["scores"], batch["log_probs"], batch["ref_log_probs"], batch["mask"], 0.05)
    i = int(batch["ended"].long().argmax())  # the first that ended
    for t in range(int(batch["mask"][i].sum())):
        yield {"token position": t, "token": world.tokenizer.decode(ids[i][t]).strip("<|>")} | {
            key: batch[key][i, t].item() for key in ("log_ratio", "reward", "values", "advantages")}


# What yields the points of one seed; the claim; panels: x, lines, label and scale of x, label of y
PREFERRED = "fraction preferred to the reference"
FIGURES = {
    "win-rate": (win_rates, "Feedback beats imitation, given enough width", [
        ("width", ["preferred"], "width of the model", "log", PREFERRED)]),
    "over-optimization": (over_optimization, "Too much reward makes summaries worse", [
        ("kl_per_summary", ["predicted", "true"], "KL from SFT (nats per summary)", "symlog",
         PREFERRED)]),
    "best-of-n": (best_of_many, "The best of n is as good as the taste of who picks it", [
        ("n", ["true"], "samples to pick from, n", "log", PREFERRED + ", truly"),
        ("kl", ["predicted", "true"], "KL from SFT, log n - (n-1)/n (nats)", "linear", PREFERRED)]),
    "reward-data": (reward_data, "More comparisons make a better reward model", [
        ("comparisons", ["accuracy"], "comparisons to train on", "log", "accuracy, held out")]),
    "value-network": (value_networks, "A critic of its own, begun as the reward model, is best", [
        ("step", ["reward"], "PPO update", "linear", "reward (references = 0)"),
        ("step", ["difference"], "PPO update", "linear", "reward, minus the first line's")]),
    "tokens": (tokens, "One summary as PPO sees it, token by token", [
        ("token position", [key], "", "linear", label) for key, label in (
            ("log_ratio", "log PPO/SFT (nats)"), ("reward", "reward"), ("values", "value"),
            ("advantages", "advantage"))])}


def points(names, quick, seed):
    """Rows of each figure for one seed."""
    world, rows = World(seed, quick), {}
    for name in names:
        start = time.perf_counter()
        rows[name] = [{"seed": seed, **row} for row in FIGURES[name][0](world)]
        tqdm.write(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", sys.stderr)
    return rows


def write_figure(path, rows, title, panels):
    """The rows as JSON and, over all seeds, as a picture; of tokens, which differ, the first."""
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    shape, ticks = (1, len(panels)), {}
    if "token" in rows[0]:
        rows = [row for row in rows if row["seed"] == rows[0]["seed"]]
        ticks = {"xticks": range(len(rows)), "xticklabels": [row["token"] for row in rows]}
        shape = 2, 2
    draw(path.with_suffix(".png"), shape, [
        (rows, x, keys, {"xlabel": xlabel, "xscale": xscale, "ylabel": ylabel} | ticks)
        for x, keys, xlabel, xscale, ylabel in panels], title)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="The paper's figures, in the tiny world.")
    parser.add_argument("name", choices=[*FIGURES, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 2 3 4 5 6 7; quick: 0 1")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and points")
    parser.add_argument("--output_dir", default="figures", type=Path, help="for PNG and JSON")
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        sys.exit('figures: matplotlib is not installed: pip install -e ".[plots]"')
    options.output_dir.mkdir(parents=True, exist_ok=True)
    # seeds 0 and 1 were looked at while the settings of over_optimization were chosen
    seeds = options.seeds or ([0, 1] if options.quick else range(2, 8))
    rows = {name: [] for name in FIGURES if options.name in (name, "all")}
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        results = pool.imap(partial(points, list(rows), options.quick), seeds)
        for result in tqdm(results, "seeds", len(seeds), disable=None):
            for name, (_, title, panels) in FIGURES.items():
                if name in rows:  # drawn anew with each seed
                    rows[name] += result[name]
                    write_figure(options.output_dir / name, rows[name], title, panels)


if __name__ == "__main__":
    main()
