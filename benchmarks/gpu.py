"""All that only a GPU can tell, in one command of under ten minutes, without data or downloads.

    python benchmarks/gpu.py --json gpu.json       # one GPU of 80 GB; prints, and saves as it goes
    python benchmarks/gpu.py --part neox-1b        # some of the parts below
    python benchmarks/gpu.py --shape tiny          # a minute on a CPU, where it is the default

tiny              the engine's tiny preset with --fast_dev_run, as a user starts it
gptj-6b           PPO at the full preset's sizes: adapters on GPT-J-6B
neox-1b           PPO on Pythia-1B, all weights trained
neox-1b-adapters  the same with adapters, the day preset
gradients         four layers of each at full width: does padding change a gradient?

PPO is the engine's train_ppo on 64 posts, with a judge of 3B in memory: one update to warm up and
one that is timed. Weights are random, made on the device; the lm head is scaled until the largest logit is a
real model's. Lengths are those of real rows (lengths.json), so there is padding and rows end early.
FLOP are those executed, by torch's counter in the first update: what is computed a second time
counts, and so does what a mask hides. Memory and time are the second update's.

Each part is a process of its own. One that fails says why in a line, and the others go on; its last
words are in the JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import torch
import transformers
from common import Endings, draw_lengths, make_prompts
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, Qwen2Config

import engine.main
import lm
from engine import packing, ppo, sampling
from engine.adapters import add_adapter
from engine.devices import available_memory, mixed_precision, peak_memory_bytes, pick_device
from engine.devices import pick_dtype, prepare
from engine.memory import check_memory, memory_plan, peak_of
from engine.models import shrink
from engine.reward import RewardModel
from engine.settings import SettingError, parse

GPTJ = GPTJConfig()  # its defaults are those of GPT-J-6B: 28 layers of width 4096, vocabulary 50400
NEOX = GPTNeoXConfig(vocab_size=50304, hidden_size=2048, num_hidden_layers=16,  # Pythia-1B
                     num_attention_heads=8, intermediate_size=8192)
JUDGE = Qwen2Config(vocab_size=151936, hidden_size=2048, num_hidden_layers=36,  # Qwen2.5-3B
                    num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
                    tie_word_embeddings=True)
PPO = {  # part: model, and the settings it belongs to
    "gptj-6b": (GPTJ, ["--preset", "full"]),
    "neox-1b": (NEOX, ["--preset", "day", "--lora_rank", "0", "--ppo_lr", "1.5e-5"]),
    "neox-1b-adapters": (NEOX, ["--preset", "day"])}
ROWS = ["--ppo_batch_size", "64", "--micro_batch_size", "16", "--rollout_batch_size", "64"]
TINY = ["--ppo_batch_size", "16", "--micro_batch_size", "4", "--rollout_batch_size", "16",
        "--query_length", "64", "--response_length", "6"]
PARTS = ["tiny", *PPO, "gradients"]
LARGEST_LOGIT = 17  # of a real model, about; random weights make logits of 5
SECONDS = 590  # for all parts together


def lengths(n, tiny):
    """Tokens of n prompts and of n summaries; a tiny one is an eighth as long."""
    prompts, summaries = draw_lengths(n, 1, 48)
    scale = 8 if tiny else 1
    return [length // scale for length in prompts], [length // scale for length in summaries]


def run_tiny_preset(part, tiny, device, dtype):
    """A few steps of each stage, as a user starts them -> seconds by stage, and results."""
    with TemporaryDirectory() as folder:
        engine.main.main(["--fast_dev_run", "--ppo_episodes", "96", "--device", device, "--dtype",
                           str(dtype).removeprefix("torch."), "--output_dir", f"{folder}/run"])
        found = json.loads(Path(folder, "run", "results.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("seconds", "reward_accuracy", "kl_per_summary")}


def make_tiny(config):
    """The same architecture for a test on a CPU, with a small vocabulary, too."""
    config = shrink(config)
    config.vocab_size = 500
    return config


def make_model(config, dtype, device):
    """A language model with random weights, made on the device and prepared as a loaded one is."""
    torch.manual_seed(0)
    with torch.device(device):
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()
        ids = torch.randint(config.vocab_size, (4, 64))
    with torch.no_grad():
        model.get_output_embeddings().weight *= LARGEST_LOGIT / model(ids).logits.abs().max()
    return model


# ---------------------------------------------------------------------------- PPO


class MeasuredRun:
    """In place of engine.folder.Run, for two updates. `lap(name)` puts down what has happened since
    the last one, time, FLOP and memory, and is called wherever a part of an update ends."""

    seed = 0

    def __init__(self, cuda, pad_id):
        self.cuda, self.pad_id, self.counter = cuda, pad_id, FlopCounterMode(display=False)
        self.seconds, self.flops, self.peaks, self.reserved = Counter(), Counter(), Counter(), 0
        self.last, self.counted, self.lines, self.gaps, self.gaps_elsewhere = 0, 0, [], [], []
        sampling.sample = self.timed(sampling.sample, "sample")
        ppo.rollout = self.timed(ppo.rollout, "measure")  # all of a rollout but sampling
        ppo.one_step = partial(self.timed_step, ppo.one_step)
        ppo.check_first_update = self.put_down_gaps  # however large they are

    def lap(self, name):
        if self.cuda:  # what was started must be finished; each part has a peak of its own
            torch.cuda.synchronize()
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        now, counted = time.perf_counter(), self.counter.get_total_flops()
        self.seconds[name] += now - self.last
        self.flops[name] += counted - self.counted
        self.last, self.counted = now, counted

    def timed(self, function, name):
        def call(*arguments, **named):
            self.lap("rest")
            result = function(*arguments, **named)
            self.lap(name)
            return result
        return call

    @contextmanager
    def timed_step(self, one_step, optimizer, lr, max_grad_norm, name):
        self.lap("rest")
        with one_step(optimizer, lr, max_grad_norm, name) as step:
            yield step
        self.lap("policy step" if name == "policy loss" else "critic step")

    def put_down_gaps(self, log_probs, part, *_):
        """What ppo.check_first_update compares; and what it would be if the update had cut its
        microbatches anew: half as many rows, with 37 more columns of padding."""
        self.lap("policy step")
        n, mask, T = max(1, len(part.mask) // 2), part.mask, part.mask.shape[1]
        ids = pad(part.input_ids[:n], (37, 0), value=self.pad_id)
        with torch.no_grad():
            elsewhere = packing.response_log_probs(self.policy, ids, pad(
                part.attention_mask[:n], (37, 0)), T, self.temperature)
        for other in (part.log_probs, part.ref_log_probs):
            self.gaps.append(lm.zero_off(log_probs - other, mask).abs().max())
        self.gaps_elsewhere.append(lm.zero_off(log_probs[:n] - elsewhere, mask[:n]).abs().max())
        self.lap("gaps")

    def steps(self, stage, total, **parts):
        self.policy, self.last = parts["policy"], time.perf_counter()
        with self.counter:  # slow, so this update is not timed; the next one has the same rows
            yield 0
        self.lap("rest")
        self.seconds, self.peaks, self.reserved = Counter(), Counter(), 0
        yield 1
        self.lap("rest")

    def log(self, stage, step, **metrics):
        self.lines.append({"step": step, **metrics})

    def history(self, stage):
        return self.lines

    def warn(self, kind, text):
        pass  # random weights do collapse


def measure_ppo(name, tiny, device, dtype):
    """train_ppo with all networks and a judge in memory -> what is reported of it."""
    (config, changes), judge_config = PPO[name], JUDGE
    if tiny:
        config, judge_config = make_tiny(config), make_tiny(JUDGE)
    settings = parse([*changes, *(TINY if tiny else ROWS)])
    plan = memory_plan(settings, config, judge_config, device, dtype)
    check_memory(plan, *available_memory(device))
    n, settings.ppo_episodes = settings.ppo_batch_size, 2 * settings.ppo_batch_size

    # row i of a batch ends at its length; the last two ids of the vocabulary are EOS and padding
    prompts, summaries = lengths(n, tiny)
    work = {"vocab": config.vocab_size, "prompts": prompts, "lengths": summaries,
            "limit": settings.response_length}
    ends = Endings(work)  # draws the tokens from here on
    for key in ("lengths", "current", "ids"):
        setattr(ends, key, getattr(ends, key).to(device))
    tokenizer = SimpleNamespace(eos_token_id=work["vocab"] - 2, pad_token_id=work["vocab"] - 1)

    judge = make_model(judge_config, dtype, device).requires_grad_(False)
    # what is frozen is in half precision, what is trained isn't
    model = make_model(config, dtype if settings.lora_rank else torch.float32, device)
    if settings.lora_rank:
        model = add_adapter(model, settings.lora_rank, seed=0)
    run = MeasuredRun(device.startswith("cuda"), tokenizer.pad_token_id)
    run.temperature = settings.temperature
    # RewardModel: another adapter on the same model, or a copy of all weights
    with mixed_precision(device, dtype):
        ppo.train_ppo(run, model, RewardModel(model), make_prompts(work), tokenizer, settings)
    del judge  # it had to be there until now

    seconds, last = run.seconds, run.lines[-1]
    # on a CPU that of the whole process, Python and the libraries included
    allocated = max(run.peaks.values()) if run.cuda else peak_memory_bytes()
    return {"lora_rank": settings.lora_rank, "rows": n, "prompts": [min(prompts), max(prompts)],
            "summaries": [min(summaries), max(summaries)],
            "mean_length": last["length"], "ended": last["ended"],
            "seconds": seconds, "episodes_per_hour": 3600 * n / sum(seconds.values()),
            "tflops_executed": {part: run.flops[part] / seconds[part] / 1e12
                                for part in ("sample", "measure", "policy step", "critic step")},
            "gib": {"planned": peak_of(plan) / 2**30, "allocated": allocated / 2**30,
                    "reserved": run.reserved / 2**30},
            "planned_gib": {use: size / 2**30 for use, size in plan.items()},
            "allocated_gib": {part: size / 2**30 for part, size in run.peaks.items()},
            "gap": torch.stack(run.gaps).max().item(),
            "gap_in_another_batch": torch.stack(run.gaps_elsewhere).max().item()}


# ---------------------------------------------------------------------------- gradients


def pack_boolean(input_ids, attention_mask, position_ids, width, k, dtype):
    """engine.packing.pack for k = 1 with a mask (B, 1, L, L), in which padding sees itself. With
    one of (B, L) it sees nothing, and its softmax is over nothing."""
    real = attention_mask.bool()
    sees = torch.ones_like(real[0]).expand(real.shape[1], -1).tril() & real[:, None]
    sees = sees | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return {"input_ids": input_ids, "attention_mask": sees[:, None], "position_ids": position_ids}


def gradients(model, batches, device, dtype):
    """Of the sum of all log-probs of the responses, by parameter."""
    model.zero_grad()
    with mixed_precision(device, dtype):
        for queries, responses in batches:
            ids, mask, Q = lm.join(queries, responses, model.config.vocab_size - 1, device)
            T = ids.shape[1] - Q
            log_probs = packing.response_log_probs(model, ids, mask, T)
            lm.zero_off(log_probs, mask[:, Q:] != 0).sum().backward()
    return [p.grad for p in model.parameters()]


def difference(found, expected):
    """The largest relative difference of a parameter's gradient; NaN if there is one."""
    return torch.stack([(a - b).norm() / b.norm().clamp(min=1e-9)
                        for a, b in zip(found, expected)]).max().item()


def measure_gradients(name, tiny, device, dtype):
    """Six rows one by one, without any padding, against all of them in one left-padded batch."""
    results = {}
    for architecture, config in (("gptj", GPTJ), ("neox", NEOX)):
        if tiny:
            config = make_tiny(config)
        config.num_hidden_layers = min(4, config.num_hidden_layers)
        queries, responses = (make_prompts({"vocab": config.vocab_size, "prompts": some})
                              for some in lengths(6, tiny))
        alone = [([query], [response]) for query, response in zip(queries, responses)]
        together = [(queries, responses)]
        model = make_model(config, torch.float32, device)
        exact = gradients(model, alone, device, torch.float32)
        for precision in dict.fromkeys((torch.float32, dtype)):
            plain = gradients(model, alone, device, precision)
            padded = gradients(model, together, device, precision)
            with patch.object(packing, "pack", pack_boolean):
                boolean = gradients(model, together, device, precision)
            results[f"{architecture}, {str(precision).removeprefix('torch.')}"] = {
                "left_padded": difference(padded, plain),
                "boolean_mask": difference(boolean, plain),
                # what half precision alone does to a gradient, to hold the other two against
                "rounding": difference(plain, exact)}
    return results


# ---------------------------------------------------------------------------- all parts


def measured(part, shape, dtype, seconds):
    """What a process of its own has found about a part, or the error that ended it."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, __file__, "--here", "--part", part, "--shape", shape,
                               "--dtype", dtype], timeout=seconds, capture_output=True, text=True)
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
            return found | {"total_seconds": time.perf_counter() - start}
        last_words = done.stderr.splitlines()[-30:] or [f"ended with {done.returncode}"]
    except subprocess.TimeoutExpired:
        last_words = [f"out of time: all parts together have {SECONDS} seconds"]
    return {"error": last_words[-1][:300], "last_words": last_words}


def words(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(x)}" for key, x in value.items())
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write the numbers to, after each part")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--shape", choices=["full", "tiny"], help="default: full on a GPU")
    parser.add_argument("--dtype", default="auto", help="as in the engine")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process of one
    options = parser.parse_args()
    device = pick_device()
    shape = options.shape or ("full" if device == "cuda" else "tiny")
    try:
        dtype = pick_dtype(options.dtype, device)
        if options.here:
            (part,) = options.part
            measure = {"tiny": run_tiny_preset, "gradients": measure_gradients}.get(
                part, measure_ppo)
            return print(json.dumps(measure(part, shape == "tiny", device, dtype)))
    except SettingError as error:  # it doesn't fit, say
        sys.exit(f"gpu.py: {error}")

    end, dtype = time.perf_counter() + SECONDS, str(dtype).removeprefix("torch.")
    results = {"device": available_memory(device)[1], "shape": shape, "dtype": dtype,
               "torch": torch.__version__, "transformers": transformers.__version__}
    print(words(results))
    results["parts"] = {}
    for part in options.part:
        found = measured(part, shape, dtype, max(1, end - time.perf_counter()))
        shown = {key: x for key, x in found.items() if key != "last_words"}
        print(f"\n{part}", *(f"  {key}: {words(x)}" for key, x in shown.items()), sep="\n")
        results["parts"][part] = found
        if options.json:  # what there is, lest it be lost
            Path(options.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
