"""PPO against the reward model (Stiennon et al. 2020, section 3.4, appendices B.1 and G.1).

The policy writes summaries, the reward model scores them, a KL penalty holds it to the supervised
model, and PPO (Schulman et al. 2017) makes actions that did better than expected more likely. Read
the equations first, each one function; then `rollout`, which gathers all numbers of a batch of
summaries, and `train_ppo`, which learns from them. `python ppo.py` prints a worked example.

The paper says nothing about clip ranges, whitening, the value loss, minibatches, the temperature of
rollouts, or summaries that never end. These are from "the 2019 code" (openai/lm-human-preferences,
by the same group; the trainer of this paper was never released) and from "N+" (Huang et al. 2024,
arXiv 2403.17031, a study of this paper's details); each line says which. From the paper we differ
in sizes and rates (PPOConfig). Where it is silent, we differ on purpose from these two in:

- Two optimisers, one for the policy and one for the critic; both codes have one, on a summed loss.
  Here no weight is in both losses, so that without clipping Adam would take the same steps.
- The gradient of each network is clipped to norm 1, to be safe from single batches (neither clips).
- Rollouts are sampled at temperature 1 (both codes: 0.7).
- Rewards are not whitened (the 2019 code whitens them, N+ does not by default).
- The score is paid at EOS itself, as in the 2019 code (N+: one place later).
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from lm import check_finite, check_mask, check_shapes, generator_for, get_response_mask, is_eos
from lm import linear_schedule, masked_mean, pad, response_log_probs, sample, zero_off


@dataclass
class PPOConfig:
    # Each line is a flag of rlhf_minimal.py, and its comment the help; bounds: RANGES there
    # 3e-4 and batches of 64: so small a model takes larger rates, and learns from fewer summaries
    ppo_lr: float = 3e-4  # learning rate; paper: 1.5e-5 (1.3B), linear decay (B.1)
    ppo_episodes: int = 2560  # summaries sampled in all; paper: 1M (B.1)
    ppo_batch_size: int = 64  # summaries per update; paper: 512 (B.1)
    ppo_epochs: int = 4  # passes over each batch; paper: 4 (B.1)
    ppo_minibatches: int = 1  # steps per pass; paper silent; 2019 code: 1
    return_sequences: int = 1  # summaries per post; paper silent
    kl_beta: float = 0.05  # weight of the KL penalty; paper: 0.05 (B.1)
    gamma: float = 1.0  # discount; paper: 1 (3.4)
    lam: float = 0.95  # lambda of GAE; paper: 0.95 (B.1)
    clip_range: float = 0.2  # of the ratio; paper silent; 2019 code: 0.2
    clip_range_value: float = 0.2  # of the value; paper silent; 2019 code: 0.2
    # Nearly inert: the critic has an Adam of its own, which divides by the size of the gradient
    value_weight: float = 0.1  # of the value loss; paper silent; 2019 code: 0.1
    missing_eos: float = -1.0  # score without EOS; paper silent; 2019, N+: -1
    temperature: float = 1.0  # of rollouts; paper silent; 2019, N+: 0.7
    response_length: int = 48  # tokens of a summary at most; paper: 48 (3.2)
    max_grad_norm: float = 1.0  # longer gradients are scaled to it; paper silent; 2019 code: none


# ---------------------------------------------------------------------------- the reward, 3.4


def penalize_missing_eos(scores, mask_has_eos, value=-1.0):
    """Replace the score of a summary that never ended by `value` (N+ detail 23; paper: silent).

    In training the reward model saw almost no summary without EOS (only those cut for length), so
    its score of one is a guess. mask_has_eos: True where one has EOS. scores, mask_has_eos: (B,)
    -> (B,). Raises ValueError on unequal shapes.
    """
    check_shapes(scores=scores, mask_has_eos=mask_has_eos)
    return torch.where(mask_has_eos != 0, scores, torch.full_like(scores, value))


def kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, kl_beta):
    """R(x, y) = r(x, y) - beta log[pi_RL(y|x) / pi_SFT(y|x)] (section 3.4), spread over the tokens.

    scores: (B,); log_probs, ref_log_probs, mask: (B, T) -> (B, T), zero off the mask. The logarithm
    of a product is a sum, so each action pays its own -beta (log_probs - ref_log_probs). The score
    is paid once, at the last action, so that a row sums to R(x, y). Raises ValueError on unequal
    shapes or a row without an action.
    """
    check_shapes(log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} must have one entry per row of "
                         f"log_probs, ref_log_probs and mask {tuple(mask.shape)}")
    mask = check_mask(mask, every_row=True)
    # The sum of log_probs - ref_log_probs over a summary is on average the KL. That of a single
    # summary may well be negative
    rewards = -kl_beta * zero_off(log_probs - ref_log_probs, mask)
    # The last action is where the count of actions so far reaches its maximum first
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # (B, 1)
    # N+ pays the score one place later, at the first padding: the sum is the same, and since its
    # GAE has one step more, the advantages differ a little
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


# ---------------------------------------------------------------------------- advantages


@torch.no_grad()
def compute_gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (GAE, Schulman et al. 2016), from the last action backwards:

        delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    with V = A = 0 after the last action, also where a summary was cut at response_length: the
    episode is over there, too. An advantage is how much better an action turned out than
    the critic expected; lam < 1 trusts the critic more and the single outcome less. gamma = 1 (3.4)
    and lam = .95 (B.1) are the paper's.

    rewards, values, mask: (B, T), V_t the value of the state before action t -> advantages and
    returns (A + V), (B, T) each, zero off the mask, detached. Raises ValueError on unequal shapes
    or a row without an action.
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    mask = check_mask(mask, every_row=True)
    rewards, values = zero_off(rewards, mask), zero_off(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,): nothing after the end
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    # Returns use the advantages as they are: whitened ones would change the scale of what the
    # critic learns to predict
    return advantages, zero_off(advantages + values, mask)


def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over the masked entries of the whole batch, else zero.

    So about half of the actions are made more likely, whatever the level of the rewards. Paper
    silent; the 2019 code and N+ (detail 25) whiten so, with the population variance. 1e-8 keeps a
    constant input finite. x, mask: (B, T) -> (B, T). Raises ValueError on unequal shapes or an
    empty mask.
    """
    mean = masked_mean(x, mask)
    deviations = zero_off(x, mask != 0) - mean
    variance = masked_mean(deviations**2, mask)
    return zero_off(deviations * torch.rsqrt(variance + 1e-8), mask != 0)


# ---------------------------------------------------------------------------- the two losses


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) as a loss, with rho = pi / pi_old:

        E[ max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) ]

    Where an action has already become likelier (or less likely) by clip_range than it was when it
    was sampled, in the direction of its advantage, its gradient is zero: the old samples are not
    trusted further than that. All (B, T) -> the mean over the masked tokens of the batch, and the
    fraction of them where the clip holds the policy back. Raises ValueError on unequal shapes or an
    empty mask.
    """
    check_shapes(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    mask = check_mask(mask)
    log_ratio = zero_off(log_probs, mask) - zero_off(old_log_probs, mask)
    advantages = zero_off(advantages, mask)
    # Beyond 88 exp overflows float32, and inf would make the gradient NaN where the clip has won
    ratio = torch.exp(log_ratio.clamp(max=88))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    # The maximum is the pessimistic one of the two. Where the ratio has moved against the
    # advantage, that is the plain term, and its gradient pulls back
    loss = masked_mean(torch.max(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).to(loss.dtype), mask)


def value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Clipped value loss of the 2019 code (the paper is silent), the 1/2 inside:

        1/2 E[ max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) ]

    The critic learns to predict the returns. Once a value has moved by clip_range towards its
    return, from what it was when the summaries were sampled, it gets no more gradient. All (B, T)
    -> the masked mean, and the fraction of tokens where the clipped term is larger. Raises
    ValueError on unequal shapes or an empty mask.
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    mask = check_mask(mask)
    values, old_values = zero_off(values, mask), zero_off(old_values, mask)
    returns = zero_off(returns, mask)
    plain = (values - returns) ** 2
    # Not old + clamp(new - old): it rounds, and unclipped tokens would count as clipped
    near_old = values.clamp(old_values - clip_range, old_values + clip_range)
    clipped = (near_old - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).to(loss.dtype), mask)


# ---------------------------------------------------------------------------- a batch of summaries


class Batch(NamedTuple):
    """The B summaries of one update, and all numbers about them. A minibatch is some rows of it."""

    input_ids: torch.Tensor  # (B, Q+T), the post and its summary
    attention_mask: torch.Tensor  # (B, Q+T)
    mask: torch.Tensor  # (B, T) bool: the actions, EOS included
    ended: torch.Tensor  # (B,) bool: it wrote EOS
    log_probs: torch.Tensor  # (B, T) of pi_old, the policy that wrote them
    ref_log_probs: torch.Tensor  # (B, T) of pi_SFT
    values: torch.Tensor  # (B, T): V before each action
    scores: torch.Tensor  # (B,): r(x, y), or missing_eos where it did not end
    kl: torch.Tensor  # (B,): log pi_old(y|x) / pi_SFT(y|x), nats per summary
    rewards: torch.Tensor  # (B, T): scores and KL penalty, token by token
    advantages: torch.Tensor  # (B, T), whitened
    returns: torch.Tensor  # (B, T): what the critic should have said


def response_values(critic, input_ids, attention_mask, width):
    """V_t, read at the position before action t: (B, Q+T) -> (B, T). A value never sees its action:
    it is what the critic expects of a summary that has been written up to there."""
    return critic(input_ids, attention_mask)[:, -width - 1 : -1]


@torch.no_grad()
def rollout(policy, reference, reward_model, critic, queries, tokenizer, config, generator):
    """Sample a summary of each query (lists of token ids), and gather all its numbers: a Batch.

    Raises FloatingPointError where a score, a KL or a return is not finite.
    """
    # 1. Summaries, token by token, y ~ pi_RL(. | x), until EOS ends the episode (3.4).
    eos, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    query_ids, query_mask = pad(queries, pad_id, left=True, device=policy.device)  # (B, Q) each
    responses = sample(policy, query_ids, query_mask, config.response_length, eos_token_id=eos,
                       pad_token_id=pad_id, temperature=config.temperature,
                       generator=generator)  # (B, T)
    mask = get_response_mask(responses, eos)  # (B, T)
    ended = is_eos(responses, eos).any(1)  # (B,)
    input_ids = torch.cat([query_ids, responses], 1)  # (B, Q+T)
    attention_mask = torch.cat([query_mask, mask], 1)  # (B, Q+T)

    # 2. The four networks read them. (log pi_old is not taken from sampling, so that it is computed
    # just as log pi will be: before the first step the ratio is then 1.)
    inputs = input_ids, attention_mask, responses.shape[1]
    log_probs = response_log_probs(policy, *inputs, config.temperature)  # (B, T)
    ref_log_probs = response_log_probs(reference, *inputs, config.temperature)  # (B, T)
    values = response_values(critic, *inputs)  # (B, T)
    scores = reward_model.score(input_ids, attention_mask)  # (B,)

    # 3. R = r - beta log(pi_RL / pi_SFT), token by token (3.4).
    scores = penalize_missing_eos(scores, ended, config.missing_eos)
    rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_beta)  # (B, T)
    kl = zero_off(log_probs - ref_log_probs, mask).sum(1)  # (B,)

    # 4. Advantages and returns: GAE with gamma = 1 (3.4) and lambda = .95 (B.1); then whitened.
    advantages, returns = compute_gae(rewards, values, mask, config.gamma, config.lam)  # (B, T)
    for name, x in (("reward", scores), ("KL", kl), ("return", returns)):
        check_finite(name, x)
    return Batch(input_ids, attention_mask, mask, ended, log_probs, ref_log_probs, values, scores,
                 kl, rewards, whiten(advantages, mask), returns)


def check_first_update(log_probs, part, tolerance=1e-3):
    """Before the first update the policy is both the sampler and the SFT model: ratio 1, KL 0.

    Raises RuntimeError otherwise: then padding, positions, dropout or precision differ between two
    forward passes of one model, and every later ratio would be wrong by as much.
    """
    for name, other in (("old", part.log_probs), ("reference", part.ref_log_probs)):
        gap = zero_off((log_probs - other).abs(), part.mask).max().item()
        if not gap <= tolerance:
            raise RuntimeError(f"before the first update the policy's log-probs differ from the "
                               f"{name} ones by {gap:.2g} nats: look for dropout, positions that "
                               "count padding, a mask shifted by one, or half precision")


# ---------------------------------------------------------------------------- the loop

STEP_METRICS = ("policy_loss", "policy_clip_fraction", "value_loss", "value_clip_fraction",
                "kl_to_old_policy")  # what train_ppo notes of each step


def train_ppo(policy, reward_model, queries, tokenizer, config, seed, log,
              evaluate=lambda update: None, critic=None):
    """Turn the SFT model, policy, into pi_RL, in place; returns the critic.

    queries: posts as lists of token ids. They need no summary: PPO learns from its own. log: called
    as log("ppo", update, **metrics). evaluate: called after each update with the number of updates
    so far. critic: one to start from, instead of a copy of the reward model.
    """
    # pi_SFT is a copy of the policy as it is now. No optimiser has the weights of that copy or of
    # the reward model, so that both stay as they are. V starts as the reward model, head and all
    # (3.4). It shares no weight with the policy: early value updates could damage what was
    # pretrained (G.1).
    reference = copy.deepcopy(policy)
    critic = critic or copy.deepcopy(reward_model)
    # eps: N+; the paper doesn't say. fused: the same step, in one kernel.
    policy_adam = torch.optim.Adam(policy.parameters(), lr=config.ppo_lr, eps=1e-5, fused=True)
    critic_adam = torch.optim.Adam(critic.parameters(), lr=config.ppo_lr, eps=1e-5, fused=True)
    n_updates = max(1, config.ppo_episodes // config.ppo_batch_size)  # paper: 1M / 512 = 1,953
    for update in tqdm(range(n_updates), "ppo", leave=False, disable=None):
        # The rate of both decays linearly (B.1). In the paper beta is fixed (B.1).
        lr = config.ppo_lr * linear_schedule(update, n_updates)
        policy_adam.param_groups[0]["lr"] = critic_adam.param_groups[0]["lr"] = lr

        # A batch of fresh summaries by pi_old, the policy as it is now (512 in the paper), of the
        # next posts; after the last one come the first ones again. Several summaries of a post
        # (return_sequences) are several rows, one after the other.
        first = update * config.ppo_batch_size
        posts = [queries[i // config.return_sequences % len(queries)]
                 for i in range(first, first + config.ppo_batch_size)]  # B of them
        batch = rollout(policy, reference, reward_model, critic, posts, tokenizer, config,
                        generator_for(seed, "ppo", update, device=policy.device))

        # Four passes over it (B.1), in each of them a step of both networks for each minibatch.
        # The paper has no entropy bonus: the KL penalty does its work (3.4).
        steps = []
        for epoch in range(config.ppo_epochs):
            shuffle = generator_for(seed, "ppo epoch", update, epoch)
            permutation = torch.randperm(len(posts), generator=shuffle)  # of the B rows
            for rows in permutation.chunk(config.ppo_minibatches):
                part = Batch(*(x[rows] for x in batch))  # b rows of it
                inputs = part.input_ids, part.attention_mask, part.mask.shape[1]

                # The policy's step: actions that did better than expected become more likely.
                log_probs = response_log_probs(policy, *inputs, config.temperature)  # (b, T)
                if update == 0 and not steps:  # nothing has changed yet: the ratio is 1
                    check_first_update(log_probs, part)
                loss_p, clipped_p = policy_loss(log_probs, part.log_probs, part.advantages,
                                                part.mask, config.clip_range)
                policy_adam.zero_grad()
                loss_p.backward()
                clip_grad_norm_(policy.parameters(), config.max_grad_norm, error_if_nonfinite=True)
                policy_adam.step()

                # The critic's step: what it expected comes closer to what was earned. The returns
                # stay those of the rollout in all passes.
                values = response_values(critic, *inputs)  # (b, T)
                loss_v, clipped_v = value_loss(values, part.values, part.returns, part.mask,
                                               config.clip_range_value)
                critic_adam.zero_grad()
                (config.value_weight * loss_v).backward()
                clip_grad_norm_(critic.parameters(), config.max_grad_norm, error_if_nonfinite=True)
                critic_adam.step()

                # KL(pi_old || pi), estimated before this step: 0 at the first one
                moved = masked_mean(part.log_probs - log_probs, part.mask)
                steps.append(torch.stack([loss_p, clipped_p, loss_v, clipped_v, moved]).detach())
        means = torch.stack(steps).double().mean(0).tolist()  # over all steps of all passes
        log("ppo", update, lr=lr, **batch_metrics(batch), **dict(zip(STEP_METRICS, means)))
        evaluate(update + 1)
    return critic


def batch_metrics(batch):
    """What a line of metrics.jsonl says of a batch of summaries: numbers by name."""
    values, returns = batch.values[batch.mask], batch.returns[batch.mask]  # of all actions
    return {
        "reward": batch.scores.mean().item(),  # without the KL penalty; references have mean 0
        "kl_per_summary": batch.kl.mean().item(),  # nats
        "length": batch.mask.sum(1).float().mean().item(),  # tokens
        "ended": batch.ended.float().mean().item(),
        # -log pi of what was sampled: on average the entropy, nats per token
        "entropy": -batch.log_probs[batch.mask].mean().item(),
        # 1: the critic foresees each return; 0: it knows no more than their mean; below: less
        "explained_variance": 1 - ((returns - values).var() / returns.var()).item()}


if __name__ == "__main__":
    # A summary of three actions (the third is EOS) and one position of padding; score 2, beta 0.05
    log_probs, ref_log_probs = torch.tensor([[[-1.0, -2, -0.5, -3]], [[-1.2, -1.5, -1, -3]]])
    mask, values = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0.1, 0.2, 0.3, 0.0]])
    rewards = kl_penalized_rewards(torch.tensor([2.0]), log_probs, ref_log_probs, mask, 0.05)
    print("rewards:", rewards.tolist(), "sum = score - beta KL =", rewards.sum().item())
    advantages, returns = compute_gae(rewards, values, mask)
    print("advantages:", advantages.tolist(), "returns:", returns.tolist())
    print("whitened:", whiten(advantages, mask).tolist())
    ratio, a = torch.tensor([[[1.5, 1.5, 0.5, 0.5, 1.1]], [[1.0, -1.0, 1.0, -1.0, 2.0]]])
    loss, clipped = policy_loss(ratio.log(), torch.zeros(1, 5), a, torch.ones(1, 5))
    print("policy loss:", loss.item(), "clip fraction:", clipped.item())
    v, ones = torch.tensor([[1.5, 1.1, 0.5]]), torch.ones(1, 3)
    loss, clipped = value_loss(v, ones, 2 * ones, ones)
    print("value loss:", loss.item(), "clip fraction:", clipped.item())
