"""engine/adapters.py: several networks on one frozen model, each with an adapter of its own."""

import copy
from types import SimpleNamespace

import pytest
import torch
from common import (ARCHITECTURES, CONFIGS, QUERIES, RESPONSES, build, byte_level, config, new_run,
                    padded, two_architectures, weights)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig
from transformers.pytorch_utils import Conv1D

import lm
from engine import adapters, main, ppo
from engine.checkpoints import flatten, put_back
from engine.devices import prepare
from engine.packing import response_log_probs
from engine.ppo import other_networks, response_values
from engine.reward import RewardModel, final_scores
from engine.sampling import sample
from engine.settings import SettingError
from engine.texts import encode
from lm import generator_for

IDS, REAL, _, WIDTH = padded(QUERIES, RESPONSES, 1, 1)
ON = REAL[:, -WIDTH:].bool()


def networks(architecture, rank=2, trained=.1):
    """The SFT model as it came; and, on its frozen weights: the policy, its reference, the reward
    model and its critic. trained: how far SFT and reward training have moved their adapters."""
    sft = build(CONFIGS[architecture]())
    before = copy.deepcopy(sft)
    with torch.random.fork_rng():
        policy = adapters.add_adapter(sft, rank, seed=7)
        move(policy, trained)
        torch.manual_seed(1)
        reward_model = RewardModel(policy)
        move(reward_model, trained)
    reward_model.reference_mean.fill_(.4)
    then = numbers(policy), scores(reward_model)
    reference, critic = other_networks(policy, reward_model, None, config())
    return before, then, policy, reference, reward_model, critic


def move(model, distance):
    with torch.no_grad():
        for i, p in enumerate(adapters.trainable(model)):
            p.add_(distance * torch.sin(torch.arange(p.numel()) + i).view_as(p))


@torch.no_grad()
def numbers(language_model):
    return response_log_probs(language_model, IDS, REAL, WIDTH)[ON]


@torch.no_grad()
def scores(reward_model):
    return torch.cat([reward_model.score(IDS, REAL), final_scores(reward_model, IDS, REAL, WIDTH),
                      response_values(reward_model, IDS, REAL, WIDTH)[ON]])


def train(model, loss, steps=3):
    optimizer = torch.optim.Adam(adapters.trainable(model), lr=.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@two_architectures
def test_an_adapter_starts_as_nothing(architecture):
    sft, _, policy, *_ = networks(architecture, trained=0)
    assert torch.equal(numbers(policy), numbers(sft)), "W x + B A x, with B = 0"


@two_architectures
def test_at_the_start_each_pair_is_one_network(architecture):
    sft, (log_probs, rewards), policy, reference, reward_model, critic = networks(architecture)
    assert (log_probs - numbers(sft)).abs().max() > .01, "SFT has trained its adapter"
    for network in (policy, reference, policy):
        assert torch.equal(numbers(network), log_probs), "pi_SFT is the policy as it came"
    for network in (critic, reward_model, critic):
        assert torch.equal(scores(network), rewards), "V starts as r, head and mean (3.4)"


def test_the_reward_model_starts_from_the_trained_adapter():
    with torch.random.fork_rng():
        policy = adapters.add_adapter(build(CONFIGS["llama"]()), 2, seed=7)
        move(policy, .1)
        hidden = RewardModel(policy).trunk(input_ids=IDS, attention_mask=REAL).last_hidden_state
    expected = policy.base_model(input_ids=IDS, attention_mask=REAL).last_hidden_state
    assert torch.equal(expected, hidden)


@two_architectures
def test_training_one_network_leaves_the_others(architecture):
    sft, (log_probs, rewards), policy, reference, reward_model, critic = networks(architecture)
    train(policy, lambda: -response_log_probs(policy, IDS, REAL, WIDTH)[ON].mean())
    moved = numbers(policy)
    assert (moved - log_probs).abs().max() > .05, "it learns"
    assert torch.equal(numbers(reference), log_probs), "pi_SFT stays as it was"
    assert torch.equal(scores(critic), rewards), "no weight is shared with the critic"
    train(critic, lambda: (response_values(critic, IDS, REAL, WIDTH)[ON] - 3).square().mean())
    assert (scores(critic) - rewards).abs().max() > .05, "it learns"
    assert torch.equal(scores(reward_model), rewards), (
        "the reward that PPO is paid moves with the critic")
    assert torch.equal(numbers(policy), moved), "no weight is shared with the policy"
    assert reward_model.reference_mean == critic.reference_mean == torch.tensor(.4)
    frozen = policy.state_dict()
    assert all(torch.equal(frozen[name], p) for name, p in sft.state_dict().items()), (
        "the shared weights are frozen")


def test_one_model_is_in_memory_for_four():
    _, _, *four = networks("gpt_neox")
    shared, own = ([{name.removeprefix("gpt_neox.").removeprefix("trunk."): p.data_ptr()
                     for name, p in network.named_parameters()
                     if ("lora_" in name or name.startswith("head.")) == mine} for network in four]
                   for mine in (False, True))
    assert shared[0] == shared[1] and shared[2] == shared[3]
    assert shared[2].items() < shared[0].items(), "another copy of the weights"
    places = [place for network in own for place in network.values()]
    assert len(set(places)) == len(places), "an adapter or a head that two networks have"
    policy, critic = four[0], four[3]
    names = [[name for name, _ in adapters.trainable_named(m)] for m in (policy, critic)]
    assert len(names[0]) == len(names[1]) - 2 and names[1][-2:] == ["head.weight", "head.bias"]
    assert all(name.endswith((".lora_A", ".lora_B")) for name in names[0] + names[1][:-2])


def test_adapters_depend_on_the_seed_alone():
    found = []
    for _ in range(2):
        torch.rand(3)  # the global random state has moved
        _, _, policy, _, _, critic = networks("llama")
        found.append([p for module in (policy, critic) for p in adapters.trainable(module)])
    assert all(torch.equal(p, q) for p, q in zip(*found))


def test_gradients_go_to_the_network_that_was_asked_and_to_no_other():
    _, _, policy, reference, reward_model, critic = networks("gpt2")
    numbers(reference), scores(reward_model), scores(critic)  # others were asked before
    response_log_probs(policy, IDS, REAL, WIDTH)[ON].sum().backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in adapters.trainable_named(policy)}
    assert all(p.grad is None for p in critic.head.parameters())
    policy.zero_grad()
    response_values(critic, IDS, REAL, WIDTH)[ON].sum().backward()
    with_gradient = {name for name, p in critic.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in adapters.trainable_named(critic)}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_frozen_network_keeps_no_gradients_of_its_training(rank):
    """They would be as large as its weights, through all of PPO."""
    policy = build(CONFIGS["llama"]())
    reward_model = RewardModel(adapters.add_adapter(policy, rank, seed=7) if rank else policy)
    for p in adapters.trainable(reward_model):
        p.grad = torch.ones_like(p)
    critic = other_networks(policy, reward_model, None, config())[1] if not rank else None
    adapters.freeze(reward_model)
    assert all(p.grad is None for p in reward_model.parameters())
    assert critic is None or all(p.grad is None for p in critic.parameters())


def test_layers_that_are_computed_twice_ask_for_no_gradient_of_frozen_embeddings():
    """A gradient that nobody reads, of the size of a layer's input; ours are the same without."""
    found = []
    for twice in (False, True):
        policy = adapters.add_adapter(build(CONFIGS["llama"]()), 2, seed=7)
        move(policy, .1)
        if twice:
            adapters.checkpoint_activations(policy)
        policy.get_input_embeddings().register_forward_hook(
            lambda module, _, output: found.append(output.requires_grad))
        response_log_probs(policy, IDS, REAL, WIDTH)[ON].sum().backward()
        found.append([p.grad for p in adapters.trainable(policy)])
    once, expected, again, got = found
    assert not once and not again
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@two_architectures
def test_what_is_saved_scores_as_what_was_trained(architecture, dtype, tmp_path):
    """Merged in float32: a plain model without a trace of an adapter."""
    with torch.random.fork_rng():
        policy = adapters.add_adapter(build(CONFIGS[architecture]()).to(dtype), 2, seed=7)
        move(policy, .1)
        torch.manual_seed(1)
        reward_model = RewardModel(policy)
        move(reward_model, .1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        ours, paid = numbers(policy), scores(reward_model)
    adapters.save_plain(policy, tmp_path / "policy")
    (tmp_path / "reward").mkdir()
    reward_model.save_pretrained(tmp_path / "reward")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert loaded.dtype == torch.float32 and not any("lora" in name for name in loaded.state_dict())
    # an update rounded to bfloat16 would be off by much more than what half precision itself is
    near = 1e-3 if dtype == torch.float32 else .08
    assert (numbers(loaded) - ours).abs().max() < near
    assert (scores(RewardModel.from_pretrained(tmp_path / "reward")) - paid).abs().max() < near
    # W + 2 B A by hand (alpha / r = 2), in float32, for one matrix
    name, layer = next((name, module) for name, module in policy.named_modules()
                       if hasattr(module, "lora_A"))
    delta = 2 * (layer.lora_B @ layer.lora_A).detach()
    weight = loaded.state_dict()[f"{name}.weight"] - layer.weight.float()
    assert torch.allclose(weight, delta.T if architecture == "gpt2" else delta, atol=1e-6)


def test_checkpoints_hold_each_networks_own_weights():
    _, _, policy, _, _, critic = networks("llama")
    saved = {name: x.clone() for name, x in flatten({"policy": policy, "critic": critic}).items()}
    assert sorted(name.split("/")[0] for name in saved).count("critic") == len(
        adapters.trainable(critic))
    ours, theirs = numbers(policy), scores(critic)
    move(policy, .3), move(critic, .3)
    put_back({"policy": policy, "critic": critic}, saved)
    assert torch.equal(numbers(policy), ours) and torch.equal(scores(critic), theirs)


def test_a_layer_that_is_computed_around_takes_no_adapter():
    """Mamba multiplies by the weight of a layer that it never calls."""
    model = build(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(SettingError, match="mamba can't be trained by adapters.*--lora_rank 0"):
        adapters.add_adapter(model, 2, seed=0)


@two_architectures
def test_a_network_samples_through_its_own_adapter(architecture):
    sft, _, policy, reference, *_ = networks(architecture, trained=0)
    move(policy, .3)
    ids, mask, _, _ = padded(QUERIES, [[]] * 4)
    settings = {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0}
    texts = [sample(model, ids, mask, 6, **settings) for model in (sft, reference, policy)]
    assert torch.equal(texts[0], texts[1])
    assert texts[2].shape != texts[0].shape or not torch.equal(texts[2], texts[0])
    assert (reference.config, reference.dtype, reference.device) == (
        policy.config, sft.dtype, sft.device)


# ---------------------------------------------------------------------------- in the loops

POSTS = [[3, 4, 5, 6], [7], [5, 8], [2, 2, 3]]  # twelve tokens, EOS = 9


def make(architecture):
    return build(ARCHITECTURES[architecture](), 3)


@two_architectures
def test_adapters_are_on_every_matrix_but_the_one_that_makes_the_logits(architecture):
    plain = make(architecture)
    matrices = {key: module.weight.shape for key, module in plain.named_modules()
                if isinstance(module, (torch.nn.Linear, Conv1D))
                and module is not plain.get_output_embeddings()}
    policy = adapters.add_adapter(make(architecture), 3, 0)
    assert matrices.keys() == {key for key, module in policy.named_modules()
                               if hasattr(module, "lora_A")}
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in adapters.trainable(policy)) == sum(
        3 * (rows + columns) for rows, columns in matrices.values())


@two_architectures
@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ppo_with_adapters(architecture, checkpoint, tmp_path, monkeypatch):
    """Four networks on one frozen model, which stays; what is saved is what was trained."""
    sft = make(architecture)
    as_trained = RewardModel(sft)
    as_trained.reference_mean.fill_(0.4)
    policy = adapters.add_adapter(copy.deepcopy(sft), 2, 0)
    reward_model = RewardModel(policy)
    reward_model.head.load_state_dict(as_trained.head.state_dict())
    reward_model.reference_mean.fill_(0.4)
    seen = []

    def rollout(network, reference, reward_model, critic, *rest):
        (part,) = batch = ppo_rollout(network, reference, reward_model, critic, *rest)
        ids, mask, width = part.inputs
        real = part.mask
        with torch.no_grad():
            oracle = response_log_probs(sft, ids, mask, width)[real]
            scores = as_trained.score(ids, mask)
        assert torch.allclose(part.ref_log_probs[real], oracle, atol=1e-5), "reference moved"
        assert part.ended.any(), "nothing to compare"
        assert torch.allclose(part.scores[part.ended], scores[part.ended], atol=1e-5), (
            "reward moved")
        seen.append((part.log_probs[real] - oracle).abs().max().item())
        if len(seen) == 1:
            with torch.no_grad():
                values = response_values(as_trained, ids, mask, width)[real]
            assert torch.allclose(part.values[real], values, atol=1e-5), "critic starts as r"
        return batch

    ppo_rollout = ppo.rollout
    monkeypatch.setattr(ppo, "rollout", rollout)
    critic = ppo.train_ppo(new_run(tmp_path / "run"), policy, reward_model, POSTS,
                           SimpleNamespace(eos_token_id=9, pad_token_id=9),
                           config(lora_rank=2, checkpoint_activations=checkpoint, ppo_episodes=16,
                                  ppo_batch_size=8, ppo_lr=2e-2, ppo_epochs=2, response_length=5))
    assert seen[0] < 1e-5 < 1e-3 < seen[-1], "ratio 1 at the start, and a policy that then moves"

    assert critic.head is not reward_model.head
    head = as_trained.head.state_dict()
    assert all(torch.equal(head[key], value)
               for key, value in reward_model.head.state_dict().items())
    assert not torch.equal(critic.head.weight, reward_model.head.weight)
    assert not any(weight.requires_grad for weight in reward_model.head.parameters())
    frozen = {key: value for key, value in critic.trunk.state_dict().items() if "lora_" not in key}
    assert frozen.keys() == as_trained.trunk.state_dict().keys()
    assert all(torch.equal(value, frozen[key])
               for key, value in as_trained.trunk.state_dict().items())

    # merged and loaded again: no trace of an adapter, the same numbers
    ids, mask, _ = lm.join(POSTS, [[1, 9], [9], [4, 4, 9], [6]], 9)
    real = mask.bool()
    adapters.save_plain(policy, tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert type(loaded) is type(sft) and loaded.state_dict().keys() == sft.state_dict().keys()
    with torch.no_grad():
        logits = [m(input_ids=ids, attention_mask=mask,
                    position_ids=lm.get_position_ids(mask)).logits[real]
                  for m in (policy, loaded, sft)]
        assert (logits[0] - logits[1]).abs().max() < 1e-4
        assert (logits[0] - logits[2]).abs().max() > 1e-3
        (tmp_path / "critic").mkdir()
        critic.save_pretrained(tmp_path / "critic")
        assert len(adapters.trainable(critic)) == len(adapters.trainable(policy)) + 2, (
            "what is merged is a copy")
        saved = load_file(tmp_path / "critic" / "model.safetensors")
        assert not any("lora" in key for key in saved)
        values = RewardModel.from_pretrained(tmp_path / "critic")(ids, mask)[real]
        assert torch.allclose(values, critic(ids, mask)[real], atol=1e-5)
        assert (values - as_trained(ids, mask)[real]).abs().max() > 1e-3


@two_architectures
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_checkpointed_activations_change_no_value_and_no_gradient(architecture, lora_rank):
    ids, mask, width = lm.join(POSTS, [[1, 9], [9], [4, 4, 9], [6]], 9)
    found = []
    for checkpoint in (False, True):
        model = make(architecture)
        network = adapters.add_adapter(model, lora_rank, 0) if lora_rank else model
        for key, weight in network.named_parameters():
            if "lora_B" in key:  # zero at the start, when A has no gradient
                torch.nn.init.normal_(weight, std=0.1, generator=generator_for(0, key))
            if "lora_A" in key:
                torch.nn.init.normal_(weight, std=0.1, generator=generator_for(1, key))
        network.double()
        if checkpoint:
            adapters.checkpoint_activations(model)
        runs = []
        layers = [m for m in model.modules() if isinstance(m, adapters.GradientCheckpointingLayer)]
        next(layers[0].children()).register_forward_hook(lambda *_: runs.append(layers[0].training))
        before = sample(model, ids[:, :width], mask[:, :width], 3, eos_token_id=9,
                           pad_token_id=9, temperature=0)
        n_sampling = len(runs)
        loss = lm.masked_mean(response_log_probs(network, ids, mask, ids.shape[1] - width),
                              mask[:, width:])
        n_forward = len(runs)
        loss.backward()
        assert n_sampling == before.shape[1] and n_forward == n_sampling + 1
        assert not any(runs[:n_sampling]), "sampling would lose its cache"
        assert len(runs) - n_forward == checkpoint, "computed again in the backward pass, or not"
        gradient = torch.cat([p.grad.flatten() for p in adapters.trainable(network)])
        found.append((before, loss, gradient))
    (samples, loss, gradient), (samples2, loss2, gradient2) = found
    assert torch.equal(samples, samples2)
    assert loss.item() == pytest.approx(loss2.item(), rel=1e-10)
    assert gradient.abs().max() > 0
    assert (gradient - gradient2).abs().max() <= 1e-10 * gradient.abs().max()


@two_architectures
def test_a_reward_model_with_adapters(architecture, tmp_path):
    """Trained with an adapter: normalised, and saved merged, with its reference_mean."""
    tokenizer = byte_level("my dog", ["<|endoftext|>"], 284, eos_token="<|endoftext|>",
                           pad_token="<|endoftext|>")
    sizes = ARCHITECTURES[architecture]()
    sizes.vocab_size, sizes.max_position_embeddings = len(tokenizer), 256
    plain = build(sizes, 3)
    before = weights(plain)
    sft = adapters.add_adapter(plain, 2, 0)
    some = SimpleNamespace(**{**vars(main.parse([])), "lora_rank": 2, "reward_lr": 1e-2,
                              "checkpoint_activations": True, "reward_batch_size": 4})
    posts = [{"post": f"my dog {i}", "summary": "dog " * i} for i in range(1, 6)]
    references = [post["summary"] for post in posts]
    pairs = [([5, 6, 7], [8, i + 9, 0], [7, 0]) for i in range(16)]
    trained = main.make_reward_model(
        new_run(tmp_path / "run"), some, pairs,
        *encode(posts, references, tokenizer, some), tokenizer, sft, None)
    assert all(torch.equal(before[key], value)
               for key, value in adapters.plain_weights(sft).items()), "SFT moved"
    merged, plain = (adapters.plain_weights(trunk) for trunk in (trained.trunk, sft.base_model))
    assert merged.keys() == plain.keys()
    assert any(not torch.equal(merged[key], plain[key]) for key in merged), "it learned nothing"
    sides = [torch.tensor([[*query, *summary] for query, *both in pairs
                           for summary in both[side:][:1]]) for side in (0, 1)]
    with torch.no_grad():
        chosen, rejected = (trained.score(ids, torch.ones_like(ids)) for ids in sides)
    assert (chosen > rejected).all()
    rewards = main.score(tokenizer, some, trained, posts, references)
    assert abs(sum(rewards) / 5) < 1e-5 < abs(trained.reference_mean)
    loaded = RewardModel.from_pretrained(tmp_path / "run" / "reward_model")
    with torch.no_grad():
        again = loaded.score(sides[0], torch.ones_like(sides[0]))
    assert (again - chosen).abs().max() < 1e-4
    assert loaded.reference_mean == trained.reference_mean


# ---------------------------------------------------------------------------- half precision


@two_architectures
def test_a_prepared_model_is_the_same_function(architecture):
    plain = build(CONFIGS[architecture]())
    ours = prepare(copy.deepcopy(plain))
    assert (numbers(ours) - numbers(plain)).abs().max() < 1e-5
    assert ours.state_dict().keys() == plain.state_dict().keys()
    if architecture in ("gpt2", "gptj"):
        assert any(isinstance(m, torch.nn.GELU) and m.approximate == "tanh" for m in ours.modules())


def test_logits_are_made_in_float32():
    model = prepare(build(CONFIGS["llama"]())).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=IDS, attention_mask=REAL).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float()), "three digits only"
