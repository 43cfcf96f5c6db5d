"""Learning to summarize from human feedback (Stiennon et al. 2020), the whole loop in one script.

    python rlhf_minimal.py                    # tiny world: CPU, no download
    python rlhf_minimal.py --fast_dev_run     # a few steps of every stage, seconds
    python rlhf_minimal.py --preset student   # real models and data: engine/ takes over

`run_all` is section 3.1 of the paper: each paragraph of it is a stage, which leads on to `sft.py`,
`reward.py`, `ppo.py` or `judge.py`. A run leaves a folder under runs/.

What differs from the paper: in the tiny world a tiny model, and a program that labels in place of
people (`toy.py`); and one round of the loop, where OpenAI trained four reward models, on more
comparisons each time (C.6), with the newest policy's summaries among them (3.1).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if __name__ == "__main__":  # python -m would import an lm.py of the current folder in place of ours
    sys.path[0] = str(ROOT)

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, logging

import judge
import toy
from lm import encode_responses, generator_for, write_summaries
from ppo import PPOConfig, train_ppo
from reward import RewardConfig, RewardModel, normalize, preference_accuracy, score_summaries
from reward import train_reward
from sft import SFTConfig, train_sft
from tldr import DataError, encode_prompts


@dataclass
class RunConfig:
    seed: int = 0  # of all random numbers; paper: 3-10 seeds for the RM (B.1)
    output_dir: str = None  # folder of the run; None: a new runs/tiny-<n>
    resume: bool = False  # go on with the run that was stopped in output_dir
    restart: bool = False  # throw away the run that output_dir holds
    fast_dev_run: bool = False  # a few steps of every stage
    device: str = "auto"  # auto (cuda, else cpu), cpu or cuda
    query_length: int = 512  # tokens of a prompt at most; paper: 512 (B.2)
    summary_length: int = 128  # tokens of a given summary at most; 2020 code: 128 for the RM


# ---------------------------------------------------------------------------- the loop, 3.1


def run_all(run, settings):
    """The paper's loop, once around (3.1, Fig. 2). Returns results and samples of a run.

    Each stage begins from what the one before it has saved, so that --resume can leave out those
    that are done: it ends with the same numbers, bit for bit.
    """
    # Posts with human references (3.2), and posts to compare summaries of (3.3)
    posts, held_out, compared, compared_held_out = toy.make_data(settings)
    held_out = held_out[: settings.judge_posts]
    few = held_out[: settings.judge_during]  # for what is judged during PPO, and best of n
    tokenizer, model = toy.make_start(posts, settings, settings.device)
    queries, references = encode(posts, [post["summary"] for post in posts], tokenizer, settings)
    writes = partial(write, tokenizer, settings)  # (model, posts) -> summaries
    pad_id, seed = tokenizer.pad_token_id, settings.seed

    # Where the loop starts: pi_SFT, a language model fine-tuned on the references (3.4)
    if not run.has("sft"):
        train_sft(model, queries, references, pad_id, settings, seed, run.log)
        run.save("sft", model, tokenizer)
    sft = run.language_model("sft")

    # Step 1: the tiny world's labeler compares two summaries of a post (3.1, 3.3)
    rows, facts = compare(settings, compared, "train", partial(writes, sft))
    held_out_rows, _ = compare(settings, compared_held_out, "held out", partial(writes, sft))
    pairs, held_out_pairs = (encode_pairs(some, tokenizer, settings)
                             for some in (rows, held_out_rows))

    # Step 2: a reward model learns to score the preferred one higher (3.4)
    if not run.has("reward_model"):
        torch.manual_seed(seed)  # for the head
        reward_model = RewardModel(sft)
        train_reward(reward_model, pairs, pad_id, settings, seed, run.log)
        normalize(reward_model, queries[:1000], references[:1000], pad_id)  # a mean sharp enough
        run.save("reward_model", reward_model, tokenizer)
    reward_model = RewardModel.from_pretrained(run.folder / "reward_model").to(settings.device)
    reward_of = partial(score, tokenizer, settings, reward_model)  # (posts, summaries) -> r

    # How often it, and the judge, agree with held-out labels (4.3, 3.3)
    ask = partial(judge.judged, judge.make_judge(settings.judge, reward_of), settings.judge)
    results = {"preset": "tiny", "seed": seed, "fact_accuracy": facts, "warnings": []}
    results |= judge.measure_reward_model(reward_model, pairs, held_out_pairs, held_out_rows,
                                          tokenizer, results["warnings"].append)
    results |= judge.judge_the_judge(ask, held_out_rows, settings.judge_posts)

    # What pi_SFT writes, before it becomes the policy, and its best of n samples (4.1, G.3)
    sft_texts = writes(sft, held_out)
    best_texts = judge.best_of_n(writes, reward_of, sft, few, settings.best_of_n)

    # Step 3: PPO makes what the reward model likes more likely (3.4). In place: sft becomes the
    # policy, whose win rate is taken every judge_every updates on a few held-out posts
    def evaluate(update):
        if settings.judge_every and update % settings.judge_every == 0:
            judge.judge_during(run.log, update, ask, few, writes(sft, few), sft_texts)

    if not run.has("policy"):
        critic = train_ppo(sft, reward_model, queries, tokenizer, settings, seed, run.log, evaluate)
        run.save("critic", critic, tokenizer)
        run.save("policy", sft, tokenizer)

    # Who wrote the better summaries? (4.1)
    texts = writes(run.language_model("policy"), held_out)
    rates, outcomes = judge.compare_summaries(ask, held_out, sft_texts, texts, best_texts)
    ideal, swapped = (torch.tensor(reward_of(held_out, side))
                      for side in toy.swapped_fact_pairs(held_out, seed))
    results |= rates | {
        "best_of_n_kl": judge.best_of_n_kl(settings.best_of_n),
        "reward_accuracy_swapped_fact": preference_accuracy(ideal, swapped),
        "kl_per_summary": run.history("ppo")[-1]["kl_per_summary"]}
    return results, judge.describe_samples(results, outcomes, held_out, sft_texts, texts, reward_of)


def compare(settings, posts, name, writes):
    """Sample summaries of the posts from the SFT model, and let the labeler choose. Returns the
    comparisons, and how many of the facts in these samples are right."""
    # The first quarter of the posts gets two samples, the second quarter one, the other half none
    samples = [writes(posts[:count], settings.temperature, name, i)
               for i, count in enumerate((len(posts) // 2, len(posts) // 4))]
    rows = toy.make_comparisons(posts, *samples, f"{name} {settings.seed}",
                                settings.toy_length_bias)
    print(f"comparisons, {name}: {len(rows)} labelled, {len(posts) - len(rows)} left out as their "
          "summaries are identical")
    return rows, toy.fact_accuracy(posts, samples[0])


# ---------------------------------------------------------------------------- text in, text out


def encode(posts, summaries, tokenizer, settings):
    """Posts and summaries as token ids: queries and responses."""
    return (encode_prompts(posts, tokenizer, settings.query_length),
            encode_responses(summaries, tokenizer, settings.summary_length))


def encode_pairs(rows, tokenizer, settings):
    """Comparisons -> [(query, chosen, rejected), ...] as token ids."""
    posts, *sides = ([row[key] for row in rows] for key in ("post", "chosen", "rejected"))
    return list(zip(encode_prompts(posts, tokenizer, settings.query_length), *(
        encode_responses(side, tokenizer, settings.summary_length) for side in sides)))


def score(tokenizer, settings, reward_model, posts, summaries):
    """Texts -> a list of rewards."""
    return score_summaries(reward_model, *encode(posts, summaries, tokenizer, settings),
                           tokenizer.pad_token_id).tolist()


def write(tokenizer, settings, model, posts, temperature=0.0, *stream):
    """A summary of each post, as text; at temperature 0, as the paper evaluates (Fig. 8), or drawn
    from the random stream of that name."""
    queries = encode_prompts(posts, tokenizer, settings.query_length)
    generator = generator_for(settings.seed, *stream, device=model.device)
    return write_summaries(model, tokenizer, queries, settings.response_length, temperature,
                           generator)


# ---------------------------------------------------------------------------- the folder of a run

OURS = ("results.json", "report.md", "metrics.jsonl", "samples.jsonl", "curves.png", "sft",
        "reward_model", "critic", "policy", "unfinished", "config.json")  # what a run leaves
MAY_DIFFER = ("resume", "restart", "output_dir", "environment", "files")  # of a run that goes on


class Run:
    """The folder of a run. A stage's result gets its name once it is whole, so that --resume leaves
    out the stages that are there, and does the one that was cut from its beginning."""

    def __init__(self, settings):
        self.folder, self.device, self.times = Path(settings.output_dir), settings.device, {}
        config, name = describe(settings), f"--output_dir {settings.output_dir}"
        old = self.read_config()
        if self.folder.exists() and {*os.listdir(self.folder)} - {"unfinished"}:
            if "environment" not in old:
                raise SettingError(f"{name} holds other files: nothing is ever deleted there, "
                                   "choose a new folder")
            if not settings.resume and not settings.restart:
                raise SettingError(f"{name} already holds a run: choose a new folder, go on with "
                                   "--resume, or throw that run away with --restart")
            was, now = (some | some.get("files", {}) for some in (old, config))  # files, too
            for key in now if settings.resume else ():
                if key not in MAY_DIFFER and was.get(key) != now[key]:
                    raise SettingError(f"{name}: can't be resumed, {key} was {was.get(key)} and is "
                                       f"now {now[key]}; put it back, or begin anew with --restart")
            for ours in OURS if settings.restart else ():
                self.remove(ours)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.has("config.json"):
            self.write("config.json", config)
        # Of the metrics, the lines of the stages that are done stay; a torn last line is of none
        folders = {"sft": "sft", "reward": "reward_model"}
        self.lines = [line for line in self.read("metrics.jsonl").split("\n")[:-1]
                      if self.has(folders.get(json.loads(line)["stage"], "policy"))]
        self.write("metrics.jsonl", "".join(line + "\n" for line in self.lines))

    def has(self, name):
        return (self.folder / name).exists()

    def read(self, name):
        return (self.folder / name).read_text(encoding="utf-8") if self.has(name) else ""

    def read_config(self):
        """config.json, which says that the folder is a run's; {} where it is damaged or missing."""
        with suppress(ValueError, TypeError):
            return dict(json.loads(self.read("config.json") or "{}"))
        return {}

    def remove(self, name):
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).unlink(missing_ok=True)

    def save(self, name, *parts):
        """Write a model and its tokenizer to a folder."""
        for part in parts:
            part.save_pretrained(self.folder / "unfinished")
        self.remove(name)
        os.replace(self.folder / "unfinished", self.folder / name)

    def write(self, name, content):
        """Write text, or anything else as JSON, to a file."""
        text = content if isinstance(content, str) else json.dumps(finite(content), indent=2) + "\n"
        self.remove("unfinished")
        (self.folder / "unfinished").write_text(text, encoding="utf-8")
        os.replace(self.folder / "unfinished", self.folder / name)

    def language_model(self, name):
        model = AutoModelForCausalLM.from_pretrained(self.folder / name)
        return model.to(self.device).eval()

    def log(self, stage, step, **metrics):
        """Append a line to metrics.jsonl, and note when the stage began and how far it is."""
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, (now,))[0], now
        self.lines.append(json.dumps(finite({"stage": stage, "step": step, **metrics})))
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(self.lines[-1] + "\n")

    def history(self, stage):
        """The logged lines of one stage, as dicts."""
        return [line for line in map(json.loads, self.lines) if line["stage"] == stage]


def describe(settings):
    """What config.json holds: settings, versions, and a digest of each file a result depends on."""
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True)
    files = {f"{name}.py": hashlib.sha256((ROOT / f"{name}.py").read_bytes()).hexdigest()[:16]
             for name in ("rlhf_minimal", "sft", "reward", "ppo", "judge", "lm", "tldr", "toy")}
    environment = {name: version(name) for name in ("torch", "transformers")}
    return {**vars(settings), "preset": "tiny", "files": files, "environment": {
        "git_commit": commit.stdout.decode().strip() or None, "threads": torch.get_num_threads(),
        **environment}}


def finite(value):
    """The same with None for NaN and infinity, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------- the command line


class SettingError(ValueError):
    """Something the user typed, in one line: what it was, what was expected, what to do."""


FAST = {  # --fast_dev_run: so few of everything that only the code is tested
    "toy_posts": 64, "toy_comparisons": 200, "toy_held_out": 16, "ppo_episodes": 32,
    "ppo_batch_size": 16, "ppo_epochs": 2, "judge_every": 1, "judge_during": 8, "judge_posts": 16,
    "best_of_n": 4, "response_length": 16, "reward_batch_size": 8}
COUNTS = ("sft_batch_size sft_epochs reward_batch_size reward_epochs ppo_episodes ppo_batch_size "
          "ppo_epochs ppo_minibatches return_sequences response_length query_length summary_length "
          "toy_posts toy_comparisons toy_held_out toy_width toy_layers toy_heads judge_posts "
          "judge_during best_of_n").split()
# What numbers may be, from least to most; one that is not named here may be any finite number
RANGES = dict.fromkeys(COUNTS, (1, 2**31 - 1)) | dict.fromkeys(
    ("sft_lr", "reward_lr", "ppo_lr", "kl_beta", "value_weight", "judge_every"), (0, 1e6)) | {
    "clip_range": (1e-9, 1e6), "clip_range_value": (1e-9, 1e6), "max_grad_norm": (1e-9, 1e6),
    "gamma": (0, 1), "lam": (0, 1), "seed": (0, 2**63 - 1),
    "temperature": (0.001, 1000)}  # beyond, logits overflow or sampling no longer reads them


def make_parser(*configs):
    """A command line with a flag for each field of the dataclasses; what --help says of a field is
    the comment beside it."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="%(prog)s [--setting value ...]",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=24, width=110))
    parser.error = refuse
    for config in configs:
        source = inspect.getsource(config)
        for field in fields(config):
            words = (re.search(rf"^    {field.name}:.*?  # (.*)$", source, re.M) or ("", ""))[1]
            kind = {"type": field.type, "metavar": "", "default": field.default}
            if field.type is bool:  # None: neither yes nor --no-...
                kind = {"action": {False: "store_true", None: argparse.BooleanOptionalAction}[
                    field.default]}
            parser.add_argument(f"--{field.name}", **kind, help=words.replace("%", "%%")
                                + f" (default: {field.default})")
    return parser


def refuse(message):
    raise SettingError(f"{message}; --help lists the settings")


def check_settings(settings, ranges=RANGES):
    """Raise SettingError for the first number outside its range (NaN is in none), and for numbers
    that do not go together."""
    for name, value in vars(settings).items():
        low, high = ranges.get(name, (-1e6, 1e6))
        if type(value) in (int, float) and not low <= value <= high:
            refuse(f"--{name} {str(value)[:40]}: expected {low:g} to {high:g}")
    if settings.ppo_batch_size % settings.return_sequences:
        refuse(f"--return_sequences {settings.return_sequences}: expected a divisor of "
               f"ppo_batch_size ({settings.ppo_batch_size})")
    if settings.toy_width % (2 * settings.toy_heads):
        refuse(f"--toy_width {settings.toy_width}: expected a multiple of 2 x toy_heads "
               f"({settings.toy_heads})")


def parse_settings(arguments):
    """Command line -> one namespace of all settings; None where it names real models or data."""
    parser = make_parser(RunConfig, toy.ToyConfig, SFTConfig, RewardConfig, PPOConfig,
                         judge.JudgeConfig)
    if parser.parse_known_args(arguments)[0].fast_dev_run:
        parser.set_defaults(**FAST)  # what is typed always counts
    settings, unknown = parser.parse_known_args(arguments)
    if unknown or settings.judge not in judge.JUDGES:
        if not (ROOT / "engine").exists():  # in a hand-out, say
            refuse(f"{shlex.join(unknown) or settings.judge}: no setting of the tiny world, and "
                   "engine/, which may know it, isn't here")
        return None
    check_settings(settings)
    if settings.resume and settings.restart:
        refuse("--resume and --restart: expected one of them")
    devices = ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    if settings.device == "auto":
        settings.device = devices[-1]
    if settings.device not in devices:
        refuse(f"--device {settings.device}: expected auto, {' or '.join(devices)}")
    n = 1
    while Path(f"runs/tiny-{n}").exists():
        n += 1  # the first that is free, or to resume the last that is not
    settings.output_dir = settings.output_dir or f"runs/tiny-{max(1, n - settings.resume)}"
    return settings


def print_end(run, results, samples, show=str):
    """What the terminal shows of a finished run: three posts, the win rates, where to look."""
    for sample in samples[:3]:
        print(f"\n{show(sample['post']['title'])}\n{show(sample['post']['post'])}")
        for name in ("reference", "sft", "ppo"):
            print(f"  {name:>9}: {show(sample[name])}")
    print(f"\nWin rates, judged by: {results['ppo_vs_sft']['judge']}")
    for row in judge.win_rate_table(results):
        print("{:29}{:10}{:15}{:7}{}".format(*row))
    print(f"\nKL {results['kl_per_summary']:.2f} nats per summary; reward of greedy summaries "
          f"{results['reward_sft']:.2f} -> {results['reward_ppo']:.2f}; "
          f"{results['seconds']['total']:.0f} s; see {run.folder}")


def main(arguments=()):
    """Run the command line `arguments`; from a notebook, main([]) is a default run."""
    logging.set_verbosity_error()  # of transformers: its advice is not about this run
    logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        settings = parse_settings(arguments)
        if not settings:  # real models and data: the same loop, grown up
            from engine.main import main as engine_main
            return engine_main(arguments)
        run = Run(settings)
        last = "report.md" if (ROOT / "engine").exists() else "results.json"
        if run.has(last):
            return print(f"{run.folder} is finished, nothing to resume: see its {last}")
        results, samples = run_all(run, settings)
        results["seconds"] = {stage: end - begin for stage, (begin, end) in run.times.items()
                              if stage != "judge"}  # it falls within ppo
        results["seconds"]["total"] = time.perf_counter() - started
        with suppress(ImportError):  # of resource, on Windows; macOS counts in bytes, Linux in KiB
            import resource
            results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024)
        run.write("samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
        run.write("results.json", results)
        if (ROOT / "engine").exists():  # a hand-out may be made of the root files alone
            from engine.report import report
            atlas = ROOT / "figures" / "symptoms.json"  # where ten default runs were
            told = json.loads(atlas.read_text(encoding="utf-8")) if atlas.exists() else {}
            report(run, results, samples, told.get("healthy"))
        print_end(run, results, samples)
        return results
    except (SettingError, DataError, OSError) as error:
        sys.exit(f"rlhf_minimal: {error}")
    except (FloatingPointError, RuntimeError) as error:
        if "finite" not in str(error):
            raise
        sys.exit(f"rlhf_minimal: {str(error).split('. ')[0]}. The last step before it: "
                 f"{(run.lines or ['none'])[-1]}. Lower the rate of what came next, and begin anew "
                 "with --restart")
    except KeyboardInterrupt:
        words = [word for word in arguments if word not in ("--resume", "--restart")]
        words += ["--output_dir", settings.output_dir, "--resume"]
        words = shlex.join(["python", sys.argv[0], *words])
        sys.exit(f"rlhf_minimal: stopped. Go on with: {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
