"""engine/adapters.py: which network is which where policy and reference share their frozen weights,
and critic and reward model theirs."""

import copy

import pytest
import torch
from test_lm import CONFIGS, QUERIES, RESPONSES, build, every_architecture, padded

from engine import adapters
from lm import response_log_probs, sample
from ppo import response_values
from reward import RewardModel, final_scores

torch.set_num_threads(1)
IDS, REAL, _, WIDTH = padded(QUERIES, RESPONSES, 1, 1)
ON = REAL[:, -WIDTH:].bool()


def networks(architecture, rank=2):
    """The SFT model and the reward model, copies of both, and what share_trunks makes of them."""
    sft = build(CONFIGS[architecture]())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        reward_model = RewardModel(build(CONFIGS[architecture](), seed=5))
    reward_model.reference_mean.fill_(.4)
    reward_model.requires_grad_(False)  # as ppo.four_networks does first
    before = copy.deepcopy(sft), copy.deepcopy(reward_model)
    with torch.random.fork_rng():
        return before, reward_model, adapters.share_trunks(sft, reward_model, rank, seed=7)


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


@every_architecture
def test_at_the_start_each_pair_is_one_network(architecture):
    (sft, reward_before), reward_model, (policy, reference, critic) = networks(architecture)
    assert torch.equal(numbers(reference), numbers(sft)), "pi_SFT is the policy as it came"
    assert torch.equal(numbers(policy), numbers(sft)), "an adapter starts as zero: ratio 1, KL 0"
    assert torch.equal(scores(critic), scores(reward_before)), "V starts as r, head and mean (3.4)"
    assert torch.equal(scores(reward_model), scores(reward_before))


@every_architecture
def test_training_the_policy_leaves_the_reference(architecture):
    (sft, reward_before), reward_model, (policy, reference, critic) = networks(architecture)
    train(policy, lambda: -response_log_probs(policy, IDS, REAL, WIDTH)[ON].mean())
    assert (numbers(policy) - numbers(sft)).abs().max() > .05, "it learns"
    assert torch.equal(numbers(reference), numbers(sft)), "pi_SFT stays as it was"
    assert torch.equal(scores(critic), scores(reward_before)), "no weight is shared with the critic"
    merged = adapters.merge_adapter(copy.deepcopy(policy))
    assert (numbers(merged) - numbers(policy)).abs().max() < 1e-4, "merged: the trained one"
    assert not adapters.has_adapter(merged) and adapters.has_adapter(policy)


@every_architecture
def test_training_the_critic_leaves_the_reward_model(architecture):
    (sft, before), reward_model, (policy, reference, critic) = networks(architecture)
    head = copy.deepcopy(critic.head)
    train(critic, lambda: (response_values(critic, IDS, REAL, WIDTH)[ON] - 3).square().mean())
    assert (scores(critic) - scores(before)).abs().max() > .05, "it learns"
    assert not torch.equal(critic.head.weight, head.weight), "its head too"
    assert torch.equal(scores(reward_model), scores(before)), (
        "the reward that PPO is paid moves with the critic")
    assert torch.equal(numbers(policy), numbers(sft)), "no weight is shared with the policy"
    assert reward_model.reference_mean == critic.reference_mean == torch.tensor(.4)


def test_two_networks_are_in_memory_instead_of_four():
    _, reward_model, (policy, reference, critic) = networks("gpt_neox")
    kept = {p.data_ptr() for module in (policy, critic) for p in module.parameters()}
    for module in (reference, reward_model.trunk):
        assert {p.data_ptr() for p in module.parameters()} <= kept, "a second copy of the weights"
    assert reward_model.head.weight.data_ptr() != critic.head.weight.data_ptr()
    for module in (policy, critic):
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        assert all("lora" in name or name.startswith("head.") for name in names)
        assert ("head.weight" in names) == ("head.bias" in names) == (module is critic)
    assert not any(p.requires_grad for p in reward_model.head.parameters())


def test_adapters_depend_on_the_seed_alone():
    found = []
    for _ in range(2):
        torch.rand(3)  # the global random state has moved
        _, _, (policy, _, critic) = networks("llama")
        found.append([p for module in (policy, critic) for p in adapters.trainable(module)])
    assert all(torch.equal(p, q) for p, q in zip(*found))


def test_no_gradient_through_the_reference_or_the_reward():
    _, reward_model, (policy, reference, critic) = networks("gpt2")
    assert not response_log_probs(reference, IDS, REAL, WIDTH).requires_grad
    assert not final_scores(reward_model, IDS, REAL, WIDTH).requires_grad
    assert response_log_probs(policy, IDS, REAL, WIDTH).requires_grad
    assert response_values(critic, IDS, REAL, WIDTH).requires_grad


@every_architecture
def test_without_its_adapter_a_model_samples_as_before(architecture):
    sft = build(CONFIGS[architecture]())
    policy = adapters.add_adapter(copy.deepcopy(sft), 2)
    with torch.no_grad():
        for p in adapters.trainable(policy):
            p.add_(.3)
    plain = adapters.WithoutAdapter(policy)
    assert (plain.config, plain.dtype, plain.device) == (policy.config, sft.dtype, sft.device)
    ids, mask, _, _ = padded(QUERIES, [[]] * 4)
    settings = {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0}
    texts = [sample(model, ids, mask, 6, **settings) for model in (sft, plain, policy)]
    assert torch.equal(texts[0], texts[1])
    assert texts[2].shape != texts[0].shape or not torch.equal(texts[2], texts[0])
    assert (numbers(policy) - numbers(sft)).abs().max() > .05, "afterwards the adapter is on again"
    with pytest.raises(ZeroDivisionError):  # also after an error within
        plain(input_ids=1 / 0)
    with pytest.raises(Exception):
        plain(input_ids="no ids")
    assert (numbers(policy) - numbers(sft)).abs().max() > .05
    assert torch.equal(numbers(plain), numbers(sft))
