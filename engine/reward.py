"""The reward model, as reward.py, for what outgrows a laptop."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_model, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

import reward
from engine.adapters import copy_network, plain_weights, trainable, trunk_of
from engine.architectures import hidden_width
from engine.batches import microbatches, one_step, rows_of_step, steps_per_epoch
from engine.devices import full_precision
from engine.packing import pack, shares_post, unpack
from engine.processes import sum_over_processes
from lm import check_shapes, cosine_schedule, get_position_ids, join
from reward import preference_loss


class RewardModel(reward.RewardModel):
    """The trunk of a language model (any AutoModelForCausalLM, copied, its lm head dropped) and a
    linear head that makes one number of each hidden state. The paper starts from pi_SFT (3.4)."""

    def __init__(self, language_model, own_copy=True):
        """own_copy=False: language_model is a trunk already, and is taken as it is."""
        nn.Module.__init__(self)
        # A copy: pi_SFT stays as it is. eval(), while it is trained as well: no dropout, as in the
        # 2020 code, so that a score is always the same
        trunk = copy_network(trunk_of(language_model)) if own_copy else language_model
        self.trunk = trunk.eval()
        d = hidden_width(trunk)  # of its last hidden state
        self.head = nn.Linear(d, 1, device=trunk.device)  # (B, L, d) -> (B, L, 1)
        # B.1: weights ~ N(0, 1/(d+1)), the second number a variance. A hidden state has d entries
        # of order 1, so a first score is of order 1 too, where the sigmoid is steep.
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(d + 1))
        nn.init.zeros_(self.head.bias)
        # subtracted from each score; a buffer, so that it is saved and copied with the weights
        self.register_buffer("reference_mean", torch.zeros((), device=trunk.device))

    def forward(self, input_ids, attention_mask, position_ids=None):
        """(B, L), (B, L) -> (B, L): a score at every real position; at padding it means nothing.

        With several summaries side by side in a row (`response_scores`): attention_mask is
        (B, 1, L, L), and position_ids (B, L) are given. Else raises ValueError on unequal shapes.
        """
        if position_ids is None:  # one summary a row, as in `score`
            check_shapes(input_ids=input_ids, attention_mask=attention_mask)
            position_ids = get_position_ids(attention_mask)
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask,
                            position_ids=position_ids, use_cache=False).last_hidden_state
        with full_precision(hidden.device):  # in bfloat16, close scores would be ties
            scores = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)  # (B, L)
        return scores - self.reference_mean

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (trunk, head, reference_mean) to folder."""
        self.trunk.config.save_pretrained(folder)
        weights = {f"trunk.{name}": p for name, p in plain_weights(self.trunk).items()}
        weights |= {"head.weight": self.head.weight, "head.bias": self.head.bias,
                    "reference_mean": self.reference_mean}
        save_file({name: p.contiguous() for name, p in weights.items()},
                  str(Path(folder) / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder):
        """The model that save_pretrained wrote, in eval mode: the same scores to the last bit."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Its random weights are all overwritten; load_model refuses where one is missing
        model = cls(AutoModel.from_config(config), own_copy=False)
        load_model(model, str(Path(folder) / "model.safetensors"))
        return model.eval()


def response_scores(model, input_ids, attention_mask, width, k=1):
    """Scores at the end of the post and at each token of the response: (B, Q+T) -> (B, 1+T).

    width: T, the response's columns. k > 1: the rows are k responses to each post, which is
    computed once for all of them; the numbers are those of `forward`, up to rounding.
    """
    position_ids = get_position_ids(attention_mask)
    k = shares_post(model.trunk, k, input_ids.shape[1])  # 1 where the model can't do that
    # pack makes one row of the k of a post, with a mask in which no summary sees another one; of
    # its scores we keep the post's last place and the kT of the summaries
    inputs = pack(input_ids, attention_mask, position_ids, width, k, model.trunk.dtype)
    scores = model(**inputs)  # (B/k, Q+kT)
    return unpack(scores[:, -k * width - 1 :], width, k)


def final_scores(model, input_ids, attention_mask, width, k=1):
    """`RewardModel.score`, where the rows are k responses to each post: (B, Q+T) -> (B,)."""
    scores = response_scores(model, input_ids, attention_mask, width, k)  # (B, 1+T)
    # column 0 belongs to the post, so token n of the summary, counted from 1, is in column n
    last = attention_mask[:, -width:].sum(1, keepdim=True)  # (B, 1)
    return scores.take_along_dim(last, 1).squeeze(1)


def pair_scores(model, input_ids, attention_mask, width):
    """Scores of b chosen summaries and b rejected ones, (2b, Q+T) -> (b,), (b,). The two of a post
    share its computation where the model can do that."""
    if shares_post(model.trunk, 2, input_ids.shape[1]) == 1:
        return model.score(input_ids, attention_mask).chunk(2)
    side_by_side = torch.arange(len(input_ids)).view(2, -1).T.flatten()
    scores = final_scores(model, input_ids[side_by_side], attention_mask[side_by_side], width, k=2)
    return scores.view(-1, 2).unbind(1)


def train_reward(run, reward_model, pairs, pad_id, config):
    """Adam on `preference_loss`, reward_epochs times over the comparisons (the paper: once, B.1).

    pairs: [(query, chosen, rejected), ...], lists of token ids. run: the engine.folder.Run that
    saves, resumes and logs. Changes reward_model in place.
    """
    device = reward_model.head.weight.device
    # Adam's defaults, as the paper names none; fused: the same step, in one kernel
    optimizer = torch.optim.Adam(trainable(reward_model), lr=config.reward_lr, fused=True)
    per_epoch, batch_size = steps_per_epoch(len(pairs), config.reward_batch_size, "reward")
    total = per_epoch * config.reward_epochs
    for step in run.steps("reward", total, model=reward_model, optimizer=optimizer):
        # Shuffled by the run's seed: the order matters, hence the paper's several seeds (B.1)
        rows = rows_of_step(step, len(pairs), batch_size, run.seed, "reward")
        lr = config.reward_lr * cosine_schedule(step, total)  # B.1
        hits = torch.zeros((), device=device)  # pairs that the model puts in the right order
        # No clipping of gradients: the paper is silent, and none was needed
        with one_step(optimizer, lr) as adam_step:
            for part in microbatches(rows, config):
                queries, chosen, rejected = zip(*(pairs[row] for row in part))
                input_ids, attention_mask, Q = join(queries + queries, chosen + rejected, pad_id,
                                                    device)  # (2b, Q+T): chosen, then rejected
                better, worse = pair_scores(reward_model, input_ids, attention_mask,
                                            input_ids.shape[1] - Q)  # (b,) each
                hits += (better > worse).sum()
                # The labeler's confidence is in the paper's data, but not in its loss (3.4).
                # Summed over parts and processes this is the mean over the batch
                adam_step.add(preference_loss(better, worse) * (len(part) / len(rows)))
        accuracy = (sum_over_processes(hits) / len(rows)).item()
        run.log("reward", step, loss=adam_step.loss, accuracy=accuracy)
