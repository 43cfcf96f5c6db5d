"""The settings of a run: what the stages don't define themselves, presets, the command line.

Each stage's own settings stand beside the stage (`sft.SFTConfig`, `reward.RewardConfig`, ...), with
the paper's value in the comment. `parse` puts all of them on one command line.
"""

import os
from dataclasses import dataclass

from judge import JUDGES, JudgeConfig
from ppo import PPOConfig
from reward import RewardConfig
from rlhf_minimal import FAST, RANGES, SettingError, check_settings, make_parser, refuse
from sft import SFTConfig
from toy import ToyConfig


@dataclass
class RunConfig:
    preset: str = "tiny"  # tiny (CPU, no download), student, day or full
    seed: int = 0  # of everything; paper: 3-10 seeds for the RM (B.1)
    output_dir: str = None  # folder of the run; fresh runs/<preset>-<n>
    resume: bool = False  # go on with the run that was stopped in output_dir
    restart: bool = False  # throw away the run that output_dir holds
    save_seconds: float = 30  # between two checkpoints, for --resume
    fast_dev_run: bool = False  # a few steps of every stage
    summarize: str = None  # file with a post to summarize by output_dir
    comparisons: str = None  # hub id or .jsonl/.parquet; paper: 64,832 (3.2)
    posts: str = None  # hub id or .jsonl/.parquet/.csv; paper: 123,169 (3.2)
    max_posts: int = 0  # of posts and of comparisons to train on; 0 = all
    base_model: str = None  # hub id or folder, SFT starts from it; paper: GPT-3
    sft_model: str = None  # hub id or folder, skips SFT; paper: 1.3B (3.4)
    reward_model: str = None  # folder of a reward_model/: skips its training
    query_length: int = 512  # tokens of a prompt at most; paper: 512 (B.2)
    summary_length: int = 128  # of a given summary; 2020 code: 128 for the RM
    tokenizer: str = None  # hub id or folder, for an sft_model without one
    prompt_newlines: int = 2  # between its fields; paper: 2, CarperAI: 1


@dataclass
class ModelConfig:
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda or mps (a Mac's)
    dtype: str = "auto"  # of products: auto, float32, bfloat16 or float16
    lora_rank: int = 0  # of adapters; 0 = train all weights, as the paper does
    micro_batch_size: int = 0  # rows in memory at a time; 0 = the whole batch
    rollout_batch_size: int = 0  # rows sampled at a time; 0 = the whole batch
    checkpoint_activations: bool = None  # less memory, a third more compute; None: if it is short


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
# Numbers that only the engine has; the other ones as in rlhf_minimal.py
LARGEST = 2**31 - 1  # of counts: more would only be found by a full memory
RANGES = RANGES | {"prompt_newlines": (1, 100), "save_seconds": (0, 1e6)} | dict.fromkeys(
    ("lora_rank", "micro_batch_size", "rollout_batch_size", "max_posts"), (0, LARGEST))


def parse(arguments):
    """Command line -> one namespace of all settings. Raises SettingError for one that is wrong.

    A preset, and then --fast_dev_run, change defaults only: what is typed always counts.
    """
    parser = make_parser(RunConfig, ToyConfig, ModelConfig, SFTConfig, RewardConfig, PPOConfig,
                         JudgeConfig)
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
    check_settings(settings, RANGES)
    if settings.resume and settings.restart:
        refuse("--resume and --restart: expected one of them")
    if bool(settings.comparisons) != bool(settings.posts):
        refuse("--comparisons and --posts belong together: give both, or neither for the tiny "
               "world")
    if settings.posts and settings.judge in (None, "labeler"):
        refuse("--judge: the labeler of the tiny world can't judge real text; give longest, "
               "reward_model, or a language model (hub id or folder)")
    return settings
