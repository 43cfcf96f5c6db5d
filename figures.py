"""What a person looks at: the end of a run, its report.md and its pictures.

Without matplotlib (the plots extra) the report has everything but the pictures, and says so.
"""

import json
import re
import textwrap

# One colour for one thing in every picture; Okabe-Ito, which colour-blind readers can tell apart
COLORS = {"reward": "#0072B2", "kl": "#D55E00", "truth": "#009E73", "reference": "#E69F00",
          "sft": "#56B4E9", "length": "#666666"}


def draw_run(folder, results):
    """Draw curves.png and win_rates.png into folder from metrics.jsonl; returns their names."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # no screen needed
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    stage = {name: [row for row in rows if row["stage"] == name]
             for name in ("sft", "reward", "ppo", "judge")}

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
                  for row in stage["judge"]]
        if points:
            x, y, low, high = zip(*points)
            axis.plot(x, y, marker="o", color=COLORS[name], label=f"PPO against {name}")
            axis.fill_between(x, low, high, color=COLORS[name], alpha=0.2)
    axis.axhline(0.5, color="#666666", linewidth=0.8)
    axis.set(title=f"win rate (judge: {results['ppo_vs_sft']['judge']})", xlabel="PPO update",
             ylim=(0, 1.02))
    if stage["judge"]:
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


def one_line(text, width=300):
    return textwrap.shorten(text, width, placeholder=" ...")


def report(run, results, samples):
    """Print the end of the run, and write report.md with the curves."""
    judge = results["ppo_vs_sft"]["judge"]
    header = ("", "win rate", "95 % interval", "posts", "words ours / theirs")
    table = [header, *win_rate_table(results)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for sample in samples[:3]:
        print(f"\n{sample['post']['title']}\n{one_line(sample['post']['post'])}")
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
        text = " ".join(text.split())[:2000]
        return re.sub(r"[\\`*_{}\[\]<>#|!~&]", lambda match: f"&#{ord(match[0])};", text)

    lines = [f"# Run {run.folder.name}, seed {results['seed']}", "",
             f"Win rates, judged by **{judge}** on held-out posts; 95 % Wilson intervals.", "",
             "| " + " | ".join(header) + " |", "|---" * len(header) + "|",
             *("| " + " | ".join(row) + " |" for row in table[1:]), "",
             "| measure | value |", "|---|---|",
             *(f"| {key} | {value:.4g} |" for key, value in results.items()
               if isinstance(value, float)), ""]
    pictures = draw_run(run.folder, results)
    lines += [f"![{name}]({name})\n" for name in pictures] or [
        "No pictures: matplotlib is not installed (`pip install -e \".[plots]\"`).\n"]
    if not pictures:
        print("no pictures in the report: matplotlib is not installed (the plots extra)")
    lines += ["## Samples", "", "| post | reference | SFT | PPO |", "|---|---|---|---|",
              *("| " + " | ".join(cell(text) for text in (
                  s["post"]["title"], s["reference"], s["sft"], s["ppo"])) + " |"
                for s in samples[:20]), ""]
    run.write("report.md", "\n".join(lines))
