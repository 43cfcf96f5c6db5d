"""What a run will need, counted before anything is loaded.

Formulas for all architectures would be long, and wrong for the next one. So the model is built on
torch's "meta" device, where a tensor has a shape and a type but neither numbers nor memory, and
does there once what a run will do with it, while each tensor is counted for as long as it lives.
"""

import weakref
from contextlib import nullcontext
from functools import partial

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, DynamicCache

from engine.adapters import add_adapter, checkpoint_activations, trainable, trunk_of
from engine.batches import pack, unpack
from engine.devices import full_precision, mixed_precision, prepare
from engine.settings import SettingError

aten = torch.ops.aten
# What torch.autocast does on a GPU to the functions of a language model, by their names
IN_HALF = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm",
           "scaled_dot_product_attention"}
IN_FLOAT32 = {"layer_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "log",
              "softplus", "sum", "cumsum", "norm"}


class AsOnGPU(TorchFunctionMode):
    """On the meta device, what a GPU would do: the types of autocast, and its attention."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        name, named = getattr(function, "__name__", ""), named or {}
        if torch.is_autocast_enabled("cpu"):  # it leaves meta tensors alone, and says what is on
            half = torch.get_autocast_dtype("cpu")
            dtype = half if name in IN_HALF else torch.float32 if name in IN_FLOAT32 else None
            if dtype:
                arguments, named = tree_map(partial(cast, dtype=dtype), (arguments, named))
        if name == "scaled_dot_product_attention":
            return attention(*arguments, **named)
        return function(*arguments, **named)


def cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """By the kernels of a GPU, which never hold the scores of all pairs of tokens."""
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    if attn_mask is not None:
        # a copy whose rows begin at multiples of 16, for the kernel
        columns = key.shape[2]
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


def inputs(model, rows, Q, T, k):
    """What a model takes, for rows of Q + T tokens, the k of a post side by side."""
    ids = zeros(rows, Q + T)
    return pack(ids, ids, ids, T, k, model.dtype)


@torch.no_grad()
def sample(model, rows, Q, T, k):
    """As lm.sample, but for all tokens after the first at once: little more than one at a time."""
    post, mask, more = zeros(rows // k, Q), zeros(rows, Q + T - 1), {}
    for ids, mask in ((post, post), (zeros(rows, T - 1), mask)):
        output = model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=True,
                       logits_to_keep=1, **more)
        torch.softmax(output.logits[:, -1].float() / 0.7, -1)
        more = {name: x for name, x in output.items() if name != "logits"}  # the cache
        for cache in more.values() if ids is post and k > 1 else ():
            cache.reorder_cache(torch.arange(rows, device="meta") // k)


def log_probs(model, rows, Q, T, k):
    """As lm.response_log_probs."""
    logits = model(**inputs(model, rows, Q, T, k), logits_to_keep=k * T + 1, use_cache=False).logits
    logits = unpack(logits, T, k)[:, :-1].float()
    return torch.log_softmax(logits / 0.7, -1).take_along_dim(zeros(rows, T, 1), -1)


def scores(model, rows, Q, T, k):
    """As RewardModel.forward."""
    trunk = trunk_of(model)
    hidden = trunk(**inputs(model, rows, Q, T, k), use_cache=False).last_hidden_state.float()
    with full_precision(hidden.device):
        return torch.nn.Linear(hidden.shape[-1], 1, device="meta")(hidden)


def read(function, *arguments):
    with torch.no_grad():
        function(*arguments)


def learn(last, function, *arguments):
    """The backward pass, after which what function gave lives on in last."""
    last.append(function(*arguments))
    last[0].sum().backward()


def turns_of(alive, model, settings):
    """Bytes by what is done one after the other, each beyond what is there all the time."""
    Q, T, S = settings.query_length, settings.response_length, settings.summary_length
    k, micro = settings.return_sequences, settings.micro_batch_size
    batch = settings.ppo_batch_size // settings.ppo_minibatches
    rows = k * max(1, min(micro or batch, batch) // k)
    sampled = k * max(1, (settings.rollout_batch_size or settings.ppo_batch_size) // k)
    for p in trainable(model):
        p.grad = torch.zeros_like(p)  # of the microbatches before
    if settings.checkpoint_activations:
        # within backward() AsOnGPU is off, unless the layers that are computed again switch it on
        checkpoint_activations(trunk_of(model), lambda: (nullcontext(), AsOnGPU()))
    scored = settings.rollout_batch_size or 256
    last, before = [], alive.now
    turns = {"updating": alive.during(learn, last, log_probs, model, rows, Q, T, k),
             "sampling": alive.during(sample, model, sampled, Q, T, k),
             "measuring": alive.during(read, log_probs, model, rows, Q, T, k),
             "scoring": alive.during(read, scores, model, scored, Q, S, 1)}
    left = alive.now - before  # what the last graph of each network keeps until the next one
    turns = {name: size + (left if name == "updating" else 2 * left)
             for name, size in turns.items()}
    # before PPO: two summaries of a post for the reward model, and a reference for SFT
    pairs, posts = micro or settings.reward_batch_size, micro or settings.sft_batch_size
    turns["reward"] = alive.during(learn, [], scores, model, 2 * pairs, Q, S, 2)
    if settings.base_model:
        turns["sft"] = alive.during(learn, [], log_probs, model, posts, Q, S, 1)
    return turns


def rough_turn(settings, config):
    """In place of turns_of, for an architecture that has to see numbers, as many a mixture of
    experts: more than those take that were counted."""
    c, length = config.get_text_config(), settings.query_length + 2 * settings.summary_length
    rows = settings.micro_batch_size or settings.ppo_batch_size
    layers = 128 * c.num_hidden_layers * c.hidden_size  # bytes of a token, its activations
    logits = 24 * c.vocab_size * (settings.response_length + 1)
    sampled = settings.rollout_batch_size or max(settings.ppo_batch_size, 256)
    cache = (8 * c.num_hidden_layers + 128) * c.hidden_size
    return {"roughly": max(rows * (length * layers + logits), sampled * length * cache)}


# ---------------------------------------------------------------------------- the plan


def empty(config, dtype):
    """The model without its numbers."""
    try:
        with torch.device("meta"):
            return prepare(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()
    except Exception as error:  # of any library
        raise SettingError(f"{config.model_type}: no model can be made of its config "
                           f"({type(error).__name__}: {str(error)[:150]!r})") from None


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
    half, adapters = dtype.itemsize, settings.lora_rank > 0
    alive = Alive()
    with alive, AsOnGPU(), mixed_precision("cpu", dtype):
        model = empty(model_config, dtype if adapters else torch.float32)
        n, n_trunk = model.num_parameters(), trunk_of(model).num_parameters()
        head = model_config.get_text_config().hidden_size + 1
        if adapters:
            try:
                model = add_adapter(model, settings.lora_rank, seed=0)
            except SettingError:  # peft isn't there
                raise
            except ValueError as error:
                raise SettingError(f"{model_config.model_type}: it takes no adapters ({error}); "
                                   "train all weights with --lora_rank 0") from None
        own = sum(p.numel() for p in trainable(model))
        try:
            turns = turns_of(alive, model, settings)
        except Exception:  # of any library
            turns = rough_turn(settings, model_config)
    if not adapters and "reward" in turns:  # the policy and the critic have no averages yet
        turns = {name: max(0, size - 16 * n_trunk) if name in ("reward", "sft") else size
                 for name, size in turns.items()}
    # Run.steps(snapshot=True) keeps a copy of values and averages in this memory
    undo = 12 if device == "cpu" else 0
    return {
        "weights": half * n + 4 * (2 * own + head) if adapters else 4 * 2 * (n + n_trunk + head),
        "trained": ((16 + undo) * (2 * own + head) if adapters
                    else (12 + undo) * (n + n_trunk + head)),
        "judge": half * empty(judge_config, dtype).num_parameters() if judge_config else 0,
        **turns}


def peak_of(plan):
    """The bytes of a memory_plan at a time."""
    always = plan["weights"] + plan["trained"] + plan["judge"]
    return always + max(plan[name] for name in plan if name not in ("weights", "trained", "judge"))


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
