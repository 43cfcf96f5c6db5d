"""The atlas of symptoms: its bands by hand, and that its bugs and points are there."""

import json

import pytest
from bugs import BUGS

import rlhf_minimal
from figures import symptoms

pytest.importorskip("matplotlib")


def write_metrics(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_and_their_band_by_hand(tmp_path):
    for seed, (a, b) in {"3": (1.0, 5.0), "4": (2.0, 4.0), "5": (1.5, 7.0)}.items():
        write_metrics(tmp_path / seed, [
            {"stage": "sft", "step": 0, "loss": 9.0}, {"stage": "ppo", "step": 0, "reward": a},
            {"stage": "ppo", "step": 1, "reward": b, "length": None},
            {"stage": "judge", "step": 10, "true_quality": a + b, "length": 3.0}])
    runs = [symptoms.curves(tmp_path / seed) for seed in "345"]
    assert runs[0]["reward"] == [(0, 1.0), (1, 5.0)] and runs[0]["true_quality"] == [(10, 6.0)]
    assert runs[0]["length"] == [], "a judge's length is another one, and None is no point"
    assert symptoms.band(runs)["reward"] == [(0, 1.0, 2.0), (1, 4.0, 7.0)]


def test_each_sick_run_is_one_bug_of_the_catalogue():
    names = [bug.name.removesuffix(" (notebook)") for bug in BUGS]
    assert len(symptoms.SICK) >= 8
    for sick in symptoms.SICK:
        assert names.count(sick.bug) == ("--toy_length_bias" not in sick.settings)
        assert len(sick.settings) % 2 == 0
        assert len(sick.told) > 80, "what one sees, what it is, where to look"


def test_the_committed_band_is_that_of_ten_runs():
    told = json.loads((symptoms.HERE / "symptoms.json").read_text(encoding="utf-8"))
    assert told["seeds"] == [str(seed) for seed in range(10, 20)]
    for _, name in symptoms.CURVES:
        assert all(low <= high for _, low, high in told["healthy"][name])
    assert len(told["healthy"]["reward"]) == 40 and len(told["healthy"]["true_quality"]) == 4
    # before the first update the policy is the reference
    assert told["healthy"]["kl_per_summary"][0] == [0, 0, 0]


def test_the_committed_runs_bear_the_sentences_out():
    told = json.loads((symptoms.HERE / "symptoms.json").read_text(encoding="utf-8"))
    runs = {sick.bug: [] for sick in symptoms.SICK}
    for run in told["runs"]:  # numbers by name, without their updates
        runs[run["bug"]].append({name: [y for _, y in curve]
                                 for name, curve in run["curves"].items()})
    assert all(len(some) == 3 for some in runs.values()) and len(runs) == 8
    sign, every, eos, lam, reference, clip, swapped, length = runs.values()
    highest = {name: [high for _, _, high in band] for name, band in told["healthy"].items()}
    for run in sign:
        assert run["kl_per_summary"][15] > 20 and run["length"][15] > 30
        assert run["reward"][-1] == pytest.approx(-1, abs=0.1)
    for run in every:
        assert min(run["value_loss"]) > 4 * max(highest["value_loss"])
        assert run["kl_per_summary"][-1] > highest["kl_per_summary"][-1]
        assert run["vs_reference_win_rate"][-1] < 0.78 and run["reward"][-1] > 0
    for run in eos:
        assert run["reward"] == [-1] * 40 and 6 < run["entropy"][0] < 8
        assert run["policy_clip_fraction"][0] > 0.25
        assert max(run["true_quality"]) - min(run["true_quality"]) < 0.1
    for run in lam:
        assert max(run["kl_per_summary"]) < 4 and max(run["length"]) < 20
        assert run["true_quality"][-1] > 4
    for run in reference:
        assert run["kl_per_summary"] == [0] * 40
    assert sorted(run["true_quality"][-1] < 3 for run in reference) == [False, False, True]
    for run in clip:
        assert run["policy_clip_fraction"] == [0] * 40
        assert max(run["kl_per_summary"][:10]) > max(highest["kl_per_summary"])
        assert max(run["vs_reference_win_rate"]) < 0.7
    falls = sorted(run["entropy"][-1] / run["entropy"][0] for run in clip)
    assert falls[1] < 0.4 < falls[2]
    for run in swapped:
        assert 2 < run["reward"][-1] < 4 and run["kl_per_summary"][-1] > 7
        assert run["vs_reference_win_rate"][0] < 0.25 and run["vs_reference_win_rate"][-1] < 0.03
    for run in length:
        assert run["reward"][-1] > 1 and run["length"][-1] > highest["length"][-1]
        assert run["true_quality"][-1] > 4


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path):
    told = json.loads((symptoms.HERE / "symptoms.json").read_text(encoding="utf-8"))
    run = {"bug": "the sign of the KL", "seed": "10", "curves": {
        name: [(step, low) for step, low, _ in told["healthy"][name]] for _, name in symptoms.CURVES}}
    symptoms.draw(tmp_path / "atlas.png", told["healthy"], [run])
    assert (tmp_path / "atlas.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("bug, new_reward_model", [
    ("the reference is the policy itself", False), ("no bug of the catalogue", True)])
def test_a_sick_run_begins_where_its_bug_does(bug, new_reward_model, tmp_path):
    rlhf_minimal.main(["--seed", "3", "--fast_dev_run", "--output_dir", str(tmp_path / "3")])
    (healthy,) = [symptoms.curves(tmp_path / "3")]
    sick = symptoms.Sick(bug, "", "", ("--fast_dev_run",), new_reward_model)
    run = symptoms.run_sick(tmp_path, (sick, "3"))
    assert run["bug"] == bug and run["seed"] == "3"
    if new_reward_model:  # no bug: the reward model is trained as it was, and so is all else
        assert run["curves"] == healthy
    else:
        assert [kl for _, kl in run["curves"]["kl_per_summary"]] == [0, 0]
        assert run["curves"]["reward"][0] == healthy["reward"][0], "the reward model is the same"
        assert healthy["kl_per_summary"][1][1] != 0
