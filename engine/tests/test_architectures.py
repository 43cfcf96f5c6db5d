"""Any causal language model in, or a clear no: what models and tokenizers differ in."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from zoo import VOCAB, ZOO, build, config_of

import lm
from engine import architectures
from engine.adapters import add_adapter, checkpoint_activations
from engine.architectures import cached, check_model, holds, left_to_right, padded
from engine.devices import mixed_precision, no_dropout
from engine.models import check_ids, load_for_training, load_language_model, shrink
from engine.settings import SettingError
from engine.texts import (control_ids, decode_response, encode_responses, end_ids, front_ids,
                          ids_after, text_ids)
from engine.settings import parse as parse_settings
from engine.packing import packed, response_log_probs, shares_post
from engine.reward import RewardModel, final_scores
from engine.sampling import sample_responses

G = torch.Generator().manual_seed(1)
QUERIES = [torch.randint(10, 290, (n,), generator=G).tolist() for n in (30, 11, 18)]
RESPONSES = [torch.randint(10, 290, (n,), generator=G).tolist() for n in (5, 9, 1, 12, 3, 12)]
TWICE = [query for query in QUERIES for _ in range(2)]


@torch.no_grad()
def alone(model, query, response):
    """Log-probs of a response, read without padding, cache, neighbours or any function of ours."""
    ids = torch.tensor([query + response])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return log_probs[torch.arange(len(ids[0]) - 1), ids[0, 1:]][-len(response) :]


@torch.no_grad()
def check_all_numbers(model):
    """Log-probs and scores, k = 1 and k = 2, equal those of each summary alone."""
    ids, mask, Q = lm.join(TWICE, RESPONSES, 0)
    T, real = ids.shape[1] - Q, mask[:, Q:].bool()
    expected = torch.cat([alone(model, *row) for row in zip(TWICE, RESPONSES)])
    reward_model = RewardModel(model)
    torch.nn.init.normal_(reward_model.head.weight)
    scores = torch.stack([reward_model.head(reward_model.trunk(
        input_ids=torch.tensor([query + response]), use_cache=False).last_hidden_state)[0, -1, 0]
        for query, response in zip(TWICE, RESPONSES)])
    assert scores.std() > 1e-2 and expected.std() > 1e-2, "they should differ"
    for k in (1, 2):
        got = response_log_probs(model, ids, mask, T, k=k)[real]
        assert torch.allclose(got, expected, atol=1e-4), f"k = {k}"
        assert torch.allclose(final_scores(reward_model, ids, mask, T, k), scores, atol=1e-4)
    assert torch.allclose(reward_model.score(ids, mask), scores, atol=1e-4)


def verdict(model):
    """packed, plain, or what it is refused for."""
    try:
        check_model("me/it", model, 60)
    except SettingError as error:
        return re.search(r"here, (.*); pass another", str(error))[1]
    return "plain" if shares_post(model, 2, 60) == 1 else "packed"


def table():
    """name -> verdict, from the table in engine/README.md."""
    rows = re.findall(r"^\| (packed|plain|refused: .*?) \| (.*) \|$", Path(
        __file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8"), re.M)
    return {name: result.removeprefix("refused: ") for result, names in rows
            for name in re.findall(r"`(.*?)`", names)}


@pytest.mark.slow
def test_the_table_has_all_that_were_tried():
    assert set(table()) == set(ZOO) and len(ZOO) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_of_the_table(name):
    model = build(name)
    result = verdict(model)
    assert result == table()[name]
    if result in ("packed", "plain"):
        check_all_numbers(model)


@pytest.mark.parametrize("name, result", [
    ("gpt2", "packed"), ("mistral", "plain"), ("bloom", "plain"), ("lfm2", "plain"),
    ("rwkv", architectures.TRIALS[0][1]), ("roberta", architectures.TRIALS[1][1]),
    ("openai-gpt", architectures.TRIALS[2][1])])
def test_one_of_each_kind(name, result):
    model = build(name)
    assert verdict(model) == result
    if result in ("packed", "plain"):
        check_all_numbers(model)


def test_a_model_is_tried_again_where_rows_become_longer():
    """A window of 64 does no harm to rows that it holds; a later, longer one leaves it."""
    config = config_of("mistral")
    config.sliding_window = 64
    model = type(build("mistral"))(config).eval()
    assert shares_post(model, 2, 20) == 2 and model.packs == (40, True)
    assert shares_post(model, 2, 40) == 2 and model.packs == (40, True)
    assert shares_post(model, 2, 70) == 1 and model.packs == (140, False)
    assert shares_post(model, 2, 20) == 1, "once it can't, it is not tried again"
    assert shares_post(model, 1, 999) == 1


@pytest.mark.parametrize("trial", [padded, left_to_right, cached, packed])
def test_each_trial_sees_its_fault(trial):
    """A model that is right in all, and then one with that fault planted."""
    model = build("llama")
    assert all(holds(each, model, 40) for each in (padded, left_to_right, cached, packed))
    forward = model.forward

    def faulty(input_ids, attention_mask, position_ids, use_cache=False, **others):
        if trial is padded and (attention_mask == 0).any() and attention_mask.dim() == 2:
            position_ids = position_ids + 1 + torch.arange(input_ids.shape[1]) % 2
        if trial is cached and use_cache and input_ids.shape[1] == 1:
            position_ids = position_ids + 1 + position_ids
        if trial is packed and attention_mask.dim() == 4:
            attention_mask = attention_mask.clone()
            attention_mask[..., -1, :] = 0
        output = forward(input_ids=input_ids, attention_mask=attention_mask,
                         position_ids=position_ids, use_cache=use_cache, **others)
        if trial is left_to_right and not use_cache and input_ids.shape[1] > 1:
            output.logits = output.logits + 0.01 * input_ids[:, -1:, None]
        return output

    faulty.__signature__ = architectures.inspect.signature(forward)
    model.forward = faulty
    assert not holds(trial, model, 40)


def test_adapters_in_half_precision_are_read_packed():
    """Frozen weights in bfloat16 and adapters in float32 only go together within autocast."""
    policy = add_adapter(build("llama").to(torch.bfloat16), 4, 0)
    assert shares_post(policy, 2, 40) == 2
    with mixed_precision("cpu", torch.bfloat16):
        assert shares_post(RewardModel(policy).trunk, 2, 90) == 2


def test_the_width_is_that_of_the_last_hidden_state():
    assert RewardModel(build("opt")).head.in_features == 16  # word_embed_proj_dim, not 32
    assert RewardModel(build("llama4_text")).head.in_features == 32
    assert RewardModel(build("gemma3")).head.in_features == 32  # in text_config


@pytest.mark.parametrize("name", ["opt", "xglm", "biogpt", "gpt2"])
def test_dropout_stays_off_where_activations_are_computed_again(name):
    model = build(name)
    assert any(getattr(module, "p", 0) or getattr(module, "dropout", 0) for module
               in model.modules() if not callable(getattr(module, "dropout", 0))), "none to see"
    ids, mask, Q = lm.join(TWICE, RESPONSES, 0)
    expected = response_log_probs(model, ids, mask, ids.shape[1] - Q)
    checkpoint_activations(model)
    got = response_log_probs(model, ids, mask, ids.shape[1] - Q)
    assert got.requires_grad and torch.equal(expected[mask[:, Q:] == 1], got[mask[:, Q:] == 1])


def test_every_dropout_is_zero():
    model = no_dropout(build("opt"))
    for module in model.modules():
        for name, value in vars(module).items():
            assert not ("drop" in name and isinstance(value, float) and value)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "qwen3_5_text", "gemma3", "falcon", "mistral"])
def test_fast_dev_run_keeps_the_kinds_of_layers(name):
    small = shrink(config_of(name))
    text, before = small.get_text_config(), config_of(name).get_text_config()
    assert text.num_hidden_layers == 2 and text.hidden_size == 64
    assert getattr(text, "layer_types", None) == getattr(before, "layer_types", None)


# ---------------------------------------------------------------------------- what is in a folder

TEXTS = ["SUBREDDIT: r/pets\n\nTITLE: cat\n\nPOST: the cat sat on A B C seat\n\n"
         "TL;DR: my cat A B"] * 9
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<end_of_turn>"]


def byte_level(bos=False):
    """As GPT-2's; with bos it puts <s> in front of every text, as Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>",
                                   bos_token="<s>" if bos else None)


def sentence_piece():
    """As Llama 2's: a space goes in front of every text, and spaces are "▁"."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator([word for text in TEXTS for word in text.split()],
                                trainers.BpeTrainer(vocab_size=500, show_progress=False,
                                special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)],
                                initial_alphabet=["▁"]))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a language model whose lm head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def test_a_model_that_needs_a_row_for_each_summary_is_said_once(tmp_path, capsys):
    build("bloom").save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    capsys.readouterr()
    load_language_model(str(tmp_path))
    said = capsys.readouterr().out
    assert "bloom can't read two summaries" in said and "a row of its own" in said
    assert said.count("\n") == 1


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(folder, *words):
    with pytest.raises(SettingError) as stop:
        load_language_model(str(folder))
    assert "\n" not in str(stop.value) and str(folder) in str(stop.value)
    for word in words:
        assert re.search(word, str(stop.value)), str(stop.value)


def test_weights_that_are_not_there_are_not_drawn_at_random(llama, tmp_path):
    _, model = load_language_model(str(llama))
    folder = copy_of(llama, tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name, kept in {"no head": {k: v for k, v in weights.items() if k != "lm_head.weight"},
                       "wrapped": {f"_orig_mod.{k}": v for k, v in weights.items()},
                       "a layer": {k: v for k, v in weights.items() if "layers.1.mlp" not in k},
                       }.items():
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        refused(folder, "weights of a llama language model are not in it", "for one")
    own = tmp_path / "reward_model"
    own.mkdir()
    RewardModel(model).save_pretrained(own)
    byte_level().save_pretrained(own)
    refused(own, "language model are not in it")


def test_a_classifier_is_no_language_model(llama, tmp_path):
    """GPT-2's has all weights of a language model, since its lm head is its embedding."""
    for name in ("llama", "gpt2"):
        folder = tmp_path / name
        config = config_of(name)
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        byte_level().save_pretrained(folder)
        refused(folder, "ForSequenceClassification is no causal language model")


def test_an_adapter_has_to_be_merged_first(llama, tmp_path):
    folder = copy_of(llama, tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": str(llama)}))
    refused(folder, "it is an adapter, not a model; merge it")  # beside the base's config ...
    (folder / "config.json").unlink()
    refused(folder, "it is an adapter, not a model; merge it")  # ... and without


@pytest.mark.parametrize("kind", ["bart", "pegasus", "marian", "roberta"])
def test_encoders_are_refused(kind, tmp_path):
    from transformers import AutoConfig
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    refused(tmp_path, f"{kind} is no causal language model")


def settings_for(folder, *more):
    return parse_settings(["--posts", "p", "--comparisons", "c", "--judge", "longest",
                           "--sft_model", str(folder), *more])


def test_quantised_weights_are_not_trained(llama, tmp_path):
    folder = copy_of(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="quantised, and those can't be trained"):
        load_for_training(str(folder), "cpu", torch.float32, settings_for(folder))


@pytest.mark.parametrize("more, fits", [
    (["--query_length", "500", "--response_length", "12", "--summary_length", "8"], True),
    (["--query_length", "500", "--response_length", "8", "--summary_length", "13"], False),
    (["--query_length", "501", "--response_length", "12", "--summary_length", "8"], False)])
def test_more_tokens_than_positions(llama, more, fits):
    """512 positions: a post of 500 and a summary of 12 fit exactly."""
    settings = settings_for(llama, *more)
    if fits:
        load_for_training(str(llama), "cpu", torch.float32, settings)
        return
    with pytest.raises(SettingError, match="512 positions; pass --query_length (499|500) or less"):
        load_for_training(str(llama), "cpu", torch.float32, settings)


def test_what_ids_a_model_must_know():
    tokenizer = byte_level()
    rows = len(tokenizer)
    check_ids(tokenizer, rows, "it")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_ids(tokenizer, rows, "it")  # no text turns into it: Gemma 3 1B has such a one
    tokenizer.pad_token = "<image>"
    check_ids(tokenizer, rows, "it")
    assert tokenizer.pad_token == "</s>"  # an embedding's row for the padding
    tokenizer.add_tokens(["<word>"])
    with pytest.raises(SettingError, match="it: this tokenizer belongs to another model"):
        check_ids(tokenizer, rows, "it")
    with pytest.raises(SettingError, match="another model"):
        check_ids(byte_level(), 2, "it")


# ---------------------------------------------------------------------------- text and token ids


def test_what_stands_in_front():
    assert front_ids(byte_level()) == [] and front_ids(byte_level(bos=True)) == [1]
    assert front_ids(sentence_piece()) == [1]


def test_what_ends_a_text(llama, tmp_path):
    tokenizer, _ = load_language_model(str(llama))
    assert tokenizer.end_ids == end_ids(tokenizer) == [2]
    folder = copy_of(llama, tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 2, 9999]}')
    tokenizer, model = load_language_model(str(folder))
    assert end_ids(tokenizer) == [2, 4]  # 9999 is no token of it
    model.lm_head.register_forward_hook(lambda module, x, logits: logits + 1e3 * (
        torch.arange(VOCAB) == 4))
    assert sample_responses(model, tokenizer, [[7, 8]], 5, 1.0) == [[4]]
    assert decode_response([*text_ids(tokenizer, [" cat"])[0], 4, 9], tokenizer) == "cat"


def test_the_seam_between_prompt_and_summary():
    """A reference is what the policy could have written: "▁my", and no lone "▁" before it."""
    tokenizer = sentence_piece()
    whole = text_ids(tokenizer, ["TL;DR: my cat"])[0]
    assert tokenizer.convert_ids_to_tokens(text_ids(tokenizer, [" my cat"])[0])[0] == "▁"
    assert encode_responses(["my cat", "my"], tokenizer, 9) == [whole[-2:] + [2], [whole[-2], 2]]
    assert tokenizer.convert_ids_to_tokens(whole[-2:]) == ["▁my", "▁cat"]
    for each in (byte_level(), byte_level(bos=True)):  # here alone and together are the same
        assert encode_responses(["my cat"], each, 9) == [[*text_ids(each, [" my cat"])[0], 2]]
    (ids,) = encode_responses(["my cat"], tokenizer, 9)
    assert decode_response(ids, tokenizer) == "my cat"


def test_a_token_that_reaches_over_the_seam():
    def pairs(tokenizer, texts):  # two letters at a time
        return [[text[i : i + 2] for i in range(0, len(text), 2)] for text in texts]

    assert ids_after(None, "ab", ["cd", "e"], pairs) == [["cd"], ["e"]]
    # "cd" is one token of the whole; the row beside it is none the worse
    assert ids_after(None, "abc", ["def", ""], pairs) == [["de", "f"], []]


@pytest.mark.parametrize("text", ["a <think>b</think>", "x <think>> y", "</s> <think></s>"])
def test_whatever_is_typed_is_text(text):
    for tokenizer in (byte_level(), sentence_piece()):
        tokenizer.add_tokens(["<think>", "</think>", "   "])
        added = set(tokenizer.convert_tokens_to_ids([*SPECIAL, "<think>", "</think>"]))
        assert added & set(control_ids(tokenizer, [text])[0]), "the trap is not built"
        (ids,) = text_ids(tokenizer, [text])
        assert not added & set(ids)
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_runs_of_spaces_stay_tokens():
    """Pythia's tokenizer has them as added tokens; they are how it reads code and lists."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["   "])
    assert text_ids(tokenizer, ["a   b"]) == control_ids(tokenizer, ["a   b"])
