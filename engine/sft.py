"""The supervised baseline, as sft.py, for what outgrows a laptop."""

import torch

from engine.adapters import trainable
from engine.batches import microbatches, one_step, rows_of_step, steps_per_epoch
from engine.devices import wide
from engine.packing import response_log_probs
from lm import cosine_schedule, join, masked_mean


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
