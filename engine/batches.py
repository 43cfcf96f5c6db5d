"""In what pieces an algorithm gets its rows, and how the pieces add up to one step.

A batch is shared among the processes, and each process cuts its rows into microbatches that fit in
memory. Nothing of this may show in a result: means are over all tokens of the batch, never means of
means, so that a short summary counts neither more nor less for where it was cut.
"""

import hashlib
import math
from contextlib import contextmanager

import torch

from engine.devices import full_precision, wide
from engine.processes import agreed, gather, n_processes, rank, sum_over_processes
from engine.settings import SettingError


def check_finite(name, tensor):
    """Raise FloatingPointError that names the tensor if it holds a NaN or an infinity."""
    if not tensor.isfinite().all():
        raise FloatingPointError(f"{name} is NaN or infinite")


def generator_for(seed, *names, device="cpu"):
    """A random stream of its own for each use, e.g. (seed, "ppo", update). No stream depends on how
    much another one was used, so a stage that is resumed draws what it would have drawn."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


# ---------------------------------------------------------------------------- rows of a step


def steps_per_epoch(n_rows, batch_size, stage):
    """Steps of one pass over the rows, the last incomplete batch left out, and the batch size: all
    rows where there are fewer. SettingError if a batch doesn't reach for all processes."""
    batch_size = min(batch_size, n_rows)
    if batch_size < n_processes():
        raise SettingError(f"{stage}: a batch of {batch_size} rows does not reach for "
                           f"{n_processes()} processes: start fewer, or raise {stage}_batch_size")
    return n_rows // batch_size, batch_size


def rows_of_step(step, n_rows, batch_size, seed, stage):
    """Row numbers of the batch of a step, of all processes; each epoch is shuffled anew."""
    epoch, place = divmod(step, n_rows // batch_size)
    order = torch.randperm(n_rows, generator=generator_for(seed, stage, epoch)).tolist()
    return order[place * batch_size : (place + 1) * batch_size]


def microbatches(rows, config):
    """This process's rows of a batch, micro_batch_size at a time (0: all at once)."""
    rows = rows[rank() :: n_processes()]
    size = config.micro_batch_size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# ---------------------------------------------------------------------------- PPO's batches


def posts_per_update(config):
    """Posts whose summaries make one update; SettingError unless the processes share them evenly
    (one with fewer would make fewer minibatches, and the others wait for it)."""
    n_posts = max(1, config.ppo_batch_size // config.return_sequences)
    if n_posts % n_processes():
        raise SettingError(f"--ppo_batch_size {config.ppo_batch_size}: {n_posts} posts an update "
                           f"can't be shared evenly among {n_processes()} processes")
    if n_posts // n_processes() < config.ppo_minibatches:
        raise SettingError(f"--ppo_minibatches {config.ppo_minibatches}: expected at most the "
                           f"{n_posts // n_processes()} posts that a process has in an update")
    return n_posts


def own_queries(queries, update, config):
    """This process's queries of an update; the updates go through all queries again and again."""
    n_posts = posts_per_update(config)
    rows = range(update * n_posts, (update + 1) * n_posts)[rank() :: n_processes()]
    return [queries[row % len(queries)] for row in rows]


def own_stream(seed, stage, step, device):
    """generator_for a step, another one for each process: no two draw the same summaries."""
    return generator_for(seed, stage, step * n_processes() + rank(), device=device)


def cut_by_length(lengths, config):
    """Posts of an update, as numbers, in the microbatches that all its passes will see.

    lengths: of each post with its summaries. Each minibatch gets the same number of microbatches
    (as far as there are enough posts), and these are as equal as they can be. Where a minibatch has
    several, posts of similar length go together, so that little of a microbatch is padding.
    """
    n_posts, n_minibatches = len(lengths), config.ppo_minibatches
    rows = config.micro_batch_size or config.ppo_batch_size  # in memory at a time, at most
    most = max(1, rows // config.return_sequences)
    pieces = math.ceil(n_posts / (n_minibatches * most))  # of a minibatch
    order = list(range(n_posts))
    if pieces > 1:
        order.sort(key=lengths.__getitem__)
    parts = torch.tensor(order).tensor_split(min(n_posts, n_minibatches * pieces))
    return [part.tolist() for part in parts]


def minibatches(batch, n_minibatches, generator):
    """Microbatches (with a mask each) in minibatches: lists of (microbatch, its share), anew for
    each pass. The share is of the minibatch's tokens over all processes: sums of means times their
    shares, and of the gradients of those, are the means over the minibatch in one piece."""
    order = torch.randperm(len(batch), generator=generator).tolist()
    for i in range(n_minibatches):
        parts = [batch[j] for j in order[i::n_minibatches]]
        counts = [wide(part.mask.sum()) for part in parts]
        total = sum_over_processes(torch.stack(counts).sum())
        yield [(part, count / total) for part, count in zip(parts, counts)]


def over_all(function, vectors):
    """function(one long vector): of all vectors here and of all processes; its result in the pieces
    that the vectors here had."""
    own = torch.cat(vectors)
    everybody = gather(own)
    result = function(torch.cat(everybody))
    start = sum(len(vector) for vector in everybody[: rank()])
    return result[start : start + len(own)].split([len(vector) for vector in vectors])


def mean_of_all(vectors):
    """Mean over the entries of all vectors here and of all processes, as a number."""
    return torch.cat(gather(torch.cat(vectors).float())).mean().item()


# ---------------------------------------------------------------------------- one step


class Step:
    """What one_step hands out. loss: the sum over all microbatches and processes, at the end."""

    def __init__(self, device):
        self.total, self.loss = torch.zeros((), device=device), None
        # float16 has no number between 0 and 6e-8, where many a gradient is: it is carried through
        # the network 1024 times as large. (bfloat16 has the range of float32.)
        half = (torch.is_autocast_enabled(device.type)
                and torch.get_autocast_dtype(device.type) == torch.float16)
        self.scale = 1024 if half else 1

    def add(self, loss):
        """The backward pass of one microbatch, whose activations are free after it. loss: a scalar,
        already its share of the mean over the whole minibatch."""
        with full_precision(loss.device):  # else the head's float32 is rounded, and copied, here
            (loss * self.scale if self.scale > 1 else loss).backward()
        self.total += loss.detach()


@contextmanager
def one_step(optimizer, lr, max_grad_norm=math.inf, name="loss"):
    """One optimiser step at learning rate lr, on the sum of the losses that are added within.

        with one_step(optimizer, lr) as step:
            for part in microbatches(...):
                step.add(loss of part)

    At the end gradients are summed over the processes and clipped to max_grad_norm. Raises
    FloatingPointError, the weights unchanged, where loss or gradient is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    step = Step(parameters[0].device)
    with agreed():
        yield step
    gradients = [p.grad for p in parameters if p.grad is not None]
    if step.scale > 1:
        torch._foreach_div_(gradients, step.scale)
    sum_over_processes(step.total, *gradients)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    check_finite(name, step.total)
    check_finite(f"gradient of the {name}", norm)
    optimizer.step()
    step.loss = step.total.item()


# ---------------------------------------------------------------------------- k summaries of a post
#
#          post  y1  y2     k summaries of one post as one row, the post computed once instead of k
#   post   ◣                times. A summary sees the post and itself, and its positions go on from
#   y1     ■     ◣          the post's end as if the others were not there: each number is that of
#   y2     ■         ◣      the plain form.


def pack(input_ids, attention_mask, position_ids, width, k, dtype=torch.float32):
    """Rows [post | y] (B, Q+T), the k of a post one after the other -> what a model takes for the
    rows [post | y_1 | ... | y_k] (B/k, Q+kT). k = 1: the plain form. width: T."""
    if k == 1:
        return {"input_ids": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids}
    real = side_by_side(attention_mask, width, k).bool()
    n_post = input_ids.shape[1] - width
    owner = torch.arange(real.shape[1], device=real.device) - n_post  # below 0: the post
    owner = torch.where(owner < 0, -1, owner.div(width, rounding_mode="floor"))
    sees = ((owner == -1) | (owner == owner[:, None])).tril() & real[:, None]
    sees |= torch.eye(len(owner), dtype=torch.bool, device=real.device)  # a softmax over nothing
    bias = torch.zeros(sees.shape, dtype=dtype, device=real.device)
    return {"input_ids": side_by_side(input_ids, width, k),
            "attention_mask": bias.masked_fill(~sees, torch.finfo(dtype).min)[:, None],
            "position_ids": side_by_side(position_ids, width, k)}


def side_by_side(x, width, k):
    """(B, Q+T) -> (B/k, Q+kT): the post of every k-th row, then the responses of k rows."""
    return torch.cat([x[::k, :-width], x[:, -width:].reshape(len(x) // k, k * width)], 1)


def unpack(x, width, k):
    """Last 1 + kT places of packed rows (B/k, 1 + kT, ...) -> (B, 1 + T, ...): the post's last
    place, which all k share, and the summary's own."""
    if k == 1:
        return x
    post, own = x[:, None, :1], x[:, 1:].unflatten(1, (k, width))  # own (B/k, k, T, ...)
    return torch.cat([post.expand(-1, k, *post.shape[2:]), own], 2).flatten(0, 1)
