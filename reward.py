"""Step 2: the reward model (Stiennon et al. 2020, section 3.4 and appendix B.1).

A language-model trunk with a scalar head, trained on pairs of summaries of one post so that the
preferred summary scores higher, then shifted so that the human references score 0 on average.
`python reward.py` prints a worked example.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from transformers import AutoConfig, AutoModel
from transformers.hf_argparser import HfArg

from lm import check_shapes, cosine_schedule, epoch_batches, get_position_ids, join
from lm import last_token_index, microbatches, pack, trainable, unpack, update, without_adapter
from run import sum_over_processes


@dataclass
class RewardConfig:
    reward_lr: float = HfArg(default=6e-4, help="paper: 1.5e-5 (1.3B), cosine (B.1)")
    reward_batch_size: int = HfArg(default=8, help="pairs per step; paper: 64 (B.1)")
    reward_epochs: int = HfArg(default=1, help="paper: 1 (B.1)")


def preference_loss(chosen, rejected):
    """loss(r) = -E[log sigmoid(r(x, y_chosen) - r(x, y_rejected))], section 3.4.

    chosen, rejected: (B,) scores of the two summaries of each post -> scalar, in nats.
    logsigmoid, since -log(sigmoid(d)) is inf from d = -104 on in float32, where the loss is 104.
    Raises ValueError on unequal shapes or no pair.
    """
    check_shapes(chosen=chosen, rejected=rejected)
    if chosen.numel() == 0:
        raise ValueError(f"no pair: chosen and rejected have shape {tuple(chosen.shape)}")
    return -F.logsigmoid(chosen - rejected).mean()


class RewardModel(nn.Module):
    """Trunk of any AutoModelForCausalLM (copied, its lm head dropped) and a scalar head."""

    use_adapter = True  # False where the trunk is shared with a critic, whose adapter is not ours

    def __init__(self, language_model):
        super().__init__()
        self._build(copy.deepcopy(language_model.base_model))

    def _build(self, trunk):
        self.trunk = trunk.eval()
        width = trunk.config.hidden_size  # d
        self.head = nn.Linear(width, 1, device=trunk.device)
        # App. B.1: weights ~ N(0, variance 1/(d+1)), so that a first score is of order 1
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.head.bias)
        self.register_buffer("reference_mean", torch.zeros((), device=trunk.device))

    def forward(self, input_ids, attention_mask):
        """(B, L), (B, L) -> (B, L): a score at every real position; at padding it means nothing."""
        return self.scores_of(input_ids=input_ids, attention_mask=attention_mask,
                              position_ids=get_position_ids(attention_mask))

    def scores_of(self, **inputs):
        with nullcontext() if self.use_adapter else without_adapter(self.trunk):
            hidden = self.trunk(**inputs, use_cache=False).last_hidden_state  # (B, L, d)
        # a score is a single number: float32, whatever the trunk and autocast compute in
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return scores - self.reference_mean

    def at_response(self, input_ids, attention_mask, width, k=1):
        """(B, Q+T) -> (B, 1+T): the scores at the post's end and at each token of the response;
        k > 1: the rows are k responses to each post, computed once (lm.pack)."""
        scores = self.scores_of(**pack(input_ids, attention_mask, width, k, self.trunk.dtype))
        return unpack(scores[:, -k * width - 1 :], width, k)

    def score(self, input_ids, attention_mask, width=None, k=1):
        """(B, L), (B, L) -> (B,): the score at the last real token, the EOS of an ended summary."""
        if k > 1:
            last = attention_mask[:, -width:].sum(1, keepdim=True)
            return self.at_response(input_ids, attention_mask, width, k).gather(1, last).squeeze(1)
        scores = self(input_ids, attention_mask)
        return scores.gather(1, last_token_index(attention_mask)[:, None]).squeeze(1)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (trunk, head, reference_mean) to folder."""
        self.trunk.config.save_pretrained(folder)
        model = self
        if hasattr(self.trunk, "merge_and_unload"):  # an adapter is added to a copy of the weights
            model = copy.deepcopy(self)
            model.trunk = model.trunk.merge_and_unload()
        save_model(model, str(Path(folder) / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder):
        """The model that save_pretrained wrote, in eval mode: the same scores to the last bit."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model._build(AutoModel.from_config(config))
        load_model(model, str(Path(folder) / "model.safetensors"))
        return model.eval()


@torch.no_grad()
def score_summaries(reward_model, queries, responses, pad_id, batch_size=256):
    """Scores (N,) of responses to queries (lists of token ids), in batches of similar length."""
    device = reward_model.head.weight.device
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]) + len(responses[i]))
    scores = torch.zeros(len(queries))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        input_ids, mask, _ = join([queries[i] for i in rows], [responses[i] for i in rows],
                                  pad_id, device)
        scores[rows] = reward_model.score(input_ids, mask).float().cpu()
    return scores


def train_reward(run, reward_model, pairs, pad_id, config):
    """One pass of Adam over pairs = [(query, chosen, rejected), ...], lists of token ids."""
    device = reward_model.head.weight.device
    optimizer = torch.optim.Adam(trainable(reward_model), lr=config.reward_lr, fused=True)
    total, rows = epoch_batches(len(pairs), config.reward_batch_size, config.reward_epochs,
                                run.seed, "reward")

    def losses(batch):
        for part in microbatches(batch, config.micro_batch_size):
            # the two summaries of a post share its computation (lm.pack)
            queries = [pairs[i][0] for i in part for _ in range(2)]
            responses = [summary for i in part for summary in pairs[i][1:]]
            input_ids, mask, width = join(queries, responses, pad_id, device)
            scores = reward_model.score(input_ids, mask, input_ids.shape[1] - width, k=2)
            chosen, rejected = scores.view(-1, 2).unbind(1)
            hits.append((chosen > rejected).sum())
            yield preference_loss(chosen, rejected) * (len(part) / len(batch))

    for step in run.steps("reward", total, model=reward_model, optimizer=optimizer):
        batch, hits = rows(step), []
        loss = update(optimizer, losses(batch), config.reward_lr * cosine_schedule(step, total))
        n_hits = sum_over_processes(torch.stack(hits).sum())
        run.log("reward", step, loss=loss, accuracy=n_hits.item() / len(batch))


def normalize(reward_model, queries, references, pad_id):
    """Shift the scores so that the references have mean 0 (section 3.4); their spread stays."""
    scores = score_summaries(reward_model, queries, references, pad_id)
    reward_model.reference_mean += scores.mean().to(reward_model.reference_mean)


def preference_accuracy(chosen, rejected):
    """Share of pairs with chosen > rejected, (N,) each; a tie is not a hit."""
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
