"""A training step of the reward model: the engine's, with chosen and rejected as one row that
shares the post, beside the plain house's, with both of them in full in one padded batch.

    python benchmarks/reward_step.py [--pairs 8] [--json FILE]

Posts and summaries as long as real ones (lengths.json), a small GPT-2, one thread. Both sides get
the same weights and pairs; their losses are compared before they are timed.
"""

import argparse
import time

from common import draw_lengths, make_model, make_prompts, median, report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("pairs", 8), ("rounds", 5), ("width", 128), ("layers", 4),
                          ("vocab", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json")
    a = parser.parse_args()

    import torch

    import reward
    from engine.batches import one_step
    from engine.reward import RewardModel, pair_scores
    from lm import join
    torch.set_num_threads(1)
    prompts, lengths = draw_lengths(a.pairs, 2, 128)
    work = {**vars(a), "prompts": prompts}
    queries, pad = make_prompts(work), a.vocab - 1
    responses = make_prompts({**work, "prompts": lengths})
    models = {"ours": RewardModel(make_model(work)), "plain": reward.RewardModel(make_model(work))}
    models["plain"].load_state_dict(models["ours"].state_dict())
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
                  for name, model in models.items()}

    def ours(model, optimizer, ids, mask, width):
        with one_step(optimizer, 1e-4) as step:
            step.add(reward.preference_loss(*pair_scores(model, ids, mask, width)))
        return step.loss

    def plain(model, optimizer, ids, mask, width):
        loss = reward.preference_loss(*model.score(ids, mask).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    rows, losses = {name: [] for name in models}, {}
    for turn in range(a.rounds + 1):  # the first one warms up
        for name, step in (("ours", ours), ("plain", plain)):
            start, cpu = time.perf_counter(), time.process_time()
            ids, mask, Q = join(queries + queries, responses[::2] + responses[1::2], pad)
            loss = step(models[name], optimizers[name], ids, mask, ids.shape[1] - Q)
            rows[name].append({"seconds": time.perf_counter() - start,
                               "cpu_seconds": time.process_time() - cpu})
            losses.setdefault(name, []).append(loss)
    gap = max(abs(x - y) for x, y in zip(*losses.values()))  # of each turn: the steps are the same
    assert gap < 1e-4, f"the losses differ by {gap:.2g}"
    results = {f"{name}_{key}": median(rows[name][1:], key) for name in models
               for key in ("seconds", "cpu_seconds")}
    for key in ("seconds", "cpu_seconds"):
        results[f"plain_over_ours_{key}"] = results[f"plain_{key}"] / results[f"ours_{key}"]
    report({"pairs": a.pairs, "rounds": a.rounds, "loss_gap": gap, **results}, a.json)


if __name__ == "__main__":
    main()
