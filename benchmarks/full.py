"""PPO at the full preset's sizes with random weights: memory against the plan, time, utilisation.

    python benchmarks/full.py --shape gptj-6b                      # adapters, one GPU of 80 GB
    python benchmarks/full.py --shape neox-1b --lora_rank 0        # all weights, 48 - 80 GB
    python benchmarks/full.py --shape tiny                         # seconds on a CPU

Runs ppo.train_ppo on random prompts of full length; the first update warms up and is not counted.
Every other setting of rlhf_minimal.py can be given, too. Prints a table and, with --json FILE,
writes it.
"""

import argparse
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
from reward import RewardModel
from rlhf_minimal import parse_settings
from run import available_memory, check_memory, flatten, memory_plan, peak_memory_bytes, peak_of

SHAPES = {  # config, and settings in place of the full preset's
    "gptj-6b": (GPTJConfig(), []),  # its defaults: vocabulary 50400, 28 layers of width 4096
    "neox-1b": (GPTNeoXConfig(vocab_size=50304, hidden_size=2048, num_hidden_layers=16,
                              num_attention_heads=8, intermediate_size=8192),  # Pythia-1B
                ["--lora_rank", "0"]),
    "tiny": (GPTNeoXConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2,
                           num_attention_heads=4, intermediate_size=256),
             ["--lora_rank", "0", "--ppo_batch_size", "8", "--micro_batch_size", "4",
              "--rollout_batch_size", "4", "--query_length", "32", "--response_length", "4"]),
}
# Dense bfloat16 FLOP/s, in 1e12, of the makers' data sheets (SXM); others: --peak_tflops
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}


def update_flops(model, settings, n_adapters):
    """FLOP that one PPO update (all its passes) must do, recomputation not counted.

    W = weights of the layers' matrices. A token needs 2 W forward, 2 W back to its inputs, and 2 for
    each weight that gets a gradient: all W, or the adapters; attention 4 d L / 2 a layer forward
    (two products with L tokens, of which half are seen) and twice that backward. The policy has the
    scores on top, 2 d V forward and back at the last T + 1 places, and once more for its gradient
    where all weights are trained; the critic doesn't.
    """
    c, k = model.config, settings.return_sequences
    weights = sum(p.numel() for name, p in model.base_model.named_parameters()
                  if p.dim() == 2 and "emb" not in name and "wte" not in name)
    length = settings.query_length + settings.response_length
    posts = settings.ppo_batch_size // k
    tokens = posts * (settings.query_length + k * settings.response_length)
    a_token = 4 * weights + 2 * (n_adapters or weights)
    a_token += 3 * c.num_hidden_layers * 4 * c.hidden_size * length / 2
    places = posts * (k * settings.response_length + 1)
    scores = (4 if n_adapters else 6) * c.hidden_size * c.vocab_size * places
    return settings.ppo_epochs * (2 * tokens * a_token + scores)


class Clock:
    """Seconds and calls by part, the GPU's work waited for; the first update is not counted."""

    def __init__(self, device):
        self.device, self.seconds = device, Counter()

    def now(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function, name_of):
        def measured(*arguments, **named):
            start = self.now()
            result = function(*arguments, **named)
            self.seconds[name_of(arguments)] += self.now() - start
            return result
        return measured


def measure(model, settings, updates, device):
    """Seconds by part of an update, after a first one, and the number of adapter weights."""
    clock, found = Clock(device), SimpleNamespace(adapters=0, updates=[])
    original = {name: getattr(ppo, name) for name in ("sample", "rollout", "update")}
    ppo.sample = clock.timed(ppo.sample, lambda _: "sample")
    ppo.rollout = clock.timed(ppo.rollout, lambda _: "rollout")
    ppo.update = clock.timed(ppo.update, lambda arguments: f"update, {arguments[-1]}")

    def steps(*_, policy, snapshot, **parts):
        if settings.lora_rank:
            found.adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        for step in range(updates + 1):
            if step == 1:
                clock.seconds.clear()
                found.start = clock.now()
            clock.timed(flatten, lambda _: "copy in case of a NaN")(
                {"policy": policy, **parts}, copy=True)
            yield step
        found.total = clock.now() - found.start

    run = SimpleNamespace(seed=0, steps=steps, warn=print, history=lambda _: found.updates,
                          log=lambda stage, step, **metrics: found.updates.append(
                              {"step": step, **metrics}))
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(100, model.config.vocab_size, (
        settings.ppo_batch_size // settings.return_sequences, settings.query_length),
        generator=generator).tolist()
    # an EOS that is never drawn: every summary has its full length
    tokenizer = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
    settings.ppo_episodes = (updates + 1) * settings.ppo_batch_size
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu", cache_enabled=False):
            ppo.train_ppo(run, model, RewardModel(model).to(device), queries, tokenizer, settings)
    finally:
        for name, function in original.items():
            setattr(ppo, name, function)
    seconds = {name: total / updates for name, total in clock.seconds.items()}
    seconds["measure"] = seconds.pop("rollout") - seconds["sample"]
    return found.total / updates, seconds, found.adapters


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--updates", type=int, default=2, help="counted, after one to warm up")
    parser.add_argument("--peak_tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--json", help="file to write the numbers to")
    options, rest = parser.parse_known_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, changes = SHAPES[options.shape]
    if options.shape == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share
    settings = parse_settings(["--preset", "full", *changes, *rest])
    dtype = torch.bfloat16 if settings.lora_rank and device != "cpu" else torch.float32
    plan = memory_plan(settings, config, device=device)
    free, name = available_memory(device)
    check_memory(plan, free, name)

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    total, seconds, adapters = measure(model, settings, options.updates, device)
    # on a CPU that of the whole process, Python and the libraries included
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else peak_memory_bytes()
    tflops = options.peak_tflops or next(
        (peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
    in_update = sum(value for key, value in seconds.items() if key.startswith("update"))
    k = settings.return_sequences
    tokens = settings.ppo_batch_size // k * (settings.query_length + k * settings.response_length)
    # the adapters are merged by now: model has the weights of config alone
    flops = update_flops(model, settings, adapters)
    results = {
        "shape": options.shape, "device": platform.processor() or name if device == "cpu" else name,
        "torch": torch.__version__, "lora_rank": settings.lora_rank,
        "rows": {"batch": settings.ppo_batch_size, "micro": settings.micro_batch_size,
                 "rollout": settings.rollout_batch_size},
        "planned_bytes": plan, "planned_peak_bytes": peak_of(plan), "peak_memory_bytes": peak,
        "seconds_per_update": total, "seconds_by_part": seconds,
        "drawn_tokens_per_second": settings.ppo_batch_size * settings.response_length
        / (seconds["sample"] + seconds["measure"]),
        # each pass reads every token once in the policy and once in the critic
        "update_tokens_per_second": settings.ppo_epochs * tokens / in_update,
        "update_tflops": flops / in_update / 1e12, "peak_tflops": tflops,
        "utilisation": flops / in_update / 1e12 / tflops if tflops else None}
    print(f"{options.shape} on {results['device']}, adapters of rank {settings.lora_rank}\n"
          f"peak memory {peak / 2**30:.2f} GiB, planned {peak_of(plan) / 2**30:.2f}\n"
          f"{total:.2f} s per update: "
          + ", ".join(f"{key} {value:.2f}" for key, value in seconds.items())
          + f"\n{results['drawn_tokens_per_second']:.0f} summary tokens/s in rollout, "
          f"{results['update_tokens_per_second']:.0f} tokens/s in update\n"
          f"update: {results['update_tflops']:.3g} TFLOP/s, "
          + (f"{results['utilisation']:.1%} of {tflops:g}" if tflops else
             "utilisation unknown: give --peak_tflops"))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
