"""The open tasks' tests. "You ..." is what was done, and "Expected: ..." what is wanted; where the
mistake isn't known, the numbers are shown."""

import traceback

import pytest
import torch

import ppo
from open_tasks import kl_estimates, ppo_update


def fail(message):
    pytest.fail(message, pytrace=False)


def you(what, expected):
    fail(f"You {what}\nExpected: {expected}")


def ask(function, *arguments):
    """What the function gives; where it stops, the exception and the line, in words."""
    try:
        return function(*arguments)
    except NotImplementedError as error:
        fail(f"{error} (still blank)")
    except Exception as error:
        file = function.__code__.co_filename
        lines = [f" in line {frame.lineno}, `{frame.line}`"
                 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        you(f"get {type(error).__name__}{lines[-1] if lines else ''}: {error}", "a result")


def alike(a, b, tolerance=1e-6):
    return a.shape == b.shape and torch.allclose(a.detach(), b.detach(), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------- task 1

# four tokens
P_LOGITS = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def estimates(log_p):
    """The three of them; a mistake that is known is told."""
    found = ask(kl_estimates, log_p, Q.log())
    if not isinstance(found, tuple) or len(found) != 3:
        you(f"return a {type(found).__name__}.", "three tensors, k1, k2, k3")
    for k in found:
        if not isinstance(k, torch.Tensor) or k.shape != log_p.shape:
            shape = tuple(getattr(k, "shape", ()))
            you(f"return shape {shape}.", "one number a sample, (4,)")
    r = (Q.log() - log_p).detach()
    k3, upside_down = r.exp() - 1 - r, (-r).exp() - 1 + r
    if alike(found[0], r) and alike(found[2], upside_down):
        you("took r = log p - log q.", "r = log q - log p")
    if alike(found[0], k3) and alike(found[2], -r):
        you("return the three in the wrong order.", "k1, k2, k3")
    half = r**2 / 2
    mistakes = [(0, r, "k1 with the wrong sign"), (1, r**2, "k2 without the 1/2"),
                (1, -half, "k2 with the wrong sign"), (1, r.abs() / 2, "|r| / 2 as k2"),
                (2, r.exp() - 1, "k3 without - r"), (2, r.exp() - r, "k3 without - 1"),
                (2, upside_down, "k3 of the other direction: r is log q - log p"),
                (2, -k3, "k3 with the wrong sign"), (2, r.exp() - 1 + r, "+ r in k3")]
    for i, right in enumerate((-r, half, k3)):
        mistakes.append((i, right * log_p.exp(), f"k{i + 1} weighted by p: samples are drawn by p"))
    for i, wrong, what in mistakes:
        if alike(found[i], wrong):
            you(f"return {what}.", "k1 = -r, k2 = r^2 / 2, k3 = e^r - 1 - r")
    return found


def means():
    """The mean of each estimate under p, by enumeration, and the exact KL."""
    log_p = P_LOGITS.log_softmax(0)
    p = log_p.exp()
    return [(p * k).sum().item() for k in estimates(log_p)], (p * (log_p - Q.log())).sum().item()


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
    k1, k2, k3 = estimates(P_LOGITS.log_softmax(0))
    if not (k1 < 0).any() or (k2 < 0).any() or (k3 < -1e-12).any():
        fail(f"k1 {k1.tolist()}, k2 {k2.tolist()}, k3 {k3.tolist()}\nExpected: only k1, the log-"
             "ratio itself, can be negative for a single sample")
    if any(k.abs().max() > 1e-12 for k in ask(kl_estimates, Q.log(), Q.log())):
        fail("Expected: all three are 0 where p = q")


def gradients():
    """As losses: samples from p are held fixed, the gradient goes through log_p. And that of KL."""
    found = []
    for i in range(3):
        logits = P_LOGITS.clone().requires_grad_()
        log_p = logits.log_softmax(0)
        k = estimates(log_p)[i]
        if not k.requires_grad:
            you(f"return a k{i + 1} without a gradient.", "it can be used as a loss")
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


# ---------------------------------------------------------------------------- task 2


class Policy(torch.nn.Module):
    """Four states, four actions, and a logit for each pair of them. No two actions are equally
    likely at first, or the log-probs of other actions would look like those of the right ones."""

    def __init__(self):
        super().__init__()
        start = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
        self.logits = torch.nn.Parameter(start.repeat(4, 1))

    def forward(self, states):
        return (states @ self.logits).log_softmax(-1)


class Optimizer(torch.optim.SGD):
    """Gradient descent that writes down what it finds at each step, and after each backward."""

    def __init__(self, policy, lr):
        super().__init__(policy.parameters(), lr=lr)
        # "l" a loss, "b" a backward, "B" one on top of an old gradient, "s" a step, "n" a step
        # that finds no gradient
        self.calls, self.fresh, self.weights = "", None, policy.logits
        policy.logits.register_hook(self.keep)
        policy.logits.register_post_accumulate_grad_hook(self.compare)

    def keep(self, gradient):
        self.fresh = gradient.clone()

    def compare(self, weights):
        self.calls += "b" if torch.equal(weights.grad, self.fresh) else "B"

    def step(self, closure=None):
        found = self.weights.grad
        wanted = self.fresh is None or self.fresh.any()
        self.calls += "n" if found is None or (wanted and not found.any()) else "s"
        super().step(closure)


def check_calls(calls, epochs):
    """Say what is wrong in the order of loss, backward and step, if it is known."""
    expected = "in each pass: loss, zero_grad, backward, step"
    if calls.count("l") != epochs:
        you(f"call the loss {calls.count('l')} time(s) in {epochs} passes.", "once in each pass")
    if "b" not in calls:
        you("never call backward on the loss.", expected)
    if "bn" in calls:
        you("clear the gradient between backward and the step: nothing is left to learn.", expected)
    if "ln" in calls:
        you("step before backward: there is no gradient yet.", expected)
    steps = calls.count("s") + calls.count("n")
    if steps != epochs:
        you(f"call optimizer.step {steps} time(s) in {epochs} passes.", expected)
    if "B" in calls:
        you("let each backward add to the old gradients.", "zero_grad before each backward")


ORDERS = "loss(new log-probs, old log-probs, advantages, mask of ones, clip_range)"


def check_loss_arguments(new, old, given, right, start):
    """right: the log-probs of the actions taken now; start: those before the first pass."""
    if old.requires_grad and not new.requires_grad:
        you("exchanged new and old log-probs.", ORDERS)
    if old.requires_grad:
        you("let a gradient through into the old log-probs.", "constants: no_grad, or detach")
    if not new.requires_grad:
        you("give the loss log-probs without a gradient.", ORDERS)
    if not alike(new.flatten(), right):
        if alike(new.flatten(), start):
            you("computed the log-probs once, before the loop.", "anew in each pass")
        you("give the loss log-probs of other actions than those that were taken.",
            "those of batch['actions'], one a row")
    if not alike(old.flatten(), start):
        if alike(old.flatten(), right):
            you("computed the old log-probs anew in each pass: the ratio is always 1.",
                "once, before the first pass")
        you("give the loss old log-probs that are not those of the policy that sampled.",
            "once, before the first pass")
    if given is None:
        you("do not pass clip_range on to the loss.", ORDERS)


def update(clip_range=0.2, epochs=4, lr=0.5):
    """Every action in every state once; the action with the state's number is the right one."""
    policy, seen = Policy(), []
    states = torch.eye(4, dtype=torch.float64).repeat_interleave(4, 0)
    actions = torch.arange(4).repeat(4)
    batch = {"states": states, "actions": actions,
             "rewards": (states.argmax(1) == actions).double()}
    before = {name: x.clone() for name, x in batch.items()}
    optimizer = Optimizer(policy, lr)

    def log_probs_now():
        with torch.no_grad():
            return policy(states).gather(1, actions[:, None]).flatten()

    start = log_probs_now()

    def loss(log_probs, old_log_probs, advantages, mask, clip_range=None):
        optimizer.calls += "l"
        check_loss_arguments(log_probs, old_log_probs, clip_range, log_probs_now(), start)
        value, fraction = ppo.policy_loss(log_probs, old_log_probs, advantages, mask, clip_range)
        seen.append((log_probs, advantages, mask, clip_range, value.item()))
        return value, fraction

    fractions = ask(ppo_update, policy, batch, optimizer, epochs, clip_range, loss)
    if any(not torch.equal(before[name], batch[name]) for name in before):
        you("changed the batch.", "it is as it was")
    check_calls(optimizer.calls, epochs)
    check_fractions(fractions, [value for *_, value in seen], epochs)
    return policy, seen, fractions


def check_fractions(fractions, losses, epochs):
    what = f"a list of {epochs} floats, the clip fraction of each pass"
    if not isinstance(fractions, list):
        you(f"return a {type(fractions).__name__}.", what)
    if len(fractions) != epochs:
        you(f"return a list of {len(fractions)}.", what)
    kinds = {type(x).__name__ for x in fractions if not isinstance(x, float)}
    if kinds:
        you(f"return a list with a {kinds.pop()} in it.", what)
    if any(losses) and fractions == losses:
        you("return the losses.", what)


def test_ppo_old_log_probs_are_those_that_sampled():
    """update has looked at all arguments of the loss, and at the order of the calls."""
    update()


def test_ppo_advantages_are_whitened_once():
    _, seen, _ = update()
    # rewards: 4 of 16 are 1. mean 1/4, variance 3/16: (1 - 1/4) / sqrt(3/16) = sqrt 3
    rewards = torch.eye(4, dtype=torch.float64).flatten()
    expected = torch.where(rewards == 1, 3**0.5, -(3**-0.5)).double()
    for log_probs, advantages, mask, clip_range, _ in seen:
        for wrong, what in ((rewards, "take the rewards as advantages."),
                            (rewards - 0.25, "do not divide by the standard deviation."),
                            (expected * (15 / 16) ** 0.5, "divide by n - 1 in the variance.")):
            if alike(advantages.flatten(), wrong):
                you(what, "rewards whitened by ppo.whiten")
        if not alike(advantages.flatten(), expected):
            fail(f"your advantages are {advantages.flatten().tolist()}\nExpected: whitened "
                 f"rewards, {expected.tolist()}")
        if clip_range != 0.2:
            you(f"give the loss {clip_range} as clip_range.", "as it came, 0.2")
        if not (mask != 0).all() or log_probs.shape != advantages.shape:
            fail("Expected: a mask of ones, and all tensors in one shape")


def right_actions(policy):
    return policy(torch.eye(4, dtype=torch.float64)).exp().diagonal().detach()


def test_ppo_learns_and_is_held():
    policy, _, fractions = update(epochs=60)
    first, right = right_actions(Policy()), right_actions(policy)
    if (right < first).all():
        you(f"make the right actions less likely: {right.tolist()}, from {first.tolist()}.",
            "loss.backward(), as it is: the loss has its minus already")
    if not (right > 1.1 * first).all():
        fail(f"after 60 passes the right actions have {right.tolist()}\nExpected: more than the "
             f"{first.tolist()} that they began with")
    if fractions[0] != 0 or not fractions[-1] > 0:
        fail(f"clip fractions {fractions[0]:.2f} ... {fractions[-1]:.2f}\nExpected: 0 at first, "
             "since the ratio is 1, and more at the end")
    free, _, _ = update(epochs=60, clip_range=100)
    freely = right_actions(free)
    if not (freely > right + 0.1).all():
        fail(f"with the clip {right.tolist()}, without {freely.tolist()}\nExpected: the clip holds "
             "the policy back")
    if not torch.isfinite(policy.logits).all():
        fail("Expected: finite weights, changed by the optimizer")


def test_ppo_clears_old_gradients():
    start = Policy().logits
    twice, _, _ = update(epochs=2, clip_range=100, lr=1e-6)
    once, _, _ = update(epochs=1, clip_range=100, lr=1e-6)
    if torch.equal(once.logits, start):
        fail("one pass changes nothing.\nExpected: backward, and a step of the optimizer")
    if not torch.allclose(twice.logits - start, 2 * (once.logits - start), rtol=1e-3):
        fail("two tiny steps are not twice one step.\nExpected: each is made of its own gradient")
