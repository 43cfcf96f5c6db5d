"""What a person looks at: what is measured of a run, its report.md and its pictures.

Without matplotlib (the plots extra) the report has everything but the pictures, and says so.
"""

import json
import re
import textwrap

import torch
import torch.nn.functional as F

import toy
from judge import best_of_n_kl, judge_pairwise, length_controlled_win_rate, win_rate
from judge import wilson_interval
from reward import preference_accuracy, score_summaries
from run import peak_memory_bytes, rank

# One colour for one thing in every picture; Okabe-Ito, which colour-blind readers can tell apart
COLORS = {"reward": "#0072B2", "kl": "#D55E00", "truth": "#009E73", "reference": "#E69F00",
          "sft": "#56B4E9", "length": "#666666"}


# ---------------------------------------------------------------------------- what is measured


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


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
        x = torch.zeros(len(pairs), vocabulary_size + 1)
        for row, (_, chosen, rejected) in zip(x, pairs):
            for sign, ids in ((1.0, chosen), (-1.0, rejected)):
                row[:-1] += sign * torch.bincount(torch.tensor(ids), minlength=vocabulary_size)
                row[-1] += sign * len(ids) / 10
        return x

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


def draw_run(run, results):
    """Draw curves.png and win_rates.png into the run's folder; returns their names."""
    folder = run.folder
    try:
        import matplotlib

        matplotlib.use("Agg")  # no screen needed
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    stage = {name: run.history(name) for name in ("sft", "reward", "ppo", "judge")}

    fig, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    curve(axes[0, 0], stage["sft"], "loss", "SFT loss (nats per token)", "step", COLORS["sft"])
    curve(axes[0, 1], stage["reward"], "loss", "reward-model loss (nats per pair)", "step",
          COLORS["reward"], smooth=50)
    curve(axes[0, 2], stage["ppo"], "reward", "reward of samples (references = 0)", "PPO update",
          COLORS["reward"])
    curve(axes[1, 0], stage["ppo"], "kl_per_summary", "KL to SFT (nats per summary)", "PPO update",
          COLORS["kl"])
    curve(axes[1, 1], stage["ppo"], "length", "length of samples (tokens)", "PPO update",
          COLORS["length"])
    axis = axes[1, 2]
    for name in ("reference", "sft"):
        points = [(row["step"], *(row[f"vs_{name}_{key}"] for key in ("win_rate", "low", "high")))
                  for row in stage["judge"] if row[f"vs_{name}_n"]]  # not if all abstained
        if points:
            x, y, low, high = zip(*points)
            axis.plot(x, y, marker="o", color=COLORS[name], label=f"PPO against {name}")
            axis.fill_between(x, low, high, color=COLORS[name], alpha=0.2)
    axis.axhline(0.5, color="#666666", linewidth=0.8)
    axis.set(title=f"win rate (judge: {results['ppo_vs_sft']['judge']})", xlabel="PPO update",
             ylim=(0, 1.02))
    if axis.lines[1:]:
        axis.legend(loc="lower right")
    fig.savefig(folder / "curves.png", dpi=100)
    plt.close(fig)
    names = ["curves.png"]

    if any("true_quality" in row for row in stage["judge"]):
        fig, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
        curve(axis, stage["judge"], "true_quality", "true quality, greedy summaries (at most 5)",
              "PPO update", COLORS["truth"])
        fig.savefig(folder / "true_quality.png", dpi=100)
        plt.close(fig)
        names.append("true_quality.png")

    shown = [(key.replace("_", " ").replace(" vs ", " against "), results[key])
             for key in results if key.endswith(("vs_reference", "vs_sft"))]
    fig, axis = plt.subplots(figsize=(7, 0.5 * len(shown) + 1.2), layout="constrained")
    for y, (_, rate) in enumerate(shown):
        axis.errorbar(rate["win_rate"], y, fmt="o", color=COLORS["truth"], capsize=3,
                      xerr=[[max(0, rate["win_rate"] - rate["low"])],
                            [max(0, rate["high"] - rate["win_rate"])]])
    axis.axvline(0.5, color="#666666", linewidth=0.8)
    axis.set(yticks=range(len(shown)), yticklabels=[name for name, _ in shown], xlim=(0, 1.02),
             xlabel=f"fraction preferred, 95 % interval (judge: {results['ppo_vs_sft']['judge']})")
    axis.invert_yaxis()
    fig.savefig(folder / "win_rates.png", dpi=100)
    plt.close(fig)
    return [*names, "win_rates.png"]


def curve(axis, rows, key, title, xlabel, color, smooth=1):
    """One metric against the step; smooth > 1 draws the mean of that many neighbours."""
    x, y = [row["step"] for row in rows], [row[key] for row in rows]
    if smooth > 1 and len(y) > 2 * smooth:
        x = x[smooth - 1 :]
        y = [sum(y[i : i + smooth]) / smooth for i in range(len(y) - smooth + 1)]
        title += f", mean of {smooth}"
    axis.plot(x, y, color=color, marker="o" if len(x) < 40 else None, markersize=3)
    axis.set(title=title, xlabel=xlabel)
    axis.grid(alpha=0.3)


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
    pictures = draw_run(run, results)
    lines += [f"![{name}]({name})\n" for name in pictures] or [
        "No pictures: matplotlib is not installed (`pip install -e \".[plots]\"`).\n"]
    if not pictures:
        print("no pictures in the report: matplotlib is not installed (the plots extra)")
    lines += ["## Samples", "", "| post | reference | SFT | PPO |", "|---|---|---|---|",
              *("| " + " | ".join(cell(text) for text in (
                  s["post"]["title"], s["reference"], s["sft"], s["ppo"])) + " |"
                for s in samples[:20]), ""]
    run.write("report.md", "\n".join(lines))
