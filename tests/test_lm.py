"""lm.py on paper: masked means, padding, log-probs, sampling and schedules, each with its number.

Order: numbers that a pencil can check, gradients in closed form, extreme inputs, slow oracles in
plain Python, and last the functions on tiny random models of the real architectures. What another
test file needs as well (close, refuses_shapes, ignores_what_is_masked, the tiny models) is at the
top.
"""

import functools
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

import lm


# ---------------------------------------------------------------------------- tools for all tests


def t(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, hint, tolerance=1e-6):
    """actual is expected, shape included; hint says what went wrong if it is not."""
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (
        f"{hint}\nshape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (
        f"{hint}\ngot      {actual.tolist()}\nexpected {expected.tolist()}")


def refused(function, arguments, named):
    """function(**arguments) is a ValueError that gives name and shape of all that is `named`."""
    shapes = {name: tuple(arguments[name].shape) for name in named}
    try:
        function(**arguments)
    except ValueError as error:
        for name, shape in shapes.items():
            assert re.search(rf"\b{name}\b", str(error)), f"no {name} in the error: {error}"
            assert str(shape) in str(error), f"no shape {shape} of {name} in the error: {error}"
    else:
        raise AssertionError(f"accepted {shapes}: they broadcast, which hides most mistakes")


def refuses_shapes(function, **arguments):
    """Any one argument in a shape that merely broadcasts to the others' (B, T) is refused."""
    for name, x in arguments.items():
        for wrong in (x[:1], x[:, :1], x[0], x[0, 0], x[None], x[:, :, None], x[:, :-1]):
            refused(function, {**arguments, name: wrong}, arguments)


def refuses_empty_masks(function, **arguments):
    for dtype in (torch.bool, torch.long, torch.float32):
        refused(function, {**arguments, "mask": torch.zeros_like(arguments["mask"], dtype=dtype)},
                ["mask"])
    refused(function, {name: x[:0] for name, x in arguments.items()}, ["mask"])


def outputs_and_gradients(function, arguments):
    """[("result", x), ...] and the gradient of an uneven sum of them by every argument."""
    leaves = {name: x.clone().requires_grad_() if x.is_floating_point() and name != "mask" else x
              for name, x in arguments.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [("result", x.detach()) for x in outputs]
    uneven = sum((x * torch.arange(1.0, x.numel() + 1).view(x.shape)).sum() for x in outputs)
    if uneven.requires_grad:
        leaves = [x for x in leaves.values() if x.requires_grad]
        found += [("gradient", torch.zeros(()) if x is None else x)
                  for x in torch.autograd.grad(uneven, leaves, allow_unused=True)]
    return found


def ignores_what_is_masked(function, **arguments):
    """NaN, infinity and huge numbers off the mask change no result and no gradient."""
    off = arguments["mask"] == 0
    assert off.any() and not off.all()
    expected = outputs_and_gradients(function, arguments)
    for kind, x in expected:
        assert x.isfinite().all() and (kind == "result" or x.shape != off.shape
                                       or (x[off] == 0).all()), "a gradient where mask is 0"
    names = [name for name, x in arguments.items() if x.shape == off.shape and name != "mask"]
    for poisoned in [[name] for name in names] + [names]:
        for value in (math.nan, math.inf, -math.inf, 1e30):
            found = outputs_and_gradients(function, {
                name: x.masked_fill(off, value) if name in poisoned else x
                for name, x in arguments.items()})
            for (kind, x), (_, y) in zip(found, expected, strict=True):
                assert torch.equal(x, y), (
                    f"{value} in {' and '.join(poisoned)} where mask is 0 changed the {kind}: NaN "
                    "* 0 is NaN, torch.where does not read what it drops; put zeros there with it "
                    "before the first operation, not after the last")


def same_for_all_mask_types(function, **arguments):
    first, *others = (
        outputs_and_gradients(function, {**arguments, "mask": arguments["mask"].to(dtype)})
        for dtype in (torch.bool, torch.long, torch.int32, torch.float32, torch.float64))
    for other in others:
        for (_, x), (_, y) in zip(first, other, strict=True):
            assert torch.equal(x, y), "a bool, a long and a float mask give different results"


def keeps_types_and_inputs(function, *floats, **arguments):
    """float32 in, float32 out; float64 in, float64 out; nothing is changed in place."""
    for dtype in (torch.float32, torch.float64):
        given = {name: x.to(dtype) if name in floats else x for name, x in arguments.items()}
        before = {name: x.clone() for name, x in given.items()}
        outputs = function(**given)
        for x in outputs if isinstance(outputs, tuple) else (outputs,):
            assert x.dtype == dtype, f"{dtype} in, {x.dtype} out"
        for name, x in before.items():
            assert torch.equal(given[name], x), f"the caller's {name} was changed in place"


def some_masks(batch, width):
    """A mask whose rows end at 1, 2, ..., width, 1, ...: EOS first, in the middle, and absent."""
    return torch.arange(width)[None] < (torch.arange(batch)[:, None] % width) + 1


COMMON = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
CONFIGS = {  # positions that are learned; turned into the keys; and two heads for each key
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                               attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SIZES, hidden_dropout=0, attention_dropout=0),
    "llama": lambda: LlamaConfig(**COMMON, **SIZES, num_key_value_heads=2),
}
every_architecture = pytest.mark.parametrize("architecture", CONFIGS)


def build(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def tiny_language_model(architecture):
    """A random language model of a real architecture. Shared by the tests: change copies only."""
    return build(CONFIGS[architecture]())


def table_model(table):
    """A real GPT-2 whose next-token logits are table[last token], (V, V), whatever came before."""
    vocabulary = len(table)
    model = build(GPT2Config(vocab_size=vocabulary, n_embd=vocabulary + 1, n_layer=1, n_head=1,
                             tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
                             attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, n_positions=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "wpe" in name:  # neither context nor position reaches the output
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(vocabulary, vocabulary + 1))
        hidden = model.transformer(torch.arange(vocabulary)[:, None]).last_hidden_state[:, 0]
        model.lm_head.weight.copy_((torch.linalg.pinv(hidden.double()) @ t(table)).T)
    return model


def padded(queries, responses, left=0, right=0, pad_id=0):
    """[left-padded query | right-padded response], written without lm.py: ids, mask, Q, T."""
    query_width, width = max(map(len, queries)) + left, max(map(len, responses)) + right
    ids, mask = [], []
    for query, response in zip(queries, responses):
        before, after = query_width - len(query), width - len(response)
        ids.append([pad_id] * before + query + response + [pad_id] * after)
        mask.append([0] * before + [1] * (len(query) + len(response)) + [0] * after)
    return torch.tensor(ids), torch.tensor(mask), query_width, width


QUERIES = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17]]
RESPONSES = [[18, 2], [19, 20, 21, 22], [2], [23, 24, 25]]  # EOS = 2: middle, absent, first, absent


# ---------------------------------------------------------------------------- means and masks


def test_masked_mean_counts_tokens_not_summaries():
    # (.2 + .4 + .6 + 1) / 4 = 2.2 / 4
    x, mask = t([[.2, .4, .6], [1, 7, -9]]), t([[1, 1, 1], [1, 0, 0]])
    close(lm.masked_mean(x, mask), .55, "0.70 is the mean of the row means, 0.0333 counts the "
          "padding, 0.3667 divides by all six entries: divide the masked sum by the mask's sum")
    lm.masked_mean(x.requires_grad_(), mask).backward()
    close(x.grad, [[.25, .25, .25], [.25, 0, 0]], "the gradient is mask / sum(mask)")
    one = t([[0, 0], [0, 1]])
    close(lm.masked_mean(t([[5, 6], [7, 8]]), one), 8., "one entry: its mean is itself")
    close(lm.masked_mean(t([-1e30, 1e30]), t([1, 1])), 0., "huge numbers")
    close(lm.masked_mean(t([3, 4, 8]), torch.ones(3)), 5., "one dimension, everything counts")


def test_masked_mean_contract():
    x, mask = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), some_masks(3, 4)
    refuses_shapes(lm.masked_mean, x=x, mask=mask)
    refuses_empty_masks(lm.masked_mean, x=x, mask=mask)
    ignores_what_is_masked(lm.masked_mean, x=x, mask=mask)
    same_for_all_mask_types(lm.masked_mean, x=x, mask=mask)
    keeps_types_and_inputs(lm.masked_mean, "x", x=x, mask=mask)


def test_check_mask():
    for dtype in (torch.bool, torch.long, torch.float32):
        mask = t([[1, 0], [0, 0]]).to(dtype)
        assert torch.equal(lm.check_mask(mask), mask.bool())
        assert torch.equal(lm.check_mask(mask[:1], every_row=True), mask[:1].bool())
        with pytest.raises(ValueError, match=r"every row of mask \(2, 2\)"):
            lm.check_mask(mask, every_row=True)
        with pytest.raises(ValueError, match=r"mask \(1, 2\) selects nothing"):
            lm.check_mask(mask[1:])


def test_zero_off_reads_nothing_off_the_mask():
    x, mask = t([2, math.nan, math.inf]).requires_grad_(), torch.tensor([True, False, False])
    kept = lm.zero_off(x, mask)
    assert kept.tolist() == [2, 0, 0], "NaN * 0 is NaN: torch.where, not a product"
    kept.square().sum().backward()
    assert x.grad.tolist() == [4, 0, 0] and lm.zero_off(x.float(), mask).dtype == torch.float32


def test_what_is_not_finite_is_named():
    lm.check_finite("KL", t([1e300, -1e300, 0]))
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match="^KL is NaN or infinite$"):
            lm.check_finite("KL", t([1, wrong, 3]))
    impossible = t([[0, -math.inf]]), 1., 1., None
    assert lm.next_token(*impossible).tolist() == [0], "a token of probability 0 is no error"
    for temperature in (0., 1.):
        with pytest.raises(FloatingPointError, match="logit"):
            lm.next_token(t([[0, 1], [math.nan, 0]]), temperature, 1., None)


@pytest.mark.parametrize("rows, pad_id, left, ids, mask", [
    ([[5, 6, 7], [8]], 0, True, [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]]),
    ([[5, 6, 7], [8]], 9, False, [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
    ([[9, 5, 9], [8]], 9, True, [[9, 5, 9], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]])])  # pad = EOS = 9
def test_pad(rows, pad_id, left, ids, mask):
    padded_ids, padded_mask = lm.pad(rows, pad_id, left)
    assert padded_ids.tolist() == ids and padded_ids.dtype == torch.long
    assert padded_mask.tolist() == mask, "the mask is made from lengths, not ids != pad"


def test_join_puts_queries_left_and_responses_right():
    # pad 0, EOS 9, Q = 4. The last two rows share their query; the last one never ends.
    queries, responses = [[5, 6], [3, 4, 5, 6], [3, 4, 5, 6]], [[7, 8, 9], [7, 8, 2, 9], [7, 8, 2]]
    ids, mask, width = lm.join(queries, responses, 0)
    assert width == 4
    assert ids.tolist() == [[0, 0, 5, 6, 7, 8, 9, 0], [3, 4, 5, 6, 7, 8, 2, 9],
                            [3, 4, 5, 6, 7, 8, 2, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8, [1] * 7 + [0]]
    assert lm.join([[5], [6]], [[7, 8, 9], [7]], 0)[2] == 1, "Q is the width of the queries"
    mask_of_eos = lm.join([[5, 6], [4]], [[7, 9], [9]], 9)[1]  # pad = EOS = 9
    assert mask_of_eos.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]], (
        "the mask is made from lengths, not ids != pad: the EOS of a summary is a real token")
    assert lm.last_token_index(mask).tolist() == [6, 7, 6], (
        "the last real token: -1 or 1 in row 0 comes from looking for the first pad in the whole "
        "row, which finds the query's; 7 is the width; 4 is the number of real tokens")


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_last_token_index_and_position_ids(dtype):
    mask = t([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).to(dtype)
    assert lm.last_token_index(mask).tolist() == [4, 1, 1, 4]
    positions = lm.get_position_ids(mask)
    assert positions.dtype == torch.long
    real = [row[kept].tolist() for row, kept in zip(positions, mask.bool())]
    assert real == [[0, 1, 2], [0, 1], [0], [0, 1, 2, 3, 4]], (
        "the first real token has position 0, whatever padding stands before it")
    assert positions[0].tolist() == [0, 0, 0, 1, 2], "-1 at the left padding is no position"


def test_response_mask_keeps_the_first_eos():
    responses = torch.tensor([[5, 9, 0, 0],    # EOS in the middle
                              [9, 0, 0, 0],    # EOS first
                              [5, 6, 7, 8],    # no EOS
                              [5, 6, 7, 9],    # EOS last
                              [5, 9, 7, 9],    # text and a second EOS after the first
                              [0, 5, 9, 0],    # the padding id drawn as an ordinary token
                              [9, 9, 9, 9]])   # padding = EOS
    mask = lm.get_response_mask(responses, 9)
    assert mask.dtype == torch.bool and mask.shape == responses.shape
    assert mask.long().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1],
                                    [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], (
        "True up to and including the first EOS: EOS is an action, what follows it is not; without "
        "an EOS every token is an action; never made from ids != pad")
    for several in ([7, 9], [9, 7], torch.tensor([7, 9])):
        assert lm.get_response_mask(responses, several).long().tolist() == [
            [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0],
            [1, 0, 0, 0]], "up to and including the first EOS of any kind"
    assert lm.is_eos(responses[4], [7, 9]).tolist() == [False, True, True, True]
    assert lm.is_eos(responses[4], 9).tolist() == [False, True, False, True]


# ---------------------------------------------------------------------------- log-probabilities

LOGITS = [[2, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 1]]  # rows predict token 1, 2, 3 and (unused) 4


@pytest.mark.parametrize("logits, labels, temperature, expected, hint", [
    # log(e^2 + 2) = 2.239545, so token 1 has 0 - 2.239545; log(e + 2) = 1.551445, so token 2 has
    # 0 - 1.551445; log(e^3 + 2) = 3.094923, so token 1 has 0 - 3.094923
    (LOGITS, [0, 1, 2, 1], 1., [-2.239545, -1.551445, -3.094923], "logits at p predict token p + 1:"
     " drop the last row of logits and the first label. -0.239545 in front means that logits p were"
     " read at label p"),
    # log(e^(2/.7) + 2) = 2.965876, and so on
    (LOGITS, [0, 1, 2, 1], .7, [-2.965876, -1.820142, -4.312870], "log_softmax(logits / "
     "temperature): neither multiplied, nor the log-probs divided afterwards"),
    ([[1e4, 0, -1e4], [0, 1e4, 0], [0, 0, 0]], [0, 2, 1], 1., [-2e4, 0],
     "log(softmax(x)) is -inf here: use log_softmax"),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_by_hand(logits, labels, temperature, expected, hint, dtype):
    logits = t([logits, logits[:1] * len(logits)], dtype).requires_grad_()
    log_probs = lm.get_log_probs(logits, torch.tensor([labels, [0] * len(labels)]), temperature)
    close(log_probs[0], expected, hint)
    log_probs[0].sum().backward()
    # d/dz log_softmax(z / T)[y] = (onehot(y) - softmax(z / T)) / T, zero at the last position
    onehot = torch.nn.functional.one_hot(torch.tensor(labels[1:]), 3)
    slope = (onehot - (logits[0, :-1].detach() / temperature).softmax(-1)) / temperature
    close(logits.grad[0], [*slope.tolist(), [0, 0, 0]], "onehot - softmax, by the temperature")


def test_log_probs_contract():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1], [0, 0, 0, 0]])
    named = ["logits", "labels"]
    for wrong in (labels[:1], labels[:, :1], labels[:, 1:], labels[0], labels[None]):
        refused(lm.get_log_probs, {"logits": logits, "labels": wrong}, named)
    for wrong in (logits[:1], logits[:, :1], logits[:, 1:]):
        refused(lm.get_log_probs, {"logits": wrong, "labels": labels}, named)
    for temperature in (0., -1., math.nan):
        with pytest.raises(ValueError, match="temperature"):
            lm.get_log_probs(logits, labels, temperature)
    keeps_types_and_inputs(lm.get_log_probs, "logits", logits=logits, labels=labels)
    # log(e^20 + e^19.5 + e^3) = 20 + log(1 + e^-.5 + e^-17) = 20.4740770
    half = t([[[20, 19.5, 3], [0, 0, 0]]], torch.bfloat16)
    close(lm.get_log_probs(half, torch.tensor([[0, 1]])), [[-.9740770]],
          "a log_softmax in bfloat16 is off by 1e-3: go to float32 first", 1e-5)


# ---------------------------------------------------------------------------- sampling, by table


def test_every_use_of_randomness_has_a_stream_of_its_own():
    before = torch.get_rng_state()
    draws = [torch.rand((), generator=lm.generator_for(*names)).item() for names in
             [(0, "ppo", 1), (0, "ppo", 1), (0, "ppo", 2), (1, "ppo", 1), (0, "reward", 1), (0,)]]
    assert draws[0] == draws[1] and len(set(draws)) == 5
    assert torch.equal(torch.get_rng_state(), before)


def surely(successors):
    """A model that surely puts successors[token] after token."""
    return table_model([[30. * (token == after) for token in range(len(successors))]
                        for after in successors])


def start(tokens):
    """One query per token, [0, 0, token], its first two positions padding."""
    return torch.tensor([[0, 0, x] for x in tokens]), torch.tensor([[0, 0, 1]] * len(tokens))


@pytest.mark.parametrize("temperature", [0., 1.])
@pytest.mark.parametrize("tokens, most, pad_id, expected", [
    ([3, 5, 2, 4], 9, 7, [[2, 1, 7, 7], [4, 3, 2, 1], [1, 7, 7, 7], [3, 2, 1, 7]]),
    ([3, 6, 2], 2, 7, [[2, 1], [5, 4], [1, 7]]), ([3, 6, 2], 1, 7, [[2], [5], [1]]),
    ([6], 5, 7, [[5, 4, 3, 2, 1]]),  # EOS as the very last token
    ([2, 2], 5, 7, [[1], [1]]),  # all rows end at once
    ([3, 5], 9, 1, [[2, 1, 1, 1], [4, 3, 2, 1]]),  # padding = EOS
])
def test_sample_pads_after_eos_and_is_as_wide_as_the_longest(
        tokens, most, pad_id, expected, temperature):
    model = surely([0, 0, 1, 2, 3, 4, 5, 6])  # each is followed by the one below
    responses = lm.sample(model, *start(tokens), most, eos_token_id=1, pad_token_id=pad_id,
                          temperature=temperature)
    assert responses.dtype == torch.long and responses.tolist() == expected, (
        "the width is that of the longest response, max_new_tokens at most, after EOS comes "
        "pad_token_id, and a row that ended must not shift the others")


@pytest.mark.parametrize("eos, expected", [
    (1, [[4, 0, 2, 3, 1], [3, 1, 0, 0, 0]]), ([1, 4], [[4, 0], [3, 1]])])
def test_a_padding_id_drawn_before_eos_is_an_ordinary_token(eos, expected):
    model = surely([2, 1, 3, 1, 0, 4])  # 5 -> 4 -> 0 -> 2 -> 3 -> 1 = EOS
    responses = lm.sample(model, *start([5, 2]), 9, eos_token_id=eos, pad_token_id=0, temperature=0)
    assert responses.tolist() == expected, "only EOS ends a response, each one where there are two"


def test_sample_refuses_what_has_no_meaning():
    ids, mask = start([3, 5])
    given = {"max_new_tokens": 2, "eos_token_id": 1, "pad_token_id": 1}
    sample = functools.partial(lm.sample, surely([0, 0]))
    for wrong in (mask[:1], mask[:, :1], mask[:, 1:], mask[0], mask[None]):
        refused(functools.partial(sample, **given), {"input_ids": ids, "attention_mask": wrong},
                ["input_ids", "attention_mask"])
    for name, x in (("temperature", -.5), ("top_p", 0.), ("top_p", 1.5), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=name):
            sample(ids, mask, **{**given, name: x})


# A four-token distribution in an order that is not sorted; token 4 = EOS has no mass worth noting
PROBS = [.15, .5, .1, .25]


def frequencies(n=20000, steps=1, seed=0, **settings):
    model = table_model([[math.log(p) for p in PROBS] + [-40.]] * 5)
    # a checkpoint's own settings must not shape the rollouts
    model.generation_config.update(top_k=1, repetition_penalty=5., temperature=.1)
    responses = lm.sample(model, *start([0] * (n // steps)), steps, eos_token_id=4, pad_token_id=4,
                          generator=torch.Generator().manual_seed(seed), **settings)
    return torch.bincount(responses.flatten(), minlength=5)


def fits(counts, expected, hint):
    """Pearson's chi-square of the counts; 99.99 % of fair draws stay below 21.1 (3 degrees)."""
    n, expected = sum(counts.tolist()), t(expected + [0])
    assert counts[expected == 0].sum() == 0, f"{hint}: drawn, though impossible: {counts.tolist()}"
    kept = expected > 0
    chi_square = ((counts - n * expected) ** 2)[kept] / (n * expected)[kept]
    assert chi_square.sum() < 21.1, f"{hint}: {(counts / n).tolist()}, not {expected.tolist()}"


@pytest.mark.parametrize("settings, kept, hint", [
    ({}, [0, 1, 2, 3], "no top_k, no penalty, every token at its probability"),
    ({"steps": 4}, [0, 1, 2, 3], "no top_k, no penalty, and so at the fourth token"),
    ({"temperature": .5}, [0, 1, 2, 3], "temperature .5 squares the probabilities"),
    ({"temperature": 2.}, [0, 1, 2, 3], "temperature 2: roots"),
    ({"temperature": 0.}, [1], "temperature 0 is greedy"),
    ({"top_p": .45}, [1], ".5 alone crosses .45; without it nothing is left"),
    ({"top_p": .6}, [1, 3], ".5, then .25 crosses .6; renormalised"),
    ({"top_p": .8}, [0, 1, 3], ".5 + .25 + .15 crosses .8"),
    ({"top_p": .95}, [0, 1, 2, 3], "all four are needed to reach .95"),
    ({"top_p": 1e-6}, [1], "the most likely token is always kept"),
    # squared and renormalised the largest is .25 / .345 = .7246: it alone reaches .7
    ({"top_p": .7, "temperature": .5}, [1], "top_p of softmax(logits / T)"),
    # the roots are [.2027, .3701, .1655, .2617]: .3701 + .2617 = .6318 misses .75, + .2027 crosses
    ({"top_p": .749, "temperature": 2.}, [0, 1, 3], "top_p of softmax(logits / T)"),
])
def test_sample_draws_from_the_softmax(settings, kept, hint):
    power = 1 / (settings.get("temperature") or 1)  # softmax(log p / T) ~ p^(1/T)
    weights = [p**power * (i in kept) for i, p in enumerate(PROBS)]
    fits(frequencies(**settings), [x / sum(weights) for x in weights], hint)


def test_every_token_may_be_drawn_and_top_p_stops_where_it_is_reached():
    # log-probs in equal steps over 200 tokens; the 100 least likely have 1 / (1 + e^2) = .119 of it
    generator, steps = torch.Generator().manual_seed(0), torch.linspace(0, 4, 200)
    share = (lm.next_token(steps.expand(4000, 200), 1., 1., generator) < 100).double().mean().item()
    assert abs(share - .1192) < .02, f"{share}: no top-k, the log-probs are those of all tokens"
    drawn = lm.next_token(torch.zeros(200, 4), 1., .5, generator)  # 1/4 each: two reach 1/2
    assert len(set(drawn.tolist())) == 2, "the smallest set whose probability is at least top_p"


def test_sample_draws_from_its_generator_only():
    before = torch.get_rng_state()
    first, again, other = (frequencies(99, seed=seed).tolist() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before), "the global random state was moved"
    assert first == again != other, "one seed, one result; another seed, another one"


# ---------------------------------------------------------------------------- on real models


@functools.cache
def greedy_responses(architecture):
    """What each query alone is continued with: 7 times the most likely token, one row, no padding,
    no cache. And an EOS that ends some of these rows, and the rows that it ends."""
    model, free = tiny_language_model(architecture), []
    for query in QUERIES:
        ids = list(query)
        for _ in range(7):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        free.append(ids[-7:])
    for eos in range(40):  # one that cuts a row in the middle while another one goes on
        ends = [row.index(eos) if eos in row else None for row in free]
        if None in ends and any(end is not None and 0 < end < 5 for end in ends):
            return free, eos, [row[: row.index(eos) + 1] if eos in row else row for row in free]
    raise AssertionError("no suitable EOS: choose another seed for the tiny model")


@every_architecture
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_greedy_sample_is_step_by_step_argmax(architecture, extra):
    free, eos, expected = greedy_responses(architecture)
    model, pad_id = tiny_language_model(architecture), [0, free[0][0], 0, free[1][0]][extra]
    ids, mask, _, _ = padded(QUERIES, [[]] * 4, extra, pad_id=pad_id)
    before = [x.clone() for x in (ids, mask, *model.state_dict().values())]
    responses = lm.sample(model, ids, mask, 7, eos_token_id=eos, pad_token_id=pad_id, temperature=0)
    assert responses.tolist() == [row + [pad_id] * (7 - len(row)) for row in expected], (
        "a row's text depends on the padding or on the other rows, or an ordinary token with the "
        "padding's id was masked out: position ids from the attention mask? the mask grown by one "
        "per token? the cache in step with the rows that go on?")
    assert all(map(torch.equal, (ids, mask, *model.state_dict().values()), before))
    assert not responses.requires_grad and all(x.grad is None for x in model.parameters())


@functools.cache
def log_probs_one_by_one(architecture, temperature):
    """Of each response on its own, without padding, from all logits: lists of floats."""
    model, expected = tiny_language_model(architecture), []
    for query, response in zip(QUERIES, RESPONSES):
        logits = model(torch.tensor([query + response]), use_cache=False).logits[0].double()
        rows = (logits / temperature).tolist()[len(query) - 1 :]
        expected.append([row[token] - math.log(sum(math.exp(z) for z in row))
                         for row, token in zip(rows, response)])
    return expected


@every_architecture
@pytest.mark.parametrize("left, right, pad_id, temperature",
                         [(0, 0, 0, 1.), (1, 3, 0, 1.), (3, 1, 2, .7)])
def test_response_log_probs_do_not_see_the_padding(architecture, left, right, pad_id, temperature):
    ids, mask, _, width = padded(QUERIES, RESPONSES, left, right, pad_id)
    model = tiny_language_model(architecture)
    actual = lm.response_log_probs(model, ids, mask, width, temperature)
    assert actual.shape == (4, width)
    for row, expected in zip(actual, log_probs_one_by_one(architecture, temperature)):
        close(row[: len(expected)], expected, "log-probs of a response alone and in a padded batch "
              "differ: attention mask, position ids, temperature, or a shift by one?", 1e-5)
    gradients = torch.autograd.grad(actual.sum(), list(model.parameters()))
    assert all(x.abs().sum() > 0 for x in gradients), (
        "the policy loss reaches the policy through these log-probs: no no_grad, no detach")
    # transformers guesses a missing attention mask from the position ids, but not in this case
    ids, mask = torch.tensor([[5, 6, 0, 0, 7, 18, 2]]), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    expected = lm.response_log_probs(model, ids[mask.bool()][None], torch.ones(1, 5).long(), 2)
    close(lm.response_log_probs(model, ids, mask, 2), expected.detach(), "no mask?", 1e-5)


# ---------------------------------------------------------------------------- text in, text out


class Letters:
    """A token for each letter. The first pads; the second is EOS, written <e> (so a text may type
    it); the last stands in front of a text where it is not asked to leave that."""

    letters = "_$ abcde<>\n^"
    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, add_special_tokens=True, split_special_tokens=False):
        rows = [list(text) if split_special_tokens else re.findall("<e>|.", text) for text in texts]
        return {"input_ids": [[11] * add_special_tokens + [
            1 if piece == "<e>" else self.letters.index(piece) for piece in row] for row in rows]}

    def decode(self, ids, clean_up_tokenization_spaces=True):
        text = "".join(self.letters[i] for i in ids)
        return text.replace(" b", "b") if clean_up_tokenization_spaces else text


@pytest.mark.parametrize("texts, limit, expected, hint", [
    (["ab", "b"], 9, [[2, 3, 4, 1], [2, 4, 1]], "a leading space, as in a text; EOS at the end"),
    (["ab", "b"], 4, [[2, 3, 4, 1], [2, 4, 1]], "both fit"),
    (["ab", "b"], 3, [[2, 3, 4], [2, 4, 1]], "a summary that is cut has no EOS: it did not end"),
    ([""], 9, [[2, 1]], "a leading space and EOS"), ([], 9, [], "nothing"),
    (["a", "<e>"], 9, [[2, 3, 1], [2, 8, 7, 9, 1]], "a typed control token is text"),
])
def test_encode_responses(texts, limit, expected, hint):
    assert lm.encode_responses(texts, Letters(), limit) == expected, hint


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_write_summaries(batch_size):
    # What follows each token: c -> a -> space -> b -> \n -> EOS, d -> e -> d, > -> <, and e an EOS
    model = surely([1, 7, 4, 2, 10, 3, 7, 6, 1, 8, 1, 1])
    queries = [[5, 5, 5], [6], [4, 3], [8], [3, 3, 3, 3, 3, 2], [9]]
    texts = lm.write_summaries(model, Letters(), queries, 6, 0., batch_size=batch_size)
    assert texts == ["a b", "ededed", "b", "", "b", "<"], (
        "a text for each query, in its order: up to the first EOS, without outer white space, and "
        "whole where it never ended")
    before, flat = torch.get_rng_state(), table_model([[0.] * 11 + [1.]] * 12)
    drawn = [lm.write_summaries(flat, Letters(), [[5]] * 9, 6, 1., lm.generator_for(seed),
                                batch_size) for seed in (3, 3, 4)]
    assert lm.write_summaries(flat, Letters(), [[5]] * 9, 6, 0.) == ["^" * 6] * 9, "temperature 0"
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 5, "one seed, one result"
    assert torch.equal(torch.get_rng_state(), before), "the global random state was moved"


@pytest.mark.parametrize("schedule, rate, expected, hint", [
    # 1.5 (1 - u / 4) for u = 0 .. 3; 3 (1 + cos(pi s / 4)) / 2 for s = 0 .. 4
    (lm.linear_schedule, 1.5, [1.5, 1.125, .75, .375],
     "the first update has the full rate, the last one 1 / total of it"),
    (lm.cosine_schedule, 3, [3, 2.560660, 1.5, .439340, 0], "half a cosine wave, from 1 to 0")])
def test_schedules(schedule, rate, expected, hint):
    close([rate * schedule(step, 4) for step in range(len(expected))], expected, hint)
