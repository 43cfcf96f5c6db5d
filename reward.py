"""The reward model r(x, y) (Stiennon et al. 2020, section 3.4 and appendix B.1).

People compared pairs of summaries of one post (3.3). A language model with a scalar head learns to
give the summary they preferred the higher score: `preference_loss`, the first equation of section
3.4. Then the scores are shifted so that the human references have 0 on average. PPO is paid with
them. A score means something only at the last token of a summary, where it was trained.

Read in this order: the loss, the model, the training loop. `score` is r(x, y), row by row;
`response_scores` and `final_scores` are the same for several summaries of a post, which share its
computation; `score_summaries` takes lists. How good the model has become: `judge.py`.

What differs from the paper: one seed, where it keeps the best of 3 to 10 (B.1); in the tiny preset
a larger rate and a smaller batch. `python reward.py` prints a worked example.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_model, save_file
from transformers import AutoConfig, AutoModel
from transformers.hf_argparser import HfArg

from engine.adapters import copy_network, plain_weights, trainable
from engine.architectures import hidden_width, shares_post
from engine.batches import microbatches, one_step, pack, rows_of_step, steps_per_epoch, unpack
from engine.devices import full_precision
from engine.processes import sum_over_processes
from lm import check_shapes, cosine_schedule, get_position_ids, join, last_token_index


@dataclass
class RewardConfig:
    # 6e-4 and 8: with 1e-3, or with larger batches, the tiny model learned what summaries look
    # like, and not to compare their facts with the post
    reward_lr: float = HfArg(default=6e-4, help="paper: 1.5e-5 (1.3B), cosine (B.1)")
    reward_batch_size: int = HfArg(default=8, help="pairs per step; paper: 64 (B.1)")
    reward_epochs: int = HfArg(default=1, help="paper: 1 (B.1)")


# ---------------------------------------------------------------------------- the loss, 3.4


def preference_loss(chosen, rejected):
    """loss(r) = -E[log sigmoid(r(x, y_chosen) - r(x, y_rejected))], section 3.4.

    The difference of two scores is read as the log-odds that a labeler prefers the first (the model
    of Bradley and Terry). chosen, rejected: (B,) scores of the two summaries of each post ->
    scalar, in nats. Raises ValueError on unequal shapes or no pair.
    """
    check_shapes(chosen=chosen, rejected=rejected)
    if chosen.numel() == 0:
        raise ValueError(f"no pair: chosen and rejected have shape {tuple(chosen.shape)}")
    # logsigmoid, since -log(sigmoid(d)) is infinite below d = -89 in float32, where the loss is 89.
    # Figure 2 of the paper prints the loss without its minus sign; section 3.4 has it.
    return -F.logsigmoid(chosen - rejected).mean()


# ---------------------------------------------------------------------------- the model, B.1


class RewardModel(nn.Module):
    """The trunk of a language model (any AutoModelForCausalLM, copied, its lm head dropped) and a
    linear head that makes one number of each hidden state. The paper starts from pi_SFT (3.4)."""

    def __init__(self, language_model, own_copy=True):
        """own_copy=False: language_model is a trunk already, and is taken as it is."""
        super().__init__()
        # A copy: pi_SFT stays as it is. eval(), while it is trained as well: no dropout, as in the
        # 2020 code, so that a score is always the same
        trunk = copy_network(language_model, "reward", trunk=True) if own_copy else language_model
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

    def score(self, input_ids, attention_mask):
        """r(x, y): (B, L), (B, L) -> (B,), read at the last real token: EOS, if y ended.

        Only there has the model seen all of y. (The 2020 code reads it there; the paper says that a
        reward is for a whole summary.)
        """
        scores = self(input_ids, attention_mask)
        last = last_token_index(attention_mask)[:, None]  # (B, 1)
        return scores.take_along_dim(last, 1).squeeze(1)

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


# ---------------------------------------------------------------------------- training, B.1


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
                # Both summaries of a post, one after the other: 2b rows for b pairs. In one batch,
                # so that the post is read once for the two (N+ detail 10 puts them in one, too)
                queries, responses = [], []
                for row in part:
                    query, chosen, rejected = pairs[row]
                    queries += [query, query]
                    responses += [chosen, rejected]
                input_ids, attention_mask, Q = join(queries, responses, pad_id, device)
                T = input_ids.shape[1] - Q
                scores = final_scores(reward_model, input_ids, attention_mask, T, k=2)  # (2b,)
                better, worse = scores.view(-1, 2).unbind(1)  # (b,) each
                hits += (better > worse).sum()
                # The labeler's confidence is in the paper's data, but not in its loss (3.4).
                # Summed over parts and processes this is the mean over the batch
                adam_step.add(preference_loss(better, worse) * (len(part) / len(rows)))
        accuracy = sum_over_processes(hits).item() / len(rows)
        run.log("reward", step, loss=adam_step.loss, accuracy=accuracy)


def normalize(reward_model, queries, references, pad_id, batch_size=256):
    """Shift the scores so that the references have mean 0 (section 3.4); their spread stays."""
    # The loss sees differences only, so that a trained model has an arbitrary constant. Once that
    # is taken off, 0 means "as good as the average reference", and the -1 of a summary without EOS
    # (ppo.py) has a meaning. +=: these scores already lack the constant so far.
    scores = score_summaries(reward_model, queries, references, pad_id, batch_size)
    reward_model.reference_mean += scores.mean().to(reward_model.reference_mean)


@torch.no_grad()
def score_summaries(reward_model, queries, responses, pad_id, batch_size=256):
    """Scores (N,) of responses to queries (lists of token ids), in batches of similar length."""
    device = reward_model.head.weight.device
    # Similar lengths go together, so that little is padding; the result is in the order given
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]) + len(responses[i]))
    scores = torch.zeros(len(queries))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        input_ids, mask, _ = join([queries[i] for i in rows], [responses[i] for i in rows],
                                  pad_id, device)
        scores[rows] = reward_model.score(input_ids, mask).float().cpu()
    return scores


def preference_accuracy(chosen, rejected):
    """Share of pairs with chosen > rejected, (N,) each. A tie is not a hit: a model that gives all
    summaries the same score has learned nothing, and gets 0."""
    return (chosen > rejected).float().mean().item()


if __name__ == "__main__":
    chosen, rejected = torch.tensor([[2.0, 0.0, -1.0], [1.0, 0.5, -1.0]], requires_grad=True)
    loss = preference_loss(chosen, rejected)
    print("scores of chosen and rejected:", chosen.tolist(), rejected.tolist())
    print("per pair, -log sigmoid(gap):  ", (-F.logsigmoid(chosen - rejected)).tolist())
    print("preference loss:              ", loss.item())
    print("gradient on the chosen scores:", torch.autograd.grad(loss, chosen)[0].tolist())
    print("accuracy (a tie is no hit):   ", preference_accuracy(chosen, rejected))
    references = torch.tensor([1.5, 2.5, 0.5, 3.5])
    print("references after the shift:   ", (references - references.mean()).tolist())
