"""Models and tokenizers from the hub or a folder."""

import re
import urllib.request
from contextlib import suppress
from functools import partial

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file

from engine.architectures import check_model, most_positions
from engine.devices import LARGE, largest_logit, prepare
from engine.packing import shares_post
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


def small_model(name, config, dtype):
    """Random weights of the same architecture and vocabulary, so few that --fast_dev_run takes
    seconds anywhere."""
    torch.manual_seed(0)
    try:
        return AutoModelForCausalLM.from_config(shrink(config), dtype=dtype)
    except Exception as error:  # sizes that depend on each other otherwise than in most models
        raise SettingError(f"{name}: --fast_dev_run can't make a small {config.model_type} "
                           f"({' '.join(str(error).split())[:150]}); run without it") from None


def shrink(config):
    """The config with small sizes, those of the text and the image part where it has two, and with
    one layer of each kind (two at least)."""
    kept = config.to_dict()
    kinds = list(dict.fromkeys(kept.get("layer_types") or []))
    if kinds:
        kinds = kept["layer_types"] = (2 * kinds)[: max(2, len(kinds))]
    heads = kept.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
    small = {"hidden_size": 64, "num_hidden_layers": max(2, len(kinds)), "num_attention_heads": 4,
             "num_key_value_heads": 4 if kept.get("num_key_value_heads") == heads else 2,
             "rotary_dim": 8, "intermediate_size": 128, "head_dim": 16,
             "attention_types": [[["global", "local"], 1]]}  # GPT-Neo's name of the kinds
    for key, value in small.items():
        name = config.attribute_map.get(key, key)
        if name in kept:
            kept[name] = value
    for part in config.sub_configs:
        kept[part] = shrink(getattr(config, part)).to_dict()
    return type(config).from_dict(kept)


def causal_config(name):
    """The config of a language model that writes text from left to right; SettingError for another
    one."""
    with suppress(OSError):  # no network, or no such model: from_hub says it
        if find_adapter_config_file(str(name)):
            raise SettingError(f"{name}: it is an adapter, not a model; merge it into its base and "
                               "pass that (peft: merge_and_unload, then save_pretrained)")
    config = from_hub(AutoConfig.from_pretrained, name, trust_remote_code=False)
    kind, names = config.model_type, " ".join(config.architectures or [])
    # BERT and its kin count as causal in transformers, and see what they are to write
    looks_ahead = config.is_encoder_decoder or "bert" in kind and not config.is_decoder
    if looks_ahead or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or re.search(
            "Classification|QuestionAnswering|MaskedLM", names):
        raise SettingError(f"{name}: {names or kind} is no causal language model; pass one like "
                           "GPT-2, GPT-J, GPT-NeoX (Pythia), Llama or Qwen2")
    return config


def load_for_training(name, device, dtype, settings):
    """load_language_model for what is trained: frozen weights (adapters) in dtype, others in
    float32. Returns tokenizer, model, and the type to multiply in, which is float32 after all where
    --dtype is auto and the model's logits are too large for half precision."""
    config = causal_config(name)
    if getattr(config, "quantization_config", None):
        raise SettingError(f"{name}: its weights are quantised, and those can't be trained; pass "
                           "the model that it was made from")
    summary = max(settings.summary_length, settings.response_length)
    length = settings.query_length + summary
    if length > most_positions(config):
        raise SettingError(f"{name}: it has {most_positions(config)} positions; pass "
                           f"--query_length {most_positions(config) - summary} or less (a post and "
                           f"its summary have up to {settings.query_length} + {summary})")
    frozen = dtype if settings.lora_rank else torch.float32
    load = partial(load_language_model, name, device, tokenizer=settings.tokenizer,
                   small=settings.fast_dev_run, length=length)
    tokenizer, model = load(dtype=frozen)
    if settings.dtype == "auto" and dtype != torch.float32:
        largest = largest_logit(model, tokenizer)
        if largest > LARGE:
            print(f"{name}: logits up to {largest:.0f}, too large for half precision: float32")
            tokenizer, model = load(dtype=torch.float32)
            dtype = torch.float32
    return tokenizer, model, dtype


def load_language_model(name, device="cpu", dtype=torch.float32, tokenizer=None, small=False,
                        length=512):
    """Tokenizer and model of a local folder or hub id, in eval mode, tried out on rows of `length`
    tokens. Code that comes with a model is refused: left to its default, transformers asks the user
    whether to run it."""
    config = causal_config(name)
    given, tokenizer = tokenizer, load_tokenizer(tokenizer or name)
    if small:
        model = small_model(name, config, dtype)
    else:
        model, report = from_hub(AutoModelForCausalLM.from_pretrained, name, config=config,
                                 dtype=dtype, trust_remote_code=False, output_loading_info=True)
        missing = sorted(report["missing_keys"])  # transformers would draw them at random
        if missing:
            raise SettingError(f"{name}: {len(missing)} weights of a {config.model_type} language "
                               f"model are not in it, {missing[0]} for one; it is another kind of "
                               "model, or it was saved by another program")
    rows = model.get_input_embeddings().num_embeddings  # may be more: 50400 for 50257 in GPT-J
    check_ids(tokenizer, rows, f"{given or name}: {len(tokenizer)} tokens, but {name} knows {rows}")
    ends = model.generation_config.eos_token_id  # a chat model may have several
    ends = [ends] if isinstance(ends, int) else ends or []
    tokenizer.end_ids = sorted({tokenizer.eos_token_id, *(i for i in ends if i < rows)})
    model = prepare(model).to(device).eval()
    check_model(name, model, length)
    if shares_post(model, 2, min(length, most_positions(config))) == 1:
        print(f"{name}: {config.model_type} can't read two summaries of a post beside each other "
              "in one row, so that each gets a row of its own: slower, the same numbers")
    return tokenizer, model


def load_tokenizer(name):
    """The tokenizer of a local folder or hub id; SettingError for one that can't be used."""
    tokenizer = from_hub(AutoTokenizer.from_pretrained, name, trust_remote_code=False)
    if not tokenizer("a", add_special_tokens=False)["input_ids"] or tokenizer.eos_token is None:
        # what AutoTokenizer gives, without a word, for a repository that has none
        raise SettingError(f"{name} has no usable tokenizer (text gives no ids, or no EOS): name "
                           "that of its base model with --tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks are made from lengths, not from ids
    return tokenizer


def check_ids(tokenizer, rows, found):
    """SettingError if a text or EOS can get an id that the model has no row for. A special token
    that no text turns into does no harm (Gemma 3 1B has one)."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {i for i in tokenizer.get_vocab().values() if i >= rows} - special
    if beyond or tokenizer.eos_token_id >= rows:
        raise SettingError(f"{found}: this tokenizer belongs to another model")
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
