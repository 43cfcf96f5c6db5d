"""`start.py --hard`: docstrings that say what is wanted and give no formula. The numbers are in the
tests, the equations in the paper (Stiennon et al. 2020, section 3.4; PPO: Schulman et al. 2017)."""

DOCSTRINGS = {
    "get_log_probs": """The log-prob, in nats, of each token given those before it.

    logits: (B, L, V), labels: (B, L) -> (B, L-1). They are those of the policy that samples at
    this temperature. Finite for unlikely tokens, and exact to float32 for any dtype of logits.
    """,
    "get_response_mask": """Which tokens the policy wrote as actions: (B, T) ids -> (B, T) bool.

    A row may hold anything after its summary has ended, and it may never end.
    """,
    "preference_loss": """The loss of the reward model, the first equation of section 3.4.

    chosen, rejected: (B,) -> scalar, in nats. Finite, with its gradient, for any gap.
    """,
    "last_token_index": """Where the score of each row is read: (B, L) -> (B,).

    There may be padding on both sides.
    """,
    "normalize": """Make the references score 0 on average (section 3.4); nothing else changes.

    Sets reward_model.reference_mean, which is part of every score. Twice is the same as once.
    """,
    "kl_penalized_rewards": """The second equation of section 3.4, spread over the tokens.

    scores: (B,); log_probs, ref_log_probs, mask: (B, T) -> (B, T), zero off the mask. A row sums
    to R(x, y), and each action pays for its own log-prob.
    """,
    "compute_gae": """Generalised advantage estimation (Schulman et al. 2016), and returns.

    rewards, values, mask: (B, T) -> (B, T) each, zero off the mask, constants. An episode ends with
    the last action of its row. values[:, t] is what the critic expects before action t. Returns are
    what the critic learns to predict.
    """,
    "whiten": """Mean 0 and variance 1 over the masked entries of the batch, and zero elsewhere.

    x, mask: (B, T) -> (B, T). 1e-8 is added to the population variance.
    """,
    "policy_loss": """PPO's clipped objective (Schulman et al. 2017, eq. 7), to be minimised.

    All (B, T) -> the mean over the masked tokens of the batch, and the share of them where the
    clipped term is strictly the larger loss.
    """,
    "value_loss": """The critic's loss in the 2019 code: half a squared error that has a clip, too.

    A value that has moved by more than clip_range from its old one, towards its return, gets no
    gradient. All (B, T) -> the masked mean, and the share of tokens where the clipped term is
    strictly larger.
    """,
    "judge_pairwise": """Ask about every pair so that the place of a summary can't decide.

    Returns 1.0 (ours is better), 0.5, 0.0 or None (the judge abstained) for each pair. Raises
    ValueError on lists of unequal lengths, and on a verdict other than "A", "B" or None. The judge
    gets whole lists, one call for each order.
    """,
    "wilson_interval": """(low, high) of Wilson's interval of a share among n; (NaN, NaN) for n = 0.

    z: how many standard errors; share: of n answers, between 0 and 1.
    """,
}
