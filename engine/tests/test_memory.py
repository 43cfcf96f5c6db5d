"""The memory plan against a pencil and against what models really allocate."""

import copy
import json
import re
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from common import TOKENIZER, Told
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, FalconConfig, Gemma3Config, GPT2Config, GPTJConfig
from transformers import GPTNeoXConfig, LlamaConfig, MambaConfig, MistralConfig, OPTConfig
from transformers import Qwen2Config
from zoo import config_of

from engine import main, ppo, reward, sampling, sft, start
from engine.adapters import add_adapter, trainable
from engine.devices import prepare
from engine.memory import Alive, check_memory, memory_plan, peak_of
from engine.settings import ModelConfig, SettingError
from ppo import PPOConfig



def configs(vocabulary=40, d=32, layers=3):
    ends = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 9}
    old = {"n_embd": d, "n_layer": layers, "n_head": 4, "n_positions": 256}
    new = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": 4}
    return {"gpt2": GPT2Config(**ends, **old), "gptj": GPTJConfig(**ends, **old, rotary_dim=4),
            "neox": GPTNeoXConfig(**ends, **new, intermediate_size=4 * d),
            "llama": LlamaConfig(**ends, **new, intermediate_size=3 * d, num_key_value_heads=2)}


ARCHITECTURES = list(configs())


def settings(**changes):
    return SimpleNamespace(**{**vars(PPOConfig()), **vars(ModelConfig()), "base_model": None,
                              "reward_batch_size": 8, "sft_batch_size": 8, "query_length": 12,
                              "response_length": 4, "summary_length": 8, "ppo_batch_size": 8,
                              "ppo_episodes": 8, "ppo_epochs": 2, **changes})


# ---------------------------------------------------------------------------- by hand

# Weights: embeddings 10 x 4 = 40. A layer: q 4 x 4 = 16, k and v (one head of two) 4 x 2 = 8 each,
# o 16, gate, up and down 4 x 6 = 24 each, two norms of 4: 16 + 8 + 8 + 16 + 72 + 8 = 128. Two
# layers 256, last norm 4, scores 4 x 10 = 40. In all 340, without the scores (a trunk) 300; a head
# 4 + 1.
BY_HAND = LlamaConfig(vocab_size=10, hidden_size=4, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, intermediate_size=6, tie_word_embeddings=False)
# Adapters of rank 3: a layer has q and o 3 (4 + 4) each, k and v 3 (4 + 2) each, and three of
# 3 (4 + 6): 174
SMALL = {"query_length": 5, "response_length": 3, "summary_length": 6, "micro_batch_size": 2,
         "rollout_batch_size": 4}


def fixed(plan):
    """What is there all the time; what is counted on the meta device has tests of its own."""
    return {name: plan[name] for name in ("weights", "trained", "judge")}


def test_plan_by_hand_with_adapters():
    some = settings(**SMALL, lora_rank=3, checkpoint_activations=True)
    assert fixed(memory_plan(some, BY_HAND, BY_HAND)) == {
        # one frozen model; in float32 the adapters of reference and reward model, its head
        "weights": 2 * 340 + 4 * (348 + 348 + 5),
        "trained": 16 * (348 + 348 + 5),  # two adapters, the critic's head
        "judge": 2 * 340}


def test_plan_by_hand_with_all_weights():
    assert fixed(memory_plan(settings(**SMALL), BY_HAND)) == {
        "weights": 4 * (2 * 340 + 2 * 305), "trained": 12 * (340 + 305), "judge": 0}


def test_without_sizes_of_their_own_whole_batches_are_in_memory():
    sizes = {"ppo_batch_size": 32, "query_length": 100}
    whole = memory_plan(settings(**sizes), BY_HAND)
    same = memory_plan(settings(**sizes, micro_batch_size=32, rollout_batch_size=32), BY_HAND)
    half = memory_plan(settings(**sizes, ppo_minibatches=2), BY_HAND)
    assert [whole[name] for name in ("sampling", "updating")] == [
        same[name] for name in ("sampling", "updating")]
    assert whole["updating"] == pytest.approx(2 * half["updating"], rel=0.02)
    # of texts to score 256 are enough
    assert whole["scoring"] == pytest.approx(8 * same["scoring"], rel=0.02)


def test_bytes_are_counted_while_a_tensor_lives():
    def use():
        x = torch.zeros(250, device="meta")
        for _ in range(3):
            y = x + 1  # 1000 bytes each, the new one is made before the old one goes
            z = y[:10].view(2, 5)  # no bytes of its own
        del x, y, z

    alive = Alive()
    with alive:
        assert alive.during(use) == 3000 and alive.now == 0


CONFIGS = {
    "an embedding of another width": OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon": FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2,
                           num_attention_heads=4),
    "a config within the config": Gemma3Config(text_config={
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}),
    "no attention": MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_language_model_has_a_plan(name):
    plan = memory_plan(settings(checkpoint_activations=True), CONFIGS[name])
    known = {"sampling", "updating", "scoring", "reward"}
    turns = plan.keys() - {"weights", "trained", "judge"}
    assert turns == (set() if name == "no attention" else known)
    assert peak_of(plan) > plan["weights"] + plan["trained"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "bloom", "phi", "qwen3", "mamba2",
                                  "gemma3"])
def test_a_plan_or_one_line(name, rank, capsys):
    """Whatever the architecture, the weights are in the plan, and what is not is said."""
    some = settings(lora_rank=rank, checkpoint_activations=True)
    try:
        plan = memory_plan(some, config_of(name))
    except SettingError as error:
        assert (name, rank) == ("mamba2", 2), "peft has no adapters for it"
        assert "\n" not in str(error) and "--lora_rank 0" in str(error)
        return
    counted = plan.keys() & {"sampling", "updating", "scoring", "reward"}
    said = capsys.readouterr().out
    assert peak_of(plan) > plan["weights"] > 0 and plan["trained"] > 0
    assert len(counted) == 4 and not said or not counted and said.count("\n") == 1 and (
        f"memory: {name} can't be tried before it is loaded" in said)
    if name in ("phi", "qwen3", "gemma3"):
        assert counted


def test_rows_that_leave_a_window_are_not_packed():
    """Each summary then has a row of its own (architectures.py): four prompts more in memory."""
    changes = {"query_length": 60, "return_sequences": 4, "ppo_batch_size": 8}
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 64}
    inside, beyond = (memory_plan(settings(**changes), MistralConfig(**sizes, sliding_window=n))
                      for n in (100, 50))
    assert beyond["updating"] > 2 * inside["updating"]


def test_layers_that_can_not_be_computed_twice_are_refused_in_one_line():
    with pytest.raises(SettingError, match="--checkpoint_activations: ctrl can't"):
        memory_plan(settings(checkpoint_activations=True), config_of("ctrl"))


# ---------------------------------------------------------------------------- what is allocated


def bytes_of(tensors):
    """Each storage once, however many tensors look at it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def train(config, dtype=torch.float32, around=lambda one_step: one_step, **changes):
    """One update of train_ppo on random prompts, 12 tokens long; the networks and optimizers."""
    seen, rollout = {}, ppo.rollout
    torch.manual_seed(0)
    model = prepare(AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)).eval()
    if "lora_rank" in changes:
        model = add_adapter(model, changes["lora_rank"], 0)
    reward_model = reward.RewardModel(model)

    def steps(*_, **parts):
        seen.update(parts=parts)
        yield 0

    def watched(policy, reference, reward_model, critic, *rest):
        seen["networks"] = policy, reference, reward_model, critic
        return rollout(policy, reference, reward_model, critic, *rest)

    def never_ends(model, ids, mask, n, *, k, generator, **_):
        return torch.randint(10, 40, (k * len(ids), n), generator=generator)

    run = SimpleNamespace(seed=0, steps=steps, log=lambda *_, **__: None, history=lambda _: [
        {"kl_per_summary": 0, "length": 1, "entropy": 1}])
    queries = torch.randint(10, 40, (8, 12)).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "rollout", watched)
        patch.setattr(sampling, "sample", never_ends)
        patch.setattr(ppo, "one_step", around(ppo.one_step))
        patch.setattr(ppo, "warn_of_collapse", lambda run: seen.update(sizes(seen)))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            ppo.train_ppo(run, model, reward_model, queries, TOKENIZER, settings(**changes))
    return seen


def sizes(seen):
    parameters = [p for network in seen["networks"] for p in network.parameters()]
    averages = [state[name] for optimizer in (seen["parts"]["policy_optimizer"],
                                              seen["parts"]["critic_optimizer"])
                for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    trained = {id(p) for name in ("policy", "critic") for p in trainable(seen["parts"][name])}
    return {"parameters": bytes_of(parameters), "averages": bytes_of(averages),
            "gradients": bytes_of(p.grad for p in parameters if p.grad is not None),
            "frozen": bytes_of(p for p in parameters if id(p) not in trained)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_weights_gradients_and_averages_are_what_was_planned(name):
    config = configs()[name]
    seen = train(config)
    plan = memory_plan(settings(), config, device="cpu")
    assert seen["parameters"] == plan["weights"]
    assert seen["gradients"] + seen["averages"] == plan["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_are_what_was_planned(name):
    config = configs()[name]
    rank = {"lora_rank": 3}
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cuda")):
        seen = train(config, dtype, **rank)
        plan = memory_plan(settings(**rank), config, device=device)
        assert seen["frozen"] == plan["weights"]  # the reward model's head is frozen, too
        assert (seen["parameters"] - seen["frozen"] + seen["gradients"] + seen["averages"]
                == plan["trained"])



@contextmanager
def measured(peaks):
    """Append the largest number of bytes allocated at a time within, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    total = highest = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    peaks.append(highest)


@contextmanager
def measured_step(peaks, one_step, *arguments):
    """one_step, measured: forward, backward and the step itself."""
    with measured(peaks), one_step(*arguments) as step:
        yield step


def test_peak_is_measured_as_it_should_be():
    peaks = []
    with measured(peaks):
        for _ in range(3):
            x = torch.zeros(250)
            y = x + 1  # 1000 bytes each
            del x, y
    assert 2000 <= peaks[0] < 2300


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"checkpoint_activations": True},
                                     {"micro_batch_size": 2}])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_an_update_stay_within_the_plan(name, changes):
    config = configs(vocabulary=40, d=128, layers=4)[name]
    peaks = []

    changes = {"query_length": 60, **changes}
    with pytest.MonkeyPatch.context() as patch:
        randint = torch.randint  # longer prompts: activations, not weights, are to be measured
        patch.setattr(torch, "randint", lambda low, high, shape, **rest: randint(
            low, high, (8, 60) if shape == (8, 12) else shape, **rest))
        seen = train(config, around=partial(partial, measured_step, peaks), **changes)
    plan = memory_plan(settings(**changes), config, device="cpu")
    planned = plan["updating"]
    # the first call makes Adam's averages; gradients are freed first and come back
    assert len(peaks) == 4, "two epochs, policy and critic"
    largest = max(peaks[2:])
    # and with four layers only, what a layer needs in passing is not small
    assert 0.4 * planned < largest < 1.25 * planned + seen["gradients"], largest / planned


class Largest(TorchDispatchMode):
    """Remembers the size of the largest floating-point tensor, views aside, that any operation
    makes, backward included."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("k", [1, 4])
def test_no_tensor_has_scores_for_the_prompt(k):
    vocabulary, rows, n = 2000, 8, 4
    config = configs(vocabulary, d=16, layers=1)["neox"]
    model = AutoModelForCausalLM.from_config(config).eval()
    queries = torch.randint(10, 40, (rows // k, 60)).tolist()
    run, few = Told(), settings(return_sequences=k, ppo_epochs=1, sft_lr=0.0, sft_batch_size=8,
                                sft_epochs=1)
    with Largest() as largest:
        ppo.train_ppo(run, model, reward.RewardModel(model), queries, TOKENIZER, few)
        sft.train_sft(run, model, queries, [[3, 4, 5, 9]] * len(queries), 0, few)
    assert rows * n * vocabulary <= largest.numbers <= rows * (n + 1) * vocabulary


# ---------------------------------------------------------------------------- what is said


def test_a_plan_that_does_not_fit_is_refused_in_one_line_with_cures(capsys):
    GB = 10**9
    plan = {"weights": 24 * GB, "trained": 1 * GB, "judge": 6 * GB, "sampling": 16 * GB,
            "updating": 11 * GB, "scoring": 0}
    # they take turns: 24 + 1 + 6 + max(16, 11, 0) = 47, and 1 % for what can't be counted
    check_memory(plan, 47.47 * GB, "a card")
    assert "memory: about 44.2 GiB (weights 22.4, " in capsys.readouterr().out
    with pytest.raises(SettingError) as error:
        check_memory(plan, 47.47 * GB - 1, "a card")
    text = str(error.value)
    assert "\n" not in text and "about 44 GiB" in text and "a card has 44" in text
    cures = text.split("what would help: ")[1].split("; ")
    assert [re.search(r"--\w+", cure)[0] for cure in cures] == [
        "--sft_model", "--rollout_batch_size", "--micro_batch_size", "--preset"], (
        "the largest first")
    known = vars(main.parse([]))
    assert all(name[2:] in known for name in re.findall(r"--\w+", text))


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """prepared(free, *words): what the engine chooses, with a plan of 20 bytes, 10 where
    activations are computed twice, on a card where so many are free; and what it recorded."""
    def plan(settings, *configs, **rest):
        return {"weights": 0, "trained": 0, "judge": 0,
                "updating": 10 if settings.checkpoint_activations else 20}

    for name, function in {"start_processes": lambda *_: "cpu", "causal_config": lambda _: None,
                           "memory_plan": plan, "check_fit": lambda *_: None,
                           "go_offline_unless_reachable": lambda: None,
                           "load_data": lambda _: ([], [], [], []),
                           "load_for_training": lambda *_: (None, None, torch.float32)}.items():
        monkeypatch.setattr(start, name, function)

    def prepare(free, *words):
        monkeypatch.setattr(start, "available_memory", lambda _: (free, "a card"))
        some = main.parse(["--preset", "student", "--judge", "longest",
                                            "--output_dir", str(tmp_path / "run"), *words])
        start.prepare_run(some)
        recorded = json.loads((tmp_path / "run" / "config.json").read_text())
        assert recorded["checkpoint_activations"] is bool(some.checkpoint_activations)
        return some.checkpoint_activations

    return prepare


def test_activations_are_computed_twice_where_memory_is_short(prepared, capsys):
    assert prepared(15) is True
    said = capsys.readouterr().out
    assert said.count("(--checkpoint_activations)") == 1 and said.count("memory: about") == 1
    # what was chosen then holds for the whole run, however much is free now
    assert prepared(100, "--resume") is True
    assert "(--checkpoint_activations)" not in capsys.readouterr().out


def test_activations_are_kept_where_there_is_room(prepared, capsys):
    assert not prepared(30)
    assert "(--checkpoint_activations)" not in capsys.readouterr().out
    # this run has no room on the card it is resumed on, and would be another one without its
    # activations
    with pytest.raises(SettingError, match="are needed and a card has"):
        prepared(15, "--resume")


def test_what_was_asked_for_stays(prepared, capsys):
    assert prepared(30, "--checkpoint_activations") is True, "no value is needed"
    assert prepared(30, "--checkpoint_activations", "--restart") is True
    assert prepared(30, "--no-checkpoint_activations", "--restart") is False
    with pytest.raises(SettingError, match="are needed and a card has"):
        prepared(15, "--no-checkpoint_activations", "--restart")
    assert "(--checkpoint_activations)" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_full_preset_fits_on_80_gb_and_all_weights_of_6b_do_not():
    gptj = GPTJConfig()  # its defaults are those of GPT-J-6B
    d, rows = 4096, 50400
    layer = 4 * d * d + 2 * (4 * d * d) + (4 * d + d) + 2 * d  # attention, two products, norm
    n = 28 * layer + rows * d + (rows * d + rows) + 2 * d
    judge = Qwen2Config(vocab_size=151936, hidden_size=2048, num_hidden_layers=36,
                        num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
                        tie_word_embeddings=True)
    full = main.parse(["--preset", "full"])
    plan = memory_plan(full, gptj, judge)
    adapters = 16 * 28 * (4 * 2 * d + 2 * (d + 4 * d))
    assert plan["weights"] == 2 * n + 4 * (2 * adapters + d + 1)
    assert 6.0e9 < n < 6.1e9 and 3.0e9 < plan["judge"] / 2 < 3.2e9
    check_memory(plan, 80e9, "one GPU of 80 GB")
    full.lora_rank = 0
    with pytest.raises(SettingError, match="--lora_rank 16; .*--preset student"):
        check_memory(memory_plan(full, gptj, judge), 80e9, "one GPU of 80 GB")
    # 1B fits with all weights trained: the shape of Pythia-1B
    pythia = GPTNeoXConfig(vocab_size=50304, hidden_size=2048, num_hidden_layers=16,
                           num_attention_heads=8, intermediate_size=8192)
    full.checkpoint_activations = True
    check_memory(memory_plan(full, pythia), 50e9, "50 GB of a card of 80")


def test_no_copies_of_weights_in_bfloat16_are_kept_for_the_whole_run(tmp_path, monkeypatch):
    """torch.autocast keeps such copies until its context ends: they would be those from before the
    first step, here of a layer whose weights became zero."""
    def look(*_):
        layer, x = torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)
        layer(x).sum().backward()
        layer.weight.data.zero_()
        raise SettingError(f"{layer(x).dtype}, then {layer(x).abs().sum().item()}")

    for name, function in {"start.start_processes": lambda *_: "cpu",
                           "start.load_given": lambda *_: (None, None, None, torch.bfloat16),
                           "start.load_data": lambda *_: ([], [], [], []),
                           "main.supervised_baseline": look}.items():
        monkeypatch.setattr(f"engine.{name}", function)
    with pytest.raises(SettingError, match="bfloat16, then 0.0"):
        main.run_all(main.parse(["--output_dir", str(tmp_path / "run")]))
