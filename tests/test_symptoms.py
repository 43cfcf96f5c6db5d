"""The atlas of symptoms: its bands by hand, and that its bugs and points are there."""

import json

import pytest
from bugs import BUGS

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


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path):
    told = json.loads((symptoms.HERE / "symptoms.json").read_text(encoding="utf-8"))
    run = {"bug": "the sign of the KL", "seed": "10", "curves": {
        name: [(step, low) for step, low, _ in told["healthy"][name]] for _, name in symptoms.CURVES}}
    symptoms.draw(tmp_path / "atlas.png", told["healthy"], [run])
    assert (tmp_path / "atlas.png").read_bytes()[:4] == b"\x89PNG"
