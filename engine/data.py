"""What a run reads: posts and comparisons to train on, and held out, no post on both sides."""

import random

from engine.rows import DataError, find_row, load_comparisons, load_posts
from engine.texts import encode_prompt
from tldr import build_prompt


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
