"""Answers to the two open tasks of exercises/made, and what the tests have to refuse."""

import torch

import ppo


def kl_estimates(log_p, log_q):
    r = log_q - log_p
    return -r, r**2 / 2, r.exp() - 1 - r


def ppo_update(policy, batch, optimizer, epochs, clip_range, loss):
    def log_probs_of(states, actions):
        return policy(states).gather(1, actions[:, None])  # (B, 1): one action a row

    rewards = batch["rewards"][:, None]
    mask = torch.ones_like(rewards)
    advantages = ppo.whiten(rewards, mask)
    with torch.no_grad():
        old = log_probs_of(batch["states"], batch["actions"])
    fractions = []
    for _ in range(epochs):
        value, fraction = loss(log_probs_of(batch["states"], batch["actions"]), old, advantages,
                               mask, clip_range)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        fractions.append(float(fraction))
    return fractions


# (what, old, new, what the message says) in the functions above
ONE_STEP = """        optimizer.zero_grad()
        value.backward()
        optimizer.step()
"""
WRONG_OPEN = [
    ("k1 has the other sign", "return -r,", "return r,", "k1 with the wrong sign"),
    ("k2 without the 1/2", "r**2 / 2", "r**2", "k2 without the 1/2"),
    ("k2 absolute", "r**2 / 2", "r.abs() / 2", "as k2"),
    ("k3 without - r", "r.exp() - 1 - r", "r.exp() - 1", "k3 without - r"),
    ("k3 without - 1", "r.exp() - 1 - r", "r.exp() - r", "k3 without - 1"),
    ("k3 the other way round", "r.exp() - 1 - r", "(-r).exp() - 1 + r", "other direction"),
    ("r the other way round", "r = log_q - log_p", "r = log_p - log_q", "took r = log p"),
    ("weighted", "r = log_q - log_p", "r = (log_q - log_p) * log_p.exp()", "k1 weighted by p"),
    ("k2 weighted", "r**2 / 2", "log_p.exp() * r**2 / 2", "k2 weighted by p"),
    ("the other order", "-r, r**2 / 2, r.exp() - 1 - r", "r.exp() - 1 - r, r**2 / 2, -r", "order"),
    ("k1 detached", "return -r,", "return -r.detach(),", "without a gradient"),
    ("means", "return -r,", "return -r.mean(),", "shape"),
    ("a list", "return -r, r**2 / 2, r.exp() - 1 - r", "return [-r, r**2 / 2, r.exp() - 1 - r]",
     "a list"),
    ("not whitened", "advantages = ppo.whiten(rewards, mask)", "advantages = rewards",
     "the rewards as advantages"),
    ("centred only", "advantages = ppo.whiten(rewards, mask)",
     "advantages = rewards - rewards.mean()", "standard deviation"),
    ("n - 1", "advantages = ppo.whiten(rewards, mask)",
     "advantages = (rewards - rewards.mean()) / rewards.std()", "n - 1"),
    ("old with a gradient", "with torch.no_grad():", "if True:", "old log-probs"),
    ("old anew in each pass", "for _ in range(epochs):", "for _ in range(epochs):\n        old = "
     "log_probs_of(batch['states'], batch['actions']).detach()", "anew in each pass"),
    ("log-probs once", "loss(log_probs_of(batch[\"states\"], batch[\"actions\"]), old,",
     "loss(old.clone().requires_grad_(), old,", "once, before the loop|never call backward"),
    ("exchanged", "loss(log_probs_of(batch[\"states\"], batch[\"actions\"]), old,",
     "loss(old, log_probs_of(batch[\"states\"], batch[\"actions\"]),", "exchanged"),
    ("the best action", "policy(states).gather(1, actions[:, None])",
     "policy(states).max(1, keepdim=True).values", "other actions"),
    ("gradients are kept", "optimizer.zero_grad()", "pass", "add to the old"),
    ("cleared too late", ONE_STEP, "        value.backward()\n        optimizer.zero_grad()\n"
     "        optimizer.step()\n", "clear the gradient"),
    ("a step first", ONE_STEP, "        optimizer.zero_grad()\n        optimizer.step()\n"
     "        value.backward()\n", "before backward"),
    ("a step after the loop", "        optimizer.step()\n        fractions.append(float(fraction))",
     "        fractions.append(float(fraction))\n    optimizer.step()", r"step 1 time\(s\)"),
    ("no step", "optimizer.step()", "pass", r"step 0 time\(s\)"),
    ("no backward", "value.backward()", "pass", "never call backward"),
    ("one pass", "range(epochs)", "range(1)", r"1 time\(s\)"),
    ("clip range of its own", "mask, clip_range)", "mask, 0.2 * 1.5)", "as clip_range"),
    ("no clip range", "mask, clip_range)", "mask)", "do not pass clip_range"),
    ("the sign", "value.backward()", "(-value).backward()", "less likely"),
    ("tensors", "float(fraction)", "fraction", "a Tensor in it"),
    ("losses", "float(fraction)", "value.item()", "the losses"),
    ("the last one", "return fractions", "return fractions[-1]", "a float"),
    ("the batch is changed", "rewards = batch", "batch['rewards'] -= 1\n    rewards = batch",
     "changed the batch"),
    ("a name that isn't there", "return fractions", "return fraction_s", "get NameError in line"),
]
