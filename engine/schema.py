"""The schema of a row: what the paper's data holds, and what is wrong with a row that does not.

`check_reference` and `check_comparison` make of a row what the loop reads, or say why it is left
out; engine/rows.py reads the files, and adds file and row to what is wrong.
"""

import re
from itertools import zip_longest

from tldr import DataError


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


def rows_of(value):
    """A list of objects as it is, and columns {"text": [a, b], ...} as [{"text": a}, {"text": b}]:
    `datasets` returns either. A column that is no list (null, say) is as good as missing."""
    if not isinstance(value, dict):
        return value
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    return [dict(zip(columns, cells)) for cells in zip_longest(*columns.values())]


# ---------------------------------------------------------------------------- one row


def get_post(row, inside=""):
    """{"subreddit", "title", "post"}; subreddit and title are "" where null or missing."""
    return {f: get_text(row, f, inside, f != "post") for f in ("subreddit", "title", "post")}


def check_reference(row):
    """A row of posts -> what load_posts returns, or a str: why it is left out.

    Raises DataError (engine/rows.py adds the row's number) for a field that is not as expected.
    """
    post = {**get_post(row), "summary": get_text(row, "summary")}
    if not post["post"]:
        return "empty post text"
    return post if post["summary"] else "empty reference summary"


def check_comparison(row):
    """A row of comparisons -> what load_comparisons returns, or a str: why it is left out.

    The schema: info {post, title, subreddit}, two summaries {text, policy} (a list of two, or
    columns of two), choice 0 or 1 (the index of the better one), split. Left out are pairs with
    nothing to choose: an empty summary, or twice the same. Raises DataError as check_reference.
    """
    info, summaries, choice = row.get("info"), rows_of(row.get("summaries")), row.get("choice")
    expect(isinstance(info, dict), "info", "an object with post, title and subreddit", info)
    expect(isinstance(summaries, list) and len(summaries) == 2, "summaries", "two", summaries)
    texts, policies = [], []
    for inside, summary in zip(("summaries[0]", "summaries[1]"), summaries):
        expect(isinstance(summary, dict), inside, "an object with text and policy", summary)
        texts.append(get_text(summary, "text", inside + "."))
        policies.append(get_text(summary, "policy", inside + ".", optional=True))
    # In Python True is 1, and -1 is an index: both would pass for a label.
    expect(type(choice) is int and choice in (0, 1), "choice", "0 or 1", choice)
    # The validation rows also hold news, an article and no post: section 4.2, where the models
    # are tried on CNN/DM. Their batches are batch0_cnndm, cnndm0 and cnndm2.
    if "cnndm" in str(row.get("batch")) or info.get("post") is None and info.get("article"):
        return "CNN/DM articles"
    post = get_post(info, "info.")
    if not post["post"]:
        return "empty post text"
    # Nothing to read: an empty one tells a reward model of nothing but its length.
    if not all(texts):
        return "empty summary"
    # No preference to learn: the loss of such a pair is log 2, whatever the reward model says.
    if texts[0] == texts[1]:
        return "identical summaries"
    # Not used: the labeler's confidence ("extra"). The paper's loss has none either (section 3.4).
    return {"post": post, "chosen": texts[choice], "rejected": texts[1 - choice],
            "policies": [policies[choice], policies[1 - choice]]}
