"""Others' numbers: vectors that other projects publish in their tests, and that ours gives as well.

Facts only, each worked out by hand first, and none of their code. torchtune is Meta's library for
fine-tuning; its numbers are in its tests of `rlhf` (BSD licence).
"""

import math

import torch

from ppo import compute_gae, kl_penalized_rewards, policy_loss


def t(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_rewards_per_token_as_in_torchtune():
    """Scores 1, 2, 3, beta .5. The log-ratios are -.1, -.2 and -.3 at each token of a row, so that
    each action *earns* .05, .1 or .15: the policy finds it less likely than the reference does."""
    log_probs = t([[.1, .2, .3], [.4, .5, .6], [.6, .7, .8]])
    ref_log_probs = t([[.2, .3, .4], [.6, .7, .8], [.9, 1, 1.1]])
    rewards = kl_penalized_rewards(t([1, 2, 3]), log_probs, ref_log_probs, torch.ones(3, 3), .5)
    assert torch.allclose(rewards, t([[.05, .05, 1.05], [.1, .1, 2.1], [.15, .15, 3.15]]))


def test_returns_as_in_torchtune():
    """gamma .9, lambda .95, and both rewards and values are 0 0 0 1. Backwards:

    delta_4 = 1 - 1 = 0, so A_4 = 0 and the return is 0 + 1 = 1;
    delta_3 = .9 * 1 - 0 = .9, A_3 = .9;  A_2 = .855 * .9 = .7695;  A_1 = .855 * .7695 = .6579.
    """
    same = t([[0, 0, 0, 1]])
    _, returns = compute_gae(same, same, torch.ones(1, 4), .9, .95)
    assert torch.allclose(returns, t([[.6579225, .7695, .9, 1]]))


def test_advantages_with_three_unlike_values():
    """A published vector (we did not find again whose it is first): gamma .9, lambda .7, rewards
    0, -1.5, 2 and values 1, .5, 3. Backwards:

    delta_3 = 2 - 3 = -1;  delta_2 = -1.5 + .9 * 3 - .5 = .7,  A_2 = .7 - .63 = .07;
    delta_1 = 0 + .45 - 1 = -.55,  A_1 = -.55 + .63 * .07 = -.5059.
    """
    advantages, _ = compute_gae(t([[0, -1.5, 2]]), t([[1, .5, 3]]), torch.ones(1, 3), .9, .7)
    assert torch.allclose(advantages, t([[-.5059, .07, -1]]))


def test_a_test_that_cannot_fail():
    """torchtune's tests of its PPO loss compare with rtol=1e6. At log-ratios of .1 and advantages
    of 1 the loss is -e^.1 = -1.105, as ours is; the expected value in there is +1.105, and the test
    passes: a relative tolerance of a million lets everything through but infinity and NaN."""
    loss, _ = policy_loss(t([[.6, .9, 1.3]]), t([[.5, .8, 1.2]]), t([[1, 1, 1]]), torch.ones(1, 3))
    assert math.isclose(loss.item(), -math.exp(.1), rel_tol=1e-9)
    torch.testing.assert_close(loss, -loss, atol=1e-4, rtol=1e6)  # says nothing
    torch.testing.assert_close(loss, loss + 1000, atol=1e-4, rtol=1e6)
