"""Text to token ids, where tokenizers differ: what stands in front, at a seam, and at the end."""

import bisect
import re
from functools import lru_cache

import tldr
from tldr import DataError, build_prompt


@lru_cache(maxsize=8)
def typed_words(tokenizer):
    """Pattern of the tokens that are found in a text although somebody typed them: added ones that
    do not count as special, like "<think>". Not those of white space, which are no control words.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = [token.content for token in added
             if not token.special and len(token.content.strip()) > 1]
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def text_ids(tokenizer, texts):
    """Token ids of each text, nothing added, and all of it text: a typed "<|endoftext|>" ends
    nothing and a typed "<think>" starts nothing."""
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True,
                     verbose=False)["input_ids"] if texts else []
    typed = typed_words(tokenizer)
    for i, text in enumerate(texts):
        cuts = [word.start() + 1 for word in typed.finditer(text)]  # within the word: it isn't one
        if cuts:
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None])]
            rows[i] = sum(text_ids(tokenizer, pieces), [])
    return rows


def ids_after(tokenizer, before, texts, encode=text_ids):
    """Token ids of each text as it stands right after the text `before`. Alone they can be others:
    SentencePiece puts a space in front of a text."""
    start, *rows = encode(tokenizer, [before, *(before + text for text in texts)])
    for i, text in enumerate(texts):
        if rows[i][: len(start)] == start:
            rows[i] = rows[i][len(start) :]
        else:  # a token of this tokenizer reaches over the seam
            (rows[i],) = encode(tokenizer, [text])
    return rows


def control_ids(tokenizer, texts):
    """Token ids of each text, in which "<|im_end|>" and the like are control tokens."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def front_ids(tokenizer):
    """What the tokenizer puts in front of a text by default: nothing (GPT-2, Pythia, Qwen), or the
    BOS that Llama, Gemma, Mistral and OPT have never read a text without."""
    (first,), whole = control_ids(tokenizer, ["a"])[0][:1], tokenizer("a")["input_ids"]
    return whole[: whole.index(first)]


def end_ids(tokenizer):
    """The ids that end a text: EOS, and what else the model's generation config names (a chat model
    ends with "<|im_end|>" as well). load_language_model puts them together."""
    return getattr(tokenizer, "end_ids", None) or [tokenizer.eos_token_id]


def encode_responses(summaries, tokenizer, limit):
    """Summaries -> token ids with a leading space and EOS at the end, as in the 2020 code. One that
    is longer than `limit` is cut there and has no EOS, as if it had never ended."""
    rows = ids_after(tokenizer, "TL;DR:", [" " + text for text in summaries])  # as in a prompt (B.2)
    return [(ids + [tokenizer.eos_token_id])[:limit] for ids in rows]


def decode_response(ids, tokenizer):
    """Token ids up to the first EOS -> text without outer white space.

    A text no longer says whether it ended. So a summary that was cut at max_new_tokens is judged,
    and scored outside PPO, as if it had: people, too, were shown a text.
    """
    ends = [i for i, token in enumerate(ids) if token in end_ids(tokenizer)]
    kept = ids[: ends[0]] if ends else ids
    return tokenizer.decode(kept, clean_up_tokenization_spaces=False).strip()


# A longer text can have fewer tokens: "appl" may be two and "apple" one. So cuts this many
# characters beyond the first text that is too long are tried as well: few tokens are longer, and
# those few are runs of spaces or dashes.
BEYOND = 64


def truncate_post(text, fits):
    """tldr.truncate_post, but only where it matters, near the end of what fits: fits is never asked
    about many more than twice as many characters as fit, so a post of megabytes costs no more than
    another one."""
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
    if len(kept) == len(text):
        return tldr.truncate_post(text, fits)
    # First cut, then ask: the end of kept is no place where the paper would cut.
    cut = kept[: kept.rindex("\n")] if "\n" in kept else kept[:-1]
    return tldr.truncate_post(cut, fits)


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
