"""In what pieces an algorithm gets its rows, and how the pieces add up to one step.

A batch is shared among the processes, and each process cuts its rows into microbatches that fit in
memory. Nothing of this may show in a result: means are over all tokens of the batch, never means of
means, so that a short summary counts neither more nor less for where it was cut.
"""

import math
from contextlib import contextmanager

import torch

from engine.devices import full_precision
from engine.processes import agreed, gather, n_processes, rank, sum_over_processes
from engine.settings import SettingError
from lm import check_finite, generator_for


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
    rows = n_posts * config.return_sequences // n_processes()
    if rows < config.ppo_minibatches:
        raise SettingError(f"--ppo_minibatches {config.ppo_minibatches}: expected at most the "
                           f"{rows} summaries that a process has in an update")
    return n_posts


def own_queries(queries, update, config):
    """This process's queries of an update; the updates go through all queries again and again."""
    n_posts = posts_per_update(config)
    rows = range(update * n_posts, (update + 1) * n_posts)[rank() :: n_processes()]
    return [queries[row % len(queries)] for row in rows]


def own_stream(seed, stage, step, device):
    """generator_for a step, another one for each process: no two draw the same summaries."""
    return generator_for(seed, stage, step * n_processes() + rank(), device=device)


def cut_by_length(lengths, most):
    """Posts of an update, as numbers, in pieces of at most `most`, as equal as they can be.

    lengths: of each post with its summaries. Where there are several pieces, posts of similar
    length go together, so that little of a piece is padding.
    """
    pieces = math.ceil(len(lengths) / most)
    order = list(range(len(lengths)))
    if pieces > 1:
        order.sort(key=lengths.__getitem__)
    return [part.tolist() for part in torch.tensor(order).tensor_split(pieces)]


def over_all(function, vectors):
    """function(one long vector): of all vectors here and of all processes; its result in the pieces
    that the vectors here had."""
    own = torch.cat(vectors)
    everybody = gather(own)
    result = function(torch.cat(everybody))
    start = sum(len(vector) for vector in everybody[: rank()])
    return result[start : start + len(own)].split([len(vector) for vector in vectors])


def all_of(vectors):
    """The entries of all vectors here and of all processes, as one vector, in float32."""
    return torch.cat(gather(torch.cat(vectors).float()))


def mean_of_all(vectors):
    """Their mean, as a number."""
    return all_of(vectors).mean().item()


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
