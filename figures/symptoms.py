"""An atlas of symptoms: PPO's curves in healthy runs, and in runs with one bug each.

    python figures/symptoms.py --healthy runs/seeds     # folders of default runs, one for each seed

--healthy: what `python benchmarks/seeds.py --output_dir runs/seeds` leaves. The grey band of a
panel is where those runs are, from the lowest to the highest. Each bug is one of exercises/bugs.py,
planted in a copy of the project, which then runs with three of those seeds, from their SFT model
and, where the bug comes after it, their reward model. The last row is no bug, but a labeler. All
points go to symptoms.json; report.md of a run draws the band behind its own curves. --seeds with no
seed after it makes the band alone, in a second; the 24 runs take about half an hour on two cores.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
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
    ("ppo", "length"): "length, tokens", ("ppo", "entropy"): "entropy of a token, nats",
    ("ppo", "policy_clip_fraction"): "clip fraction", ("ppo", "value_loss"): "value loss",
    ("judge", "true_quality"): "true quality, greedy",
    ("judge", "vs_reference_win_rate"): "win rate against references"}
# What leaves these ranges is drawn along the border, or one row would flatten the others
RANGES = {"reward": (-2, 4), "kl_per_summary": (-5, 30), "length": (0, 48), "entropy": (0, 2),
          "policy_clip_fraction": (0, 0.4), "value_loss": (0, 8), "true_quality": (-4, 5),
          "vs_reference_win_rate": (0, 1)}

@dataclass
class Sick:
    bug: str  # its name in exercises/bugs.py; any other name where only the settings are sick
    look: str  # the numbers that tell it best: their panels have a frame
    told: str  # what one sees, what it is, where to look
    settings: tuple = ()  # of its runs
    new_reward_model: bool = False  # the bug comes before the reward model: it is trained again


SICK = (
    Sick("the sign of the KL", "kl_per_summary length",
         "KL and length run away within fifteen updates, and the reward ends at -1, as no "
         "summary ends any more: distance from the SFT model is rewarded instead of punished. "
         "Look at kl_penalized_rewards: minus beta, times log pi_RL minus log pi_SFT, in this "
         "order."),
    Sick("the score is paid at every token", "value_loss",
         "The value loss is four times the band's and more, in every update. KL and length stay "
         "above the band, and the win rate falls below it while the reward looks healthy: each "
         "token earns the score, so that longer earns more. Look at where the score is added: "
         "once, at the last action."),
    Sick("EOS is not an action", "reward entropy",
         "The reward is -1 and never moves, and the entropy begins at 7 nats: no summary counts "
         "as ended, and the padding behind it counts as written. More than a quarter of the "
         "actions are clipped at first, and greedy summaries hardly change. Look at "
         "get_response_mask: up to and with the first EOS."),
    Sick("lambda is ignored", "",
         "The curves stay at the band, a little above it in value loss and entropy, as other "
         "seeds would: the advantages are only noisier. No picture finds this one. The pencil "
         "test of compute_gae does, as its lambda is not 1."),
    Sick("the reference is the policy itself", "kl_per_summary",
         "KL is exactly 0 in every update, which no policy that learns can have. All else may "
         "look healthy: one of three runs ends far worse, one dips, as nothing holds the policy. "
         "Look at the first lines of train_ppo: the reference is a copy."),
    Sick("nothing is clipped", "policy_clip_fraction kl_per_summary",
         "The clip fraction is exactly 0, although the rate is 1e-3 instead of 3e-4. KL jumps "
         "within ten updates, and the win rate stays below the band; in two of three runs the "
         "entropy falls to about a third. Look at policy_loss: the larger one of the plain and "
         "the clipped loss.",
         ("--ppo_lr", "1e-3")),
    Sick("the preference loss has chosen and rejected swapped", "reward vs_reference_win_rate",
         "The reward climbs to 2 - 4, far beyond the band, and so does the KL, while the win "
         "rate is below .25 after ten updates and ends at 0: what people rejected is rewarded. "
         "Look at preference_loss, r(chosen) - r(rejected), and at the reward model's accuracy "
         "in the first lines of a run: below one half.",
         (), True),
    Sick("labelers who pay for length", "reward length",
         "No bug, but --toy_length_bias 0.5. Reward and length rise above the band within ten "
         "updates and stay there, while true quality and win rate stay near it: the reward is "
         "for words, and the policy adds an aside. Look at the words in the table of win rates, "
         "and at length_controlled in results.json.",
         ("--toy_length_bias", "0.5"), True),
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


# What a run with a bug does, in the copy it is planted in: the stages that are given are there
# already, as in a run that is resumed, so that it begins where the bug does.
GIVEN_STAGES = """
import shutil, sys
import rlhf_minimal

healthy, stages, *arguments = sys.argv[1:]
settings = rlhf_minimal.parse_settings(arguments)
run = rlhf_minimal.Run(settings)
for stage in stages.split():
    shutil.copytree(f"{healthy}/{stage}", run.folder / stage)
rlhf_minimal.run_all(run, settings)
"""


def run_sick(healthy, job):
    """The curves of one bug with one seed; those up to where it stopped, if it did."""
    sick, seed = job
    stages = "sft" if sick.new_reward_model else "sft reward_model"
    with tempfile.TemporaryDirectory() as folder:
        (copied := Path(folder, "copy")).mkdir()
        copy_project(copied)
        for bug in BUGS:
            if bug.name.removesuffix(" (notebook)") == sick.bug:
                plant(bug, copied)
        subprocess.run([sys.executable, "-c", GIVEN_STAGES, healthy / seed, stages, "--seed", seed,
                        "--output_dir", Path(folder, "run"), *sick.settings],
                       cwd=copied, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        return {"bug": sick.bug, "seed": seed, "curves": curves(Path(folder, "run"))}


def write(folder, told):
    (folder / "symptoms.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def draw(path, healthy, runs):
    """A row of panels for each bug, a column for each number, the same axes down a column."""
    from matplotlib.figure import Figure

    from engine.report import BLACK, GREY, VERMILION

    fig = Figure((2.1 * len(CURVES), 2.5 * len(SICK)))
    fig.subplots_adjust(left=0.03, right=0.99, top=0.95, bottom=0.04, hspace=1.05, wspace=0.25)
    rows = fig.subplots(len(SICK), len(CURVES), sharex=True, sharey="col")
    for i, (row, sick) in enumerate(zip(rows, SICK)):
        for axis, ((_, key), title) in zip(row, CURVES.items()):
            axis.fill_between(*zip(*healthy[key]), color=GREY, alpha=0.35, linewidth=0)
            (low, high), framed = RANGES[key], key in sick.look.split()
            for run in runs:
                if run["bug"] == sick.bug and run["curves"][key]:
                    steps, numbers = zip(*run["curves"][key])
                    numbers = [min(max(number, low), high) for number in numbers]
                    axis.plot(steps, numbers, color=VERMILION, linewidth=1.2)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize="x-small", labelbottom=True)
            margin = 0.05 * (high - low)  # a line along the border can be seen
            axis.set_ylim(low - margin, high + margin)
            axis.set_title(title, fontsize="x-small", color=BLACK if framed else GREY)
            if framed:
                for spine in axis.spines.values():
                    spine.set_linewidth(2)
        row[0].annotate(f"{i + 1}. {sick.bug}", (0, 1.2), xycoords="axes fraction",
                        fontweight="bold")
        row[0].annotate(textwrap.fill(sick.told, 210), (0, -0.25), xycoords="axes fraction",
                        va="top")
    fig.suptitle("PPO with one fault a row: three runs in orange, ten healthy runs in grey, over 40 "
                 "updates; a line at the edge is beyond it", fontweight="bold")
    fig.savefig(path, dpi=75)


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
