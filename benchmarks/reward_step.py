"""A training step of the reward model: chosen and rejected as one row that shares the post
(engine.batches.pack), beside both of them in full, in one padded batch.

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

    from engine.batches import one_step
    from lm import join
    from reward import RewardModel, final_scores, preference_loss
    torch.set_num_threads(1)
    prompts, lengths = draw_lengths(a.pairs, 2, 128)
    work = {**vars(a), "prompts": prompts}
    queries, pad = make_prompts(work), a.vocab - 1
    responses = make_prompts({**work, "prompts": lengths})

    def shared(model):
        ids, mask, Q = join([q for q in queries for _ in range(2)], responses, pad)
        return final_scores(model, ids, mask, ids.shape[1] - Q, k=2).view(-1, 2).unbind(1)

    def concatenated(model):
        ids, mask, _ = join(queries + queries, responses[::2] + responses[1::2], pad)
        return model.score(ids, mask).chunk(2)

    sides, losses = {"shared": shared, "concatenated": concatenated}, {}
    rows = {name: [] for name in sides}
    models = {name: RewardModel(make_model(work)) for name in sides}
    models["concatenated"].load_state_dict(models["shared"].state_dict())
    optimizers = {name: torch.optim.Adam(model.parameters(), fused=True)
                  for name, model in models.items()}
    for turn in range(a.rounds + 1):  # the first one warms up
        for name, scores in sides.items():
            start, cpu = time.perf_counter(), time.process_time()
            with one_step(optimizers[name], 1e-4) as step:
                step.add(preference_loss(*scores(models[name])))
            rows[name].append({"seconds": time.perf_counter() - start,
                               "cpu_seconds": time.process_time() - cpu})
            losses.setdefault(name, step.loss)
    gap = abs(losses["shared"] - losses["concatenated"])
    assert gap < 1e-5, f"the losses differ by {gap:.2g}"
    results = {f"{name}_{key}": median(rows[name][1:], key) for name in sides
               for key in ("seconds", "cpu_seconds")}
    for key in ("seconds", "cpu_seconds"):
        results[f"concatenated_over_shared_{key}"] = (
            results[f"concatenated_{key}"] / results[f"shared_{key}"])
    report({"pairs": a.pairs, "rounds": a.rounds, "loss_gap": gap, **results}, a.json)


if __name__ == "__main__":
    main()
