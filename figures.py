"""Drawing. `draw_run` makes the curves of a run's report; without matplotlib it draws nothing."""

import json

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
