"""The supervised baseline, pi_SFT (Stiennon et al. 2020, sections 3.4 and 4.1, appendix B.1).

A language model is fine-tuned to predict the human reference summaries. It is no step of the
paper's loop (collect comparisons, train a reward model, train a policy; section 3.1) but what all
three start from: its samples are compared, its weights begin the policy and the reward model, and
the KL penalty holds the policy to it.

What differs from the paper: a tiny model from scratch, hence a larger rate and a smaller batch
(SFTConfig). Where the paper is silent, the choices are ours: the loss is on the summary alone,
Adam's second beta is .95, and gradients are clipped to norm 1. `python sft.py` prints a worked
example.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from lm import cosine_schedule, generator_for, join, masked_mean, response_log_probs


@dataclass
class SFTConfig:
    # 3e-3 and 32: a model of 144,000 weights trained from scratch needs many, large steps
    sft_lr: float = 3e-3  # learning rate; paper: 6.35e-5 (1.3B), cosine (B.1)
    sft_batch_size: int = 32  # summaries per step; paper: 128 (B.1)
    sft_epochs: int = 1  # passes over the data; paper: 1 (B.1)


def train_sft(model, queries, responses, pad_id, config, seed, log):
    """Maximise log pi(reference | post), token by token (section 3.4: "predict summaries").

    queries, responses: lists of token ids, the responses with their EOS. log: called as log("sft",
    step, loss=nats per token). Changes model in place.
    """
    # No weight decay, and no dropout, here or later: models are in eval mode while they train, too,
    # as the released 2020 code has dropout 0. With dropout the policy's log-probs would differ at
    # each call, and PPO's ratio would not begin at 1.
    # betas: .9 is Adam's default; .95 forgets the large gradients of the first steps sooner.
    # fused: the same step, in one kernel.
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.sft_lr, betas=(0.9, 0.95), fused=True)
    B = min(config.sft_batch_size, len(queries))
    per_epoch = len(queries) // B  # the last incomplete batch is left out
    total = per_epoch * config.sft_epochs
    for step in tqdm(range(total), "sft", leave=False, disable=None):
        epoch, place = divmod(step, per_epoch)
        if place == 0:  # each pass over the posts has an order of its own
            order = torch.randperm(
                len(queries), generator=generator_for(seed, "sft", epoch)).tolist()
        rows = order[place * B : (place + 1) * B]

        # [post | summary] of each row, and the log-prob of each token of the summary.
        input_ids, attention_mask, Q = join(
            [queries[row] for row in rows], [responses[row] for row in rows], pad_id,
            model.device)  # (B, Q+T)
        log_probs = response_log_probs(
            model, input_ids, attention_mask, input_ids.shape[1] - Q)  # (B, T)
        # On the summary and its EOS only. The paper trains to "predict summaries"; N+ (Huang et al.
        # 2024) has the post in the loss as well.
        loss = -masked_mean(log_probs, attention_mask[:, Q:])  # nats per token

        optimizer.param_groups[0]["lr"] = config.sft_lr * cosine_schedule(step, total)  # B.1
        optimizer.zero_grad()
        loss.backward()
        # Norm at most 1: ours, as the paper is silent, to be safe from single batches.
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        log("sft", step, loss=loss.item())


if __name__ == "__main__":
    # Two summaries of 3 and 1 tokens (EOS included), and the log-prob of each token
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -9.0, -9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    print("loss, every token the same:   ", -masked_mean(log_probs, mask).item())
    print("the mean of summaries' means: ", ((1 + 2 + 0.5) / 3 + 1.5) / 2)
    print("learning rates of 4 steps from 3e-3:",
          [round(3e-3 * cosine_schedule(step, 4), 6) for step in range(4)])
