"""Panels with lines on them, which are means over seeds with their standard errors."""

from dataclasses import dataclass
from statistics import fmean as mean
from statistics import stdev


@dataclass
class Panel:
    """One pair of axes, and the lines on it."""

    rows: list  # dicts: a row has numbers by name, and may name its "line", "point" and "seed"
    x: str  # what lies on the x axis
    keys: list  # what lies on the y axis, a line for each
    colors: dict  # by key, or by "line" where there is one key and the rows name lines
    settings: dict  # title, xlabel, xscale, xticks and the like, as Axes.set takes them
    bars: bool = False  # instead of lines, with the names of the ticks on end
    each_seed: bool = False  # thin behind a line: those of its seeds, which a mean can hide


def draw(path, shape, panels, title=None):
    """Panels as a PNG, in rows and columns; on white: it reads on light and on dark pages."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    fig = Figure((2 + 4 * shape[1], 2 + 3 * shape[0]), layout="constrained")
    for axis, panel in zip(fig.subplots(*shape, squeeze=False).flat, panels):
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
