"""What every stage does with a language model: pad, mask, read log-probs, sample, decay the rate.

The paper takes all of this for granted: a policy pi(y | x) is a language model that writes a
summary y after a post x, and a step of it is one token (section 3.4). Read this file before
`sft.py`, or come back to it when a name in there is new.

An action is a token that the policy wrote, EOS included. PPO (`ppo.py`) compares pi, the policy as
it is now, with pi_old, the policy that wrote the summary: ratio = pi / pi_old.

One convention holds everywhere. A query (the post in its prompt) is padded on the left to width Q,
a response (the summary) on the right to width T, and input_ids = [query | response] is (B, Q+T):

    query                response
    pad  pad  x0   x1    y0   EOS  pad       logits at position p predict the token at p+1, so what
    0    0    1    1     1    1    0         concerns y0, EOS, ... comes from positions [Q-1 : -1]

B = rows of a batch, L = Q+T, V = vocabulary. Log-probs and KL are in nats (natural logarithm).

What differs from the paper's setting: its released code ("the 2020 code",
openai/summarize-from-feedback, which has no training in it) pads queries with spaces that the model
does see; here padding is masked.
"N+" is Huang et al. 2024 (arXiv 2403.17031), a study of this paper's details.

`python lm.py` prints a worked example.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from transformers import DynamicCache


# ---------------------------------------------------------------------------- shapes and masks


def check_shapes(**tensors):
    """Raise ValueError unless all tensors have equal shapes.

    PyTorch would broadcast (B, 1) against (B,) to (B, B) without a word, and a mean over that is a
    number like any other.
    """
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")


def check_mask(mask, every_row=False):
    """Return mask as bool; raise ValueError when it selects nothing (every_row: nothing in a row).

    A mean over nothing is 0/0, and a summary without an action has no place for its reward.
    """
    mask = mask != 0  # masks come as bool, integers or floats
    if not mask.any():
        raise ValueError(f"mask {tuple(mask.shape)} selects nothing")
    if every_row and not mask.any(1).all():
        raise ValueError(f"every row of mask {tuple(mask.shape)} needs at least one action")
    return mask


def zero_off(x, mask):
    """x with zeros where mask is False.

    Not x * mask: at padding x may be NaN or infinite, and NaN * 0 is NaN. torch.where never reads
    what it drops, and passes a gradient of zero to it.
    """
    return torch.where(mask, x, torch.zeros_like(x))


def masked_mean(x, mask):
    """Mean of x over the True entries of mask, over the whole batch: sum(x * m) / sum(m).

    x, mask: equal shapes -> scalar. Not the mean of row means: every token counts the same,
    whatever the length of its summary. Raises ValueError on unequal shapes or an empty mask.
    """
    check_shapes(x=x, mask=mask)
    mask = check_mask(mask)
    return zero_off(x, mask).sum() / mask.sum()


def check_finite(name, tensor):
    """Raise FloatingPointError that names the tensor if it holds a NaN or an infinity."""
    if not tensor.isfinite().all():
        raise FloatingPointError(f"{name} is NaN or infinite")


# ---------------------------------------------------------------------------- padding


def pad(sequences, pad_id, left, device="cpu"):
    """Lists of token ids -> ids (B, L) and mask (B, L), padded on the left or on the right."""
    width = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    # The mask is made from lengths, not from `ids != pad`: many tokenizers have one id for padding
    # and EOS, and then the EOS, which the policy must learn to write, would be masked as padding.
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, where] = torch.tensor(tokens, dtype=torch.long)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


def join(queries, responses, pad_id, device="cpu"):
    """Queries and responses (lists of token ids) -> input_ids (B, Q+T), attention_mask (B, Q+T), Q.

    The post ends and the summary begins at the same column in every row, so that one slice, the
    last T columns, is the response of all of them.
    """
    query_ids, query_mask = pad(queries, pad_id, left=True, device=device)  # (B, Q)
    response_ids, response_mask = pad(responses, pad_id, left=False, device=device)  # (B, T)
    input_ids = torch.cat([query_ids, response_ids], 1)  # (B, Q+T)
    attention_mask = torch.cat([query_mask, response_mask], 1)  # (B, Q+T)
    return input_ids, attention_mask, query_ids.shape[1]


def get_position_ids(attention_mask):
    """0, 1, 2, ... over the real tokens of each row, whatever stands to their left: (B, L).

    Without it a model would count the padding, and the same post would read differently in another
    batch. Padding gets the position of a real token beside it, or 0; nothing ever looks at it.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def last_token_index(attention_mask):
    """Index of the last real token of each row: (B, L) -> (B,). For an ended summary, its EOS.

    The reward model's score is read there (the 2020 code). Not at [:, -1], which in a shorter row
    is padding.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (L,)
    return (positions * (attention_mask != 0)).argmax(1)


def is_eos(ids, eos_token_id):
    """Which ids end a summary, as bool. eos_token_id: an id, or several that all end it."""
    return torch.isin(ids, torch.as_tensor(eos_token_id, device=ids.device))


def get_response_mask(responses, eos_token_id):
    """(B, T) token ids -> (B, T) bool: True up to and including the first EOS, all True if none.

    The episode ends when the policy writes EOS (section 3.4). EOS is an action like any other: it
    carries KL, value, advantage and gradient, or the policy would never learn to stop. What follows
    it is padding, whichever id the padding has.
    """
    ends = is_eos(responses, eos_token_id).long()  # (B, T)
    return ends.cumsum(1) - ends == 0  # no EOS strictly before t


# ---------------------------------------------------------------------------- log-probabilities


def get_log_probs(logits, labels, temperature=1.0):
    """log softmax(logits / temperature)[labels], shifted: (B, L, V), (B, L) -> (B, L-1).

    Column p holds the log-prob (nats) of token p+1 given tokens 0..p. The temperature is the one
    the rollouts are sampled at, so that these are the log-probs of the policy that acted: with any
    other, ratio and KL would compare two policies of which neither wrote the summary.
    Raises ValueError on unequal shapes or a temperature that is not positive.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits must be (B, L, V) for labels (B, L), got {tuple(logits.shape)} "
                         f"for {tuple(labels.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    # The last logits predict a token that isn't there; the first token is predicted by none.
    # float32 at least: bfloat16 has two to three digits, too few for a difference of log-probs.
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))  # (B, L-1, V)
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    return log_probs.take_along_dim(labels[:, 1:, None], -1).squeeze(-1)


def response_log_probs(model, input_ids, attention_mask, width, temperature=1.0):
    """Log-probs of the last `width` tokens, the summaries: (B, Q+T), (B, Q+T) -> (B, T).

    The one function behind log pi_old, log pi and log pi_SFT, so that before the first update the
    ratio is 1 and the KL is 0.
    """
    # Logits from the post's last position on alone: at a vocabulary of 50,000, those of the whole
    # post would be by far the largest tensor of the program.
    logits = model(input_ids=input_ids, attention_mask=attention_mask,
                   position_ids=get_position_ids(attention_mask), logits_to_keep=width + 1,
                   use_cache=False).logits  # (B, 1+T, V)
    return get_log_probs(logits, input_ids[:, -width - 1 :], temperature)


# ---------------------------------------------------------------------------- sampling


def generator_for(seed, *names, device="cpu"):
    """A random stream of its own for each use, e.g. (seed, "ppo", update). No stream depends on how
    much another one was used, so a stage that is done again draws what it drew before."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def next_token(logits, temperature, top_p, generator):
    """logits (B, V) -> token ids (B,), drawn from softmax(logits / temperature).

    Temperature 0 takes the most likely token (greedy), as the paper evaluates (Fig. 8). top_p < 1
    (nucleus sampling, Holtzman et al. 2020) keeps the fewest most likely tokens whose probability
    reaches top_p, the token that crosses it included. Raises FloatingPointError on a NaN.
    """
    check_finite("logit", logits.max(-1).values)  # the maximum of a NaN and anything is NaN
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)  # (B, V)
    if top_p < 1:
        ordered, index = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # mass *before* a token decides on it
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def sample(model, input_ids, attention_mask, max_new_tokens, *, eos_token_id, pad_token_id,
           temperature=1.0, top_p=1.0, generator=None):
    """Continue left-padded queries (B, Q) one token at a time: (B, T) token ids.

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
    B = len(input_ids)
    responses = torch.full((B, max_new_tokens), pad_token_id, device=input_ids.device)  # (B, T)
    rows = torch.arange(B, device=input_ids.device)  # the responses that are still being written
    mask, ids, cache = attention_mask.long(), input_ids, DynamicCache(config=model.config)
    for t in range(max_new_tokens):
        # The first turn reads the post; every other one reads the token that was just drawn, and
        # finds keys and values of all earlier ones in the cache.
        # (`cache` is what transformers once called `past_key_values`.)
        position_ids = get_position_ids(mask)[:, -ids.shape[1] :]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids,
                       cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token = next_token(logits, temperature, top_p, generator)  # (rows still being written,)
        responses[rows, t] = token
        going = ~is_eos(token, eos_token_id)
        if not going.any():
            break
        # Rows that have ended leave the batch and the cache: no step is spent on them.
        if not going.all():
            cache.reorder_cache(going.nonzero().squeeze(-1))
        rows, mask, ids = rows[going], mask[going], token[going, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return responses[:, : t + 1]


# ---------------------------------------------------------------------------- text in, text out


def encode_texts(texts, tokenizer):
    """Token ids of each text, with nothing added. All of it is plain text: a typed "<|endoftext|>"
    does not become EOS."""
    return tokenizer(texts, add_special_tokens=False,
                     split_special_tokens=True)["input_ids"] if texts else []


def encode_responses(summaries, tokenizer, limit):
    """Summaries -> token ids with a leading space and EOS at the end, as in the 2020 code. One that
    is longer than `limit` with its EOS is cut there and loses the EOS, as if it had never ended."""
    rows = encode_texts([" " + text for text in summaries], tokenizer)
    return [(ids + [tokenizer.eos_token_id])[:limit] for ids in rows]


def write_summaries(model, tokenizer, queries, max_new_tokens, temperature, generator=None,
                    batch_size=256):
    """Queries (lists of token ids) -> a summary of each, as text without outer white space.

    A text does not show whether EOS was written. So a summary that was cut at max_new_tokens is
    judged, and scored outside PPO, like one that ended; people, too, saw only text.
    """
    eos, texts = tokenizer.eos_token_id, []
    for start in range(0, len(queries), batch_size):
        ids, mask = pad(queries[start : start + batch_size], tokenizer.pad_token_id, left=True,
                        device=model.device)  # (B, Q) each
        responses = sample(model, ids, mask, max_new_tokens, eos_token_id=eos,
                           pad_token_id=tokenizer.pad_token_id, temperature=temperature,
                           generator=generator)  # (B, T)
        written = get_response_mask(responses, eos) & ~is_eos(responses, eos)  # (B, T)
        texts += [tokenizer.decode(row[keep], clean_up_tokenization_spaces=False).strip()
                  for row, keep in zip(responses, written)]
    return texts


# ---------------------------------------------------------------------------- schedules, App. B.1


def linear_schedule(step, total):
    """Factor on the learning rate of update `step` = 0 .. total-1: 1 -> 1/total (PPO, App. B.1).

    "Linear decay" in the paper, to which value it doesn't say. Here as in N+: the last update still
    has a rate, a step at 0 would be wasted.
    """
    return 1 - step / total


def cosine_schedule(step, total):
    """Factor on the learning rate of step = 0 .. total-1: 1 -> nearly 0, which it would be at total
    (SFT and reward model, App. B.1)."""
    return (1 + math.cos(math.pi * step / total)) / 2


if __name__ == "__main__":
    # Four token ids of a vocabulary of three, and the logits at each of the four positions
    logits = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 1]]])
    ids = torch.tensor([[0, 1, 2, 1]])
    print("log-probs of tokens 1..3:", get_log_probs(logits, ids).tolist())
    print("the same at T = 0.7:     ", get_log_probs(logits, ids, temperature=0.7).tolist())
    responses = torch.tensor([[5, 9, 7, 9], [5, 6, 7, 8]])
    print("response mask, EOS = 9:  ", get_response_mask(responses, 9).long().tolist())
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    print("position ids, left pads: ", get_position_ids(mask).tolist())
    x, m = torch.tensor([[0.2, 0.4, 0.6], [1, 7, 7]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    print("masked mean:             ", masked_mean(x, m).item())
