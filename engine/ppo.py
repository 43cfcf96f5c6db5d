"""PPO, as ppo.py, for what outgrows a laptop."""

from collections import defaultdict
from dataclasses import dataclass

import torch

from engine.adapters import checkpoint_activations, copy_network, freeze, trainable
from engine.batches import all_of, cut_by_length, mean_of_all, one_step, over_all, own_queries
from engine.batches import own_stream
from engine.devices import wide
from engine.folder import warn_of_collapse
from engine.packing import response_log_probs, shares_post
from engine.processes import all_or_none, n_processes, sum_over_processes
from engine.reward import final_scores, response_scores
from engine.sampling import sample_responses
from engine.texts import end_ids
from lm import check_finite, generator_for, get_response_mask, is_eos, join, linear_schedule
from lm import masked_mean, zero_off
from ppo import check_first_update, compute_gae, kl_penalized_rewards, penalize_missing_eos
from ppo import policy_loss, value_loss, whiten


@dataclass
class Microbatch:
    """Rows of a batch and all numbers about them. b rows: k summaries of each post, one post after
    the other; row i is a summary of queries[post[i]]."""

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
    k: int = 1  # so many rows of a post are read as one (engine/packing.py)

    @property
    def inputs(self):
        """What a network takes to read these rows: input_ids, attention_mask, T."""
        return self.input_ids, self.attention_mask, self.mask.shape[1]

    def take(self, rows):
        """Some of the rows, as wide as before; k is 1."""
        return Microbatch(**{name: x[rows] for name, x in vars(self).items() if name != "k"})


def response_values(critic, input_ids, attention_mask, width, k=1):
    """V_t, read at the position before action t: (B, Q+T) -> (B, T). A value never sees its action:
    it is what the critic expects of a summary that has been written up to there."""
    return response_scores(critic, input_ids, attention_mask, width, k)[:, :-1]


@all_or_none  # an exception in one process ends all
@torch.no_grad()
def rollout(policy, reference, reward_model, critic, queries, tokenizer, config, generator):
    """Sample return_sequences summaries of each query, and gather all numbers about them.

    Returns a list of Microbatch: the whole batch, padded to one width, whose rows each pass divides
    anew (`minibatches`); or, where one minibatch is to be read in several pieces or several
    summaries in one row, the pieces that all passes will see. Raises FloatingPointError where a
    score, a KL or a return is not finite.
    """
    # Minibatches are of rows: then each summary is read alone
    k = config.return_sequences
    longest = max(map(len, queries)) + config.response_length
    if config.ppo_minibatches > 1 or shares_post(policy, k, longest) == 1:
        queries, k = [query for query in queries for _ in range(k)], 1
    responses = sample_responses(policy, tokenizer, queries, config.response_length,
                                 config.temperature, generator, config.rollout_batch_size, k)
    size = config.micro_batch_size or len(responses)  # rows in memory at a time, at most
    posts = [range(len(queries))]
    if config.ppo_minibatches == 1:
        # Pieces are cut here, once, so that all passes see the same rows and padding, and the ratio
        # starts at 1 in any precision. (In bfloat16 other padding alone moves log-probs by up to
        # .18 nats, hence not those of sampling.)
        posts = cut_by_length([len(query) + sum(map(len, responses[k * i : k * (i + 1)]))
                               for i, query in enumerate(queries)], max(1, size // k))
    return [measure(policy, reference, reward_model, critic, queries, responses, some, tokenizer,
                    config, max(size, k), k) for some in posts]


def measure(policy, reference, reward_model, critic, queries, responses, posts, tokenizer, config,
            size, k):
    """All numbers about all summaries of some posts, which are numbers of queries. size: rows in
    memory at a time, a multiple of k where there are more."""
    rows = [k * i + j for i in posts for j in range(k)]  # one post after the other
    input_ids, attention_mask, Q = join([queries[row // k] for row in rows],
                                        [responses[row] for row in rows],
                                        tokenizer.pad_token_id, policy.device)  # (b, Q+T)
    mask = get_response_mask(input_ids[:, Q:], end_ids(tokenizer))  # (b, T)
    ended = is_eos(input_ids[:, Q:], end_ids(tokenizer)).any(1)  # (b,)

    def read(function, network, *more):
        return torch.cat([function(network, *some, mask.shape[1], *more, k=k)
                          for some in zip(input_ids.split(size), attention_mask.split(size))])

    log_probs = read(response_log_probs, policy, config.temperature)  # (b, T)
    ref_log_probs = read(response_log_probs, reference, config.temperature)  # (b, T)
    values = read(response_values, critic)  # (b, T)
    scores = penalize_missing_eos(read(final_scores, reward_model), ended, config.missing_eos)
    rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_beta)
    kl = zero_off(log_probs - ref_log_probs, mask).sum(1)
    advantages, returns = compute_gae(rewards, values, mask, config.gamma, config.lam)
    for name, x in (("reward", scores), ("KL", kl), ("return", returns)):
        check_finite(name, x)
    return Microbatch(
        post=torch.tensor(rows) // config.return_sequences, input_ids=input_ids,
        attention_mask=attention_mask, mask=mask, ended=ended, log_probs=log_probs,
        ref_log_probs=ref_log_probs, values=values, scores=scores, kl=kl, rewards=rewards,
        advantages=advantages, returns=returns, k=k)


def whiten_batch(batch):
    """Whiten the advantages over all actions of the update, of all microbatches and processes."""
    if len(batch) == n_processes() == 1:
        batch[0].advantages = whiten(batch[0].advantages, batch[0].mask)
        return
    # The advantages of each part's actions as one vector, (its number of actions,)
    actions = [part.advantages[part.mask] for part in batch]
    # over_all whitens them as one long vector, without any padding, and cuts it again
    for part, white in zip(batch, over_all(lambda x: whiten(x, torch.ones_like(x)), actions)):
        part.advantages = torch.zeros_like(part.advantages).masked_scatter(part.mask, white)


def minibatches(batch, config, generator):
    """The minibatches of a pass: lists of (microbatch, its share). The share is of the minibatch's
    tokens over all processes: sums of means times their shares, and of the gradients of those, are
    the means over the minibatch in one piece."""
    pieces = [batch]
    if len(batch) == batch[0].k == 1:
        permutation = torch.randperm(len(batch[0].mask), generator=generator)
        pieces = [[batch[0].take(rows) for rows in some.split(config.micro_batch_size or len(some))]
                  for some in permutation.chunk(config.ppo_minibatches)]
    for parts in pieces:
        counts = [wide(part.mask.sum()) for part in parts]
        total = sum_over_processes(torch.stack(counts).sum())
        yield [(part, count / total) for part, count in zip(parts, counts)]


def other_networks(policy, reward_model, critic, config):
    """The policy's frozen reference, and the critic to train (section 3.4); freezes the reward
    model."""
    # pi_SFT is what the policy is now. V starts as the reward model, head and all (3.4). It shares
    # no weight with the policy: early value updates could damage what was pretrained (G.1).
    reference = freeze(copy_network(policy))
    if critic is None:
        critic = copy_network(reward_model)
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
    n_updates = max(1, config.ppo_episodes // config.ppo_batch_size)  # paper: 1M / 512 = 1,953
    # Minibatches have other shapes than the pieces of a rollout, and in half precision these alone
    # may move a log-prob
    half = torch.is_autocast_enabled(policy.device.type)
    gap = 0.5 if half and config.ppo_minibatches > 1 else 1e-3  # nats, before the first step
    for update in run.steps("ppo", n_updates, policy=policy, critic=critic,
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
            for minibatch in minibatches(batch, config, generator):
                # The policy's step: actions that did better than expected become more likely.
                # share: the part's tokens / the minibatch's tokens, over all processes
                with one_step(policy_adam, lr, config.max_grad_norm, "policy loss") as adam_step:
                    for part, share in minibatch:
                        log_probs = response_log_probs(policy, *part.inputs, config.temperature,
                                                       part.k)
                        if update == 0 and n_steps == 0:  # nothing has changed yet: the ratio is 1
                            check_first_update(log_probs.detach(), part, gap)
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
                        values = response_values(critic, *part.inputs, part.k)  # (b, T)
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
    errors = all_of([(part.returns - part.values)[part.mask] for part in batch]).var()
    return 1 - (errors / all_of([part.returns[part.mask] for part in batch]).var()).item()


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
