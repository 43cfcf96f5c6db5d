"""A pretended GPU: every device, type and byte of the whole flow, without a GPU and without data.

Tensors on it are fake (torch's FakeTensorMode): they have a shape, a type and a device, but no
numbers, and an operation on two devices raises as it would on a GPU. The device is one that torch
lets a Python program make up ("privateuse"); its name is "gpu". To make it up changes the process
for good, so all of it happens in processes of their own, which run this file as a script and print
what they found as JSON.
"""

import copy
import json
import math
import subprocess
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, GPTNeoXConfig
from transformers import LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lm
import reward as plain_reward
from engine import judges, main, ppo, reward, sampling, sft
from engine.adapters import add_adapter, checkpoint_activations
from engine import batches
from engine.devices import mixed_precision, prepare
from engine.checkpoints import flatten, put_back
from engine.memory import MARGIN, memory_plan
from lm import generator_for

aten = torch.ops.aten
TOKENIZER = SimpleNamespace(eos_token_id=9, pad_token_id=0)


# ---------------------------------------------------------------------------- the device


# What torch.autocast does on CUDA, as far as these models call it (docs.pytorch.org, "Automatic
# Mixed Precision"); a device that is made up has no such lists.
IN_HALF = ["linear", "matmul", "mm", "bmm", "addmm", "baddbmm"]
IN_FLOAT32 = ["pow.Tensor_Scalar", "rsqrt", "softmax.int", "log_softmax.int", "layer_norm", "sum",
              "sum.dim_IntList", "cumsum", "norm.Scalar", "exp", "log", "rms_norm"]
PROMOTED = ["cat", "stack", "addcmul", "addcdiv", "index_put", "scatter_add"]
AUTOCAST = torch._C.DispatchKey.AutocastPrivateUse1
DEVICES = {}  # of each random generator: torch's own class knows no device that is made up
STEP = batches.Step
LIBRARIES = []  # they must not be garbage-collected


def float_types(arguments):
    return {x.dtype for x in tree_leaves(arguments)
            if isinstance(x, torch.Tensor) and x.is_floating_point()}


def cast(x, dtype):
    """What autocast does to an argument: floating-point tensors get the type."""
    if isinstance(x, (list, tuple)):
        return [cast(item, dtype) for item in x]
    same = not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.device.type == "cpu"
    return x if same else x.to(dtype)


def autocast(function, kind, *arguments, **named):
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(AUTOCAST)):
        types = float_types(arguments)
        dtype = torch.float32 if kind == "float32" else torch.get_autocast_dtype("gpu")
        if types and not (kind == "promoted" and len(types) == 1):
            dtype = torch.float32 if kind == "promoted" else dtype
            arguments = [cast(x, dtype) for x in arguments]
        return function(*arguments, **named)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        DEVICES[generator._cdata] = torch.device(device).type
        return generator


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """scaled_dot_product_attention by the kernels that CUDA takes: flash without a mask, and the
    memory-efficient one with one."""
    if query.device.type == "cpu":
        return CPU_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                             enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("gpu"):
        dtype = torch.get_autocast_dtype("gpu")
        query, key, value, attn_mask = (cast(x, dtype) for x in (query, key, value, attn_mask))
    assert query.dtype == key.dtype == value.dtype
    with torch.autocast("gpu", enabled=False):
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal,
                                                            scale=scale)[0]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                    attn_mask.logical_not(), -math.inf)
            assert attn_mask.dtype == query.dtype
            columns = attn_mask.shape[-1]
            if columns % 16:  # aligned for the kernel
                attn_mask = torch.nn.functional.pad(
                    attn_mask, (0, 16 - columns % 16))[..., :columns]
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        backward = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, backward, 0.0, is_causal, scale=scale)[0]


CPU_ATTENTION = torch.nn.functional.scaled_dot_product_attention
REAL_LIST = torch.Tensor.tolist


def zeros_or_list(tensor):
    """tensor.tolist(), zeros where there are no numbers."""
    if not isinstance(tensor, FakeTensor):
        return REAL_LIST(tensor)
    return [zeros_or_list(row) for row in tensor] if tensor.dim() > 1 else [0] * len(tensor)


def apply(module, function, recurse=True):
    """nn.Module._apply, what .to() and .float() are made of, for fake tensors: new parameters."""
    moved = {}  # one for each, however many modules have it
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, old in kind.items():
                if old is None or id(old) in moved:
                    kind[name] = moved.get(id(old))
                    continue
                with torch.no_grad():
                    new = function(old)
                if new is not old and kind is part._parameters:
                    new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                kind[name] = moved[id(old)] = moved[id(new)] = new
    return module


def make_up_device():
    """From here on this process has a device "gpu"."""
    import torch._dynamo  # noqa: F401 - not for the first time within a fake mode
    import transformers.masking_utils
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("gpu")
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    lists = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for kind, names in (("half", IN_HALF), ("float32", IN_FLOAT32), ("promoted", PROMOTED)):
        for name in names:
            packet, _, overload = name.partition(".")
            function = getattr(getattr(aten, packet), overload or "default")
            lists.impl(function, partial(autocast, function, kind))
    # one kernel on a GPU, and not the five operations that it is where nobody says so
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    kernels.impl("silu_backward", lambda gradient, x: torch.empty_like(x))
    LIBRARIES.extend((others, lists, kernels))
    torch.Generator = Generator
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.tolist = zeros_or_list
    torch.nn.Module._apply = apply
    # the numbers would have to be looked at to see that a mask hides nothing
    transformers.masking_utils._ignore_causal_mask_sdpa = (
        lambda padding_mask, *_, **__: padding_mask is None)


# ---------------------------------------------------------------------------- what happens on it


def on_one_device(function, arguments, named):
    """Raise where a GPU would and a fake tensor doesn't."""
    tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
    kinds = {x.device.type for x in tensors}
    generator = named.get("generator")
    if generator is not None:
        place = torch.device(named.get("device") or (tensors[0].device if tensors else "cpu")).type
        if DEVICES[generator._cdata] != place:
            raise RuntimeError(f"{function}: a {DEVICES[generator._cdata]} generator on {place}")
    joined = function.overloadpacket in (aten.cat, aten.stack, aten._foreach_add_)
    if joined and len(kinds) > 1:
        raise RuntimeError(f"{function}: tensors on {kinds}")
    if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        places = {i.device.type for i in arguments[1] if i is not None} - {"cpu"}
        if places - {arguments[0].device.type}:
            raise RuntimeError(f"{function}: an index on {places} of {arguments[0].device.type}")


class Pretended(TorchDispatchMode):
    """Answers what a fake tensor can't, and counts bytes on the device by label: the largest
    number at a time."""

    def __init__(self):
        super().__init__()
        self.answers = []  # to the next questions of yes or no
        self.label, self.peaks, self.now, self.sizes = "setup", {}, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        on_one_device(function, arguments, named)
        result = self.answer(function, arguments, named)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type == "gpu" and not function.is_view:
                self.count(x.untyped_storage())
        if function is aten.multinomial.default:  # a number for each probability, in passing
            self.note(self.now + 4 * arguments[0].numel())
        return result

    def answer(self, function, arguments, named):
        x = arguments[0] if arguments else None
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((arguments, named))) and (
                torch.device(named.get("device") or "cpu").type == "cpu"):
            with unset_fake_temporarily():  # lists of the CPU keep their numbers
                return function(*arguments, **named)
        if function is aten._to_copy.default and not isinstance(x, FakeTensor):  # from CPU to GPU
            return torch.empty_like(x, dtype=named.get("dtype"), device=named["device"])
        if function is aten._local_scalar_dense.default:
            if x.dtype == torch.bool:
                return self.answers.pop(0) if self.answers else True
            return 0.0 if x.is_floating_point() else 1
        if function is aten.nonzero.default:
            return x.new_zeros(len(x), x.dim(), dtype=torch.long)
        if function is aten.index.Tensor and any(
                i is not None and i.dtype == torch.bool for i in arguments[1]):
            (mask,) = arguments[1]  # x[mask], where the mask selects everything
            return x.flatten(0, mask.dim() - 1).clone()
        return function(*arguments, **named)

    def count(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = math.ceil(storage.nbytes() / 512) * 512  # what a GPU gives out
            self.now += self.sizes[key]
            self.note(self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def note(self, size):
        self.peaks[self.label] = max(self.peaks.get(self.label, 0), size)

    @contextmanager
    def labelled(self, label):
        before, self.label = self.label, label
        self.note(self.now)
        yield
        self.label = before


@contextmanager
def pretended():
    """The mode in which tensors are fake, and what happens is counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), Pretended() as mode:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device) is a CPU's, and moved
        yield mode


# ---------------------------------------------------------------------------- the whole flow


def small_configs():
    ends = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 9}
    old = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    new = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    grouped = {**new, "intermediate_size": 96, "num_key_value_heads": 2}
    return {"gpt2": GPT2Config(**ends, **old), "gptj": GPTJConfig(**ends, **old, rotary_dim=4),
            "neox": GPTNeoXConfig(**ends, **new, intermediate_size=128),
            "llama": LlamaConfig(**ends, **grouped), "qwen2": Qwen2Config(**ends, **grouped)}


class FlowRun:
    """In place of engine.folder.Run: two steps of each stage, the state saved and put back."""

    seed = 0

    def steps(self, stage, total, **parts):
        for step in range(min(total, 2)):
            saved = flatten(parts)
            assert all(tensor.device.type == "cpu" for tensor in saved.values())
            put_back(parts, saved)
            yield step

    def log(self, *_, **__):
        pass

    def warn(self, *_):
        pass

    def history(self, stage):
        return [{"kl_per_summary": 0, "length": 1, "entropy": 1, "step": 0}]


def activations_twice(twice):
    return "--checkpoint_activations" if twice else "--no-checkpoint_activations"


def settings(*words):
    return main.parse([str(word) for word in words])


def flow(mode, config, lora_rank, k):
    """All that a run does on its device, on a small model: SFT, reward model, sampling, judge, PPO,
    checkpoints. k > 1: in float16, where gradients are scaled, and with activations computed twice.
    """
    some = settings(
        "--preset", "full", "--lora_rank", lora_rank, "--return_sequences", k, "--query_length", 20,
        "--response_length", 3, "--ppo_batch_size", 8, "--micro_batch_size", 4, "--ppo_episodes",
        16, "--rollout_batch_size", 4, "--ppo_epochs", 1, "--ppo_minibatches", 2,
        "--sft_batch_size", 4, "--reward_batch_size", 4, activations_twice(k > 1))
    queries = [[5] * n for n in range(8, 16)]
    responses = [[5] * n + [9] for n in range(3, 11)]
    dtype = torch.float16 if k > 1 else torch.bfloat16
    next_token = sampling.next_token

    def some_end(*arguments):
        mode.answers = [True, False]  # does any go on? do all go on?
        return next_token(*arguments)

    with patch.object(sampling, "next_token", some_end), mixed_precision("gpu", dtype):
        model = prepare(AutoModelForCausalLM.from_config(
            config, dtype=dtype if lora_rank else torch.float32)).to("gpu").eval()
        if lora_rank:
            model = add_adapter(model, lora_rank, seed=0)
        if some.checkpoint_activations:
            checkpoint_activations(model)
        sft.train_sft(FlowRun(), model, queries, responses, 0, some)
        reward_model = reward.RewardModel(model)
        if some.checkpoint_activations:
            checkpoint_activations(reward_model.trunk)
        pairs = list(zip(queries, responses, responses[::-1]))
        reward.train_reward(FlowRun(), reward_model, pairs, 0, some)
        plain_reward.normalize(reward_model, queries, responses, 0, 4)
        for temperature in (0, 0.7):
            sampling.sample_responses(model, TOKENIZER, queries, 2, temperature,
                                generator_for(0, "x", device=model.device), 4)
        judges.answer_probabilities(model, queries, torch.tensor([[3, 4], [5, 6]]), 4)
        ppo.train_ppo(FlowRun(), model, reward_model, queries, TOKENIZER, some)


def on_cpu(function):
    """The same function with a result that was left on the CPU: what a slip looks like."""
    def slipped(*arguments, **named):
        return function(*arguments, **named).cpu()

    return slipped


# what is on the wrong device: where, the function, and what stands in its place
SLIPS = {
    "an index": (plain_reward, "last_token_index", on_cpu(lm.last_token_index)),
    "a mask": (ppo, "get_response_mask", on_cpu(lm.get_response_mask)),
    "a generator": (ppo, "own_stream", lambda seed, *names: generator_for(seed)),
    "a scalar": (batches, "Step", lambda device: STEP(torch.device("cpu"))),
    "an embedding's ids": (ppo, "join", lambda queries, responses, pad_id, device: lm.join(
        queries, responses, pad_id)),
}


def what_goes_wrong(*arguments):
    """What stops a flow, as a text; "" if nothing does."""
    with pretended() as mode:
        try:
            flow(mode, *arguments)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


FLOWS = [(name, rank, k) for name in small_configs() for rank in (0, 4) for k in (1, 4)]


def all_flows():
    """What stops each flow, and each flow with a slip: texts by name."""
    found = {}
    for name, rank, k in FLOWS:
        found[f"{name} {rank} {k}"] = what_goes_wrong(small_configs()[name], rank, k)
    for slip, place in SLIPS.items():
        with patch.object(*place):
            found[slip] = what_goes_wrong(small_configs()["llama"], 0, 1)
    return found


def in_a_process(*arguments):
    process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def found():
    return in_a_process()


@pytest.mark.slow
@pytest.mark.parametrize("name, rank, k", FLOWS)
def test_the_whole_flow_stays_on_its_device(name, rank, k, found):
    assert found[f"{name} {rank} {k}"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_does_not_go_unseen(slip, found):
    assert "Error: " in found[slip], f"{slip} on the CPU, and nothing stopped"


# ---------------------------------------------------------------------------- bytes


WIDE = {  # the shapes of GPT-J-6B, Pythia-1B and SmolLM2-135M, but for the number of layers
    "gptj": GPTJConfig(), "neox": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8,
        intermediate_size=8192),
    "llama": LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True)}
# shape, type, rank, activations computed twice?, summaries of a post
CASES = [(name, "bfloat16", rank, twice, 1) for name in ("gptj", "neox") for rank in (0, 16)
         for twice in (False, True)] + [("llama", "float32", 0, False, 4),
                                        ("llama", "float32", 16, True, 1)]
LAYERS = 2, 4  # each further one costs the same, on both sides


def wide_settings(rank, twice, k):
    return settings(
        "--preset", "full", "--lora_rank", rank, "--query_length", 500, "--response_length", 12,
        "--summary_length", 60, "--ppo_batch_size", 32, "--micro_batch_size", 16, "--ppo_episodes",
        64, "--rollout_batch_size", 32, "--ppo_epochs", 1, "--reward_batch_size", 32,
        activations_twice(twice), "--return_sequences", k)


class SecondStep:
    """In place of engine.folder.Run: two steps; only during the second is all there that stays."""

    seed, log, history = 0, FlowRun.log, FlowRun.history

    def __init__(self, mode):
        self.mode = mode

    def steps(self, stage, total, **parts):
        yield 0
        self.mode.peaks = {}
        self.mode.there[stage] = self.mode.now
        yield 1


def with_layers(name, layers):
    config = copy.deepcopy(WIDE[name])
    config.num_hidden_layers = layers
    return config


def account(name, dtype, rank, twice, k, layers):
    """Bytes at a time, by what is done, and ("ppo") what is there all the time in PPO. With all
    weights "reward" is all that is there while that model is trained."""
    config, dtype = with_layers(name, layers), getattr(torch, dtype)
    some = wide_settings(rank, twice, k)
    queries, responses = [[5] * 500] * 32, [[5] * 60] * 32
    with pretended() as mode, mixed_precision("gpu", dtype):
        mode.there, run, one_step = {}, SecondStep(mode), ppo.one_step

        def within(label, function):
            def labelled(*arguments, **named):
                with mode.labelled(label):
                    return function(*arguments, **named)
            return labelled

        @contextmanager
        def step(*arguments):
            with mode.labelled("updating"), one_step(*arguments) as adam_step:
                yield adam_step

        with torch.device("gpu"):
            model = prepare(AutoModelForCausalLM.from_config(
                config, dtype=dtype if rank else torch.float32)).eval()
        if rank:
            model = add_adapter(model, rank, seed=0)
        reward_model = reward.RewardModel(model)
        if twice:
            checkpoint_activations(reward_model.trunk)
        with mode.labelled("reward"):
            reward.train_reward(run, reward_model, list(zip(queries, responses, responses)), 0,
                                some)
        found = {"reward": mode.peaks["reward"] - (mode.there["reward"] if rank else 0)}
        with patch.object(ppo, "sample_responses", within("sampling", ppo.sample_responses)), \
                patch.object(ppo, "rollout", within("updating", ppo.rollout)), \
                patch.object(ppo, "one_step", step):
            critic = ppo.train_ppo(run, model, reward_model, queries, TOKENIZER, some)
        there = found["ppo"] = mode.there["ppo"]
        found |= {use: mode.peaks[use] - there for use in ("sampling", "updating")}
        there = mode.now
        with mode.labelled("scoring"):
            plain_reward.score_summaries(reward_model, queries, responses, 0,
                                         some.rollout_batch_size)
        return found | {"scoring": mode.peaks["scoring"] - there}


def all_accounts():
    return {f"{case} {layers}": account(*case, layers) for case in CASES for layers in LAYERS}


@pytest.fixture(scope="module")
def accounts():
    return in_a_process("accounts")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_within_5_percent_of_what_is_allocated(case, accounts):
    """Never less, and at most 5 % more: each use by itself, and what further layers add to it."""
    name, dtype, *rest = case
    plans, real = [], [accounts[f"{case} {layers}"] for layers in LAYERS]
    for layers in LAYERS:
        plan = memory_plan(wide_settings(*rest), with_layers(name, layers),
                           dtype=getattr(torch, dtype))
        plan["ppo"] = plan["weights"] + plan["trained"]
        if rest[0] == 0:
            plan["reward"] += plan["ppo"]
        plans.append(plan)
    for use in real[0]:
        few, more = [(MARGIN * plan[use], counted[use]) for plan, counted in zip(plans, real)]
        added = more[0] - few[0], more[1] - few[1]
        # with all weights there is less than in PPO, whose weights the plan has from the start
        most = 1.05 if use != "reward" or rest[0] else math.inf
        for planned, counted in (few, more, added):
            assert counted <= planned and (planned <= most * counted or most == math.inf), (
                use, few, more)


if __name__ == "__main__":
    make_up_device()
    print(json.dumps(all_accounts() if sys.argv[1:] else all_flows()))
