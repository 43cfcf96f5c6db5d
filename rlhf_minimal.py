"""Learning to summarize from human feedback (Stiennon et al. 2020), the whole loop in one script.

    python rlhf_minimal.py                    # tiny world: CPU, no download, a minute or two
    python rlhf_minimal.py --fast_dev_run     # a few steps of every stage, seconds
    python rlhf_minimal.py --comparisons F --posts F --judge longest     # your own rows

posts -> SFT -> comparisons -> reward model -> PPO -> judged win rates, in a folder under runs/.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, logging
from transformers.hf_argparser import HfArg

import figures
import toy
from judge import JudgeConfig, best_of_n_kl, judge_pairwise, length_controlled_win_rate
from judge import load_judge, quality_judge, win_rate
from lm import SFTConfig, decode_response, encode_response, generator_for, sample_responses
from lm import train_sft
from ppo import PPOConfig, train_ppo
from reward import RewardConfig, RewardModel, length_accuracy, normalize, post_blind_accuracy
from reward import preference_accuracy, score_summaries, train_reward
from run import Run, SettingError, environment, fresh_folder, peak_memory_bytes
from tldr import DataError, divide_by_post, encode_prompt, load_comparisons, load_posts
from tldr import without_posts_of

# ---------------------------------------------------------------------------- settings


@dataclass
class RunConfig:
    preset: str = HfArg(default="tiny", help="tiny (CPU, no download) or full (paper)")
    seed: int = HfArg(default=0, help="of everything; paper: 3-10 seeds for the RM (B.1)")
    output_dir: str = HfArg(default=None, help="folder of the run; fresh runs/<preset>-<n>")
    restart: bool = HfArg(default=False, help="throw away the run that output_dir holds")
    fast_dev_run: bool = HfArg(default=False, help="a few steps of every stage")
    summarize: str = HfArg(default=None, help="file with a post to summarize by output_dir")
    comparisons: str = HfArg(default=None, help="hub id or .jsonl/.parquet; paper: 64,832 (3.2)")
    posts: str = HfArg(default=None, help="hub id or .jsonl/.parquet/.csv; paper: 123,169 (3.2)")
    sft_model: str = HfArg(default=None, help="hub id or folder, skips SFT; paper: 1.3B (3.4)")
    reward_model: str = HfArg(default=None, help="folder of a reward_model/: skips its training")
    query_length: int = HfArg(default=512, help="tokens of a prompt at most; paper: 512 (B.2)")
    summary_length: int = HfArg(default=128, help="of a given summary; 2020 code: 128 for the RM")


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
        "sft_model": "CarperAI/openai_summarize_tldr_sft", "judge": "Qwen/Qwen2.5-3B-Instruct",
        "reward_lr": 1.5e-5, "reward_batch_size": 64, "ppo_lr": 1.5e-5, "ppo_episodes": 1_000_000,
        "ppo_batch_size": 512, "temperature": 0.7},
}
FAST = {  # --fast_dev_run: so few of everything that only the code is tested
    "toy_posts": 64, "toy_comparisons": 200, "toy_held_out": 16, "ppo_episodes": 32,
    "ppo_batch_size": 16, "ppo_epochs": 2, "judge_every": 1, "judge_during": 8, "judge_posts": 16,
    "best_of_n": 4, "response_length": 16}
ZERO_IS_FINE = ("seed", "restart", "fast_dev_run", "kl_beta", "gamma", "lam", "missing_eos",
                "value_weight", "sft_lr", "reward_lr", "ppo_lr", "judge_every")
CONFIGS = (RunConfig, ToyConfig, SFTConfig, RewardConfig, PPOConfig, JudgeConfig)


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
    parser.set_defaults(**PRESETS[settings.preset], **(FAST if settings.fast_dev_run else {}))
    settings = parser.parse_args(arguments)
    for name, value in vars(settings).items():
        if isinstance(value, (int, float)) and name not in ZERO_IS_FINE and not value > 0:
            fail(f"--{name} {value}: expected more than 0")
    if settings.ppo_batch_size % settings.return_sequences:
        fail(f"--return_sequences {settings.return_sequences}: expected a divisor of "
             f"ppo_batch_size ({settings.ppo_batch_size})")
    if settings.reward_model and not Path(settings.reward_model, "model.safetensors").is_file():
        fail(f"--reward_model {settings.reward_model}: expected the reward_model/ folder of a run")
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
        train, validation = divide_by_post(train + validation, seed=seed)
    return train, validation


def load_data(settings):
    """Posts with references for SFT and PPO, posts held out to judge on, and comparisons (train and
    validation), no post on both sides. In the tiny world the comparisons are still posts here."""
    if not settings.posts:
        n_compared, n_held_out = settings.toy_comparisons, settings.toy_held_out
        posts = toy.make_posts(settings.toy_posts + n_compared + n_compared // 8 + n_held_out,
                               settings.seed)
        held_out, posts = posts[:n_held_out], posts[n_held_out:]
        compared_held_out, posts = posts[: n_compared // 8], posts[n_compared // 8 :]
        return posts[n_compared:], held_out, posts[:n_compared], compared_held_out
    posts, held_out = load_rows(load_posts, settings.posts, settings.seed)
    compared, compared_held_out = load_rows(load_comparisons, settings.comparisons, settings.seed)
    seen = held_out + [row["post"] for row in compared_held_out]
    n_posts, n_compared = len(posts), len(compared)
    posts = without_posts_of(posts, seen)
    compared = without_posts_of(compared, seen)
    print(f"data: {len(posts)} posts, {len(compared)} comparisons; held out: {len(held_out)} posts,"
          f" {len(compared_held_out)} comparisons; left out as their post is held out: "
          f"{n_posts - len(posts)} posts, {n_compared - len(compared)} comparisons")
    if settings.fast_dev_run:
        posts, compared = posts[:64], compared[:64]
        held_out, compared_held_out = held_out[:16], compared_held_out[:16]
    return posts, held_out, compared, compared_held_out


def load_language_model(name, device):
    """Tokenizer and model of a local folder or hub id, in float32 and eval mode."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise SettingError(f"--sft_model {name}: {str(error).splitlines()[0]}") from None
    if not tokenizer("a")["input_ids"]:  # what AutoTokenizer gives for a repository without one
        raise SettingError(f"--sft_model {name} has no tokenizer files: put those of its base model"
                           " beside the weights, in a local folder")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks are made from lengths, not from ids
    return tokenizer, model.to(device).eval()


def make_tiny_model(posts, settings, device):
    """A tokenizer trained on the posts and a tiny transformer from scratch."""
    texts = [f"r/{p['subreddit']} {p['title']} {p['post']} {p['summary']}" for p in posts[:5000]]
    frame = "SUBREDDIT: r/\n\nTITLE: \n\nPOST: \n\nTL;DR:"
    tokenizer = toy.make_tokenizer([f" {text}\n{text}" for text in texts] + [frame] * 10)
    torch.manual_seed(settings.seed)
    return tokenizer, toy.make_model(tokenizer, settings.toy_width, settings.toy_layers,
                                     settings.toy_heads).to(device)


def encode_pairs(comparisons, tokenizer, settings):
    """Comparisons -> [(query, chosen, rejected)] as token ids; pairs that are equal once cut to
    summary_length are left out and counted. Returns the rows that were kept, too."""
    pairs, kept = [], []
    for row in comparisons:
        chosen, rejected = (encode_response(row[side], tokenizer, settings.summary_length)
                            for side in ("chosen", "rejected"))
        if chosen != rejected:
            pairs.append((encode_prompt(row["post"], tokenizer, settings.query_length),
                          chosen, rejected))
            kept.append(row)
    if len(kept) < len(comparisons):
        print(f"comparisons: left out {len(comparisons) - len(kept)} of {len(comparisons)}, whose "
              f"summaries are identical in their first {settings.summary_length} tokens")
    if not pairs:
        raise DataError("no comparison left to train or measure on: add some")
    return pairs, kept


# ---------------------------------------------------------------------------- the stages


def encode_posts(posts, tokenizer, settings):
    return [encode_prompt(post, tokenizer, settings.query_length) for post in posts]


def encode_summaries(texts, tokenizer, settings):
    return [encode_response(text, tokenizer, settings.summary_length) for text in texts]


def save(run, name, model, tokenizer):
    model.save_pretrained(run.folder / name)
    tokenizer.save_pretrained(run.folder / name)


def supervise(run, settings, posts, device, given):
    """Step 1: tokenizer and SFT model, given or trained on (post, reference) pairs."""
    if given:
        tokenizer, model = given
    else:
        tokenizer, model = make_tiny_model(posts, settings, device)
        references = encode_summaries([post["summary"] for post in posts], tokenizer, settings)
        train_sft(run, model, encode_posts(posts, tokenizer, settings), references,
                  tokenizer.pad_token_id, settings)
        print(f"sft: {len(posts)} posts, last loss {run.history('sft')[-1]['loss']:.3f} nats per "
              "token")
        if settings.posts:
            print("sft: a tiny model that has seen so few posts can't write good summaries; this "
                  "shows that your rows go through, not what the method reaches")
    save(run, "sft", model, tokenizer)
    return tokenizer, model


def compare_in_tiny_world(run, settings, posts, name, tokenizer, model):
    """Sample summaries from the SFT model and let the labeler choose (toy.make_comparisons)."""
    with run.timed(f"comparisons, {name}"):
        samples = []
        for draw, count in enumerate((len(posts) // 2, len(posts) // 4)):
            generator = generator_for(run.seed, name, draw, device=model.device)
            sampled = sample_responses(
                model, tokenizer, encode_posts(posts[:count], tokenizer, settings),
                settings.response_length, settings.temperature, generator)
            samples.append([decode_response(ids, tokenizer) for ids in sampled])
        comparisons = toy.make_comparisons(posts, *samples, f"{name} {run.seed}")
    print(f"comparisons, {name}: {len(comparisons)} labelled, {len(posts) - len(comparisons)} left "
          "out as their summaries are identical")
    return comparisons, toy.fact_accuracy(posts, samples[0])


def model_rewards(run, settings, sft, tokenizer, compared, compared_held_out, posts):
    """Step 2: the reward model, given or trained, and what is measured of it."""
    pad_id = tokenizer.pad_token_id
    held_out, rows = encode_pairs(compared_held_out, tokenizer, settings)
    results = {"reward_accuracy_longest_wins": length_accuracy(held_out),
               "reward_accuracy_n": len(held_out)}
    if settings.reward_model:
        reward_model = RewardModel.from_pretrained(settings.reward_model).to(sft.device)
    else:
        pairs, _ = encode_pairs(compared, tokenizer, settings)
        if not settings.posts:
            results["reward_accuracy_post_blind"] = post_blind_accuracy(
                pairs, held_out, len(tokenizer))
        torch.manual_seed(settings.seed)  # for the head
        reward_model = RewardModel(sft)
        train_reward(run, reward_model, pairs, pad_id, settings)
        references = [post["summary"] for post in posts[:1000]]  # the mean is sharp enough by then
        normalize(reward_model, encode_posts(posts[:1000], tokenizer, settings),
                  encode_summaries(references, tokenizer, settings), pad_id)
    save(run, "reward_model", reward_model, tokenizer)
    queries, *pair = zip(*held_out)
    chosen, rejected = (score_summaries(reward_model, queries, side, pad_id) for side in pair)
    results["reward_accuracy"] = preference_accuracy(chosen, rejected)
    if not settings.posts:
        gaps = torch.tensor([row["gap"] for row in rows])
        agrees = ((chosen > rejected) == (gaps > 0))[gaps != 0]
        results["reward_accuracy_true_taste"] = agrees.float().mean().item()
        results["reward_accuracy_ceiling"] = toy.label_ceiling(rows)
        results["label_agreement"] = (gaps[gaps != 0] > 0).float().mean().item()
    print(f"reward model: accuracy {results['reward_accuracy']:.3f} on {len(held_out)} held-out "
          f"comparisons, pick-the-longer {results['reward_accuracy_longest_wins']:.3f}")
    return reward_model, results


def best_of_n(write, score, model, posts, n, seed):
    """Best-of-n as a policy of its own (App. G.3): n samples at T = 0.7, the best by reward."""
    generator = generator_for(seed, "best of n", device=model.device)
    repeated = [post for post in posts for _ in range(n)]
    samples = write(model, repeated, 0.7, generator)
    scores = score(repeated, samples)
    rows = range(0, len(samples), n)
    return [samples[max(range(row, row + n), key=scores.__getitem__)] for row in rows]


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def mean_words(summaries):
    return mean(len(summary.split()) for summary in summaries)


def run_all(settings):
    """Every stage in the paper's order; returns what results.json holds."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny_world = not settings.posts
    judge_name = settings.judge or "labeler"

    def score(some_posts, summaries):
        return score_summaries(reward_model, encode_posts(some_posts, tokenizer, settings),
                               encode_summaries(summaries, tokenizer, settings),
                               tokenizer.pad_token_id).tolist()

    def write(model, some_posts, temperature=0.0, generator=None):
        """Summaries as text; at temperature 0, as the paper evaluates (Fig. 8)."""
        return [decode_response(ids, tokenizer) for ids in sample_responses(
            model, tokenizer, encode_posts(some_posts, tokenizer, settings),
            settings.response_length, temperature, generator)]

    def judged(some_posts, ours, theirs):
        outcomes = judge_pairwise(judge, some_posts, ours, theirs)
        rate, lengths = win_rate(outcomes), ([len(text) + 1 for text in side]  # "" has no logarithm
                                             for side in (ours, theirs))
        return {"n": rate.total - rate.abstentions, "judge": judge_name, **rate._asdict(),
                "length_controlled": length_controlled_win_rate(outcomes, *lengths),
                "mean_length": mean_words(ours), "mean_length_other": mean_words(theirs)}, outcomes

    def evaluate(update):
        """The notebook's periodic win rate: every judge_every updates, on a few held-out posts."""
        if not settings.judge_every or update % settings.judge_every:
            return
        summaries = write(policy, held_out[few])
        line = {"length": mean_words(summaries), "judge": judge_name}
        for name, theirs in (("reference", references), ("sft", sft_summaries)):
            rate, _ = judged(held_out[few], summaries, theirs[few])
            line |= {f"vs_{name}_{key}": rate[key] for key in ("win_rate", "low", "high", "n")}
        if tiny_world:
            line["true_quality"] = mean(map(toy.true_quality, held_out[few], summaries))
        run.log("judge", update, **line)

    try:  # before any training: it may not be there
        judge = (quality_judge(toy.true_quality) if judge_name == "labeler"
                 else load_judge(judge_name, score))
    except (OSError, ValueError) as error:
        raise SettingError(f"--judge {judge_name}: {str(error).splitlines()[0]}") from None
    given = load_language_model(settings.sft_model, device) if settings.sft_model else None
    posts, held_out, compared, compared_held_out = load_data(settings)
    run = Run(settings.output_dir or fresh_folder(settings.preset), settings.seed, settings.restart)
    run.write("config.json", {**vars(settings), "environment": environment()})
    results = {"preset": settings.preset, "seed": settings.seed}

    tokenizer, sft = supervise(run, settings, posts, device, given)
    if tiny_world:
        compared, results["fact_accuracy"] = compare_in_tiny_world(
            run, settings, compared, "train", tokenizer, sft)
        compared_held_out, _ = compare_in_tiny_world(
            run, settings, compared_held_out, "held out", tokenizer, sft)
    reward_model, measured = model_rewards(run, settings, sft, tokenizer, compared,
                                           compared_held_out, posts)
    results |= measured

    held_out, few = held_out[: settings.judge_posts], slice(settings.judge_during)
    references, sft_summaries = [post["summary"] for post in held_out], write(sft, held_out)
    policy = copy.deepcopy(sft)
    critic = train_ppo(run, policy, reward_model, encode_posts(posts, tokenizer, settings),
                       tokenizer, settings, evaluate)
    save(run, "policy", policy, tokenizer)
    save(run, "critic", critic, tokenizer)
    last = run.history("ppo")[-1]
    print(f"ppo: {last['step'] + 1} updates, reward {last['reward']:.2f}, "
          f"KL {last['kl_per_summary']:.2f} nats per summary")

    with run.timed("judge"):
        ppo_summaries = write(policy, held_out)
        results["sft_vs_reference"], _ = judged(held_out, sft_summaries, references)
        results["ppo_vs_reference"], vs_reference = judged(held_out, ppo_summaries, references)
        results["ppo_vs_sft"], vs_sft = judged(held_out, ppo_summaries, sft_summaries)
        best = best_of_n(write, score, sft, held_out[few], settings.best_of_n, run.seed)
        results["best_of_n_vs_reference"], _ = judged(held_out[few], best, references[few])
        results["best_of_n_kl"] = best_of_n_kl(settings.best_of_n)
        if tiny_world:
            ideal = [toy.ideal_summary(post) for post in held_out]
            results["ideal_vs_reference"], _ = judged(held_out, ideal, references)
            triples = zip(*toy.swapped_fact_pairs(held_out, run.seed))
            some_posts, *pair = map(list, triples)
            results["reward_accuracy_swapped_fact"] = preference_accuracy(
                *(torch.tensor(score(some_posts, side)) for side in pair))
        rewards = [score(held_out, side) for side in (sft_summaries, ppo_summaries)]
    results |= {"kl_per_summary": last["kl_per_summary"], "reward_sft": mean(rewards[0]),
                "reward_ppo": mean(rewards[1]), "mean_length_sft": mean_words(sft_summaries),
                "mean_length_ppo": mean_words(ppo_summaries),
                "mean_length_reference": mean_words(references),
                "seconds": {**run.seconds, "total": time.perf_counter() - started},
                "peak_memory_bytes": peak_memory_bytes()}
    columns = ("post", "reference", "sft", "ppo", "reward_sft", "reward_ppo", "ppo_vs_reference",
               "ppo_vs_sft", "judge")
    shown = [{key: post[key] for key in ("subreddit", "title", "post")} for post in held_out]
    samples = [dict(zip(columns, (*row, judge_name))) for row in zip(
        shown, references, sft_summaries, ppo_summaries, *rewards, vs_reference, vs_sft)]
    run.write("samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    run.write("results.json", results)
    figures.report(run, results, samples)
    return results


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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reward_model = RewardModel.from_pretrained(folder / "reward_model")
    post = {"post": text.strip()}
    for name in ("sft", "policy"):
        tokenizer, model = load_language_model(folder / name, "cpu")
        query = encode_prompt(post, tokenizer, config["query_length"])
        (ids,) = sample_responses(model, tokenizer, [query], config["response_length"], 0.0)
        reward = score_summaries(reward_model, [query], [ids], tokenizer.pad_token_id).item()
        print(f"{name:>6} (reward {reward:+.2f}): {decode_response(ids, tokenizer)}")


def main(arguments=None):
    logging.set_verbosity_error()  # of transformers: its advice is not about this run
    logging.disable_progress_bar()
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments)
        return summarize(settings) if settings.summarize else run_all(settings)
    except (SettingError, DataError) as error:
        sys.exit(f"rlhf_minimal: {error}")


if __name__ == "__main__":
    main()
