"""The presets for a GPU, on small stand-ins of what they download; from a base model; resumed."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from test_full import OPENAI, OTHERWISE, VWXYZJN, make_tokenizer, no_network
from test_full import hub, no_cache_of_the_user  # noqa: F401 (fixtures)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, RobertaConfig, T5Config

from engine import main, start
from engine.adapters import add_adapter, save_plain
from engine.folder import Run
from engine.settings import parse as parse_settings
from engine.settings import PRESETS, SettingError

FEW = ["--ppo_episodes", "48", "--ppo_batch_size", "16", "--reward_batch_size", "4",
       "--sft_batch_size", "4", "--response_length", "8", "--best_of_n", "2", "--judge_every", "0",
       "--sft_lr", "1e-2", "--reward_lr", "1e-3", "--ppo_lr", "1e-3"]


@pytest.fixture(scope="module")
def base(hub, tmp_path_factory):  # noqa: F811
    """A base model with its tokenizer, as SmolLM2-135M: a Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0)).save_pretrained(folder)
    return folder


def from_base(hub, base, folder, *more, preset="student"):  # noqa: F811
    arguments = ["--preset", preset, "--base_model", base, "--judge", hub / "judge",
                 "--comparisons", hub / OPENAI.split("/")[1] / "comparisons", "--posts",
                 hub / VWXYZJN.split("/")[1], "--query_length", "150", "--output_dir", folder]
    return [*map(str, arguments), *more]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(start, "go_offline_unless_reachable", no_network)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["student", "day", "full"])
def test_fast_dev_run_from_a_base_model(preset, hub, base, tmp_path):  # noqa: F811
    main.main(from_base(hub, base, tmp_path / "run", "--fast_dev_run", preset=preset))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["preset"] == preset and set(results["seconds"]) >= {"sft", "reward", "ppo"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sft_model"] is None and config["prompt_newlines"] == 2, "those of another model"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_from_a_base_model_to_the_report(rank, hub, base, tmp_path):  # noqa: F811
    """SFT learns from a base model, adapters or all weights; what is saved was trained, merged."""
    main.main(from_base(hub, base, tmp_path / "run", *FEW, "--lora_rank", str(rank)))
    lines = [json.loads(line) for line in
             (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["stage"] == "sft"]
    assert losses[-1] < losses[0]
    ours, sft, policy = (weights(folder) for folder in
                         (base, tmp_path / "run" / "sft", tmp_path / "run" / "policy"))
    for before, after in ((ours, sft), (sft, policy)):
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert any("q_proj" in key for key in changed)
        # an adapter leaves what is no matrix of a layer: embeddings and norms
        assert any("embed" in key or "norm" in key for key in changed) == (rank == 0)
    assert not any("lora" in key for key in policy)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert loaded.dtype == torch.float32 and loaded.config.tie_word_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("stage, at", [("sft", 1), ("reward", 2), ("ppo", 1)])
def test_a_resume_with_adapters_is_exact(stage, at, hub, base, tmp_path, monkeypatch):  # noqa: F811
    def log(self, name, step, **metrics):
        real(self, name, step, **metrics)
        if (name, step) == (stage, at):
            self.stopping = True

    real, more = Run.log, [*FEW, "--lora_rank", "4", "--micro_batch_size", "3"]
    main.main(from_base(hub, base, tmp_path / "whole", *more))
    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(SystemExit) as stop:
        main.main(from_base(hub, base, tmp_path / "stopped", *more))
    assert stop.value.code == 130
    monkeypatch.setattr(Run, "log", real)
    main.main(from_base(hub, base, tmp_path / "stopped", *more, "--resume"))
    for name in ("metrics.jsonl", "samples.jsonl", *(
            f"{part}/model.safetensors" for part in ("sft", "reward_model", "policy", "critic"))):
        one, two = ((tmp_path / run / name).read_bytes() for run in ("whole", "stopped"))
        assert one == two, name


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_a_preset_ends_in_one_line_without_a_network(preset, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(start, "go_offline_unless_reachable", lambda: None)
    for flag in ([], ["--fast_dev_run"]):
        with pytest.raises(SystemExit) as stop:
            main.main(["--preset", preset, "--output_dir", str(tmp_path / "x"), *flag])
        line = stop.value.code
        assert ": not readable" in line and OTHERWISE in line and "\n" not in line
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("config, words", [
    (T5Config(d_model=8, num_layers=1, num_heads=1, vocab_size=9),
     "t5 is no causal language model"),
    (RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9,
                   intermediate_size=8), "roberta is no causal language model")])
def test_a_base_model_that_writes_no_text(config, words, hub, tmp_path, monkeypatch):  # noqa: F811
    """Said before anything large is loaded."""
    config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(start, "load_for_training", no_network)
    with pytest.raises(SystemExit) as stop:
        main.main(from_base(hub, tmp_path / "model", tmp_path / "run"))
    assert words in stop.value.code and "\n" not in stop.value.code


def test_a_plan_that_does_not_fit_names_what_would(hub, base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(start, "available_memory", lambda device: (2**20, "a small card"))
    monkeypatch.setattr(start, "load_for_training", no_network)
    with pytest.raises(SystemExit) as stop:
        main.main(from_base(hub, base, tmp_path / "run", preset="day"))
    assert "a small card has 0; what would help" in stop.value.code
    assert "--preset student" in stop.value.code


def test_one_of_base_and_sft_model():
    with pytest.raises(SettingError, match="--base_model and --sft_model: expected one of them"):
        parse_settings(["--base_model", "a/b", "--sft_model", "c/d"])
    assert parse_settings(["--preset", "student", "--sft_model", "c/d"]).base_model is None
    settings = parse_settings(["--preset", "full", "--base_model", "a/b"])
    assert (settings.sft_model, settings.tokenizer, settings.prompt_newlines) == (None, None, 2)


def test_rates_are_those_of_the_size():
    """B.1: 5e-6 and 7e-6 for 6.7B, 1.5e-5 for both at 1.3B; adapters take ten times as much."""
    full, day = (parse_settings(["--preset", name]) for name in ("full", "day"))
    assert (full.reward_lr, full.ppo_lr, full.ppo_batch_size) == (5e-5, 7e-5, 256)
    assert (day.reward_lr, day.ppo_lr, day.ppo_batch_size) == (1.5e-4, 1.5e-4, 512)
    assert full.lora_rank == day.lora_rank == 16
    assert full.ppo_episodes == day.ppo_episodes == 100_000


def test_max_posts_bounds_what_is_trained_on(hub, base, tmp_path):  # noqa: F811
    settings = parse_settings(from_base(hub, base, tmp_path / "run", "--max_posts", "7"))
    posts, held_out, compared, _ = start.load_data(settings)
    assert len(posts) == len(compared) == 7 and len(held_out) == 10


def test_the_saved_config_says_the_type_that_was_saved(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    save_plain(add_adapter(model, 2, 0), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("judge", ["longest", "a folder"])
def test_a_model_whose_name_has_no_slash(judge, hub, base, tmp_path, monkeypatch):  # noqa: F811
    """A folder beside us: it is the policy that is planned for, and then the judge."""
    planned = []

    def plan(settings, *configs, **rest):
        planned.extend(config.model_type for config in configs)
        raise SettingError("that is enough")

    shutil.copytree(base, tmp_path / "mymodel")
    shutil.copytree(hub / "judge", tmp_path / "myjudge")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "memory_plan", plan)
    arguments = from_base(hub, "mymodel", tmp_path / "run", preset="student")
    arguments[arguments.index("--judge") + 1] = judge if judge == "longest" else "myjudge"
    with pytest.raises(SystemExit, match="that is enough"):
        main.main(arguments)
    assert planned == ["llama"] if judge == "longest" else planned == ["llama", "qwen2"]
