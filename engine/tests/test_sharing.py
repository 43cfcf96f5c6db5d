"""Each token once: what is shared, cut or split must change no value and no gradient."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from common import ARCHITECTURES, build

import lm
from engine import packing, ppo, sampling
from engine.packing import pack, unpack
from engine.reward import RewardModel, final_scores
from engine.settings import ModelConfig
from lm import generator_for
from ppo import PPOConfig

# Three posts of unequal length, three summaries each: ended at once, late, never
QUERIES = [[3, 4, 5, 6], [7], [5, 8]]
RESPONSES = [[1, 9], [2, 2, 4, 9], [9], [4, 4, 4, 4], [3, 9], [8, 8, 9], [6, 6, 6, 9], [9], [2, 9]]
K, EOS, PAD = 3, 9, 0
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def settings(**changes):
    """Those of one update of one pass over the nine summaries."""
    fields = {**vars(PPOConfig()), **vars(ModelConfig()), "ppo_batch_size": 9,
              "ppo_episodes": 9, "ppo_epochs": 1, "return_sequences": K, "response_length": 4}
    return SimpleNamespace(**{**fields, **changes})


def summaries():
    return [RESPONSES[K * i : K * i + K] for i in range(len(QUERIES))]


def given_by_query(model, ids, mask, *_, k, **settings):
    """In place of sampling.sample: the summaries above of each query."""
    by_query = {tuple(q): ys for q, ys in zip(QUERIES, summaries())}
    rows = [by_query[tuple(row[real].tolist())] for row, real in zip(ids, mask.bool())]
    return lm.pad([y for ys in rows for y in ys], PAD, left=False)[0]


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    torch.manual_seed(3)
    made = build(ARCHITECTURES[request.param](), 3).double().eval()
    return made


def rows():
    ids, mask, width = lm.join([q for q in QUERIES for _ in range(K)], RESPONSES, PAD)
    return ids, mask, ids.shape[1] - width


def alone(compute, ids, mask, width):
    """compute on each row by itself, without any padding: the slow oracle."""
    results = torch.zeros(len(ids), width, dtype=torch.float64)
    for i, (row, real) in enumerate(zip(ids, mask.bool())):
        n = int(real[-width:].sum())
        results[i, :n] = compute(row[real][None], torch.ones_like(row[real])[None], n)[0]
    return results


def gradients(value, module):
    module.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def close(a, b, relative=1e-10):
    assert (a - b).abs().max() <= relative * b.abs().max(), (a - b).abs().max() / b.abs().max()


def test_log_probs_of_k_summaries_are_those_of_each_alone(model):
    ids, mask, width = rows()
    real = mask[:, -width:].bool()
    weights = torch.arange(1.0, real.sum() + 1, dtype=torch.float64)  # no two tokens count the same
    shared = packing.response_log_probs(model, ids, mask, width, 0.7, K)[real]
    plain = alone(lambda *inputs: packing.response_log_probs(model, *inputs, 0.7), ids, mask, width)
    plain = plain[real]
    # GPT-J's sines, and the norms of Llama and Qwen2, are float32 inside transformers
    exact = model.config.model_type in ("gpt2", "gpt_neox")
    close(shared, plain, 1e-10 if exact else 1e-8)
    close(gradients((shared * weights).sum(), model), gradients((plain * weights).sum(), model),
          1e-10 if exact else 1e-6)


def test_values_and_scores_of_k_summaries_are_those_of_each_alone(model):
    critic = RewardModel(model).double()
    critic.reference_mean.fill_(0.3)
    ids, mask, width = rows()
    real = mask[:, -width:].bool()
    exact = model.config.model_type in ("gpt2", "gpt_neox")
    shared = ppo.response_values(critic, ids, mask, width, K)[real]
    plain = alone(lambda *inputs: ppo.response_values(critic, *inputs), ids, mask, width)[real]
    close(shared, plain, 1e-10 if exact else 1e-6)
    weights = torch.arange(1.0, real.sum() + 1, dtype=torch.float64)
    close(gradients((shared * weights).sum(), critic), gradients((plain * weights).sum(), critic),
          1e-10 if exact else 1e-6)
    one_by_one = [critic.score(row[r.bool()][None], r[r.bool()][None]) for row, r in zip(ids, mask)]
    scores = final_scores(critic, ids, mask, width, K)
    close(scores, torch.cat(one_by_one), 1e-10 if exact else 1e-6)


def test_what_a_summary_may_see():
    # post (pad, a), two summaries of two tokens: by hand, row by row
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]])
    inputs = pack(torch.tensor([[0, 5, 1, 2], [0, 5, 3, 4]]), mask, lm.get_position_ids(mask), 2, 2,
                  torch.float64)
    assert inputs["input_ids"].tolist() == [[0, 5, 1, 2, 3, 4]]
    assert inputs["position_ids"].tolist() == [[0, 0, 1, 2, 1, 1]]  # the last one is padding
    bias = inputs["attention_mask"]  # added to the attention scores
    assert bias.dtype == torch.float64 and set(bias.unique().tolist()) == {
        0, torch.finfo(torch.float64).min}, "in the model's own precision: 0, or as good as -inf"
    sees = (bias == 0).long()
    assert sees.tolist() == [[[[1, 0, 0, 0, 0, 0],
                               [0, 1, 0, 0, 0, 0],
                               [0, 1, 1, 0, 0, 0],
                               [0, 1, 1, 1, 0, 0],
                               [0, 1, 0, 0, 1, 0],
                               [0, 1, 0, 0, 1, 1]]]]


def test_one_summary_of_a_post_is_read_in_the_plain_form():
    ids, mask = torch.tensor([[0, 5, 1, 2]]), torch.tensor([[0, 1, 1, 1]])
    inputs = pack(ids, mask, lm.get_position_ids(mask), 2, 1)
    assert {name: x.tolist() for name, x in inputs.items()} == {
        "input_ids": [[0, 5, 1, 2]], "attention_mask": [[0, 1, 1, 1]],
        "position_ids": [[0, 0, 1, 2]]}
    x = torch.arange(6.).view(2, 3)
    assert torch.equal(unpack(x, 2, 1), x)


def test_unpack_gives_each_summary_the_posts_last_place_and_its_own():
    assert unpack(torch.arange(7)[None], 3, 2).tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    deep = torch.arange(14.0).reshape(1, 7, 2)
    assert torch.equal(unpack(deep, 3, 2)[1], deep[0, [0, 4, 5, 6]])


@pytest.mark.parametrize("micro_batch_size", [0, 3, 6])
def test_a_microbatch_has_no_column_that_is_padding_in_every_row(micro_batch_size, monkeypatch):
    torch.manual_seed(3)
    model = build(ARCHITECTURES["gpt_neox"](), 3).eval()
    monkeypatch.setattr(sampling, "sample", given_by_query)
    reward_model = RewardModel(model)
    batch = ppo.rollout(model, model, reward_model, reward_model, QUERIES, TOKENIZER,
                        settings(micro_batch_size=micro_batch_size), None)
    # posts of 4, 1 and 2 tokens; their summaries have 7, 9 and 7: in order 5 + 4, 2 + 4, 4 + 4
    shapes = {0: [(9, 8, 4)], 3: [(3, 6, 4), (3, 5, 4), (3, 8, 4)], 6: [(6, 6, 4), (3, 8, 4)]}
    assert [(*part.input_ids.shape, part.mask.shape[1]) for part in batch] == shapes[
        micro_batch_size]
    for part in batch:
        assert part.attention_mask.any(0).all(), "no wider than its longest post and summary"
        ids, mask, width = part.inputs
        assert ids is part.input_ids and mask is part.attention_mask
        assert torch.equal(part.mask, mask[:, -width:].bool()), "a real token is an action"
        assert (part.input_ids[mask == 0] == PAD).all()
        for x in (part.log_probs, part.ref_log_probs, part.values, part.rewards, part.advantages,
                  part.returns):
            assert x.shape == part.mask.shape
        for x in (part.post, part.ended, part.scores, part.kl):
            assert x.shape == part.mask.shape[:1]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_k_samples_of_a_post_are_those_of_k_equal_rows(model, temperature):
    model = model.float()
    ids, mask = lm.pad(QUERIES, PAD, left=True)
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "temperature": temperature}
    shared = sampling.sample(model, ids, mask, 8, **settings, generator=generator_for(1), k=K)
    plain = sampling.sample(model, ids.repeat_interleave(K, 0), mask.repeat_interleave(K, 0), 8,
                      **settings, generator=generator_for(1))
    assert torch.equal(shared, plain)
    if temperature:
        assert len({tuple(row) for row in shared[:K].tolist()}) > 1, "k different samples"


@pytest.mark.parametrize("changes", [
    {"micro_batch_size": 3}, {"micro_batch_size": 7}, {"rollout_batch_size": 6},
    {"micro_batch_size": 4, "rollout_batch_size": 3}])
def test_a_whole_update_is_the_same_however_it_is_split(changes, tmp_path, monkeypatch):
    """Gradients of the first policy and critic step, on given summaries."""
    torch.manual_seed(3)
    model = build(ARCHITECTURES["gpt_neox"](), 3).double().eval()
    reward_model = RewardModel(model).double()

    def first_step(k, queries, sample, **changes):
        gradients_of, metrics = [], []

        @contextmanager
        def keep(optimizer, *_):
            optimizer.zero_grad()
            yield SimpleNamespace(add=lambda loss: loss.backward())
            gradients_of.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups
                                           for p in g["params"] if p.grad is not None]))

        run = SimpleNamespace(seed=0, steps=lambda *_, **__: [0],
                              log=lambda *_, **named: metrics.append(named),
                              history=lambda stage: [{"kl_per_summary": 0, "length": 1,
                                                      "entropy": 1}])
        monkeypatch.setattr(ppo, "one_step", keep)
        monkeypatch.setattr(sampling, "sample", sample)
        ppo.train_ppo(run, copy.deepcopy(model), copy.deepcopy(reward_model), queries, TOKENIZER,
                      settings(return_sequences=k, **changes))
        (policy, critic), (metrics,) = gradients_of, metrics
        return policy, critic, metrics

    left = {tuple(q): list(ys) for q, ys in zip(QUERIES, summaries())}

    def one_by_one(model, ids, mask, *_, k, **settings):
        return lm.pad([left[tuple(row[real].tolist())].pop(0)
                       for row, real in zip(ids, mask.bool())], PAD, left=False)[0]

    # nothing shared, nothing split
    plain = first_step(1, [q for q in QUERIES for _ in range(K)], one_by_one)
    assert not any(left.values()), "each summary was used once"
    split = first_step(K, QUERIES, given_by_query, **changes)
    for a, b in zip(split[:2], plain[:2]):
        close(a, b, 1e-9)
    for name in ("reward", "kl_per_summary", "length", "entropy", "policy_loss", "value_loss",
                 "policy_clip_fraction", "value_clip_fraction", "ended"):
        assert split[2][name] == pytest.approx(plain[2][name], rel=1e-5, abs=1e-6), name
