"""engine/settings.py: what may be typed, and one line for what may not."""

import math
from types import SimpleNamespace

import pytest

from engine.main import parse_settings
from engine.settings import FAST, PRESETS, RANGES, SettingError, check_ranges

SEED, COUNT = f"0 to {2**63 - 1}", f"at most {2**31 - 1}"


@pytest.mark.parametrize("name, value, expected", [
    ("ppo_lr", "-1", "0 or more"), ("ppo_lr", "-1e-9", "0 or more"), ("ppo_lr", "nan", "0 or more"),
    ("ppo_lr", "inf", "0 or more"), ("sft_lr", "-inf", "0 or more"),
    ("reward_lr", "-1", "0 or more"),
    ("kl_beta", "inf", "0 or more"), ("kl_beta", "-0.05", "0 or more"),
    ("value_weight", "-1", "0 or more"), ("save_seconds", "inf", "0 or more"),
    ("micro_batch_size", "-2", "0 or more"), ("rollout_batch_size", "-1", "0 or more"),
    ("lora_rank", "-1", "0 or more"), ("judge_every", "-1", "0 or more"),
    ("lam", "2", "0 to 1"), ("lam", "-0.1", "0 to 1"), ("lam", "inf", "0 to 1"),
    ("gamma", "nan", "0 to 1"), ("gamma", "1.0000001", "0 to 1"), ("gamma", "-1", "0 to 1"),
    ("missing_eos", "nan", "a number"), ("missing_eos", "inf", "a number"),
    ("missing_eos", "-inf", "a number"), ("missing_eos", "-nan", "a number"),
    ("seed", "12345678901234567890", SEED), ("seed", "-1", SEED), ("seed", str(2**63), SEED),
    ("temperature", "0", "0.001 to 1000"), ("temperature", "nan", "0.001 to 1000"),
    ("temperature", "inf", "0.001 to 1000"), ("temperature", "-0.7", "0.001 to 1000"),
    ("temperature", "1e-300", "0.001 to 1000"),
    ("clip_range", "0", "more than 0"), ("max_grad_norm", "-1", "more than 0"),
    ("max_grad_norm", "nan", "more than 0"), ("ppo_batch_size", "0", "more than 0"),
    ("ppo_episodes", "-5", "more than 0"), ("ppo_epochs", "0", "more than 0"),
    ("ppo_minibatches", "0", "more than 0"), ("return_sequences", "0", "more than 0"),
    ("response_length", "-48", "more than 0"), ("query_length", "0", "more than 0"),
    ("toy_posts", "0", "more than 0"), ("toy_heads", "-4", "more than 0"),
    ("prompt_newlines", "0", "more than 0"), ("toy_posts", str(2**31), COUNT),
    ("ppo_episodes", "9" * 20, COUNT), ("max_posts", "9" * 20, COUNT)])
def test_a_number_out_of_range_is_one_line(name, value, expected, capsys):
    with pytest.raises(SettingError) as error:
        parse_settings([f"--{name}={value}"])  # argparse takes "-1e-9" alone for another option
    message = str(error.value)
    assert "\n" not in message and capsys.readouterr() == ("", "")
    assert message.startswith(f"--{name} "), f"it names what was typed: {message}"
    shown = message.split(":")[0].split(" ")[1]
    assert float(shown) == float(value) or math.isnan(float(value)) and shown == "nan", message
    assert f": expected {expected};" in message, message
    assert message.endswith("; `python -m engine --help` lists the settings")


@pytest.mark.parametrize("name, value", [
    ("ppo_lr", "0"), ("sft_lr", "0"), ("micro_batch_size", "0"), ("rollout_batch_size", "0"),
    ("lora_rank", "0"), ("judge_every", "0"), ("save_seconds", "0"), ("kl_beta", "0"),
    ("value_weight", "0"), ("gamma", "0"), ("gamma", "1"), ("lam", "0"), ("lam", "1"),
    ("missing_eos", "-2.5"), ("missing_eos", "0"), ("missing_eos", "3"), ("seed", "0"),
    ("seed", str(2**63 - 1)), ("temperature", "1e-3"), ("clip_range", "1e9"),
    ("max_grad_norm", "1e30"), ("ppo_episodes", str(2**31 - 1))])
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
    check_ranges(settings)
    for name in [*RANGES, *FAST, *PRESETS[preset]]:
        assert hasattr(settings, name), f"a range or a preset of no setting: {name}"


def test_a_home_folder_is_one_however_it_is_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")  # Windows
    settings = parse_settings(["--output_dir=~/x", "--judge=~/judge", "--posts=~/p.jsonl",
                               "--comparisons", "~/c.jsonl", "--seed", "1"])
    assert (settings.output_dir, settings.judge) == ("/home/me/x", "/home/me/judge")
    assert (settings.posts, settings.comparisons) == ("/home/me/p.jsonl", "/home/me/c.jsonl")


def test_only_numbers_have_a_range():
    check_ranges(SimpleNamespace(resume=False, judge=None, posts="-1", output_dir="nan"))
    with pytest.raises(SettingError, match="--unknown 0: expected more than 0"):
        check_ranges(SimpleNamespace(unknown=0))


def test_what_is_typed_counts_more_than_preset_and_fast():
    settings = parse_settings(["--preset", "full", "--fast_dev_run", "--ppo_lr", "0.5",
                               "--ppo_episodes", "7", "--ppo_batch_size", "4"])
    assert (settings.ppo_lr, settings.ppo_episodes, settings.ppo_batch_size) == (.5, 7, 4)
    assert settings.temperature == .7 and settings.response_length == FAST["response_length"]
