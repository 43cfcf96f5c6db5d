"""report.md and its curves: sentences for all numbers, posts beside their summaries, nothing lost."""

import json

import pytest

import judge
import rlhf_minimal
from engine import report as report_file
from engine.report import columns, report

Figure = pytest.importorskip("matplotlib.figure").Figure


class Folder:
    """What a report asks of a run."""

    def __init__(self, folder, **history):
        self.folder, self.lines = folder, history

    def history(self, stage):
        return self.lines.get(stage, [])

    def write(self, name, text):
        (self.folder / name).write_text(text, encoding="utf-8")


def results_of(name="labeler", **more):
    rate = {"win_rate": 0.5, "low": 0.4, "high": 0.6, "n": 9, "mean_length": 5.0,
            "mean_length_other": 4.0, "judge": name}
    return {"seed": 7, "ppo_vs_sft": rate, "warnings": ["the KL is high"], **more}


SAMPLE = {"post": {"title": "a title", "post": "the post"}, "reference": "r", "sft": "s",
          "ppo": "q", "reward_sft": 0.0, "reward_ppo": 1.5, "ppo_vs_reference": 1.0}
PPO = [{"step": step, "reward": float(step), "kl_per_summary": 1.0} for step in range(40)]


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(report_file, "draw_run", lambda run, healthy: None)


def test_what_a_report_says(tmp_path, undrawn, capsys):
    agrees = {"judge_agreement": {"judge": "labeler", "win_rate": 0.8, "n": 50},
              "reward_accuracy": 0.6, "reward_accuracy_n": 90}
    report(Folder(tmp_path), results_of(kl_per_summary=1.25, **agrees), [SAMPLE])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "seed 7" in text and "**Warning:** the KL is high" in text
    assert "| PPO against SFT | 0.500 | 0.400 - 0.600 | 9 | 5.0 / 4.0 |" in text
    assert "at the last PPO update | 1.250 |" in text
    low, high = judge.wilson_interval(0.6, 90)
    assert f"| the reward model | 0.600 | {low:.3f} - {high:.3f} | 90 |" in text
    assert "| the judge, labeler | 0.800 |" in text and "longer" not in text
    assert "### 1. a title\n\n**Post:** the post\n" in text
    assert "- **PPO** (reward 1.50; better than the reference): q\n" in text
    assert "_" not in text.replace("__", ""), "names of JSON are no words"
    assert capsys.readouterr().out == "", "the caller prints"


def test_who_agrees_with_the_labels_and_how_surely():
    rows = report_file.agreement({
        "judge_agreement": {"judge": "me/judge", "win_rate": 60 / 90, "n": 90},
        "reward_accuracy": 0.5, "reward_accuracy_longest_wins": 1.0, "reward_accuracy_n": 100})
    # Wilson at 1 of 1: n / (n + z^2); at one half: 1/2 +- 1/2 / sqrt(1 + n / z^2)
    assert rows == [("the judge, me/judge", "0.667", "0.564 - 0.755", "90"),
                    ("the reward model", "0.500", "0.404 - 0.596", "100"),
                    ("whoever picks the longer summary", "1.000", "0.963 - 1.000", "100")]


@pytest.mark.slow
def test_each_number_of_a_run_has_its_sentence(tmp_path):
    results = rlhf_minimal.main(["--fast_dev_run", "--output_dir", str(tmp_path / "run")])
    numbers = {key for key, value in results.items() if isinstance(value, float)}
    assert numbers <= report_file.MEASURES.keys() | report_file.AGREE.keys()
    assert report_file.MEASURES.keys() <= results.keys()
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "Grey: from the lowest to the highest of ten default runs" in text
    png = (tmp_path / "run" / "curves.png").read_bytes()
    assert png[:4] == b"\x89PNG" and int.from_bytes(png[16:20], "big") == 1200  # pixels wide
    # each stage's panel finds its numbers in metrics.jsonl
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for stage, colors, _, _ in report_file.PANELS:
        assert any(line["stage"] == stage and colors.keys() <= line.keys() for line in lines)


def test_text_of_others_stays_text(tmp_path, undrawn):
    hostile = "<b>x</b> | [a](b) `c` # d\n* e $f$ \x1b[2J"
    sample = SAMPLE | {"post": {"title": hostile, "post": hostile}, "ppo": hostile,
                       "ppo_vs_reference": None}
    report(Folder(tmp_path), results_of("./a$^$x *\nb"), [sample])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in text and "\x1b" not in text and "](b)" not in text and "$" not in text
    assert "judged by **./a&#36;^&#36;x &#42; b**" in text
    shown = text[text.index("## Samples") :]
    assert "not judged" in shown and "\n* e" not in shown and "|" not in shown


def test_a_reward_is_smoothed_and_lies_before_the_band(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda fig, *_, **__: saved.append(fig))
    healthy = {"reward": [(step, -1.0, 1.0) for step in range(60)], "loss": [(0, 0, 1)]}
    rows = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": None}]
    report(Folder(tmp_path, ppo=PPO, sft=rows), results_of(), [SAMPLE], healthy)
    (fig,) = saved
    sft, reward, kl = fig.axes
    assert not sft.collections, "a loss of SFT has no band, whatever its name"
    pale, strong = reward.get_lines()
    assert list(pale.get_ydata()) == list(range(40)) and pale.get_alpha() < 0.5
    assert list(strong.get_ydata()) == [4 * i + 1.5 for i in range(10)], "means of four"
    (band,) = reward.collections
    assert band.get_paths()[0].vertices[:, 0].max() == 39, "no further than the run"
    assert len(kl.get_lines()) == 1 and len(kl.get_lines()[0].get_ydata()) == 40
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "means of several" in text and "Grey:" in text


def test_the_last_mean_may_be_of_fewer():
    rows = [{"step": step, "x": 2.0 * step} for step in range(5)]
    assert columns(rows, "x", 2) == [[0.5, 2.5, 4], [1, 5, 8]]


@pytest.mark.parametrize("error", [ImportError("numpy.core failed"), AttributeError("_ARRAY_API"),
                                   ValueError("no font")])
def test_a_picture_that_fails_is_said_in_the_report(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(report_file, "draw_run", fail)
    report(Folder(tmp_path), results_of(), [SAMPLE])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"No picture: matplotlib can't draw here ({type(error).__name__}" in text
    assert "curves.png" not in text and "### 1. a title" in text


def test_a_full_disk_is_no_reason_to_go_without_a_picture(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_file, "draw_run", fail)
    with pytest.raises(OSError, match="No space left"):
        report(Folder(tmp_path), results_of(), [SAMPLE])
    assert not (tmp_path / "report.md").exists(), "a resume would not draw it again"


def test_a_run_that_taught_nothing_new_has_fewer_panels(tmp_path):
    """With models that were given, there are no SFT curves; of three panels none is empty."""
    report(Folder(tmp_path, ppo=PPO), results_of(), [SAMPLE])
    png = (tmp_path / "curves.png").read_bytes()
    size = [int.from_bytes(png[start : start + 4], "big") for start in (16, 20)]
    assert size == [1200, 300]
