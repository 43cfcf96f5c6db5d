"""An atlas of symptoms: PPO's curves in healthy runs, and in runs with one bug each.

    python figures/symptoms.py --healthy runs/seeds     # folders of default runs, one for each seed

--healthy: what `python benchmarks/seeds.py --output_dir runs/seeds` leaves. The grey band of a panel
is where those runs are, from the lowest to the highest. Each bug is one of exercises/bugs.py,
planted in a copy of the project, which then runs with three of those seeds, from their SFT model
and, where the bug comes after it, their reward model. All points go to symptoms.json; report.md of a run
draws the band behind its own curves. --seeds with no seed after it makes the band alone, in a
second; the 24 runs take about half an hour on two cores.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]

from bugs import BUGS, plant
from hunts import copy_project

CURVES = {  # stage and name of a number in metrics.jsonl -> what stands above its panels
    ("ppo", "reward"): "reward", ("ppo", "kl_per_summary"): "KL, nats per summary",
    ("ppo", "length"): "length, tokens", ("ppo", "entropy"): "entropy, nats",
    ("ppo", "policy_clip_fraction"): "clip fraction", ("ppo", "value_loss"): "value loss",
    ("judge", "true_quality"): "true quality", ("judge", "vs_reference_win_rate"): "win rate"}
HIGHEST = {"kl_per_summary": 40, "length": 50, "value_loss": 10, "policy_clip_fraction": 0.7}

# Name of the bug in exercises/bugs.py, settings of its runs, from the healthy reward model?
SICK = (
    ("the sign of the KL", [], True),
    ("the score is paid at every token", [], True),
    ("EOS is not an action", [], True),
    ("lambda is ignored", [], True),
    ("the reference is the policy itself", [], True),
    ("nothing is clipped", ["--ppo_lr", "1e-3"], True),
    ("the preference loss has chosen and rejected swapped", [], False),
    ("the labeler likes long summaries", [], False),
)


def curves(folder):
    """{name: [(update, number), ...]} of a run."""
    found = {name: [] for _, name in CURVES}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for stage, name in CURVES:
            if row["stage"] == stage and row.get(name) is not None:
                found[name].append((row["step"], row[name]))
    return found


def band(runs):
    """{name: [(update, lowest, highest), ...]} over the curves of several runs."""
    found = {}
    for name in runs[0]:
        columns = zip(*(run[name] for run in runs))  # the points of one update, a run each
        found[name] = [(points[0][0], min(y for _, y in points), max(y for _, y in points))
                       for points in columns]
    return found


def run_sick(healthy, job):
    """The curves of one bug with one seed; those up to where it stopped, if it did."""
    (name, settings, with_reward_model), seed = job
    (bug,) = [bug for bug in BUGS if bug.name.removesuffix(" (notebook)") == name]
    given = ["--sft_model", healthy / seed / "sft"]
    if with_reward_model:
        given += ["--reward_model", healthy / seed / "reward_model"]
    with tempfile.TemporaryDirectory() as folder:
        copied = copy_project(Path(folder, "copy"))
        plant(bug, copied)
        subprocess.run([sys.executable, copied / "rlhf_minimal.py", "--seed", seed, "--judge",
                        "labeler", "--output_dir", Path(folder, "run"), *given, *settings],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        return {"bug": name, "seed": seed, "curves": curves(Path(folder, "run"))}


def write(folder, told):
    (folder / "symptoms.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def draw(path, healthy, runs):
    """A row of panels for each bug, a column for each number, the same axes down a column."""
    from matplotlib.figure import Figure

    from engine.report import GREY, VERMILION

    fig = Figure((2.1 * len(CURVES), 1.9 * len(SICK)), layout="constrained")
    rows = fig.subplots(len(SICK), len(CURVES), sharex=True, sharey="col")
    for i, (row, (name, *_)) in enumerate(zip(rows, SICK)):
        for axis, ((_, key), title) in zip(row, CURVES.items()):
            axis.fill_between(*zip(*healthy[key]), color=GREY, alpha=0.35, linewidth=0)
            for run in runs:
                if run["bug"] == name and run["curves"][key]:
                    axis.plot(*zip(*run["curves"][key]), color=VERMILION, linewidth=0.9)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize="x-small")
            if key in HIGHEST:
                axis.set_ylim(0, HIGHEST[key])
            if i == 0:
                axis.set_title(title, fontsize="small")
        row[0].annotate(name, (0, -0.3), xycoords="axes fraction", fontsize="small",
                        annotation_clip=False)
    fig.suptitle("Curves of PPO with one bug each (three seeds), and where healthy runs are (grey)",
                 fontweight="bold")
    fig.savefig(path, dpi=90)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--healthy", type=Path, required=True, help="folders of default runs")
    parser.add_argument("--seeds", nargs="*", help="of the sick runs; default: the first three")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; default: 2")
    parser.add_argument("--output_dir", default=HERE, type=Path, help="for PNG and JSON")
    options = parser.parse_args(arguments)
    names = sorted(path.parent.name for path in options.healthy.glob("*/results.json"))
    seeds = names[:3] if options.seeds is None else options.seeds
    jobs = [(sick, seed) for sick in SICK for seed in seeds]
    healthy = band([curves(options.healthy / name) for name in names])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    told = {"healthy": healthy, "seeds": names, "runs": []}
    write(options.output_dir, told)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        work = pool.imap(partial(run_sick, options.healthy.resolve()), jobs)
        for run in tqdm(work, "runs with a bug", len(jobs), disable=None):
            told["runs"].append(run)
            write(options.output_dir, told)  # after each run: half an hour is not lost at Ctrl-C
    if told["runs"]:
        draw(options.output_dir / "symptoms.png", healthy, told["runs"])


if __name__ == "__main__":
    main()
