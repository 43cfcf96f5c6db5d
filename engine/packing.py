"""k summaries of a post in one row, where the model can read that."""

import torch

from engine.architectures import T, holds, most_positions, read
from lm import get_log_probs, get_position_ids

#          post  y1  y2     k summaries of one post as one row, the post computed once instead of k
#   post   ◣                times. A summary sees the post and itself, and its positions go on from
#   y1     ■     ◣          the post's end as if the others were not there: each number is that of
#   y2     ■         ◣      the plain form.


def pack(input_ids, attention_mask, position_ids, width, k, dtype=torch.float32):
    """Rows [post | y] (B, Q+T), the k of a post one after the other -> what a model takes for the
    rows [post | y_1 | ... | y_k] (B/k, Q+kT). k = 1: the plain form. width: T."""
    if k == 1:
        return {"input_ids": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids}
    real = side_by_side(attention_mask, width, k).bool()
    n_post = input_ids.shape[1] - width
    owner = torch.arange(real.shape[1], device=real.device) - n_post  # below 0: the post
    owner = torch.where(owner < 0, -1, owner.div(width, rounding_mode="floor"))
    sees = ((owner == -1) | (owner == owner[:, None])).tril() & real[:, None]
    sees |= torch.eye(len(owner), dtype=torch.bool, device=real.device)  # a softmax over nothing
    bias = torch.zeros(sees.shape, dtype=dtype, device=real.device)
    return {"input_ids": side_by_side(input_ids, width, k),
            "attention_mask": bias.masked_fill(~sees, torch.finfo(dtype).min)[:, None],
            "position_ids": side_by_side(position_ids, width, k)}


def side_by_side(x, width, k):
    """(B, Q+T) -> (B/k, Q+kT): the post of every k-th row, then the responses of k rows."""
    return torch.cat([x[::k, :-width], x[:, -width:].reshape(len(x) // k, k * width)], 1)


def unpack(x, width, k):
    """Last 1 + kT places of packed rows (B/k, 1 + kT, ...) -> (B, 1 + T, ...): the post's last
    place, which all k share, and the summary's own."""
    if k == 1:
        return x
    post, own = x[:, None, :1], x[:, 1:].unflatten(1, (k, width))  # own (B/k, k, T, ...)
    return torch.cat([post.expand(-1, k, *post.shape[2:]), own], 2).flatten(0, 1)


def packed(network, ids, mask, plain):
    """With both summaries in one row, beside each other."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = pack(ids, mask, positions, T, 2, network.dtype)
    return unpack(read(network, 1 + 2 * T, **together), T, 2), plain


def shares_post(model, k, length):
    """k, where the model can read k summaries of a post in one row; 1, where it can't. It depends
    on what rows are as long as: a window of attention that nothing leaves does no harm."""
    if k == 1:
        return k
    tried, works = getattr(model, "packs", (0, True))
    if works and length > tried:
        tried = max(T + 1, min(2 * length, most_positions(model.config)))
        works = holds(packed, model, tried)
        model.packs = max(tried, length), works
    return k if works else 1


def response_log_probs(model, input_ids, attention_mask, width, temperature=1.0, k=1):
    """Log-probs of the last `width` tokens of input_ids (B, Q+T): (B, T).

    The one function behind log pi_old, log pi and log pi_SFT, so that before the first update the
    ratio is 1 and the KL is 0. k > 1: the rows are k summaries of each post, one post after the
    other; the post is computed once for all k (engine/batches.py), with the same numbers up to
    rounding.
    """
    position_ids = get_position_ids(attention_mask)
    k = shares_post(model, k, input_ids.shape[1])  # 1 where the model can't do that
    inputs = pack(input_ids, attention_mask, position_ids, width, k, model.dtype)
    # Logits from the post's last position on alone: at a vocabulary of 50,000, those of the whole
    # post would be by far the largest tensor of the program.
    logits = model(**inputs, logits_to_keep=k * width + 1, use_cache=False).logits
    logits = unpack(logits, width, k)  # (B, 1+T, V)
    return get_log_probs(logits, input_ids[:, -width - 1 :], temperature)
