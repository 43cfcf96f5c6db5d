"""The task: prompt format and truncation (App. B.2), posts, comparisons, and what a bad row says.

The rows are composed here, in the schema of openai/summarize_from_feedback. No network is needed.
"""

import copy
import json
import random
import runpy
from functools import partial
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast, tokenization_utils_base

import tldr
from engine import rows as engine_rows
from tldr import (DataError, build_prompt, check_titles, divide_by_post, encode_prompt,
                  encode_prompts, load_both_splits, load_comparisons, load_posts, truncate_post,
                  without_posts_of)


def comparison(post="My cat took my seat.\nWhat now?", choice=0, split="train", **changes):
    """One row of the comparisons schema; changes replace whole fields."""
    row = {
        "info": {"id": "t3_1", "post": post, "title": " Seat trouble ", "subreddit": "AskReddit",
                 "site": None, "article": None},
        "summaries": [{"text": " The cat sits on my chair.", "policy": "sup2", "note": "ok"},
                      {"text": " A cat exists.", "policy": "ref", "note": None}],
        "choice": choice, "worker": "w1", "batch": "batch5", "split": split,
        "extra": {"confidence": None}}
    return {**row, **changes}


def summaries(*texts):
    return [{"text": text, "policy": f"p{i}", "note": None} for i, text in enumerate(texts)]


def news(batch="cnndm2"):
    row = comparison(batch=batch, split="valid2")
    row["info"].update(post=None, title=None, subreddit=None, site="cnn", article="It rained.")
    return row


def post(text="My cat took my seat.", **changes):
    return {"id": "t3_1", "subreddit": "AskReddit", "title": "Seat", "post": text,
            "summary": " Cat.", **changes}


def without(row, *path):
    """A copy of row without the field at path."""
    row = copy.deepcopy(row)
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return row


@pytest.fixture
def write(tmp_path):
    """write(name, rows or str or bytes) -> path; rows become JSON lines."""
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def message(load, *args, **settings):
    with pytest.raises(DataError) as caught:
        load(*args, **settings)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert len(text) < 1000
    return text


# ---------------------------------------------------------------------------- the prompt


def test_prompt_format():
    assert build_prompt({"subreddit": "tifu", "title": "T", "post": "a\nb"}) == (
        "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: a\nb\n\nTL;DR:")


def test_prompt_without_subreddit_or_title():
    empty = "SUBREDDIT: r/\n\nTITLE: \n\nPOST: p\n\nTL;DR:"
    assert build_prompt({"post": "p"}) == empty
    assert build_prompt({"subreddit": None, "title": None, "post": "p"}) == empty


def test_prompt_is_filled_in_one_pass():
    text = "{title} {} {{post}} %s $post {0}"
    assert text in build_prompt({"subreddit": "{post}", "title": "{subreddit}", "post": text})


def fits_10(text):
    return len(f"P:{text}T") <= 10


@pytest.mark.parametrize("text, cut", [
    ("a\nbb\ncccc", "a\nbb"),          # checklist item 59: 12 tokens -> 7
    ("a\nb\nccc", "a\nb\nccc"),        # exactly 10 tokens: untouched
    ("a\nb\n\nccccc", "a\nb\n"),       # only the last newline goes at each step
    ("abcdefghij", "abcdefg"),         # no newline: characters from the end
    ("abcdefghij\nk\nl", "abcdefg"),   # newlines first, then characters
    ("\nabcdefghij", ""),              # an empty first line
    ("", ""),
])
def test_truncate_post(text, cut):
    assert truncate_post(text, fits_10) == cut


def test_truncate_post_when_nothing_fits():
    assert truncate_post("a\nb", lambda text: False) is None
    assert truncate_post("", lambda text: False) is None


def drop_step_by_step(text, fits):
    """App. B.2 word for word: the last newline, and when there is none, one character."""
    while not fits(text):
        text = text[: text.rindex("\n")] if "\n" in text else text[:-1]
    return text


def test_truncate_post_equals_cutting_step_by_step(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["cat ", "the", "tired", " ", "\n", "x", "é", "\n\n"])
                       for _ in range(rng.randrange(60)))
        limit = rng.randrange(1, 40)

        def fits(text):  # merges make the number of tokens jump up and down with the length
            return len(tokenizer(text + "T")["input_ids"]) <= limit

        assert truncate_post(text, fits) == drop_step_by_step(text, fits)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer as GPT-2's: pad is eos, and a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["the cat sat on my seat and I was tired"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
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
def test_three_megabytes_are_asked_about_a_few_times_and_never_whole(name):
    asked = []

    def fits(text):  # one character = one token
        asked.append(len(text))
        return len(text) <= 500

    text = MEGABYTES[name]
    cut = truncate_post(text, fits)
    assert cut == (text[:500] if "\n" not in text else text[: text[:501].rindex("\n")])
    # 10 doublings to 512, 8 bisections below it, 64 characters beyond it and the one that fits
    assert len(asked) <= 100 and max(asked) <= 1000


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


def test_a_title_that_leaves_no_room_is_not_tokenized_again_and_again():
    asked = []
    assert truncate_post("x" * 1000, lambda text: asked.append(text)) is None
    assert asked == [""]


def test_a_post_of_few_tokens_is_kept_whole_however_long():
    """As where a tokenizer takes a run of spaces for one token: characters say nothing for sure."""
    def one_token_a_word(texts, **settings):
        rows = [text.split() for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}

    long = {"subreddit": "pets", "title": "t", "post": "a" + " " * 5000 + "b"}
    for rows in (encode_prompts([long], one_token_a_word, 9),
                 [encode_prompt(long, one_token_a_word, 9)]):
        assert rows == [["SUBREDDIT:", "r/pets", "TITLE:", "t", "POST:", "a", "b", "TL;DR:"]]


# ---------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("choice, chosen, rejected, policies", [
    (0, "The cat sits on my chair.", "A cat exists.", ["sup2", "ref"]),
    (1, "A cat exists.", "The cat sits on my chair.", ["ref", "sup2"]),
])
def test_choice_says_which_summary_was_chosen(write, choice, chosen, rejected, policies):
    assert load_comparisons(write([comparison(choice=choice)])) == [{
        "post": {"subreddit": "AskReddit", "title": "Seat trouble",
                 "post": "My cat took my seat.\nWhat now?"},
        "chosen": chosen, "rejected": rejected, "policies": policies}]


def test_null_or_missing_subreddit_title_and_policy_are_empty(write):
    rows = [comparison(), without(comparison(), "info", "title"), comparison()]
    rows[0]["info"].update(subreddit=None, title=None)
    rows[1]["summaries"][0]["policy"] = None
    del rows[2]["summaries"][1]["policy"], rows[2]["worker"], rows[2]["extra"], rows[2]["batch"]
    loaded = load_comparisons(write(rows))
    assert loaded[0]["post"]["subreddit"] == loaded[0]["post"]["title"] == ""
    assert loaded[1]["post"]["title"] == "" and loaded[1]["policies"] == ["", "ref"]
    assert loaded[2]["policies"] == ["sup2", ""]


def test_splits(write):
    names = ["train", "valid1", "valid2", "validation", "valid", "test", None, "", "valid1 "]
    rows = [comparison(f"post {i}", i % 2, name) for i, name in enumerate(names)]
    rows.append(without(comparison("post 9"), "split"))
    path = write(rows)

    def posts(split):
        return [int(row["post"]["post"].split()[1]) for row in load_comparisons(path, split)]

    assert posts("train") == [0, 6, 7, 9]
    assert posts("validation") == [1, 2, 3, 4, 8]
    assert posts("all") == list(range(10))
    assert load_comparisons(path, "validation", limit=2) == load_comparisons(path, "validation")[:2]


def test_a_split_without_rows_is_empty_not_an_error(write, capsys):
    assert load_comparisons(write([comparison(split="valid2")] * 3)) == []
    assert "0 of 3 rows used; left out: 3 in another split" in capsys.readouterr().out


@pytest.mark.parametrize("load", [load_posts, load_comparisons])
@pytest.mark.parametrize("settings", [{"split": "test"}, {"split": "valid1"}, {"split": None},
                                      {"split": ("train", "test")}, {"limit": 0}, {"limit": -1}])
def test_bad_split_or_limit(write, load, settings):
    with pytest.raises(ValueError, match="split .* limit"):
        load(write([comparison()]), **settings)


def test_what_is_left_out_is_counted_and_printed(write, capsys):
    empty_post = comparison("  \n ")
    no_batch = without(news(), "batch")
    no_post_field = without(news("cnndm0"), "info", "post")
    path = write([comparison(), comparison(summaries=summaries("same", " same\n")), empty_post,
                  comparison(choice=1), news(), comparison(batch="batch0_cnndm"), no_batch,
                  no_post_field,
                  comparison(summaries=summaries("same", "Same"))])
    assert len(load_comparisons(path)) == 3
    assert capsys.readouterr().out == (
        f"{path}: 3 of 9 rows used; left out: 1 identical summaries, 1 empty post text, "
        "4 CNN/DM articles\n")
    assert len(load_comparisons(path, limit=2)) == 2
    assert "2 of 9 rows used" in capsys.readouterr().out


def test_the_line_when_all_rows_are_used(write, capsys):
    path = write([comparison(), comparison(choice=1)])
    load_comparisons(path)
    assert capsys.readouterr().out == f"{path}: 2 of 2 rows used\n"


@pytest.mark.parametrize("choices, warned", [([0, 0], True), ([1, 1, 1], True), ([0, 1], False),
                                             ([1], False)])
def test_equal_labels_are_said_out_loud(write, capsys, choices, warned):
    load_comparisons(write([comparison(choice=choice) for choice in choices]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + warned
    assert ("warning" in lines[-1]) == warned


def test_columnar_summaries(write):
    columns = {"text": [" a ", "b"], "policy": ["x", "y"], "note": [None, None]}
    rows = [comparison(summaries=columns, choice=1),
            comparison(summaries={"text": ["a", "b"], "policy": ["x", "y"], "note": None})]
    loaded = load_comparisons(write(rows))
    assert (loaded[0]["chosen"], loaded[0]["rejected"]) == ("b", "a")
    assert loaded[0]["policies"] == ["y", "x"] and loaded[1]["policies"] == ["x", "y"]


# ---------------------------------------------------------------------------- posts


def test_posts(write, capsys):
    no_subreddit = without(post("x", split="valid1"), "subreddit")
    path = write([post(" a"), post("a\nb ", title=None, summary="b\n"), no_subreddit,
                  post(summary=" "), post(" ")])
    assert load_posts(path, "all") == [
        {"subreddit": "AskReddit", "title": "Seat", "post": "a", "summary": "Cat."},
        {"subreddit": "AskReddit", "title": "", "post": "a\nb", "summary": "b"},
        {"subreddit": "", "title": "Seat", "post": "x", "summary": "Cat."}]
    assert capsys.readouterr().out == (
        f"{path}: 3 of 5 rows used; left out: 1 empty reference summary, 1 empty post text\n")
    assert [row["post"] for row in load_posts(path, "validation")] == ["x"]


# ---------------------------------------------------------------------------- other forms of a row


def said(role, text):
    return {"role": role, "content": text}


PAPER = build_prompt({"subreddit": "pets", "title": "Seat", "post": "My cat\n\nPOST: took it."})
SEAT = {"subreddit": "pets", "title": "Seat", "post": "My cat\n\nPOST: took it."}
HI, ANSWERS = [said("user", "hi")], ([said("assistant", " yes")], [said("assistant", "no")])
TURNS = [*HI, said("assistant", "yo"), said("user", "ok?")]
HUMAN = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: ok?\n\nAssistant:"


def pair(before, prompt=None):
    """A row of chosen and rejected that begin with before, a text or messages."""
    row = {} if prompt is None else {"prompt": prompt}
    yes, no = ANSWERS if isinstance(before, list) else (" yes", " no")
    return {**row, "chosen": before + yes, "rejected": before + no}


PAIRS = {  # a row whose better answer is "yes" and whose worse is "no", and its post
    "trl-lib/tldr-preference": (pair("", PAPER), SEAT),
    "CarperAI": ({"prompt": "SUBREDDIT: r/pets\nTITLE: Seat\nPOST: My cat\n\nPOST: took it.",
                  "chosen": "TL;DR: yes", "rejected": "TL;DR: no"}, SEAT),
    "the prompt in front": (pair(PAPER, PAPER), SEAT),
    "only in front": (pair(PAPER), SEAT),
    "no fields": (pair("", "SUBREDDIT: r/\n\nTITLE: \n\nPOST: hi\n\nTL;DR:"), "hi"),
    "another prompt": (pair("", "Sum up. TITLE: {x}\nPOST: y"), "Sum up. TITLE: {x}\nPOST: y"),
    "another, with a cue": (pair("", "TITLE: x\n\nTL;DR: y\n\nTL;DR:"), "TITLE: x\n\nTL;DR: y"),
    "hh-rlhf": (pair(HUMAN), "Human: hi\n\nAssistant: yo\n\nHuman: ok?"),
    "UltraFeedback": (pair(HI, "hi"), "hi"),
    "TRL": (pair([], HI), "hi"),
    "TRL, the paper's": (pair([], [said("user", PAPER)]), SEAT),
    "TRL, whole": (pair(HI, HI), "hi"),
    "TRL, no prompt": (pair(HI), "hi"),
    "turns": (pair(TURNS, "hi"), "user: hi\n\nassistant: yo\n\nuser: ok?"),
    "a system message": (pair([], [said("system", "Be kind."), *HI]),
                         "system: Be kind.\n\nuser: hi"),
    "the turns that follow": (pair(TURNS[1:], "hi"), "hi\n\nassistant: yo\n\nuser: ok?"),
    "columns": ({"chosen": {"role": ["user", "assistant"], "content": ["hi", "yes"]},
                 "rejected": {"role": ["user", "assistant"], "content": ["hi", "no"]}}, "hi"),
    "null prompt": ({**pair(HI), "prompt": None}, "hi"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_chosen_and_rejected(write, capsys, name):
    row, expected = PAIRS[name]
    expected = {"subreddit": "", "title": "", "post": expected} if expected != SEAT else SEAT
    assert load_comparisons(write([row, {**row, "split": "valid1"}])) == [
        {"post": expected, "chosen": "yes", "rejected": "no", "policies": ["", ""]}]
    fields = "prompt/chosen/rejected" if row.get("prompt") else "chosen/rejected"
    form = "in the paper's format" if expected is SEAT or name == "no fields" else (
        "as the text of a post")
    assert f"read as {fields}, the prompt {form}: 2 rows\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["\n" * 3_000_000 + "x", "x" * 3_000_000, "\nTL;DR" * 500_000])
def test_three_megabytes_are_taken_apart_in_one_pass(write, text):
    """With two repetitions that can share a run of white space this would take hours."""
    path = write([{"prompt": build_prompt({**SEAT, "post": text}), "completion": "c"},
                  {"prompt": f"SUBREDDIT: r/\n\nTITLE: {text}", "completion": "c"}])
    assert [row["post"] for row in load_posts(path)] == [
        text.strip(), f"SUBREDDIT: r/\n\nTITLE: {text}"]


@pytest.mark.parametrize("newlines", [1, 2])
@pytest.mark.parametrize("fields", [
    {"subreddit": "pets", "title": "T", "post": "a\n\nb"}, {"post": "a"}, SEAT,
    {"subreddit": "", "title": "POST: or TITLE: that", "post": "TL;DR: no\nTITLE: x"}])
def test_a_prompt_is_taken_apart_as_it_was_put_together(write, fields, newlines):
    gap = "\n" * newlines
    prompt = build_prompt(fields, gap)
    (loaded,) = load_posts(write([{"prompt": prompt, "completion": " c"}]))
    assert build_prompt(loaded, gap) == prompt and loaded["summary"] == "c"
    assert loaded == {"subreddit": "", "title": "", **fields, "summary": "c"}


@pytest.mark.parametrize("row, expected", [
    ({"prompt": PAPER, "completion": " Cat."}, SEAT),                             # trl-lib/tldr
    ({"prompt": build_prompt(SEAT, "\n"), "label": "Cat."}, SEAT),               # CarperAI
    ({"prompt": HI, "completion": [said("assistant", "Cat.")]}, {"post": "hi"}),  # TRL's messages
    ({"prompt": "hi", "completion": "Cat.", "split": "train"}, {"post": "hi"}),
])
def test_prompt_and_completion(write, capsys, row, expected):
    assert load_posts(write([row])) == [
        {"subreddit": "", "title": "", **expected, "summary": "Cat."}]
    assert "/label, " in capsys.readouterr().out if "label" in row else True


def test_our_own_form_counts_before_another(write, capsys):
    more = {"prompt": "a", "completion": "b", "label": "c", "chosen": "d", "rejected": "e"}
    assert load_posts(write([{**post(), **more}])) == load_posts(write([post()]))
    assert load_comparisons(write([{**comparison(), **more}])) == (
        load_comparisons(write([comparison()])))
    assert "read as" not in capsys.readouterr().out


def test_a_form_is_read_from_a_table_too(write):
    assert load_comparisons(write("prompt;chosen;rejected\nhi;yes;no\n", "rows.csv")) == [
        {"post": {"subreddit": "", "title": "", "post": "hi"}, "chosen": "yes", "rejected": "no",
         "policies": ["", ""]}]


@pytest.mark.parametrize("row, fragment", [
    ({"chosen": "yes", "rejected": "no"}, "prompt: expected text, or messages, got None"),
    ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "prompt: expected text, or messages"),
    ({"prompt": [], "chosen": "yes", "rejected": "no"}, "prompt: expected text, or messages"),
    ({"prompt": "hi", "chosen": "yes"}, "rejected: expected text, or messages"),
    ({"prompt": "hi", "chosen": None, "rejected": "no"}, "chosen: expected text, or messages"),
    ({"prompt": "hi", "chosen": ["yes"], "rejected": ["no"]}, "chosen: expected text, or messages"),
    ({"prompt": "hi", "chosen": "a\ud83d", "rejected": "no"},
     r"chosen: expected text, got 'a\ud83d'"),
    (pair([], [{"from": "human", "value": "hi"}]), "prompt[0].role: expected text, got None"),
    (pair([], [said("user", [{"type": "text", "text": "hi"}])]),
     "prompt[0].content: expected text"),
    ({**pair(HI), "rejected": HI}, "rejected: expected messages that end with the assistant's, got "
                                   "'user'"),
    ({**pair(HI), "chosen": [*HI, said("gpt", "yes")]}, "chosen: expected messages that end with"),
    ({"prompt": "hi", "completion": "yes"}, "info: expected an object"),  # the other kind of file
    ({"system": "a", "question": "hi"}, "info: expected an object"),
])
def test_bad_pairs(write, row, fragment):
    path = write([pair("", PAPER), row])
    assert message(load_comparisons, path).startswith(f"{path}: row 2, {fragment}")


@pytest.mark.parametrize("row, fragment", [
    ({"prompt": "hi", "completion": "c", "label": False}, "label: expected none beside a "),  # KTO
    ({"prompt": "hi", "completion": None}, "completion: expected text, or messages"),
    ({"prompt": "hi", "label": 1}, "label: expected text, or messages"),
    ({"prompt": "hi", "response": "yes"}, "post: expected text, got None"),
    (pair("", PAPER), "post: expected text, got None"),  # the other kind of file
])
def test_bad_completions(write, row, fragment):
    path = write([{"prompt": PAPER, "completion": "yes"}, row])
    assert message(load_posts, path).startswith(f"{path}: row 2, {fragment}")


def test_missing_fields_say_which_there_are(write):
    for load in (load_posts, load_comparisons):
        assert "; fields: 'Post, Text'); correct" in message(load, write([{"Post": 1, "Text": 2}]))
    assert "; fields" not in message(load_posts, write([post(3)]))


def test_what_is_left_out_of_other_forms_is_counted(write, capsys):
    other = HUMAN.replace("yo", "hey")
    path = write([pair("", "hi"), {"chosen": HUMAN + "yes", "rejected": other + "no"},
                  {"prompt": "hi", "chosen": "a ", "rejected": "a"}, pair("", " \n"),
                  {"prompt": "hi", "chosen": "a", "rejected": " "},
                  {"chosen": HUMAN + "yes", "rejected": HUMAN}, comparison(), comparison(choice=1)])
    assert len(load_comparisons(path)) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(
        "read as prompt/chosen/rejected, the prompt as the text of a post: 4 rows; "
        "chosen/rejected, the prompt as the text of a post: 2 rows; our own form: 2 rows")
    assert said[1].endswith(
        "3 of 8 rows used; left out: 1 conversations that differ before the last answer, "
        "1 identical summaries, 1 empty post text, 2 empty summary")


@pytest.mark.parametrize("texts", [(" ", "a"), ("a", "\n"), ("", "")])
def test_empty_summaries_are_left_out(write, capsys, texts):
    load_comparisons(write([comparison(summaries=summaries(*texts)), comparison()]))
    assert "1 of 2 rows used; left out: 1 empty summary\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------- names of splits


@pytest.mark.parametrize("names, train, validation", [
    (("Train", "Test"), "Train", ""),
    (("train_prefs", "test_prefs"), "train_prefs", ""),
    (("train-00", "dev"), "train-00", "dev"),
    (("train", "val", "eval", "valid1", "VALIDATION", "testing"), "train",
     "val eval valid1 VALIDATION"),
    (("train_sft", "train_prefs", "train_gen", "valid_sft", "valid_prefs"), "train_{}", "valid_{}"),
])
def test_names_of_splits(write, names, train, validation):
    rows = [(load_posts, "sft", [post(name, split=name) for name in names]),
            (load_comparisons, "prefs", [comparison(name, split=name) for name in names])]
    for load, kind, rows in rows:
        for split, expected in (("train", train), ("validation", validation)):
            found = [row["post"] for row in load(write(rows), split)]
            found = [each["post"] if isinstance(each, dict) else each for each in found]
            assert found == expected.format(kind).split()


def test_a_split_of_another_kind_is_counted_and_no_error(write, capsys):
    rows = [post("a", split="train_sft"), {"prompt": "b", "split": "train_gen"}]
    assert len(load_posts(write(rows))) == 1
    assert "left out: 1 in a split of another kind" in capsys.readouterr().out


def test_a_row_that_names_no_split_is_not_lost_among_named_ones(write):
    text = json.dumps(post(split="train_sft")) + "\n{\n" + json.dumps(post(split="test_sft"))
    for load in (load_posts, load_comparisons):
        assert "row 2, whole row: expected JSON" in message(load, write(text))


@pytest.mark.parametrize("load", [load_posts, partial(load_both_splits, load_posts, seed=0)])
@pytest.mark.parametrize("names, said", [
    (["train_a", "train_b"], "expected one split to train on, got ['train_a', 'train_b']"),
    (["gold\n1", "test"], "expected a split named train or validation, got ['gold\\n1', 'test']"),
])
def test_splits_that_are_not_to_be_guessed_are_named(write, load, names, said):
    assert said in message(load, source=write([post(name, split=name) for name in names]))


# ---------------------------------------------------------------------------- titles


@pytest.mark.parametrize("form", ["posts", "comparisons", "prompt"])
def test_a_title_that_does_not_fit_is_named_with_its_row(write, tokenizer, form):
    title, good = 'very "long"\ttitl\u00e9 ' * 100, comparison()["info"]
    rows = {"posts": [post(), post(title=title)], "prompt": [
        {"prompt": build_prompt(info), "completion": "c"}
        for info in (good, {**good, "title": title})],
        "comparisons": [comparison(), changed(title=title)]}[form]
    load = load_comparisons if form == "comparisons" else load_posts
    path = write(rows)
    posts = [row["post"] if form == "comparisons" else row for row in load(path)]
    found = message(check_titles, posts, path, tokenizer, 512)
    assert found.startswith(f"{path}: row 2, query_length 512 is too small: title and cue of the")
    check_titles(posts[:1], path, tokenizer, 512)
    check_titles(posts, path, tokenizer, 4000)


@pytest.mark.parametrize("newlines", [1, 2])
def test_titles_are_checked_to_the_token(tokenizer, newlines):
    rows = [{"subreddit": "pets", "title": f"the cat sat {'x' * n}", "post": "p" * 500}
            for n in range(30)]
    for row in rows:
        length = len(tokenizer(build_prompt({**row, "post": ""}, "\n" * newlines))["input_ids"])
        check_titles([row], "rows.jsonl", tokenizer, length, newlines)
        with pytest.raises(DataError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tldr, "find_row", lambda source, title: "row 1")
            check_titles([row], "rows.jsonl", tokenizer, length - 1, newlines)


# ---------------------------------------------------------------------------- file formats


@pytest.mark.parametrize("encode", [
    lambda text: b"\xef\xbb\xbf" + text.encode(),                 # BOM
    lambda text: text.replace("\n", "\r\n").encode(),             # CRLF
    lambda text: ("\n \n" + text + "\n\n").encode(),              # blank lines
    lambda text: text.rstrip("\n").encode(),                      # no newline at the end
    lambda text: ("[" + ",\n".join(text.splitlines()) + "]").encode(),           # an array
    lambda text: json.dumps([json.loads(line) for line in text.splitlines()], indent=1).encode(),
], ids=["bom", "crlf", "blank", "no-end", "array", "pretty-array"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "ROWS.JSONL"])
def test_json_files(write, encode, name):
    rows = [comparison("one é\u2028\nline"), comparison("two", 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    loaded = load_comparisons(write(encode(text), name))
    assert [row["post"]["post"] for row in loaded] == ["one é\u2028\nline", "two"]


def test_line_separators_inside_a_string_do_not_end_a_line(write):
    text = json.dumps(comparison("a\u2028b\x85c"), ensure_ascii=False)
    assert load_comparisons(write(text))[0]["post"]["post"] == "a\u2028b\x85c"


def test_a_source_may_be_a_str_or_a_path(write):
    path = write([post()])
    assert load_posts(str(path)) == load_posts(Path(path))


@pytest.mark.parametrize("schema", ["list", "columns"])
def test_parquet_round_trip(write, tmp_path, schema):
    rows = [comparison("one", 0, "train"), comparison("two", 1, "valid2"), news()]
    rows[0]["extra"]["confidence"] = 4
    expected = load_comparisons(write(rows), "all")
    if schema == "columns":
        for row in rows:
            row["summaries"] = {key: [s[key] for s in row["summaries"]]
                                for key in ("text", "policy", "note")}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert load_comparisons(tmp_path / "rows.parquet", "all") == expected
    assert load_comparisons(tmp_path / "rows.parquet", "validation") == expected[1:]
    rows[1]["choice"] = 2
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bad.parquet")
    assert "bad.parquet: row 2, choice: expected 0 or 1, got 2" in message(
        load_comparisons, tmp_path / "bad.parquet")


def test_folder_of_parquet_files(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "posts" / split).mkdir(parents=True)
        datasets.Dataset.from_list([post(split)]).to_parquet(
            tmp_path / "posts" / split / "0000.parquet")
    assert [row["post"] for row in load_posts(tmp_path / "posts", "train")] == ["train"]
    assert [row["post"] for row in load_posts(tmp_path / "posts", "validation")] == ["validation"]


def test_csv_keeps_every_cell_a_text(write):
    loaded = load_posts(write('\ufeffid,subreddit,title,post,summary\r\n'
                              '1,,NA,"He said ""hi"",\nthen left.",NA\r\n'
                              '\r\n'
                              '2,123,null,007,1.50\r\n', "posts.csv"))
    assert loaded == [
        {"subreddit": "", "title": "NA", "post": 'He said "hi",\nthen left.', "summary": "NA"},
        {"subreddit": "123", "title": "null", "post": "007", "summary": "1.50"}]


@pytest.mark.parametrize("text, fragment", [
    ("subreddit,title,post,summary\na,b,\"c\nd\",e\n\na,b,c\n", "row 5, summary: expected text"),
    ("subreddit,title,post,summary\na,b,\"c\nd\",e, and f\n", "row 2, whole row: expected a value"),
    ("text;summary\na;b\n", "row 2, post: expected text, got None"),
    ("text;summary\na;b\n", "; fields: 'text, summary'); correct"),
    ("subreddit,title,post\na,b,c\n", "row 2, summary: expected text, got None"),
    ("post;summary,title\na;b,c\n", "; fields: 'post;summary, title'); correct"),
    ("Post,post,summary\na,b,c\n", "'Post,post,summary' has two columns of one name"),
    ("subreddit,title,post,summary\na,b,c,\"d\n", "unexpected end of data"),
    ("subreddit,title,post,summary\n", "0 of 0 rows"),
    ("", "0 of 0 rows"),
])
def test_bad_csv(write, text, fragment):
    found = message(load_posts, write(text, "posts.csv"))
    assert "posts.csv" in found and fragment in found


CELLS = [["Title", "post", " SUMMARY "], ["caf\u00e9; or, bar", 'a\n"b"; c,\td', "short"],
         ["", "e", "f"]]


def table(mark):
    return "".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n"
                   for row in CELLS)


@pytest.mark.parametrize("content", [
    table(",").encode(), table(";").encode("utf-8-sig"), table("|").encode(),
    ("sep=;\r\n" + table(";")).encode("utf-8-sig"), table("\t").encode("utf-16"),
    table("\t").encode(), table(";").replace("\r\n", "\r").encode(),
    (table(";").replace("\r\n", ";;\r\n") + ";;;;\r\n").encode(),  # columns and a row without text
], ids=["commas", "semicolons", "bars", "sep", "unicode text", "tabs", "old Mac", "empty cells"])
def test_tables_as_excel_saves_them(write, content):
    assert load_posts(write(content, "posts.csv")) == [
        {"subreddit": "", "title": "caf\u00e9; or, bar", "post": 'a\n"b"; c,\td',
         "summary": "short"},
        {"subreddit": "", "title": "", "post": "e", "summary": "f"}]


def test_a_line_that_names_the_delimiter_moves_no_row(write):
    assert "row 3, summary: expected text" in message(
        load_posts, write("sep=;\npost;summary\na\n", "posts.csv"))


def test_a_mark_inside_quotes_divides_no_header(write):
    text = 'post;summary;"note, or ""why"""\na, b, c, d, e, f;g;h\n'
    assert load_posts(write(text, "posts.csv"))[0]["post"] == "a, b, c, d, e, f"


def test_a_cell_of_any_length(write):
    long = "seat " * 100_000
    assert load_posts(write(f"post,summary\n{long},b\n", "p.csv"))[0]["post"] == long.strip()


def test_what_a_table_cannot_hold(write):
    assert "row 2, info: expected an object with post, title and subreddit, got '1'" in message(
        load_comparisons, write("info,choice\n1,1\n", "rows.csv"))


# ---------------------------------------------------------------------------- bad rows


def changed(**info):
    row = comparison()
    row["info"].update(info)
    return row


BAD_ROWS = {  # name: (row, what the message says)
    "choice missing": (without(comparison(), "choice"), "choice: expected 0 or 1, got None"),
    "choice null": (comparison(choice=None), "choice: expected 0 or 1, got None"),
    "choice text": (comparison(choice="1"), "choice: expected 0 or 1, got '1'"),
    "choice true": (comparison(choice=True), "choice: expected 0 or 1, got True"),
    "choice false": (comparison(choice=False), "choice: expected 0 or 1, got False"),
    "choice half": (comparison(choice=0.5), "choice: expected 0 or 1, got 0.5"),
    "choice float": (comparison(choice=1.0), "choice: expected 0 or 1, got 1.0"),
    "choice -1": (comparison(choice=-1), "choice: expected 0 or 1, got -1"),
    "choice 2": (comparison(choice=2), "choice: expected 0 or 1, got 2"),
    "choice list": (comparison(choice=[0]), "choice: expected 0 or 1, got [0]"),
    "no summaries": (without(comparison(), "summaries"), "summaries: expected two, got None"),
    "null summaries": (comparison(summaries=None), "summaries: expected two"),
    "zero summaries": (comparison(summaries=[]), "summaries: expected two"),
    "one summary": (comparison(summaries=summaries("a")), "summaries: expected two"),
    "three summaries": (comparison(summaries=summaries("a", "b", "c")), "summaries: expected two"),
    "text summaries": (comparison(summaries="ab"), "summaries: expected two, got 'ab'"),
    "list of texts": (comparison(summaries=["a", "b"]), "summaries[0]: expected an object"),
    "null text": (comparison(summaries=summaries("a", None)), "summaries[1].text: expected text"),
    "number text": (comparison(summaries=summaries(7, "b")), "summaries[0].text: expected text"),
    "no text": (without(comparison(), "summaries", 1, "text"), "summaries[1].text: expected text"),
    "number policy": (comparison(summaries=[{"text": "a", "policy": 1}, {"text": "b"}]),
                      "summaries[0].policy: expected text, got 1"),
    "columns of three": (comparison(summaries={"text": ["a", "b", "c"], "policy": ["x", "y"]}),
                         "summaries: expected two"),
    "columns, a text short": (comparison(summaries={"text": ["a"], "policy": ["x", "y"]}),
                              "summaries[1].text: expected text, got None"),
    "columns of text": (comparison(summaries={"text": "ab", "policy": "xy"}),
                        "summaries: expected two"),
    "no info": (without(comparison(), "info"), "info: expected an object"),
    "info text": (comparison(info="post"), "info: expected an object"),
    "no post": (without(comparison(), "info", "post"), "info.post: expected text, got None"),
    "null post": (changed(post=None), "info.post: expected text, got None"),
    "post list": (changed(post=["a"]), "info.post: expected text, got ['a']"),
    "title number": (changed(title=3), "info.title: expected text, got 3"),
    "half a character": (changed(post="a\ud83d"), r"info.post: expected text, got 'a\ud83d'"),
    "split number": (comparison(split=1), "split: expected text, got 1"),
    "not an object": (["a"], "whole row: expected a value per field, got ['a']"),
    "a number": (3, "whole row: expected a value per field, got 3"),
    "null row": (None, "whole row: expected a value per field, got None"),
    "news with a bad label": ({**news(), "choice": 2}, "choice: expected 0 or 1, got 2"),
}


@pytest.mark.parametrize("as_array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_comparison(write, name, as_array):
    row, fragment = BAD_ROWS[name]
    rows = [comparison(), row, comparison(choice=1)]
    path = write(json.dumps(rows) if as_array else rows)
    # Whatever the split and the limit, it is found.
    for settings in ({}, {"split": "validation"}, {"limit": 1}):
        found = message(load_comparisons, path, **settings)
        assert found.startswith(f"{path}: row 2, {fragment}"), found
        assert "correct or delete" in found


@pytest.mark.parametrize("row, fragment", [
    (without(post(), "post"), "post: expected text, got None"),
    (without(post(), "summary"), "summary: expected text, got None"),
    (post(summary=None), "summary: expected text, got None"),
    (post(summary=123), "summary: expected text, got 123"),
    (post(subreddit=["a"]), "subreddit: expected text, got ['a']"),
    (post(None), "post: expected text, got None"),
    ("post", "whole row: expected a value per field, got 'post'"),
    (comparison(), "post: expected text, got None"),  # the other kind of file
])
def test_bad_post(write, row, fragment):
    path = write([post(), row])
    assert message(load_posts, path).startswith(f"{path}: row 2, {fragment}")


@pytest.mark.parametrize("text, fragment", [
    ('{"info": \n', "row 3, whole row: expected JSON, got '{\"info\": ' (Expecting value)"),
    ("{'info': 1}", "row 3, whole row: expected JSON"),
    ("NONE", "row 3, whole row: expected JSON, got 'NONE'"),
    ("[" * 100_000, "row 3, whole row: expected JSON"),
    ('{"choice": ' + "1" * 5000 + "}", "row 3, whole row: expected JSON"),
])
def test_bad_json_lines_are_numbered_as_in_an_editor(write, text, fragment):
    assert fragment in message(load_comparisons, write(json.dumps(comparison()) + "\n\n" + text))


def test_csv_named_jsonl(write):
    assert "row 1, whole row: expected JSON, got 'id,post'" in message(
        load_posts, write("id,post\n1,a\n"))


def test_many_bad_rows_name_three_and_count_all(write):
    rows = [comparison()] * 4 + [comparison(choice=2)] * 5 + [comparison(info=None)] * 2
    assert message(load_comparisons, write(rows)).split(": ", 1)[1] == (
        "row 5, choice: expected 0 or 1, got 2; row 6, choice: expected 0 or 1, got 2; "
        "row 7, choice: expected 0 or 1, got 2 (of 11 rows 5 x choice: expected 0 or 1; "
        "2 x info: expected an object with post, title and subreddit); correct or delete them")


@pytest.mark.parametrize("value", ["a\nb\r\nc", "\u2028\u2029\x85\x0b\x1c", "x" * 100_000,
                                   {"a": "\n"}, "\x1b[31mred", "\ud83d\n"])
def test_nothing_in_a_row_breaks_or_floods_the_line(write, value):
    found = message(load_comparisons, write([comparison(choice=value)]))
    assert all(character.isprintable() for character in found)
    found = message(load_posts, write(f"{value}\n".replace("\ud83d", "?")))
    assert all(character.isprintable() for character in found)


# ---------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("content, fragment", [
    ("", "0 of 0 rows"), ("\n \n", "0 of 0 rows"), ("[]", "0 of 0 rows"),
    ([comparison(summaries=summaries("a", "a "))] * 2, "2 identical summaries"),
    ([news()], "1 CNN/DM articles"),
])
def test_no_usable_row(write, content, fragment):
    found = message(load_comparisons, write(content))
    assert "expected at least one usable row" in found and fragment in found


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_wrong_encoding_names_its_line(write, mark, name):
    data = mark + b"post,summary\na,b\n\xe9,d\n"
    assert "expected UTF-8 .csv: line 3 has the byte 0xe9" in message(
        load_posts, write(data, name)).replace(".jsonl:", ".csv:")


def test_utf_16_is_read_where_a_mark_says_so(write):
    text = json.dumps(post("é"), ensure_ascii=False) + "\r\n"
    for encoding in ("utf-16", "utf-8-sig"):
        assert load_posts(write(text.encode(encoding)))[0]["post"] == "é"
    message(load_posts, write(text.encode("utf-16-le")))
    message(load_posts, write(text.encode("utf-16")[:-1]))


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet", "none.txt",
                                  "none", "no/such/none.jsonl"])
def test_missing_file(tmp_path, name):
    assert str(tmp_path / name) in message(load_posts, tmp_path / name)


@pytest.mark.parametrize("name", ["rows.txt", "rows.tsv", "rows", "rows.jsonl.gz"])
def test_unsupported_extension(write, name):
    found = message(load_posts, write([post()], name))
    assert ".jsonl, .json, .parquet or .csv" in found


def test_folder_without_parquet_files(write, tmp_path):
    write([post()])
    assert str(tmp_path) in message(load_posts, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty" in message(load_posts, tmp_path / "empty")


def test_damaged_parquet(write):
    assert "rows.parquet: not readable" in message(load_posts, write("hello", "rows.parquet"))


# ---------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for datasets.load_dataset: hub.parts is what it returns, or raises."""
    class Hub:
        calls = []

        def load_dataset(self, *args, **form):
            self.calls = [*self.calls, (args, form)]
            if isinstance(self.parts, Exception):
                raise self.parts
            return {name: datasets.Dataset.from_list(rows) for name, rows in self.parts.items()}

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_openai_comparisons_are_read_in_the_form_that_works(hub):
    hub.parts = {"train": [comparison("a", 0), comparison("b", 1)],
                 "validation": [comparison("c", 0, "valid1"), comparison("d", 1, "valid2"), news()]}
    source = "openai/summarize_from_feedback"
    assert [r["post"]["post"] for r in load_comparisons(source)] == ["a", "b"]
    assert [r["post"]["post"] for r in load_comparisons(source, "validation")] == ["c", "d"]
    assert hub.calls[0] == ((source,), {"data_dir": "comparisons",
                                        "revision": "refs/convert/parquet"})


def test_the_row_decides_about_the_split_then_the_hub(hub):
    hub.parts = {"train": [comparison("a", 0, "valid2"), comparison("b", 1, None)],
                 "validation": [comparison("c", 0, None)]}
    assert [r["post"]["post"] for r in load_comparisons("me/mine")] == ["b"]
    assert [r["post"]["post"] for r in load_comparisons("me/mine", "validation")] == ["a", "c"]
    assert hub.calls[0] == (("me/mine",), {})


def test_posts_from_the_hub(hub):
    hub.parts = {"train": [post("a")], "valid": [post("b")], "test": [post("c")]}
    source = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
    for split, posts in {"train": ["a"], "validation": ["b"], "all": ["a", "b", "c"]}.items():
        assert [row["post"] for row in load_posts(source, split)] == posts


def test_a_bad_row_on_the_hub_names_its_split(hub):
    hub.parts = {"train": [comparison()], "validation": [comparison(), comparison(choice=2)]}
    assert "me/mine: validation row 2, choice" in message(load_comparisons, "me/mine")


def test_a_hub_error_is_one_line(hub):
    hub.parts = ConnectionError("Couldn't reach 'me/mine'\non the Hub " + "x" * 5000)
    found = message(load_posts, "me/mine")
    assert found.startswith("me/mine: not readable, ConnectionError") and "or file" in found


@pytest.mark.parametrize("source", ["data/rows.jsonl", "data/rows.csv", "./data/rows", "rows",
                                    "data/exists.txt"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(hub, source, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "exists.txt").touch()
    monkeypatch.chdir(tmp_path)
    message(load_posts, source)
    assert hub.calls == []


# ---------------------------------------------------------------------------- train and validation


def rows_of(*posts):
    return [{"post": {"post": text}, "number": i} for i, text in enumerate(posts)]


def test_divide_by_post():
    rows = rows_of(*[f"post {i % 40}" + " " * (i % 3) for i in range(200)])
    state = random.getstate()
    train, validation = divide_by_post(rows, 0.1, seed=1)
    assert random.getstate() == state
    assert {r["post"]["post"].strip() for r in train}.isdisjoint(
        r["post"]["post"].strip() for r in validation)
    assert len({r["post"]["post"].strip() for r in validation}) == 4  # a tenth of the 40 posts
    # Nothing is lost, and the order stays.
    assert sorted(r["number"] for r in train + validation) == list(range(200))
    assert train == sorted(train, key=lambda row: row["number"])
    assert divide_by_post(rows, 0.1, seed=1) == (train, validation)
    assert divide_by_post(rows, 0.1, seed=2) != (train, validation)
    # The order of the rows does not decide which posts are held out.
    backwards = divide_by_post(rows[::-1], 0.1, seed=1)
    assert backwards == (train[::-1], validation[::-1])


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.99, 1])
def test_both_sides_have_a_post(share):
    for rows in (rows_of("a", "b"), [post("a"), post("b"), post("b ")]):
        train, validation = divide_by_post(rows, share)
        assert train and validation and len(train) + len(validation) == len(rows)


@pytest.mark.parametrize("rows", [[], rows_of("a"), rows_of("a", "a\n"), [post("a")]])
def test_one_post_cannot_be_divided(rows):
    assert "different posts" in message(divide_by_post, rows)


def test_both_splits_are_those_of_the_source_which_is_read_once(write, capsys, monkeypatch):
    names = ["train", "valid1", None, "valid2", "train", "test"]
    path = write([comparison(f"post {i}", i % 2, name) for i, name in enumerate(names)])
    train, validation = load_comparisons(path, "train"), load_comparisons(path, "validation")
    said, read, checked = capsys.readouterr().out, [], []
    read_rows, check_comparison = engine_rows.read_rows, tldr.check_comparison
    monkeypatch.setattr(engine_rows, "read_rows", lambda source: (
        read.append(source) or read_rows(source)))
    monkeypatch.setattr(tldr, "check_comparison", lambda row: (
        checked.append(row) or check_comparison(row)))
    assert load_both_splits(load_comparisons, path, seed=0) == (train, validation)
    assert read == [path] and len(checked) == 6
    assert [len(train), len(validation)] == [3, 2]
    assert capsys.readouterr().out == said == (  # a line for each split, as if read twice
        f"{path}: 3 of 6 rows used; left out: 3 in another split\n"
        f"{path}: warning: every choice is 0: position alone explains them\n"
        f"{path}: 2 of 6 rows used; left out: 4 in another split\n"
        f"{path}: warning: every choice is 1: position alone explains them\n")


@pytest.mark.parametrize("name", ["train", "valid1"])
def test_a_source_with_one_split_is_divided_by_post(write, name):
    path = write([post(f"post {i % 20}", split=name) for i in range(40)])
    train, validation = load_both_splits(load_posts, path, seed=3)
    assert (train, validation) == divide_by_post(load_posts(path, "all"), seed=3)
    assert len(train) == 36 and len(validation) == 4
    found = message(load_both_splits, load_posts, write([post()], "one.jsonl"), 0)
    assert "one.jsonl: expected 2 or more different posts" in found


def test_without_posts_of():
    rows = rows_of("a", "b ", "c", "b")
    assert [r["number"] for r in without_posts_of(rows, rows_of("b", "x"))] == [0, 2]
    assert [r["number"] for r in without_posts_of(rows, [post(" a")])] == [1, 2, 3]
    assert without_posts_of(rows, []) == rows and len(rows) == 4


# ---------------------------------------------------------------------------- as a script


def test_worked_example(capsys):
    runpy.run_path(tldr.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert "'a\\nbb\\ncccc' (12 tokens) -> 'a\\nbb' (7 tokens)" in out
