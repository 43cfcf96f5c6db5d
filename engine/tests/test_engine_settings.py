"""engine/settings.py: what may be typed, and one line for what may not."""

import math
from types import SimpleNamespace

import pytest

from engine.settings import FAST, PRESETS, RANGES, SettingError, check_settings
from engine.settings import parse as parse_settings

RATE, COUNT, SHARE = "0 to 1e+06", "1 to 2.14748e+09", "0 to 1"
FROM_ZERO, ANY, SEED = "0 to 2.14748e+09", "-1e+06 to 1e+06", "0 to 9.22337e+18"
WARM, SOME = "0.001 to 1000", "1e-09 to 1e+06"


@pytest.mark.parametrize("expected, name, values", [
    (RATE, "ppo_lr", "-1 -1e-9 nan inf 1e300"), (RATE, "sft_lr", "-inf"), (RATE, "reward_lr", "-1"),
    (RATE, "kl_beta", "inf -0.05"), (RATE, "value_weight", "-1"), (RATE, "save_seconds", "inf"),
    (RATE, "judge_every", "-1"), (FROM_ZERO, "micro_batch_size", "-2"),
    (FROM_ZERO, "rollout_batch_size", "-1"), (FROM_ZERO, "lora_rank", "-1"),
    (FROM_ZERO, "max_posts", "9" * 20), (SHARE, "lam", "2 -0.1 inf"),
    (SHARE, "gamma", "nan 1.0000001 -1"), (ANY, "missing_eos", "nan inf -inf -nan 1e300"),
    (SEED, "seed", f"12345678901234567890 -1 {2**63}"),
    (WARM, "temperature", "0 nan inf -0.7 1e-300"), (SOME, "clip_range", "0 1e300"),
    (SOME, "max_grad_norm", "-1 nan"), (COUNT, "ppo_batch_size", "0"),
    (COUNT, "ppo_episodes", "-5 " + "9" * 20), (COUNT, "ppo_epochs", "0"),
    (COUNT, "ppo_minibatches", "0"), (COUNT, "return_sequences", "0"),
    (COUNT, "response_length", "-48"), (COUNT, "query_length", "0"),
    (COUNT, "toy_posts", f"0 {2**31}"), (COUNT, "toy_heads", "-4"),
    ("1 to 100", "prompt_newlines", "0")])
def test_a_number_out_of_range_is_one_line(name, values, expected, capsys):
    for value in values.split():
        with pytest.raises(SettingError) as error:
            parse_settings([f"--{name}={value}"])  # argparse takes "-1e-9" alone for another option
        message = str(error.value)
        assert "\n" not in message and capsys.readouterr() == ("", "")
        assert message.startswith(f"--{name} "), f"it names what was typed: {message}"
        shown = float(message.split(":")[0].split(" ")[1])
        assert shown == float(value) or math.isnan(shown) and math.isnan(float(value)), message
        assert message.endswith(f": expected {expected}; --help lists the settings")


@pytest.mark.parametrize("name, value", [
    ("ppo_lr", "0"), ("micro_batch_size", "0"), ("rollout_batch_size", "0"), ("lora_rank", "0"),
    ("judge_every", "0"), ("save_seconds", "0"), ("kl_beta", "0"), ("value_weight", "0"),
    ("gamma", "0"), ("gamma", "1"), ("lam", "0"), ("lam", "1"), ("missing_eos", "-2.5"),
    ("missing_eos", "0"), ("missing_eos", "3"), ("seed", "0"), ("seed", str(2**63 - 1)),
    ("temperature", "1e-3"), ("clip_range", "1e6"), ("ppo_episodes", str(2**31 - 1))])
def test_the_ends_of_each_range_are_within_it(name, value):
    found = getattr(parse_settings([f"--{name}", value]), name)
    assert found == type(found)(value)


@pytest.mark.parametrize("arguments, text", [
    (["--ppo_lr", "fast"], "--ppo_lr"), (["--seed", "1.5"], "--seed"), (["--lam"], "--lam"),
    (["--seed", "9" * 5000], "--seed"), (["--ppo_batch_size", "1e3"], "--ppo_batch_size"),
    (["--no_such", "1"], "--no_such"), (["--ppo", "1"], "--ppo"), (["extra"], "extra"),
    (["--preset", "huge"], "--preset huge: expected one of tiny, student, day, full"),
    (["--resume", "--restart"], "--resume and --restart: expected one of them"),
    (["--return_sequences", "3"], "--return_sequences 3: expected a divisor of ppo_batch_size"),
    (["--toy_width", "20"], r"--toy_width 20: expected a multiple of 2 x toy_heads \(4\)"),
    (["--posts", "a/b"], "--comparisons and --posts belong together"),
    (["--posts", "a/b", "--comparisons", "c/d"], "--judge: the labeler")])
def test_what_cannot_be_read_is_one_line_too(arguments, text, capsys):
    with pytest.raises(SettingError, match=text) as error:
        parse_settings(arguments)
    assert "\n" not in str(error.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_the_ranges(preset, fast):
    settings = parse_settings(["--preset", preset] + ["--fast_dev_run"] * fast)
    check_settings(settings, RANGES)
    for name in [*RANGES, *FAST, *PRESETS[preset]]:
        assert hasattr(settings, name), f"a range or a preset of no setting: {name}"


def test_a_home_folder_is_one_however_it_is_typed(monkeypatch, tmp_path):
    home = str(tmp_path)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USERPROFILE", home)  # Windows
    settings = parse_settings(["--output_dir=~/x", "--judge=~/judge", "--posts=~/p.jsonl",
                               "--comparisons", "~/c.jsonl", "--seed", "1"])
    assert (settings.output_dir, settings.judge) == (f"{home}/x", f"{home}/judge")
    assert (settings.posts, settings.comparisons) == (f"{home}/p.jsonl", f"{home}/c.jsonl")


def test_only_numbers_have_a_range():
    """And a setting that somebody adds may be zero, or anything finite."""
    some = {"ppo_batch_size": 2, "return_sequences": 1, "toy_width": 8, "toy_heads": 4}
    check_settings(SimpleNamespace(resume=False, judge=None, posts="-1", output_dir="nan", new=0,
                                   **some))
    with pytest.raises(SettingError, match="--new nan: expected"):
        check_settings(SimpleNamespace(new=math.nan, **some))


def test_what_is_typed_counts_more_than_preset_and_fast():
    settings = parse_settings(["--preset", "full", "--fast_dev_run", "--ppo_lr", "0.5",
                               "--ppo_episodes", "7", "--ppo_batch_size", "4"])
    assert (settings.ppo_lr, settings.ppo_episodes, settings.ppo_batch_size) == (.5, 7, 4)
    assert settings.temperature == .7 and settings.response_length == FAST["response_length"]
