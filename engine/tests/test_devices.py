"""engine/devices.py, and what precision asks of a step: which type where, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from common import CONFIGS, build
from torch.utils._python_dispatch import TorchDispatchMode

from engine import devices, models
from engine.batches import one_step
from engine.devices import largest_logit, pick_device, pick_dtype, wide
from engine.settings import ModelConfig, SettingError


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=(major, minor) or None, mps=bool): what torch says it has."""
    def has(cuda=None, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # by emulation
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return has


@pytest.mark.parametrize("cuda, mps, device, dtype", [
    (None, False, "cpu", torch.float32),
    (None, True, "cpu", torch.float32),  # a Mac's GPU has to be asked for
    ((9, 0), False, "cuda", torch.bfloat16), ((8, 6), False, "cuda", torch.bfloat16),
    ((7, 5), False, "cuda", torch.float32),  # a T4 says that it supports bfloat16, and emulates it
])
def test_auto(cuda, mps, device, dtype, machine):
    machine(cuda, mps)
    assert pick_device() == device and pick_dtype("auto", device) == dtype


def test_a_macs_gpu_is_there_for_who_asks(machine):
    machine(mps=True)
    assert pick_device("mps") == "mps" and pick_dtype("auto", "mps") == torch.float32


@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "mps", "tpu"])
def test_a_device_that_is_not_there(wanted, machine):
    machine()
    with pytest.raises(SettingError, match=rf"--device {wanted}: it isn't there \(found: cpu\)"):
        pick_device(wanted)


@pytest.mark.parametrize("dtype, device, cuda, words", [
    ("bfloat16", "cuda", (7, 5), "only emulates it"), ("float16", "cpu", None, "cpu can't train"),
    ("bfloat16", "mps", None, "mps can't train"), ("int8", "cpu", None, "expected auto, float32")])
def test_a_type_that_the_device_lacks(dtype, device, cuda, words, machine):
    machine(cuda)
    with pytest.raises(SettingError, match=f"--dtype {dtype}.*{words}"):
        pick_dtype(dtype, device)


@pytest.mark.parametrize("dtype, device, cuda", [
    ("float32", "mps", None), ("bfloat16", "cpu", None), ("float16", "cuda", (7, 5))])
def test_a_type_that_is_asked_for(dtype, device, cuda, machine):
    machine(cuda)
    assert pick_dtype(dtype, device) == getattr(torch, dtype)


def test_counts_are_in_float64_where_there_is_one():
    assert wide(torch.tensor(3)).dtype == torch.float64
    mps = SimpleNamespace(device=torch.device("mps"), float=lambda: "float32")
    assert wide(mps) == "float32"


@pytest.mark.parametrize("scale, dtype", [(1, torch.bfloat16), (400, torch.float32)])
def test_large_logits_take_float32(scale, dtype, monkeypatch, capsys):
    """As pythia-70m's, near 1,000: in bfloat16 such logits are 4 apart."""
    loaded = []

    def load(name, device, dtype, tokenizer, small, length):
        model = build(CONFIGS["llama"]())
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
        loaded.append(dtype)
        return (lambda text, return_tensors: {"input_ids": torch.tensor([[3, 4, 5]])}), model

    monkeypatch.setattr(models, "load_language_model", load)
    monkeypatch.setattr(models, "causal_config", lambda name: CONFIGS["llama"]())
    settings = SimpleNamespace(**vars(ModelConfig()) | {"lora_rank": 2}, tokenizer=None,
                               fast_dev_run=False, query_length=8, summary_length=4,
                               response_length=4)
    *_, found = models.load_for_training("me/model", "cuda", torch.bfloat16, settings)
    assert found == dtype and loaded == [torch.bfloat16, torch.float32][: 1 + (scale > 1)]
    assert ("too large for half precision: float32" in capsys.readouterr().out) == (scale > 1)
    settings.dtype = "bfloat16"  # who asks for it gets it
    *_, found = models.load_for_training("me/model", "cuda", torch.bfloat16, settings)
    assert found == torch.bfloat16


def test_largest_logit_by_hand():
    model = build(CONFIGS["llama"]())
    tokenizer = lambda text, return_tensors: {"input_ids": torch.tensor([[3, 4, 5]])}  # noqa: E731
    expected = model(input_ids=torch.tensor([[3, 4, 5]])).logits.abs().max().item()
    assert largest_logit(model, tokenizer) == pytest.approx(expected)


@pytest.mark.parametrize("half", [False, True])
def test_float16_carries_gradients_larger_and_steps_the_same(half):
    """By hand: x = 3, loss = 2 x: a gradient of 2, and SGD from 3 at rate .1 comes to 2.8."""
    seen = []
    x = torch.tensor(3.0, requires_grad=True)
    with (torch.autocast("cpu", torch.float16, enabled=half),
          one_step(torch.optim.SGD([x], lr=1.0), 0.1) as step):
        loss = 2 * x
        loss.register_hook(lambda gradient: seen.append(gradient.item()))
        step.add(loss)
    assert seen == [1024 if half else 1] and x.grad.item() == 2
    assert x.item() == pytest.approx(2.8) and step.loss == 6, "the loss is said as it is"


class Operations(TorchDispatchMode):
    """Remembers the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_logits_of_all_rows_are_one_product(frozen):
    """Of the last places of 8 rows, which don't lie one after the other in memory: one product of
    all rows by the weights, and not 8 that read the weights 8 times."""
    head = devices.Float32Linear(100, 400, bias=False).requires_grad_(not frozen)
    hidden = torch.rand(8, 9, 100)
    with torch.no_grad(), Operations() as operations:
        logits = head(hidden[:, -5:])
    assert operations.names.count("mm") == 1 and "bmm" not in operations.names
    assert torch.allclose(logits, hidden[:, -5:] @ head.weight.T, atol=1e-5)


def test_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert devices.available_memory("cuda:0") == (5, "a card")
    free, name = devices.available_memory("cpu")
    assert free > 0 and name == "this CPU"
