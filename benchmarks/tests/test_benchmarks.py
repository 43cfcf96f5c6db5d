"""The benchmarks run, at tiny sizes, and count what they say they count. Nothing is timed here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCHMARKS))  # as a script has it

import estimates
import seeds

TINY = "--width 16 --layers 1 --rounds 1".split()


def run(script, path, *arguments):
    subprocess.run([sys.executable, BENCHMARKS / script, "--json", path, *arguments], check=True,
                   stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def test_lengths_are_within_the_papers_limits():
    lengths = json.loads((BENCHMARKS / "lengths.json").read_text())
    assert len(lengths["prompts"]) == len(lengths["summaries"]) == 500
    assert 0 < min(lengths["prompts"]) and max(lengths["prompts"]) <= 512
    assert 24 <= min(lengths["summaries"]) and max(lengths["summaries"]) <= 48  # the 2020 filter


def pages():
    """All lines of the pages that speak of measured numbers."""
    root = BENCHMARKS.parent
    return [line for path in (root / "README.md", root / "engine" / "README.md",
                              *sorted(root.glob("docs/*.md")))
            for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_ppo_update_at_equal_work_computes_no_token_too_many(tmp_path):
    found = run("ppo_update.py", tmp_path / "a.json", "--shape", "equal", "--episodes", "4",
                "--savings", "--vocab", "32", *TINY)
    # 4 rows; 12 passes over 64 + 32 tokens; sampling: the prompt and 31 tokens, one at a time
    assert found["tokens_needed"] == 4 * (12 * 96 + 64 + 31) == found["tokens_computed"]
    assert found["plain_over_ours_tokens"] == 1, "at equal work the plain house does the same"


@pytest.mark.slow
def test_each_saving_saves_tokens_or_memory_alone(tmp_path):
    found = run("ppo_update.py", tmp_path / "a.json", "--shape", "real", "--episodes", "16",
                "--micro", "4", "--rollout", "4", "--vocab", "32", *TINY)
    tokens = {name: saving["tokens_ratio"] for name, saving in found["savings"].items()}
    assert set(tokens) == {"sharing", "trimming", "dropping", "slicing"}
    assert tokens["sharing"] > 2 and tokens["trimming"] > 1.1 and tokens["dropping"] > 1
    assert tokens["slicing"] == 1  # it saves logits, not tokens
    assert 1 <= found["computed_over_needed"] <= 1.15
    assert found["plain_over_ours_tokens"] > tokens["sharing"], "it neither shares nor trims"


@pytest.mark.slow
def test_sampling_writes_what_generate_writes(tmp_path):
    found = run("sampling.py", tmp_path / "a.json", "--episodes", "8", "--vocab", "32", *TINY)
    assert min(found[f"{name}_seconds"] for name in ("ours", "plain", "generate")) > 0


@pytest.mark.slow
def test_reward_step_has_the_loss_of_the_plain_form(tmp_path):
    found = run("reward_step.py", tmp_path / "a.json", "--pairs", "3", "--vocab", "32", *TINY)
    assert found["loss_gap"] < 1e-5


@pytest.mark.slow
def test_loop_gives_the_shares_of_the_stages(tmp_path):
    found = run("loop.py", tmp_path / "a.json", "--fast_dev_run")
    assert {"sft", "reward", "ppo", "total"} <= set(found["seconds"])
    assert found["share"]["total"] == 1


@pytest.mark.slow
def test_the_estimates_of_the_pages_are_those_of_the_script(capsys):
    estimates.main()
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("| `")}
    stated = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[-3:-1]]
              for line in pages() if re.match(r"\| `(student|day|full)` \|", line)}
    shown = {"student": [1, 2], "day": [3, 4], "full": [4, 5]}  # of memory, T4, T4, L4, A100, H100
    for preset, (memory, hours) in stated.items():
        sizes = rows[preset][0].split(" / ")
        assert memory == sizes[0 if preset == "student" else -1], preset
        said = [float(x) for x in re.findall(r": ([\d.]+)|, ([\d.]+) in", hours) for x in x if x]
        ours = [float(rows[preset][i].removesuffix(" h")) for i in shown[preset]]
        assert said == [round(x) if x > 10 and preset == "full" else x for x in ours], preset
    assert set(stated) == {"student", "day", "full"}


def test_what_the_pages_say_of_ten_seeds_is_in_seeds_json():
    """A row of seeds.py's table, wherever it is shown, has the numbers of seeds.json."""
    told = json.loads((BENCHMARKS / "seeds.json").read_text(encoding="utf-8"))
    paths = dict(seeds.MEASURES)
    rows = [[cell.strip(" *") for cell in line.split("|")[1:5]] for line in pages()
            if line.count("|") == 5]
    rows = [row for row in rows if row[0] in paths and row[0]]
    assert {"SFT against reference", "PPO against reference", "PPO against SFT"} <= {
        name for name, *_ in rows}
    for name, *shown in rows:
        numbers = told["measures"][paths[name]]
        assert len(numbers) == len(told["seeds"]) >= 10
        expected = sum(numbers) / len(numbers), min(numbers), max(numbers)
        digits = [len(number.partition(".")[2]) for number in shown]
        assert [float(number) for number in shown] == [
            round(number, n) for number, n in zip(expected, digits)], name
