"""engine/data.py: which rows are trained on and which are held out, and titles that do not fit."""

import random

import pytest
from common import byte_level
from rows_common import changed, comparison, message, post
from rows_common import no_cache_of_the_user, write  # noqa: F401 (fixtures)

from engine import data
from engine import rows as engine_rows
from engine.data import check_titles, divide_by_post, load_both_splits, without_posts_of
from engine.rows import DataError, load_comparisons, load_posts
from tldr import build_prompt

# ---------------------------------------------------------------------------- titles


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("the cat sat on my seat and I was tired", ["<|endoftext|>"], 330,
                      eos_token="<|endoftext|>")


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
            patch.setattr(data, "find_row", lambda source, title: "row 1")
            check_titles([row], "rows.jsonl", tokenizer, length - 1, newlines)


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
    read_rows, check_comparison = engine_rows.read_rows, engine_rows.check_comparison
    monkeypatch.setattr(engine_rows, "read_rows", lambda source: (
        read.append(source) or read_rows(source)))
    monkeypatch.setattr(engine_rows, "check_comparison", lambda row: (
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
