"""What several of the engine's tests need: tiny models of real architectures, runs to log to."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig,
                          PreTrainedTokenizerFast, Qwen2Config)

import toy
from engine.folder import Run
from engine.settings import ModelConfig
from ppo import PPOConfig

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "rlhf_minimal"  # the first word of the line that ends a run


def t(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, hint, tolerance=1e-6):
    """actual is expected, shape included; hint says what went wrong if it is not."""
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (
        f"{hint}\nshape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (
        f"{hint}\ngot      {actual.tolist()}\nexpected {expected.tolist()}")


# ---------------------------------------------------------------------------- models


def configs(vocabulary, d, **ends):
    """Two layers of each architecture: their names, positions and matrices differ."""
    old = {"vocab_size": vocabulary, "n_embd": d, "n_layer": 2, "n_head": 4, "n_positions": 64,
           "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0, **ends}
    new = {"vocab_size": vocabulary, "hidden_size": d, "num_hidden_layers": 2,
           "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64, **ends}
    return {
        "gpt2": lambda: GPT2Config(**old),
        "gpt_neox": lambda: GPTNeoXConfig(**new, hidden_dropout=0, attention_dropout=0),
        "gptj": lambda: GPTJConfig(**old, rotary_dim=4),
        "llama": lambda: LlamaConfig(**new, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**new, num_key_value_heads=2)}


CONFIGS = configs(40, 32, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
every_architecture = pytest.mark.parametrize("architecture", CONFIGS)
# GPT-2 has Conv1D and one matrix for q, k and v; Llama has all else that the others have
two_architectures = pytest.mark.parametrize("architecture", ["gpt2", "llama"])
QUERIES = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17]]
RESPONSES = [[18, 2], [19, 20, 21, 22], [2], [23, 24, 25]]  # EOS = 2: middle, absent, first, absent


def build(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def tiny_language_model(architecture):
    """A random language model of a real architecture. Shared by the tests: change copies only."""
    return build(CONFIGS[architecture]())


def table_model(table):
    """A real GPT-2 whose next-token logits are table[last token], (V, V), whatever came before."""
    vocabulary = len(table)
    width = vocabulary + 1
    model = build(GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=1, n_head=1,
                             tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
                             attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, n_positions=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "wpe" in name:  # neither context nor position reaches the output
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(vocabulary, width))
        hidden = model.transformer(torch.arange(vocabulary)[:, None]).last_hidden_state[:, 0]
        model.lm_head.weight.copy_((torch.linalg.pinv(hidden.double()) @ t(table)).T)
    return model


def surely(successors):
    """Logits of a model that surely puts successors[token] after token."""
    return [[30. if token == after else 0. for token in range(len(successors))]
            for after in successors]


def padded(queries, responses, left=0, right=0, pad_id=0):
    """[left-padded query | right-padded response], written without lm.py: ids, mask, Q, T."""
    query_width = max(map(len, queries)) + left
    width = max(map(len, responses)) + right
    ids, mask = [], []
    for query, response in zip(queries, responses):
        before, after = query_width - len(query), width - len(response)
        ids.append([pad_id] * before + query + response + [pad_id] * after)
        mask.append([0] * before + [1] * (len(query) + len(response)) + [0] * after)
    return torch.tensor(ids), torch.tensor(mask), query_width, width


# ---------------------------------------------------------------------------- twelve tokens

ARCHITECTURES = configs(12, 16, bos_token_id=1, eos_token_id=9)
TOKENIZER = SimpleNamespace(eos_token_id=9, pad_token_id=0)


class Vocabulary(SimpleNamespace):
    def __len__(self):
        return 12


def toy_model(seed=0):
    """The tiny world's architecture, for TOKENIZER's twelve tokens."""
    torch.manual_seed(seed)
    return toy.make_model(Vocabulary(eos_token_id=9, pad_token_id=0), 16, 2, 2)


def config(**changes):
    """Two updates of PPO of 16 summaries each."""
    fields = {**vars(PPOConfig()), **vars(ModelConfig()), "ppo_episodes": 32, "ppo_batch_size": 16,
              "response_length": 6, "ppo_lr": 1e-2}
    return SimpleNamespace(**{**fields, **changes})


def new_run(folder, seed=0, **flags):
    return Run(folder, {"seed": seed, "files": {}, "environment": {}}, **flags)


class Told:
    """In place of a Run: keeps what it is told, and has no folder. n: the steps of each stage."""

    seed = 0

    def __init__(self, n=None):
        self.n, self.warnings, self.lines = n, [], []

    def steps(self, stage, total, **parts):
        return range(self.n or total)

    def log(self, stage, step, **metrics):
        self.lines.append({"stage": stage, "step": step, **metrics})

    def warn(self, kind, text):
        self.warnings.append((kind, text))

    def history(self, stage):
        return [line for line in self.lines if line["stage"] == stage]


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before, module):
    return all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def flat(*modules):
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


# ---------------------------------------------------------------------------- chat templates

# As Qwen's: a system turn of its own; newlines only inside the strings.
CHATML = (
    "{{- '<|im_start|>system\\nYou judge.<|im_end|>\\n' }}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
# As Qwen3's: an empty thought when thinking is switched off
SWITCH = CHATML + ("{%- if enable_thinking is defined and enable_thinking is false %}"
                   "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}")
THINKS = CHATML + "{{- '<think>\\n' }}"


def byte_level(texts, special, size=300, **names):
    """A byte-level tokenizer as GPT-2's, made on the spot: no pad token, unless named."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([texts] * 5, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
