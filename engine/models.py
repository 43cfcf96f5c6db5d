"""Models and tokenizers from the hub or a folder."""

import re
import urllib.request
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import AutoTokenizer

from engine.devices import LARGE, largest_logit, prepare
from engine.settings import SettingError


FAULTS = (  # what an error says: what to do about it
    ("No space left|Not enough disk|quota",
     "free some space, or set HF_HOME to a folder on a larger disk"),
    ("custom code", "it comes with code of its own, which is never run here: pass another one"),
    ("backend tokenizer", "name the tokenizer of its base model with --tokenizer"),
    ("gated", "accept its licence on https://huggingface.co/{name} and log in: hf auth login"),
    ("npickl|SafetensorError|header|RemoteProtocol|ArrowInvalid|Parquet|Consistency|EOFError|"
     "Errno 22|mmap|codec|valid JSON",
     "it is damaged or was cut short: if it is a download, delete {cache} and try again"),
    ("", "check the name and the network, log in if it is private (hf auth login), or pass a local "
     "folder or file that has all of it"),
)


def from_hub(load, name, *path, **settings):
    """load(name, or another path, **settings) of transformers or datasets; one line about name, as
    a SettingError, if it fails."""
    try:
        return load(*path or [name], **settings)
    except Exception as error:  # network, login, disk, damaged files: exceptions of many libraries
        texts = []
        while error:  # what it says, and what caused it: `datasets` hides that a disk is full
            texts.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            error = error.__cause__
    for sign, advice in FAULTS:
        found = [text for text in texts if re.search(sign, text.replace(str(name), ""))]
        if found:
            break
    cache = f"{HF_HUB_CACHE}/*--{str(name).replace('/', '--')}"
    # not the whole text: torch's advice after a failed load is to load without its safety
    raise SettingError(f"{name}: not readable, {found[0].split('. ')[0][:150]}; "
                       + advice.format(name=name, cache=cache))


def go_offline_unless_reachable():
    """Ask the hub once, for ten seconds; without an answer the libraries use the cache alone,
    instead of trying again for minutes."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError:
        import datasets
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def shrink(config):
    """The same architecture and vocabulary, so small that --fast_dev_run takes seconds anywhere."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_dim": 8,
             "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
    kept = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    names = {key: config.attribute_map.get(key, key) for key in small}
    return type(config).from_dict({**kept, **{names[key]: value for key, value in small.items()
                                              if hasattr(config, key)}})


def causal_config(name):
    """The config of a language model that writes text from left to right; SettingError for another
    one (BERT and its kin count as such in transformers, and see what they are to write)."""
    config = from_hub(AutoConfig.from_pretrained, name, trust_remote_code=False)
    kind = config.model_type
    looks_ahead = config.is_encoder_decoder or "bert" in kind and not config.is_decoder
    if looks_ahead or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SettingError(f"{name}: {kind} is no causal language model; pass one like GPT-2, "
                           "GPT-J, GPT-NeoX (Pythia), Llama or Qwen2")
    return config


def load_for_training(name, device, dtype, settings):
    """load_language_model for what is trained: frozen weights (adapters) in dtype, others in
    float32. Returns tokenizer, model, and the type to multiply in, which is float32 after all where
    --dtype is auto and the model's logits are too large for half precision."""
    frozen = dtype if settings.lora_rank else torch.float32
    load = partial(load_language_model, name, device, tokenizer=settings.tokenizer,
                   small=settings.fast_dev_run)
    tokenizer, model = load(dtype=frozen)
    if settings.dtype == "auto" and dtype != torch.float32:
        largest = largest_logit(model, tokenizer)
        if largest > LARGE:
            print(f"{name}: logits up to {largest:.0f}, too large for half precision: float32")
            tokenizer, model = load(dtype=torch.float32)
            dtype = torch.float32
    return tokenizer, model, dtype


def load_language_model(name, device="cpu", dtype=torch.float32, tokenizer=None, small=False):
    """Tokenizer and model of a local folder or hub id, in eval mode. Code that comes with a model
    is refused: left to its default, transformers asks the user whether to run it."""
    tokenizer_name = tokenizer or name
    tokenizer = from_hub(AutoTokenizer.from_pretrained, tokenizer_name, trust_remote_code=False)
    if not tokenizer("a", add_special_tokens=False)["input_ids"] or tokenizer.eos_token is None:
        # what AutoTokenizer gives, without a word, for a repository that has none
        raise SettingError(f"{tokenizer_name} has no usable tokenizer (text gives no ids, or no "
                           "EOS): name that of its base model with --tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks are made from lengths, not from ids
    if small:
        torch.manual_seed(0)
        config = from_hub(AutoConfig.from_pretrained, name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(shrink(config), dtype=dtype)
    else:
        model = from_hub(AutoModelForCausalLM.from_pretrained, name, dtype=dtype,
                         trust_remote_code=False)
    rows = model.get_input_embeddings().num_embeddings  # may be more: 50400 for 50257 in GPT-J
    if rows < len(tokenizer):
        raise SettingError(f"{tokenizer_name}: {len(tokenizer)} tokens, but {name} knows {rows}: "
                           "this tokenizer belongs to another model")
    return tokenizer, prepare(model).to(device).eval()
