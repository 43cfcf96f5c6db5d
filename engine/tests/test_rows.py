"""engine/rows.py: every form of file and row that is read, and what a bad one says in one line.

No network is needed.
"""

import json
from functools import partial
from pathlib import Path

import datasets
import pytest
from rows_common import (changed, comparison, message, news, post, summaries, without)
from rows_common import no_cache_of_the_user, write  # noqa: F401 (fixtures)

from engine.data import load_both_splits
from engine.rows import load_comparisons, load_posts
from tldr import build_prompt

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


@pytest.mark.parametrize("text", ["\n" * 300_000 + "x", "x" * 300_000, "\nTL;DR" * 50_000])
def test_a_huge_prompt_is_taken_apart_in_one_pass(write, text):
    """With two repetitions that can share a run of white space this would take an hour."""
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
    assert load_comparisons(write("prompt,chosen,rejected\nhi,yes,no\n", "rows.csv")) == [
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


CELLS = [["Title", "post", " SUMMARY "], ["caf\u00e9; or, bar", 'a\n"b"; c,\td', "short"],
         ["", "e", "f"]]


TABLE = "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n"
                for row in CELLS)


@pytest.mark.parametrize("content", [
    TABLE.encode(), TABLE.encode("utf-8-sig"), TABLE.replace("\r\n", "\r").encode(),
    (TABLE.replace("\r\n", ",,\r\n") + ",,,,\r\n").encode(),  # columns and a row without text
], ids=["plain", "mark", "old Mac", "empty cells"])
def test_tables_as_excel_saves_them(write, content):
    assert load_posts(write(content, "posts.csv")) == [
        {"subreddit": "", "title": "caf\u00e9; or, bar", "post": 'a\n"b"; c,\td',
         "summary": "short"},
        {"subreddit": "", "title": "", "post": "e", "summary": "f"}]


def test_a_cell_of_any_length(write):
    long = "seat " * 100_000
    assert load_posts(write(f"post,summary\n{long},b\n", "p.csv"))[0]["post"] == long.strip()


# ---------------------------------------------------------------------------- bad rows


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
    "the other kind of file": (post(), "info: expected an object with post, title and subreddit"),
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


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


UNUSABLE, SOURCE = "expected at least one usable row", "expected a hub id (owner/name) or a .jsonl"
CSV = "subreddit,title,post,summary\n"
FILES_OF_COMPARISONS = [  # name of the file, content (None: there is none), what is said
    ("none.jsonl", None, "expected UTF-8 .jsonl: [Errno 2] No such file"),
    ("none.parquet", None, "not readable"), ("none.txt", None, SOURCE), ("none", None, SOURCE),
    ("rows.txt", json_lines(comparison()), SOURCE), ("rows.jsonl.gz", b"\x1f\x8b", SOURCE),
    ("rows.jsonl", b"\x1f\x8b\xff", "line 1 has the byte 0x8b"),
    ("rows.jsonl", json_lines(comparison()).encode() + b"\xe9", "line 2 has the byte 0xe9"),
    ("rows.jsonl", json_lines(comparison()).encode("utf-16-le"),
     "row 1, whole row: expected JSON, got"),
    ("rows.parquet", "PAR1", "not readable"), ("rows.parquet", "a,b\nc,d\n", "not readable, Arrow"),
    ("rows.jsonl", "", f"{UNUSABLE}, got 0 of 0 rows used"), ("rows.jsonl", "\n \n", UNUSABLE),
    ("rows.json", "[]", f"{UNUSABLE}, got 0 of 0 rows used"),
    ("rows.json", json.dumps([comparison()])[:-1], "expected UTF-8 .json: Expecting"),
    ("rows.json", json.dumps({"data": [comparison()]}), "; fields: 'data')"),
    ("rows.jsonl", json_lines(comparison(summaries=summaries("a", "a "))) * 2,
     f"{UNUSABLE}, got 0 of 2 rows used; left out: 2 identical summaries"),
    ("rows.jsonl", json_lines(news()), "1 CNN/DM articles"),
    ("rows.jsonl", "id,post\n1,a\n", "row 1, whole row: expected JSON, got 'id,post'"),
    ("rows.jsonl", json_lines(comparison()) + '\n{"info": \n',
     "row 3, whole row: expected JSON, got '{\"info\": ' (Expecting value)"),
    ("rows.jsonl", "{'info': 1}", "row 1, whole row: expected JSON"),
    ("rows.jsonl", json_lines(comparison()) + "[" * 100_000, "row 2, whole row: expected JSON"),
    ("rows.jsonl", '{"choice": ' + "1" * 5000 + "}", "row 1, whole row: expected JSON"),
    ("rows.csv", "info,choice\n1,1\n",
     "row 2, info: expected an object with post, title and subreddit, got '1'"),
    ("rows.jsonl", json_lines({"Post": 1, "Text": 2}), "; fields: 'Post, Text'); correct")]
FILES_OF_POSTS = [
    ("none.csv", None, "expected UTF-8 .csv: [Errno 2] No such file"),
    ("rows.csv", b"post,summary\na,b\n\xe9,d\n", "expected UTF-8 .csv: line 3 has the byte 0xe9"),
    ("rows.csv", b"\xef\xbb\xbfpost,summary\n\xe9,d\n", "line 2 has the byte 0xe9"),
    ("rows.csv", b"PAR1\x15\xff", "line 1 has the byte 0xff"),
    ("rows.csv", "", f"{UNUSABLE}, got 0 of 0 rows used"),
    ("rows.csv", CSV, f"{UNUSABLE}, got 0 of 0"),
    ("rows.csv", CSV + 'a,b,"c\nd",e\n\na,b,c\n', "row 5, summary: expected text"),
    ("rows.csv", CSV + 'a,b,"c\nd",e, and f\n', "row 2, whole row: expected a value"),
    ("rows.csv", CSV + 'a,b,c,"d\n', "expected UTF-8 .csv: unexpected end of data"),
    ("rows.csv", "text,summary\na,b\n", "row 2, post: expected text, got None (of 1 rows 1 x post: "
     "expected text; fields: 'text, summary'); correct"),
    *(("rows.csv", f"post{mark}summary\na{mark}b\n", "is not divided by commas; save the file with "
       "commas") for mark in ";\t|"),
    ("rows.csv", "sep=;\npost;summary\na;b\n", "'sep=;' is not divided by commas"),
    ("rows.csv", '"post";"summary"\n"a";"b"\n', "is not divided by commas; save the file with"),
    ("rows.csv", "post,summary\na,b\n".encode("utf-16"), "line 1 has the byte 0xff, which is of "
     "another encoding; save the file as UTF-8"),
    ("rows.csv", "subreddit,title,post\na,b,c\n", "row 2, summary: expected text, got None"),
    ("rows.csv", "post;summary,title\na;b,c\n", "; fields: 'post;summary, title'); correct"),
    ("rows.csv", "Post,post,summary\na,b,c\n", "'post,post,summary' has two columns of one name"),
    ("rows.jsonl", json_lines(post(" "), post(summary="\n")),
     f"{UNUSABLE}, got 0 of 2 rows used; left out: 1 empty post text, 1 empty reference summary"),
    ("rows.jsonl", json_lines({"Post": 1, "Text": 2}), "; fields: 'Post, Text'); correct")]


@pytest.mark.parametrize("load, name, content, said", [
    (load, *row) for load, rows in ((load_comparisons, FILES_OF_COMPARISONS),
                                    (load_posts, FILES_OF_POSTS)) for row in rows])
def test_a_bad_file_is_named(write, tmp_path, load, name, content, said):
    path = tmp_path / name if content is None else write(content, name)
    found = message(load, path)
    assert found.startswith(f"{path}: ") and said in found, found


def test_no_fields_are_named_where_the_one_that_is_wrong_is_there(write):
    assert "; fields" not in message(load_posts, write([post(3)]))


def test_folder_without_parquet_files(write, tmp_path):
    write([post()])
    assert str(tmp_path) in message(load_posts, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty: " in message(load_posts, tmp_path / "empty")


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
