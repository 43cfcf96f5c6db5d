"""What the benchmarks share: given lengths, workers that are timed in turn, peak memory."""

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository's own files


def draw_lengths(n_posts, k, limit, seed=0):
    """Token counts of n posts and of k summaries of each, drawn from those of real rows."""
    real, rng = json.loads((HERE / "lengths.json").read_text(encoding="utf-8")), random.Random(seed)
    return (rng.choices(real["prompts"], k=n_posts),
            [min(n, limit + 1) for n in rng.choices(real["summaries"], k=n_posts * k)])


def make_prompts(work):
    """Random token ids; the last two ids of the vocabulary are EOS and padding."""
    rng = random.Random(1)
    return [[rng.randrange(work["vocab"] - 2) for _ in range(n)] for n in work["prompts"]]


def make_model(work, seed=0):
    """A GPT-2 with random weights, the same for the same seed, and without dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=work["vocab"], n_embd=work["width"], n_layer=work["layers"],
        n_head=work["width"] // 64 or 1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=None, eos_token_id=work["vocab"] - 2, pad_token_id=work["vocab"] - 1)).eval()


class Endings:
    """Stands in for torch.multinomial, which both `lm.sample` and `generate` draw tokens with: row
    i of a batch ends at its given length, which random weights would hardly ever do. A length
    beyond the limit never ends. greedy: the most likely token, so that two samplers agree."""

    def __init__(self, work, greedy=False):
        import torch
        self.draw, self.greedy = torch.multinomial, greedy
        self.lengths, self.limit = torch.tensor(work["lengths"]), work["limit"]
        self.ids = torch.tensor([work["vocab"] - 2, work["vocab"] - 1])
        self.current, self.step, self.never = self.lengths[:0], 0, False
        torch.multinomial = self

    def __call__(self, probs, num_samples, **settings):
        if self.step == self.limit or not (self.current > self.step).any():  # a new batch
            self.current, self.step = self.lengths[: len(probs)], 0
            self.lengths = self.lengths.roll(-len(probs))
        self.step += 1
        going = self.current[self.current >= self.step]  # `generate` keeps the ended rows as well
        lengths = going if len(going) == len(probs) else self.current
        probs[:, self.ids] = 0
        token = (probs.argmax(-1, keepdim=True) if self.greedy
                 else self.draw(probs, num_samples, **settings))
        if not self.never:
            token[lengths == self.step] = self.ids[0]
        return token


def timed(clock, name, function, counts=lambda: True):
    """The function, whose seconds are added to clock[name] where counts() is true after it."""
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] += (time.perf_counter() - start) * counts()
        return result

    return call


def memory(field):
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes; Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def serve(prepare):
    """A worker: prepare(work) -> a function that does the work once and returns its numbers."""
    import torch
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    before = memory("VmRSS")
    once = prepare(json.loads(sys.argv[-1]))
    for _ in sys.stdin:
        print(json.dumps({**once(), "peak_bytes": memory("VmHWM") - before}), file=out, flush=True)


def alternate(commands, work, rounds):
    """Workers (lists of words, by name), each its own process with one thread, one after the other,
    `rounds` times after a first one that is not counted. Returns {name: [{...}, ...]}."""
    workers = {name: subprocess.Popen([*map(str, command), json.dumps(work)], text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for name, command in commands.items()}
    measured = {name: [] for name in workers}
    for turn in range(rounds + 1):
        for name, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                sys.exit(f"{name} failed: see its message above")
            row = json.loads(line)
            measured[name] += [row] * (turn > 0)
            print(f"round {turn or 'of warm-up'}: {name}",
                  {key: round(value, 2) for key, value in row.items()}, file=sys.stderr)
    for worker in workers.values():
        worker.communicate()
    return measured


def median(rows, key):
    return statistics.median(row[key] for row in rows)


def report(results, path):
    text = json.dumps(results, indent=1)
    print(text)
    if path:
        Path(path).write_text(text + "\n", encoding="utf-8")
