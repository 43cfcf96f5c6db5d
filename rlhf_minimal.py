"""Learning to summarize from human feedback (Stiennon et al. 2020), the whole loop in one script.

    python rlhf_minimal.py                    # tiny world: CPU, no download, about a minute and a half
    python rlhf_minimal.py --fast_dev_run     # a few steps of every stage, seconds
    python rlhf_minimal.py --comparisons F --posts F --judge longest     # your own rows

posts -> SFT -> comparisons -> reward model -> PPO -> judged win rates, in a folder under runs/.
"""

import argparse
import copy
import json
import sys
import textwrap
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
    preset: str = HfArg(default="tiny", help="tiny (CPU, no download) or full (the paper's values)")
    seed: int = HfArg(default=0, help="one seed for everything; paper: best of 3-10 for the RM (B.1)")
    output_dir: str = HfArg(default=None, help="folder of the run; fresh runs/<preset>-<n> if not given")
    restart: bool = HfArg(default=False, help="throw away the run that output_dir holds")
    fast_dev_run: bool = HfArg(default=False, help="a few steps of every stage")
    summarize: str = HfArg(default=None, help="text file with a post: summaries by the run in output_dir")
    comparisons: str = HfArg(default=None, help="hub id or .jsonl/.parquet; paper: 64,832 (3.2)")
    posts: str = HfArg(default=None, help="hub id or .jsonl/.parquet/.csv; paper: 123,169 (3.2)")
    sft_model: str = HfArg(default=None, help="hub id or folder: skips SFT; paper: 1.3B or 6.7B (3.4)")
    reward_model: str = HfArg(default=None, help="folder of a reward_model/: skips its training")
    query_length: int = HfArg(default=512, help="tokens of a prompt at most; paper: 512 (B.2)")
    summary_length: int = HfArg(default=128, help="of a given summary; 2020 code: 128 for the RM")


@dataclass
class ToyConfig:
    toy_posts: int = HfArg(default=12800, help="posts with references for SFT; paper: 116,722 (3.2)")
    toy_comparisons: int = HfArg(default=24000, help="posts whose summaries are compared; paper: 64,832")
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
CONFIGS = (RunConfig, ToyConfig, SFTConfig, RewardConfig, PPOConfig, JudgeConfig)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line a setting: `--ppo_lr  paper: 1.5e-5 (1.3B), linear to 0 (B.1) (default: 0.0003)`."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=24, width=110)

    def _format_action_invocation(self, action):
        return action.option_strings[0]


def parse_settings(arguments):
    """Command line -> one namespace of all settings. Raises SettingError for one that is unknown."""
    def fail(message):
        raise SettingError(f"{message}; `python rlhf_minimal.py --help` lists the settings")

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    first.add_argument("--fast_dev_run", "--fast-dev-run", nargs="?", const=True, default=False)
    chosen, _ = first.parse_known_args(arguments)
    if chosen.preset not in PRESETS:
        fail(f"--preset {chosen.preset}: expected one of {', '.join(PRESETS)}")
    parser = HfArgumentParser(CONFIGS, formatter_class=Help, allow_abbrev=False,
                              usage="python rlhf_minimal.py [--setting value ...]")
    parser.error = fail
    parser.set_defaults(**PRESETS[chosen.preset])
    if chosen.fast_dev_run not in (False, "false", "False"):
        parser.set_defaults(**FAST)
    settings = parser.parse_args(arguments)
    for name in ("toy_posts", "toy_comparisons", "toy_held_out", "sft_batch_size", "ppo_epochs",
                 "reward_batch_size", "ppo_batch_size", "return_sequences", "ppo_minibatches",
                 "response_length", "query_length", "summary_length", "temperature", "best_of_n"):
        if not getattr(settings, name) > 0:
            fail(f"--{name} {getattr(settings, name)}: expected more than 0")
    if settings.ppo_batch_size % settings.return_sequences:
        fail(f"--return_sequences {settings.return_sequences}: expected a divisor of "
             f"ppo_batch_size ({settings.ppo_batch_size})")
    if bool(settings.comparisons) != bool(settings.posts):
        fail("--comparisons and --posts belong together: give both, or neither for the tiny world")
    if settings.posts and settings.judge in (None, "labeler"):
        fail("--judge: nobody here can judge real text by default; give longest, reward_model, or a "
             "model (hub id or folder)")
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
    print(f"data: {len(posts)} posts, {len(compared)} comparisons; held out: {len(held_out)} posts, "
          f"{len(compared_held_out)} comparisons; left out as their post is held out: "
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
        raise SettingError(f"--sft_model {name} has no tokenizer files: put those of its base model "
                           "beside the weights, in a local folder")
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


def stage_sft(run, settings, posts, device):
    """Step 1: the SFT model, given or trained on (post, reference) pairs, saved to sft/."""
    if settings.sft_model:
        tokenizer, model = load_language_model(settings.sft_model, device)
    else:
        tokenizer, model = make_tiny_model(posts, settings, device)
        queries = [encode_prompt(post, tokenizer, settings.query_length) for post in posts]
        responses = [encode_response(post["summary"], tokenizer, settings.summary_length)
                     for post in posts]
        train_sft(run, model, queries, responses, tokenizer.pad_token_id, settings)
        print(f"sft: {len(posts)} posts, last loss {run.history('sft')[-1]['loss']:.3f} nats a token")
    save(run, "sft", model, tokenizer)
    return tokenizer, model


def stage_toy_comparisons(run, settings, posts, name, tokenizer, model):
    """Sample summaries from the SFT model and let the toy labeler choose; see toy.py."""
    half, quarter = len(posts) // 2, len(posts) // 4
    queries = [encode_prompt(post, tokenizer, settings.query_length) for post in posts[:half]]
    samples = []
    for draw, count in enumerate((half, quarter)):
        generator = generator_for(run.seed, name, draw, device=model.device)
        sampled = sample_responses(model, tokenizer, queries[:count], settings.response_length,
                                   settings.temperature, generator)
        samples.append([decode_response(ids, tokenizer) for ids in sampled])
    comparisons = toy.make_comparisons(posts, *samples, f"{name} {run.seed}")
    return comparisons, toy.fact_accuracy(posts, samples[0])


def stage_reward(run, settings, model, tokenizer, compared, compared_held_out, posts):
    """Step 2: the reward model, given or trained, normalised on references, and its accuracy."""
    pad_id = tokenizer.pad_token_id
    held_out, rows = encode_pairs(compared_held_out, tokenizer, settings)
    results = {}
    if settings.reward_model:
        reward_model = RewardModel.from_pretrained(settings.reward_model).to(model.device)
    else:
        pairs, _ = encode_pairs(compared, tokenizer, settings)
        torch.manual_seed(settings.seed)  # for the head
        reward_model = RewardModel(model)
        train_reward(run, reward_model, pairs, pad_id, settings)
        references = posts[:1000]
        normalize(reward_model,
                  [encode_prompt(p, tokenizer, settings.query_length) for p in references],
                  [encode_response(p["summary"], tokenizer, settings.summary_length)
                   for p in references], pad_id)
        results["reward_accuracy_post_blind"] = post_blind_accuracy(pairs, held_out, len(tokenizer))
    queries, chosen, rejected = zip(*held_out)
    chosen = score_summaries(reward_model, queries, chosen, pad_id)
    rejected = score_summaries(reward_model, queries, rejected, pad_id)
    results["reward_accuracy"] = preference_accuracy(chosen, rejected)
    results["reward_accuracy_longest_wins"] = length_accuracy(held_out)
    results["reward_accuracy_n"] = len(held_out)
    if not settings.posts:
        better = torch.tensor([row["gap"] for row in rows])
        decided = better != 0
        agree = (chosen > rejected) == (better > 0)
        results["label_agreement"] = (better[decided] > 0).float().mean().item()
        results["reward_accuracy_true_taste"] = agree[decided].float().mean().item()
        results["reward_accuracy_ceiling"] = toy.label_ceiling(rows)
    reward_model.save_pretrained(run.folder / "reward_model")
    tokenizer.save_pretrained(run.folder / "reward_model")
    print(f"reward model: accuracy {results['reward_accuracy']:.3f} on {len(held_out)} held-out "
          f"comparisons, pick-the-longer {results['reward_accuracy_longest_wins']:.3f}"
          + (f", post-blind {results['reward_accuracy_post_blind']:.3f}"
             if "reward_accuracy_post_blind" in results else ""))
    return reward_model, results


def save(run, name, model, tokenizer):
    model.save_pretrained(run.folder / name)
    tokenizer.save_pretrained(run.folder / name)


def run_all(settings):
    """Every stage in the paper's order; returns results.json as a dict."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    posts, held_out, compared, compared_held_out = load_data(settings)
    run = Run(settings.output_dir or fresh_folder(settings.preset), settings.seed,
              settings.restart)
    run.write("config.json", {**vars(settings), "environment": environment()})
    tiny_world = not settings.posts
    results = {"preset": settings.preset, "seed": settings.seed}

    tokenizer, sft = stage_sft(run, settings, posts, device)
    if not tiny_world and not settings.sft_model:
        print(f"sft: a tiny model that has seen {len(posts)} posts can't write good summaries; this "
              "run shows that your rows go through, not what the method reaches")
    if tiny_world:
        with run.timed("comparisons"):
            compared, results["fact_accuracy"] = stage_toy_comparisons(
                run, settings, compared, "train", tokenizer, sft)
            compared_held_out, _ = stage_toy_comparisons(
                run, settings, compared_held_out, "held out", tokenizer, sft)
        print(f"comparisons: {len(compared)} labelled, {len(compared_held_out)} held out")
    reward_model, reward_results = stage_reward(run, settings, sft, tokenizer, compared,
                                                compared_held_out, posts)
    results.update(reward_results)

    def score(some_posts, summaries):
        return score_summaries(
            reward_model,
            [encode_prompt(post, tokenizer, settings.query_length) for post in some_posts],
            [encode_response(text, tokenizer, settings.summary_length) for text in summaries],
            tokenizer.pad_token_id).tolist()

    def write(model, some_posts, temperature=0.0, generator=None):
        """Summaries as text; at temperature 0, as the paper evaluates (App. B.1, Fig. 8)."""
        queries = [encode_prompt(post, tokenizer, settings.query_length) for post in some_posts]
        return [decode_response(ids, tokenizer) for ids in sample_responses(
            model, tokenizer, queries, settings.response_length, temperature, generator)]

    if tiny_world:
        pairs = list(toy.swapped_fact_pairs(held_out, run.seed))
        right, wrong = (score([p[0] for p in pairs], [p[k] for p in pairs]) for k in (1, 2))
        results["reward_accuracy_swapped_fact"] = preference_accuracy(
            torch.tensor(right), torch.tensor(wrong))
    judge_name = settings.judge or "labeler"
    judge = (quality_judge(toy.true_quality) if judge_name == "labeler"
             else load_judge(judge_name, score))

    def judged(ours, theirs, some_posts):
        outcomes = judge_pairwise(judge, some_posts, ours, theirs)
        rate = win_rate(outcomes)
        return {"win_rate": rate.win_rate, "low": rate.low, "high": rate.high,
                "n": rate.wins + rate.losses + rate.ties, "judge": judge_name,
                "conditional_win_rate": rate.conditional_win_rate,
                "decision_rate": rate.decision_rate, "abstentions": rate.abstentions,
                "length_controlled": length_controlled_win_rate(
                    outcomes, *([len(text) + 1 for text in texts] for texts in (ours, theirs))),
                "mean_length": mean_words(ours), "mean_length_other": mean_words(theirs)}, outcomes

    judged_posts = held_out[: settings.judge_posts]
    references = [post["summary"] for post in judged_posts]
    sft_summaries = write(sft, judged_posts)
    policy = copy.deepcopy(sft)
    few = slice(0, settings.judge_during)

    def evaluate(update):
        """The notebook's periodic win rate, on held-out posts; see section 4.1 for the final one."""
        if settings.judge_every and update % settings.judge_every == 0:
            summaries = write(policy, judged_posts[few])
            line = {f"vs_{name}_{key}": value for name, theirs in
                    (("reference", references), ("sft", sft_summaries))
                    for key, value in judged(summaries, theirs[few], judged_posts[few])[0].items()
                    if key in ("win_rate", "low", "high", "n", "judge")}
            if tiny_world:
                line["true_quality"] = mean(map(toy.true_quality, judged_posts[few], summaries))
            run.log("judge", update, length=mean_words(summaries), **line)

    queries = [encode_prompt(post, tokenizer, settings.query_length) for post in posts]
    critic = train_ppo(run, policy, reward_model, queries, tokenizer, settings, evaluate)
    save(run, "policy", policy, tokenizer)
    critic.save_pretrained(run.folder / "critic")
    tokenizer.save_pretrained(run.folder / "critic")
    last = run.history("ppo")[-1]
    print(f"ppo: {last['step'] + 1} updates, reward {last['reward']:.2f}, "
          f"KL {last['kl_per_summary']:.2f} nats per summary")

    with run.timed("judge"):
        ppo_summaries = write(policy, judged_posts)
        results["sft_vs_reference"], _ = judged(sft_summaries, references, judged_posts)
        results["ppo_vs_reference"], vs_reference = judged(ppo_summaries, references, judged_posts)
        results["ppo_vs_sft"], vs_sft = judged(ppo_summaries, sft_summaries, judged_posts)
        n = settings.best_of_n
        best = best_of_n(write, score, sft, judged_posts[few], n, run.seed)
        results["best_of_n_vs_reference"], _ = judged(best, references[few], judged_posts[few])
        results["best_of_n"], results["best_of_n_kl"] = n, best_of_n_kl(n)
        if tiny_world:
            ideal = [toy.ideal_summary(post) for post in judged_posts]
            results["ideal_vs_reference"], _ = judged(ideal, references, judged_posts)
        sft_scores, ppo_scores = score(judged_posts, sft_summaries), score(judged_posts, ppo_summaries)
    results.update(
        kl_per_summary=last["kl_per_summary"], reward_sft=mean(sft_scores),
        reward_ppo=mean(ppo_scores), mean_length_sft=mean_words(sft_summaries),
        mean_length_ppo=mean_words(ppo_summaries), mean_length_reference=mean_words(references),
        seconds={**run.seconds, "total": time.perf_counter() - started},
        peak_memory_bytes=peak_memory_bytes())
    samples = [
        {"post": {key: post[key] for key in ("subreddit", "title", "post")}, "reference": reference,
         "sft": ours, "ppo": theirs, "reward_sft": a, "reward_ppo": b, "ppo_vs_reference": c,
         "ppo_vs_sft": d, "judge": judge_name}
        for post, reference, ours, theirs, a, b, c, d in zip(
            judged_posts, references, sft_summaries, ppo_summaries, sft_scores, ppo_scores,
            vs_reference, vs_sft)]
    run.write("samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    run.write("results.json", results)
    report(run, results, samples)
    return results


def best_of_n(write, score, model, posts, n, seed):
    """Best-of-n as a policy of its own (App. G.3): n samples at T = 0.7, the best by reward."""
    generator = generator_for(seed, "best of n", device=model.device)
    samples = write(model, [post for post in posts for _ in range(n)], 0.7, generator)
    scores = score([post for post in posts for _ in range(n)], samples)
    rows = range(0, len(samples), n)
    return [samples[max(range(row, row + n), key=scores.__getitem__)] for row in rows]


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def mean_words(summaries):
    return mean(len(summary.split()) for summary in summaries)


# ---------------------------------------------------------------------------- what a person sees

COMPARED = (("sft_vs_reference", "SFT against reference"),
            ("ppo_vs_reference", "PPO against reference"), ("ppo_vs_sft", "PPO against SFT"),
            ("best_of_n_vs_reference", "best-of-n against reference"),
            ("ideal_vs_reference", "the ideal against reference"))


def win_rate_table(results):
    """Rows (name, win rate, interval, n, words of both) of the comparisons that were judged."""
    for key, name in COMPARED:
        if key in results:
            r = results[key]
            yield (name, f"{r['win_rate']:.3f}", f"{r['low']:.3f} - {r['high']:.3f}", str(r["n"]),
                   f"{r['mean_length']:.1f} / {r['mean_length_other']:.1f}")


def one_line(text, width=300):
    return textwrap.shorten(text, width, placeholder=" ...")


def report(run, results, samples):
    """Print the end of the run, and write report.md with the curves."""
    judge = results["ppo_vs_sft"]["judge"]
    header = ("", "win rate", "95 % interval", "posts", "words ours / theirs")
    table = [header, *win_rate_table(results)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for sample in samples[:3]:
        print(f"\n{sample['post']['title']}\n{one_line(sample['post']['post'])}")
        for name in ("reference", "sft", "ppo"):
            print(f"  {name:>9}: {one_line(sample[name])}")
    print(f"\nWin rates, judged by: {judge}")
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    total = results["seconds"]["total"]
    print(f"\nKL {results['kl_per_summary']:.2f} nats per summary; reward of greedy summaries "
          f"{results['reward_sft']:.2f} -> {results['reward_ppo']:.2f}; {total:.0f} s; "
          f"see {run.folder / 'report.md'}")

    def cell(text):  # markup in a post stays text
        for character in "\\`*_{}[]<>#|!&~":
            text = text.replace(character, f"&#{ord(character)};")
        return " ".join(text.split())

    lines = [f"# Run {run.folder.name}, seed {results['seed']}", "",
             f"Win rates, judged by **{judge}** on held-out posts; 95 % Wilson intervals.", "",
             "| " + " | ".join(header) + " |", "|---" * len(header) + "|",
             *("| " + " | ".join(row) + " |" for row in table[1:]), "",
             "| measure | value |", "|---|---|",
             *(f"| {key} | {value:.4g} |" for key, value in results.items()
               if isinstance(value, float)), ""]
    pictures = figures.draw_run(run.folder, results)
    lines += [f"![{name}]({name})\n" for name in pictures] or [
        "No pictures: matplotlib is not installed (`pip install -e \".[plots]\"`).\n"]
    if not pictures:
        print("no pictures in the report: matplotlib is not installed (the plots extra)")
    lines += ["## Samples", "", "| post | reference | SFT | PPO |", "|---|---|---|---|",
              *("| " + " | ".join(cell(text)[:2000] for text in (
                  s["post"]["title"], s["reference"], s["sft"], s["ppo"])) + " |"
                for s in samples[:20]), ""]
    run.write("report.md", "\n".join(lines))


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
