"""The paper's loop for what outgrows a laptop: real models and data, resume in mid-stage.

    python -m engine --preset student|day|full
    python -m engine --comparisons mine.jsonl --posts posts.jsonl --judge longest

The stages are those of rlhf_minimal.py, in the same order, with the same results; the loops are the
engine's own.
"""

import json
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import logging

import toy
from engine.adapters import add_adapter, checkpoint_activations
from engine.checkpoints import is_finished
from engine.devices import mixed_precision, peak_memory_bytes, pick_device
from engine.judges import judged
from engine.models import from_hub, load_language_model
from engine.origin import choose_folder, recorded
from engine.ppo import train_ppo
from engine.processes import n_processes, rank
from engine.report import one_line, report
from engine.reward import RewardModel, train_reward
from engine.rows import DataError, read_text
from engine.sampling import sample_responses
from engine.settings import RANGES, SettingError, check_settings, parse
from engine.sft import train_sft
from engine.start import prepare_run
from engine.texts import decode_response, encode, encode_pairs
from judge import best_of_n, best_of_n_kl, compare_summaries, describe_samples, judge_during
from judge import judge_the_judge, measure_reward_model, reward_model_judge
from lm import generator_for
from reward import normalize, preference_accuracy, score_summaries
from rlhf_minimal import compare, print_end


def run_all(settings):
    """The paper's loop, once around (3.1, Fig. 2). Returns what results.json holds."""
    prepared = prepare_run(settings)
    if prepared is None:  # it was finished before, and --resume has nothing to do
        return None
    run, data, tokenizer, model, reward_model, judge = prepared
    # Posts with human references (3.2) and comparisons (3.3), of which some are held out
    posts, held_out, compared, compared_held_out = data
    held_out = held_out[: settings.judge_posts]
    few = held_out[: settings.judge_during]  # for what is judged during PPO, and best of n
    # ... as token ids, and how a model's summaries come back as text
    queries, references = encode(posts, [post["summary"] for post in posts], tokenizer, settings)
    writes = partial(write, tokenizer, settings)  # (model, posts) -> summaries
    with run.guarded(), mixed_precision(run.device, run.dtype):  # Ctrl-C saves; half precision
        # Where the loop starts: pi_SFT, a language model fine-tuned on the references (3.4)
        sft = supervised_baseline(run, settings, queries, references, tokenizer, model)

        # Step 1: people, or the tiny world's labeler, compare two summaries of a post (3.1, 3.3)
        pairs, held_out_pairs, held_out_rows, results = collect_comparisons(
            run, settings, compared, compared_held_out, tokenizer, writes, sft)

        # Step 2: a reward model learns to score the preferred one higher (3.4)
        reward_model = make_reward_model(run, settings, pairs, queries, references, tokenizer, sft,
                                         reward_model)
        reward_of = partial(score, tokenizer, settings, reward_model)  # (posts, summaries) -> r

        # How often it, and the judge, agree with held-out labels (4.3, 3.3)
        ask = partial(judged, run, judge or reward_model_judge(reward_of), settings.judge)
        results |= measure_reward_model(
            reward_model, pairs, held_out_pairs, held_out_rows, tokenizer,
            partial(run.warn, "reward"), settings.rollout_batch_size or 256)
        results |= judge_the_judge(ask, held_out_rows, settings.judge_posts)

        # What pi_SFT writes, before it becomes the policy, and its best of n samples (4.1, G.3)
        sft_texts = writes(sft, held_out)
        best_texts = best_of_n(writes, reward_of, sft, few, settings.best_of_n)

        # Step 3: PPO makes what the reward model likes more likely (3.4). In place: sft is the
        # policy from here on
        policy = optimize_policy(run, settings, queries, few, tokenizer, sft, reward_model, ask,
                                 sft_texts)

        # Who wrote the better summaries? (4.1)
        return judge_summaries(run, settings, held_out, sft_texts, best_texts,
                               writes(policy, held_out), reward_of, ask, results)


# ---------------------------------------------------------------------------- text in, text out


def score(tokenizer, settings, reward_model, posts, summaries):
    """Texts -> a list of rewards."""
    return score_summaries(reward_model, *encode(posts, summaries, tokenizer, settings),
                           tokenizer.pad_token_id, settings.rollout_batch_size or 256).tolist()


def write(tokenizer, settings, model, posts, temperature=0.0, *stream):
    """A summary of each post, as text; at temperature 0, as the paper evaluates (Fig. 8), or drawn
    from the random stream of that name."""
    queries, _ = encode(posts, [], tokenizer, settings)
    generator = generator_for(settings.seed, *stream, device=model.device)
    responses = sample_responses(model, tokenizer, queries, settings.response_length, temperature,
                                 generator, settings.rollout_batch_size or 256)
    return [decode_response(ids, tokenizer) for ids in responses]


# ---------------------------------------------------------------------------- the stages


def supervised_baseline(run, settings, queries, references, tokenizer, model):
    """pi_SFT, trained on (post, reference) pairs (3.4, sft.py), unless it is given."""
    if settings.lora_rank and settings.base_model:
        add_adapter(model, settings.lora_rank, settings.seed)
    if not settings.sft_model:
        if settings.checkpoint_activations:
            checkpoint_activations(model)
        train_sft(run, model, queries, references, tokenizer.pad_token_id, settings)
        print(f"sft: {len(queries)} posts, last loss {run.history('sft')[-1]['loss']:.3f} nats per "
              "token")
        if settings.posts and not settings.base_model:
            print("sft: a tiny model that has seen so few posts can't write good summaries; this "
                  "shows that your rows go through, not what the method reaches")
    run.save_model("sft", model, tokenizer)
    # what is trained from here on is an adapter; a tiny model from scratch had to learn first
    if settings.lora_rank and not settings.base_model:
        add_adapter(model, settings.lora_rank, settings.seed)
    return model


def collect_comparisons(run, settings, compared, held_out, tokenizer, writes, sft):
    """Step 1. OpenAI's labelers, or the people of your file, have made them before; in the tiny
    world the SFT model writes now and the labeler chooses. Returns pairs of token ids to train on
    and held out, the held-out rows as text, and the first results."""
    results = {"preset": settings.preset, "seed": settings.seed}
    if not settings.posts:
        with run.timed("comparisons"):
            compared, results["fact_accuracy"] = compare(settings, compared, "train",
                                                         partial(writes, sft))
            held_out, _ = compare(settings, held_out, "held out", partial(writes, sft))
    pairs, _ = encode_pairs(compared, tokenizer, settings)
    return pairs, *encode_pairs(held_out, tokenizer, settings), results


def make_reward_model(run, settings, pairs, queries, references, tokenizer, sft, given):
    """Step 2: the reward model, given or trained; references score 0 on average (reward.py)."""
    if given:
        reward_model = given.to(run.device)
        if settings.lora_rank:  # its weights are others than pi_SFT's
            add_adapter(reward_model.trunk.to(sft.dtype), settings.lora_rank, settings.seed)
    else:
        torch.manual_seed(settings.seed)  # for the head
        reward_model = RewardModel(sft)
        if settings.checkpoint_activations:
            checkpoint_activations(reward_model.trunk)
        train_reward(run, reward_model, pairs, tokenizer.pad_token_id, settings)
        normalize(reward_model, queries[:1000], references[:1000],  # their mean is sharp enough
                  tokenizer.pad_token_id, settings.rollout_batch_size or 256)
    run.save_model("reward_model", reward_model, tokenizer)
    return reward_model


def optimize_policy(run, settings, queries, few, tokenizer, sft, reward_model, ask, sft_texts):
    """Step 3: PPO turns the SFT model into the policy (3.4, ppo.py)."""
    def evaluate(update):
        """The periodic win rate: every judge_every updates, on a few held-out posts."""
        if settings.judge_every and update % settings.judge_every == 0:
            judge_during(run.log, update, ask, few, write(tokenizer, settings, sft, few), sft_texts)

    critic = train_ppo(run, sft, reward_model, queries, tokenizer, settings, evaluate)
    run.save_model("policy", sft, tokenizer)
    run.save_model("critic", critic, tokenizer)
    last = run.history("ppo")[-1]
    print(f"ppo: {last['step'] + 1} updates, reward {last['reward']:.2f}, "
          f"KL {last['kl_per_summary']:.2f} nats per summary")
    return sft  # the same object, trained


def judge_summaries(run, settings, posts, sft_texts, best_texts, texts, reward_of, ask, results):
    """Judge the summaries of held-out posts (4.1, judge.py); save, report, return the results."""
    with run.timed("judge"):
        rates, outcomes = compare_summaries(ask, posts, sft_texts, texts, best_texts)
        results |= rates | {"best_of_n_kl": best_of_n_kl(settings.best_of_n)}
        if "facts" in posts[0]:  # the tiny world
            ideal, swapped = (torch.tensor(reward_of(posts, side))
                              for side in toy.swapped_fact_pairs(posts, run.seed))
            results["reward_accuracy_swapped_fact"] = preference_accuracy(ideal, swapped)
        samples = describe_samples(results, outcomes, posts, sft_texts, texts, reward_of)
    results |= {"kl_per_summary": run.history("ppo")[-1]["kl_per_summary"],
                "warnings": list(run.warnings.values()), "seconds": run.total_seconds(),
                "peak_memory_bytes": peak_memory_bytes()}
    run.write("samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    if rank() == 0:
        run.write("results.json", results)  # before anything is drawn or printed, which may fail
        report(run, results, samples)
        print_end(run, results, samples, one_line)
        run.remove("checkpoints")
    return results


# ---------------------------------------------------------------------------- the command line


def summarize(settings):
    """--summarize FILE: the summaries of one post by the SFT model and the policy of a finished
    run, with their rewards."""
    folder = Path(settings.output_dir or "")
    if not is_finished(folder):
        raise SettingError(f"--summarize needs --output_dir with a finished run, got {folder}")
    try:
        text = read_text(Path(settings.summarize)).strip()
    except (OSError, ValueError) as error:
        raise SettingError(f"--summarize {settings.summarize}: expected a UTF-8 text file "
                           f"({error})") from None
    if not text:
        raise SettingError(f"--summarize {settings.summarize}: expected a post, found no text")
    for name in ("query_length", "prompt_newlines", "summary_length", "response_length"):
        value = recorded(folder, name, {"prompt_newlines": 2}.get(name))  # the plain house's
        if type(value) is not int:
            raise SettingError(f"--output_dir {folder}: expected the settings of a run in "
                               f"config.json, found no {name}; run it again, or choose another")
        setattr(settings, name, value)
    check_settings(settings, RANGES)
    device = pick_device(settings.device)
    reward_model = from_hub(RewardModel.from_pretrained, folder / "reward_model").to(device)
    posts = [{"post": text}]
    for name in ("sft", "policy"):
        tokenizer, model = load_language_model(folder / name, device)
        texts = write(tokenizer, settings, model, posts)
        (reward,) = score(tokenizer, settings, reward_model, posts, texts)
        print(f"{name:>6} (reward {reward:+.2f}): {one_line(texts[0])}")


def command_to_resume(arguments, settings):
    """The command that goes on with a run that was begun with these arguments."""
    words = [word for word in arguments if word not in ("--resume", "--restart")]
    if settings and settings.output_dir not in (None, *words):
        words += ["--output_dir", settings.output_dir]
    folder, n = Path(__file__).resolve().parent, n_processes()
    found = folder.parent == Path.cwd() or "engine" in sys.orig_argv  # else by its path
    start = ["python"] if n == 1 else ["torchrun", "--nproc_per_node", str(n)]
    start += ["-m", "engine"] if found else [str(folder)]
    return shlex.join([*start, *words, "--resume"])


def main(arguments=()):
    """Run the command line `arguments`; from a notebook, main([]) is a default run."""
    logging.set_verbosity_error()  # of transformers: its advice is not about this run
    logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal without a heart prints ? for one
    settings = made = None
    try:
        settings = parse(arguments)
        if settings.summarize:
            return summarize(settings)
        if not settings.output_dir:
            settings.output_dir = made = choose_folder(settings.preset, settings.resume)
        return run_all(settings)
    except (SettingError, DataError) as error:
        if made:  # a folder that we have chosen goes, unless it has something in it
            with suppress(OSError):
                Path(made).rmdir()
        sys.exit(f"rlhf_minimal: {error}")
    except (OSError, SafetensorError) as error:  # a full or read-only disk, say
        sys.exit(f"rlhf_minimal: {error}. What was saved before stays; when that is mended, go on "
                 f"with: {command_to_resume(arguments, settings)}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("rlhf_minimal: out of memory. What helps: a smaller --micro_batch_size or "
                 "--checkpoint_activations, with which the run goes on from what is saved: "
                 f"{command_to_resume(arguments, settings)}")
    except KeyboardInterrupt:
        with suppress(OSError):  # at Ctrl-C `| tee` ends before us
            print("rlhf_minimal: stopped. Go on from what is saved with: "
                  f"{command_to_resume(arguments, settings)}", file=sys.stderr)
        sys.exit(130)
