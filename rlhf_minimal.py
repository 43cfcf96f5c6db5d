"""Learning to summarize from human feedback (Stiennon et al. 2020), the whole loop in one script.

    python rlhf_minimal.py                    # tiny world: CPU, no download, a minute or two
    python rlhf_minimal.py --fast_dev_run     # a few steps of every stage, seconds
    python rlhf_minimal.py --comparisons F --posts F --judge longest     # your own rows

posts -> SFT -> comparisons -> reward model -> PPO -> judged win rates, in a folder under runs/.
"""

import argparse
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, logging
from transformers.hf_argparser import HfArg

import figures
import toy
from judge import JudgeConfig, load_judge, quality_judge
from lm import ModelConfig, SFTConfig, add_adapter, checkpoint_activations, decode_response
from lm import encode_response, generator_for, load_language_model, sample_responses, train_sft
from ppo import PPOConfig, posts_per_update, train_ppo
from reward import RewardConfig, RewardModel, normalize, score_summaries, train_reward
from run import Run, SettingError, agreed, available_memory, check_folder, check_memory
from run import choose_folder, describe, from_hub, go_offline_unless_reachable, memory_plan, rank
from run import start_processes
from tldr import DataError, divide_by_post, encode_prompts, load_comparisons, load_posts
from tldr import without_posts_of

# ---------------------------------------------------------------------------- settings


@dataclass
class RunConfig:
    preset: str = HfArg(default="tiny", help="tiny (CPU, no download) or full (paper)")
    seed: int = HfArg(default=0, help="of everything; paper: 3-10 seeds for the RM (B.1)")
    output_dir: str = HfArg(default=None, help="folder of the run; fresh runs/<preset>-<n>")
    resume: bool = HfArg(default=False, help="go on with the run that was stopped in output_dir")
    restart: bool = HfArg(default=False, help="throw away the run that output_dir holds")
    save_seconds: float = HfArg(default=30, help="between two checkpoints, for --resume")
    fast_dev_run: bool = HfArg(default=False, help="a few steps of every stage")
    summarize: str = HfArg(default=None, help="file with a post to summarize by output_dir")
    comparisons: str = HfArg(default=None, help="hub id or .jsonl/.parquet; paper: 64,832 (3.2)")
    posts: str = HfArg(default=None, help="hub id or .jsonl/.parquet/.csv; paper: 123,169 (3.2)")
    sft_model: str = HfArg(default=None, help="hub id or folder, skips SFT; paper: 1.3B (3.4)")
    reward_model: str = HfArg(default=None, help="folder of a reward_model/: skips its training")
    query_length: int = HfArg(default=512, help="tokens of a prompt at most; paper: 512 (B.2)")
    summary_length: int = HfArg(default=128, help="of a given summary; 2020 code: 128 for the RM")
    tokenizer: str = HfArg(default=None, help="hub id or folder, for an sft_model without one")
    prompt_newlines: int = HfArg(default=2, help="between its fields; paper: 2, CarperAI: 1")


@dataclass
class ToyConfig:
    toy_posts: int = HfArg(default=12800, help="posts with references; paper: 116,722 (3.2)")
    toy_comparisons: int = HfArg(default=24000, help="posts to compare on; paper: 64,832 (3.2)")
    toy_held_out: int = HfArg(default=500, help="posts to judge on; paper: 6,447 (3.2)")
    toy_width: int = HfArg(default=64, help="d_model; paper: 2048 (1.3B, Table 3)")
    toy_layers: int = HfArg(default=2, help="paper: 24 (1.3B, Table 3)")
    toy_heads: int = HfArg(default=4, help="paper: 16 (1.3B, Table 3)")


PRESETS = {
    "tiny": {},
    "full": {  # 1.3B column of appendix B.1
        "comparisons": "openai/summarize_from_feedback",
        "posts": "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
        # GPT-J-6B; trained with single newlines, published without its tokenizer
        "sft_model": "CarperAI/openai_summarize_tldr_sft", "tokenizer": "EleutherAI/gpt-j-6B",
        "prompt_newlines": 1,
        # for research only; under Apache-2.0: Qwen/Qwen3-4B-Instruct-2507
        "judge": "Qwen/Qwen2.5-3B-Instruct",
        "reward_lr": 1.5e-5, "reward_batch_size": 64, "ppo_lr": 1.5e-5, "ppo_episodes": 1_000_000,
        "ppo_batch_size": 512, "temperature": 0.7,
        # so that it fits on one GPU of 80 GB
        "lora_rank": 16, "micro_batch_size": 16, "rollout_batch_size": 64,
        "checkpoint_activations": True},
}
FAST = {  # --fast_dev_run: so few of everything that only the code is tested
    "toy_posts": 64, "toy_comparisons": 200, "toy_held_out": 16, "ppo_episodes": 32,
    "ppo_batch_size": 16, "ppo_epochs": 2, "judge_every": 1, "judge_during": 8, "judge_posts": 16,
    "best_of_n": 4, "response_length": 16, "reward_batch_size": 8}
ZERO_IS_FINE = ("seed", "save_seconds", "lora_rank", "micro_batch_size", "rollout_batch_size",
                "sft_lr", "reward_lr", "ppo_lr", "kl_beta", "gamma", "lam", "missing_eos",
                "value_weight", "judge_every")
CONFIGS = (RunConfig, ToyConfig, ModelConfig, SFTConfig, RewardConfig, PPOConfig, JudgeConfig)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line a setting: `--ppo_lr  paper: 1.5e-5 (1.3B), linear to 0 (B.1) (default: 0.0003)`."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=24, width=110)

    def _format_action_invocation(self, action):
        return action.option_strings[0]


def parse_settings(arguments):
    """Command line -> one namespace of all settings. Raises SettingError for one that is wrong."""
    def fail(message):
        raise SettingError(f"{message}; `python rlhf_minimal.py --help` lists the settings")

    parser = HfArgumentParser(CONFIGS, formatter_class=Help, allow_abbrev=False,
                              usage="python rlhf_minimal.py [--setting value ...]")
    parser.error = fail
    settings, _ = parser.parse_known_args(arguments)
    if settings.preset not in PRESETS:
        fail(f"--preset {settings.preset}: expected one of {', '.join(PRESETS)}")
    preset = dict(PRESETS[settings.preset])
    if settings.sft_model not in (None, preset.get("sft_model")):
        for name in ("tokenizer", "prompt_newlines"):  # those of the preset's own model
            preset.pop(name, None)
    parser.set_defaults(**{**preset, **(FAST if settings.fast_dev_run else {})})
    settings = parser.parse_args(arguments)
    for name, value in vars(settings).items():
        if type(value) in (int, float) and name not in ZERO_IS_FINE and not value > 0:
            fail(f"--{name} {value}: expected more than 0")
    if settings.resume and settings.restart:
        fail("--resume and --restart: expected one of them")
    if settings.ppo_batch_size % settings.return_sequences:
        fail(f"--return_sequences {settings.return_sequences}: expected a divisor of "
             f"ppo_batch_size ({settings.ppo_batch_size})")
    if bool(settings.comparisons) != bool(settings.posts):
        fail("--comparisons and --posts belong together: give both, or neither for the tiny world")
    if settings.posts and settings.judge in (None, "labeler"):
        fail("--judge: the labeler of the tiny world can't judge real text; give longest, "
             "reward_model, or a language model (hub id or folder)")
    return settings


# ---------------------------------------------------------------------------- data and models


def load_rows(load, source, seed):
    """(train, validation); rows that name one split only are divided 90 : 10, by post."""
    train, validation = load(source, "train"), load(source, "validation")
    if not train or not validation:
        train, validation = divide_by_post(train + validation, seed=seed, source=source)
    return train, validation


def load_data(settings):
    """Posts with references for SFT and PPO, posts held out to judge on, and comparisons (train and
    validation), no post on both sides. In the tiny world the comparisons are still posts here."""
    if not settings.posts:
        n_compared = settings.toy_comparisons
        sizes = settings.toy_held_out, n_compared // 8, n_compared, settings.toy_posts
        posts = iter(toy.make_posts(sum(sizes), settings.seed))
        held_out, compared_held_out, compared, posts = (list(islice(posts, n)) for n in sizes)
        return posts, held_out, compared, compared_held_out
    posts, held_out = load_rows(load_posts, settings.posts, settings.seed)
    compared, compared_held_out = load_rows(load_comparisons, settings.comparisons, settings.seed)
    seen = held_out + [row["post"] for row in compared_held_out]
    n_posts, n_compared = len(posts), len(compared)
    posts, compared = without_posts_of(posts, seen), without_posts_of(compared, seen)
    print(f"data: {len(posts)} posts, {len(compared)} comparisons; held out: {len(held_out)} posts,"
          f" {len(compared_held_out)} comparisons; left out as their post is held out: "
          f"{n_posts - len(posts)} posts, {n_compared - len(compared)} comparisons")
    if not posts or not compared:
        raise DataError(f"{settings.comparisons}, {settings.posts}: expected posts and comparisons "
                        "whose post is not held out, got none to train on: add some")
    if settings.fast_dev_run:
        return posts[:64], held_out[:16], compared[:64], compared_held_out[:16]
    return posts, held_out, compared, compared_held_out


def make_tiny_model(posts, settings, device):
    """A tokenizer trained on the posts and a tiny transformer from scratch."""
    texts = [f"r/{p['subreddit']} {p['title']} {p['post']} {p['summary']}" for p in posts[:5000]]
    frame = "SUBREDDIT: r/\n\nTITLE: \n\nPOST: \n\nTL;DR:"
    tokenizer = toy.make_tokenizer([f" {text}\n{text}" for text in texts] + [frame] * 10)
    torch.manual_seed(settings.seed)
    return tokenizer, toy.make_model(tokenizer, settings.toy_width, settings.toy_layers,
                                     settings.toy_heads).to(device)


# ---------------------------------------------------------------------------- text <-> token ids


def encode(posts, summaries, tokenizer, settings):
    """Posts and summaries as token ids: queries and responses."""
    return (encode_prompts(posts, tokenizer, settings.query_length, settings.prompt_newlines),
            [encode_response(text, tokenizer, settings.summary_length) for text in summaries])


def encode_pairs(comparisons, tokenizer, settings):
    """Comparisons -> [(query, chosen, rejected)] as token ids; pairs that are equal once cut to
    summary_length are left out and counted. Returns the rows that were kept, too."""
    posts, better, worse = ([row[key] for row in comparisons]
                            for key in ("post", "chosen", "rejected"))
    queries, chosen = encode(posts, better, tokenizer, settings)
    _, rejected = encode([], worse, tokenizer, settings)
    kept = [i for i in range(len(comparisons)) if chosen[i] != rejected[i]]
    if len(kept) < len(comparisons):
        print(f"comparisons: left out {len(comparisons) - len(kept)} of {len(comparisons)}, whose "
              f"summaries are identical in their first {settings.summary_length} tokens")
    if not kept:
        raise DataError(f"{settings.comparisons or 'tiny world'}: no comparison left to train or "
                        "measure on; add some, or raise summary_length")
    return [(queries[i], chosen[i], rejected[i]) for i in kept], [comparisons[i] for i in kept]


def score(reward_model, posts, summaries, tokenizer, settings):
    """Texts -> a list of rewards."""
    return score_summaries(reward_model, *encode(posts, summaries, tokenizer, settings),
                           tokenizer.pad_token_id).tolist()


def write(model, posts, tokenizer, settings, temperature=0.0, *stream):
    """A summary of each post, as text; at temperature 0, as the paper evaluates (Fig. 8), or drawn
    from the random stream of that name."""
    generator = generator_for(settings.seed, *stream, device=model.device)
    return [decode_response(ids, tokenizer) for ids in sample_responses(
        model, tokenizer, encode(posts, [], tokenizer, settings)[0], settings.response_length,
        temperature, generator, settings.rollout_batch_size or 256)]


# ---------------------------------------------------------------------------- the stages


def supervise(run, settings, posts, device, given):
    """Step 1: tokenizer and SFT model, given or trained on (post, reference) pairs."""
    if given:
        tokenizer, model = given
    else:
        tokenizer, model = make_tiny_model(posts, settings, device)
        references = [post["summary"] for post in posts]
        train_sft(run, model, *encode(posts, references, tokenizer, settings),
                  tokenizer.pad_token_id, settings)
        print(f"sft: {len(posts)} posts, last loss {run.history('sft')[-1]['loss']:.3f} nats per "
              "token")
        if settings.posts:
            print("sft: a tiny model that has seen so few posts can't write good summaries; this "
                  "shows that your rows go through, not what the method reaches")
    run.save_model("sft", model, tokenizer)
    return tokenizer, model


def compare_in_tiny_world(run, settings, posts, name, tokenizer, model):
    """Sample summaries from the SFT model and let the labeler choose (toy.make_comparisons)."""
    with run.timed(f"comparisons, {name}"):
        samples = [write(model, posts[:count], tokenizer, settings, settings.temperature, name, i)
                   for i, count in enumerate((len(posts) // 2, len(posts) // 4))]
        comparisons = toy.make_comparisons(posts, *samples, f"{name} {run.seed}")
    print(f"comparisons, {name}: {len(comparisons)} labelled, {len(posts) - len(comparisons)} left "
          "out as their summaries are identical")
    return comparisons, toy.fact_accuracy(posts, samples[0])


def make_reward_model(run, settings, posts, pairs, tokenizer, sft, given):
    """Step 2: the reward model, given or trained; references score 0 on average."""
    if given:
        own = from_hub(AutoTokenizer.from_pretrained, settings.reward_model,
                       trust_remote_code=False)
        if own.get_vocab() != tokenizer.get_vocab():
            raise SettingError(f"--reward_model {settings.reward_model}: it was trained with "
                               "another tokenizer than the SFT model; pass one that fits")
        reward_model = given.to(sft.device)
        reward_model.trunk.to(sft.dtype)
    else:
        torch.manual_seed(settings.seed)  # for the head
        reward_model = RewardModel(sft)
        if settings.lora_rank:
            reward_model.trunk = add_adapter(reward_model.trunk, settings.lora_rank)
        if settings.checkpoint_activations:
            checkpoint_activations(reward_model.trunk)
        train_reward(run, reward_model, pairs, tokenizer.pad_token_id, settings)
        if settings.lora_rank:
            reward_model.trunk = reward_model.trunk.merge_and_unload()
        posts = posts[:1000]  # the mean is sharp enough by then
        references = [post["summary"] for post in posts]
        normalize(reward_model, *encode(posts, references, tokenizer, settings),
                  tokenizer.pad_token_id)
    run.save_model("reward_model", reward_model, tokenizer)
    return reward_model


def load_given(settings, device, score):
    """The judge, and tokenizer and SFT model, and the reward model (None: to be trained), before
    any training: they may not be there, or too large for this machine."""
    small, judge, reward_model = settings.fast_dev_run, settings.judge or "labeler", None
    dtype = torch.bfloat16 if settings.lora_rank and device != "cpu" else torch.float32
    hub_ids = [name for name in (settings.posts, settings.comparisons, settings.sft_model,
                                   settings.tokenizer, settings.reward_model, judge)
               if "/" in str(name) and not Path(name).exists()]
    if hub_ids:
        go_offline_unless_reachable()
    if settings.reward_model:
        if settings.reward_model.count("/") == 1 and not Path(settings.reward_model).exists():
            settings.reward_model = from_hub(snapshot_download, settings.reward_model)
        try:
            reward_model = from_hub(RewardModel.from_pretrained, settings.reward_model)
        except SettingError as error:
            raise SettingError(f"--reward_model {error} (expected the reward_model/ folder of a "
                               "run, or the hub id of one)") from None
    if settings.sft_model and not small:
        configs = [from_hub(AutoConfig.from_pretrained, name, trust_remote_code=False)
                   for name in (settings.sft_model, judge) if "/" in name]
        check_memory(memory_plan(settings, *configs, device=device), *available_memory(device))
    try:
        judge = (quality_judge(toy.true_quality) if judge == "labeler"
                 else load_judge(judge, score, small))
    except ValueError as error:
        named = judge in str(error)
        raise SettingError(str(error) if named else f"--judge {judge}: {error}") from None
    if not settings.sft_model:
        return judge, None, reward_model
    return judge, load_language_model(settings.sft_model, device, dtype, settings.tokenizer,
                                      small), reward_model


def run_all(settings):
    """Every stage in the paper's order; returns what results.json holds."""
    device = start_processes()
    config = describe(vars(settings))
    folder, flags = settings.output_dir, (settings.restart, settings.resume)
    with agreed():  # before hours of work, and before anything large is loaded
        posts_per_update(settings)
        if rank() == 0:
            check_folder(folder, config, *flags)
    if settings.resume and Path(folder, "results.json").exists():
        shutil.rmtree(Path(folder, "checkpoints"), ignore_errors=True)  # a kill may have left them
        return print(f"{folder} is finished, nothing to resume: see {Path(folder, 'report.md')}")

    def reward_of(some_posts, summaries):
        return score(reward_model, some_posts, summaries, tokenizer, settings)

    def written(model, some_posts, *temperature_and_stream):
        return write(model, some_posts, tokenizer, settings, *temperature_and_stream)

    def evaluate(update):
        """The notebook's periodic win rate: every judge_every updates, on a few held-out posts."""
        if settings.judge_every and update % settings.judge_every == 0:
            figures.judge_during(run, update, ask, few, written(policy, few), sft_texts)

    with agreed():
        judge, given, reward_model = load_given(settings, device, reward_of)
        posts, held_out, compared, compared_held_out = load_data(settings)
        run = Run(folder, config, *flags, settings.save_seconds)
    ask = partial(figures.judged, run, judge, settings.judge or "labeler")
    results = {"preset": settings.preset, "seed": settings.seed}
    # With all weights trained in float32, a GPU still multiplies matrices in bfloat16. No cache of
    # weights in bfloat16: it would outlive the step that changes them.
    with run.guarded(), torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu",
                                       cache_enabled=False):
        tokenizer, sft = supervise(run, settings, posts, device, given)
        if not settings.posts:
            compared, results["fact_accuracy"] = compare_in_tiny_world(
                run, settings, compared, "train", tokenizer, sft)
            compared_held_out, _ = compare_in_tiny_world(
                run, settings, compared_held_out, "held out", tokenizer, sft)
        pairs, _ = encode_pairs(compared, tokenizer, settings)
        pairs_held_out, rows = encode_pairs(compared_held_out, tokenizer, settings)
        reward_model = make_reward_model(run, settings, posts, pairs, tokenizer, sft, reward_model)
        results |= figures.measure_reward_model(run, reward_model, pairs, pairs_held_out, rows,
                                                tokenizer)
        some = rows[:: max(1, len(rows) // settings.judge_posts)]
        results |= figures.judge_the_judge(run, ask, some)
        held_out = held_out[: settings.judge_posts]
        few = held_out[: settings.judge_during]
        # all that the SFT model has to write, before it becomes the policy
        sft_texts = written(sft, held_out)
        best = figures.best_of_n(written, reward_of, sft, few, settings.best_of_n)
        policy = sft
        critic = train_ppo(run, policy, reward_model, encode(posts, [], tokenizer, settings)[0],
                           tokenizer, settings, evaluate)
        run.save_model("policy", policy, tokenizer)
        run.save_model("critic", critic, tokenizer)
        last = run.history("ppo")[-1]
        print(f"ppo: {last['step'] + 1} updates, reward {last['reward']:.2f}, "
              f"KL {last['kl_per_summary']:.2f} nats per summary")
        return figures.finish(run, settings, results, ask, reward_of, held_out, sft_texts,
                              written(policy, held_out), best)


# ---------------------------------------------------------------------------- trying it out


def summarize(settings):
    """--summarize FILE: the summaries of one post by the SFT model and the policy of a finished
    run, with their rewards."""
    folder = Path(settings.output_dir or "")
    if not settings.output_dir or not (folder / "policy").is_dir():
        raise SettingError(f"--summarize needs --output_dir with a finished run, got {folder}")
    try:
        text = Path(settings.summarize).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--summarize {settings.summarize}: expected a UTF-8 text file "
                           f"({error})") from None
    vars(settings).update(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    reward_model = RewardModel.from_pretrained(folder / "reward_model")
    for name in ("sft", "policy"):
        tokenizer, model = load_language_model(folder / name)
        texts = write(model, [{"post": text.strip()}], tokenizer, settings)
        (reward,) = score(reward_model, [{"post": text.strip()}], texts, tokenizer, settings)
        print(f"{name:>6} (reward {reward:+.2f}): {figures.one_line(texts[0])}")


def main(arguments=None):
    logging.set_verbosity_error()  # of transformers: its advice is not about this run
    logging.disable_progress_bar()
    arguments = sys.argv[1:] if arguments is None else arguments
    again = [word for word in arguments if word not in ("--resume", "--restart")] + ["--resume"]
    try:
        settings = parse_settings(arguments)
        if settings.summarize:
            return summarize(settings)
        if not settings.output_dir:
            settings.output_dir = choose_folder(settings.preset, settings.resume)
            again += ["--output_dir", settings.output_dir]
        return run_all(settings)
    except (SettingError, DataError) as error:
        sys.exit(f"rlhf_minimal: {error}")
    except (OSError, SafetensorError) as error:  # a full or read-only disk, say
        sys.exit(f"rlhf_minimal: {error}. What was saved before stays; when that is mended, go on "
                 f"with: python rlhf_minimal.py {shlex.join(again)}")
    except KeyboardInterrupt:
        print("rlhf_minimal: stopped. Go on from what is saved with: python rlhf_minimal.py "
              f"{shlex.join(again)}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
