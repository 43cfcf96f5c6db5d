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
    for name, settings, _, words in symptoms.SICK:
        assert names.count(name) == 1
        assert words and len(settings) % 2 == 0


def test_the_committed_points_are_all_there():
    told = json.loads((symptoms.HERE / "symptoms.json").read_text(encoding="utf-8"))
    assert {run["bug"] for run in told["runs"]} == {name for name, *_ in symptoms.SICK}
    assert len({run["seed"] for run in told["runs"]}) == 3 and len(told["seeds"]) == 10
    for _, name in symptoms.CURVES:
        assert all(low <= high for _, low, high in told["healthy"][name])
    assert len(told["healthy"]["reward"]) == 40
    assert (symptoms.HERE / "symptoms.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path):
    told = json.loads((symptoms.HERE / "symptoms.json").read_text(encoding="utf-8"))
    symptoms.draw(tmp_path / "atlas.png", told["healthy"], told["runs"])
    assert (tmp_path / "atlas.png").read_bytes()[:4] == b"\x89PNG"
