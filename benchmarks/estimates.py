"""Hours and memory of the presets on some cards: estimates, nothing here is measured.

    python benchmarks/estimates.py

Hours: the operations of each stage are counted by formula (2 FLOP forward for each weight and
4 more for its gradients, 2 where weights are frozen), and divided by 40 % of what the card's maker
states for dense products in the type the preset takes there. Drawing a token reads all weights once
for the rows that are sampled together, at 60 % of the card's bandwidth. Real posts have 343 tokens
on average and summaries 33 (lengths.json). Memory: engine/memory.py's plan.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.memory import memory_plan, peak_of
from engine.settings import parse

POST, SUMMARY = 343, 33  # tokens, on average
POSTS, COMPARISONS = 116_722, 64_832  # to train on, where max_posts does not bound them
MODELS = {  # the shapes of what the presets start from
    "student": LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30,
                           num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                           tie_word_embeddings=True),  # SmolLM2-135M
    "day": GPTNeoXConfig(vocab_size=50304, hidden_size=2048, num_hidden_layers=16,
                         num_attention_heads=8, intermediate_size=8192),  # Pythia-1B
    "full": GPTJConfig()}  # GPT-J-6B: its defaults
JUDGES = {"student": 0.49e9, "day": 1.54e9, "full": 3.1e9}  # weights
CARDS = {  # FLOP/s, bytes/s, GB, and the type: a T4 has no bfloat16, so auto takes float32 there
    "T4, 16 GB": (8.1e12, 320e9, 16, torch.float32),
    "T4, float16": (65e12, 320e9, 16, torch.float16),
    "L4, 24 GB": (121e12, 300e9, 24, torch.bfloat16),
    "A100, 80 GB": (312e12, 2.0e12, 80, torch.bfloat16),
    "H100, 80 GB": (989e12, 3.35e12, 80, torch.bfloat16)}
UTILISATION, BANDWIDTH = 0.4, 0.6  # shares of the maker's figures that are reached


def training_flop(settings, n):
    """FLOP of one token in a step: forward, gradients of its inputs, of weights where they are
    trained, and the forward pass again where activations are not kept."""
    return n * (2 + 2 + 2 * (settings.lora_rank == 0) + 2 * settings.checkpoint_activations)


def stages(settings, n, n_judge, flops, bandwidth, dtype):
    """Seconds by stage."""
    rate, train = flops * UTILISATION, training_flop(settings, n)
    most = settings.max_posts or POSTS
    sft = most * (POST + SUMMARY) * train / rate if settings.base_model else 0
    pairs = min(most, COMPARISONS)
    reward = pairs * (POST + 2 * SUMMARY) * train / rate
    tokens = settings.ppo_episodes * (POST + SUMMARY)
    read = tokens * 2 * n * (1 + 4) / rate  # the posts for sampling, then four networks
    batches = settings.ppo_episodes / settings.rollout_batch_size
    weight = dtype.itemsize if settings.lora_rank else 4
    draw = batches * settings.response_length * n * weight / (bandwidth * BANDWIDTH)
    update = settings.ppo_epochs * 2 * tokens * train / rate
    # at the end 3.2 comparisons of each post, agreement with labels, and a few posts during PPO
    n_updates = settings.ppo_episodes / settings.ppo_batch_size
    during = n_updates / settings.judge_every * settings.judge_during * 2
    asked = settings.judge_posts * 4.2 + during
    judge = 2 * asked * (POST + 2 * SUMMARY + 100) * 2 * n_judge / rate
    return {"SFT": sft, "reward": reward, "PPO": read + draw + update, "judge": judge}


def main():
    print("| preset | memory, GiB | " + " | ".join(CARDS) + " |\n|---|---|" + "---|" * len(CARDS))
    for preset, config in MODELS.items():
        settings = parse(["--preset", preset])
        with torch.device("meta"):
            n = AutoModelForCausalLM.from_config(config).num_parameters()
        cells, memory, plans = [], {}, {}
        for name, (flops, bandwidth, gigabytes, dtype) in CARDS.items():
            # activations are computed twice where they don't fit otherwise
            for settings.checkpoint_activations in (False, True):
                kind = dtype.itemsize, settings.checkpoint_activations
                if kind not in plans:
                    plans[kind] = memory_plan(settings, config, dtype=dtype)
                    plans[kind]["judge"] = dtype.itemsize * JUDGES[preset]
                plan = plans[kind]
                if peak_of(plan) < gigabytes * 1e9 - 1e9:
                    break
            memory[kind] = peak_of(plan) / 2**30
            seconds = stages(settings, n, JUDGES[preset], flops, bandwidth, dtype)
            hours = sum(seconds.values()) / 3600
            fits = peak_of(plan) < gigabytes * 1e9 - 1e9  # what CUDA itself takes
            cells.append(f"{hours:.1f} h" if fits else "too small")
            print(preset, name, {key: round(x / 3600, 2) for key, x in seconds.items()},
                  file=sys.stderr)
        sizes = " / ".join(f"{size:.0f}" for size in dict.fromkeys(memory.values()))
        print(f"| `{preset}` | {sizes} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
