"""engine/batches.py on paper: which rows make a step, in what pieces, and what a step does.

Order: random streams, the rows of a step, the pieces of PPO's batches and what their numbers add up
to, one optimiser step. Several processes are played here by changed sums; real ones are in
test_processes.py. What is packed side by side is in test_sharing.py.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from common import close, t

from engine import batches
from engine.devices import Float32Linear
from engine.settings import SettingError


def settings(**changes):
    return SimpleNamespace(**{"ppo_batch_size": 8, "ppo_minibatches": 1, "return_sequences": 1,
                              "micro_batch_size": 0, **changes})


def processes(monkeypatch, rank, n):
    monkeypatch.setattr(batches, "rank", lambda: rank)
    monkeypatch.setattr(batches, "n_processes", lambda: n)


# ---------------------------------------------------------------------------- random streams


def test_no_two_processes_and_no_two_steps_draw_from_one_stream(monkeypatch):
    draws = []
    for step in range(4):
        for rank in range(3):
            processes(monkeypatch, rank, 3)
            draws.append(torch.rand((), generator=batches.own_stream(0, "ppo", step, "cpu")).item())
    assert len(set(draws)) == 12


# ---------------------------------------------------------------------------- rows of a step


def test_epochs_are_shuffled_and_cut_into_batches():
    """Ten rows in batches of three: three steps an epoch, nine rows once each, one left over."""
    assert batches.steps_per_epoch(10, 3, "sft") == (3, 3)

    def rows(step, seed=5, stage="sft"):
        return batches.rows_of_step(step, 10, 3, seed, stage)

    of_steps = [rows(step) for step in range(6)]
    assert [len(batch) for batch in of_steps] == [3] * 6
    epochs = [sum(of_steps[:3], []), sum(of_steps[3:], [])]
    for epoch in epochs:
        assert len(set(epoch)) == 9 and set(epoch) <= set(range(10))
    assert epochs[0] != epochs[1] and rows(4) == of_steps[4], "a step has its rows, whenever asked"
    for seed, stage in ((6, "sft"), (5, "reward")):
        others = [rows(step, seed, stage) for step in range(3)]
        assert others != of_steps[:3], "an order for each seed and stage"


def test_fewer_rows_than_a_batch_are_one_batch():
    assert batches.steps_per_epoch(2, 3, "sft") == (1, 2)
    assert all(sorted(batches.rows_of_step(step, 2, 2, 5, "sft")) == [0, 1] for step in range(4))
    assert batches.steps_per_epoch(1, 1, "sft") == (1, 1)
    assert batches.rows_of_step(0, 1, 1, 5, "sft") == [0]


def test_each_process_needs_a_row(monkeypatch):
    processes(monkeypatch, 0, 3)
    assert batches.steps_per_epoch(10, 3, "reward") == (3, 3)
    for n_rows, batch_size in ((10, 2), (2, 8)):
        with pytest.raises(SettingError, match="reward: a batch of 2 rows .* 3 processes.*"
                                               "raise reward_batch_size"):
            batches.steps_per_epoch(n_rows, batch_size, "reward")


@pytest.mark.parametrize("size, parts", [
    (0, [[7, 3, 8, 1, 5]]), (2, [[7, 3], [8, 1], [5]]), (5, [[7, 3, 8, 1, 5]]),
    (9, [[7, 3, 8, 1, 5]])])
def test_microbatches_are_the_rows_in_order(size, parts):
    assert batches.microbatches([7, 3, 8, 1, 5], settings(micro_batch_size=size)) == parts


def test_microbatches_of_two_processes_are_all_rows(monkeypatch):
    processes(monkeypatch, 0, 2)
    assert batches.microbatches([7, 3, 8, 1, 5], settings(micro_batch_size=2)) == [[7, 8], [5]]
    processes(monkeypatch, 1, 2)
    assert batches.microbatches([7, 3, 8, 1, 5], settings(micro_batch_size=2)) == [[3, 1]]
    assert batches.microbatches([7, 3, 8, 1, 5], settings()) == [[3, 1]], "0: all at once"


# ---------------------------------------------------------------------------- PPO's batches


def test_posts_of_an_update(monkeypatch):
    assert batches.posts_per_update(settings()) == 8
    assert batches.posts_per_update(settings(return_sequences=4)) == 2
    processes(monkeypatch, 1, 2)
    assert batches.posts_per_update(settings(return_sequences=2)) == 4, "of all processes"
    with pytest.raises(SettingError, match="--ppo_batch_size 6: 3 posts .* 2 processes"):
        batches.posts_per_update(settings(ppo_batch_size=6, return_sequences=2))
    with pytest.raises(SettingError, match="--ppo_minibatches 5: expected at most the 4 summaries"):
        batches.posts_per_update(settings(ppo_minibatches=5))
    assert batches.posts_per_update(settings(ppo_minibatches=4)) == 8
    assert batches.posts_per_update(settings(ppo_minibatches=4, return_sequences=4)) == 2


def test_own_queries_go_through_all_posts_again_and_again(monkeypatch):
    config = settings(ppo_batch_size=4)
    updates = [batches.own_queries(list("abcdef"), update, config) for update in range(3)]
    assert ["".join(update) for update in updates] == ["abcd", "efab", "cdef"]
    shares = []
    for rank in range(2):
        processes(monkeypatch, rank, 2)
        shares.append("".join(batches.own_queries(list("abcdef"), 1, config)))
    assert shares == ["ea", "fb"], "efab, every second one"


@pytest.mark.parametrize("most, parts", [
    (6, [[0, 1, 2, 3, 4, 5]]), (99, [[0, 1, 2, 3, 4, 5]]),  # all at once: in the order of the posts
    (4, [[1, 3, 4], [2, 5, 0]]),  # 3 + 3 and not 4 + 2; by length (2, 2, 5 and 7, 8, 9)
    (2, [[1, 3], [4, 2], [5, 0]]), (1, [[1], [3], [4], [2], [5], [0]])])
def test_cut_by_length(most, parts):
    assert batches.cut_by_length([9, 2, 7, 2, 5, 8], most) == parts


def test_cut_by_length_whatever_the_sizes():
    for n_posts, most in itertools.product(range(1, 10), (1, 2, 4, 7, 100)):
        lengths = [(7 * i) % 10 for i in range(n_posts)]
        parts = batches.cut_by_length(lengths, most)
        named = f"{n_posts} posts, {most} at a time"
        assert sorted(sum(parts, [])) == list(range(n_posts)), f"each post once: {named}"
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1, f"as equal as can be: {named}"
        assert max(sizes) <= most and len(parts) == math.ceil(n_posts / most), named
        if len(parts) > 1:
            assert [lengths[i] for i in sum(parts, [])] == sorted(lengths), f"by length: {named}"


def test_over_all_gives_each_microbatch_its_own_piece():
    vectors = [t([1, 2]), t([6]), t([3, 4, 8])]  # the mean is 4
    found = batches.over_all(lambda x: x - x.mean(), vectors)
    assert [x.tolist() for x in found] == [[-3, -2], [2], [-1, 0, 4]]
    found = batches.over_all(lambda x: x * torch.arange(len(x)), vectors)
    assert [x.tolist() for x in found] == [[0, 2], [12], [9, 16, 40]], "in order"


@pytest.mark.parametrize("rank, expected", [(0, [[-5, -4], [0]]), (1, [[4], [6, -1]])])
def test_over_all_processes(rank, expected, monkeypatch):
    # 1, 2, 6 on the first process and 10, 12, 5 on the second: the mean is 6
    everybody = [t([1, 2, 6]), t([10, 12, 5])]
    own = [[t([1, 2]), t([6])], [t([10]), t([12, 5])]][rank]
    processes(monkeypatch, rank, 2)
    monkeypatch.setattr(batches, "gather", lambda x: everybody)
    assert torch.equal(torch.cat(own), everybody[rank])
    found = batches.over_all(lambda x: x - x.mean(), own)
    assert [x.tolist() for x in found] == expected


def test_over_all_where_processes_have_unequally_many(monkeypatch):
    everybody = [t([3]), t([1, 1, 1]), t([2, 4])]  # the mean is 2
    processes(monkeypatch, 2, 3)
    monkeypatch.setattr(batches, "gather", lambda x: everybody)
    (found,) = batches.over_all(lambda x: x - x.mean(), [everybody[2]])
    assert found.tolist() == [0, 2]


def test_mean_of_all(monkeypatch):
    assert batches.mean_of_all([t([1, 2]), t([6])]) == 3, "over the entries, not 3.75 of means"
    assert batches.mean_of_all([torch.tensor([True, False, True]), torch.tensor([True])]) == .75
    assert batches.mean_of_all([torch.tensor([4, 5])]) == 4.5
    assert isinstance(batches.mean_of_all([t([1])]), float), "a number that JSON can hold"
    monkeypatch.setattr(batches, "gather", lambda x: [x, torch.tensor([9., 9., 9.])])
    assert batches.mean_of_all([t([1, 2]), t([6])]) == 6, "36 / 6, all processes together"


# ---------------------------------------------------------------------------- one step


def two_weights(**momentum):
    a, b = t([1.]).requires_grad_(), t([1.]).requires_grad_()
    return a, b, torch.optim.SGD([{"params": [a], "lr": 7.}, {"params": [b], "lr": 9.}], **momentum)


def test_one_step_reaches_every_group_and_clips_their_common_norm():
    # loss 3 a + 4 b: the gradient (3, 4) has norm 5; clipped to 1 it is (.6, .8); a step of .5
    a, b, optimizer = two_weights()
    for _ in range(2):  # twice the same step: old gradients are cleared
        with batches.one_step(optimizer, .5, 1.) as step:
            step.add((3 * a).sum())
            step.add((4 * b).sum())
    close(torch.cat([a, b]), [1 - 2 * .3, 1 - 2 * .4], "lr .5 in every group, the gradient norm "
          "clipped to 1")
    assert step.loss == pytest.approx(3 * .7 + 4 * .6), "the sum of the microbatches"
    with batches.one_step(optimizer, .1) as step:
        step.add((3 * a + 4 * b).sum())
    close(torch.cat([a, b]), [.4 - .3, .2 - .4], "a step of .1 (3, 4): old gradients are cleared, "
          "and without max_grad_norm nothing is clipped")


def test_a_small_gradient_is_not_clipped():
    a, b, optimizer = two_weights()
    with batches.one_step(optimizer, 1., 5.5) as step:
        step.add((3 * a + 4 * b).sum())
    close(torch.cat([a, b]), [-2, -3], "the norm 5 is within 5.5: the gradient as it is")


@pytest.mark.parametrize("pieces", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_losses_that_are_added_are_one_loss(pieces):
    x, y = t([[1, 2], [-1, 0], [3, 1], [0, 5]]), t([2, 1, 0, -1])
    weight = t([.5, -.25]).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.)
    # by hand: x w - y = (-2, -1.5, 1.25, -.25), squares 4, 2.25, 1.5625, .0625: mean 1.96875;
    # gradient 2/4 of x^T (x w - y) = (-2 + 1.5 + 3.75, -4 + 1.25 - 1.25) = (3.25, -4)
    with batches.one_step(optimizer, .1) as step:
        for rows in torch.arange(4).split(pieces):
            step.add((x[rows] @ weight - y[rows]).square().mean() * (len(rows) / 4))
    close(step.loss, 1.96875, "the mean over all rows")
    close(weight, [.5 - .1 * 1.625, -.25 + .1 * 2], "a step on the mean over all rows")


def test_the_activations_of_a_microbatch_are_free_after_it():
    a, _, optimizer = two_weights()
    with batches.one_step(optimizer, .1) as step:
        loss = (a * a).sum()
        step.add(loss)
        assert step.loss is None, "not known before all is added, over all processes"
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        assert not step.total.requires_grad


def test_the_backward_pass_rounds_nothing_that_was_made_in_float32():
    """The head's product is in float32 within autocast, and so are its gradients: here the rows of
    x, whose 24 bits bfloat16 would cut to 8."""
    x, head = torch.tensor([[1 / 3, 2 / 7]]), Float32Linear(2, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        with batches.one_step(torch.optim.SGD([head.weight], lr=0.0), 0.0) as step:
            step.add(head(x).sum())
    assert torch.equal(head.weight.grad, x) and not torch.equal(x.bfloat16().float(), x)


@pytest.mark.parametrize("value, slope, text", [
    (math.nan, 1., "^policy loss is NaN"), (math.inf, 1., "^policy loss is NaN or inf"),
    (1., math.nan, "^gradient of the policy loss is NaN"), (1., math.inf, "^gradient of the ")])
def test_what_is_not_finite_leaves_the_weights_as_they_were(value, slope, text):
    class Given(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 0 + value

        @staticmethod
        def backward(context, gradient):
            return gradient * slope

    a, b, optimizer = two_weights(momentum=.9)
    with pytest.raises(FloatingPointError, match=text):
        with batches.one_step(optimizer, .1, 1., "policy loss") as step:
            step.add((3 * b).sum())
            step.add(Given.apply(a).sum())
    assert a.item() == b.item() == 1 and not optimizer.state
    with batches.one_step(optimizer, .1) as step:
        step.add((3 * a + 4 * b).sum())
    close(torch.cat([a, b]), [.7, .6], "the next step knows nothing of it")


def test_an_error_within_a_step_leaves_the_weights_as_they_were():
    a, b, optimizer = two_weights()
    with pytest.raises(RuntimeError, match="the ratio is not 1"):
        with batches.one_step(optimizer, .1) as step:
            step.add((3 * a + 4 * b).sum())
            raise RuntimeError("the ratio is not 1")
    assert a.item() == b.item() == 1


def test_one_step_sums_loss_and_gradients_over_the_processes(monkeypatch):
    def twice(*tensors):  # another process with the same microbatch
        for tensor in tensors:
            tensor *= 2

    monkeypatch.setattr(batches, "sum_over_processes", twice)
    a, b, optimizer = two_weights()
    with batches.one_step(optimizer, .1, 5.) as step:
        step.add((3 * a + 4 * b).sum())
    assert step.loss == 14
    close(torch.cat([a, b]), [.7, .6], "(6, 8) clipped to norm 5, a step of .1 (3, 4): the sum is "
          "clipped, not each one's own")
