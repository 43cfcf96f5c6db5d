"""What a person looks at after a run: report.md, and curves.png in it.

Everything here gets finished numbers and judges nothing.
"""

import re
import textwrap
from statistics import fmean as mean

from judge import HEADER, wilson_interval, win_rate_table

# One colour for one thing in every picture (Okabe-Ito, which colour-blind readers can tell apart)
BLUE = "#0072B2"  # the reward model, and what it thinks
GREEN = "#009E73"  # the truth: the labeler's own taste
VERMILION = "#D55E00"  # the distance from SFT: KL, log-ratios
ORANGE = "#E69F00"  # the human references, and what is held against them
SKY = "#56B4E9"  # the SFT model
PURPLE = "#CC79A7"  # PPO's policy
BLACK = "#000000"  # how a policy samples: entropy, best of n
GREY = "#666666"  # what needs no learning: length, random weights

# ---------------------------------------------------------------------------- pictures

# stage, numbers and their colours, title; and how many points are drawn, each the mean of several
# steps, as a single step of 8 pairs or 64 summaries says little. 0: each step is drawn
PANELS = (
    ("sft", {"loss": SKY}, "SFT loss (nats per token)", 40),
    ("reward", {"loss": BLUE}, "reward-model loss (nats per pair)", 40),
    ("reward", {"accuracy": BLUE}, "reward-model accuracy, while it trains", 40),
    ("ppo", {"reward": BLUE}, "reward of samples (references = 0)", 10),
    ("ppo", {"kl_per_summary": VERMILION}, "KL to SFT (nats per summary)", 0),
    ("ppo", {"length": GREY}, "length of samples (tokens)", 0),
    ("ppo", {"entropy": BLACK}, "entropy of samples (nats per token)", 0),
    ("ppo", {"policy_clip_fraction": PURPLE}, "clip fraction of the policy", 0),
    ("ppo", {"value_loss": GREY}, "value loss", 0),
    ("ppo", {"explained_variance": GREY}, "explained variance of the critic", 0),
    ("judge", {"vs_reference_win_rate": ORANGE, "vs_sft_win_rate": SKY},
     "win rate against reference and SFT", 0),
    ("judge", {"true_quality": GREEN}, "true quality (5 is the most)", 0))


def draw_run(run, healthy):
    """Draw curves.png into the run's folder, a panel for each number that the run has."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    drawn = [(panel, [row for row in run.history(panel[0])  # a NaN has gone through JSON as None
                      if None not in map(row.get, panel[1])]) for panel in PANELS]
    drawn = [(panel, rows) for panel, rows in drawn if rows]
    height = -(-len(drawn) // 3)  # three in a row
    fig = Figure((12, 3 * height), layout="constrained")
    for i, ((stage, colors, title, points), rows) in enumerate(drawn, 1):
        axis, size = fig.add_subplot(height, 3, i), max(1, len(rows) // points if points else 1)
        for key, color in colors.items():
            if size > 1:
                axis.plot(*columns(rows, key, 1), color=color, linewidth=0.6, alpha=0.4)
            axis.plot(*columns(rows, key, size), color=color,
                      label=key.removesuffix("_win_rate").replace("_", " "))
        band = [point for point in healthy.get(next(iter(colors)), ())
                if stage in ("ppo", "judge") and point[0] <= rows[-1]["step"]]  # as far as this run
        if band:
            axis.fill_between(*zip(*band), color=GREY, alpha=0.25, linewidth=0)
        axis.set(title=title, xlabel="step" if stage in ("sft", "reward") else "PPO update")
        axis.grid(alpha=0.3)
        if len(colors) > 1:
            axis.legend(fontsize="small")
    fig.savefig(run.folder / "curves.png", dpi=100)


def columns(rows, key, size):
    """Steps and numbers of rows, each a mean over `size` rows, the last one perhaps of fewer."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [[mean(row[name] for row in part) for part in parts] for name in ("step", key)]


def picture(run, healthy):
    """The lines of the report that show the curves, or say why there are none: results matter
    more than a picture, so whatever an optional library does to us must not end the run."""
    try:
        draw_run(run, healthy)
    except OSError:  # a full disk, for one, loses the report, too
        raise
    except Exception as error:
        text = f"matplotlib can't draw here ({type(error).__name__}: {error})"
        return f'No picture: {cell(text)}. It comes with `pip install -e ".[plots]"`.'
    grey = " Grey: from the lowest to the highest of ten default runs." if healthy else ""
    return ("![curves.png](curves.png)\n\nWhere a pale line shows each step, the strong one shows "
            f"means of several.{grey} Win rates and true quality are of greedy summaries.")


# ---------------------------------------------------------------------------- words and tables

# Who chooses as the labelers did: results by key, and what stands before their number
AGREE = {
    "reward_accuracy": "the reward model",
    "reward_accuracy_longest_wins": "whoever picks the longer summary",
    "reward_accuracy_post_blind": "a model that counts words and never reads the post"}
MEASURES = {
    "reward_accuracy_ceiling": "of these labels, the share that someone who knows the labeler's "
    "taste exactly would get right: labelers slip",
    "label_agreement": "share of these labels that agree with the labeler's taste",
    "reward_accuracy_true_taste": "share of these pairs in which the reward model prefers what the "
    "labeler's taste prefers, slips left out",
    "reward_accuracy_swapped_fact": "share of held-out posts for which the reward model prefers "
    "the ideal summary to the same one with a wrong fact: only a reader of the post can",
    "fact_accuracy": "of the facts that samples of the SFT model state, the share that is right",
    "kl_per_summary": "nats between the policy and the SFT model, for a whole summary, at the last "
    "PPO update",
    "best_of_n_kl": "nats between best-of-n and the SFT model",
    "reward_sft": "mean reward of the SFT model's greedy summaries; the references have 0",
    "reward_ppo": "mean reward of PPO's greedy summaries",
    "mean_length_sft": "words of the SFT model's greedy summaries",
    "mean_length_ppo": "words of PPO's greedy summaries",
    "mean_length_reference": "words of the references"}
VERDICTS = {1.0: "better than the reference", 0.5: "a tie with the reference",
            0.0: "worse than the reference"}


def one_line(text, width=300):
    """Text of others for a terminal: no line breaks, and nothing that could steer it (\\x1b[2J)."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.shorten(text, width, placeholder=" ...")


def cell(text):
    """Text of others in Markdown: markup in a post stays text."""
    return re.sub(r"[\\`*_{}\[\]<>#|!~&$]", lambda match: f"&#{ord(match[0])};",
                  one_line(text, 4000))


def table(header, rows):
    """A table in Markdown, with an empty line after it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def agreement(results):
    """Rows of who chooses as the labelers did, how often (4.3), with intervals."""
    rows = [(name, results[key], results["reward_accuracy_n"])
            for key, name in AGREE.items() if key in results]
    if "judge_agreement" in results:
        entry = results["judge_agreement"]
        rows.insert(0, (f"the judge, {cell(entry['judge'])}", entry["win_rate"], entry["n"]))
    return [(name, f"{share:.3f}", "{:.3f} - {:.3f}".format(*wilson_interval(share, n)), str(n))
            for name, share, n in rows]


def number(value):
    """A number, or several by name, as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(some)}" for name, some in value.items())
    return f"{value:.3f}"


def describe_sample(i, sample):
    """One post, and the summaries of it."""
    verdict = VERDICTS.get(sample["ppo_vs_reference"], "not judged")
    return (f"### {i}. {cell(sample['post']['title'])}\n\n**Post:** {cell(sample['post']['post'])}"
            f"\n\n- **reference:** {cell(sample['reference'])}"
            f"\n- **SFT** (reward {sample['reward_sft']:.2f}): {cell(sample['sft'])}"
            f"\n- **PPO** (reward {sample['reward_ppo']:.2f}; {verdict}): {cell(sample['ppo'])}\n")


def report(run, results, samples, healthy=None):
    """Write report.md, with curves.png, into run.folder. results and samples: as in results.json
    and samples.jsonl; healthy: where the curves of healthy runs are, {name of a number in
    metrics.jsonl: [(update, lowest, highest), ...]}."""
    win_rates = win_rate_table(results)
    measures = [(text, number(results[key])) for key, text in MEASURES.items() if key in results]
    run.write("report.md", "\n".join([  # whoever finds it knows that the run is finished
        f"# Run {cell(run.folder.name)}, seed {results['seed']}\n",
        *(f"**Warning:** {cell(text)}\n" for text in results["warnings"]),
        f"Summaries of held-out posts, judged by **{cell(results['ppo_vs_sft']['judge'])}**; 95 % "
        "Wilson intervals. The win rate of A against B is the share of posts where A is better, "
        "ties counting half.\n", table(HEADER, win_rates[1:]),
        "How often each chooses the summary that the labeler chose, on held-out comparisons:\n",
        table(("", "agrees", "95 % interval", "pairs"), agreement(results)),
        table(("measure", "value"), measures), picture(run, healthy or {}) + "\n",
        "## Samples\n", "The first posts of samples.jsonl.\n",
        *(describe_sample(i, sample) for i, sample in enumerate(samples[:20], 1))]))
