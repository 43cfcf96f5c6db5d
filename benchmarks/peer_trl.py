"""The peer of ppo_update.py: one iteration of TRL 1.12.0's PPOTrainer on the same work.

Run by ppo_update.py with the Python of an environment of its own:

    python3 -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 trl==1.12.0
"""

import os
import tempfile
import time
from collections import Counter
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
from transformers import GPT2ForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from common import Endings, make_model, make_prompts, serve, timed


def make_scorer(work):
    """A reward model, or a critic, as TRL wants them: a linear head with one label."""
    trunk = make_model(work, seed=1).transformer
    trunk.config.num_labels = 1
    model = GPT2ForSequenceClassification(trunk.config)
    model.transformer.load_state_dict(trunk.state_dict())
    return model


def peer(work):
    """-> a function that runs PPOTrainer for one iteration."""
    transformers.logging.set_verbosity_error()
    Endings(work)
    clock, pad = Counter(), work["vocab"] - 1

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        return {"input_ids": torch.tensor([[pad] * (width - len(row["input_ids"]))
                                           + row["input_ids"] for row in rows])}

    # batch_generation has no_grad as a decorator of its own
    ppo_trainer.batch_generation = torch.no_grad()(
        timed(clock, "rollout", ppo_trainer.batch_generation))
    for name in ("forward", "get_reward"):  # with a gradient they are the update's own passes
        setattr(ppo_trainer, name, timed(clock, "scoring", getattr(ppo_trainer, name),
                                         lambda: not torch.is_grad_enabled()))
    rows = [{"input_ids": prompt} for prompt in make_prompts(work)
            for _ in range(work["summaries"])]
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=work["micro"],
            gradient_accumulation_steps=len(rows) // work["micro"],
            local_rollout_forward_batch_size=work["rollout"], total_episodes=len(rows),
            num_ppo_epochs=4, num_mini_batches=1, num_sample_generations=0, save_strategy="no",
            response_length=work["limit"], stop_token="eos", temperature=0.7, learning_rate=1e-5,
            missing_eos_penalty=1.0, report_to="none", disable_tqdm=True),
        SimpleNamespace(eos_token_id=work["vocab"] - 2, pad_token_id=pad),
        make_model(work), make_model(work), make_scorer(work), rows, make_scorer(work),
        data_collator=collate)

    def once():
        clock.clear()
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        total = time.perf_counter() - start
        return {"seconds": total, "cpu_seconds": time.process_time() - cpu,
                "rollout_seconds": clock["rollout"], "scoring_seconds": clock["scoring"],
                "update_seconds": total - clock["rollout"] - clock["scoring"]}
    return once


if __name__ == "__main__":
    serve(peer)
