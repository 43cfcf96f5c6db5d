"""What a run will need, counted before anything is loaded."""

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from engine.settings import SettingError


def memory_plan(settings, model_config, judge_config=None, device="cuda", dtype=None):
    """Bytes that PPO will need at most, by use, from the configs alone, before anything is loaded:
    {"weights": ..., "trained": ..., "activations": ..., "logits": ..., "cache": ..., "scoring": ...,
    "judge": ...}.

    dtype: what matrices are multiplied in, by default bfloat16 on a GPU. Adapters: one frozen model in it, 16 bytes for each
    adapter weight of policy and critic (value, gradient, two averages of Adam, float32), and 4 for
    each of the reference and the reward model. All weights: the same on four models in float32.
    """
    def empty(config):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    model, c = empty(model_config), model_config
    n, n_trunk, d = model.num_parameters(), model.base_model.num_parameters(), c.hidden_size
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    head, single, half = d + 1, dtype == torch.float32, dtype.itemsize
    # a matrix (i, o) has adapters (i, r) and (r, o); all of them but the one that makes the scores
    adapters = settings.lora_rank * sum(
        sum(module.weight.shape) for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not model.get_output_embeddings())
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = heads * (getattr(c, "head_dim", None) or d // c.num_attention_heads)
    length = settings.query_length + settings.response_length
    rows = settings.micro_batch_size or settings.ppo_batch_size // settings.ppo_minibatches
    sampled = settings.rollout_batch_size or settings.ppo_batch_size
    # Bytes of a token in a layer, over d. Its input, and all that backward needs: 37 - 63 measured
    # for GPT-2, GPT-J, GPT-NeoX and Llama with bfloat16 products, 74 - 107 in float32 (34 would do
    # with every operation fused; Korthikanti et al. 2022, eq. 2).
    stored, inner = half if settings.lora_rank else 4, 108 if single else 64
    layers = c.num_hidden_layers
    if settings.checkpoint_activations:
        activations = rows * length * d * (layers * stored + inner)
    else:  # backward also needs the copies of float32 weights that the products were made with
        activations = (rows * length * d * layers * inner
                       + (0 if single or settings.lora_rank else 2 * n))
    # Run.steps(snapshot=True) keeps a copy of values and averages in this memory
    undo = 12 if device == "cpu" else 0
    return {
        "weights": (half * n + 4 * (2 * adapters + head) if settings.lora_rank
                    else 4 * 2 * (n + n_trunk + head)),
        "trained": ((16 + undo) * (2 * adapters + head) if settings.lora_rank
                    else (12 + undo) * (n + n_trunk + head)),
        "activations": activations,
        # three times in float32, as scores, over the temperature, and as log-softmax (the backward
        # pass needs no more), once in bfloat16, as they come, and once more where lm.unpack copies
        "logits": rows * (settings.response_length + 1) * c.vocab_size
                  * ((12 if single else 14) + 4 * (settings.return_sequences > 1)),
        # with all weights in float32, keys are turned in float32 and values stay in bfloat16
        "cache": sampled * length * layers * width * (2 * half if settings.lora_rank or single
                                                      else 4 + 2),
        # a layer's all, without gradient: 35 - 42 measured in bfloat16, 49 - 83 in float32. That is
        # of the longest there is, posts with summaries to score; sampling reads the posts alone
        "scoring": (settings.rollout_batch_size or 256) * d * (84 if single else 43)
                   * (settings.query_length + settings.summary_length),
        "judge": half * empty(judge_config).num_parameters() if judge_config else 0,
    }


def peak_of(plan):
    """The bytes of a memory_plan at a time: sampling, scoring and an update take turns."""
    turns = plan["cache"] + plan["scoring"], plan["activations"] + plan["logits"]
    return sum(plan.values()) - min(turns)


def check_memory(plan, available, where):
    """Print the plan; SettingError with what would make it fit if it doesn't."""
    total = peak_of(plan)
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.items())
    print(f"memory: about {total / 2**30:.1f} GiB ({parts}) of {available / 2**30:.1f} on {where}")
    if total > available:
        cures = {"weights": "a smaller --sft_model", "trained": "--lora_rank 16",
                 "activations": "--checkpoint_activations, a smaller --micro_batch_size",
                 "logits": "a smaller --micro_batch_size", "judge": "a smaller --judge",
                 "cache": "a smaller --rollout_batch_size",
                 "scoring": "a smaller --rollout_batch_size"}
        largest = sorted(plan, key=plan.get, reverse=True)[:3]
        raise SettingError(f"about {total / 2**30:.0f} GiB are needed and {where} has "
                           f"{available / 2**30:.0f}; what would help: "
                           + "; ".join([*dict.fromkeys(cures[name] for name in largest),
                                        "a smaller preset: --preset student"]))
