"""Reading and checking the rows of a file or a data set, whatever the rows mean.

A reader of JSON or parquet lets a lot through: a label "1" or true, half a character, a row with a
cell too many. A model then trains on it in silence. Here every row of a source is read and checked
before one is used, and what is wrong ends in one line that names the file, the row and the field.
What makes a row right is the caller's: a function `check` (schema.check_reference, for instance),
which returns what a row becomes, or a str that says why it is left out, or raises DataError
through `expect` and `get_text`.

The schema is that of the paper's data. Rows in the forms that most preference data is published in
(prompt, chosen, rejected; prompt, completion) are put into it first: `our_form` has the rules.
"""

import csv
import io
import json
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

from engine.models import from_hub
from engine.schema import check_comparison, check_reference, expect, get_text, rows_of
from engine.settings import SettingError
from tldr import DataError


# ---------------------------------------------------------------------------- other forms of a row

# A prompt of the paper (tldr.build_prompt), with one line end or two between its fields; the cue
# may be missing, as in CarperAI/openai_summarize_comparisons.
PAPER = re.compile(r"SUBREDDIT: r/(?P<subreddit>\S*)\s{1,4}TITLE:(?P<title>.*?)\n\s{0,3}"
                   r"POST:(?P<post>.*?)(?:\n\s{0,3}TL;DR:)?", re.DOTALL)
# Where the last answer of a conversation begins, in Anthropic/hh-rlhf and behind a paper's prompt.
LAST_CUE = re.compile(r"(.*)(?:\n\nAssistant:|\nTL;DR:)(.*)", re.DOTALL)


def messages(row, field):
    """row[field] as [(role, text)]: chat messages, or a text, which has no role."""
    told = rows_of(row.get(field))
    if isinstance(told, str):
        return [("", get_text(row, field))]
    expect(isinstance(told, list) and told and all(isinstance(each, dict) for each in told), field,
           "text, or messages {role, content}", told)
    return [(get_text(each, "role", f"{field}[{i}]."), get_text(each, "content", f"{field}[{i}]."))
            for i, each in enumerate(told)]


def one_text(told):
    """Messages as a text: the one there is, or several, each with its role in front."""
    return told[0][1] if len(told) == 1 else "\n\n".join(f"{role}: {text}" for role, text in told)


def our_form(row):
    """(name of the form, the row as tldr.py expects it, or a str: why it is left out).

    Our own form has the name "". The others are chosen and rejected with a prompt, or without one
    where they are whole conversations; and a prompt with its completion or label. Each of these is
    a text or chat messages. The last message is the answer, and all before it is the prompt; where
    chosen and rejected both begin with the prompt's text, it is cut off there. A prompt in the
    paper's format is taken apart into subreddit, title and post. Any other prompt is the text of a
    post, as it is, but for a cue at its end (the prompt that is built has its own); if it has
    several messages, each begins with its role.
    """
    fields = ["chosen", "rejected"] if "chosen" in row or "rejected" in row else [
        field for field in ("completion", "label") if field in row and "prompt" in row]
    if not fields or "info" in row or "post" in row:
        return "", row
    # In data for KTO the label says whether the completion beside it is a good one.
    expect("label" not in fields[1:], "label", "none beside a completion", row.get("label"))
    given = row.get("prompt") is not None
    prompt, asked, answers = one_text(messages(row, "prompt")) if given else "", [], []
    for field in fields:
        *before, (role, answer) = messages(row, field)
        expect(role in ("", "assistant"), field, "messages that end with the assistant's", role)
        before, cut = one_text(before), LAST_CUE.fullmatch(answer)
        if not before and not given:
            expect(cut, "prompt", "text, or messages", None)
            before, answer = cut.groups()
        # Messages begin with the prompt (UltraFeedback), or they follow it (TRL).
        asked.append((before if prompt in before else f"{prompt}\n\n{before}").strip())
        answers.append(answer.strip())
    if prompt and len(fields) == 2 and all(answer.startswith(prompt) for answer in answers):
        answers = [answer.removeprefix(prompt) for answer in answers]
    paper = PAPER.fullmatch(asked[0])
    name = "/".join(["prompt"] * given + fields) + (
        ", the prompt in the paper's format" if paper else ", the prompt as the text of a post")
    if asked[0] != asked[-1]:
        return name, "conversations that differ before the last answer"
    post = paper.groupdict() if paper else {"post": asked[0].removesuffix("TL;DR:")}
    # CarperAI/openai_summarize_comparisons has the cue in front of the answers.
    answers = [{"text": answer.removeprefix("TL;DR:")} for answer in answers]
    if len(fields) == 1:
        return name, {**post, "summary": answers[0]["text"]}
    return name, {"info": post, "summaries": answers, "choice": 0, "batch": row.get("batch")}


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


def read_text(path):
    """A file's text: UTF-8, with or without a byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} has the byte {error.object[error.start]:#x}, which is of "
                         "another encoding; save the file as UTF-8") from None


def read_csv(text):
    """[(line, row)], cells divided by commas, every cell a str: pandas would turn "NA" into nothing
    and "007" into 7. Capitals in the names of columns don't count."""
    csv.field_size_limit(2**31 - 1)  # characters of a cell: 131,072 unless it is set
    first = re.sub('"[^"]*"', "", re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0])
    if first.startswith("sep=") or "," not in first and re.search("[;\t|]", first):  # Excel's
        raise ValueError(f"{first!r:.100} is not divided by commas; save the file with commas")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip().lower() for name in next(filter(None, reader), [])]
    if any(header.count(name) > 1 for name in header if name):
        raise ValueError(f"{','.join(header)!r:.100} has two columns of one name")
    # line_num is where a row ends: a quoted cell may have begun lines before. Blank lines give no
    # cells. A row with more cells than the header gets a field None, which check_rows refuses.
    return [(reader.line_num - "".join(cells).count("\n"), dict(zip_longest(header, cells)))
            for cells in reader if cells]


def read_datasets(source, path, **form):
    """Yield (place, split, row) of a dataset on the hub, or of local parquet files."""
    import datasets  # here, because importing it takes a second

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own line says what is wrong
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
            rows = (read_csv if kind == ".csv" else read_json)(read_text(path))
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{source}: expected UTF-8 {kind}: {error}; check the file") from None
        return ((f"row {number}", "train", row) for number, row in rows)
    # A mistyped path must not be asked of the hub: an id is owner/name, with no file behind it.
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise DataError(f"{source}: expected a hub id (owner/name) or a .jsonl, .json, .parquet or "
                        ".csv file; check the path, or convert the file")
    return read_datasets(source, str(source), **HUB_FORMS.get(str(source), {}))


def find_row(source, text):
    """Where in source a text stands, to name the row of what is found wrong after the reading."""
    for place, _, row in read_rows(source):
        row = parse_line(row) if isinstance(row, str) else row
        if json.dumps(text)[1:-1] in json.dumps(row, default=str):
            return place


# ---------------------------------------------------------------------------- the checked rows


def split_meanings(source, names, kind):
    """{name of a split: what it is}: "train", "validation", or itself, which is in "all" only.

    Its first word says it: Train, valid1 (OpenAI chose models on it) and valid2 (and reports this
    one), train_prefs. Where that leaves train_sft and train_prefs, the kind ("sft" or "prefs")
    decides, and the others are None.
    """
    words = {name: re.match("([a-z]*)[_-]?(.*)", name.lower()).groups() for name in names}
    ends = {end for word, end in words.values() if word == "train"}
    if len(ends) > 1 and kind not in ends:
        raise DataError(f"{source}: expected one split to train on, got {str(names):.200}; save "
                        "the rows you mean as a file")
    means = {"train": "train", "valid": "validation", "validation": "validation",
             "val": "validation", "dev": "validation", "eval": "validation"}
    return {name: means.get(word, name) if len(ends) < 2 or end == kind else None
            for name, (word, end) in words.items()}


def check_rows(source, check, kind):
    """Every row of source as (split, choice, check(row)); DataError about all that are wrong."""
    checked, wrong, forms, fields = [], [], Counter(), ""
    for place, split, row in read_rows(source):
        name = choice = result = None
        try:
            # A line is parsed here, and not while reading: an error in it can name its row.
            row = parse_line(row) if isinstance(row, str) else row
            expect(isinstance(row, dict) and None not in row, "whole row", "a value per field", row)
            fields = fields or f"; fields: {', '.join(row)!r:.200}"
            name = get_text(row, "split", optional=True) or split
            form, ours = our_form(row)
            result = ours if isinstance(ours, str) else check(ours)
            choice = str(row.get("choice"))  # of comparisons in our own form only
            forms[form] += 1
        except DataError as error:
            wrong.append((name, place, *error.args))
        checked.append((name, choice, result))
    means = split_meanings(source, sorted({name for name, _, _ in checked if name}), kind)
    wrong = [found for name, *found in wrong if name is None or means[name]]
    if wrong:
        # Three places are enough to see what is wrong, and the counts whether it is all of them.
        first = "; ".join(f"{place}, {reason}, got {got}" for place, reason, got in wrong[:3])
        reasons = Counter(reason for _, reason, _ in wrong)
        counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        missing = fields if wrong[0][-1] == "None" else ""
        raise DataError(f"{source}: {first} (of {len(checked)} rows {counts}{missing}); "
                        "correct or delete them")
    if checked and not {"train", "validation"} & set(means.values()):
        raise DataError(f"{source}: expected a split named train or validation, got "
                        f"{str(list(means)):.200}; rename one")
    if forms.keys() - {""}:
        print(f"{source}: read as " + "; ".join(
            f"{form or 'our own form'}: {count} rows" for form, count in forms.items()))
    return [(means[name], choice, result if means[name] else "in a split of another kind")
            for name, choice, result in checked]


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


def checked_rows(source, split, limit, check, kind):
    """What check makes of the rows of one split ("train", "validation" or "all"), at most limit.

    Of a tuple of splits, the list of each: the source is then read and checked once for all. kind
    ("sft" or "prefs") decides between splits that are named so (split_meanings).
    Raises ValueError for another split or limit, DataError for what is wrong in the source.
    """
    splits = split if isinstance(split, tuple) else (split,)
    known = all(name in ("train", "validation", "all") for name in splits)
    if not known or limit is not None and limit < 1:
        raise ValueError(f"split {split!r} is not train, validation or all, or limit {limit!r} < 1")
    # Before split and limit: a file is right or wrong, not right for one stage only.
    checked = check_rows(source, check, kind)
    lists = [choose_rows(source, checked, name, limit) for name in splits]
    return lists if isinstance(split, tuple) else lists[0]


def load_posts(source, split="train", limit=None):
    """Section 3.2: a list of {"subreddit", "title", "post", "summary"}, the author's own TL;DR.

    source is a hub id, a .jsonl, .json, .csv or .parquet file, or a folder of parquet files. split
    is "train", "validation" or "all", or a tuple of these for a list of each; a row that names no
    split is a "train" row. The list is empty when all usable rows are in the other of the two.
    Rows of prompt and completion, or prompt and label, are read as well (engine/rows.our_form).
    Prints how many rows are used; raises DataError, in one line, if one is wrong or none usable.
    """
    return checked_rows(source, split, limit, check_reference, "sft")


def load_comparisons(source, split="train", limit=None):
    """Section 3.3: a list of {"post", "chosen", "rejected", "policies"}, the chosen policy first.

    The schema is that of openai/summarize_from_feedback, or prompt, chosen and rejected, as texts
    or chat messages (engine/rows.our_form); source and split as in load_posts.
    """
    return checked_rows(source, split, limit, check_comparison, "prefs")
