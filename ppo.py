"""PPO against the reward model (Stiennon et al. 2020, section 3.4, appendices B.1 and G.1).

The policy writes summaries, the reward model scores them, a KL penalty holds it to the supervised
model, and PPO (Schulman et al. 2017) makes actions that did better than expected more likely. Read
the equations first, each one function; then `rollout`, which gathers all numbers of a batch of
summaries, and `train_ppo`, which learns from them. `python ppo.py` prints a worked example.

The paper says nothing about clip ranges, whitening, the value loss, minibatches, the temperature of
rollouts, or summaries that never end. These are from "the 2019 code" (openai/lm-human-preferences,
by the same group; the trainer of this paper was never released) and from "N+" (Huang et al. 2024,
arXiv 2403.17031, a study of this paper's details); each line says which. From the paper we differ
in sizes and rates (PPOConfig). Where it is silent, we differ from both of these, on purpose, in:

- Two optimisers, one for the policy and one for the critic, instead of one on a summed loss. No
  weight is in both losses, so Adam takes the same steps, except for the next point.
- The gradient of each network is clipped to norm 1, to be safe from single batches.
- Rollouts are sampled at temperature 1 in the tiny preset (both: 0.7), rewards are not whitened
  (the 2019 code does), and the score is paid at EOS itself (N+: one place later).
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from engine.adapters import checkpoint_activations, copy_network, freeze, trainable
from engine.batches import check_finite, cut_by_length, generator_for, mean_of_all, minibatches
from engine.batches import one_step, over_all, own_queries, own_stream
from engine.folder import warn_of_collapse
from engine.processes import all_or_none, sum_over_processes
from engine.texts import end_ids
from lm import check_mask, check_shapes, get_response_mask, is_eos, join, linear_schedule
from lm import masked_mean, response_log_probs, sample_responses, zero_off
from reward import final_scores, response_scores


@dataclass
class PPOConfig:
    # 3e-4 and batches of 64: so small a model takes larger rates, and learns from fewer summaries
    ppo_lr: float = HfArg(default=3e-4, help="paper: 1.5e-5 (1.3B), linear decay (B.1)")
    ppo_episodes: int = HfArg(default=2560, help="summaries sampled in all; paper: 1M (B.1)")
    ppo_batch_size: int = HfArg(default=64, help="summaries per update; paper: 512 (B.1)")
    ppo_epochs: int = HfArg(default=4, help="passes over each batch; paper: 4 (B.1)")
    ppo_minibatches: int = HfArg(default=1, help="steps per pass; paper silent; 2019 code: 1")
    return_sequences: int = HfArg(default=1, help="summaries per post; paper silent")
    kl_beta: float = HfArg(default=0.05, help="weight of the KL penalty; paper: 0.05 (B.1)")
    gamma: float = HfArg(default=1.0, help="discount; paper: 1 (3.4)")
    lam: float = HfArg(default=0.95, help="lambda of GAE; paper: 0.95 (B.1)")
    clip_range: float = HfArg(default=0.2, help="of the ratio; paper silent; 2019 code: 0.2")
    clip_range_value: float = HfArg(default=0.2, help="paper silent; 2019 code: 0.2")
    # Nearly inert: no weight is in both losses, so Adam, which divides by the size of the gradient,
    # takes the factor out again. With 10 in place of 0.01, the first step was .0204 and not .0177.
    value_weight: float = HfArg(default=0.1, help="of the value loss; paper silent; 2019 code: 0.1")
    missing_eos: float = HfArg(default=-1.0, help="score without EOS; paper silent; 2019, N+: -1")
    temperature: float = HfArg(default=1.0, help="of rollouts; paper silent; 2019, N+: 0.7")
    response_length: int = HfArg(default=48, help="tokens of a summary at most; paper: 48 (3.2)")
    max_grad_norm: float = HfArg(default=1.0, help="paper silent; 2019 code: no clipping")
    # config, below, is the namespace of all settings: those of memory are in engine/settings.py


# ---------------------------------------------------------------------------- the reward, 3.4


def penalize_missing_eos(scores, mask_has_eos, value=-1.0):
    """Replace the score of a summary that never ended by `value` (N+ detail 23; paper: silent).

    The reward model was trained on summaries that end in EOS, all but the few that were cut, so
    that its score of one without is a guess. mask_has_eos: has it ended? scores, mask_has_eos: (B,)
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
    rewards = -kl_beta * zero_off(mask, log_probs - ref_log_probs)
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

    with V = A = 0 after the last action. An advantage is how much better an action turned out than
    the critic expected; lam < 1 trusts the critic more and the single outcome less. gamma = 1 (3.4)
    and lam = .95 (B.1) are the paper's.

    rewards, values, mask: (B, T), V_t the value of the state before action t -> advantages and
    returns (A + V), (B, T) each, zero off the mask, detached. Raises ValueError on unequal shapes
    or a row without an action.
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    mask = check_mask(mask, every_row=True)
    rewards, values = zero_off(mask, rewards), zero_off(mask, values)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,): nothing after the end
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    # Returns use the advantages as they are: whitened ones would change the scale of what the
    # critic learns to predict
    return advantages, zero_off(mask, advantages + values)


def whiten(x, mask):
    """(x - mean) / sqrt(variance + 1e-8) over the masked entries of the whole batch, else zero.

    So about half of the actions are made more likely, whatever the level of the rewards. Paper
    silent; the 2019 code and N+ (detail 25) whiten so, with the population variance. 1e-8 keeps a
    constant input finite. x, mask: (B, T) -> (B, T). Raises ValueError on unequal shapes or an
    empty mask.
    """
    mean = masked_mean(x, mask)
    mask = mask != 0
    x = zero_off(mask, x)
    variance = masked_mean((x - mean) ** 2, mask)
    return zero_off(mask, (x - mean) * torch.rsqrt(variance + 1e-8))


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
    log_ratio = zero_off(mask, log_probs) - zero_off(mask, old_log_probs)
    advantages = zero_off(mask, advantages)
    # Beyond 88 exp overflows float32, and inf would make the gradient NaN where the clip has won
    largest = math.floor(math.log(torch.finfo(log_ratio.dtype).max))
    ratio = torch.exp(log_ratio.clamp(max=largest))
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
    -> the masked mean, and the fraction of tokens where the
    clipped term is larger. Raises ValueError on unequal shapes or an empty mask.
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    mask = check_mask(mask)
    values, old_values = zero_off(mask, values), zero_off(mask, old_values)
    returns = zero_off(mask, returns)
    plain = (values - returns) ** 2
    # Not old + clamp(new - old), which rounds, so that tokens would count as clipped that are not
    near_old = values.clamp(old_values - clip_range, old_values + clip_range)
    clipped = (near_old - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).to(loss.dtype), mask)


# ---------------------------------------------------------------------------- a batch of summaries


@dataclass
class Microbatch:
    """Some posts of a batch with all their summaries, and all numbers about them. b rows: k
    summaries of each post, one post after the other; row i is a summary of queries[post[i]]."""

    post: torch.Tensor  # (b,), for figures and tests
    input_ids: torch.Tensor  # (b, Q+T), Q and T as wide as these rows need
    attention_mask: torch.Tensor  # (b, Q+T)
    mask: torch.Tensor  # (b, T) bool: the actions, EOS included
    ended: torch.Tensor  # (b,) bool: it wrote EOS
    log_probs: torch.Tensor  # (b, T) of pi_old, the policy that wrote them
    ref_log_probs: torch.Tensor  # (b, T) of pi_SFT
    values: torch.Tensor  # (b, T): V before each action
    scores: torch.Tensor  # (b,): r(x, y), or missing_eos where it did not end
    kl: torch.Tensor  # (b,): log pi_old(y|x) / pi_SFT(y|x), nats per summary
    rewards: torch.Tensor  # (b, T): scores and KL penalty, token by token; for figures and tests
    advantages: torch.Tensor  # (b, T), whitened by whiten_batch
    returns: torch.Tensor  # (b, T)

    @property
    def inputs(self):
        """What a network takes to read these rows: input_ids, attention_mask, T."""
        return self.input_ids, self.attention_mask, self.mask.shape[1]


def response_values(critic, input_ids, attention_mask, width, k=1):
    """V_t, read at the position before action t: (B, Q+T) -> (B, T). A value never sees its action:
    it is what the critic expects of a summary that has been written up to there."""
    return response_scores(critic, input_ids, attention_mask, width, k)[:, :-1]


@all_or_none  # an exception in one process ends all
@torch.no_grad()
def rollout(policy, reference, reward_model, critic, queries, tokenizer, config, generator):
    """Sample summaries of the queries (lists of token ids), and gather all numbers about them.

    Returns a list of Microbatch, sorted by length if a minibatch holds several of them. Raises
    FloatingPointError where a score, a KL or a return is not finite.
    """
    k = config.return_sequences
    # 1. k summaries of each post, y ~ pi_RL(. | x), token by token until EOS ends them (3.4).
    # All k are trained on: keeping the best would not be sampling from pi_old, and bias the ratio.
    responses = sample_responses(policy, tokenizer, queries, config.response_length,
                                 config.temperature, generator, config.rollout_batch_size, k)
    batch = []
    # The microbatches are cut here, once, so that the update sees the same rows and padding, and
    # the ratio starts at 1 in any precision. (In bfloat16 other padding alone moves log-probs by up
    # to .18 nats, hence not those of sampling.) The price: a pass shuffles microbatches, not rows.
    lengths = [len(query) + sum(len(y) for y in responses[k * i : k * (i + 1)])
               for i, query in enumerate(queries)]
    for some in cut_by_length(lengths, config):
        # All k summaries of a post stay together, one row each. posts, rows: numbers
        posts = [i for i in some for _ in range(k)]  # the post of each row
        rows = [k * i + j for i in some for j in range(k)]
        input_ids, attention_mask, Q = join(
            [queries[i] for i in posts], [responses[row] for row in rows],
            tokenizer.pad_token_id, policy.device)  # (b, Q+T)
        mask = get_response_mask(input_ids[:, Q:], end_ids(tokenizer))  # (b, T)
        T = mask.shape[1]
        ended = is_eos(input_ids[:, Q:], end_ids(tokenizer)).any(1)  # (b,)

        # 2. The four networks read them.
        inputs = input_ids, attention_mask, T
        log_probs = response_log_probs(policy, *inputs, config.temperature, k)  # (b, T)
        ref_log_probs = response_log_probs(reference, *inputs, config.temperature, k)  # (b, T)
        values = response_values(critic, *inputs, k)  # (b, T)
        scores = final_scores(reward_model, *inputs, k)  # (b,)

        # 3. R = r - beta log(pi_RL / pi_SFT), token by token (3.4).
        scores = penalize_missing_eos(scores, ended, config.missing_eos)
        rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_beta)
        kl = zero_off(mask, log_probs - ref_log_probs).sum(1)

        # 4. Advantages and returns: GAE with gamma = 1 (3.4) and lambda = .95 (B.1).
        advantages, returns = compute_gae(rewards, values, mask, config.gamma, config.lam)
        for name, x in (("reward", scores), ("KL", kl), ("return", returns)):
            check_finite(name, x)
        batch.append(Microbatch(
            post=torch.tensor(posts), input_ids=input_ids, attention_mask=attention_mask, mask=mask,
            ended=ended, log_probs=log_probs, ref_log_probs=ref_log_probs, values=values,
            scores=scores, kl=kl, rewards=rewards, advantages=advantages, returns=returns))
    return batch


def whiten_batch(batch):
    """Whiten the advantages over all actions of the update, of all microbatches and processes."""
    # The advantages of each part's actions as one vector, (its number of actions,)
    actions = [part.advantages[part.mask] for part in batch]
    # over_all whitens them as one long vector, without any padding, and cuts it again
    for part, white in zip(batch, over_all(lambda x: whiten(x, torch.ones_like(x)), actions)):
        part.advantages = torch.zeros_like(part.advantages).masked_scatter(part.mask, white)


def check_first_update(log_probs, part, tolerance=1e-3):
    """Before the first update the policy is both the sampler and the SFT model: ratio 1, KL 0.

    Raises RuntimeError otherwise: then padding, positions, dropout or precision differ between two
    forward passes of one model, and every later ratio would be wrong by as much.
    """
    for name, other in (("old", part.log_probs), ("reference", part.ref_log_probs)):
        gap = zero_off(part.mask, (log_probs - other).abs()).max().item()
        if not gap <= tolerance:
            raise RuntimeError(
                f"before the first update the policy's log-probs differ from the {name} ones by "
                f"{gap:.2g} nats (at most {tolerance:g} expected): the ratio is not 1 or the KL not"
                " 0. Look for dropout, position ids that count padding, a mask shifted by one, or "
                "half precision")


# ---------------------------------------------------------------------------- the loop


def other_networks(policy, reward_model, critic, config):
    """The policy's frozen reference, and the critic to train (section 3.4); freezes the reward
    model."""
    # pi_SFT is what the policy is now. V starts as the reward model, head and all (3.4). It shares
    # no weight with the policy: early value updates could damage what was pretrained (G.1).
    reference = freeze(copy_network(policy, "reference"))
    if critic is None:
        critic = copy_network(reward_model, "critic")
    freeze(reward_model)
    if config.checkpoint_activations:
        checkpoint_activations(policy)
        checkpoint_activations(critic.trunk)
    return reference, critic


def train_ppo(run, policy, reward_model, queries, tokenizer, config, evaluate=None, critic=None):
    """Turn the SFT model, policy, into pi_RL, in place; returns the critic. reward_model is frozen.

    queries: posts as lists of token ids. They need no summary: PPO learns from its own. evaluate:
    called after each update with the number of updates so far. critic: one to start from instead of
    a copy of the reward model (as in G.1).
    """
    reference, critic = other_networks(policy, reward_model, critic, config)
    # eps: N+; the paper doesn't say. fused: the same step, in one kernel
    policy_adam = torch.optim.Adam(trainable(policy), lr=config.ppo_lr, eps=1e-5, fused=True)
    critic_adam = torch.optim.Adam(trainable(critic), lr=config.ppo_lr, eps=1e-5, fused=True)
    k = config.return_sequences  # summaries of a post
    n_updates = max(1, config.ppo_episodes // config.ppo_batch_size)  # paper: 1M / 512 = 1,953
    for update in run.steps("ppo", n_updates, snapshot=True, policy=policy, critic=critic,
                            policy_optimizer=policy_adam, critic_optimizer=critic_adam):
        lr = config.ppo_lr * linear_schedule(update, n_updates)  # B.1

        # A batch of fresh summaries by pi_old, the policy as it is now (512 in the paper), k of
        # each post; their advantages are whitened over all of it
        some = own_queries(queries, update, config)
        batch = rollout(policy, reference, reward_model, critic, some, tokenizer, config,
                        own_stream(run.seed, "ppo", update, policy.device))
        whiten_batch(batch)

        # Four passes over it (B.1), and in each a step of both networks on every minibatch. There
        # is no entropy bonus, since the KL penalty does its work (3.4), and beta never adapts (B.1)
        sums, n_steps = defaultdict(float), 0
        for epoch in range(config.ppo_epochs):
            generator = generator_for(run.seed, "ppo epoch", update, epoch)  # of the order
            for minibatch in minibatches(batch, config.ppo_minibatches, generator):
                # The policy's step: actions that did better than expected become more likely.
                # share: the part's tokens / the minibatch's tokens, over all processes
                with one_step(policy_adam, lr, config.max_grad_norm, "policy loss") as adam_step:
                    for part, share in minibatch:
                        log_probs = response_log_probs(policy, *part.inputs, config.temperature, k)
                        if update == 0 and n_steps == 0:  # nothing has changed yet: the ratio is 1
                            check_first_update(log_probs.detach(), part)
                        loss, clipped = policy_loss(log_probs, part.log_probs, part.advantages,
                                                    part.mask, config.clip_range)
                        adam_step.add(loss * share)
                        moved = part.log_probs - log_probs.detach()  # its mean: KL(pi_old || pi)
                        sums["kl_to_old_policy"] += masked_mean(moved, part.mask) * share
                        sums["policy_loss"] += loss.detach() * share
                        sums["policy_clip_fraction"] += clipped * share

                # The critic's step: what it expected comes closer to what was earned. The returns
                # stay those of the rollout in all passes
                with one_step(critic_adam, lr, config.max_grad_norm, "value loss") as adam_step:
                    for part, share in minibatch:
                        values = response_values(critic, *part.inputs, k)  # (b, T)
                        loss, clipped = value_loss(values, part.values, part.returns, part.mask,
                                                   config.clip_range_value)
                        adam_step.add(config.value_weight * loss * share)
                        sums["value_loss"] += loss.detach() * share
                        sums["value_clip_fraction"] += clipped * share
                n_steps += 1
        log_update(run, update, lr, batch, sums, n_steps)
        if evaluate:
            evaluate(update + 1)
    return critic


def explained_variance(batch):
    """1 - Var(R - V) / Var(R) over all actions of an update, R the returns and V the critic's
    values before it. 1: it foresees each return; 0: it knows no more than their mean; below: less.
    """
    def variance(vectors):
        return mean_of_all([x**2 for x in vectors]) - mean_of_all(vectors) ** 2

    errors = variance([(part.returns - part.values)[part.mask] for part in batch])
    return 1 - errors / max(variance([part.returns[part.mask] for part in batch]), 1e-8)


def log_update(run, update, lr, batch, sums, n_steps):
    """A line of metrics.jsonl, means over the whole batch; and a warning where a run goes wrong."""
    metrics = {
        "lr": lr,
        # the score, without the KL penalty; references have mean 0
        "reward": mean_of_all([part.scores for part in batch]),
        "kl_per_summary": mean_of_all([part.kl for part in batch]),  # nats
        "length": mean_of_all([part.mask.sum(1) for part in batch]),  # tokens
        "ended": mean_of_all([part.ended for part in batch]),
        # -log pi of what was sampled: on average the entropy, in nats per token
        "entropy": mean_of_all([-part.log_probs[part.mask] for part in batch]),
        "explained_variance": explained_variance(batch)}
    for name, total in sums.items():
        metrics[name] = sum_over_processes(total).item() / n_steps
    run.log("ppo", update, **metrics)
    warn_of_collapse(run)


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
