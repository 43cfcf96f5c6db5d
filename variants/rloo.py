"""RLOO: PPO's loop without a critic (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

Each of the k summaries of a post is compared with the other ones. Read it beside `ppo.train_ppo`.
What changes: the advantage is that of a whole summary, and the same at each of its tokens; there is
no critic and no value loss; a batch is used for one step, so that no ratio is clipped. What stays:
the reward with its KL penalty, the batch, the rate and its decay. `python variants/rloo.py` prints
a worked example; `python figures/make.py contrast` draws it beside PPO, best of n, DPO and SFT. To
have it in the loop, call train_rloo in place of train_ppo in rlhf_minimal.run_all, save no critic,
and read run.history("rloo") there; run it with --return_sequences 4.
"""

import copy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from lm import generator_for, linear_schedule, masked_mean, response_log_probs
from ppo import rollout


def rloo_advantages(rewards, k):
    """A_i = R_i - mean of the other k - 1 rewards of the same post (Kool et al. 2019).

    rewards: (P k,), R(x, y) of all summaries of P posts, the k of a post one after the other -> (P
    k,). The
    others' mean is a baseline that does not depend on y_i, so that the gradient's mean stays what
    it is. Raises ValueError for k < 2 or where k does not divide the number of rewards.
    """
    if k < 2 or rewards.dim() != 1 or len(rewards) % k:
        raise ValueError(f"expected k >= 2 rewards of each post, got {tuple(rewards.shape)} for "
                         f"k = {k}")
    groups = rewards.view(-1, k)  # (B, k)
    others = (groups.sum(1, keepdim=True) - groups) / (k - 1)
    return (groups - others).flatten()


def train_rloo(policy, reward_model, queries, tokenizer, config, seed, log):
    """Turn the SFT model, policy, into pi_RL, in place. config: a PPOConfig with k =
    return_sequences of 2 or more; queries and log as in `ppo.train_ppo`."""
    reference, k = copy.deepcopy(policy), config.return_sequences
    adam = torch.optim.Adam(policy.parameters(), lr=config.ppo_lr, eps=1e-5, fused=True)
    n_updates = max(1, config.ppo_episodes // config.ppo_batch_size)
    for update in tqdm(range(n_updates), "rloo", leave=False, disable=None):
        adam.param_groups[0]["lr"] = config.ppo_lr * linear_schedule(update, n_updates)

        # k summaries of each post. rollout wants a critic; its values are not looked at.
        first = update * config.ppo_batch_size
        posts = [queries[i // k % len(queries)]
                 for i in range(first, first + config.ppo_batch_size)]
        batch = rollout(policy, reference, reward_model, reward_model, posts, tokenizer, config,
                        generator_for(seed, "rloo", update, device=policy.device))

        # The sum of a row's rewards is R(x, y) = r - beta KL: the whole summary is one action.
        advantages = rloo_advantages(batch.rewards.sum(1), k)[:, None]  # (B, 1)

        # REINFORCE: -A log pi(y | x), whose gradient is that of PPO's ratio where it is 1.
        log_probs = response_log_probs(policy, batch.input_ids, batch.attention_mask,
                                       batch.mask.shape[1], config.temperature)  # (B, T)
        loss = -masked_mean(advantages * log_probs, batch.mask)
        adam.zero_grad()
        loss.backward()
        clip_grad_norm_(policy.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        adam.step()
        log("rloo", update, reward=batch.scores.mean().item(),
            kl_per_summary=batch.kl.mean().item())


if __name__ == "__main__":
    print("rewards 1, 2, 6 of one post:", rloo_advantages(torch.tensor([1.0, 2, 6]), 3).tolist())
