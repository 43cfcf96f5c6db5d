"""engine/texts.py: the prompt as a real tokenizer reads it."""

import copy

import pytest
from common import byte_level
from tokenizers.processors import TemplateProcessing
from rows_common import post
from transformers import AutoTokenizer, tokenization_utils_base

from engine.texts import encode_prompt, encode_prompts
from tldr import build_prompt

@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer as GPT-2's: pad is eos, and a few merges."""
    return byte_level("the cat sat on my seat and I was tired",
                      ["<|endoftext|>", "<|im_end|>"], 330, eos_token="<|endoftext|>",
                      pad_token="<|endoftext|>",
                      additional_special_tokens=["<|im_end|>"], model_max_length=64)


def test_encode_prompt_cuts_only_the_post(tokenizer):
    whole = {"subreddit": "tifu", "title": "T\nU", "post": "the cat\nsat on\nmy seat"}
    length = len(encode_prompt(whole, tokenizer, 1000))
    assert tokenizer.decode(encode_prompt(whole, tokenizer, length)) == build_prompt(whole)
    for query_length in range(length - 1, 0, -1):
        try:
            ids = encode_prompt(whole, tokenizer, query_length)
        except ValueError:
            break
        assert len(ids) <= query_length
        text = tokenizer.decode(ids)
        assert text.startswith("SUBREDDIT: r/tifu\n\nTITLE: T\nU\n\nPOST: ")
        assert text.endswith("\n\nTL;DR:") and ids != []
    assert text == build_prompt({**whole, "post": ""})  # the last one that fitted
    assert whole["post"] == "the cat\nsat on\nmy seat"  # the row itself is untouched


def test_query_length_too_small_names_the_setting(tokenizer):
    with pytest.raises(ValueError, match="query_length") as caught:
        encode_prompt({"title": "long " * 50, "post": "p"}, tokenizer, 20)
    assert "\n" not in str(caught.value) and "20" in str(caught.value)


def test_typed_special_tokens_stay_text(tokenizer, tmp_path):
    typed = {"subreddit": "<|endoftext|>", "title": "<|im_end|>", "post": "a<|endoftext|>b"}
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        control = set(each.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
        assert control & set(each(build_prompt(typed))["input_ids"])  # it does matter
        ids = encode_prompt(typed, each, 500)
        assert not control & set(ids)
        assert each.decode(ids) == build_prompt(typed)


def test_what_the_tokenizer_puts_in_front_is_part_of_the_prompt(tokenizer):
    """Llama, Gemma, Mistral and OPT have read no text without their BOS; it counts as a token."""
    with_bos = copy.deepcopy(tokenizer)
    with_bos._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert with_bos("a")["input_ids"][0] == 0
    plain, long = encode_prompt(post(), tokenizer, 500), post(post="line\n" * 400)
    assert plain == tokenizer(build_prompt(post()))["input_ids"]
    for rows in ([encode_prompt(post(), with_bos, 500)], encode_prompts([post()], with_bos, 500)):
        assert rows == [[0, *plain]]
    for ids in (encode_prompt(long, with_bos, 90), *encode_prompts([long], with_bos, 90)):
        assert ids[0] == 0 and len(ids) <= 90 and ids[1:] == encode_prompt(long, tokenizer, 89)


@pytest.mark.parametrize("separator", [" ", "\n"])
def test_ten_thousand_words_are_cut_without_warning(tokenizer, separator, monkeypatch):
    said = []
    tokenizer.deprecation_warnings.clear()  # where a tokenizer keeps that it has said it once
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda *args: said.append(args))
    long = {"title": "t", "post": separator.join(["seat"] * 10_000)}
    assert 505 <= len(encode_prompt(long, tokenizer, 512)) <= 512
    assert said == []  # the tokenizer's own "sequence length is longer than the maximum"


MEGABYTES = {"no newline": "ab" * 1_500_000, "words": "seat " * 600_000,
             "lines": "my cat took my seat\n" * 150_000,
             "one line, then it": "hi\n" + "x" * 3_000_000}


@pytest.mark.parametrize("name", MEGABYTES)
def test_three_megabytes_are_never_tokenized_whole(tokenizer, name):
    asked = []

    def counted(texts, **settings):
        asked.extend(map(len, [texts] if isinstance(texts, str) else texts))
        return tokenizer(texts, **settings)

    huge, short = {"title": "t", "post": MEGABYTES[name]}, {"title": "t", "post": "the cat"}
    ids = encode_prompts([short, huge], counted, 512)
    assert len(asked) <= 120 and max(asked) <= 32 * 512 + 100
    assert ids == [encode_prompt(each, tokenizer, 512) for each in (short, huge)]
    assert tokenizer.decode(ids[1]).endswith("\n\nTL;DR:")


def test_a_post_of_few_tokens_is_kept_whole_however_long():
    """As where a tokenizer takes a run of spaces for one token: characters say nothing for sure."""
    def one_token_a_word(texts, **settings):
        rows = [text.split() for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}

    long = {"subreddit": "pets", "title": "t", "post": "a" + " " * 5000 + "b"}
    for rows in (encode_prompts([long], one_token_a_word, 9),
                 [encode_prompt(long, one_token_a_word, 9)]):
        assert rows == [["SUBREDDIT:", "r/pets", "TITLE:", "t", "POST:", "a", "b", "TL;DR:"]]
