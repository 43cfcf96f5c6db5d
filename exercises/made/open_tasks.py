"""Two open tasks. Neither answer is a function of this folder: read, then write.

    pytest -k kl            # task 1
    pytest -k ppo           # task 2
"""

import torch


def kl_estimates(log_p, log_q):
    """Three estimates of KL(p, q) from samples of p, a triple of tensors like log_p.

    log_p, log_q: the log-probs of each sample under both. With the log-ratio r = log q - log p:

        k1 = -r          k2 = r^2 / 2          k3 = e^r - 1 - r

    The tests do not sample: they enumerate four tokens, weight each by its probability, and compare
    with the exact KL. Before you run them, write down: which of the three has the exact KL as its
    mean? Which can be negative? And if it is used as a loss, with samples held fixed and a gradient
    through log_p alone: which of the three has the gradient of the exact KL as its mean?
    """
    raise NotImplementedError("Open task 1: k1, k2, k3")


def ppo_update(policy, batch, optimizer, epochs, clip_range, loss):
    """One update of PPO for a policy, in place: `epochs` passes over one batch of old samples.

    policy: a module; policy(states) -> log-probs (B, V) of the actions. batch: a dict of states
    (B, d), actions (B,), rewards (B,). Every episode is one action long, and there is no critic: an
    advantage is the reward, whitened over the batch by ppo.whiten. loss is ppo.policy_loss. Each
    pass is one step of the optimizer on the whole batch.

    Returns the clip fraction of each pass, a list of floats. What has to be computed once, before
    the first pass, and what anew in each?
    """
    raise NotImplementedError("Open task 2: the PPO update")
