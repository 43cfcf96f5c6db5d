"""The reward model r(x, y) (Stiennon et al. 2020, section 3.4 and appendix B.1).

People compared pairs of summaries of one post (3.3). A language model with a scalar head learns to
give the summary they preferred the higher score: `preference_loss`, the first equation of section
3.4. Then the scores are shifted so that the human references have 0 on average. They are what PPO
is rewarded with. A score means something only at the last token of a summary, where it was trained.

Read in this order: the loss, the model, the training loop, the shift. How good the model has
become: `judge.py`.

What differs from the paper: one seed, where it keeps the best of 3 to 10 (B.1); and for so small a
model a larger rate and a smaller batch. `python reward.py` prints a worked example.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_model, save_file
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel

from lm import check_shapes, cosine_schedule, generator_for, get_position_ids, join
from lm import last_token_index


@dataclass
class RewardConfig:
    # 6e-4 and 8: with 1e-3, or with larger batches, the tiny model learned what summaries look
    # like, and not to compare their facts with the post
    reward_lr: float = 6e-4  # learning rate; paper: 1.5e-5 (1.3B), cosine (B.1)
    reward_batch_size: int = 8  # pairs per step; paper: 64 (B.1)
    reward_epochs: int = 1  # passes over the data; paper: 1 (B.1)


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

    def __init__(self, language_model):
        super().__init__()
        # A copy: pi_SFT stays as it is. eval(), during training too (no dropout, as in the 2020
        # code): a text always gets the same score. All of it is trained, whatever pi_SFT was.
        self.trunk = copy.deepcopy(language_model.base_model).requires_grad_(True).eval()
        d = self.trunk.config.hidden_size
        self.head = nn.Linear(d, 1, device=self.trunk.device)  # (B, L, d) -> (B, L, 1)
        # B.1: weights ~ N(0, 1/(d+1)), the second number a variance. A hidden state has d entries
        # of order 1, so a first score is of order 1 too, where the sigmoid is steep.
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(d + 1))
        nn.init.zeros_(self.head.bias)
        # It is subtracted from each score; a buffer, which is saved and copied with the weights
        self.register_buffer("reference_mean", torch.zeros((), device=self.trunk.device))

    def forward(self, input_ids, attention_mask):
        """(B, L), (B, L) -> (B, L): a score at every real position; at padding it means nothing.

        Raises ValueError on unequal shapes.
        """
        check_shapes(input_ids=input_ids, attention_mask=attention_mask)
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask,
                            position_ids=get_position_ids(attention_mask),
                            use_cache=False).last_hidden_state  # (B, L, d)
        return self.head(hidden).squeeze(-1) - self.reference_mean

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
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, str(Path(folder) / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder):
        """The model that save_pretrained wrote, in eval mode: the same scores to the last bit."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Its random weights are all overwritten; load_model refuses where one is missing
        model = cls(AutoModel.from_config(config))
        load_model(model, str(Path(folder) / "model.safetensors"))
        return model.eval()


# ---------------------------------------------------------------------------- training, B.1


def train_reward(reward_model, pairs, pad_id, config, seed, log):
    """Adam on `preference_loss`, reward_epochs times over the comparisons (the paper: once, B.1).

    pairs: [(query, chosen, rejected), ...], lists of token ids. log: called as log("reward", step,
    loss=nats per pair, accuracy=share of this step's pairs). Changes reward_model in place.
    """
    device = reward_model.head.weight.device
    # Adam's defaults, as the paper names none; fused: the same step, in one kernel
    optimizer = torch.optim.Adam(reward_model.parameters(), lr=config.reward_lr, fused=True)
    B = min(config.reward_batch_size, len(pairs))
    per_epoch = len(pairs) // B  # the last incomplete batch is left out
    total = per_epoch * config.reward_epochs
    for step in tqdm(range(total), "reward", leave=False, disable=None):
        # Shuffled by the run's seed: the order matters, hence the paper's several seeds (B.1)
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(
                len(pairs), generator=generator_for(seed, "reward", epoch)).tolist()
        queries, chosen, rejected = zip(*(pairs[row] for row in order[place * B : (place + 1) * B]))

        # Both summaries of each post in one batch (as in Huang et al. 2024, detail 10): B rows with
        # the chosen ones, then B rows with the rejected ones, (2B, Q+T).
        input_ids, attention_mask, _ = join(queries + queries, chosen + rejected, pad_id, device)
        better, worse = reward_model.score(input_ids, attention_mask).chunk(2)  # (B,) each
        # The labeler's confidence is in the paper's data, but not in its loss (3.4).
        loss = preference_loss(better, worse)

        optimizer.param_groups[0]["lr"] = config.reward_lr * cosine_schedule(step, total)  # B.1
        optimizer.zero_grad()
        loss.backward()
        # Infinity: gradients are not clipped (the paper is silent), only looked at for a NaN.
        clip_grad_norm_(reward_model.parameters(), math.inf, error_if_nonfinite=True)
        optimizer.step()
        log("reward", step, loss=loss.item(), accuracy=preference_accuracy(better, worse))


def normalize(reward_model, queries, references, pad_id, batch_size=256):
    """Shift the scores so that the references have mean 0 (section 3.4); their spread stays."""
    # The loss sees only differences, so it leaves a constant free. Once that is taken off, 0 means
    # "as good as the average reference", and the -1 of a summary without EOS (ppo.py) has a
    # meaning. +=: the scores just measured have the old mean subtracted already.
    scores = score_summaries(reward_model, queries, references, pad_id, batch_size)
    reward_model.reference_mean += scores.mean().to(reward_model.reference_mean)


@torch.no_grad()
def score_summaries(reward_model, queries, responses, pad_id, batch_size=256):
    """Scores (N,) of responses to queries (lists of token ids)."""
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
