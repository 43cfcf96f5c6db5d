"""The task of Stiennon et al. 2020: Reddit posts with their TL;DR, and comparisons of summaries.

The prompt (App. B.2), the posts (section 3.2) and the human comparisons (section 3.3), from the
Hugging Face hub or a local file. Every row is checked: a wrong label or a missing text is an error
of one line, where a JSON reader alone lets it through and the model trains on it in silence.
"""

import bisect
import csv
import json
import random
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

from run import SettingError, from_hub


class DataError(ValueError):
    """One line: the file, the row, the field, what was expected, what to do."""


# ---------------------------------------------------------------------------- the prompt, App. B.2


def build_prompt(post, gap="\n\n"):
    """{"subreddit", "title", "post"} -> the paper's format; a missing subreddit or title is "".
    Some models were trained with another gap between the fields: CarperAI's with "\\n"."""
    # Filled in one pass, so braces in a post stay text. The summary follows as " " + summary.
    subreddit, title = post.get("subreddit") or "", post.get("title") or ""
    return gap.join([f"SUBREDDIT: r/{subreddit}", f"TITLE: {title}", f"POST: {post['post']}",
                     "TL;DR:"])


def truncate_post(text, fits):
    """Cut text back at its last newline until fits(text); when no newline is left, cut characters.

    None when not even the empty text fits. The result is that of cutting step by step, but
    bisection finds the neighbourhood first: a post of 10,000 words takes milliseconds.
    """
    if fits(text):
        return text
    # Where a cut may end, short to long: each character of the first line, then each newline.
    ends = [*range(len(text.split("\n")[0])), *(m.start() for m in re.finditer("\n", text))]
    start = bisect.bisect_left(ends, True, key=lambda end: not fits(text[:end]))
    # A longer text can have fewer tokens ("appl" 2, "apple" 1): look a little beyond as well.
    cuts = (text[:end] for end in reversed(ends[: start + 32]))
    return next(filter(fits, cuts), None)


def encode_prompt(post, tokenizer, query_length, gap="\n\n"):
    """Token ids of the prompt, at most query_length: only the post is cut, never title or cue."""

    def encode(text):
        # split_special_tokens: a typed "<|endoftext|>" is text, not the token that ends a summary.
        # Nothing is added in front or behind; verbose=False: long is no problem, it will be cut.
        return tokenizer(build_prompt({**post, "post": text}, gap), add_special_tokens=False,
                         split_special_tokens=True, verbose=False)["input_ids"]

    text = truncate_post(post["post"], lambda text: len(encode(text)) <= query_length)
    if text is None:
        raise DataError(f"query_length {query_length} is too small: title and cue of the post "
                        f"{post.get('title', '')[:30]!r} alone take {len(encode(''))} tokens; "
                        "raise query_length, or shorten that title")
    return encode(text)


def encode_prompts(posts, tokenizer, query_length, newlines=2):
    """encode_prompt for many posts: all at once, which is faster, then those that must be cut."""
    gap = "\n" * newlines
    rows = tokenizer([build_prompt(post, gap) for post in posts], add_special_tokens=False,
                     split_special_tokens=True, verbose=False)["input_ids"] if posts else []
    return [ids if len(ids) <= query_length else encode_prompt(post, tokenizer, query_length, gap)
            for post, ids in zip(posts, rows)]


# ---------------------------------------------------------------------------- checking one row


def expect(condition, field, expected, value):
    """Raise DataError(reason, what was there) unless condition; load_rows adds file and row."""
    if not condition:
        # repr keeps whatever a row holds on one line; None stands for null and for missing.
        raise DataError(f"{field}: expected {expected}", repr(value)[:40])


def get_text(row, field, inside="", optional=False):
    """row[field] without outer white space; null or missing is "" where optional."""
    value = "" if optional and row.get(field) is None else row.get(field)
    # Half of a surrogate pair (JSON "\ud83d") is no character: tokenizers stop at it.
    expect(isinstance(value, str) and not re.search("[\ud800-\udfff]", value),
           inside + field, "text", value)
    return value.strip()


def get_post(row, inside=""):
    """{"subreddit", "title", "post"}; subreddit and title are "" where null or missing."""
    return {f: get_text(row, f, inside, f != "post") for f in ("subreddit", "title", "post")}


def check_reference(row):
    """A row of posts -> what load_posts returns, or a str: why it is left out."""
    post = {**get_post(row), "summary": get_text(row, "summary")}
    if not post["post"]:
        return "empty post text"
    return post if post["summary"] else "empty reference summary"


def check_comparison(row):
    """A row of comparisons -> what load_comparisons returns, or a str: why it is left out."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    expect(isinstance(info, dict), "info", "an object with post, title and subreddit", info)
    if isinstance(summaries, dict):  # columns {"text": [a, b], ...}, as `datasets` 3 returns them
        columns = {name: cells for name, cells in summaries.items() if isinstance(cells, list)}
        summaries = [dict(zip(columns, cells)) for cells in zip_longest(*columns.values())]
    expect(isinstance(summaries, list) and len(summaries) == 2, "summaries", "two", summaries)
    texts, policies = [], []
    for inside, summary in zip(("summaries[0]", "summaries[1]"), summaries):
        expect(isinstance(summary, dict), inside, "an object with text and policy", summary)
        texts.append(get_text(summary, "text", inside + "."))
        policies.append(get_text(summary, "policy", inside + ".", optional=True))
    # In Python True is 1, and -1 is an index: both would pass for a label.
    expect(type(choice) is int and choice in (0, 1), "choice", "0 or 1", choice)
    # The validation rows also hold news, an article and no post: the paper's section 4.2.
    # Their batches are batch0_cnndm, cnndm0 and cnndm2.
    if "cnndm" in str(row.get("batch")) or info.get("post") is None and info.get("article"):
        return "CNN/DM articles"
    post = get_post(info, "info.")
    if not post["post"]:
        return "empty post text"
    if texts[0] == texts[1]:  # no preference to learn
        return "identical summaries"
    return {"post": post, "chosen": texts[choice], "rejected": texts[1 - choice],
            "policies": [policies[choice], policies[1 - choice]]}


# ---------------------------------------------------------------------------- reading a source


def parse_line(text):
    """The JSON value in a line of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("whole row: expected JSON", f"{text[:40]!r} ({str(error).split(':')[0]})")


def read_json(text):
    """[(number, row)]: one JSON array, by position, or JSON lines, by line and still as text."""
    if text.lstrip().startswith("["):
        return list(enumerate(json.loads(text), 1))
    # Not splitlines(): a JSON string may hold U+2028, which splitlines() takes for a line end.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_csv(file):
    """[(line, row)], every cell a str: pandas would turn "NA" into nothing and "007" into 7."""
    reader = csv.reader(file, strict=True)
    header = next(reader, [])
    # A row with more cells than the header gets a field None. Blank lines give no cells.
    return [(reader.line_num - "".join(cells).count("\n"), dict(zip_longest(header, cells)))
            for cells in reader if cells]


def read_datasets(source, path, **form):
    """Yield (place, split, row) of a dataset on the hub, or of local parquet files."""
    import datasets  # here, because importing it takes a second

    try:
        parts = from_hub(datasets.load_dataset, source, path, **form)
    except SettingError as error:
        raise DataError(str(error)) from None
    for split, rows in parts.items():
        for number, row in enumerate(rows, 1):
            yield f"{split} row {number}" if len(parts) > 1 else f"row {number}", split, row


# On its main branch is a loading script, which `datasets` 4 refuses; the same rows are here.
HUB_FORMS = {"openai/summarize_from_feedback":
             {"data_dir": "comparisons", "revision": "refs/convert/parquet"}}


def read_rows(source):
    """(place, split, row) of every row: hub id, local file, or local folder of parquet files."""
    path, kind = Path(source), Path(source).suffix.lower()
    if path.is_dir() or kind == ".parquet":
        form = {"data_dir" if path.is_dir() else "data_files": str(path)}
        return read_datasets(source, "parquet", **form)
    if kind in (".jsonl", ".json", ".csv"):
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:  # with or without a BOM
                rows = read_csv(file) if kind == ".csv" else read_json(file.read())
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{source}: expected UTF-8 {kind}: {error}; check the file") from None
        return ((f"row {number}", "train", row) for number, row in rows)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise DataError(f"{source}: expected a hub id (owner/name) or a .jsonl, .json, .parquet or "
                        ".csv file; check the path, or convert the file")
    return read_datasets(source, str(source), **HUB_FORMS.get(str(source), {}))


def load_rows(source, split, limit, check):
    """The checked rows of one split; prints how many are used and why the others are not."""
    if split not in ("train", "validation", "all") or limit is not None and limit < 1:
        raise ValueError(f"split {split!r} is not train, validation or all, or limit {limit!r} < 1")
    used, labels, left_out, wrong, total = [], set(), Counter(), [], 0
    for total, (place, row_split, row) in enumerate(read_rows(source), 1):
        try:
            # A line is parsed here, and not while reading: an error in it can name its row.
            row = parse_line(row) if isinstance(row, str) else row
            expect(isinstance(row, dict) and None not in row, "whole row", "a value per field", row)
            # Before split and limit: a file is right or wrong, not right for one stage only.
            result = check(row)
            row_split = get_text(row, "split", optional=True) or row_split
            # OpenAI chose models on valid1 and reports valid2. Any other name is in "all" only.
            row_split = "validation" if row_split in ("valid", "valid1", "valid2") else row_split
            if isinstance(result, str):
                left_out[result] += 1
            elif split not in ("all", row_split):
                left_out["in another split"] += 1
            else:
                used.append(result)
                labels.add(str(row.get("choice")))
        except DataError as error:
            wrong.append((place, *error.args))
    if wrong:
        first = "; ".join(f"{place}, {reason}, got {got}" for place, reason, got in wrong[:3])
        counts = "; ".join(f"{n} x {reason}" for reason, n in Counter(w[1] for w in wrong).items())
        raise DataError(f"{source}: {first} (of {total} rows {counts}); correct or delete them")
    left_out["beyond the limit"] = len(used) - len(used[:limit])
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    summary = f"{len(used[:limit])} of {total} rows used" + (reasons and f"; left out: {reasons}")
    if not used and not left_out["in another split"]:
        raise DataError(f"{source}: expected at least one usable row, got {summary}; add rows")
    print(f"{source}: {summary}")
    # Both orders should occur, or a reward model could be right without reading a word.
    if len(used) > 1 and labels in ({"0"}, {"1"}):
        print(f"{source}: warning: every choice is {labels.pop()}: position alone explains them")
    return used[:limit]


def load_posts(source, split="train", limit=None):
    """Section 3.2: a list of {"subreddit", "title", "post", "summary"}, the author's own TL;DR.

    split is "train", "validation" or "all"; a row that names no split is a "train" row. The list
    is empty when all usable rows are in another split.
    """
    return load_rows(source, split, limit, check_reference)


def load_comparisons(source, split="train", limit=None):
    """Section 3.3: a list of {"post", "chosen", "rejected", "policies"}, the chosen policy first.

    The schema is that of openai/summarize_from_feedback; split as in load_posts.
    """
    if Path(source).suffix.lower() == ".csv":
        raise DataError(f"{source}: .csv cannot hold comparisons (nested); use .jsonl or .parquet")
    return load_rows(source, split, limit, check_comparison)


# ---------------------------------------------------------------------------- train and validation


def post_text(row):
    """What makes two rows the same post: many comparisons share one, even with opposite labels."""
    return (row["post"]["post"] if isinstance(row["post"], dict) else row["post"]).strip()


def divide_by_post(rows, validation_share=0.1, seed=0, source="rows"):
    """(train, validation) with no post in both, or accuracy would be measured on known posts."""
    posts = sorted({post_text(row) for row in rows})  # sorted: a set has another order every run
    if len(posts) < 2:
        raise DataError(f"{source}: expected 2 or more different posts, got {len(posts)}: add some")
    # A share of the posts, at least one on each side.
    count = min(max(round(validation_share * len(posts)), 1), len(posts) - 1)
    # A generator of its own: the global random state stays as it was.
    held_out = set(random.Random(seed).sample(posts, count))
    return ([row for row in rows if post_text(row) not in held_out],
            [row for row in rows if post_text(row) in held_out])


def without_posts_of(rows, others):
    """The rows whose post does not occur in others, where a source names its own splits."""
    seen = {post_text(row) for row in others}
    return [row for row in rows if post_text(row) not in seen]


if __name__ == "__main__":
    print(build_prompt({"subreddit": "tifu", "title": "TIFU by baking", "post": "a\nbb"}))
    print("\nOne character = one token, prompt P:{post}T, at most 10 tokens (App. B.2):")
    text = truncate_post("a\nbb\ncccc", lambda text: len(f"P:{text}T") <= 10)
    print(f"  'a\\nbb\\ncccc' (12 tokens) -> {text!r} ({len(text) + 3} tokens)")
