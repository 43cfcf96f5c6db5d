"""What every stage does with a language model: pad, mask, log-probs, sample, schedules.

Conventions of the whole repository: queries are left-padded to width Q, responses right-padded to
width T, input_ids = [query | response] has shape (B, Q+T). logits[:, p] predict token p+1, so the
log-probs and values of the response come from positions [Q-1 : -1]. B = batch, V = vocabulary.
"""

import hashlib
import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import LlamaForCausalLM
from transformers.hf_argparser import HfArg
from transformers.modeling_layers import GradientCheckpointingLayer

from run import SettingError, agreed, from_hub, n_processes, rank, sum_over_processes


def check_shapes(**tensors):
    """Raise ValueError unless all tensors have equal shapes (broadcasting hides most RLHF bugs)."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")


def check_mask(mask):
    """Return mask as bool; raise ValueError when it selects nothing."""
    mask = mask != 0
    if not mask.any():
        raise ValueError(f"mask {tuple(mask.shape)} selects nothing")
    return mask


def check_finite(**tensors):
    """Raise FloatingPointError that names the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name.replace('_', ' ')} is NaN or infinite")


def zero_off(mask, *tensors):
    """Zeros where mask is False. torch.where never reads what it drops, whereas NaN * 0 is NaN."""
    return [torch.where(mask, tensor, torch.zeros_like(tensor)) for tensor in tensors]


def masked_mean(x, mask):
    """Mean of x over the True entries of mask, over the whole batch: sum(x * m) / sum(m).

    x, mask: equal shapes. Not the mean of row means: every token counts the same, whatever the
    length of its summary. Raises ValueError on unequal shapes or an empty mask.
    """
    check_shapes(x=x, mask=mask)
    mask = check_mask(mask)
    return zero_off(mask, x)[0].sum() / mask.sum()


# ---------------------------------------------------------------------------- padding and masks


def pad(sequences, pad_id, left):
    """Lists of token ids -> ids (B, L) and mask (B, L), padded on the left or on the right."""
    width = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, where] = torch.tensor(tokens, dtype=torch.long)
        mask[row, where] = 1
    return ids, mask


def join(queries, responses, pad_id, device="cpu"):
    """Queries and responses (lists of token ids) -> input_ids (B, Q+T), attention_mask, Q.

    The mask is made from lengths, not from `ids != pad`: it stays right when pad = eos.
    """
    query_ids, query_mask = pad(queries, pad_id, left=True)
    response_ids, response_mask = pad(responses, pad_id, left=False)
    input_ids = torch.cat([query_ids, response_ids], 1).to(device)
    attention_mask = torch.cat([query_mask, response_mask], 1).to(device)
    return input_ids, attention_mask, query_ids.shape[1]


def get_position_ids(attention_mask):
    """0, 1, 2, ... over the real tokens of each row, whatever stands to their left: (B, L)."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def last_token_index(attention_mask):
    """Index of the last real token of each row: (B,). For an ended summary this is its EOS."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * (attention_mask != 0)).argmax(1)


def get_response_mask(responses, eos_token_id):
    """(B, T) token ids -> (B, T) bool: True up to and including the first EOS, all True if none.

    EOS is an action: it carries KL, value, advantage and gradient, or the policy never learns to
    stop. What follows it is padding, whichever id the padding has.
    """
    is_eos = (responses == eos_token_id).long()
    return is_eos.cumsum(1) - is_eos == 0  # number of EOS strictly before t is zero


# ---------------------------------------------------------------------------- log-probabilities


def get_log_probs(logits, labels, temperature=1.0):
    """log softmax(logits / T)[labels], shifted: logits (B, L, V), labels (B, L) -> (B, L-1).

    Column p holds the log-prob (nats) of token p+1 given tokens 0..p. The temperature is the one
    the rollouts are sampled at, so that these are the log-probs of the policy that acted.
    Raises ValueError on unequal shapes or a temperature that is not positive.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be labels {tuple(labels.shape)} and V")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    # float32 at least: bfloat16 has three digits, too coarse for a ratio
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = F.log_softmax(logits / temperature, dim=-1)  # (B, L-1, V)
    return log_probs.gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1)


def response_log_probs(model, input_ids, attention_mask, width, temperature=1.0, k=1):
    """Log-probs of the last `width` tokens of input_ids (B, Q+T): (B, T). Used for the policy that
    samples, the one being updated and the reference alike, so that their ratio starts at exactly 1.
    """
    inputs = pack(input_ids, attention_mask, width, k, model.dtype)
    # positions Q-1 .. Q+kT-1 alone: no (B, Q+T, V) tensor is ever made
    logits = model(**inputs, logits_to_keep=k * width + 1, use_cache=False).logits
    return get_log_probs(unpack(logits, width, k), input_ids[:, -width - 1 :], temperature)


# ---------------------------------------------------------------------------- k summaries of a post
#
#          post  y1  y2     k summaries of one post as one row, the post computed once instead of k
#   post   ◣                times. A summary sees the post and itself, and its positions go on from
#   y1     ■     ◣          the post's end as if the others were not there: each number is that of
#   y2     ■         ◣      the plain form.


def pack(input_ids, attention_mask, width, k, dtype=torch.float32):
    """Rows [post | y] (B, Q+T), the k of a post one after the other -> what a model takes for the
    rows [post | y_1 | ... | y_k] (B/k, Q+kT). k = 1: the plain form."""
    position_ids = get_position_ids(attention_mask)
    if k == 1:
        return {"input_ids": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids}

    def side_by_side(x):
        return torch.cat([x[::k, :-width], x[:, -width:].reshape(len(x) // k, k * width)], 1)

    real = side_by_side(attention_mask).bool()
    n_post = input_ids.shape[1] - width
    owner = torch.arange(real.shape[1], device=real.device) - n_post  # below 0: the post
    owner = torch.where(owner < 0, -1, owner.div(width, rounding_mode="floor"))
    sees = ((owner == -1) | (owner == owner[:, None])).tril() & real[:, None]
    sees |= torch.eye(len(owner), dtype=torch.bool, device=real.device)  # a softmax over nothing
    bias = torch.zeros(sees.shape, dtype=dtype, device=real.device)
    return {"input_ids": side_by_side(input_ids),
            "attention_mask": bias.masked_fill(~sees, torch.finfo(dtype).min)[:, None],
            "position_ids": side_by_side(position_ids)}


def trim(input_ids, attention_mask, width):
    """Without the columns in which every row is padded; the width of the responses that is left."""
    real = attention_mask.any(0)
    start, end = real.long().argmax(), len(real) - real.flip(0).long().argmax()
    return input_ids[:, start:end], attention_mask[:, start:end], int(end) - len(real) + width


def unpack(x, width, k):
    """Last 1 + kT places of packed rows (B/k, 1 + kT, ...) -> (B, 1 + T, ...): the post's last
    place, which all k share, and the summary's own."""
    if k == 1:
        return x
    post, own = x[:, None, :1], x[:, 1:].unflatten(1, (k, width))  # own (B/k, k, T, ...)
    return torch.cat([post.expand(-1, k, *post.shape[2:]), own], 2).flatten(0, 1)


# ---------------------------------------------------------------------------- sampling


def generator_for(seed, *names, device="cpu"):
    """A random stream of its own for each use, e.g. (seed, "ppo", update). No stream depends on how
    much another one was used, so a stage that is resumed draws what it would have drawn."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def next_token(logits, temperature, top_p, generator):
    """logits (B, V) -> token ids (B,). Temperature 0 is greedy; top_p keeps the fewest most likely
    tokens whose probability reaches top_p, the token that crosses it included."""
    check_finite(logit=logits.max(-1).values)  # the maximum of a NaN and anything is NaN
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # mass *before* a token decides on it
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


# the name of the key-value cache, changed in transformers 5.24
CACHE = ("cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
         else "past_key_values")


@torch.no_grad()
def sample(model, input_ids, attention_mask, max_new_tokens, *, eos_token_id, pad_token_id,
           temperature=1.0, top_p=1.0, generator=None, k=1):
    """Continue left-padded queries (B, Q) one token at a time, each k times: (kB, T) long.

    T is the longest response, at most max_new_tokens; what follows an EOS is pad_token_id. Nothing
    but temperature and top_p shapes the distribution (`generate` adds the checkpoint's own top-k
    and penalties), so get_log_probs at the same temperature are those of the sampler at top_p = 1.
    A row that has drawn EOS leaves the batch and its key-value cache.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError("expected temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got "
                         f"{temperature}, {top_p} and {max_new_tokens}")
    n, device = k * len(input_ids), input_ids.device
    responses = torch.full((n, max_new_tokens), pad_token_id, device=device)
    rows = torch.arange(n, device=device)  # rows still being written
    mask, ids, cache = attention_mask.long(), input_ids, DynamicCache(config=model.config)
    position_ids = get_position_ids(mask)
    for t in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids,
                       use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
        if t == 0 and k > 1:  # the post is computed once, its cache shared out
            logits, mask = logits.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
            cache.batch_repeat_interleave(k)
        token = next_token(logits, temperature, top_p, generator)
        responses[rows, t] = token
        going = token != eos_token_id
        if not going.any():
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero().squeeze(-1))
        rows, mask, ids = rows[going], mask[going], token[going, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position_ids = get_position_ids(mask)[:, -1:]
    return responses[:, : t + 1]


# --------------------------------------------------------------------- models, and fitting them


def shrink(config):
    """The same architecture and vocabulary, so small that --fast_dev_run takes seconds anywhere."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_dim": 8,
             "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
    kept = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    names = {key: config.attribute_map.get(key, key) for key in small}
    return type(config).from_dict({**kept, **{names[key]: value for key, value in small.items()
                                              if hasattr(config, key)}})


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
    return tokenizer, model.to(device).eval()


def add_adapter(model, rank):
    """Freeze model and give its linear layers trainable low-rank adapters, which start as zero (Hu
    et al. 2021). A departure: the paper trains all weights. Returns the PeftModel around it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SettingError('--lora_rank needs peft: pip install -e ".[lora]"') from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank,
                                            target_modules="all-linear"))


def without_adapter(model):
    """Within this context a model is what it was before add_adapter."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def checkpoint_activations(model):
    """Keep the input of each layer only, and compute the rest again in the backward pass."""
    def switch(module, _):
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # the layer's own switch: off while sampling, where it would cost the cache; its
                # dropouts stay off as well
                layer.training = torch.is_grad_enabled()

    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.20 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.register_forward_pre_hook(switch)


# ---------------------------------------------------------------------------- schedules


def linear_schedule(step, total):
    """Factor on the learning rate of update `step` = 0 .. total-1: 1 -> 1/total (PPO, App. B.1)."""
    return 1 - step / total


def cosine_schedule(step, total):
    """Factor on the learning rate of step = 0 .. total: 1 -> 0 (SFT and reward model, App. B.1)."""
    return (1 + math.cos(math.pi * step / total)) / 2


# ---------------------------------------------------------------------------- text in, text out


def encode_response(text, tokenizer, limit):
    """Summary -> token ids with a leading space and EOS at the end (N+ detail 3). One longer than
    `limit` is cut there and has no EOS, as if it had never ended."""
    ids = tokenizer(" " + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return (ids + [tokenizer.eos_token_id])[:limit]


def decode_response(ids, tokenizer):
    """Token ids up to the first EOS -> text without outer white space."""
    eos = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids).strip()


def sample_responses(model, tokenizer, queries, max_new_tokens, temperature, generator=None,
                     batch_size=256):
    """One response (token ids, EOS included) to each query, in the order of the queries."""
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))  # little padding per batch
    responses = [None] * len(queries)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad([queries[i] for i in rows], tokenizer.pad_token_id, left=True)
        sampled = sample(model, ids.to(model.device), mask.to(model.device), max_new_tokens,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                         temperature=temperature, generator=generator)
        kept = get_response_mask(sampled, tokenizer.eos_token_id)
        for row, tokens, keep in zip(rows, sampled, kept):
            responses[row] = tokens[keep].tolist()
    return responses


# ---------------------------------------------------------------------------- step 1: SFT


@dataclass
class SFTConfig:
    sft_lr: float = HfArg(default=3e-3, help="paper: 6.35e-5 (1.3B), cosine (B.1)")
    sft_batch_size: int = HfArg(default=32, help="paper: 128 (B.1)")
    sft_epochs: int = HfArg(default=1, help="paper: 1 (B.1)")


@dataclass
class ModelConfig:
    lora_rank: int = HfArg(default=0, help="of adapters; 0 = train all weights, as the paper does")
    micro_batch_size: int = HfArg(default=0, help="rows in memory at a time; 0 = the whole batch")
    rollout_batch_size: int = HfArg(default=0, help="rows sampled at a time; 0 = the whole batch")
    checkpoint_activations: bool = HfArg(default=False, help="less memory, a third more compute")


def epoch_batches(n, batch_size, epochs, seed, stage):
    """Total number of steps, and a function step -> row numbers: each epoch is shuffled anew."""
    batch_size = min(batch_size, n)
    if batch_size < n_processes():
        raise SettingError(f"{stage}: a batch of {batch_size} rows does not reach for "
                           f"{n_processes()} processes: start fewer, or raise {stage}_batch_size")
    per_epoch = n // batch_size

    def rows(step):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(n, generator=generator_for(seed, stage, epoch)).tolist()
        return order[place * batch_size : (place + 1) * batch_size]

    return per_epoch * epochs, rows


def microbatches(rows, size):
    """This process's rows of a minibatch, `size` at a time (0: all at once)."""
    rows = rows[rank() :: n_processes()]
    return [rows[i : i + (size or len(rows))] for i in range(0, len(rows), size or len(rows))]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train_sft(run, model, queries, responses, pad_id, config):
    """Step 1, supervised fine-tuning: maximise log pi(reference | post). Loss on the response and
    its EOS alone: the paper trains to "predict summaries"; N+ has it on the query too."""
    optimizer = torch.optim.Adam(trainable(model), lr=config.sft_lr, betas=(0.9, 0.95),
                                 fused=True)
    total, rows = epoch_batches(len(queries), config.sft_batch_size, config.sft_epochs,
                                run.seed, "sft")

    def losses(batch):
        n_tokens = sum(len(responses[i]) for i in batch)
        for part in microbatches(batch, config.micro_batch_size):
            input_ids, mask, width = join([queries[i] for i in part], [responses[i] for i in part],
                                          pad_id, model.device)
            log_probs = response_log_probs(model, input_ids, mask, input_ids.shape[1] - width)
            mask = mask[:, width:]
            yield -masked_mean(log_probs, mask) * (mask.sum().double() / n_tokens)

    for step in run.steps("sft", total, model=model, optimizer=optimizer):
        loss = update(optimizer, losses(rows(step)), config.sft_lr * cosine_schedule(step, total),
                      1.0)
        run.log("sft", step, loss=loss)


def update(optimizer, losses, lr, max_grad_norm=math.inf, name="loss"):
    """One optimiser step at learning rate lr on the sum of `losses`: scalars, one per microbatch,
    each computed when its turn comes, so that only one microbatch's activations exist at a time.

    Each is already its share of the mean over the whole minibatch, here and on all processes; sums
    of such losses and of their gradients are those of the minibatch in one piece (a mean of
    microbatch means is not: short summaries would count more). Returns the summed loss. Raises
    FloatingPointError, the weights unchanged, where loss or gradient is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    total = torch.zeros((), device=parameters[0].device)
    with agreed():
        for loss in losses:
            loss.backward()
            total += loss.detach()
    gradients = [p.grad for p in parameters if p.grad is not None]
    sum_over_processes(total, *gradients)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    check_finite(**{name: total, f"gradient of the {name}": norm})
    optimizer.step()
    return total.item()


if __name__ == "__main__":
    # One row: query (7, 3), response (5, 9) with EOS = 9; a vocabulary of three for the log-probs
    logits = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 1]]])
    ids = torch.tensor([[0, 1, 2, 1]])
    print("log-probs of tokens 1..3:", get_log_probs(logits, ids).tolist())
    print("the same at T = 0.7:     ", get_log_probs(logits, ids, temperature=0.7).tolist())
    responses = torch.tensor([[5, 9, 7, 9], [5, 6, 7, 8]])
    print("response mask, EOS = 9:  ", get_response_mask(responses, 9).long().tolist())
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    print("position ids, left pads: ", get_position_ids(mask).tolist())
    x, m = torch.tensor([[0.2, 0.4, 0.6], [1, 7, 7]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    print("masked mean:             ", masked_mean(x, m).item())
