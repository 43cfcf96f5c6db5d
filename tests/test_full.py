"""Full mode: models and data as they are on the hub, built here with random weights, and no network.

Each trap of the real repositories (a model without a tokenizer, a data set with a script, news among
the posts, a judge that thinks aloud, half a download) is a small folder or an exception made here.
"""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from test_judge import CHATML, SWITCH, THINKS
from test_sharing import ARCHITECTURES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, PreTrainedTokenizerFast
from transformers import Qwen2Config

import figures
import judge
import lm
import ppo
import rlhf_minimal
import run
from reward import RewardModel, score_summaries
from tldr import load_comparisons, load_posts

torch.set_num_threads(1)
QUERIES = [[3, 4, 5, 6], [7], [5, 8], [2, 2, 3]]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
VOCABULARY = 320  # rows of the models, more than the tokenizer's 284 tokens, as 50400 for 50257


def new_run(folder):
    return run.Run(folder, {"seed": 0, "files": {}, "environment": {}})


def make(name, seed=3):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()


def settings(**changes):
    defaults = {key: value for config in rlhf_minimal.CONFIGS for key, value in vars(config()).items()}
    return SimpleNamespace(**{**defaults, "ppo_episodes": 16, "ppo_batch_size": 8, "ppo_lr": 2e-2,
                              "ppo_epochs": 2, "response_length": 5, **changes})


def copies(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


# ---------------------------------------------------------------------------- adapters


@every_architecture
@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ppo_with_adapters(name, checkpoint, tmp_path, monkeypatch):
    """The reference is the policy with its adapter off, the critic the reward model's trunk with an
    adapter and a head of its own; what is frozen stays; what is saved is what was trained."""
    policy = make(name)
    reward_model = RewardModel(policy)
    reward_model.reference_mean.fill_(0.4)
    sft, as_trained, head = copy.deepcopy(policy), copy.deepcopy(reward_model), None
    seen = []

    def rollout(network, reference, reward_model, critic, *rest):
        batch = ppo_rollout(network, reference, reward_model, critic, *rest)
        ids, mask, width = batch["input_ids"], batch["attention_mask"], batch["mask"].shape[1]
        real = batch["mask"]
        with torch.no_grad():
            oracle = lm.response_log_probs(sft, ids, mask, width)[real]
            scores = as_trained.score(ids, mask)
        assert torch.allclose(batch["ref_log_probs"][real], oracle, atol=1e-5), "reference moved"
        ended = batch["ended"]
        assert torch.allclose(batch["scores"][ended], scores[ended], atol=1e-5), "reward moved"
        seen.append((batch["log_probs"][real] - oracle).abs().max().item())
        if len(seen) == 1:
            with torch.no_grad():
                values = ppo.response_values(as_trained, ids, mask, width)[real]
            assert torch.allclose(batch["values"][real], values, atol=1e-5), "critic starts as r"
        return batch

    ppo_rollout = ppo.rollout
    monkeypatch.setattr(ppo, "rollout", rollout)
    critic = ppo.train_ppo(new_run(tmp_path / "run"), policy, reward_model, QUERIES,
                           SimpleNamespace(eos_token_id=9, pad_token_id=9),
                           settings(lora_rank=2, checkpoint_activations=checkpoint))
    assert seen[0] < 1e-5 < 1e-3 < seen[-1], "ratio 1 at the start, and a policy that then moves"

    assert critic.trunk is reward_model.trunk and critic.head is not reward_model.head
    head = as_trained.head.state_dict()
    assert all(torch.equal(head[key], value) for key, value in reward_model.head.state_dict().items())
    assert not torch.equal(critic.head.weight, reward_model.head.weight)
    frozen = {key.replace(".base_layer", ""): value
              for key, value in critic.trunk.get_base_model().state_dict().items()
              if "lora_" not in key}
    assert frozen.keys() == as_trained.trunk.state_dict().keys()
    assert all(torch.equal(value, frozen[key]) for key, value in as_trained.trunk.state_dict().items())

    # merged and loaded again: no trace of an adapter, the same numbers
    ids, mask, _ = lm.join(QUERIES, [[1, 9], [9], [4, 4, 9], [6]], 9)
    real = mask.bool()
    policy.save_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert type(loaded) is type(sft) and loaded.state_dict().keys() == sft.state_dict().keys()
    with torch.no_grad():
        logits = [m(input_ids=ids, attention_mask=mask,
                    position_ids=lm.get_position_ids(mask)).logits[real]
                  for m in (policy, loaded, sft)]
        assert torch.equal(logits[0], logits[1])
        assert (logits[0] - logits[2]).abs().max() > 1e-3
        critic.save_pretrained(tmp_path / "critic")
        assert not any("lora" in key for key in load_file(tmp_path / "critic" / "model.safetensors"))
        values = RewardModel.from_pretrained(tmp_path / "critic")(ids, mask)[real]
        assert torch.allclose(values, critic(ids, mask)[real], atol=1e-5)
        assert (values - as_trained(ids, mask)[real]).abs().max() > 1e-3


@every_architecture
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_checkpointed_activations_change_no_value_and_no_gradient(name, lora_rank):
    ids, mask, width = lm.join(QUERIES, [[1, 9], [9], [4, 4, 9], [6]], 9)
    found = []
    for checkpoint in (False, True):
        model = make(name)
        network = lm.add_adapter(model, lora_rank) if lora_rank else model
        for key, weight in network.named_parameters():
            if "lora_B" in key:  # zero at the start, when A has no gradient
                torch.nn.init.normal_(weight, std=0.1, generator=lm.generator_for(0, key))
            if "lora_A" in key:
                torch.nn.init.normal_(weight, std=0.1, generator=lm.generator_for(1, key))
        network.double()
        if checkpoint:
            lm.checkpoint_activations(model)
        runs = []
        layers = [m for m in model.modules() if isinstance(m, lm.GradientCheckpointingLayer)]
        next(layers[0].children()).register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
        before = lm.sample(model, ids[:, :width], mask[:, :width], 3, eos_token_id=9, pad_token_id=9,
                           temperature=0)
        n_sampling = len(runs)
        loss = lm.masked_mean(lm.response_log_probs(network, ids, mask, ids.shape[1] - width),
                              mask[:, width:])
        n_forward = len(runs)
        loss.backward()
        assert n_sampling == before.shape[1] and n_forward == n_sampling + 1
        assert len(runs) - n_forward == checkpoint, "computed again in the backward pass, or not"
        found.append((before, loss, torch.cat([p.grad.flatten() for p in lm.trainable(network)])))
    (samples, loss, gradient), (samples2, loss2, gradient2) = found
    assert torch.equal(samples, samples2)
    assert loss.item() == pytest.approx(loss2.item(), rel=1e-10)
    assert gradient.abs().max() > 0
    assert (gradient - gradient2).abs().max() <= 1e-10 * gradient.abs().max()


# ---------------------------------------------------------------------------- models of the hub


def make_tokenizer(folder, chat_template=None, **tokens):
    """A byte-level tokenizer made on the spot: no pad token, unless given."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *tokens.values()]
    tokenizer.train_from_iterator(["SUBREDDIT: r/ TITLE: POST: TL;DR: my dog ate A B A B"] * 5,
                                  trainers.BpeTrainer(vocab_size=284, special_tokens=special,
                                                      initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                   **{"eos_token": "<|endoftext|>", **tokens})
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def make_gptj(folder, dtype=torch.float32, shards=3, **config):
    """As CarperAI/openai_summarize_tldr_sft: numbered .bin files, config.json, and nothing else."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=2048,
        use_cache=False, tokenizer_class="GPT2Tokenizer", eos_token_id=0, bos_token_id=0, **config))
    weights = list(model.to(dtype).state_dict().items())
    folder.mkdir(parents=True)
    where = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(weights[i::shards])
        torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    return model.eval()


def make_judge(folder, chat_template=CHATML):
    """As Qwen/Qwen2.5-3B-Instruct: bfloat16, two shards, sampling settings of its own."""
    make_tokenizer(folder, chat_template, eos_token="<|im_end|>", pad_token="<|pad|>",
                   additional="<|im_start|>")
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    (folder / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
         "repetition_penalty": 1.05, "eos_token_id": [1, 0], "pad_token_id": 2}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders with the files that the hub has under the names of the full preset."""
    folder = tmp_path_factory.mktemp("hub")
    make_gptj(folder / "sft")
    make_tokenizer(folder / "gpt-j-6B")
    make_judge(folder / "judge")
    write_parquet(folder)
    return folder


def test_the_layout_is_the_real_one(hub):
    assert sorted(path.name for path in (hub / "sft").iterdir()) == [
        "config.json", *(f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
        "pytorch_model.bin.index.json"]
    assert len(list((hub / "judge").glob("model-*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(hub / "gpt-j-6B")
    assert len(tokenizer) == 284 and tokenizer.pad_token is None and tokenizer.eos_token_id == 0


@every_architecture
def test_a_model_without_a_tokenizer(name, tmp_path, hub):
    """transformers gives an empty tokenizer without a word, or none at all for some."""
    make(name).save_pretrained(tmp_path / "model")
    if name == "gptj":
        assert AutoTokenizer.from_pretrained(tmp_path / "model")("a summary")["input_ids"] == []
    with pytest.raises(run.SettingError, match=r"/model.* its base model with --tokenizer") as stop:
        lm.load_language_model(str(tmp_path / "model"))
    assert "\n" not in str(stop.value)


def test_a_tokenizer_of_nothing_but_bos(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"].update(vocab={"<|endoftext|>": 0}, merges=[])
    state["post_processor"] = {"type": "TemplateProcessing", "special_tokens": {"<|endoftext|>": {
        "id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == [0]
    with pytest.raises(run.SettingError, match="no usable tokenizer"):
        lm.load_language_model(str(tmp_path))


def test_a_model_with_the_tokenizer_of_its_base_model(hub):
    tokenizer, model = lm.load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0 and not model.training
    # pad = eos: the EOS that ends a summary is an action, and the padding behind it is not
    queries, responses = rlhf_minimal.encode(
        [{"post": "my dog"}] * 2, ["dog", "dog ate"], tokenizer, settings())
    assert responses[0][-1] == responses[1][-1] == 0
    ids, mask, width = lm.join(queries, responses, tokenizer.pad_token_id)
    assert mask[:, width:].sum(1).tolist() == [len(responses[0]), len(responses[1])]
    assert lm.get_response_mask(ids[:, width:], 0).sum(1).tolist() == mask[:, width:].sum(1).tolist()


def prefer(model, token):
    """Make the model write this token whatever it has read."""
    with torch.no_grad():
        model.lm_head.bias.zero_()[token] = 1e4


def test_rows_of_logits_without_a_token_decode_to_nothing(hub):
    tokenizer, model = lm.load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    prefer(model, VOCABULARY - 1)
    assert tokenizer.convert_ids_to_tokens(VOCABULARY - 1) is None
    (ids,) = lm.sample_responses(model, tokenizer, [[5, 6]], 3, 1.0)
    assert ids == [VOCABULARY - 1] * 3 and lm.decode_response(ids, tokenizer) == ""
    dog = tokenizer(" my dog", add_special_tokens=False)["input_ids"]
    mixed = [ids[0], dog[0], ids[0], *dog[1:], ids[0], 0, 7]
    assert lm.decode_response(mixed, tokenizer) == "my dog"
    assert RewardModel(model).score(torch.tensor([[5, *ids]]), torch.ones(1, 4)).isfinite().all()


def test_a_tokenizer_of_another_model(tmp_path, hub):
    make("gptj").save_pretrained(tmp_path / "small")  # 12 rows, for a tokenizer of 284
    with pytest.raises(run.SettingError, match="284 tokens, but .*small knows 12.*another model"):
        lm.load_language_model(str(tmp_path / "small"), tokenizer=str(hub / "gpt-j-6B"))


@pytest.mark.parametrize("generation_config", [None, {"_from_model_config": True, "bos_token_id": 0},
                                               {"temperature": 0.1, "top_k": 1, "eos_token_id": 9,
                                                "repetition_penalty": 5.0, "do_sample": True}])
def test_eos_is_the_tokenizers_whatever_generation_config_says(generation_config, tmp_path, hub):
    folder = Path(shutil.copytree(hub / "sft", tmp_path / "sft"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    if generation_config:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    tokenizer, model = lm.load_language_model(str(folder), tokenizer=str(hub / "gpt-j-6B"))
    assert model.generation_config.eos_token_id != tokenizer.eos_token_id, "the trap is not built"
    prefer(model, 0)
    assert lm.sample_responses(model, tokenizer, [[5, 6], [7]], 4, 1.0) == [[0], [0]]
    prefer(model, 9)
    assert lm.sample_responses(model, tokenizer, [[5, 6], [7]], 4, 1.0) == [[9] * 4] * 2
    model.save_pretrained(tmp_path / "saved")  # transformers refuses some of these when it saves


def test_the_cache_is_used_where_the_config_says_no(hub):
    tokenizer, model = lm.load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    assert model.config.use_cache is False, "the trap is not built"
    widths = []
    model.base_model.wte.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    prefer(model, 9)
    lm.sample_responses(model, tokenizer, [[5, 6, 7]], 4, 0)
    assert widths == [3, 1, 1, 1]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_checkpoint_comes_in_the_type_asked_for(kind, stored, asked, small, tmp_path, hub):
    model = make_gptj(tmp_path / "model", stored, shards=2)
    if kind == "safetensors":
        shutil.rmtree(tmp_path / "model")
        model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] in str(stored)
    _, loaded = lm.load_language_model(str(tmp_path / "model"), dtype=asked, small=small,
                                       tokenizer=str(hub / "gpt-j-6B"))
    assert {p.dtype for p in loaded.parameters()} == {asked}
    if not small:
        for key, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.state_dict()[key].to(asked)), key
    reward_model = RewardModel(loaded)  # a score is float32
    assert reward_model.score(torch.tensor([[5, 6]]), torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("newlines, frame", [(1, "SUBREDDIT: r/pets\nTITLE: Rex\nPOST: my dog\nTL;DR:"),
                                             (2, "SUBREDDIT: r/pets\n\nTITLE: Rex\n\nPOST: my dog\n\nTL;DR:")])
def test_prompt_and_summary_as_the_model_was_trained(newlines, frame, hub):
    """No blank at the prompt's end, one in front of the summary: that of "TL;DR: {summary}"."""
    tokenizer = AutoTokenizer.from_pretrained(hub / "gpt-j-6B")
    post = {"subreddit": "pets", "title": "Rex", "post": "my dog"}
    (query,), (response,) = rlhf_minimal.encode([post], ["it ate"], tokenizer,
                                                settings(prompt_newlines=newlines))
    assert tokenizer.decode(query) == frame
    assert tokenizer.decode(response) == " it ate<|endoftext|>"
    long = {**post, "post": "my dog\n" + "ate " * 500}  # cut at its newline, cue and gap kept
    (query,), _ = rlhf_minimal.encode([long], [], tokenizer, settings(
        prompt_newlines=newlines, query_length=100))
    assert tokenizer.decode(query) == frame


def test_the_full_preset_names_what_exists():
    full = rlhf_minimal.parse_settings(["--preset", "full"])
    assert (full.sft_model, full.tokenizer, full.prompt_newlines) == (
        "CarperAI/openai_summarize_tldr_sft", "EleutherAI/gpt-j-6B", 1)
    assert full.judge == "Qwen/Qwen2.5-3B-Instruct" and full.lora_rank == 16
    assert (full.posts, full.comparisons) == (
        "vwxyzjn/summarize_from_feedback_tldr_3_filtered", "openai/summarize_from_feedback")
    assert rlhf_minimal.parse_settings(["--preset", "full", "--lora_rank", "0"]).lora_rank == 0


# ---------------------------------------------------------------------------- data of the hub

TEXT = datasets.Value("string")
COMPARISONS = datasets.Features({
    "info": {key: TEXT for key in ("id", "post", "title", "subreddit", "site", "article")},
    "summaries": [{"text": TEXT, "policy": TEXT, "note": TEXT}], "choice": datasets.Value("int32"),
    "worker": TEXT, "batch": TEXT, "split": TEXT, "extra": {"confidence": datasets.Value("int32")}})
AXIS = datasets.Features({
    "info": COMPARISONS["info"], "summary": {"text": TEXT, "policy": TEXT, "note": TEXT},
    "worker": TEXT, "batch": TEXT, "split": TEXT})
POSTS = datasets.Features({key: TEXT for key in ("id", "subreddit", "title", "post", "summary")})
OPENAI, VWXYZJN = rlhf_minimal.PRESETS["full"]["comparisons"], rlhf_minimal.PRESETS["full"]["posts"]


def post_of(name):
    return f"My dog {name} ate the cat's food.\n\nShould I tell {name} off? " + "It sat. " * 5


def compared(name, choice=0, split="train", batch="batch3", texts=(" the dog ate", " ate it all up"),
             **info):
    info = {"id": f"t3_{name}", "post": post_of(name), "title": f"TIFU {name}", "subreddit": "pets",
            "site": None, "article": None, **info}
    summaries = [{"text": text, "policy": policy, "note": None}
                 for text, policy in zip(texts, ("sup1", "ref"))]
    return {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": batch,
            "split": split, "extra": {"confidence": None if choice else 7}}


def news(batch, split):
    return compared("news", split=split, batch=batch, post=None, title=None, subreddit=None, id=None,
                    article="A dog has eaten.", site="cnndm")


def write_parquet(folder):
    """The parquet branch of openai/summarize_from_feedback, and the splits of vwxyzjn's posts."""
    train = [compared("P0"), compared("P0", 1), compared("P1", 1, subreddit=None, id=None),
             compared("shared"), compared("P2", texts=(" same", " same")),
             *(compared(f"P{i}", i % 2, texts=(f" dog {i} ate", " it sat there")) for i in range(3, 27))]
    validation = [compared("V0", 1, "valid1"), compared("shared", 0, "valid2"),
                  news("batch0_cnndm", "valid2"), news("cnndm0", "valid1"), news("cnndm2", "valid2"),
                  compared("V1", 0, "valid2", "edit_b2_eval_test"),
                  *(compared(f"V{i}", i % 2, "valid2") for i in range(2, 9))]
    axis = [{"info": compared("A")["info"], "summary": {"text": " dog", "policy": "p", "note": None},
             "worker": "w", "batch": "b", "split": "test"}]
    for features, parts in ((COMPARISONS, {"comparisons/train": train,
                                           "comparisons/validation": validation}),
                            (AXIS, {"axis/test": axis, "axis/validation": axis})):
        for part, rows in parts.items():
            datasets.Dataset.from_list(rows, features).to_parquet(
                folder / OPENAI.split("/")[1] / part / "0000.parquet")
    named = {"train": ["V0", "H0", *(f"R{i}" for i in range(30)), "P3"],
             "validation": [f"H{i}" for i in range(10)], "test": ["X0", "X1"]}
    for split, names in named.items():
        rows = [{"id": name, "subreddit": "pets", "title": f"TIFU {name}", "post": post_of(name),
                 "summary": " dog ate"} for name in names]
        datasets.Dataset.from_list(rows, POSTS).to_parquet(
            folder / VWXYZJN.split("/")[1] / "data" / f"{split}-00000-of-00001.parquet")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def served(hub, monkeypatch):
    """load_dataset with those folders behind the ids, refusing what datasets 4 refuses."""
    def load_dataset(path, **form):
        calls.append((path, form))
        if path == "parquet":  # local files
            return real(path, **form)
        if path == OPENAI and form != {"data_dir": "comparisons",
                                       "revision": "refs/convert/parquet"}:
            raise RuntimeError("Dataset scripts are no longer supported, but found "
                               "summarize_from_feedback.py")
        return real("parquet", data_dir=str(hub / path.split("/")[1] / form.get("data_dir", "")))

    real, calls = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_comparisons_of_the_hub(served, capsys):
    train = load_comparisons(OPENAI)
    assert served == [(OPENAI, {"data_dir": "comparisons", "revision": "refs/convert/parquet"})]
    assert capsys.readouterr().out == (f"{OPENAI}: 28 of 42 rows used; left out: 1 identical "
                                       "summaries, 10 in another split, 3 CNN/DM articles\n")
    assert train[0]["post"] == {"subreddit": "pets", "title": "TIFU P0", "post": post_of("P0").strip()}
    assert (train[0]["chosen"], train[0]["rejected"]) == ("the dog ate", "ate it all up")
    assert (train[1]["chosen"], train[1]["policies"]) == ("ate it all up", ["ref", "sup1"])
    assert train[2]["post"]["subreddit"] == ""
    validation = load_comparisons(OPENAI, "validation")
    assert [row["post"]["title"][5:] for row in validation] == ["V0", "shared", *(
        f"V{i}" for i in range(1, 9))]


def test_posts_of_the_hub(served, capsys):
    train = load_posts(VWXYZJN)
    assert served == [(VWXYZJN, {})] and len(train) == 33
    assert train[2]["summary"] == "dog ate"  # encode_response puts the blank back
    assert "33 of 45 rows used; left out: 12 in another split" in capsys.readouterr().out
    assert [row["title"] for row in load_posts(VWXYZJN, "validation")] == [
        f"TIFU H{i}" for i in range(10)]


@pytest.mark.parametrize("local", [False, True])
def test_no_post_on_both_sides(local, served, hub, capsys):
    sources = OPENAI, VWXYZJN
    if local:  # the same folders, downloaded
        sources = [str(hub / OPENAI.split("/")[1] / "comparisons"), str(hub / VWXYZJN.split("/")[1])]
    posts, held_out, pairs, pairs_held_out = rlhf_minimal.load_data(
        settings(comparisons=sources[0], posts=sources[1]))
    sides = [{row["post"] for row in posts} | {row["post"]["post"] for row in pairs},
             {row["post"] for row in held_out} | {row["post"]["post"] for row in pairs_held_out}]
    assert not sides[0] & sides[1]
    # by hand: V0 and H0 among the posts and "shared" among the comparisons are held out
    assert [len(rows) for rows in (posts, held_out, pairs, pairs_held_out)] == [31, 10, 27, 10]
    assert ("left out as their post is held out: 2 posts, 1 comparisons"
            in capsys.readouterr().out)
