"""What language models differ in. Nothing is taken on trust: each one is tried against itself."""

import inspect
import math

import torch
from transformers import DynamicCache

from engine.devices import full_precision, mixed_precision
from engine.settings import SettingError

T = 8  # tokens of a summary in a trial: enough for a cache to lose a row half way


def most_positions(config):
    """Tokens that a model of this config can read; infinity where there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def hidden_width(trunk):
    """Entries of a trunk's last hidden state, from a look at one: the config's hidden_size is
    another number where the last layer is narrower (OPT-350m)."""
    with torch.no_grad(), mixed_precision(trunk.device.type, trunk.dtype):
        output = trunk(input_ids=torch.ones(1, 1, dtype=torch.long, device=trunk.device))
    if not hasattr(output, "last_hidden_state"):
        raise SettingError(f"{trunk.config.model_type}: the network without its lm head was not "
                           "found, and a reward model needs it; pass another model")
    return output.last_hidden_state.shape[-1]


# ---------------------------------------------------------------------------- trials
#
# All read the same two rows, [pad | post | y] with two random y after one random post, and return
# what they got and what they should have got: (B, n, V), or (B, n, d) of a trunk.


def two_rows(network, length):
    """input_ids and attention_mask (2, 3 + length): three pads, a post, and T tokens of a summary.
    The ids are from the middle of the vocabulary, where no control token is."""
    n = network.get_input_embeddings().num_embeddings
    ids = torch.randint(n // 4, n // 2, (2, 3 + length), generator=torch.Generator().manual_seed(0))
    ids[1, :-T] = ids[0, :-T]  # one post
    mask = torch.ones_like(ids)
    ids[:, :3] = mask[:, :3] = 0
    return ids.to(network.device), mask.to(network.device)


def read(network, n, attention_mask, use_cache=False, **inputs):
    """The last n logits of each row, or hidden states of a network without lm head, in float32."""
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        inputs["logits_to_keep"] = n
    if "position_ids" not in inputs:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
    output = network(attention_mask=attention_mask, use_cache=use_cache, **inputs)
    return output[0][:, -n:].float()


def padded(network, ids, mask, plain):
    """Padding on the left changes nothing."""
    return read(network, 1 + T, mask[1:, 3:], input_ids=ids[1:, 3:]), plain[1:]


def left_to_right(network, ids, mask, plain):
    """What is read at the post's end does not depend on the summary."""
    return plain[:1, :1], plain[1:, :1]


def cached(network, ids, mask, plain):
    """With a cache, which is shared out to two rows, and later loses one of them."""
    cache = DynamicCache(config=network.config)
    got = [read(network, 1, mask[:1, :-T], True, input_ids=ids[:1, :-T], cache=cache)]
    cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=ids.device))
    got = [got[0].expand(2, -1, -1)]
    for t in range(-T, 0):
        if t == -T // 2:
            cache.reorder_cache(torch.ones(1, dtype=torch.long, device=ids.device))
            ids, mask, got = ids[1:], mask[1:], [x[1:] for x in got]
        end = ids.shape[1] + t + 1
        token = ids[:, end - 1 : end]
        got.append(read(network, 1, mask[:, :end], True, input_ids=token, cache=cache))
    return torch.cat(got, 1), plain[1:]


@torch.no_grad()
def holds(trial, network, length):
    """Does a trial come out as it should, up to rounding? An exception is a no."""
    # Of the norm. Seen, with 24 layers in bfloat16: .016 by rounding, .85 where a window is left
    tolerance = 1e-4 if network.dtype == torch.float32 else 0.05
    try:
        with full_precision(network.device), mixed_precision(network.device.type, network.dtype):
            ids, mask = two_rows(network, length)
            got, expected = trial(network, ids, mask, read(network, 1 + T, mask, input_ids=ids))
        return ((got - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all().item()
    except Exception:  # whatever an architecture raises where it can't do a thing
        return False


TRIALS = ((padded, "padding on the left changes what it reads"),
          (left_to_right, "a later token changes what it makes of an earlier one"),
          (cached, "with a key-value cache it computes other numbers than without"))


def check_model(name, model, length):
    """SettingError unless the model does what every stage relies on. length: tokens of a post with
    its summary."""
    length = max(T + 1, min(length, most_positions(model.config)))
    for trial, fault in TRIALS:
        if not holds(trial, model, length):
            raise SettingError(f"{name}: {model.config.model_type} can't be trained here, {fault}; "
                               "pass another model")

