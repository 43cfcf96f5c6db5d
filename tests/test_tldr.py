"""The prompt and how a long post is cut (App. B.2), step by step."""

import random
import runpy

import pytest

import tldr
from test_lm import Letters
from tldr import DataError, build_prompt, encode_prompts, truncate_post


TOKENIZER = Letters()
TOKENIZER.letters = "".join(map(chr, range(128)))  # EOS is chr(1), or a <e> that is typed


def text_of(ids):
    return TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("post, prompt", [
    ({"subreddit": "tifu", "title": "T", "post": "a\nb"},
     "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: a\nb\n\nTL;DR:"),
    ({"post": "p"}, "SUBREDDIT: r/\n\nTITLE: \n\nPOST: p\n\nTL;DR:"),
    ({"subreddit": None, "title": None, "post": "p"},
     "SUBREDDIT: r/\n\nTITLE: \n\nPOST: p\n\nTL;DR:"),
    # filled in one pass: what stands in a field is text
    ({"subreddit": "{post}", "title": "{subreddit}", "post": "{title} {} {{post}} %s {0}"},
     "SUBREDDIT: r/{post}\n\nTITLE: {subreddit}\n\nPOST: {title} {} {{post}} %s {0}\n\nTL;DR:"),
])
def test_prompt_format(post, prompt):
    assert build_prompt(post) == prompt
    assert build_prompt(post, "\n") == prompt.replace("\n\n", "\n")


@pytest.mark.parametrize("text, cut", [
    ("a\nbb\ncccc", "a\nbb"),          # checklist item 59: 12 tokens -> 7
    ("a\nb\nccc", "a\nb\nccc"),        # exactly 10 tokens: untouched
    ("a\nb\n\nccccc", "a\nb\n"),       # only the last newline goes at each step
    ("abcdefghij", "abcdefg"),         # no newline: characters from the end
    ("abcdefghij\nk\nl", "abcdefg"),   # newlines first, then characters
    ("\nabcdefghij", ""),              # an empty first line
    ("", ""),
])
def test_truncate_post(text, cut):
    assert truncate_post(text, lambda text: len(f"P:{text}T") <= 10) == cut


def test_truncate_post_when_nothing_fits():
    for text in ("a\nb", "ab", "\n", ""):
        assert truncate_post(text, lambda text: False) is None


def test_truncate_post_asks_about_the_text_itself():
    """As a tokenizer does that merges: the number of tokens jumps up and down with the length."""
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("ab \n") for _ in range(draw.randrange(40)))
        lines = text.split("\n")
        shorter = ["\n".join(lines[:n]) for n in range(len(lines), 0, -1)]
        shorter += [lines[0][:n] for n in range(len(lines[0]) - 1, -1, -1)]
        good = {each: draw.random() < .2 for each in shorter} | {"": True}
        assert truncate_post(text, good.__getitem__) == next(each for each in shorter if good[each])


def test_encode_prompts_cuts_only_the_post():
    whole = {"subreddit": "tifu", "title": "T\nU", "post": "the cat\nsat on\nmy seat"}
    frame = len(build_prompt({**whole, "post": ""}))
    for length in range(frame, frame + 25):
        long, short, again = encode_prompts([whole, {"post": "p"}, whole], TOKENIZER, length)
        post = truncate_post(whole["post"], lambda text: len(text) <= length - frame)
        assert text_of(long) == text_of(again) == build_prompt({**whole, "post": post}), (
            "only the post is cut: title and cue stay")
        assert text_of(short) == build_prompt({"post": "p"}) and len(long) <= length
    assert whole["post"] == "the cat\nsat on\nmy seat" == post, "the row itself is untouched"
    assert encode_prompts([], TOKENIZER, 9) == []


def test_query_length_too_small_names_the_setting():
    posts = [{"title": "t", "post": "p"}, {"title": "long " * 50, "post": "p"}]
    frame = build_prompt({**posts[1], "post": ""})
    with pytest.raises(DataError) as caught:
        encode_prompts(posts, TOKENIZER, 100)
    assert str(caught.value) == (
        "query_length 100 is too small: title and cue of the post 'long long long long long long ' "
        f"alone take {len(frame)} tokens; raise query_length")
    assert text_of(encode_prompts(posts, TOKENIZER, len(frame))[1]) == frame, "with no post"


def test_typed_control_tokens_stay_text():
    typed = {"subreddit": "<e>", "title": "<e>", "post": "a<e>b"}
    assert TOKENIZER.eos_token_id in TOKENIZER([build_prompt(typed)])["input_ids"][0]  # matters
    for length in (500, len(build_prompt(typed)) - 1):
        (ids,) = encode_prompts([typed], TOKENIZER, length)
        assert TOKENIZER.eos_token_id not in ids and "r/<e>\n\nTITLE: <e>" in text_of(ids)


def test_worked_example(capsys):
    runpy.run_path(tldr.__file__, run_name="__main__")
    assert "'a\\nbb\\ncccc' (12 tokens) -> 'a\\nbb' (7 tokens)" in capsys.readouterr().out
