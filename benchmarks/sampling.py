"""The engine's `sample` beside lm.sample and transformers' `generate`: the same prompts, lengths
and tokens.

    python benchmarks/sampling.py [--summaries 4|1] [--vocab 50257] [--json FILE]

Prompts and summaries as long as real ones (lengths.json), greedy but for EOS, which comes at each
row's given length, so that all must write the same tokens: this is checked. The engine reads each
post once; lm.sample and `generate` get it `summaries` times, as TRL gives it to `generate`. A small
GPT-2, one thread, in turn.
"""

import argparse
import time

from common import Endings, draw_lengths, make_model, make_prompts, median, report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("summaries", 4), ("episodes", 64), ("rounds", 3), ("width", 128),
                          ("layers", 4), ("vocab", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json")
    a = parser.parse_args()

    import torch

    import lm
    from engine.sampling import sample
    torch.set_num_threads(1)
    k, limit, eos, pad = a.summaries, 48, a.vocab - 2, a.vocab - 1
    prompts, lengths = draw_lengths(a.episodes // k, k, limit)
    work = {**vars(a), "prompts": prompts, "lengths": lengths, "limit": limit}
    model, ends = make_model(work), Endings(work, greedy=True)
    ids, mask = lm.pad(make_prompts(work), pad, left=True)

    def ours():
        return sample(model, ids, mask, limit, eos_token_id=eos, pad_token_id=pad, k=k)

    def plain():
        rows = [x.repeat_interleave(k, 0) for x in (ids, mask)]
        return lm.sample(model, *rows, limit, eos_token_id=eos, pad_token_id=pad)

    @torch.no_grad()
    def generate():
        rows = [x.repeat_interleave(k, 0) for x in (ids, mask)]
        return model.generate(rows[0], attention_mask=rows[1], max_new_tokens=limit, do_sample=True,
                              top_k=0, eos_token_id=eos, pad_token_id=pad)[:, ids.shape[1]:]

    sides = {"ours": ours, "plain": plain, "generate": generate}
    rows, tokens = {name: [] for name in sides}, {}
    for turn in range(a.rounds + 1):  # the first one warms up
        for name, write in sides.items():
            ends.current, ends.lengths = ends.current[:0], torch.tensor(lengths)
            start, cpu = time.perf_counter(), time.process_time()
            tokens[name] = write()
            rows[name] += [{"seconds": time.perf_counter() - start,
                            "cpu_seconds": time.process_time() - cpu}] * (turn > 0)
        assert torch.equal(tokens["ours"], tokens["generate"]), "the tokens differ"
        assert torch.equal(tokens["ours"], tokens["plain"]), "the plain tokens differ"
    results = {f"{name}_{key}": median(rows[name], key) for name in sides
               for key in ("seconds", "cpu_seconds")}
    for key in ("seconds", "cpu_seconds"):
        for name in ("plain", "generate"):
            results[f"{name}_over_ours_{key}"] = results[f"{name}_{key}"] / results[f"ours_{key}"]
    report({"summaries": k, "episodes": a.episodes, "vocab": a.vocab, "rounds": a.rounds,
            **results}, a.json)


if __name__ == "__main__":
    main()
