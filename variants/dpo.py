"""DPO: no reward model and no sampling (Rafailov et al. 2023, arXiv 2305.18290).

The comparisons train the policy itself. Read it beside `reward.train_reward`: its loss, its batches
and its cosine rate are the same. What changes: the score of a summary is beta log(pi / pi_SFT), so
the policy is its own reward model. Beside PPO, gradients have the same bound and the reference is
the same; data (comparisons in place of the policy's own summaries), optimiser and schedule differ.
`python variants/dpo.py` prints a worked example.
"""

import copy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from lm import check_shapes, cosine_schedule, generator_for, join, response_log_probs, zero_off
from reward import preference_loss


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """-E log sigmoid(beta [log pi/pi_ref (y_chosen) - log pi/pi_ref (y_rejected)]), eq. 7 of DPO.

    (B,) each: log-probs of whole summaries, summed over their tokens. It is `preference_loss` where
    beta log(pi/pi_ref) takes the place of the reward. beta: 0.1 is the DPO paper's; for the
    summaries of TL;DR it took 0.5. Raises ValueError on unequal shapes or no pair.
    """
    check_shapes(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return preference_loss(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))


def summary_log_probs(model, queries, responses, pad_id):
    """log pi(y | x), summed over the tokens of each summary: lists of token ids -> (B,)."""
    input_ids, attention_mask, Q = join(queries, responses, pad_id, model.device)
    log_probs = response_log_probs(model, input_ids, attention_mask, input_ids.shape[1] - Q)
    return zero_off(log_probs, attention_mask[:, Q:] == 1).sum(1)


def train_dpo(policy, pairs, pad_id, lr, batch_size, seed, log, beta=0.1):
    """One pass over the comparisons [(query, chosen, rejected), ...], in place. log: called as
    log("dpo", step, loss=nats per pair)."""
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)
    B = min(batch_size, len(pairs))
    order = torch.randperm(len(pairs), generator=generator_for(seed, "dpo", 0)).tolist()
    total = len(pairs) // B
    for step in tqdm(range(total), "dpo", leave=False, disable=None):
        queries, chosen, rejected = zip(*(pairs[row] for row in order[step * B : (step + 1) * B]))
        both = queries + queries, chosen + rejected, pad_id  # 2B rows, the chosen ones first
        with torch.no_grad():
            ref = summary_log_probs(reference, *both)  # (2B,)
        loss = dpo_loss(*summary_log_probs(policy, *both).chunk(2), *ref.chunk(2), beta)

        optimizer.param_groups[0]["lr"] = lr * cosine_schedule(step, total)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        log("dpo", step, loss=loss.item())


if __name__ == "__main__":
    loss = dpo_loss(*torch.tensor([[-4.0], [-6.0], [-5.0], [-5.0]]))
    print("DPO, log-ratios 1 and -1, beta 0.1:", loss.item(), "= -log sigmoid(0.2)")
