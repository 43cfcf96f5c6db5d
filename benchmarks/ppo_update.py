"""One PPO iteration (rollout, scoring, four epochs): the engine's, the same without each of its
savings, the plain house's, and TRL's.

    python benchmarks/ppo_update.py --shape equal|real [--summaries 4|1] [--vocab 50257]
        [--peer-python PATH] [--json FILE]

equal: 64 prompts of 64 tokens, 32 new ones, one summary a post, nothing ends early, no padding.
real:  prompts of up to 512 tokens and summaries of up to 48, as long as those of real rows
       (lengths.json), 64 summaries, 4 or 1 a post.
The model is a small GPT-2 with random weights; 512 tokens make the logits 8 % of a forward pass, as
in the paper's 1.3B model. One thread, float32. ours is engine.ppo.train_ppo; plain is
ppo.train_ppo, which pads all 64 rows to one width and computes a post once for each summary. PATH:
a Python with trl==1.12.0, the last TRL with PPO. Every side is a process of its own; they take
turns; medians (and minima) are reported.
"""

import argparse
import sys
import time
from collections import Counter
from types import SimpleNamespace

from common import HERE, Endings, alternate, draw_lengths, make_model, make_prompts, median, report
from common import serve, timed

SAVINGS = {
    "sharing": "the post once for its k summaries",
    "trimming": "microbatches as wide as their own rows, which are of similar length",
    "dropping": "sampling stops for the rows that have ended",
    "slicing": "logits at the response's positions alone",
}


def tokens_of(work):
    """Tokens of each summary."""
    return [min(n, work["limit"]) for n in work["lengths"]]


def tokens_needed(work, epochs):
    """Tokens that the networks have to read in one update. Each pass over whole texts (four without
    gradient: old and reference log-probs, values, scores; policy and critic once an epoch) needs
    the post once and each token of its summaries; sampling needs the post once and each token but
    a summary's last."""
    passes, posts, tokens = 4 + 2 * epochs, sum(work["prompts"]), tokens_of(work)
    return passes * (posts + sum(tokens)) + posts + sum(n - 1 for n in tokens)


def switch_off(saving, work, ends):
    """Do without a saving that is no setting (sharing is one): patch what the engine calls."""
    import torch.nn.functional as F
    from transformers import GPT2LMHeadModel

    from engine import ppo, sampling

    join, sample, forward = ppo.join, sampling.sample, GPT2LMHeadModel.forward
    longest = max(work["prompts"]), max(tokens_of(work))

    def join_wide(queries, responses, pad_id, device):
        """As wide as the longest prompt and summary of the batch, whatever these rows need."""
        ids, mask, Q = join(queries, responses, pad_id, device)
        padding = longest[0] - Q, longest[1] - (ids.shape[1] - Q)
        return F.pad(ids, padding, value=pad_id), F.pad(mask, padding), longest[0]

    def sample_all(*args, **settings):
        """All rows up to the limit; what follows the given lengths is dropped afterwards."""
        ends.never = True
        rows = sample(*args, **settings)
        for row, n in zip(rows, ends.current.tolist()):
            row[n - 1 : n], row[n:] = settings["eos_token_id"][0], settings["pad_token_id"]
        return rows

    def forward_all(self, *args, logits_to_keep=0, **kwargs):
        result = forward(self, *args, **kwargs)
        result.logits = result.logits[:, -logits_to_keep:]
        return result

    if saving == "trimming":
        ppo.join = join_wide
    if saving == "dropping":
        sampling.sample = sample_all
    if saving == "slicing":
        GPT2LMHeadModel.forward = forward_all


def make_config(work, n_posts, k):
    """The settings of one update; all others have their defaults."""
    from engine.settings import ModelConfig
    from ppo import PPOConfig

    config = SimpleNamespace(**vars(ModelConfig()), **vars(PPOConfig()))
    config.ppo_batch_size = config.ppo_episodes = k * n_posts
    config.return_sequences, config.response_length = k, work["limit"]
    config.micro_batch_size, config.rollout_batch_size = work["micro"], work["rollout"]
    config.checkpoint_activations = False
    config.temperature, config.ppo_lr = 0.7, 1e-5
    return config


def ours(work):
    """-> a function that runs the engine's train_ppo for one update, without work["without"]."""
    from engine import ppo, sampling
    from engine.reward import RewardModel

    prompts, k = make_prompts(work), work["summaries"]
    if work["without"] == "sharing":
        prompts, k = [prompt for prompt in prompts for _ in range(k)], 1
    switch_off(work["without"], work, Endings(work))
    row = {"kl_per_summary": 0, "length": 1, "entropy": 1, "step": 0}  # nothing to warn of
    run = SimpleNamespace(seed=0, steps=lambda *_, **__: [0], log=lambda *_, **__: None,
                          history=lambda _: [row])
    return one_update(work, prompts, k, ppo, sampling, RewardModel,
                      lambda *inputs: ppo.train_ppo(run, *inputs))


def plain(work):
    """-> a function that runs the plain house's train_ppo for one update."""
    import ppo
    from reward import RewardModel

    Endings(work)
    return one_update(work, make_prompts(work), work["summaries"], ppo, ppo, RewardModel,
                      lambda *inputs: ppo.train_ppo(*inputs, 0, lambda *_, **__: None))


def one_update(work, prompts, k, ppo, sampling, RewardModel, train):
    """-> a function that trains for one update. ppo, sampling: modules whose rollout and sample are
    timed; train: called with policy, reward model, queries, tokenizer and settings."""
    clock, computed = Counter(), [0]
    sampling.sample = timed(clock, "rollout", sampling.sample)
    ppo.rollout = timed(clock, "rollout and scoring", ppo.rollout)
    config = make_config(work, len(prompts), k)
    tokenizer = SimpleNamespace(eos_token_id=work["vocab"] - 2, pad_token_id=work["vocab"] - 1)

    def count(module, args, kwargs):
        computed[0] += (args[0] if args else kwargs["input_ids"]).numel()

    model, reward_model = make_model(work), RewardModel(make_model(work, seed=1))
    for trunk in (model.transformer, reward_model.trunk):  # copies of a module keep its hooks
        trunk.register_forward_pre_hook(count, with_kwargs=True)

    def once():
        computed[0] = 0
        clock.clear()
        start, cpu = time.perf_counter(), time.process_time()
        train(model, reward_model, prompts, tokenizer, config)
        total = time.perf_counter() - start
        return {"seconds": total, "cpu_seconds": time.process_time() - cpu,
                "rollout_seconds": clock["rollout"],
                "scoring_seconds": clock["rollout and scoring"] - clock["rollout"],
                "update_seconds": total - clock["rollout and scoring"],
                "tokens_computed": computed[0],
                "tokens_needed": tokens_needed(work, config.ppo_epochs)}

    return once


def make_work(shape, summaries, vocab, episodes=64, width=128, layers=4, micro=None, rollout=None):
    posts = episodes // summaries
    prompts, lengths = draw_lengths(posts, summaries, 48)
    if shape == "equal":
        prompts, lengths = [64] * posts, [33] * episodes
    limit = {"equal": 32, "real": 48}[shape]
    # rows in memory at a time, the same for both sides: four posts, with all their summaries
    size = min({"equal": 16, "real": 4 * summaries}[shape], episodes)
    return {"prompts": prompts, "lengths": lengths, "limit": limit, "summaries": summaries,
            "vocab": vocab, "width": width, "layers": layers, "micro": micro or size,
            "rollout": rollout or size, "without": None}


def summarize(measured):
    """Rows of measurements, by side -> the numbers to report."""
    ours = measured["ours"]
    results = {key: ours[0][key] for key in ("tokens_computed", "tokens_needed")}
    results["computed_over_needed"] = results["tokens_computed"] / results["tokens_needed"]
    for name in ("ours", "plain", "peer"):
        if name in measured:
            for part in ("seconds", "cpu_seconds", "rollout_seconds", "scoring_seconds",
                         "update_seconds"):
                results[f"{name}_{part}"] = median(measured[name], part)
            results[f"{name}_minimum_seconds"] = min(row["seconds"] for row in measured[name])
            results[f"{name}_peak_bytes"] = measured[name][-1]["peak_bytes"]
    for name in ("plain", "peer"):
        # cpu_seconds: the kernel's count of one thread's work, steadier where others work too
        for key in ("seconds", "cpu_seconds", "peak_bytes") if name in measured else ():
            results[f"{name}_over_ours_{key}"] = results[f"{name}_{key}"] / results[f"ours_{key}"]
    if "plain" in measured:
        results["plain_over_ours_tokens"] = (
            measured["plain"][0]["tokens_computed"] / results["tokens_computed"])
    results["savings"] = {}
    for name, what in SAVINGS.items():
        rows = measured.get(f"without {name}")
        if rows:
            results["savings"][name] = {
                "what": what,
                "seconds_ratio": median(rows, "seconds") / results["ours_seconds"],
                "cpu_ratio": median(rows, "cpu_seconds") / results["ours_cpu_seconds"],
                "bytes_ratio": rows[-1]["peak_bytes"] / results["ours_peak_bytes"],
                "tokens_ratio": rows[0]["tokens_computed"] / results["tokens_computed"]}
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("equal", "real"), required=True)
    parser.add_argument("--summaries", type=int, choices=(1, 4), help="a post; real: 4, equal: 1")
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--peer-python", help="a Python that has trl==1.12.0")
    parser.add_argument("--savings", nargs="*", choices=SAVINGS, default=list(SAVINGS),
                        help="those to measure ours without")
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in (("episodes", 64), ("width", 128), ("layers", 4), ("micro", None),
                          ("rollout", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json")
    a = parser.parse_args()
    summaries = a.summaries or {"equal": 1, "real": 4}[a.shape]
    work = make_work(a.shape, summaries, a.vocab, a.episodes, a.width, a.layers, a.micro, a.rollout)
    us = [sys.executable, HERE / "ppo_update.py", "--worker"]
    commands = {"ours": us + ["all"], "plain": us + ["plain"]}
    if a.peer_python:
        commands["peer"] = [a.peer_python, HERE / "peer_trl.py"]
    commands |= {f"without {name}": us + [name] for name in a.savings
                 if name != "sharing" or summaries > 1}
    measured = alternate(commands, work, a.rounds)
    results = {"shape": a.shape, "summaries": summaries, "vocab": a.vocab, "rounds": a.rounds,
               "episodes": a.episodes, "width": a.width, "layers": a.layers,
               "micro_batch": work["micro"], "rollout_batch": work["rollout"]}
    report(results | summarize(measured), a.json)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        import engine.ppo  # before memory is first measured, as in peer_trl.py

        side = sys.argv[-2]
        serve(lambda work: plain(work) if side == "plain" else ours(
            {**work, "without": side if side in SAVINGS else None}))
    else:
        main()
