"""What a person looks at: report.md, its curves, and the last lines in the terminal.

Everything here gets finished numbers and judges nothing.
"""

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

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


@dataclass
class Panel:
    """One pair of axes, and the lines on it."""

    rows: list  # dicts: a row has numbers by name, and may name its "line", "point" and "seed"
    x: str  # what lies on the x axis
    keys: list  # what lies on the y axis, a line for each
    colors: dict  # by key, or by "line" where there is one key and the rows name lines
    settings: dict  # title, xlabel, xscale, xticks and the like, as Axes.set takes them
    bars: bool = False  # instead of lines, with the names of the ticks on end
    band: tuple = ()  # (x, lowest, highest) of healthy runs, in grey behind the lines
    each_seed: bool = False  # thin behind a line: those of its seeds, as a mean can hide what each did


def draw(path, shape, panels, title=None):
    """Panels as a PNG, in rows and columns; on white: it reads on light and on dark pages."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    fig = Figure((2 + 4 * shape[1], 2 + 3 * shape[0]), layout="constrained")
    for axis, panel in zip(fig.subplots(*shape, squeeze=False).flat, panels):
        if panel.band:
            axis.fill_between(*zip(*panel.band), color=GREY, alpha=0.25, linewidth=0)
        draw_lines(axis, panel)
        axis.set(**panel.settings)
        axis.grid(alpha=0.3)
        axis.minorticks_off()  # on a logarithmic axis they would stand between the given ones
        axis.tick_params("x", rotation=90 if panel.bars else 0)
    fig.suptitle(title, fontweight="bold")
    fig.savefig(path, dpi=120)


def draw_lines(axis, panel):
    """A line (or bars) for each "line" of the rows and each key, with error bars."""
    keys, drawn = panel.keys, []
    for line in dict.fromkeys(row.get("line", "") for row in panel.rows):
        # None is a NaN that went through JSON, or a key that this line does not have
        rows = [row for row in panel.rows
                if row.get("line", "") == line and None not in map(row.get, keys)]
        for key in keys if rows else ():
            label = [key] * (len(keys) > 1 or not line) + [line] * bool(line)
            drawn.append(panel.colors[label[0]])
            xs, ys, errors = zip(*points_of(rows, panel.x, key))
            for seed in {row["seed"] for row in rows} if panel.each_seed else ():
                own = [row for row in rows if row["seed"] == seed]
                own_xs, own_ys, _ = zip(*points_of(own, panel.x, key))
                axis.plot(own_xs, own_ys, color=drawn[-1], linewidth=0.6, alpha=0.5)
            if panel.bars:
                axis.bar(xs, ys, color=drawn[-1])
            else:  # lines of one colour differ in their strokes
                axis.errorbar(xs, ys, errors, color=drawn[-1], capsize=2, markersize=4,
                              linestyle=("-", "--", ":")[drawn.count(drawn[-1]) - 1],
                              marker="o" if len(xs) < 40 else None,
                              label=", ".join(label).replace("_", " "))
    if len(drawn) > 1:
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))


def points_of(rows, x, y):
    """[(x, mean of y, its standard error)] over the rows of a point, which agree on "point" or else
    on x. The error is over seeds or, without seeds, over rows; a single one has none."""
    points = {}  # point -> seed -> rows
    for i, row in enumerate(rows):
        seeds = points.setdefault(row.get("point", row[x]), {})
        seeds.setdefault(row.get("seed", i), []).append(row)
    drawn = []
    for seeds in points.values():
        xs = [row[x] for some in seeds.values() for row in some]
        # a seed's rows are not independent: their mean counts once
        ys = [mean(row[y] for row in some) for some in seeds.values()]
        drawn.append((mean(xs), mean(ys), stdev(ys) / len(ys) ** 0.5 if len(ys) > 1 else 0))
    return sorted(drawn)


def healthy_bands(results):
    """{name of a metric: [(update, lowest, highest), ...]} of ten default runs, from the atlas of
    symptoms; nothing for a run that is not of the tiny world."""
    path = Path(__file__).parent.parent / "figures" / "symptoms.json"
    if results.get("preset") != "tiny" or "ideal_vs_reference" not in results or not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["healthy"]


def draw_run(run, results):
    """Draw curves.png into the run's folder."""
    healthy = healthy_bands(results)
    # between two dollars matplotlib expects a formula
    escaped, update = one_line(results["ppo_vs_sft"]["judge"]).replace("$", r"\$"), "PPO update"
    win_rates = {"vs_reference_win_rate": ORANGE, "vs_sft_win_rate": SKY}
    panels = []
    for stage, colors, title, xlabel in (
            ("sft", {"loss": SKY}, "SFT loss (nats per token)", "step"),
            ("reward", {"loss": BLUE}, "reward-model loss (nats per pair)", "step, means of 50"),
            ("ppo", {"reward": BLUE}, "reward of samples (references = 0)", update),
            ("ppo", {"kl_per_summary": VERMILION}, "KL to SFT (nats per summary)", update),
            ("ppo", {"length": GREY}, "length of samples (tokens)", update),
            ("ppo", {"entropy": BLACK}, "entropy of samples (nats per token)", update),
            ("ppo", {"policy_clip_fraction": PURPLE}, "clip fraction of the policy", update),
            ("ppo", {"value_loss": GREY}, "value loss", update),
            ("judge", win_rates, f"win rate (judge: {escaped})", update),
            ("judge", {"true_quality": GREEN}, "true quality, greedy (at most 5)", update)):
        size = 50 if stage == "reward" else 1  # a step has few pairs: a point is the mean of 50
        rows = [row | {"point": row["step"] // size} for row in run.history(stage)]
        settings = {"title": title, "xlabel": xlabel}
        panels.append(Panel(rows, "step", list(colors), colors, settings, band=[
            point for point in healthy.get(list(colors)[0], []) if stage in ("ppo", "judge")
            and rows and point[0] <= rows[-1]["step"]]))  # no further than this run went
    draw(run.folder / "curves.png", (2, 5), panels)


def picture(run, results):
    """The line of the report that shows the curves, or says why there are none: results matter
    more than a picture, so whatever an optional library does to us must not end the run."""
    try:
        draw_run(run, results)
        grey = "\n\nGrey: where ten default runs were." if healthy_bands(results) else ""
        return "![curves.png](curves.png)" + grey
    except OSError:  # a full disk, for one, loses the report, too
        raise
    except Exception as error:
        text = f"matplotlib can't draw here ({one_line(f'{type(error).__name__}: {error}')})"
        print(f"no picture in the report: {text}")
        return f'No picture: {cell(text)}. It comes with `pip install -e ".[plots]"`.'


# ---------------------------------------------------------------------------- words and tables

COMPARED = (("sft_vs_reference", "SFT against reference"),
            ("ppo_vs_reference", "PPO against reference"), ("ppo_vs_sft", "PPO against SFT"),
            ("best_of_n_vs_reference", "best-of-n against reference"),
            ("ideal_vs_reference", "the ideal against reference"))
HEADER = ("", "win rate", "95 % interval", "posts", "words ours / theirs")


def win_rate_table(results):
    """HEADER and a row for each of the comparisons that were judged, all strings."""
    table = [HEADER]
    for key, name in COMPARED:
        if key in results:
            r = results[key]
            table.append((name, f"{r['win_rate']:.3f}", f"{r['low']:.3f} - {r['high']:.3f}",
                          str(r["n"]), f"{r['mean_length']:.1f} / {r['mean_length_other']:.1f}"))
    return table


def agreement_line(agreements):
    """Rows (name, share, low, high, n) in one line: who chooses as the labelers did, how often."""
    return "; ".join(f"{name} {share:.3f} ({low:.3f} - {high:.3f}, n = {n})"
                     for name, share, low, high, n in agreements)


def one_line(text, width=300):
    """Text of others for a terminal: no line breaks, and nothing that could steer it (\\x1b[2J)."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.shorten(text, width, placeholder=" ...")


def cell(text):
    """Text of others for a table in Markdown: markup in a post stays text."""
    return re.sub(r"[\\`*_{}\[\]<>#|!~&]", lambda match: f"&#{ord(match[0])};",
                  one_line(text, 2000))


def table_row(cells):
    return f"| {' | '.join(cells)} |"


def print_end(run, results, samples):
    """What the terminal shows of a finished run: three posts, the win rates, where to look."""
    for sample in samples[:3]:
        print(f"\n{one_line(sample['post']['title'])}\n{one_line(sample['post']['post'])}")
        for name in ("reference", "sft", "ppo"):
            print(f"  {name:>9}: {one_line(sample[name])}")
    print(f"\nWin rates, judged by: {one_line(results['ppo_vs_sft']['judge'])}")
    for row in win_rate_table(results):
        print("{:29}{:10}{:15}{:7}{}".format(*row))
    print(f"\nKL {results['kl_per_summary']:.2f} nats per summary; reward of greedy summaries "
          f"{results['reward_sft']:.2f} -> {results['reward_ppo']:.2f}; "
          f"{results['seconds']['total']:.0f} s; see {run.folder / 'report.md'}")


def report(run, results, samples, agreements):
    """Write report.md with the curves, and print the end of the run.

    results: as in results.json; samples: as in samples.jsonl; agreements: rows (name, share, low,
    high, n) of who chooses as the labelers did.
    """
    judge, table = cell(results["ppo_vs_sft"]["judge"]), win_rate_table(results)
    numbers = [(key, f"{value:.4g}") for key, value in results.items() if isinstance(value, float)]
    texts = [(s["post"]["title"], s["reference"], s["sft"], s["ppo"]) for s in samples[:20]]
    lines = [f"# Run {run.folder.name}, seed {results['seed']}", "",
             f"Win rates, judged by **{judge}** on held-out posts; 95 % Wilson intervals.", "",
             f"Agreement with the labels of held-out comparisons: {agreement_line(agreements)}.",
             "", table_row(HEADER), "|---" * len(HEADER) + "|", *map(table_row, table[1:]), "",
             "| measure | value |", "|---|---|", *map(table_row, numbers), "",
             *(f"**Warning:** {cell(text)}\n" for text in results["warnings"]),
             picture(run, results) + "\n",
             "## Samples", "", "| post | reference | SFT | PPO |", "|---|---|---|---|",
             *(table_row(map(cell, row)) for row in texts), ""]
    run.write("report.md", "\n".join(lines))  # whoever finds it knows that the run is finished
    print_end(run, results, samples)
