"""What came after: RLOO's advantage and DPO's loss with a pencil, and that both train."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import contrast
import ppo
import toy
from lm import encode_responses, get_position_ids, join
from reward import RewardModel
from tldr import encode_prompts


def test_rloo_advantages_by_hand():
    """Post one: 1, 2, 6 against the means 4, 3.5, 1.5 of the others; post two: 0, 3, -3."""
    rewards = torch.tensor([1.0, 2, 6, 0, 3, -3])
    assert contrast.rloo_advantages(rewards, 3).tolist() == [-3, -1.5, 4.5, 0, 4.5, -4.5]
    assert contrast.rloo_advantages(rewards, 2).tolist() == [-1, 1, 6, -6, 6, -6]


@pytest.mark.parametrize("rewards, k", [(torch.ones(4), 1), (torch.ones(5), 2),
                                        (torch.ones(2, 2), 2)])
def test_rewards_that_are_no_groups(rewards, k):
    with pytest.raises(ValueError, match="k >= 2 rewards for each post"):
        contrast.rloo_advantages(rewards, k)


def test_a_constant_for_each_post_changes_no_advantage():
    rewards, post = torch.randn(4, 3), torch.randn(4, 1)
    assert torch.allclose(contrast.rloo_advantages(rewards.flatten(), 3),
                          contrast.rloo_advantages((rewards + post).flatten(), 3), atol=1e-6)


def test_dpo_loss_by_hand():
    """Log-ratios 1 and -1, then .5 and 2: differences 2 and -1.5, times beta = .1 and .5."""
    four = torch.tensor([[-4.0, -3.5], [-6.0, -2], [-5.0, -4], [-5.0, -4]])
    for beta in (0.1, 0.5):
        by_hand = [math.log(1 + math.exp(-beta * x)) for x in (2, -1.5)]
        assert contrast.dpo_loss(*four, beta).item() == pytest.approx(sum(by_hand) / 2)
    with pytest.raises(ValueError, match="shapes must be equal"):
        contrast.dpo_loss(four[0], four[1][:1], four[2], four[3])


def test_gradient_of_dpo():
    """beta sigmoid(-beta d) / B down on the chosen, up on the rejected; none for the reference."""
    four = torch.tensor([[-4.0, -3.5], [-6.0, -2], [-5.0, -4], [-5.0, -4]], requires_grad=True)
    (gradient,) = torch.autograd.grad(contrast.dpo_loss(*four, 0.5), four)
    p = torch.tensor([0.5 / (1 + math.exp(1)) / 2, 0.5 / (1 + math.exp(-0.75)) / 2])
    assert torch.allclose(gradient[:2], torch.stack([-p, p]), atol=1e-6)


@pytest.fixture(scope="module")
def world():
    posts = toy.make_posts(24, 3)
    tokenizer = toy.make_tokenizer([f"{post['post']} {post['summary']} {post['title']}"
                                    for post in posts])
    torch.manual_seed(0)
    return posts, tokenizer, toy.make_model(tokenizer, 16)


def test_log_probs_of_whole_summaries(world):
    _, _, model = world
    queries, responses = [[3, 4, 5], [6]], [[7, 8], [9, 3, 4]]
    got = contrast.summary_log_probs(model, queries, responses, 0)
    for query, response, total in zip(queries, responses, got):
        logits = model(input_ids=torch.tensor([query + response])).logits[0].log_softmax(-1)
        alone = sum(logits[len(query) - 1 + i, token] for i, token in enumerate(response))
        assert total.item() == pytest.approx(alone.item(), abs=1e-5)


class Run:
    seed = 1

    def steps(self, stage, total):
        return range(total)


def test_dpo_learns_its_comparisons(world):
    posts, tokenizer, model = world
    queries = encode_prompts(posts, tokenizer, 64)
    chosen = encode_responses([post["summary"] for post in posts], tokenizer, 32)
    rejected = encode_responses(["nobody knows"] * len(posts), tokenizer, 32)
    pairs = list(zip(queries, chosen, rejected))
    policy = copy.deepcopy(model)
    contrast.train_dpo(Run(), policy, pairs * 4, tokenizer.pad_token_id, 1e-3, 8)
    sides = [[pair[i] for pair in pairs] for i in range(3)]
    with torch.no_grad():
        ratios = [contrast.summary_log_probs(policy, sides[0], side, tokenizer.pad_token_id)
                  - contrast.summary_log_probs(model, sides[0], side, tokenizer.pad_token_id)
                  for side in sides[1:]]
    assert (ratios[0] > ratios[1]).all()


def test_rloo_makes_what_is_rewarded_more_likely(world, monkeypatch):
    """A reward model that likes summaries, here of one token, with an even id."""
    posts, tokenizer, model = world
    queries, policy = encode_prompts(posts, tokenizer, 64), copy.deepcopy(model)

    class LikesEven(RewardModel):
        def forward(self, input_ids, attention_mask, position_ids=None):
            return (input_ids % 2 == 0).float()

    config = SimpleNamespace(**vars(ppo.PPOConfig()) | {
        "ppo_lr": 1e-2, "ppo_batch_size": 32, "ppo_episodes": 1920, "return_sequences": 4,
        "response_length": 1, "micro_batch_size": 0, "rollout_batch_size": 0, "kl_beta": 0.0})
    # hardly any of these ends
    monkeypatch.setattr(ppo, "penalize_missing_eos", lambda scores, ended, value: scores)

    def chance_of_even():
        input_ids, mask, _ = join(queries, [[9]] * len(queries), 0)
        with torch.no_grad():
            logits = policy(input_ids=input_ids, attention_mask=mask,
                            position_ids=get_position_ids(mask)).logits[:, -2]
        return logits.softmax(-1)[:, ::2].sum(-1).mean().item()

    before = chance_of_even()
    contrast.train_rloo(Run(), policy, LikesEven(model), queries, tokenizer, config)
    assert before < 0.6 and chance_of_even() > 0.9
