"""What came after, beside the paper's PPO: the same comparisons, the same judge, two other losses.

RLOO (Kool et al. 2019; Ahmadian et al. 2024) keeps the reward and drops the critic: each of k
summaries of a post is compared with the others. DPO (Rafailov et al. 2023) drops the reward model
and the sampling as well: the comparisons train the policy itself. Not part of the loop of
rlhf_minimal.py. `python contrast.py` prints a worked example; `python figures/make.py contrast`
draws both beside PPO, best of n and SFT.
"""

import torch

from engine.adapters import copy_network, freeze
from engine.batches import one_step, own_queries, own_stream, rows_of_step, steps_per_epoch
from lm import check_shapes, cosine_schedule, join, linear_schedule, response_log_probs, zero_off
from ppo import policy_loss, rollout
from reward import preference_loss


def rloo_advantages(rewards, k):
    """A_i = R_i - mean of the other k - 1 rewards of the same post (Kool et al. 2019).

    rewards: (B k,), R(x, y) of whole summaries, the k of a post one after the other -> (B k,). The
    others' mean is a baseline that does not depend on y_i, so that the gradient's mean stays what
    it is. Raises ValueError for k < 2 or where k does not divide the number of rewards.
    """
    if k < 2 or rewards.dim() != 1 or len(rewards) % k:
        raise ValueError(f"expected k >= 2 rewards for each post, got {tuple(rewards.shape)}, k={k}")
    groups = rewards.view(-1, k)  # (B, k)
    others = (groups.sum(1, keepdim=True) - groups) / (k - 1)
    return (groups - others).flatten()


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """-E log sigmoid(beta [log pi/pi_ref (y_chosen) - log pi/pi_ref (y_rejected)]), eq. 7 of DPO.

    (B,) each: log-probs of whole summaries, summed over their tokens. It is `preference_loss` where
    beta log(pi/pi_ref) takes the place of the reward: the policy is its own reward model. beta:
    0.1 is the DPO paper's; for the summaries of TL;DR it took 0.5.
    """
    check_shapes(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return preference_loss(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))


def summary_log_probs(model, queries, responses, pad_id):
    """log pi(y | x), summed over the tokens of each summary: lists of token ids -> (B,)."""
    input_ids, attention_mask, Q = join(queries, responses, pad_id, model.device)
    T = input_ids.shape[1] - Q
    log_probs = response_log_probs(model, input_ids, attention_mask, T)  # (B, T)
    return zero_off(attention_mask[:, Q:] == 1, log_probs).sum(1)


def train_dpo(run, policy, pairs, pad_id, lr, batch_size, beta=0.1):
    """One pass over the comparisons [(query, chosen, rejected), ...], in place; no sampling."""
    reference = freeze(copy_network(policy, "reference"))
    # Adam's defaults, the cosine of SFT (B.1) and gradients of norm at most 1, as in ppo.py: so that
    # it differs from the loop in its loss alone
    adam = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)
    total, batch_size = steps_per_epoch(len(pairs), batch_size, "reward")
    for step in run.steps("dpo", total):
        rows = [pairs[i] for i in rows_of_step(step, len(pairs), batch_size, run.seed, "dpo")]
        queries, chosen, rejected = zip(*rows)
        both = queries + queries, chosen + rejected, pad_id  # 2B rows
        with torch.no_grad():
            ref = summary_log_probs(reference, *both)
        with one_step(adam, lr * cosine_schedule(step, total), 1.0) as adam_step:
            log_probs = summary_log_probs(policy, *both)
            adam_step.add(dpo_loss(*log_probs.chunk(2), *ref.chunk(2), beta))


def train_rloo(run, policy, reward_model, queries, tokenizer, config):
    """PPO's loop with RLOO's advantage, one pass and no critic, in place. config.return_sequences is
    k. With one pass the ratio is 1 and nothing is clipped: the gradient is that of REINFORCE."""
    reference, k = freeze(copy_network(policy, "reference")), config.return_sequences
    adam = torch.optim.Adam(policy.parameters(), lr=config.ppo_lr, eps=1e-5, fused=True)
    total = config.ppo_episodes // config.ppo_batch_size
    for update in run.steps("rloo", total):
        some = own_queries(queries, update, config)
        # rollout wants a critic; its values are not looked at
        batch = rollout(policy, reference, reward_model, reward_model, some, tokenizer, config,
                        own_stream(run.seed, "rloo", update, policy.device))
        actions = sum(part.mask.sum() for part in batch)
        with one_step(adam, config.ppo_lr * linear_schedule(update, total), 1.0) as adam_step:
            for part in batch:
                # The KL penalty is in R, as in the paper; every token of a summary gets its A
                advantages = rloo_advantages(part.rewards.sum(1), k)[:, None].expand(part.mask.shape)
                log_probs = response_log_probs(policy, *part.inputs, config.temperature, k)
                loss, _ = policy_loss(log_probs, part.log_probs, advantages, part.mask)
                adam_step.add(loss * part.mask.sum() / actions)


if __name__ == "__main__":
    print("RLOO, rewards 1, 2, 6 of a post:", rloo_advantages(torch.tensor([1.0, 2, 6]), 3).tolist())
    loss = dpo_loss(*torch.tensor([[-4.0], [-6.0], [-5.0], [-5.0]]))
    print("DPO, log-ratios 1 and -1, beta 0.1:", loss.item(), "= -log sigmoid(0.2)")
