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


# (what, old, new) in the functions above
WRONG_OPEN = [
    ("k1 has the other sign", "return -r,", "return r,"),
    ("k2 without the 1/2", "r**2 / 2", "r**2"),
    ("k3 without - r", "r.exp() - 1 - r", "r.exp() - 1"),
    ("k3 the other way round", "r.exp() - 1 - r", "(-r).exp() - 1 + r"),
    ("k1 detached", "return -r,", "return -r.detach(),"),
    ("means", "return -r,", "return -r.mean(),"),
    ("not whitened", "advantages = ppo.whiten(rewards, mask)", "advantages = rewards"),
    ("old with a gradient", "with torch.no_grad():", "if True:"),
    ("old anew in each pass", "for _ in range(epochs):", "for _ in range(epochs):\n        old = "
     "log_probs_of(batch['states'], batch['actions']).detach()"),
    ("gradients are kept", "optimizer.zero_grad()", "pass"),
    ("no step", "optimizer.step()", "pass"),
    ("one pass", "range(epochs)", "range(1)"),
    ("clip range of its own", "mask, clip_range)", "mask, 0.2 * 1.5)"),
    ("the sign", "value.backward()", "(-value).backward()"),
]
