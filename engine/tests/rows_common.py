"""Rows in the schema of openai/summarize_from_feedback, composed here, and files that hold them."""

import copy
import json

import datasets
import pytest

from engine.rows import DataError


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


def changed(**info):
    row = comparison()
    row["info"].update(info)
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
