"""Text to token ids, where tokenizers differ: what stands in front, at a seam, and at the end."""

import re
from functools import lru_cache


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
