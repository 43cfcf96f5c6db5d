"""The settings of a run: what the stages don't define themselves, presets, ranges, command line.

Each stage's own settings stand beside the stage (`sft.SFTConfig`, `reward.RewardConfig`, ...), with
the paper's value in the help text. `parse` puts all of them on one command line.
"""

import argparse
import math
import os
from dataclasses import dataclass
from typing import Optional

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


class SettingError(ValueError):
    """Something the user typed, in one line: what it was, what was expected, what to do."""


@dataclass
class RunConfig:
    preset: str = HfArg(default="tiny", help="tiny (CPU, no download), student, day or full")
    seed: int = HfArg(default=0, help="of everything; paper: 3-10 seeds for the RM (B.1)")
    output_dir: str = HfArg(default=None, help="folder of the run; fresh runs/<preset>-<n>")
    resume: bool = HfArg(default=False, help="go on with the run that was stopped in output_dir")
    restart: bool = HfArg(default=False, help="throw away the run that output_dir holds")
    save_seconds: float = HfArg(default=30, help="between two checkpoints, for --resume")
    fast_dev_run: bool = HfArg(default=False, help="a few steps of every stage")
    summarize: str = HfArg(default=None, help="file with a post to summarize by output_dir")
    comparisons: str = HfArg(default=None, help="hub id or .jsonl/.parquet; paper: 64,832 (3.2)")
    posts: str = HfArg(default=None, help="hub id or .jsonl/.parquet/.csv; paper: 123,169 (3.2)")
    max_posts: int = HfArg(default=0, help="of posts and of comparisons to train on; 0 = all")
    base_model: str = HfArg(default=None, help="hub id or folder, SFT starts from it; paper: GPT-3")
    sft_model: str = HfArg(default=None, help="hub id or folder, skips SFT; paper: 1.3B (3.4)")
    reward_model: str = HfArg(default=None, help="folder of a reward_model/: skips its training")
    query_length: int = HfArg(default=512, help="tokens of a prompt at most; paper: 512 (B.2)")
    summary_length: int = HfArg(default=128, help="of a given summary; 2020 code: 128 for the RM")
    tokenizer: str = HfArg(default=None, help="hub id or folder, for an sft_model without one")
    prompt_newlines: int = HfArg(default=2, help="between its fields; paper: 2, CarperAI: 1")


@dataclass
class ToyConfig:
    # the paper prints no size of its training part; 116,722 and 6,447 follow from Table 2
    toy_posts: int = HfArg(default=12800, help="posts with references; paper: 116,722 (Table 2)")
    toy_comparisons: int = HfArg(default=24000, help="posts to compare on; paper: 64,832 (3.2)")
    toy_held_out: int = HfArg(default=500, help="posts to judge on; paper: 6,447 (Table 2)")
    toy_length_bias: float = HfArg(default=0.0, help="taste a word for its length; paper: App. F")
    toy_width: int = HfArg(default=64, help="d_model; paper: 2048 (1.3B, Table 3)")
    toy_layers: int = HfArg(default=2, help="paper: 24 (1.3B, Table 3)")
    toy_heads: int = HfArg(default=4, help="paper: 16 (1.3B, Table 3)")


@dataclass
class ModelConfig:
    device: str = HfArg(default="auto", help="auto (cuda, else cpu), cpu, cuda or mps (a Mac's)")
    dtype: str = HfArg(default="auto", help="of products: auto, float32, bfloat16 or float16")
    lora_rank: int = HfArg(default=0, help="of adapters; 0 = train all weights, as the paper does")
    micro_batch_size: int = HfArg(default=0, help="rows in memory at a time; 0 = the whole batch")
    rollout_batch_size: int = HfArg(default=0, help="rows sampled at a time; 0 = the whole batch")
    # less memory, a third more compute. By itself on the command line it means true
    checkpoint_activations: Optional[bool] = HfArg(default=None, help="None: if memory is short",
                                                   metadata={"nargs": "?", "const": True})


JUDGES = ("labeler", "longest", "reward_model")  # any other name of a judge is a model's
TLDR = {  # the paper's data (3.2, 3.3) as the hub has it
    "comparisons": "openai/summarize_from_feedback",
    "posts": "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
    "temperature": 0.7,  # N+; the paper doesn't say
    "reward_batch_size": 64, "ppo_batch_size": 512}  # B.1
# Rates of adapters are ten times those of all weights (B.1), which is what they take (Schulman et
# al. 2025, "LoRA Without Regret"; Hu et al. 2021 have 2e-4).
PRESETS = {
    "tiny": {},
    # Two hours on a card of 16 - 24 GB (an estimate): a base model of 135M, all weights. The paper
    # has none so small; its rates fall with size, so these are twice those of 1.3B: a guess.
    "student": TLDR | {
        "base_model": "HuggingFaceTB/SmolLM2-135M", "max_posts": 15_000,
        "sft_lr": 1.3e-4, "sft_batch_size": 128, "reward_lr": 3e-5, "ppo_lr": 3e-5,
        "ppo_episodes": 4_096, "ppo_batch_size": 128, "micro_batch_size": 4,
        "rollout_batch_size": 64, "judge": "Qwen/Qwen2.5-0.5B-Instruct"},
    # A day on one card of 24 - 80 GB (an estimate): Pythia 1B, fine-tuned by the N+ study, with
    # adapters. Ten times B.1's rates for 1.3B.
    "day": TLDR | {
        "sft_model": "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
        "reward_lr": 1.5e-4, "ppo_lr": 1.5e-4, "ppo_episodes": 100_000, "response_length": 53,
        "lora_rank": 16, "micro_batch_size": 8, "rollout_batch_size": 64,
        "judge": "Qwen/Qwen2.5-1.5B-Instruct"},  # its summaries are up to 53 tokens of Pythia's
    # One card of 80 GB: GPT-J-6B, trained with single newlines, published without its tokenizer.
    # Adapters; ten times B.1's rates for 6.7B, 5e-6 and 7e-6, and its batch. The paper has
    # 1,000,000 episodes: --ppo_episodes 1000000 is ten times as long.
    "full": TLDR | {
        "sft_model": "CarperAI/openai_summarize_tldr_sft", "tokenizer": "EleutherAI/gpt-j-6B",
        "prompt_newlines": 1, "reward_lr": 5e-5, "ppo_lr": 7e-5, "ppo_episodes": 100_000,
        "ppo_batch_size": 256, "lora_rank": 16, "micro_batch_size": 16, "rollout_batch_size": 64,
        # for research only; under Apache-2.0: Qwen/Qwen3-4B-Instruct-2507
        "judge": "Qwen/Qwen2.5-3B-Instruct"},
}
FAST = {  # --fast_dev_run: so few of everything that only the code is tested
    "toy_posts": 64, "toy_comparisons": 200, "toy_held_out": 16, "ppo_episodes": 32,
    "ppo_batch_size": 16, "ppo_epochs": 2, "judge_every": 1, "judge_during": 8, "judge_posts": 16,
    "best_of_n": 4, "response_length": 16, "reward_batch_size": 8}

LARGEST = 2**31 - 1  # of counts: more would only be found by a full memory
# (smallest, largest) of the settings that are numbers; whatever is not in here must be more than 0
RANGES = dict.fromkeys((
    "save_seconds", "lora_rank", "micro_batch_size", "rollout_batch_size", "judge_every",
    "max_posts", "sft_lr", "reward_lr", "ppo_lr", "kl_beta", "value_weight"), (0, math.inf)) | {
    "temperature": (0.001, 1000),  # beyond, logits overflow or sampling no longer reads them
    "seed": (0, 2**63 - 1), "toy_length_bias": (-10, 10), "gamma": (0, 1), "lam": (0, 1),
    "missing_eos": (-math.inf, math.inf)}


def check_ranges(settings):
    """SettingError for the first number outside its range; NaN and infinity are in none."""
    for name, value in vars(settings).items():
        if type(value) not in (int, float):
            continue
        low, high = RANGES.get(name, (0, math.inf))
        inside = low <= value <= high if name in RANGES else value > 0
        if inside and high == math.inf and value > LARGEST and type(value) is int:
            refuse(f"--{name} {str(value)[:40]}: expected at most {LARGEST}")
        if not inside or abs(value) == math.inf:  # isinf refuses huge integers
            expected = "more than 0" if name not in RANGES else "a number" if low < 0 else (
                "0 or more" if math.isinf(high) else f"{low} to {high}")
            refuse(f"--{name} {value}: expected {expected}")


def refuse(message):
    raise SettingError(f"{message}; `python -m engine --help` lists the settings")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line a setting: `--ppo_lr  paper: 1.5e-5 (1.3B), linear (B.1) (default: 0.0003)`."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=24, width=110)

    def _format_action_invocation(self, action):
        return action.option_strings[0]


def parse(arguments, configs):
    """Command line -> one namespace of all settings. Raises SettingError for one that is wrong.

    configs: the dataclasses of the stages. A preset, and then --fast_dev_run, change defaults only:
    what is typed always counts.
    """
    parser = HfArgumentParser([RunConfig, ToyConfig, ModelConfig, *configs], formatter_class=Help,
                              allow_abbrev=False,
                              usage="python -m engine [--setting value ...]")
    parser.error = refuse
    settings, _ = parser.parse_known_args(arguments)
    if settings.preset not in PRESETS:
        refuse(f"--preset {settings.preset}: expected one of {', '.join(PRESETS)}")
    defaults = dict(PRESETS[settings.preset])
    if settings.base_model and settings.sft_model:
        refuse("--base_model and --sft_model: expected one of them")
    given = settings.base_model, settings.sft_model
    if any(given) and given != (defaults.get("base_model"), defaults.get("sft_model")):
        for name in ("base_model", "sft_model", "tokenizer", "prompt_newlines"):
            defaults.pop(name, None)  # what belongs to the preset's own model
    parser.set_defaults(**defaults)
    if settings.fast_dev_run:
        parser.set_defaults(**FAST)
    settings = parser.parse_args(arguments)
    for name, value in vars(settings).items():
        if isinstance(value, str):  # a shell leaves the ~ of --output_dir=~/x alone
            setattr(settings, name, os.path.expanduser(value))
    check_ranges(settings)
    if settings.resume and settings.restart:
        refuse("--resume and --restart: expected one of them")
    if settings.ppo_batch_size % settings.return_sequences:
        refuse(f"--return_sequences {settings.return_sequences}: expected a divisor of "
               f"ppo_batch_size ({settings.ppo_batch_size})")
    if settings.toy_width % (2 * settings.toy_heads):
        refuse(f"--toy_width {settings.toy_width}: expected a multiple of 2 x toy_heads "
               f"({settings.toy_heads})")
    if bool(settings.comparisons) != bool(settings.posts):
        refuse("--comparisons and --posts belong together: give both, or neither for the tiny "
               "world")
    if settings.posts and settings.judge in (None, "labeler"):
        refuse("--judge: the labeler of the tiny world can't judge real text; give longest, "
               "reward_model, or a language model (hub id or folder)")
    return settings
