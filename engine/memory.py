"""What a run will need, counted before anything is loaded.

Formulas for all architectures would be long, and wrong for the next one. So the model is built on
torch's "meta" device, where a tensor has a shape and a type but neither numbers nor memory, and
does there once what a run will do with it, while each tensor is counted for as long as it lives.
"""

import math
import weakref
from contextlib import nullcontext
from functools import partial

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, DynamicCache

from engine.adapters import add_adapter, checkpoint_activations, trainable, trunk_of
from engine.devices import mixed_precision, prepare
from engine.packing import response_log_probs
from engine.reward import RewardModel, response_scores
from engine.settings import SettingError

aten = torch.ops.aten
# What is not counted: tensors of a number per token or row, what an optimiser's step makes in
# passing, and that a GPU gives memory out in pieces of 512 bytes and more
MARGIN = 1.01
# torch.autocast lets tensors on the meta device be. This is what it does on a GPU to the functions
# that make a model's large tensors; others (pow, log_softmax, ...) changed no plan by a thousandth
IN_HALF = {"linear", "matmul", "scaled_dot_product_attention"}
IN_FLOAT32 = {"layer_norm", "softmax"}


class AsOnGPU(TorchFunctionMode):
    """On the meta device, what a GPU would do: the types of autocast, and its attention."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        name, named = getattr(function, "__name__", ""), named or {}
        half = torch.get_autocast_dtype("cpu")
        dtype = half if name in IN_HALF else torch.float32 if name in IN_FLOAT32 else None
        if dtype and torch.is_autocast_enabled("cpu"):
            arguments, named = tree_map(partial(cast, dtype), (arguments, named))
        if name == "scaled_dot_product_attention":
            function = attention
        return function(*arguments, **named)


def cast(dtype, x):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    """By a kernel of a GPU, which never holds the scores of all pairs of tokens."""
    if attn_mask is not None:
        columns = key.shape[2]  # of the mask, whose rows are to begin at multiples of 16: a copy
        padded = torch.nn.functional.pad(attn_mask.to(query.dtype), (0, -columns % 16))
        attn_mask = padded[..., :columns].expand(*query.shape[:3], columns)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), 0.0, is_causal)[0]


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the largest number at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is aten._local_scalar_dense.default:  # "does the mask hide nothing?" It does
            return 0
        result = function(*arguments, **(named or {}))
        for x in tree_leaves(result):
            # views share a storage, which is what has bytes
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def during(self, use, *arguments):
        """The largest number while it is used, beyond what is there before."""
        before = self.most = self.now
        use(*arguments)
        return self.most - before


# ---------------------------------------------------------------------------- what a run does


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.long, device="meta")


def sample(alive, model, rows, Q, T, k):
    """As engine.sampling.sample, but all tokens between the post and the last one are read at once:
    what that takes more than one by one is not counted."""
    cache, read = DynamicCache(config=model.config), 0
    for n, width, counts in ((rows // k, Q, True), (rows, max(1, T - 2), False), (rows, 1, True)):
        ids, before, read = zeros(n, width), alive.most, read + width
        logits = model(input_ids=ids, attention_mask=zeros(n, read), position_ids=ids,
                       use_cache=True, logits_to_keep=1, cache=cache).logits[:, -1]
        torch.softmax(logits.float() / 0.7, -1)
        alive.most = alive.most if counts else before
        if n < rows:
            cache.reorder_cache(torch.arange(rows, device="meta") // k)


def learn(function, network, rows, width, T, k):
    function(network, zeros(rows, width), zeros(rows, width), T, k=k).sum().backward()


def turns_of(alive, model, settings):
    """Bytes by what is done one after the other, each beyond what is there all the time."""
    Q, T, S = settings.query_length, settings.response_length, settings.summary_length
    k, micro = settings.return_sequences, settings.micro_batch_size
    batch = settings.ppo_batch_size // settings.ppo_minibatches
    rows = k * max(1, min(micro or batch, batch) // k)
    sampled = k * max(1, (settings.rollout_batch_size or settings.ppo_batch_size) // k)
    pairs, posts = micro or settings.reward_batch_size, micro or settings.sft_batch_size
    # where rows leave a window of attention, each summary has a row of its own (architectures.py)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or math.inf
    beside, pair = (1, 1) if Q + max(T, S) > window else (k, 2)
    beside = 1 if settings.ppo_minibatches > 1 else beside
    for p in trainable(model):
        p.grad = torch.zeros_like(p)  # of the microbatches before
    trunk = trunk_of(model)
    model.packs = trunk.packs = math.inf, True  # no trial without numbers
    if settings.checkpoint_activations:
        # within backward() AsOnGPU is off, unless the layers that are computed again switch it on
        checkpoint_activations(trunk, lambda: (nullcontext(), AsOnGPU()))
    scored = RewardModel(trunk, own_copy=False)
    with torch.no_grad():
        turns = {"sampling": alive.during(sample, alive, model, sampled, Q, T, k),
                 "scoring": alive.during(scored, *[zeros(settings.rollout_batch_size or 256,
                                                         Q + S)] * 2)}
    turns["updating"] = alive.during(learn, response_log_probs, model, rows, Q + T, T, beside)
    turns["reward"] = alive.during(learn, response_scores, scored, 2 * pairs, Q + S, S, pair)
    if settings.base_model:
        turns["sft"] = alive.during(learn, response_log_probs, model, posts, Q + S, S, 1)
    return turns


# ---------------------------------------------------------------------------- the plan


def empty(config, dtype, rank=0):
    """The model without its numbers; SettingError where no library makes one of the config."""
    try:
        with torch.device("meta"):
            model = prepare(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()
        return add_adapter(model, rank, seed=0) if rank else model
    except Exception as error:  # of any library
        cure = " with adapters (--lora_rank 0 trains all weights)" if rank else ""
        raise SettingError(f"{config.model_type}: no model can be made of its config{cure}: "
                           f"{str(error)[:150]}") from None


def numbers(parameters):
    return sum(p.numel() for p in parameters)


def memory_plan(settings, model_config, judge_config=None, device="cuda", dtype=None):
    """Bytes that a run will need at most, from the configs alone, before anything is loaded: what
    is there all the time, {"weights": ..., "trained": ..., "judge": ...}, and what is done one
    after the other, "sampling", "measuring", "updating", "scoring", ...

    dtype: what matrices are multiplied in, by default bfloat16 on a GPU. Adapters: one frozen model
    in it, 16 bytes for each adapter weight of policy and critic (value, gradient, two averages of
    Adam, float32), and 4 for each of the reference and the reward model. All weights: the same on
    four models in float32.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    rank, alive = settings.lora_rank, Alive()
    judge = numbers(empty(judge_config, dtype).parameters()) if judge_config else 0
    with alive, AsOnGPU(), mixed_precision("cpu", dtype):
        model = empty(model_config, dtype if rank else torch.float32, rank)
        own = numbers(trainable(model))
        try:
            turns = turns_of(alive, model, settings)
        except SettingError:
            raise
        except Exception as error:  # most mixtures of experts ask for numbers, Bloom for its mask
            turns = {}
            print(f"memory: {model_config.model_type} can't be tried before it is loaded; what it "
                  f"computes comes on top of the plan ({str(error)[:80]!r})")
    head = model_config.get_text_config().hidden_size + 1  # of critic and reward model
    if rank:
        frozen, trained = numbers(model.parameters()) - own, 2 * own + head
        weights, each = dtype.itemsize * frozen + 4 * trained, 16
    else:
        trunk = numbers(trunk_of(model).parameters())
        trained, each = own + trunk + head, 12
        weights = 2 * 4 * trained
        for name in turns.keys() & {"reward", "sft"}:  # before PPO; its networks take 16 bytes more
            turns[name] = max(0, turns[name] - 16 * trunk)
    return {"weights": weights, "trained": each * trained, "judge": dtype.itemsize * judge, **turns}


def peak_of(plan):
    """The bytes of a memory_plan at a time."""
    always = plan["weights"] + plan["trained"] + plan["judge"]
    turns = [size for name, size in plan.items() if name not in ("weights", "trained", "judge")]
    return math.ceil(MARGIN * (always + max(turns, default=0)))


def check_memory(plan, available, where):
    """Print the plan; SettingError with what would make it fit if it doesn't."""
    total = peak_of(plan)
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.items())
    print(f"memory: about {total / 2**30:.1f} GiB ({parts}) of {available / 2**30:.1f} on {where}")
    if total > available:
        cures = {"weights": "a smaller --sft_model", "trained": "--lora_rank 16",
                 "judge": "a smaller --judge", "sampling": "a smaller --rollout_batch_size",
                 "scoring": "a smaller --rollout_batch_size"}
        largest = sorted(plan, key=plan.get, reverse=True)[:3]
        helps = [cures.get(name, "a smaller --micro_batch_size") for name in largest]
        raise SettingError(f"about {total / 2**30:.0f} GiB are needed and {where} has "
                           f"{available / 2**30:.0f}; what would help: "
                           + "; ".join([*dict.fromkeys(helps),
                                        "a smaller preset: --preset student"]))
