"""The README's results table: the default run over ten seeds, one after the other.

    python benchmarks/seeds.py --seeds 10 11 12 13 14 15 16 17 18 19 [--output_dir runs/seeds]

Prints a Markdown table of mean, minimum and maximum, and writes the numbers of each seed to
seeds.json in that folder (the README's are in benchmarks/seeds.json); a seed whose results.json is
there already is read, not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

MEASURES = (  # name in the table, path into results.json
    ("SFT against reference", "sft_vs_reference.win_rate"),
    ("PPO against reference", "ppo_vs_reference.win_rate"),
    ("PPO against SFT", "ppo_vs_sft.win_rate"),
    ("best of 16 against reference", "best_of_n_vs_reference.win_rate"),
    ("reward accuracy, held-out labels", "reward_accuracy"),
    ("the same / ceiling of the noisy labels", "reward_accuracy/reward_accuracy_ceiling"),
    ("pick the longer", "reward_accuracy_longest_wins"),
    ("a fit that never sees the post", "reward_accuracy_post_blind"),
    ("reward accuracy, true taste", "reward_accuracy_true_taste"),
    ("reward accuracy, one swapped fact", "reward_accuracy_swapped_fact"),
    ("label agrees with the taste", "label_agreement"),
    *((f"SFT samples: {fact} right", f"fact_accuracy.{fact}")
      for fact in ("who", "did", "what", "feels", "asks")),
    ("KL, nats per summary", "kl_per_summary"),
    ("words of SFT / PPO summaries", "mean_length_sft"),
    ("", "mean_length_ppo"),
    ("seconds, whole run", "seconds.total"),
    *((f"seconds, {stage}", f"seconds.{stage}") for stage in ("sft", "reward", "ppo")),
)


def read(results, path):
    if "/" in path:
        above, below = path.split("/")
        return results[above] / results[below]
    for key in path.split("."):
        results = results[key]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 20)))
    parser.add_argument("--output_dir", default="runs/seeds")
    arguments, settings = parser.parse_known_args()  # the rest goes to rlhf_minimal.py
    script = Path(__file__).resolve().parent.parent / "rlhf_minimal.py"
    runs = []
    for seed in arguments.seeds:
        folder = Path(arguments.output_dir) / str(seed)
        if not (folder / "results.json").exists():
            subprocess.run([sys.executable, script, "--seed", str(seed), "--output_dir", folder,
                            "--restart", *settings], check=True, stdout=subprocess.DEVNULL)
        runs.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        print(f"seed {seed}: PPO against reference "
              f"{runs[-1]['ppo_vs_reference']['win_rate']:.3f}", file=sys.stderr, flush=True)
    measures = {path: [read(run, path) for run in runs] for _, path in MEASURES}
    Path(arguments.output_dir, "seeds.json").write_text(json.dumps(
        {"seeds": arguments.seeds, "measures": measures}, indent=1) + "\n", encoding="utf-8")
    print(f"| measure, {len(runs)} seeds | mean | min | max |\n|---|---|---|---|")
    for name, path in MEASURES:
        numbers = measures[path]
        print(f"| {name} | {sum(numbers) / len(numbers):.3f} | {min(numbers):.3f} | "
              f"{max(numbers):.3f} |")


if __name__ == "__main__":
    main()
