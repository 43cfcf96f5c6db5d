"""The task of Stiennon et al. 2020: Reddit posts with their TL;DR, and comparisons of summaries.

Read beside it: section 3.2 (the posts), 3.3 (the human comparisons), appendix B.2 (the prompt).

    3.2  load_posts        123,169 posts, each with the TL;DR of its author: the reference
    3.3  load_comparisons  64,832 pairs of summaries of one post, and which one a labeler chose
    B.2  encode_prompt     the post as the model reads it, at most 512 tokens

About 5 % of the posts are held out. The paper does not print how many: the counts of its Table 2
add up to 116,722 posts to train on, which leaves 6,447.

What is done differently, and why:
- The filters of 3.2 (subreddits, topics, references of 24 to 48 tokens) are not repeated here. The
  rows on the hub are filtered already, and rows of your own are yours to choose.
- The paper draws PPO's prompts from 287,790 posts, whether they have a good reference or not. Here
  they are the posts of the SFT data, as in N+ (Huang et al. 2024, arXiv 2403.17031).
- The paper's labelers say on nine points how sure they are. Only the choice is used, as in its
  loss.
- A short prompt is padded on the left with a pad token that is masked (lm.py). The paper pads too;
  the 2020 code (openai/summarize-from-feedback) pads with spaces and lets the model read them.
- Many comparisons share one post, so rows are divided by post wherever this file divides them.

Every row is checked. A wrong label or a missing text is an error of one line (engine/rows.py reads
the files), where a JSON reader alone lets it through and the model trains on it in silence.
"""

import bisect
import random

from engine.rows import DataError, checked_rows, expect, find_row, get_text, rows_of
from engine.texts import front_ids, text_ids
from lm import encode_responses

# ---------------------------------------------------------------------------- the prompt, App. B.2


def build_prompt(post, gap="\n\n"):
    """{"subreddit", "title", "post"} -> the paper's format; a missing subreddit or title is "".

    Table 4 shows the fields; the line ends between them are those of the 2020 code. Some models
    were trained with another gap: CarperAI's with one "\\n".
    """
    # Filled in one pass, so braces in a post stay text. No space follows the cue: the summary does
    # as " " + summary, because in GPT-2's vocabulary a word and the space before it are one token.
    subreddit, title = post.get("subreddit") or "", post.get("title") or ""
    return gap.join([f"SUBREDDIT: r/{subreddit}", f"TITLE: {title}", f"POST: {post['post']}",
                     "TL;DR:"])


# A longer text can have fewer tokens: "appl" may be two and "apple" one. So cuts this many
# characters beyond the first text that is too long are tried as well: few tokens are longer, and
# those few are runs of spaces or dashes.
BEYOND = 64


def truncate_post(text, fits):
    """Cut text back at its last newline until fits(text); when no newline is left, cut characters.

    That is App. B.2 step by step, but only where it matters, near the end of what fits. fits is
    never asked about many more than twice as many characters as fit, so a post of megabytes costs
    no more than another one. Returns None when not even the empty text fits.
    """
    if not fits(""):
        return None
    # Twice as many characters each time, until there are too many or all of them, ...
    size = 1
    while size < len(text) and fits(text[:size]):
        size *= 2
    # ... then bisection: the smallest number of characters that is too many.
    too_many = bisect.bisect_left(range(min(size, len(text))), True, lo=size // 2,
                                  key=lambda length: not fits(text[:length]))
    kept = text[: too_many + BEYOND + 1]
    if kept == text and fits(text):
        return text
    # The paper's steps. First cut, then ask: the end of kept, unless it is that of the whole text,
    # is no place where the paper would cut.
    while kept:
        kept = kept[: kept.rindex("\n")] if "\n" in kept else kept[:-1]
        if fits(kept):
            break
    return kept


def encode_prompt(post, tokenizer, query_length, gap="\n\n"):
    """Token ids of the prompt, at most query_length: only the post is cut, never title or cue.

    Not padded: padding on the left up to the width of a batch is lm.py's. Raises DataError if the
    prompt is too long without any post.
    """
    front = front_ids(tokenizer)

    def encode(text):
        # What the tokenizer puts in front of every text (Llama's BOS; nothing for GPT-2) counts
        (ids,) = text_ids(tokenizer, [build_prompt({**post, "post": text}, gap)])
        return front + ids

    text = truncate_post(post["post"], lambda text: len(encode(text)) <= query_length)
    if text is None:
        raise DataError(f"query_length {query_length} is too small: title and cue of the post "
                        f"{post.get('title', '')[:30]!r} alone take {len(encode(''))} tokens; "
                        "raise query_length, or shorten that title")
    return encode(text)


def encode_prompts(posts, tokenizer, query_length, newlines=2):
    """encode_prompt for many posts: all at once, which is faster, then those that must be cut."""
    gap = "\n" * newlines
    # A token of English has about four characters. A post far longer than query_length tokens is
    # not read to its end here only to be cut: encode_prompt looks at no more of it than it needs.
    most = 32 * query_length
    rows = text_ids(tokenizer, [build_prompt({**post, "post": post["post"][:most]}, gap)
                                for post in posts])
    front = front_ids(tokenizer)
    return [front + ids
            if len(post["post"]) <= most and len(front) + len(ids) <= query_length
            else encode_prompt(post, tokenizer, query_length, gap)
            for post, ids in zip(posts, rows)]


def check_titles(rows, source, tokenizer, query_length, newlines=2):
    """Raise DataError, with its row, for a post of source whose title leaves no room for a cue.

    For before any work: the prompts of a stage are encoded when it begins, and that may be hours
    after the start.
    """
    posts = map(post_of, rows)
    for post in {(post["subreddit"], post["title"]): post for post in posts}.values():
        empty = {**post, "post": ""}
        # A token stands for at least a byte of the text: hardly any title is asked about.
        if len(build_prompt(empty).encode()) + 8 > query_length:  # 8: tokens in front, if any
            try:
                encode_prompt(empty, tokenizer, query_length, "\n" * newlines)
            except DataError as error:
                raise DataError(f"{source}: {find_row(source, post['title'])}, {error}") from None


def encode(posts, summaries, tokenizer, settings):
    """Posts and summaries as token ids: queries and responses."""
    return (encode_prompts(posts, tokenizer, settings.query_length, settings.prompt_newlines),
            encode_responses(summaries, tokenizer, settings.summary_length))


def encode_pairs(comparisons, tokenizer, settings):
    """Comparisons -> [(query, chosen, rejected)] as token ids; pairs that are equal once cut to
    summary_length are left out and counted. Returns the rows that were kept, too."""
    queries, chosen = encode([row["post"] for row in comparisons],
                             [row["chosen"] for row in comparisons], tokenizer, settings)
    _, rejected = encode([], [row["rejected"] for row in comparisons], tokenizer, settings)
    kept = [i for i in range(len(comparisons)) if chosen[i] != rejected[i]]
    if len(kept) < len(comparisons):
        print(f"comparisons: left out {len(comparisons) - len(kept)} of {len(comparisons)}, whose "
              f"summaries are identical in their first {settings.summary_length} tokens")
    if not kept:
        raise DataError(f"{settings.comparisons or 'tiny world'}: no comparison left to train or "
                        "measure on; add some, or raise summary_length")
    return [(queries[i], chosen[i], rejected[i]) for i in kept], [comparisons[i] for i in kept]


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


# ---------------------------------------------------------------------------- reading a source


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


# ---------------------------------------------------------------------------- train and validation


def post_of(row):
    """The post of a comparison, many of which may share one; else the row is the post itself."""
    return row["post"] if isinstance(row["post"], dict) else row


def post_text(row):
    """What makes two rows the same post."""
    return post_of(row)["post"].strip()


def divide_by_post(rows, validation_share=0.1, seed=0, source="rows"):
    """(train, validation) with no post in both, or accuracy would be measured on known posts.

    The paper holds out about 5 % of 123,169 posts (3.2). Here it is a tenth, as of a file of a few
    hundred rows a twentieth would be too few to measure anything on.
    """
    posts = sorted({post_text(row) for row in rows})  # sorted: a set has another order every run
    if len(posts) < 2:
        raise DataError(f"{source}: expected 2 or more different posts, got {len(posts)}: add some")
    # A share of the posts, at least one on each side.
    count = min(max(round(validation_share * len(posts)), 1), len(posts) - 1)
    # A generator of its own: the global random state stays as it was.
    held_out = set(random.Random(seed).sample(posts, count))
    return ([row for row in rows if post_text(row) not in held_out],
            [row for row in rows if post_text(row) in held_out])


def load_both_splits(load, source, seed):
    """(train, validation) of load_posts or load_comparisons, from one reading of the source.

    Rows that name one split only are divided 90 : 10, by post.
    """
    train, validation = load(source, ("train", "validation"))
    if not train or not validation:
        train, validation = divide_by_post(train + validation, seed=seed, source=source)
    return train, validation


def without_posts_of(rows, others):
    """The rows whose post does not occur in others, where a source names its own splits."""
    seen = {post_text(row) for row in others}
    return [row for row in rows if post_text(row) not in seen]


def load_task(posts_source, comparisons_source, seed, most=None, measured=2000):
    """What a run reads: (posts, held out, comparisons, held out). Of posts and of comparisons to
    train on it takes the first `most`, and among the held-out comparisons `measured`.

    No post that is held out, on either side, is trained on, on either side.
    """
    posts, held_out = load_both_splits(load_posts, posts_source, seed)
    compared, compared_held_out = load_both_splits(load_comparisons, comparisons_source, seed)
    seen = held_out + compared_held_out
    n_posts, n_compared = len(posts), len(compared)
    posts, compared = without_posts_of(posts, seen), without_posts_of(compared, seen)
    print(f"data: {len(posts)} posts, {len(compared)} comparisons; held out: {len(held_out)} posts,"
          f" {len(compared_held_out)} comparisons; left out as their post is held out: "
          f"{n_posts - len(posts)} posts, {n_compared - len(compared)} comparisons")
    if not posts or not compared:
        raise DataError(f"{comparisons_source}, {posts_source}: expected posts and comparisons "
                        "whose post is not held out, got none to train on: add some")
    step = max(1, len(compared_held_out) // measured)
    return posts[:most], held_out, compared[:most], compared_held_out[::step][:measured]


if __name__ == "__main__":
    print(build_prompt({"subreddit": "tifu", "title": "TIFU by baking", "post": "a\nbb"}))
    print("\nOne character = one token, prompt P:{post}T, at most 10 tokens (App. B.2):")
    text = truncate_post("a\nbb\ncccc", lambda text: len(f"P:{text}T") <= 10)
    print(f"  'a\\nbb\\ncccc' (12 tokens) -> {text!r} ({len(text) + 3} tokens)")
