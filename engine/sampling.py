"""Summaries token by token: several of a post, which is computed once; a few posts at a time."""

import torch
from transformers import DynamicCache

from engine.texts import end_ids
from lm import check_shapes, get_position_ids, get_response_mask, is_eos, next_token, pad


@torch.no_grad()
def sample(model, input_ids, attention_mask, max_new_tokens, *, eos_token_id, pad_token_id,
           temperature=1.0, top_p=1.0, generator=None, k=1):
    """Continue left-padded queries (B, Q) one token at a time, each k times: (kB, T) token ids.

    T is the longest response, at most max_new_tokens; what follows an EOS is pad_token_id. Raises
    ValueError on unequal shapes or a number out of range.

    Why not `model.generate`: it adds the top-k, top-p and penalties that a checkpoint carries, and
    then get_log_probs would not be those of the distribution that was sampled. Here nothing but
    temperature and top_p shapes it, and top_p < 1 is for trying things out, never for rollouts.
    """
    check_shapes(input_ids=input_ids, attention_mask=attention_mask)
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError("expected temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got "
                         f"{temperature}, {top_p} and {max_new_tokens}")
    n, device = k * len(input_ids), input_ids.device
    responses = torch.full((n, max_new_tokens), pad_token_id, device=device)  # (kB, T)
    rows = torch.arange(n, device=device)  # the responses that are still being written
    mask, ids, cache = attention_mask.long(), input_ids, DynamicCache(config=model.config)
    position_ids = get_position_ids(mask)
    for t in range(max_new_tokens):
        # The first turn reads the post; every other one reads the token that was just drawn, and
        # finds keys and values of all earlier ones in the cache.
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, cache=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]
        # logits: (rows still being written, V)
        if t == 0 and k > 1:  # the post is computed once, its cache shared out
            logits, mask = logits.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
            cache.reorder_cache(torch.arange(len(ids), device=device).repeat_interleave(k))
        token = next_token(logits, temperature, top_p, generator)  # (B,)
        responses[rows, t] = token
        going = ~is_eos(token, eos_token_id)
        if not going.any():
            break
        # What has ended leaves the batch and its cache: nobody computes padding.
        if not going.all():
            cache.reorder_cache(going.nonzero().squeeze(-1))
        rows, mask, ids = rows[going], mask[going], token[going, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position_ids = get_position_ids(mask)[:, -1:]
    return responses[:, : t + 1]


def sample_responses(model, tokenizer, queries, max_new_tokens, temperature, generator=None,
                     batch_size=0, k=1):
    """k responses to each query: token ids, EOS included, the k of a query one after the other.

    batch_size: rows sampled at a time, 0: all. Queries of similar length are sampled together.
    """
    n = max(1, (batch_size or k * len(queries)) // k)  # queries at a time
    order = list(range(len(queries)))
    if n < len(queries):
        order.sort(key=lambda i: len(queries[i]))  # little padding in each batch
    responses = [None] * (k * len(queries))
    for start in range(0, len(order), n):
        some = order[start : start + n]
        ids, mask = pad([queries[i] for i in some], tokenizer.pad_token_id, left=True)  # (n, Q)
        sampled = sample(model, ids.to(model.device), mask.to(model.device), max_new_tokens,
                         eos_token_id=end_ids(tokenizer), pad_token_id=tokenizer.pad_token_id,
                         temperature=temperature, generator=generator, k=k)  # (kn, T)
        kept = get_response_mask(sampled, end_ids(tokenizer))
        rows = [k * i + j for i in some for j in range(k)]
        for row, tokens, keep in zip(rows, sampled, kept):
            responses[row] = tokens[keep].tolist()
    return responses
