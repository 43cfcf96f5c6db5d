"""The task of Stiennon et al. 2020: Reddit posts with their TL;DR, and comparisons of summaries.

Read beside it: section 3.2 (123,169 posts, each with the TL;DR of its author), 3.3 (64,832 pairs of
summaries of one post, and which one a labeler chose), appendix B.2 (the prompt: what a model reads
of a post, at most 512 tokens).

As published (openai/summarize_from_feedback), a comparison is a row with `info` (a post with its
title and subreddit), two `summaries` (each a text, and the policy that wrote it), and `choice`, the
index of the better one, 0 or 1. engine/rows.py reads such rows, and refuses what is none.

What is done differently, and why:
- The filters of 3.2 (subreddits, topics, references of 24 to 48 tokens) are not repeated here. The
  rows on the hub are filtered already, and rows of your own are yours to choose.
- The paper's labelers say on nine points how sure they are. Only the choice is used, as in its
  loss.
- A short prompt is padded on the left with a pad token that is masked (lm.py). The paper pads too;
  the 2020 code (openai/summarize-from-feedback) pads with spaces and lets the model read them.

`python tldr.py` prints a worked example.
"""

from lm import encode_texts


class DataError(ValueError):
    """What is wrong with data, in one line: where, which field, what was expected, what to do."""


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


def truncate_post(text, fits):
    """B.2 step by step: cut text at its last newline, until fits(text); where no newline is left,
    cut characters. Returns None when not even the empty text fits."""
    while not fits(text):
        if not text:
            return None
        text = text[: text.rindex("\n")] if "\n" in text else text[:-1]
    return text


def encode_prompts(posts, tokenizer, query_length):
    """Token ids of each post's prompt, at most query_length: only the post is cut, never title or
    cue.

    Not padded: padding on the left up to the width of a batch is lm.py's. Raises DataError where a
    prompt is too long without any post.
    """
    rows = encode_texts([build_prompt(post) for post in posts], tokenizer)
    for i, post in enumerate(posts):
        if len(rows[i]) > query_length:
            def encode(text):
                return encode_texts([build_prompt({**post, "post": text})], tokenizer)[0]

            text = truncate_post(post["post"], lambda text: len(encode(text)) <= query_length)
            if text is None:
                raise DataError(f"query_length {query_length} is too small: title and cue of the "
                                f"post {post.get('title', '')[:30]!r} alone take "
                                f"{len(encode(''))} tokens; raise query_length")
            rows[i] = encode(text)
    return rows


if __name__ == "__main__":
    print(build_prompt({"subreddit": "tifu", "title": "TIFU by baking", "post": "a\nbb"}))
    print("\nOne character = one token, prompt P:{post}T, at most 10 tokens (App. B.2):")
    text = truncate_post("a\nbb\ncccc", lambda text: len(f"P:{text}T") <= 10)
    print(f"  'a\\nbb\\ncccc' (12 tokens) -> {text!r} ({len(text) + 3} tokens)")
