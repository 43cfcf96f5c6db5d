"""Step 3: PPO against the reward model (Stiennon et al. 2020, section 3.4 and appendix B.1).

Sample summaries, score them, pay a KL penalty per token, estimate advantages, and update the
policy and the critic, four passes over each batch. `python ppo.py` prints a worked example.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.hf_argparser import HfArg

from lm import add_adapter, check_finite, check_mask, check_shapes, checkpoint_activations
from lm import generator_for, get_response_mask, linear_schedule, masked_mean, pad
from lm import response_log_probs, sample, trainable, trim, update, without_adapter, zero_off
from run import SettingError, agreed, gather, n_processes, rank, sum_over_processes
from run import warn_of_collapse


@dataclass
class PPOConfig:
    ppo_lr: float = HfArg(default=3e-4, help="paper: 1.5e-5 (1.3B), linear to 0 (B.1)")
    ppo_episodes: int = HfArg(default=2560, help="summaries sampled in all; paper: 1M (B.1)")
    ppo_batch_size: int = HfArg(default=64, help="summaries per update; paper: 512 (B.1)")
    ppo_epochs: int = HfArg(default=4, help="passes over each batch; paper: 4 (B.1)")
    ppo_minibatches: int = HfArg(default=1, help="steps per pass; paper silent; 2019 code: 1")
    return_sequences: int = HfArg(default=1, help="summaries per post; paper silent; notebook: 4")
    kl_beta: float = HfArg(default=0.05, help="weight of the KL penalty; paper: 0.05 (B.1)")
    gamma: float = HfArg(default=1.0, help="discount; paper: 1 (3.4)")
    lam: float = HfArg(default=0.95, help="lambda of GAE; paper: 0.95 (B.1)")
    clip_range: float = HfArg(default=0.2, help="of the ratio; paper silent; 2019 code: 0.2")
    clip_range_value: float = HfArg(default=0.2, help="paper silent; 2019 code: 0.2")
    value_weight: float = HfArg(default=0.1, help="of the value loss; paper silent; 2019 code: 0.1")
    missing_eos: float = HfArg(default=-1.0, help="score without EOS; paper silent; N+: -1")
    temperature: float = HfArg(default=1.0, help="of rollouts; paper silent; N+: 0.7")
    response_length: int = HfArg(default=48, help="tokens of a summary at most; paper: 48 (3.2)")
    max_grad_norm: float = HfArg(default=1.0, help="paper silent; 2019 code: no clipping")


def check_response_mask(mask):
    """Return mask as bool; raise ValueError unless every row has an action."""
    mask = mask != 0
    if mask.numel() == 0 or not mask.any(1).all():
        raise ValueError(f"every row of mask {tuple(mask.shape)} needs at least one action")
    return mask


def penalize_missing_eos(scores, mask_has_eos, value=-1.0):
    """Replace the score of a summary that never ended by `value` (N+ detail 23; paper: silent).

    scores, mask_has_eos: (B,) -> (B,). Raises ValueError on unequal shapes.
    """
    check_shapes(scores=scores, mask_has_eos=mask_has_eos)
    return torch.where(mask_has_eos != 0, scores, torch.full_like(scores, value))


def kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, kl_beta):
    """R(x, y) = r(x, y) - beta log[pi_RL(y|x) / pi_SFT(y|x)] (section 3.4), spread over the tokens.

    scores: (B,); log_probs, ref_log_probs, mask: (B, T) -> (B, T), zero off the mask. Each action
    pays -beta (log_probs - ref_log_probs); the score is paid once, at the last action, so that a
    row sums to R(x, y).
    """
    check_shapes(log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} must have one entry per row of "
                         f"log_probs, ref_log_probs and mask {tuple(mask.shape)}")
    mask = check_response_mask(mask)
    log_probs, ref_log_probs = zero_off(mask, log_probs, ref_log_probs)
    rewards = -kl_beta * (log_probs - ref_log_probs)
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


@torch.no_grad()
def compute_gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016), from the last action backwards:

        delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    with V = A = 0 after the last action. rewards, values, mask: (B, T), V_t the value of the state
    before action t -> advantages and returns (A + V), (B, T) each, zero off the mask, detached.
    Raises ValueError on unequal shapes or a row without an action.
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    mask = check_response_mask(mask)
    rewards, values = zero_off(mask, rewards, values)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    # before whitening: the critic regresses to the unscaled return
    return advantages, zero_off(mask, advantages + values)[0]


def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over the masked entries of the whole batch, else zero.

    Paper silent; the 2019 code and N+ (detail 25) whiten advantages so, with the population
    variance. 1e-8 keeps a constant input finite. x, mask: (B, T) -> (B, T).
    """
    mean = masked_mean(x, mask)
    (x,) = zero_off(mask != 0, x)
    variance = masked_mean((x - mean) ** 2, mask)
    return zero_off(mask != 0, (x - mean) * torch.rsqrt(variance + 1e-8))[0]


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) as a loss, with rho = pi / pi_old:

        E[ max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) ]

    All (B, T) -> the mean over the masked tokens of the batch, and the fraction of them where the
    clip holds the policy back. Raises ValueError on unequal shapes or an empty mask.
    """
    check_shapes(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    mask = check_mask(mask)
    log_probs, old_log_probs, advantages = zero_off(mask, log_probs, old_log_probs, advantages)
    # beyond 88 exp overflows float32, and inf would make the gradient NaN where the clip has won
    largest = math.floor(math.log(torch.finfo(log_probs.dtype).max))
    ratio = torch.exp((log_probs - old_log_probs).clamp(max=largest))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.max(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).float(), mask)


def value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Clipped value loss of the 2019 code (the paper is silent), the 1/2 inside:

        1/2 E[ max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) ]

    All (B, T) -> the masked mean, and the fraction of tokens where the clipped term is larger.
    Raises ValueError on unequal shapes or an empty mask.
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    mask = check_mask(mask)
    values, old_values, returns = zero_off(mask, values, old_values, returns)
    plain = (values - returns) ** 2
    # not old + clamp(new - old), which is off new by a rounding error where nothing is clipped
    near_old = values.clamp(old_values - clip_range, old_values + clip_range)
    clipped = (near_old - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).float(), mask)


# ---------------------------------------------------------------------------- the loop


def response_values(critic, input_ids, attention_mask, width, k=1):
    """V_t from the position before action t: (B, Q+T) -> (B, T). A value never sees its action."""
    return critic.at_response(input_ids, attention_mask, width, k)[:, :-1]


@torch.no_grad()
def rollout(policy, reference, reward_model, critic, queries, tokenizer, config, generator):
    """Sample return_sequences summaries for each query (lists of token ids), and all that the
    update reads of them.

    Returns a dict of tensors with rows B: input_ids and attention_mask (B, Q+T); mask, log_probs,
    ref_log_probs, values, advantages, returns (B, T); scores, kl, ended (B,).
    """
    pad_id, eos, k = tokenizer.pad_token_id, tokenizer.eos_token_id, config.return_sequences
    n = max(1, (config.rollout_batch_size or k * len(queries)) // k)  # posts at a time
    if n < len(queries):
        queries = sorted(queries, key=len)  # little padding in each part
    responses = []
    for start in range(0, len(queries), n):
        ids, mask = (x.to(policy.device) for x in pad(queries[start : start + n], pad_id, True))
        responses += sample(policy, ids, mask, config.response_length, eos_token_id=eos,
                            pad_token_id=pad_id, temperature=config.temperature,
                            generator=generator, k=k)
    responses = pad_sequence(responses, batch_first=True, padding_value=pad_id)
    query_ids, query_mask = (x.to(policy.device).repeat_interleave(k, 0)
                             for x in pad(queries, pad_id, left=True))
    mask = get_response_mask(responses, eos)
    ended = (responses == eos).any(1)
    input_ids = torch.cat([query_ids, responses], 1)
    attention_mask = torch.cat([query_mask, mask.long()], 1)

    T, measured = responses.shape[1], []
    for ids, real in zip(input_ids.split(n * k), attention_mask.split(n * k)):
        ids, real, width = trim(ids, real, T)
        inputs = ids, real, width
        with without_adapter(reference):
            ref_log_probs = response_log_probs(reference, *inputs, config.temperature, k)
        by_token = (response_log_probs(policy, *inputs, config.temperature, k), ref_log_probs,
                    response_values(critic, *inputs, k))
        measured.append([F.pad(x, (0, T - width)) for x in by_token]
                        + [reward_model.score(*inputs, k)])
    log_probs, ref_log_probs, values, scores = map(torch.cat, zip(*measured))
    scores = penalize_missing_eos(scores, ended, config.missing_eos)

    rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_beta)
    advantages, returns = compute_gae(rewards, values, mask, config.gamma, config.lam)
    kl = zero_off(mask, log_probs - ref_log_probs)[0].sum(1)  # nats per summary
    return {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask,
            "log_probs": log_probs, "ref_log_probs": ref_log_probs, "values": values,
            "advantages": advantages, "returns": returns,
            "scores": scores, "kl": kl, "ended": ended}


def whiten_over_processes(advantages, mask):
    """whiten over the tokens of all processes: gather, whiten, take our own."""
    tokens = gather(advantages[mask])  # one vector per process
    flat = torch.cat(tokens)
    parts = whiten(flat, torch.ones_like(flat)).split([len(part) for part in tokens])
    return torch.zeros_like(advantages).masked_scatter(mask, parts[rank()])


def check_first_update(log_probs, batch, tolerance=1e-4):
    """Before the first update the policy is both the sampler and the SFT model: ratio 1, KL 0.

    Raises RuntimeError otherwise: then padding, positions, dropout or precision differ between two
    forward passes of one model, and every later ratio would be wrong by as much.
    """
    for name, other in (("old", batch["log_probs"]), ("reference", batch["ref_log_probs"])):
        gap = zero_off(batch["mask"], (log_probs - other).abs())[0].max().item()
        if not gap <= tolerance:
            raise RuntimeError(
                f"before the first update the policy's log-probs differ from the {name} ones by "
                f"{gap:.2g} nats (at most {tolerance:g} expected): the ratio is not 1 or the KL not"
                " 0. Look for dropout, position ids that count padding, a mask shifted by one, or "
                "half precision")


def posts_per_update(config):
    """Posts whose summaries make one update; SettingError unless the processes share them evenly
    (one with fewer would make fewer minibatches, and the others wait for it)."""
    n_posts = max(1, config.ppo_batch_size // config.return_sequences)
    if n_posts % n_processes():
        raise SettingError(f"--ppo_batch_size {config.ppo_batch_size}: {n_posts} posts an update "
                           f"can't be shared evenly among {n_processes()} processes")
    return n_posts


def train_ppo(run, policy, reward_model, queries, tokenizer, config, evaluate=None):
    """Step 3. Changes policy in place and returns the critic.

    queries: lists of token ids. evaluate(update), if given, is called after every update.
    The SFT model (reference) and the reward model stay as they are.
    """
    reward_model.requires_grad_(False)
    # section 3.4: the value function is initialised to the reward model, head and all, and shares
    # no weight with the policy, which value updates could damage early on (App. G.1)
    if config.lora_rank:  # pi_SFT is the policy without its adapter, r the critic without its own
        torch.manual_seed(run.seed)
        network = reference = add_adapter(policy, config.lora_rank)
        reward_model.trunk = add_adapter(reward_model.trunk, config.lora_rank)
        # deepcopy takes what its second argument holds for copied: the two share the trunk
        critic = copy.deepcopy(reward_model, {id(reward_model.trunk): reward_model.trunk})
        critic.head.requires_grad_(True)
        reward_model.use_adapter = False
    else:
        network, reference = policy, copy.deepcopy(policy).requires_grad_(False)
        critic = copy.deepcopy(reward_model).requires_grad_(True)
    if config.checkpoint_activations:
        checkpoint_activations(policy)
        checkpoint_activations(critic.trunk)
    policy_optimizer, critic_optimizer = (
        torch.optim.Adam(trainable(model), lr=config.ppo_lr, eps=1e-5, fused=True)
        for model in (network, critic))

    def parts(posts, count):
        """The microbatches of these posts' summaries, each with its share of the minibatch's
        tokens, of similar length and without the columns that are padding in all rows."""
        size = max(1, (config.micro_batch_size or k * len(posts)) // k)
        if size < len(posts):
            posts = posts[batch["attention_mask"][::k].sum(1)[posts].argsort()]
        for some in posts.split(size):
            rows = (some[:, None] * k + torch.arange(k, device=some.device)).flatten()
            part = {name: tensor[rows] for name, tensor in batch.items()}
            ids, real, width = trim(part["input_ids"], part["attention_mask"],
                                    part["mask"].shape[1])
            part = {name: x[:, :width] if x.dim() > 1 else x for name, x in part.items()}
            yield (ids, real, width), part, part["mask"].sum().double() / count

    def policy_of(inputs, part):
        log_probs = response_log_probs(network, *inputs, config.temperature, k)
        if step == n_updates == 0:
            exact = (policy.dtype == torch.float32
                     and not torch.is_autocast_enabled(policy.device.type))
            check_first_update(log_probs.detach(), part, 1e-4 if exact else 5e-2)
        return policy_loss(log_probs, part["log_probs"], part["advantages"], part["mask"],
                           config.clip_range)

    def value_of(inputs, part):
        return value_loss(response_values(critic, *inputs, k), part["values"], part["returns"],
                          part["mask"], config.clip_range_value)

    def losses(name, loss_of, weight, posts, count):
        for inputs, part, share in parts(posts, count):
            loss, clipped = loss_of(inputs, part)
            stats[f"{name}_loss"] += loss.detach() * share
            stats[f"{name}_clip_fraction"] += clipped * share
            yield weight * loss * share

    k = config.return_sequences
    n_posts = posts_per_update(config)
    total = max(1, config.ppo_episodes // config.ppo_batch_size)
    for step in run.steps("ppo", total, snapshot=True, policy=network, critic=critic,
                          policy_optimizer=policy_optimizer, critic_optimizer=critic_optimizer):
        generator = generator_for(run.seed, "ppo", step * n_processes() + rank(),
                                  device=policy.device)
        chosen = range(step * n_posts, (step + 1) * n_posts)[rank() :: n_processes()]
        # every summary of a post is trained on: a best-of-n choice would not be pi_old's sample
        with agreed():
            batch = rollout(network, reference, reward_model, critic,
                            [queries[i % len(queries)] for i in chosen], tokenizer, config,
                            generator)
            check_finite(reward=batch["scores"], KL=batch["kl"], **{"return": batch["returns"]})
        batch["advantages"] = whiten_over_processes(batch["advantages"], batch["mask"])
        lr = config.ppo_lr * linear_schedule(step, total)
        n_updates, stats = 0, Counter()
        for epoch in range(config.ppo_epochs):
            order = torch.randperm(len(chosen),
                                   generator=generator_for(run.seed, "ppo epoch", step, epoch))
            for posts in order.to(policy.device).chunk(config.ppo_minibatches):
                count = sum_over_processes(batch["mask"].unflatten(0, (-1, k))[posts].sum())
                update(policy_optimizer, losses("policy", policy_of, 1, posts, count), lr,
                       config.max_grad_norm, "policy_loss")
                update(critic_optimizer,
                       losses("value", value_of, config.value_weight, posts, count), lr,
                       config.max_grad_norm, "value_loss")
                n_updates += 1
        means = {"reward": batch["scores"], "kl_per_summary": batch["kl"],
                 "length": batch["mask"].sum(1), "ended": batch["ended"],
                 "entropy": -batch["log_probs"][batch["mask"]]}
        run.log("ppo", step, lr=lr,
                **{name: torch.cat(gather(x.float())).mean().item() for name, x in means.items()},
                **{name: sum_over_processes(x).item() / n_updates for name, x in stats.items()})
        warn_of_collapse(run)
        if evaluate:
            evaluate(step + 1)
    if config.lora_rank:
        network.merge_and_unload()  # into the weights of policy
    return critic


if __name__ == "__main__":
    # A summary of three actions (the third is EOS) and one position of padding; score 2, beta 0.05
    log_probs, ref_log_probs = torch.tensor([[[-1.0, -2, -0.5, -3]], [[-1.2, -1.5, -1, -3]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    rewards = kl_penalized_rewards(torch.tensor([2.0]), log_probs, ref_log_probs, mask, 0.05)
    print("rewards:", rewards.tolist(), "sum = score - beta KL =", rewards.sum().item())
    values = torch.tensor([[0.1, 0.2, 0.3, 0.0]])
    advantages, returns = compute_gae(rewards, values, mask)
    print("advantages:", advantages.tolist(), "returns:", returns.tolist())
    print("whitened:", whiten(advantages, mask).tolist())
    ratio, a = torch.tensor([[[1.5, 1.5, 0.5, 0.5, 1.1]], [[1.0, -1.0, 1.0, -1.0, 2.0]]])
    loss, clipped = policy_loss(ratio.log(), torch.zeros(1, 5), a, torch.ones(1, 5))
    print("policy loss:", loss.item(), "clip fraction:", clipped.item())
    v = torch.tensor([[1.5, 1.1, 0.5]])
    loss, clipped = value_loss(v, torch.ones(1, 3), torch.full((1, 3), 2.0), torch.ones(1, 3))
    print("value loss:", loss.item(), "clip fraction:", clipped.item())
