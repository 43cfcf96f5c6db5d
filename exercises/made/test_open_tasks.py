"""The open tasks' tests. A message says what came out and what is expected."""

import pytest
import torch

import ppo
from open_tasks import kl_estimates, ppo_update

# four tokens
P_LOGITS = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def fail(message):
    pytest.fail(message, pytrace=False)


def means():
    """The mean of each estimate under p, by enumeration, and the exact KL."""
    log_p = P_LOGITS.log_softmax(0)
    estimates = kl_estimates(log_p, Q.log())
    if not isinstance(estimates, tuple) or len(estimates) != 3:
        fail(f"You return a {type(estimates).__name__}.\nExpected: three tensors, k1, k2, k3")
    for k in estimates:
        if k.shape != log_p.shape:
            fail(f"You return shape {tuple(k.shape)}.\nExpected: one number a sample, (4,)")
    p = log_p.exp()
    return [(p * k).sum().item() for k in estimates], (p * (log_p - Q.log())).sum().item()


def test_kl_values():
    (k1, k2, k3), exact = means()
    for name, k in (("k1", k1), ("k3", k3)):
        if abs(k - exact) > 1e-9:
            fail(f"the mean of your {name} is {k:.6f}.\nExpected: the exact KL, {exact:.6f}")
    # half the mean of the squared log-ratios: near the KL, and not equal
    log_p = P_LOGITS.log_softmax(0)
    expected = (log_p.exp() * (log_p - Q.log()) ** 2).sum().item() / 2
    if abs(k2 - expected) > 1e-9:
        fail(f"the mean of your k2 is {k2:.6f}.\nExpected: {expected:.6f}, biased: the KL is "
             f"{exact:.6f}")


def test_kl_signs():
    log_p = P_LOGITS.log_softmax(0)
    k1, k2, k3 = kl_estimates(log_p, Q.log())
    if not (k1 < 0).any() or (k2 < 0).any() or (k3 < -1e-12).any():
        fail(f"k1 {k1.tolist()}, k2 {k2.tolist()}, k3 {k3.tolist()}\nExpected: only k1, the log-"
             "ratio itself, can be negative for a single sample")
    if any(k.abs().max() > 1e-12 for k in kl_estimates(Q.log(), Q.log())):
        fail("Expected: all three are 0 where p = q")


def gradients():
    """As losses: samples from p are held fixed, the gradient goes through log_p. And that of KL."""
    found = []
    for i in range(3):
        logits = P_LOGITS.clone().requires_grad_()
        log_p = logits.log_softmax(0)
        k = kl_estimates(log_p, Q.log())[i]
        if not k.requires_grad:
            fail(f"k{i + 1} has no gradient.\nExpected: it can be used as a loss")
        (log_p.exp().detach() * k).sum().backward()
        found.append(logits.grad)
    logits = P_LOGITS.clone().requires_grad_()
    log_p = logits.log_softmax(0)
    (log_p.exp() * (log_p - Q.log())).sum().backward()
    return found, logits.grad


def test_kl_gradients():
    """As losses. Write down what you expect before you read on."""
    (k1, k2, k3), exact = gradients()
    p = P_LOGITS.softmax(0)
    for name, found, expected in (("k1", k1, torch.zeros(4, dtype=torch.float64)),
                                  ("k2", k2, exact), ("k3", k3, p - Q)):
        if not torch.allclose(found, expected, atol=1e-9):
            fail(f"the mean gradient of your {name}: {found.tolist()}\nExpected: "
                 f"{expected.tolist()}")


class Policy(torch.nn.Module):
    """Four states, four actions, and a logit for each pair of them."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))

    def forward(self, states):
        return (states @ self.logits).log_softmax(-1)


def update(clip_range=0.2, epochs=4, lr=0.5, loss=None):
    """Every action in every state once; the action with the state's number is the right one."""
    policy, seen = Policy(), []
    states = torch.eye(4, dtype=torch.float64).repeat_interleave(4, 0)
    actions = torch.arange(4).repeat(4)
    batch = {"states": states, "actions": actions,
             "rewards": (states.argmax(1) == actions).double()}
    before = {name: x.clone() for name, x in batch.items()}

    def watched(log_probs, old_log_probs, advantages, mask, clip_range):
        seen.append((log_probs.detach(), old_log_probs, advantages, mask, clip_range))
        return ppo.policy_loss(log_probs, old_log_probs, advantages, mask, clip_range)

    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    fractions = ppo_update(policy, batch, optimizer, epochs, clip_range, loss or watched)
    if any(not torch.equal(before[name], batch[name]) for name in before):
        fail("You changed the batch.\nExpected: it is as it was")
    return policy, seen, fractions


def test_ppo_old_log_probs_are_those_that_sampled():
    _, seen, fractions = update()
    if len(seen) != 4 or not isinstance(fractions, list) or len(fractions) != 4:
        fail(f"{len(seen)} calls of the loss, and {fractions}.\nExpected: one a pass, 4; and a "
             "list of 4 clip fractions")
    log_probs, old, *_ = seen[0]
    if not torch.allclose(log_probs, old):
        fail("in the first pass the ratio is not 1.\nExpected: it is: nothing has changed yet")
    if old.requires_grad or any(other[1].requires_grad for other in seen):
        fail("You let a gradient through into the old log-probs.\nExpected: constants")
    if not all(torch.allclose(old, other[1]) for other in seen):
        fail("You computed the old log-probs anew in each pass: the ratio is always 1.\nExpected: "
             "once, before the first pass")
    if torch.allclose(seen[1][0], old):
        fail("in the second pass the ratio is still 1.\nExpected: fresh log-probs in each pass")


def test_ppo_advantages_are_whitened_once():
    _, seen, _ = update()
    # rewards: 4 of 16 are 1. mean 1/4, variance 3/16: (1 - 1/4) / sqrt(3/16) = sqrt 3
    expected = torch.where(torch.eye(4).flatten() == 1, 3**0.5, -(3**-0.5)).double()
    for log_probs, _, advantages, mask, clip_range in seen:
        if not torch.allclose(advantages.flatten(), expected, atol=1e-6):
            fail(f"your advantages are {advantages.flatten().tolist()}\nExpected: whitened "
                 f"rewards, {expected.tolist()}")
        if not (mask != 0).all() or clip_range != 0.2 or log_probs.shape != advantages.shape:
            fail("Expected: a mask of ones, all tensors in one shape, and clip_range as given")


def test_ppo_learns_and_is_held():
    policy, _, fractions = update(epochs=60)
    right = policy(torch.eye(4, dtype=torch.float64)).exp().diagonal()
    if not (right > 0.27).all():
        fail(f"after 60 passes the right actions have {right.tolist()}\nExpected: more than the "
             "1/4 that they began with")
    if fractions[0] != 0 or not fractions[-1] > 0:
        fail(f"clip fractions {fractions[0]:.2f} ... {fractions[-1]:.2f}\nExpected: 0 at first, "
             "since the ratio is 1, and more at the end")
    free, _, _ = update(epochs=60, clip_range=100)
    freely = free(torch.eye(4, dtype=torch.float64)).exp().diagonal()
    if not (freely > right + 0.1).all():
        fail(f"with the clip {right.tolist()}, without {freely.tolist()}\nExpected: the clip holds "
             "the policy back")
    if policy.logits.grad is None or not torch.isfinite(policy.logits).all():
        fail("Expected: finite weights, changed by the optimizer")


def test_ppo_clears_old_gradients():
    one, _, _ = update(epochs=1)
    twice, _, _ = update(epochs=2, clip_range=100, lr=1e-6)
    step = update(epochs=1, clip_range=100, lr=1e-6)[0].logits
    if not torch.allclose(twice.logits, 2 * step, rtol=1e-3):
        fail("two tiny steps are not twice one step: old gradients are still in there.\nExpected: "
             "zero_grad before each backward")
    if torch.equal(one.logits, torch.zeros_like(one.logits)):
        fail("one pass changes nothing.\nExpected: backward, and a step of the optimizer")
