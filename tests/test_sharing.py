"""Each token once: what is shared, trimmed or split must change no value and no gradient."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config

import lm
import ppo
from reward import RewardModel

torch.set_num_threads(1)
ARCHITECTURES = {
    "gpt2": GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gptj": GPTJConfig(vocab_size=12, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2,
                              num_attention_heads=2, intermediate_size=32),
    "llama": LlamaConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=32),
    "qwen2": Qwen2Config(vocab_size=12, hidden_size=16, num_hidden_layers=2, intermediate_size=32,
                         num_attention_heads=2, num_key_value_heads=1),
}
# Three posts of unequal length, three summaries each: ended at once, late, never
QUERIES = [[3, 4, 5, 6], [7], [5, 8]]
RESPONSES = [[1, 9], [2, 2, 4, 9], [9], [4, 4, 4, 4], [3, 9], [8, 8, 9], [6, 6, 6, 9], [9], [2, 9]]
K, EOS, PAD = 3, 9, 0


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]).double().eval()
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
    shared = lm.response_log_probs(model, ids, mask, width, 0.7, K)[real]
    plain = alone(lambda *inputs: lm.response_log_probs(model, *inputs, 0.7), ids, mask, width)[real]
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
    close(critic.score(ids, mask, width, K), torch.cat(one_by_one), 1e-10 if exact else 1e-6)


def test_what_a_summary_may_see():
    # post (pad, a), two summaries of two tokens: by hand, row by row
    inputs = lm.pack(torch.tensor([[0, 5, 1, 2], [0, 5, 3, 4]]),
                     torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]), 2, 2)
    assert inputs["input_ids"].tolist() == [[0, 5, 1, 2, 3, 4]]
    assert inputs["position_ids"].tolist() == [[0, 0, 1, 2, 1, 1]]  # the last one is padding
    sees = (inputs["attention_mask"] == 0).long()
    assert sees.tolist() == [[[[1, 0, 0, 0, 0, 0],
                               [0, 1, 0, 0, 0, 0],
                               [0, 1, 1, 0, 0, 0],
                               [0, 1, 1, 1, 0, 0],
                               [0, 1, 0, 0, 1, 0],
                               [0, 1, 0, 0, 1, 1]]]]


def test_unpack_gives_each_summary_the_posts_last_place_and_its_own():
    assert lm.unpack(torch.arange(7)[None], 3, 2).tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    deep = torch.arange(14.0).reshape(1, 7, 2)
    assert torch.equal(lm.unpack(deep, 3, 2)[1], deep[0, [0, 4, 5, 6]])


def test_trim_drops_only_what_is_padding_in_every_row():
    ids = torch.tensor([[0, 0, 4, 1, 9, 0], [0, 3, 4, 9, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]])
    trimmed, real, width = lm.trim(ids, mask, 3)
    assert trimmed.tolist() == [[0, 4, 1, 9], [3, 4, 9, 0]] and width == 2
    assert real.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert [x if isinstance(x, int) else x.tolist() for x in lm.trim(trimmed, real, 2)] == [
        trimmed.tolist(), real.tolist(), 2], "nothing to trim"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_k_samples_of_a_post_are_those_of_k_equal_rows(model, temperature):
    model = model.float()
    ids, mask = lm.pad(QUERIES, PAD, left=True)
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "temperature": temperature}
    shared = lm.sample(model, ids, mask, 8, **settings, generator=lm.generator_for(1), k=K)
    plain = lm.sample(model, ids.repeat_interleave(K, 0), mask.repeat_interleave(K, 0), 8,
                      **settings, generator=lm.generator_for(1))
    assert torch.equal(shared, plain)
    if temperature:
        assert len({tuple(row) for row in shared[:K].tolist()}) > 1, "k different samples"


@pytest.mark.parametrize("changes", [
    {"micro_batch_size": 3}, {"micro_batch_size": 7}, {"rollout_batch_size": 6},
    {"micro_batch_size": 4, "rollout_batch_size": 3}])
def test_a_whole_update_is_the_same_however_it_is_split(changes, tmp_path, monkeypatch):
    """Gradients of the first policy and critic step, on given summaries."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["gpt_neox"]).double().eval()
    reward_model = RewardModel(model).double()
    by_query = {tuple(q): RESPONSES[K * i : K * i + K] for i, q in enumerate(QUERIES)}

    def given(model, ids, mask, *_, k, **settings):
        chosen = [y for row, real in zip(ids, mask.bool()) for y in by_query[tuple(row[real].tolist())]]
        return lm.pad(chosen, PAD, left=False)[0]

    def first_step(k, queries, **settings):
        found = []

        def keep(optimizer, losses, *rest):
            for loss in losses:
                loss.backward()
            found.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups
                                    for p in g["params"] if p.grad is not None]))
            optimizer.zero_grad()

        fields = {**vars(ppo.PPOConfig()), **vars(lm.ModelConfig()), "ppo_batch_size": 9,
                  "ppo_episodes": 9, "ppo_epochs": 1, "return_sequences": k, "response_length": 4}
        run = SimpleNamespace(seed=0, steps=lambda *_, **__: [0], log=lambda *_, **m: found.append(m),
                              history=lambda stage: [{"kl_per_summary": 0, "length": 1,
                                                      "entropy": 1}])
        monkeypatch.setattr(ppo, "update", keep)
        monkeypatch.setattr(ppo, "sample", given if k > 1 else given_one)
        ppo.train_ppo(run, copy.deepcopy(model), copy.deepcopy(reward_model), queries,
                      SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD),
                      SimpleNamespace(**{**fields, **settings}))
        return found

    left = {q: list(ys) for q, ys in by_query.items()}

    def given_one(model, ids, mask, *_, k, **settings):
        return lm.pad([left[tuple(row[real].tolist())].pop(0)
                       for row, real in zip(ids, mask.bool())], PAD, left=False)[0]

    plain = first_step(1, [q for q in QUERIES for _ in range(K)])  # nothing shared, nothing split
    split = first_step(K, QUERIES, **changes)
    for a, b in zip(split[:2], plain[:2]):
        close(a, b, 1e-9)
    for name in ("reward", "kl_per_summary", "length", "entropy", "policy_loss", "value_loss",
                 "policy_clip_fraction", "value_clip_fraction", "ended"):
        assert split[2][name] == pytest.approx(plain[2][name], rel=1e-5, abs=1e-6), name
