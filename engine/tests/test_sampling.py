"""engine/sampling.py and log-probs of what was sampled (engine/packing.py), on real architectures.

What is in a softmax and how a token is drawn from it is lm.py's, and is tested there: here the
engine's loop is compared with lm.sample, and k samples of a post with those of k equal rows
(test_sharing.py).
"""

import functools
import re

import pytest
import torch
from common import (QUERIES, RESPONSES, TOKENIZER, close, every_architecture, padded, surely,
                    table_model, tiny_language_model, toy_model)

import lm
from engine import sampling
from engine.packing import response_log_probs
from engine.sampling import sample, sample_responses
from engine.texts import decode_response, encode_responses
from lm import generator_for


def start(tokens):
    """One query per token, [0, 0, token], its first two positions padding."""
    ids = torch.zeros(len(tokens), 3, dtype=torch.long)
    ids[:, 2] = torch.tensor(tokens)
    return ids, torch.tensor([[0, 0, 1]] * len(tokens))


@pytest.mark.parametrize("changes", [
    {}, {"temperature": 0}, {"temperature": 0.5, "top_p": 0.8}, {"top_p": 0.45},
    {"eos_token_id": [1, 4]}, {"pad_token_id": 4}, {"eos_token_id": 99}])
def test_what_is_drawn_is_what_the_plain_loop_draws(changes):
    """Token by token, from the same generator: ends, padding, temperature and top_p as there."""
    random = torch.Generator().manual_seed(0)
    model = table_model(torch.randn(6, 6, generator=random, dtype=torch.float64).tolist())
    model.generation_config.top_k = 1  # a checkpoint's own settings must not shape the rollouts
    settings = {"eos_token_id": 1, "pad_token_id": 0, **changes}
    for seed, tokens in enumerate(([3, 5, 2, 4], [2], [5] * 9)):
        before = torch.get_rng_state()
        ours, theirs = (draw(model, *start(tokens), 7, generator=generator_for(seed), **settings)
                        for draw in (sample, lm.sample))
        assert torch.equal(ours, theirs) and ours.dtype == torch.long
        assert torch.equal(torch.get_rng_state(), before), "the global random state has moved"


@pytest.mark.parametrize("wrong", [{"temperature": -.5}, {"top_p": 0.}, {"max_new_tokens": 0}])
def test_sample_refuses_settings_without_a_meaning(wrong):
    settings = {"max_new_tokens": 2, "temperature": 1., "top_p": 1., **wrong}
    ids, mask = start([0, 0])
    model = table_model(surely([0, 0]))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample(model, ids, mask, eos_token_id=1, pad_token_id=1, **settings)
    with pytest.raises(ValueError, match=r"input_ids \(2, 3\).*attention_mask \(1, 3\)"):
        sample(model, ids, mask[:1], 2, eos_token_id=1, pad_token_id=1)


# ---------------------------------------------------------------------------- on real models


def greedy_without_cache(model, query, max_new_tokens, eos_token_id):
    """The most likely token, again and again: one row, no padding, no cache."""
    ids = list(query)
    while len(ids) < len(query) + max_new_tokens and ids[len(query):][-1:] != [eos_token_id]:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(query):]


@functools.cache
def greedy_responses(architecture):
    """What each query alone is continued with for 7 tokens, and an EOS that ends some of them."""
    model = tiny_language_model(architecture)
    with torch.no_grad():
        free = [greedy_without_cache(model, query, 7, -1) for query in QUERIES]
    for eos in range(40):  # one that cuts a row in the middle while another one goes on
        ends = [row.index(eos) if eos in row else None for row in free]
        if None in ends and any(end is not None and 0 < end < 5 for end in ends):
            return free, eos, [row[: row.index(eos) + 1] if eos in row else row for row in free]
    raise AssertionError("no suitable EOS: choose another seed for the tiny model")


@every_architecture
@pytest.mark.parametrize("extra", [0, 3])
def test_greedy_sample_is_step_by_step_argmax(architecture, extra):
    free, eos, expected = greedy_responses(architecture)
    ids, mask, _, _ = padded(QUERIES, [[]] * 4, left=extra)
    responses = sample(tiny_language_model(architecture), ids, mask, 7, eos_token_id=eos,
                          pad_token_id=0, temperature=0)
    assert responses.tolist() == [row + [0] * (7 - len(row)) for row in expected], (
        "a row's text depends on the padding or on the other rows: position ids from the attention "
        "mask? the mask grown by one per token? the cache in step with the rows that go on?")


@every_architecture
def test_the_padding_id_may_be_any_token(architecture):
    free, _, _ = greedy_responses(architecture)
    model = tiny_language_model(architecture)
    for pad_id in {free[0][0], free[0][1], free[1][0]}:  # tokens that the rows do draw
        ids, mask, _, _ = padded(QUERIES, [[]] * 4, pad_id=pad_id)
        responses = sample(model, ids, mask, 7, eos_token_id=39 if 39 not in sum(free, [])
                              else 38, pad_token_id=pad_id, temperature=0)
        assert responses.tolist() == free, "an ordinary token with the padding's id was masked out"


@every_architecture
def test_sample_leaves_its_inputs_and_the_model_alone(architecture):
    model = tiny_language_model(architecture)
    ids, mask, _, _ = padded(QUERIES, [[]] * 4)
    before = ids.clone(), mask.clone()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    sample(model, ids, mask, 4, eos_token_id=2, pad_token_id=0)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@every_architecture
@torch.no_grad()
def test_log_probs_are_those_of_all_logits_and_do_not_see_the_padding(architecture):
    """Of each response on its own, without padding and from all logits; then in padded batches, and
    with padding in the middle, from which transformers can't guess a missing mask."""
    model = tiny_language_model(architecture)
    for left, right, pad_id, temperature in ((0, 0, 0, 1.), (1, 3, 0, 1.), (3, 1, 2, .7)):
        ids, mask, _, width = padded(QUERIES, RESPONSES, left, right, pad_id)
        actual = response_log_probs(model, ids, mask, width, temperature)
        assert actual.shape == (4, width)
        for row, query, response in zip(actual, QUERIES, RESPONSES):
            alone = torch.tensor([query + response])
            logits = model(alone, use_cache=False).logits.double()
            expected = lm.get_log_probs(logits, alone, temperature)[0, len(query) - 1 :]
            close(row[: len(response)], expected, "attention mask, position ids, temperature, or a "
                  "shift by one?", 1e-5)
    ids, mask = torch.tensor([[5, 6, 0, 0, 7, 18, 2]]), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    expected = response_log_probs(model, ids[mask.bool()][None], torch.ones(1, 5).long(), 2)
    close(response_log_probs(model, ids, mask, 2), expected, "attention mask not passed?", 1e-5)


# ---------------------------------------------------------------------------- text in, text out


class Letters:
    """A tokenizer with a token for each letter; EOS = 1 is written <e>."""

    eos_token_id = 1

    def __call__(self, texts, add_special_tokens=True, split_special_tokens=False, verbose=True):
        rows = [list(text) if split_special_tokens else re.findall("<e>|.", text) for text in texts]
        return {"input_ids": [[0] * add_special_tokens
                              + [1 if piece == "<e>" else ord(piece) for piece in row]
                              for row in rows]}

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join("<e>" if token == 1 else chr(token) for token in ids)


def test_encode_responses():
    space, a, b = map(ord, " ab")
    assert encode_responses(["ab", "b"], Letters(), 9) == [[space, a, b, 1], [space, b, 1]], (
        "a leading space, as in a text; EOS at the end, or the model never learns to stop")
    assert encode_responses(["ab", "b"], Letters(), 4) == [[space, a, b, 1], [space, b, 1]], (
        "both fit")
    assert encode_responses(["ab", "b"], Letters(), 3) == [[space, a, b], [space, b, 1]], (
        "a summary that is cut has no EOS: it did not end")
    assert encode_responses([""], Letters(), 9) == [[space, 1]]
    assert encode_responses([], Letters(), 9) == []
    assert encode_responses(["a", "<e>"], Letters(), 9)[1] == [space, *map(ord, "<e>"), 1], (
        "a typed control token is text")


def test_decode_response():
    assert decode_response([*map(ord, " a b "), 1, ord("c"), 1], Letters()) == "a b", (
        "up to the first EOS, without outer white space")
    assert decode_response(list(map(ord, " ab")), Letters()) == "ab", "no EOS: everything"
    assert decode_response([1, ord("c")], Letters()) == ""


@pytest.mark.parametrize("batch_size", [0, 1, 3, 99])
@pytest.mark.parametrize("k", [1, 2])
def test_sample_responses_keeps_the_order_of_the_queries(batch_size, k, monkeypatch):
    model, tokenizer = table_model(surely([0, 0, 1, 2, 3, 4, 5, 6])), Letters()
    tokenizer.pad_token_id, sampled = 7, []

    def watched(model, ids, mask, *rest, **settings):
        sampled.append(mask.sum(1).tolist())
        return sample(model, ids, mask, *rest, **settings)

    sample = sampling.sample
    monkeypatch.setattr(sampling, "sample", watched)
    queries = [[6, 7, 4], [5], [6, 3], [7, 7, 7, 2], [6]]
    responses = sample_responses(model, tokenizer, queries, 4, 0, batch_size=batch_size, k=k)
    # each token is followed by the one below, EOS = 1 is kept, the padding after it dropped
    expected = [[3, 2, 1], [4, 3, 2, 1], [2, 1], [1], [5, 4, 3, 2]]
    assert responses == [response for response in expected for _ in range(k)]
    n = max(1, batch_size // k) if batch_size else 5  # queries at a time
    lengths = [3, 1, 2, 4, 1] if n >= 5 else [1, 1, 2, 3, 4]
    assert sampled == [lengths[i : i + n] for i in range(0, 5, n)], (
        "rows at a time, k of them a query; all at once as given, else similar lengths together")


def test_each_query_gets_its_own_response():
    """In batches, of queries of all lengths, in any order: as if each were alone."""
    model = toy_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # sharp enough for the answer to depend on the query
    queries = [[3, 4, 5, 6, 7], [6], [5, 1], [8, 3, 3, 4], [2, 2, 7]]
    alone = []
    for query in queries:
        ids = torch.tensor([query])
        row = sample(model, ids, torch.ones_like(ids), 6, eos_token_id=9, pad_token_id=0,
                        temperature=0)[0].tolist()
        alone.append(row[: row.index(9) + 1] if 9 in row else row)
    assert len({tuple(row) for row in alone}) > 2, "the answers have to differ to show anything"
    for batch_size in (1, 2, 256):
        assert sample_responses(model, TOKENIZER, queries, 6, 0.0,
                                   batch_size=batch_size) == alone
    drawn = [sample_responses(model, TOKENIZER, queries, 6, 1.0, generator_for(seed))
             for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2], "the draws come from the given generator"
