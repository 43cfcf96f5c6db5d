"""The supervised baseline, pi_SFT (Stiennon et al. 2020, sections 3.4 and 4.1, appendix B.1).

A language model is fine-tuned to predict the human reference summaries. It is no step of the
paper's loop (collect comparisons, train a reward model, train a policy; section 3.1) but what all
three start from: its samples are compared, its weights begin the policy and the reward model, and
the KL penalty holds the policy to it.

What differs from the paper: a tiny model from scratch, hence a larger rate and a smaller batch
(SFTConfig). Where the paper is silent, the choices are ours: the loss is on the summary alone,
Adam's second beta is .95, and gradients are clipped to norm 1.
"""

from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from engine.adapters import trainable
from engine.batches import microbatches, one_step, rows_of_step, steps_per_epoch
from engine.devices import wide
from lm import cosine_schedule, join, masked_mean, response_log_probs


@dataclass
class SFTConfig:
    # 3e-3 and 32: a model of 150,000 weights trained from scratch needs many, large steps
    sft_lr: float = HfArg(default=3e-3, help="paper: 6.35e-5 (1.3B), cosine (B.1)")
    sft_batch_size: int = HfArg(default=32, help="paper: 128 (B.1)")
    sft_epochs: int = HfArg(default=1, help="paper: 1 (B.1)")


def train_sft(run, model, queries, responses, pad_id, config):
    """Maximise log pi(reference | post), token by token (section 3.4: "predict summaries").

    queries, responses: lists of token ids, the responses with their EOS. Changes model in place.
    """
    # No dropout and no weight decay, here or later: the released 2020 code has dropout 0. With it,
    # a policy would have other log-probs each time, and PPO's ratio would not begin at 1.
    # betas: .9 is Adam's default; .95 forgets the large gradients of the first steps sooner (ours)
    optimizer = torch.optim.Adam(trainable(model), lr=config.sft_lr, betas=(0.9, 0.95), fused=True)
    per_epoch, batch_size = steps_per_epoch(len(queries), config.sft_batch_size, "sft")
    total = per_epoch * config.sft_epochs
    for step in run.steps("sft", total, model=model, optimizer=optimizer):
        rows = rows_of_step(step, len(queries), batch_size, run.seed, "sft")
        n_tokens = sum(len(responses[row]) for row in rows)
        lr = config.sft_lr * cosine_schedule(step, total)  # B.1
        with one_step(optimizer, lr, max_grad_norm=1.0) as adam_step:
            for part in microbatches(rows, config):
                input_ids, attention_mask, Q = join(
                    [queries[row] for row in part], [responses[row] for row in part], pad_id,
                    model.device)  # (b, Q+T)
                T = input_ids.shape[1] - Q
                log_probs = response_log_probs(model, input_ids, attention_mask, T)  # (b, T)
                # On the summary and its EOS only. The paper trains to "predict summaries"; N+
                # (Huang et al. 2024, a study of this paper's details) has the post in it as well.
                mask = attention_mask[:, Q:]
                share = wide(mask.sum()) / n_tokens  # this part's of the batch's tokens, float64
                adam_step.add(-masked_mean(log_probs, mask) * share)
        run.log("sft", step, loss=adam_step.loss)  # nats per token


if __name__ == "__main__":
    # Two summaries of 3 and 1 tokens (EOS included), and the log-prob of each token
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -9.0, -9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    print("loss, every token the same:   ", -masked_mean(log_probs, mask).item())
    print("not the mean of summaries' means,", ((1 + 2 + 0.5) / 3 + 1.5) / 2)
    print("learning rates of 4 steps from 3e-3:",
          [round(3e-3 * cosine_schedule(step, 4), 6) for step in range(4)])
