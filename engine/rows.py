"""Reading and checking the rows of a file or a data set, whatever the rows mean.

A reader of JSON or parquet lets a lot through: a label "1" or true, half a character, a row with a
cell too many. A model then trains on it in silence. Here every row of a source is read and checked
before one is used, and what is wrong ends in one line that names the file, the row and the field.
What makes a row right is the caller's: a function `check` (tldr.check_reference, for instance),
which returns what a row becomes, or a str that says why it is left out, or raises DataError
through `expect` and `get_text`.
"""

import csv
import json
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

from engine.models import from_hub
from engine.settings import SettingError


class DataError(ValueError):
    """One line: the file, the row, the field, what was expected, what to do."""


# ---------------------------------------------------------------------------- one field


def expect(condition, field, expected, value):
    """Raise DataError(reason, what was there) unless condition; check_rows adds file and row."""
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


# ---------------------------------------------------------------------------- one source


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
    # line_num is where a row ends: a quoted cell may have begun lines before. Blank lines give no
    # cells. A row with more cells than the header gets a field None, which check_rows refuses.
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
    # A mistyped path must not be asked of the hub: an id is owner/name, with no file behind it.
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise DataError(f"{source}: expected a hub id (owner/name) or a .jsonl, .json, .parquet or "
                        ".csv file; check the path, or convert the file")
    return read_datasets(source, str(source), **HUB_FORMS.get(str(source), {}))


# ---------------------------------------------------------------------------- the checked rows


def check_rows(source, check):
    """Every row of source as (split, choice, check(row)); DataError about all that are wrong."""
    checked, wrong = [], []
    for place, split, row in read_rows(source):
        try:
            # A line is parsed here, and not while reading: an error in it can name its row.
            row = parse_line(row) if isinstance(row, str) else row
            expect(isinstance(row, dict) and None not in row, "whole row", "a value per field", row)
            result = check(row)
            split = get_text(row, "split", optional=True) or split
        except DataError as error:
            wrong.append((place, *error.args))
            continue
        # OpenAI chose models on valid1 and reports valid2. Any other name is in "all" only.
        split = "validation" if split in ("valid", "valid1", "valid2") else split
        checked.append((split, str(row.get("choice")), result))  # choice: of comparisons only
    if wrong:
        # Three places are enough to see what is wrong, and the counts whether it is all of them.
        first = "; ".join(f"{place}, {reason}, got {got}" for place, reason, got in wrong[:3])
        reasons = Counter(reason for _, reason, _ in wrong)
        counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise DataError(f"{source}: {first} (of {len(checked) + len(wrong)} rows {counts}); "
                        "correct or delete them")
    return checked


def choose_rows(source, checked, split, limit):
    """Those of one split; prints how many are used and why the others are not."""
    used, choices, left_out = [], set(), Counter()
    for row_split, choice, result in checked:
        if isinstance(result, str):
            left_out[result] += 1
        elif split not in ("all", row_split):
            left_out["in another split"] += 1
        else:
            used.append(result)
            choices.add(choice)
    left_out["beyond the limit"] = len(used) - len(used[:limit])
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    summary = f"{len(used[:limit])} of {len(checked)} rows used"
    summary += reasons and f"; left out: {reasons}"
    if not used and not left_out["in another split"]:
        raise DataError(f"{source}: expected at least one usable row, got {summary}; add rows")
    print(f"{source}: {summary}")
    # Both orders should occur, or a reward model could be right without reading a word.
    if len(used) > 1 and choices in ({"0"}, {"1"}):
        print(f"{source}: warning: every choice is {choices.pop()}: position alone explains them")
    return used[:limit]


def checked_rows(source, split, limit, check):
    """What check makes of the rows of one split ("train", "validation" or "all"), at most limit.

    Of a tuple of splits, the list of each: the source is then read and checked once for all.
    Raises ValueError for another split or limit, DataError for what is wrong in the source.
    """
    splits = split if isinstance(split, tuple) else (split,)
    known = all(name in ("train", "validation", "all") for name in splits)
    if not known or limit is not None and limit < 1:
        raise ValueError(f"split {split!r} is not train, validation or all, or limit {limit!r} < 1")
    # Before split and limit: a file is right or wrong, not right for one stage only.
    checked = check_rows(source, check)
    lists = [choose_rows(source, checked, name, limit) for name in splits]
    return lists if isinstance(split, tuple) else lists[0]
