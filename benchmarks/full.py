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
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lm
import ppo
from engine.devices import available_memory, mixed_precision, peak_memory_bytes, pick_device
from engine.devices import weights_dtype
from engine.folder import flatten
from engine.memory import check_memory, memory_plan, peak_of
from reward import RewardModel
from rlhf_minimal import parse_settings

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

    W = weights of the layers' matrices. A token needs 2 W forward, 2 W back to its inputs, and 2
    for each weight that gets a gradient: all W, or the adapters; attention 4 d L / 2 a layer
    forward (two products with L tokens, of which half are seen) and twice that backward. The policy
    has the scores on top, 2 d V forward and back at the last T + 1 places, and once more for its
    gradient where all weights are trained; the critic doesn't.
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

    @contextmanager
    def timed(self, name):
        """Time what happens in this block into seconds[name]."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start


class MeasuredRun:
    """In place of engine.folder.Run: an update to warm up, then those that are counted. It times
    what train_ppo calls while it is the current context."""

    seed = 0

    def __init__(self, settings, updates, device):
        self.settings, self.updates, self.clock = settings, updates, Clock(device)
        self.adapters, self.total, self.lines = 0, 0, []
        self.original = lm.sample, ppo.rollout, ppo.one_step

    def __enter__(self):
        lm.sample, ppo.rollout, ppo.one_step = self.sample, self.rollout, self.one_step
        return self

    def __exit__(self, *_):
        lm.sample, ppo.rollout, ppo.one_step = self.original

    def sample(self, *arguments, **named):
        with self.clock.timed("sample"):
            return self.original[0](*arguments, **named)

    def rollout(self, *arguments, **named):
        with self.clock.timed("rollout"):
            return self.original[1](*arguments, **named)

    @contextmanager
    def one_step(self, optimizer, lr, max_grad_norm, name):
        with self.clock.timed(f"update, {name.replace(' ', '_')}"):
            with self.original[2](optimizer, lr, max_grad_norm, name) as step:
                yield step

    def steps(self, stage, total, snapshot, **parts):
        if self.settings.lora_rank:
            self.adapters = sum(p.numel() for p in parts["policy"].parameters() if p.requires_grad)
        for step in range(self.updates + 1):
            if step == 1:
                self.clock.seconds.clear()
                start = self.clock.now()
            with self.clock.timed("copy in case of a NaN"):
                flatten(parts, copy=True)
            yield step
        self.total = self.clock.now() - start

    def log(self, stage, step, **metrics):
        self.lines.append({"step": step, **metrics})

    def history(self, stage):
        return self.lines

    def warn(self, kind, text):
        print(text)


def measure(model, settings, updates, device):
    """Seconds of an update, after a first one; by part; and the number of adapter weights."""
    generator = torch.Generator().manual_seed(0)
    n_posts = settings.ppo_batch_size // settings.return_sequences
    queries = torch.randint(100, model.config.vocab_size, (n_posts, settings.query_length),
                            generator=generator).tolist()
    # an EOS that is never drawn: every summary has its full length
    tokenizer = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
    settings.ppo_episodes = (updates + 1) * settings.ppo_batch_size
    with MeasuredRun(settings, updates, device) as run, mixed_precision(device):
        ppo.train_ppo(run, model, RewardModel(model).to(device), queries, tokenizer, settings)
    seconds = {name: total / updates for name, total in run.clock.seconds.items()}
    seconds["measure"] = seconds.pop("rollout") - seconds["sample"]
    return run.total / updates, seconds, run.adapters


def rates(settings, flops, seconds, peak_tflops):
    """Tokens per second of rollouts and of the update, and the update's share of the peak."""
    in_update = sum(value for key, value in seconds.items() if key.startswith("update"))
    k = settings.return_sequences
    tokens = settings.ppo_batch_size // k * (settings.query_length + k * settings.response_length)
    tflops = flops / in_update / 1e12
    return {"drawn_tokens_per_second": settings.ppo_batch_size * settings.response_length
            / (seconds["sample"] + seconds["measure"]),
            # each pass reads every token once in the policy and once in the critic
            "update_tokens_per_second": settings.ppo_epochs * tokens / in_update,
            "update_tflops": tflops, "peak_tflops": peak_tflops,
            "utilisation": tflops / peak_tflops if peak_tflops else None}


def show(results):
    seconds, peak_tflops = results["seconds_by_part"], results["peak_tflops"]
    print(f"{results['shape']} on {results['device']}, adapters of rank {results['lora_rank']}\n"
          f"peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB, planned "
          f"{results['planned_peak_bytes'] / 2**30:.2f}\n"
          f"{results['seconds_per_update']:.2f} s per update: "
          + ", ".join(f"{key} {value:.2f}" for key, value in seconds.items())
          + f"\n{results['drawn_tokens_per_second']:.0f} summary tokens/s in rollout, "
          f"{results['update_tokens_per_second']:.0f} tokens/s in update\n"
          f"update: {results['update_tflops']:.3g} TFLOP/s, "
          + (f"{results['utilisation']:.1%} of {peak_tflops:g}" if peak_tflops else
             "utilisation unknown: give --peak_tflops"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--updates", type=int, default=2, help="counted, after one to warm up")
    parser.add_argument("--peak_tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--json", help="file to write the numbers to")
    options, rest = parser.parse_known_args(arguments)
    device = pick_device()
    config, changes = SHAPES[options.shape]
    if options.shape == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share
    settings = parse_settings(["--preset", "full", *changes, *rest])
    plan = memory_plan(settings, config, device=device)
    free, name = available_memory(device)
    check_memory(plan, free, name)

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=weights_dtype(device, frozen=settings.lora_rank > 0)).eval()
    total, seconds, adapters = measure(model, settings, options.updates, device)
    # on a CPU that of the whole process, Python and the libraries included
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else peak_memory_bytes()
    peak_tflops = options.peak_tflops or next(
        (tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    # the adapters are merged by now: model has the weights of config alone
    flops = update_flops(model, settings, adapters)
    results = {
        "shape": options.shape, "device": platform.processor() or name if device == "cpu" else name,
        "torch": torch.__version__, "lora_rank": settings.lora_rank,
        "rows": {"batch": settings.ppo_batch_size, "micro": settings.micro_batch_size,
                 "rollout": settings.rollout_batch_size},
        "planned_bytes": plan, "planned_peak_bytes": peak_of(plan), "peak_memory_bytes": peak,
        "seconds_per_update": total, "seconds_by_part": seconds,
        **rates(settings, flops, seconds, peak_tflops)}
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
