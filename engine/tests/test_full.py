"""Full mode: models and data as they are on the hub, built here with random weights, no network.

Each trap of the real repositories (a model without a tokenizer, a data set with a script, news
among the posts, a judge that thinks aloud, half a download) is a small folder or an exception made
here.
"""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from common import ARCHITECTURES, CHATML, PROGRAM, ROOT, THINKS, build, byte_level
from rows_common import no_cache_of_the_user  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTJConfig, GPTNeoXConfig
from transformers import LlamaConfig, Qwen2Config

import lm
from engine import judges, main, sampling, start, texts
from engine import models as models_file
from engine import report as report_file
from engine.folder import Run
from engine.models import load_language_model, shrink
from engine.origin import describe
from engine.settings import PRESETS, SettingError
from engine.reward import RewardModel
from engine.rows import load_comparisons, load_posts
from sft import SFTConfig

VOCABULARY = 320  # rows of the models, more than the tokenizer's 284 tokens, as 50400 for 50257


def make(name, seed=3):
    return build(ARCHITECTURES[name](), seed)


def settings(**changes):
    return SimpleNamespace(**{**vars(main.parse([])), **changes})


# ---------------------------------------------------------------------------- models of the hub


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=123), GPTJConfig(vocab_size=123), GPTNeoXConfig(vocab_size=123),
    LlamaConfig(vocab_size=123, num_key_value_heads=8), Qwen2Config(vocab_size=123)],
    ids=lambda config: config.model_type)
def test_a_shrunken_model_keeps_its_architecture_and_vocabulary(config):
    small = shrink(config)
    assert type(small) is type(config) and small.vocab_size == 123
    assert (small.hidden_size, small.num_hidden_layers, small.num_attention_heads) == (64, 2, 4)
    grouped = config.to_dict().get("num_key_value_heads") != config.num_attention_heads
    for key, size in (("rotary_dim", 8), ("num_key_value_heads", 2 if grouped else 4),
                      ("intermediate_size", 128), ("head_dim", 16)):
        if hasattr(config, key):
            assert getattr(small, key) == size, key
    model = AutoModelForCausalLM.from_config(small)
    assert model(torch.tensor([[1, 122]])).logits.shape == (1, 2, 123)
    assert config.num_hidden_layers > 2, "the given configuration is not changed"


def make_tokenizer(folder, chat_template=None, **tokens):
    """A byte-level tokenizer made on the spot: no pad token, unless given."""
    tokenizer = byte_level("SUBREDDIT: r/ TITLE: POST: TL;DR: my dog ate A B A B",
                           ["<|endoftext|>", *tokens.values()], 284,
                           **{"eos_token": "<|endoftext|>", **tokens})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


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
    tokenizer = make_tokenizer(folder, chat_template, eos_token="<|im_end|>", pad_token="<|pad|>",
                               additional="<|im_start|>")
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=False))
    with torch.no_grad():  # whatever it reads, it says an A or a B
        model.get_input_embeddings().weight[:, 0] = 10
        model.lm_head.weight *= 20
        model.lm_head.weight[judges.answer_tokens(tokenizer).flatten(), 0] = 9
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


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_a_model_without_a_tokenizer(architecture, tmp_path, hub):
    """transformers gives an empty tokenizer without a word, or none at all for some."""
    make(architecture).save_pretrained(tmp_path / "model")
    if architecture == "gptj":
        assert AutoTokenizer.from_pretrained(tmp_path / "model")("a summary")["input_ids"] == []
    with pytest.raises(SettingError, match=r"/model.* its base model with --tokenizer") as stop:
        load_language_model(str(tmp_path / "model"))
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
    make("gptj").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == [0]
    with pytest.raises(SettingError, match="no usable tokenizer"):
        load_language_model(str(tmp_path))


def test_a_model_with_the_tokenizer_of_its_base_model(hub):
    tokenizer, model = load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0 and not model.training
    # pad = eos: the EOS that ends a summary is an action, and the padding behind it is not
    queries, responses = texts.encode(
        [{"post": "my dog"}] * 2, ["dog", "dog ate"], tokenizer, settings())
    assert responses[0][-1] == responses[1][-1] == 0
    ids, mask, width = lm.join(queries, responses, tokenizer.pad_token_id)
    assert mask[:, width:].sum(1).tolist() == [len(responses[0]), len(responses[1])]
    assert (lm.get_response_mask(ids[:, width:], 0).sum(1).tolist()
            == mask[:, width:].sum(1).tolist())


def prefer(model, token):
    """Make the model write this token whatever it has read."""
    with torch.no_grad():
        model.lm_head.bias.zero_()[token] = 1e4


def test_rows_of_logits_without_a_token_decode_to_nothing(hub):
    tokenizer, model = load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    prefer(model, VOCABULARY - 1)
    assert tokenizer.convert_ids_to_tokens(VOCABULARY - 1) is None
    (ids,) = sampling.sample_responses(model, tokenizer, [[5, 6]], 3, 1.0)
    assert ids == [VOCABULARY - 1] * 3 and texts.decode_response(ids, tokenizer) == ""
    dog = tokenizer(" my dog", add_special_tokens=False)["input_ids"]
    mixed = [ids[0], dog[0], ids[0], *dog[1:], ids[0], 0, 7]
    assert texts.decode_response(mixed, tokenizer) == "my dog"
    assert RewardModel(model).score(torch.tensor([[5, *ids]]), torch.ones(1, 4)).isfinite().all()


def test_a_tokenizer_of_another_model(tmp_path, hub):
    make("gptj").save_pretrained(tmp_path / "small")  # 12 rows, for a tokenizer of 284
    with pytest.raises(SettingError, match="284 tokens, but .*small knows 12.*another model"):
        load_language_model(str(tmp_path / "small"), tokenizer=str(hub / "gpt-j-6B"))


@pytest.mark.parametrize("generation_config", [
    None, {"_from_model_config": True, "bos_token_id": 0},
    {"temperature": 0.1, "top_k": 1, "eos_token_id": [9, 999], "repetition_penalty": 5.0,
     "do_sample": True}])
def test_what_ends_a_text_is_eos_and_what_generation_config_names(generation_config, tmp_path, hub):
    folder = Path(shutil.copytree(hub / "sft", tmp_path / "sft"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    if generation_config:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    tokenizer, model = load_language_model(str(folder), tokenizer=str(hub / "gpt-j-6B"))
    assert model.generation_config.eos_token_id != tokenizer.eos_token_id, "the trap is not built"
    prefer(model, 0)
    assert sampling.sample_responses(model, tokenizer, [[5, 6], [7]], 4, 1.0) == [[0], [0]]
    named = 9 in (model.generation_config.eos_token_id or [])
    assert tokenizer.end_ids == ([0, 9] if named else [0])
    prefer(model, 9)
    assert sampling.sample_responses(model, tokenizer, [[5, 6], [7]], 4, 1.0) == (
        [[9], [9]] if named else [[9] * 4] * 2)
    assert texts.decode_response([5, 9, 6], tokenizer) == tokenizer.decode(
        [5] if named else [5, 9, 6])
    model.save_pretrained(tmp_path / "saved")  # transformers refuses some of these when it saves


def test_the_cache_is_used_where_the_config_says_no(hub):
    tokenizer, model = load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    assert model.config.use_cache is False, "the trap is not built"
    widths = []
    model.base_model.wte.register_forward_hook(
        lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    model.register_forward_pre_hook(lambda _, __, kwargs: asked.append(
        (kwargs["use_cache"], kwargs["cache"].get_seq_length()) if kwargs else None),
        with_kwargs=True)
    asked = []
    (found,) = sampling.sample_responses(model, tokenizer, [[5, 6, 7]], 4, 0)
    assert widths == [3, 1, 1, 1] and asked == [(True, 0), (True, 3), (True, 4), (True, 5)]
    ids = [5, 6, 7]
    for _ in range(4):  # greedy, without a cache
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert found == ids[3:] and 0 not in found


@pytest.mark.parametrize("kind, stored, asked, small", [
    ("bin", torch.float16, torch.float32, False), ("bin", torch.float32, torch.bfloat16, True),
    ("safetensors", torch.bfloat16, torch.float32, False)])
def test_a_checkpoint_comes_in_the_type_asked_for(kind, stored, asked, small, tmp_path, hub):
    model = make_gptj(tmp_path / "model", stored, shards=2)
    if kind == "safetensors":
        shutil.rmtree(tmp_path / "model")
        model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] in str(stored)
    _, loaded = load_language_model(str(tmp_path / "model"), dtype=asked, small=small,
                                       tokenizer=str(hub / "gpt-j-6B"))
    assert {p.dtype for p in loaded.parameters()} == {asked}
    if not small:
        for key, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.state_dict()[key].to(asked)), key
    reward_model = RewardModel(loaded)  # a score is float32
    assert reward_model.score(torch.tensor([[5, 6]]), torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("newlines, frame", [
    (1, "SUBREDDIT: r/pets\nTITLE: Rex\nPOST: my dog\nTL;DR:"),
    (2, "SUBREDDIT: r/pets\n\nTITLE: Rex\n\nPOST: my dog\n\nTL;DR:")])
def test_prompt_and_summary_as_the_model_was_trained(newlines, frame, hub):
    """No blank at the prompt's end, one in front of the summary: that of "TL;DR: {summary}"."""
    tokenizer = AutoTokenizer.from_pretrained(hub / "gpt-j-6B")
    post = {"subreddit": "pets", "title": "Rex", "post": "my dog"}
    (query,), (response,) = texts.encode([post], ["it ate"], tokenizer,
                                                settings(prompt_newlines=newlines))
    assert tokenizer.decode(query) == frame
    assert tokenizer.decode(response) == " it ate<|endoftext|>"
    long = {**post, "post": "my dog\n" + "ate " * 500}  # cut at its newline, cue and gap kept
    (query,), _ = texts.encode([long], [], tokenizer, settings(
        prompt_newlines=newlines, query_length=100))
    assert tokenizer.decode(query) == frame


def test_the_full_preset_names_what_exists():
    full = main.parse(["--preset", "full"])
    assert (full.sft_model, full.tokenizer, full.prompt_newlines) == (
        "CarperAI/openai_summarize_tldr_sft", "EleutherAI/gpt-j-6B", 1)
    assert full.judge == "Qwen/Qwen2.5-3B-Instruct" and full.lora_rank == 16
    assert (full.posts, full.comparisons) == (
        "vwxyzjn/summarize_from_feedback_tldr_3_filtered", "openai/summarize_from_feedback")
    assert main.parse(["--preset", "full", "--lora_rank", "0"]).lora_rank == 0


@pytest.mark.parametrize("given, tokenizer, newlines", [
    (["CarperAI/openai_summarize_tldr_sft"], "EleutherAI/gpt-j-6B", 1),
    (["me/mine"], None, 2),  # GPT-J's tokenizer would fit Qwen's 152 k rows, and mean other words
    (["me/mine", "--tokenizer", "me/yours", "--prompt_newlines", "1"], "me/yours", 1)])
def test_tokenizer_and_prompt_of_the_preset_are_its_own_models(given, tokenizer, newlines):
    full = main.parse(["--preset", "full", "--sft_model", *given])
    assert (full.tokenizer, full.prompt_newlines) == (tokenizer, newlines)


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
OPENAI, VWXYZJN = PRESETS["full"]["comparisons"], PRESETS["full"]["posts"]


def post_of(name):
    return f"My dog {name} ate the cat's food.\n\nShould I tell {name} off? " + "It sat. " * 5


def compared(name, choice=0, split="train", batch="batch3",
             texts=(" the dog ate", " ate it all up"), **info):
    info = {"id": f"t3_{name}", "post": post_of(name), "title": f"TIFU {name}", "subreddit": "pets",
            "site": None, "article": None, **info}
    summaries = [{"text": text, "policy": policy, "note": None}
                 for text, policy in zip(texts, ("sup1", "ref"))]
    return {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": batch,
            "split": split, "extra": {"confidence": None if choice else 7}}


def news(batch, split):
    return compared("news", split=split, batch=batch, post=None, title=None, subreddit=None,
                    id=None, article="A dog has eaten.", site="cnndm")


def write_parquet(folder):
    """The parquet branch of openai/summarize_from_feedback, and the splits of vwxyzjn's posts."""
    train = [compared("P0"), compared("P0", 1), compared("P1", 1, subreddit=None, id=None),
             compared("shared"), compared("P2", texts=(" same", " same")),
             *(compared(f"P{i}", i % 2, texts=(f" dog {i} ate", " it sat there"))
               for i in range(3, 27))]
    validation = [compared("V0", 1, "valid1"), compared("shared", 0, "valid2"),
                  news("batch0_cnndm", "valid2"), news("cnndm0", "valid1"),
                  news("cnndm2", "valid2"),
                  compared("V1", 0, "valid2", "edit_b2_eval_test"),
                  *(compared(f"V{i}", i % 2, "valid2") for i in range(2, 9))]
    axis = [{"info": compared("A")["info"], "worker": "w", "batch": "b", "split": "test",
             "summary": {"text": " dog", "policy": "p", "note": None}}]
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
    assert train[0]["post"] == {"subreddit": "pets", "title": "TIFU P0",
                                "post": post_of("P0").strip()}
    assert (train[0]["chosen"], train[0]["rejected"]) == ("the dog ate", "ate it all up")
    assert (train[1]["chosen"], train[1]["policies"]) == ("ate it all up", ["ref", "sup1"])
    assert train[2]["post"]["subreddit"] == ""
    validation = load_comparisons(OPENAI, "validation")
    assert [row["post"]["title"][5:] for row in validation] == ["V0", "shared", *(
        f"V{i}" for i in range(1, 9))]


def test_posts_of_the_hub(served, capsys):
    train = load_posts(VWXYZJN)
    assert served == [(VWXYZJN, {})] and len(train) == 33
    assert train[2]["summary"] == "dog ate"  # encode_responses puts the blank back
    assert "33 of 45 rows used; left out: 12 in another split" in capsys.readouterr().out
    assert [row["title"] for row in load_posts(VWXYZJN, "validation")] == [
        f"TIFU H{i}" for i in range(10)]


@pytest.mark.parametrize("local", [False, True])
def test_no_post_on_both_sides(local, served, hub, capsys):
    sources = OPENAI, VWXYZJN
    if local:  # the same folders, downloaded
        sources = [str(hub / OPENAI.split("/")[1] / "comparisons"),
                   str(hub / VWXYZJN.split("/")[1])]
    posts, held_out, pairs, pairs_held_out = start.load_data(
        settings(comparisons=sources[0], posts=sources[1]))
    sides = [{row["post"] for row in posts} | {row["post"]["post"] for row in pairs},
             {row["post"] for row in held_out} | {row["post"]["post"] for row in pairs_held_out}]
    assert not sides[0] & sides[1]
    # by hand: V0 and H0 among the posts and "shared" among the comparisons are held out
    assert [len(rows) for rows in (posts, held_out, pairs, pairs_held_out)] == [31, 10, 27, 10]
    assert ("left out as their post is held out: 2 posts, 1 comparisons"
            in capsys.readouterr().out)


# ---------------------------------------------------------------------------- the judge


# As templates that think unless they are told not to
BY_DEFAULT = CHATML + ("{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>"
                       "</think>' }}{%- else %}{{- '<think>' }}{%- endif %}")


@pytest.mark.parametrize("template, accepted", [(BY_DEFAULT, True), (THINKS, False)])
def test_judges_that_think(template, accepted, hub, tmp_path):
    folder = Path(shutil.copytree(hub / "judge", tmp_path / "judge"))
    (folder / "chat_template.jinja").write_text(template)
    arguments = ["--preset", "full", "--judge", str(folder), "--sft_model", "./nowhere",
                 "--fast_dev_run", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    # the judge is read before the SFT model: where it is accepted, that one is what is missing
    said = "./nowhere" if accepted else (f"--judge {folder}: this judge thinks before it answers: "
                                         "choose one that answers at once")
    assert said in stop.value.code and "\n" not in stop.value.code


# ---------------------------------------------------------------------------- hub failures


class RemoteProtocolError(Exception):
    """As httpx, which huggingface_hub downloads with, calls it."""


def caused(error, cause):
    error.__cause__ = cause
    return error


CUT = "it is damaged or was cut short: if it is a download, delete "
OTHERWISE = ("check the name and the network, log in if it is private (hf auth login), or pass a "
             "local folder or file that has all of it")
# What the libraries raise, word for word where it matters; {id} stands for the repository
FAULTS = {
    "no network": (OSError(
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them "
        "in the cached files.\nCheck your internet connection or see how to run the library in "
        "offline mode at 'https://huggingface.co/docs/transformers/installation#offline-mode'."),
        OTHERWISE),
    "gated": (OSError(
        "You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/{id}.\n401 Client Error. (Request ID: Root=1-404)"),
        "accept its licence on https://huggingface.co/{id} and log in: hf auth login"),
    "missing": (OSError(
        "{id} is not a local folder and is not a valid model identifier listed on 'https://"
        "huggingface.co/models'\nIf this is a private repository, make sure to pass a token"),
        OTHERWISE),
    "cut": (RemoteProtocolError("peer closed connection without sending complete message body "
                                "(received 404 bytes, expected 9940000000)"), CUT),
    "size": (OSError("Consistency check failed: file should be of size 404 but has size 401"),
             CUT),
    "corrupt pickle": (UnpicklingError(
        "Weights only load failed. In PyTorch 2.6, we changed the default value of the "
        "`weights_only` argument in `torch.load` from `False` to `True`. Re-running `torch.load` "
        "with `weights_only` set to `False` will likely succeed"), CUT),
    "corrupt pickle, too": (RuntimeError("mmap can only be used with files saved with `torch.save("
                                         "x, _use_new_zipfile_serialization=True)"), CUT),
    "corrupt safetensors": (SafetensorError(
        "Error while deserializing header: header too large"), CUT),
    "disk full": (OSError(28, "No space left on device"),
                  "set HF_HOME to a folder on a larger disk"),
    "disk full, data": (caused(datasets.exceptions.DatasetGenerationError(
        "An error occurred while generating the dataset"), OSError(28, "No space left on device")),
        "set HF_HOME to a folder on a larger disk"),
    "disk too small, data": (OSError("Not enough disk space. Needed: 40 MiB (download: 20 MiB)"),
                             "set HF_HOME"),
    "corrupt parquet": (caused(datasets.exceptions.DatasetGenerationError(
        "An error occurred while generating the dataset"),
        ValueError("Parquet magic bytes not found in footer")), CUT),
    "missing shard": (OSError(
        "{id} does not appear to have a file named pytorch_model-00002-of-00003.bin. Checkout "
        "'https://huggingface.co/{id}/tree/main' for available files."),
        OTHERWISE),
    "no config": (ValueError("Unrecognized model in {id}. Should have a `model_type` key"),
                  OTHERWISE),
    "no tokenizer": (ValueError(
        "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library "
        "serialization file, (2) a slow tokenizer instance to convert"),
        "name the tokenizer of its base model with --tokenizer"),
    "own code": (ValueError(
        "The repository {id} contains custom code which must be executed to correctly load the "
        "model. Please pass the argument `trust_remote_code=True` to allow custom code to be run."),
        "code of its own, which is never run here"),
}
LOADS = {"CarperAI/openai_summarize_tldr_sft": (AutoModelForCausalLM, "from_pretrained"),
         "EleutherAI/gpt-j-6B": (AutoTokenizer, "from_pretrained"),
         "Qwen/Qwen2.5-3B-Instruct": (AutoModelForCausalLM, "from_pretrained"),
         OPENAI: (datasets, "load_dataset"), VWXYZJN: (datasets, "load_dataset"),
         "me/my-reward-model": (start, "snapshot_download")}
FLAGS = ["sft_model", "tokenizer", "judge", "comparisons", "posts", "reward_model"]


def local(hub, folder, **changes):
    """The command line of a full run on those folders."""
    names = {"sft_model": hub / "sft", "tokenizer": hub / "gpt-j-6B", "judge": hub / "judge",
             "comparisons": hub / OPENAI.split("/")[1] / "comparisons",
             "posts": hub / VWXYZJN.split("/")[1], "output_dir": folder / "run", **changes}
    return ["--preset", "full", "--query_length", "150", *(
        text for name, value in names.items() for text in (f"--{name}", str(value)))]


@pytest.mark.slow
@pytest.mark.parametrize("flag, name, fault", [
    (flag, name, fault) for flag, name in zip(FLAGS, LOADS) for fault in FAULTS
    if flag == "sft_model" or fault in ("gated", "disk full, data")])
def test_a_fault_of_the_hub_is_one_line(flag, name, fault, hub, tmp_path, monkeypatch):
    """Each fault of each id of the full preset, all else being there."""
    error, advice = FAULTS[fault]
    texts = [text.replace("{id}", name) if isinstance(text, str) else text for text in error.args]
    error = caused(type(error)(*texts), error.__cause__)

    def fails(path, *rest, **form):
        if path == name:
            raise error
        return real(path, *rest, **form)

    where, function = LOADS[name]
    if flag in ("sft_model", "judge"):  # its config and tokenizer have come
        for auto, folder in ((AutoTokenizer, hub / "judge"),
                             (models_file.AutoConfig, hub / "sft")):
            found = auto.from_pretrained
            monkeypatch.setattr(
                auto, "from_pretrained", lambda path, found=found, folder=folder, **form:
                found(folder if path == name else path, **form))
    real = getattr(where, function)
    monkeypatch.setattr(where, function, fails)
    monkeypatch.setattr(start, "go_offline_unless_reachable", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main.main(local(hub, tmp_path, **{flag: name}))
    line = stop.value.code
    assert isinstance(line, str) and line.isprintable() and len(line) < 500, line
    told = error.__cause__ or error
    assert f"{name}: not readable, {type(told).__name__}: " in line, line
    assert advice.replace("{id}", name) in line, line
    if advice.endswith("delete "):
        cache = f"{models_file.HF_HUB_CACHE}/*--{name.replace('/', '--')}"
        assert f"delete {cache} and try again" in line
    assert not re.search("weights_only|trust_remote_code|from_tf", line), line
    assert not (tmp_path / "run").exists(), "before any work"


def test_every_advice_has_a_fault_that_gets_it():
    for _, row in models_file.FAULTS:
        assert any(advice.replace("{id}", "{name}") in row for _, advice in FAULTS.values()), row


@pytest.fixture
def cached(hub, tmp_path, monkeypatch):
    """A cache of the hub that holds me/sft, as a download leaves it, and no network."""
    folder = tmp_path / "cache"
    for place in (huggingface_hub.constants, models_file):
        monkeypatch.setattr(place, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (folder / "models--me--sft" / "refs").mkdir(parents=True)
    (folder / "models--me--sft" / "refs" / "main").write_text("5284f23")
    return Path(shutil.copytree(hub / "sft", folder / "models--me--sft" / "snapshots" / "5284f23"))


def load_from_hub(hub, name="me/sft", **settings):
    return load_language_model(name, tokenizer=str(hub / "gpt-j-6B"), **settings)


def test_a_model_in_the_cache_needs_no_network(hub, cached):
    assert load_from_hub(hub)[1].num_parameters() > 0


SHARD = "pytorch_model-00002-of-00003.bin"


def spoil(change):
    def at(folder):
        (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))
    return at


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / SHARD).unlink(),
     f"does not appear to have a file named {SHARD}; {OTHERWISE}"),
    (lambda folder: (folder / "config.json").unlink(),
     f"couldn't find them in the cached files; {OTHERWISE}"),
    (spoil(lambda old: old[: len(old) // 2]), "delete {cache}/*--me--sft and try again"),
    (spoil(lambda old: b"\xff" * 8 + old[8:]), "delete {cache}/*--me--sft and try again"),
    (spoil(lambda old: old[:200] + bytes(255 - x for x in old[200:400]) + old[400:]),
     "delete {cache}/*--me--sft and try again"),
    (spoil(lambda old: b""), "delete {cache}/*--me--sft and try again"),
    (lambda folder: torch.save({"x": SFTConfig()}, folder / SHARD),  # an object: code, perhaps
     "delete {cache}/*--me--sft and try again"),
    (lambda folder: (folder / "config.json").write_text("<html>log in to this network"),
     "delete {cache}/*--me--sft and try again"),
], ids=["shard", "config", "cut", "head", "middle", "empty", "pickle", "portal"])
def test_a_damaged_cache_as_the_libraries_tell_it(damage, said, hub, cached):
    damage(cached)
    with pytest.raises(SettingError) as stop:
        load_from_hub(hub)
    line = str(stop.value)
    assert line.startswith("me/sft: not readable, ") and line.isprintable(), line
    assert said.replace("{cache}", models_file.HF_HUB_CACHE) in line, line
    assert not re.search("weights_only|trust_remote_code|from_tf", line), line


@pytest.mark.parametrize("reachable", [True, False])
def test_the_hub_is_asked_once(reachable, monkeypatch):
    def urlopen(url, timeout):
        calls.append(timeout)
        raise (models_file.urllib.error.HTTPError(url, 429, "slow down", {}, None) if reachable
               else TimeoutError("timed out"))

    calls = []
    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models_file.urllib.request, "urlopen", urlopen)
    models_file.go_offline_unless_reachable()
    assert calls == [10]
    offline = not reachable
    assert huggingface_hub.constants.HF_HUB_OFFLINE is offline is datasets.config.HF_HUB_OFFLINE
    assert huggingface_hub.is_offline_mode() is offline


# ---------------------------------------------------------------------------- code from the hub


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("small", [False, True])
def test_code_that_comes_with_a_model_is_never_run(file, small, hub, tmp_path, monkeypatch):
    """Left to itself, transformers asks whether to run it; here someone always says yes."""
    folder = Path(shutil.copytree(hub / "sft", tmp_path / "sft"))
    shutil.copytree(hub / "gpt-j-6B", folder, dirs_exist_ok=True)
    known = json.loads((folder / file).read_text())
    mine = {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine",
                         "AutoTokenizer": ["mine.Mine", None]},
            "model_type": "mine", "tokenizer_class": "Mine"}
    (folder / file).write_text(json.dumps({**known, **mine}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\nMine = None\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    with (pytest.raises(SettingError, match="code of its own, which is never run here")
          if file == "config.json" else nullcontext()):  # the tokenizer is there without its code
        load_language_model(str(folder), small=small)
    assert not asked and not (tmp_path / "has run").exists()


def test_no_source_file_allows_code_or_pickles():
    paths = [path for room in (".", "engine", "figures") for path in ROOT.glob(f"{room}/*.py")]
    assert {"rlhf_minimal.py", "models.py", "make.py"} <= {path.name for path in paths}
    for path in paths:
        assert not re.search(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|pickle\.load",
                             path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------------------- the whole of it


def check_run(folder, hub, n_updates, shrunk=False):
    """Every file of a run, by what must be in it."""
    results = json.loads((folder / "results.json").read_text())
    assert results["preset"] == "full"
    name = str(hub / "judge")
    for key in ("sft_vs_reference", "ppo_vs_reference", "ppo_vs_sft", "best_of_n_vs_reference",
                "judge_agreement"):
        rate = results[key]
        assert rate["judge"] == name and rate["n"] + rate["abstentions"] == rate["total"] > 0, key
        assert shrunk or rate["n"] == 10 and rate["low"] <= rate["win_rate"] <= rate["high"], key
    assert results["reward_accuracy_n"] == 10
    assert set(results["seconds"]) >= {"ppo", "judge", "total"} and "sft" not in results["seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ppo_lines = [line for line in lines if line["stage"] == "ppo"]
    assert [line["step"] for line in ppo_lines] == list(range(n_updates))
    # before the first update a summary's KL is 0; once adapters learn, it isn't
    assert abs(ppo_lines[0]["kl_per_summary"]) < 1e-4
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["post"]["title"] for row in samples] == [f"TIFU H{i}" for i in range(10)]
    report = (folder / "report.md").read_text()
    assert report.index("| win rate |") < report.index("How often each chooses the summary")
    config = json.loads((folder / "config.json").read_text())
    assert config["lora_rank"] == 16 and config["judge"] == name
    for part in ("sft", "policy"):
        model = AutoModelForCausalLM.from_pretrained(folder / part)
        assert type(model).__name__ == "GPTJForCausalLM"
        tokenizer = AutoTokenizer.from_pretrained(folder / part)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
        assert not any("lora" in key for key in load_file(folder / part / "model.safetensors"))
    weights = [load_file(folder / part / "model.safetensors") for part in ("sft", "policy")]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    for part in ("reward_model", "critic"):
        assert not RewardModel.from_pretrained(folder / part).training
        assert AutoTokenizer.from_pretrained(folder / part).eos_token_id == 0
    assert not (folder / "checkpoints").exists()
    return results, lines


def no_network(*_, **__):
    raise AssertionError("asked for the network")


@pytest.mark.slow
def test_the_full_path(hub, tmp_path, monkeypatch, capsys):
    """The full preset on the real layouts: GPT-J without its tokenizer, adapters, a chat judge."""
    monkeypatch.setattr(start, "go_offline_unless_reachable", no_network)
    arguments = [*local(hub, tmp_path, prompt_newlines=1), "--ppo_episodes", "64",
                 "--ppo_batch_size", "16", "--reward_batch_size", "4", "--response_length", "12",
                 "--best_of_n", "2", "--judge_every", "2", "--reward_lr", "1e-3", "--ppo_lr",
                 "1e-3"]
    main.main(arguments)
    out = capsys.readouterr().out
    assert "memory: about" in out and f"judge {hub / 'judge'}: agrees with" in out
    results, lines = check_run(tmp_path / "run", hub, 4)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    assert any(line["stage"] == "reward" for line in lines) and "reward" in results["seconds"]
    last = [line for line in lines if line["stage"] == "ppo"][-1]
    assert abs(last["kl_per_summary"]) > 1e-6, "the adapters never moved"
    # the SFT model is the given one, to the last bit
    given = AutoModelForCausalLM.from_pretrained(hub / "sft").state_dict()
    saved = load_file(tmp_path / "run" / "sft" / "model.safetensors")
    assert all(torch.equal(given[key], value) for key, value in saved.items())
    # and a post can be tried on it
    (tmp_path / "post.txt").write_text("My dog Rex ate it.")
    main.main(["--summarize", str(tmp_path / "post.txt"), "--output_dir",
                       str(tmp_path / "run")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["sft", "policy"]


@pytest.mark.slow
def test_a_stopped_run_with_adapters_goes_on(hub, tmp_path, monkeypatch):
    """Stopped in PPO and resumed: the same metrics and weights as one that never was."""
    few = ["--ppo_episodes", "48", "--ppo_batch_size", "16", "--reward_batch_size", "4",
           "--response_length", "8", "--best_of_n", "2", "--judge_every", "0", "--ppo_lr", "1e-3"]

    def log(self, stage, step, **metrics):
        real(self, stage, step, **metrics)
        if stage == "ppo" and step == 1:
            self.stopping = True

    arguments = [*local(hub, tmp_path), *few]
    real = Run.log
    main.main(arguments)
    monkeypatch.setattr(Run, "log", log)
    other = [*local(hub, tmp_path, output_dir=tmp_path / "other"), *few]
    with pytest.raises(SystemExit) as stop:
        main.main(other)
    assert stop.value.code == 130
    monkeypatch.setattr(Run, "log", real)
    main.main([*other, "--resume"])
    for name in ("metrics.jsonl", "samples.jsonl", "policy/model.safetensors",
                 "critic/model.safetensors", "reward_model/model.safetensors"):
        one, two = ((tmp_path / run / name).read_bytes() for run in ("run", "other"))
        assert one == two, name


@pytest.mark.slow
def test_fast_dev_run_of_the_full_preset_trains_no_stage_that_is_given(hub, tmp_path, monkeypatch,
                                                                      capsys):
    """Every model and file a local one, the reward model too."""
    tokenizer, model = load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    given = RewardModel(model)
    given.reference_mean.fill_(0.25)
    given.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    monkeypatch.setattr(report_file, "draw_run", lambda *_: "")  # two seconds
    monkeypatch.setattr(main, "train_sft", no_network)
    monkeypatch.setattr(main, "train_reward", no_network)
    monkeypatch.setattr(start, "go_offline_unless_reachable", no_network)
    main.main([*local(hub, tmp_path, reward_model=tmp_path / "rm"), "--fast_dev_run",
                       "--ppo_epochs", "1", "--best_of_n", "2", "--response_length", "6",
                       "--judge_every", "0"])
    results, _ = check_run(tmp_path / "run", hub, 2, shrunk=True)
    assert "reward" not in results["seconds"]
    saved = load_file(tmp_path / "run" / "reward_model" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in given.state_dict().items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy").config.n_embd == 64


@pytest.mark.parametrize("wrong, message", [
    ("a language model", "expected the reward_model/ folder of a run"),
    ("another tokenizer", "was trained with another tokenizer"),
    ("cut", "it is damaged or was cut short"), ("missing", "or pass a local folder or file")])
def test_a_reward_model_that_is_none(wrong, message, hub, tmp_path, monkeypatch):
    folder = tmp_path / "rm"
    tokenizer, model = load_language_model(str(hub / "sft"), tokenizer=str(hub / "gpt-j-6B"))
    if wrong != "missing":
        (model if wrong == "a language model" else RewardModel(model)).save_pretrained(
            folder.mkdir() or folder)
        AutoTokenizer.from_pretrained(hub / ("judge" if wrong == "another tokenizer"
                                             else "gpt-j-6B")).save_pretrained(folder)
    if wrong == "cut":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    monkeypatch.setattr(main, "train_ppo", no_network)
    with pytest.raises(SystemExit) as stop:
        main.main([*local(hub, tmp_path, reward_model=folder), "--fast_dev_run"])
    line = stop.value.code
    assert line.startswith(f"{PROGRAM}: --reward_model {folder}: ") and message in line, line
    assert "\n" not in line


def test_a_changed_row_of_a_folder_is_noticed(hub, tmp_path):
    data = Path(shutil.copytree(hub / OPENAI.split("/")[1], tmp_path / "data"))
    before = describe({"comparisons": str(data)})["files"]
    assert describe({"comparisons": str(data)})["files"] == before
    with (data / "comparisons" / "train" / "0000.parquet").open("ab") as file:
        file.write(b"x")
    assert describe({"comparisons": str(data)})["files"] != before
