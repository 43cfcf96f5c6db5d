"""reward.py on paper: the preference loss, the reward model and its normalisation.

The loss is checked by hand; the model on tiny random trunks of the real architectures, and on a
trunk whose score is a table of the last token.
"""

import math
import random

import pytest
import torch
from transformers import GPT2Config

import reward
from reward import RewardModel, preference_loss
from test_lm import (CONFIGS, QUERIES, RESPONSES, build, close, every_architecture,
                     keeps_types_and_inputs, padded, refused, t, table_model, tiny_language_model)

# ---------------------------------------------------------------------------- preference_loss

CHOSEN, REJECTED = [2, 0, -1], [1, .5, -1]  # differences 1, -.5, 0


def test_preference_loss():
    # log(1 + e^-1) = .313262, log(1 + e^.5) = .974077, log 2 = .693147; their mean is .660162
    close(preference_loss(t(CHOSEN), t(REJECTED)), .660162,
          "-log sigmoid(chosen - rejected), mean over the pairs: 1.9805 is their sum")
    close(preference_loss(t([1]), t([0])), .313262, "1.313262 means that the two are swapped")
    close(preference_loss(t([0]), t([1])), 1.313262, "0.313262 means that the two are swapped")
    close(preference_loss(t([3]), t([3])), math.log(2), "equal scores cost log 2")
    close(preference_loss(t(CHOSEN) + 7, t(REJECTED) + 7), .660162, "scores have no zero")


def test_preference_loss_gradient():
    # -(1 - sigmoid(d)) / 3: -(.268941, .622459, .5) / 3
    chosen, rejected = t(CHOSEN).requires_grad_(), t(REJECTED).requires_grad_()
    preference_loss(chosen, rejected).backward()
    close(chosen.grad, [-.089647, -.207486, -.166667], "-(1 - sigmoid(d)) / number of pairs")
    close(rejected.grad, [.089647, .207486, .166667], "both scores of a pair learn, oppositely")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preference_loss_extremes(dtype):
    for gap, loss, slope in [(200., 0, 0), (-200., 200, -1), (1e4, 0, 0), (-1e4, 1e4, -1)]:
        chosen = t([gap], dtype).requires_grad_()
        value, hint = preference_loss(chosen, t([0], dtype)), "-log(sigmoid(d)): use logsigmoid"
        value.backward()
        close(value, loss, hint)
        close(chosen.grad, [slope], hint)


def test_preference_loss_contract():
    chosen, rejected = torch.tensor([.1, .2, .3]), torch.tensor([.3, .1, .2])
    for wrong in (chosen[:1], chosen[0], chosen[:, None], chosen[None], chosen[:2]):
        refused(preference_loss, {"chosen": wrong, "rejected": rejected}, ["chosen", "rejected"])
        refused(preference_loss, {"chosen": chosen, "rejected": wrong}, ["chosen", "rejected"])
    with pytest.raises(ValueError, match="chosen.*rejected"):  # the mean of nothing is NaN
        preference_loss(chosen[:0], rejected[:0])
    keeps_types_and_inputs(preference_loss, "chosen", "rejected", chosen=chosen, rejected=rejected)


def test_preference_accuracy_takes_no_tie():
    assert reward.preference_accuracy(t(CHOSEN), t(REJECTED)) == pytest.approx(1 / 3), (
        "one hit, one miss, one tie: a tie is not a hit, or a constant model is always right")
    assert reward.preference_accuracy(t([1, 1, 1]), t([1, 1, 1])) == 0
    assert reward.preference_accuracy(t([3, 1, 1, 9]), t([2, 2, 0, 8])) == pytest.approx(.75)


# ---------------------------------------------------------------------------- the model, by table


def table_reward(scores):
    """A reward model whose score at a position is scores[token there], whatever came before."""
    language_model = table_model([[0.] * len(scores)] * len(scores))
    model = RewardModel(language_model)
    with torch.no_grad():
        every = torch.arange(len(scores))[:, None]
        hidden = language_model.transformer(every).last_hidden_state[:, 0].double()
        assert model.head.bias == 0, "the bias of the head starts at 0"
        model.head.weight.copy_(torch.linalg.pinv(hidden) @ t(scores))
    return model


BY_TOKEN = [-7., 1., 2., 3., 4., 5., 6., 7., 8., -9.]  # pad 0 scores -7, EOS 9 scores -9


@torch.no_grad()
def test_the_score_stands_at_the_last_real_token():
    # the query [5, 6] and two padding tokens before it; the response ends with EOS, or never does
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 0], [3, 4, 5, 6, 7, 8, 2, 9],
                        [3, 4, 5, 6, 7, 8, 2, 2], [0, 0, 0, 4, 3, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8, [1] * 8, [0, 0, 0, 1, 1, 0, 0, 0]])
    model = table_reward(BY_TOKEN)
    assert model(ids, mask).shape == (4, 8)
    close(model(ids, mask)[:, 3], [6, 6, 6, 4], "forward scores every position", 1e-4)
    close(model.score(ids, mask), [-9, -9, 2, 3], "score at the last real token: -7 is a padding "
          "token's, 3 or 5 the first token's; no mean, no maximum, no sum over tokens", 1e-4)
    # padding = EOS; and an EOS within the query, which does not end the summary
    ids = torch.tensor([[9, 9, 5, 6, 7, 9, 9, 9], [5, 6, 7, 8, 9, 5, 6, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [1] * 8])
    close(model.score(ids, mask), [-9, 3], "score at the last real token, EOS, not before", 1e-4)
    ids = torch.arange(1, 9).expand(8, 8)
    close(model.score(ids, torch.ones(8, 8).tril()), list(range(1, 9)), "b + 1 real tokens", 1e-4)
    close(model.score(ids, torch.ones(8, 8).triu()), [8] * 8, "b tokens of padding before", 1e-4)


def test_the_model_refuses_unequal_shapes():
    model = table_reward(BY_TOKEN)
    ids, mask = torch.tensor([[5, 6, 9], [3, 4, 9]]), torch.ones(2, 3).long()
    named = ["input_ids", "attention_mask"]
    for ask in (model, model.score):
        for wrong in (mask[:1], mask[:, :1], mask[:, 1:], mask[0], mask[None]):
            refused(ask, {"input_ids": ids, "attention_mask": wrong}, named)
            refused(ask, {"input_ids": wrong, "attention_mask": mask}, named)


@torch.no_grad()
def test_normalize_shifts_the_references_to_mean_zero():
    # references that score 1.5, 2.5, .5, 3.5: mean 2, so they become -.5, .5, -1.5, 1.5
    model = table_reward([0, 1.5, 2.5, .5, 3.5, 4, 1])
    queries, references = [[6], [6, 6, 6], [6, 6], [6]], [[5, 1], [2], [6, 6, 3], [4]]
    reward.normalize(model, queries, references, pad_id=0)
    close(model.reference_mean, 2., "the mean of the references' scores", 1e-4)
    scores = reward.score_summaries(model, queries, references, 0)
    close(scores, [-.5, .5, -1.5, 1.5], "a shift to mean 0, no scaling of the variance, "
          "and each score in its own place", 1e-4)
    pair = reward.score_summaries(model, queries[:2], [[5], [6]], 0)
    close(pair[0] - pair[1], 3., "the difference of 4 and 1 stays 3", 1e-4)
    reward.normalize(model, queries, references, pad_id=0)
    close(model.reference_mean, 2., "normalised a second time, the mean is still 2", 1e-4)
    reward.normalize(model, queries[2:3], references[2:3], pad_id=0)
    close(model.reference_mean, .5, "a reference of .5", 1e-4)


@torch.no_grad()
def test_score_summaries_keeps_the_order():
    model = table_reward(BY_TOKEN)
    draw = random.Random(0)
    queries = [[5] * draw.randrange(1, 5) for _ in range(11)]
    responses = [[draw.randrange(1, 10) for _ in range(draw.randrange(1, 6))] for _ in range(11)]
    for batch_size in (1, 4, 11, 256):
        close(reward.score_summaries(model, queries, responses, 0, batch_size),
              [BY_TOKEN[response[-1]] for response in responses],
              "batches of similar length must not change which score is whose", 1e-4)


@pytest.mark.parametrize("width, copies, std", [(7, 300, .353553), (128, 20, .088045),
                                                (2048, 1, .022092)])
def test_head_init(width, copies, std):
    language_model = build(GPT2Config(vocab_size=4, n_embd=width, n_layer=0, n_head=1))
    torch.manual_seed(0)
    heads = [RewardModel(language_model).head for _ in range(copies)]
    assert all((head.bias == 0).all() for head in heads), "the bias of the head starts at 0"
    # about 2000 numbers: their std is known to 1.6 %
    weights = torch.cat([head.weight.detach().flatten() for head in heads])
    assert abs(weights.std() / std - 1) < .06, (
        f"std {weights.std():.4f}, expected {std}: the *variance* is 1 / (d + 1); "
        "nn.Linear's own is 1 / (3 d)")
    assert abs(weights.mean()) < 4 * std / math.sqrt(len(weights)), "mean 0"
    assert weights.abs().max() > 2.5 * std, "normal, not uniform"


@every_architecture
def test_the_interface_of_a_new_model(architecture):
    language_model = tiny_language_model(architecture)
    model = RewardModel(language_model)
    assert isinstance(model.head, torch.nn.Linear) and model.head.weight.shape == (1, 32)
    assert model.reference_mean.shape == () and model.reference_mean == 0
    assert "reference_mean" in model.state_dict(), "a buffer, or it is lost when saved"
    trunk = sum(parameter.numel() for parameter in language_model.base_model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == trunk + 32 + 1, (
        "trunk + head of d weights and a bias; the language model's own head is dropped, and no "
        "gradient step moves reference_mean")
    with torch.device("meta"):  # stands for a GPU
        language_model = build(CONFIGS[architecture]())
    assert {x.device.type for x in RewardModel(language_model).state_dict().values()} == {"meta"}


@every_architecture
def test_the_trunk_is_a_copy(architecture):
    language_model = build(CONFIGS[architecture]())
    ids, mask, _, _ = padded(QUERIES, RESPONSES)
    model = RewardModel(language_model)
    with torch.no_grad():
        text, scores = language_model(ids).logits, model.score(ids, mask)
        for parameter in model.parameters():
            parameter.mul_(-1).add_(.1)
        assert not torch.equal(model.score(ids, mask), scores)
        assert torch.equal(language_model(ids).logits, text), (
            "changing the reward model changed the language model: copy its trunk")


@every_architecture
def test_scores_have_no_dropout(architecture):
    config = CONFIGS[architecture]()
    for name in vars(config):
        if "drop" in name and not name.endswith("_bias"):
            setattr(config, name, .5)
    language_model = build(config).train()
    model = RewardModel(language_model)
    ids, mask, _, _ = padded(QUERIES, RESPONSES)
    with torch.no_grad():
        assert torch.equal(model.score(ids, mask), model.score(ids, mask)), (
            "one text, two scores: dropout is off everywhere")
    assert language_model.training, "the caller's model was switched to eval mode"


# ---------------------------------------------------------------------------- real architectures


def reward_model(architecture, reference_mean=0.):
    torch.manual_seed(1)
    model = RewardModel(tiny_language_model(architecture))
    with torch.no_grad():
        model.head.bias.fill_(.25)
        model.reference_mean.fill_(reference_mean)
    return model


@every_architecture
@pytest.mark.parametrize("left, right, pad_id", [(0, 0, 0), (0, 3, 2), (3, 1, 2)])
@torch.no_grad()
def test_scores_and_values_do_not_see_the_padding(architecture, left, right, pad_id):
    model = reward_model(architecture, reference_mean=3.)
    ids, mask, query_width, width = padded(QUERIES, RESPONSES, left, right, pad_id)
    scores, values = model.score(ids, mask), model(ids, mask)[:, query_width - 1: -1]
    assert scores.shape == (4,) and values.shape == (4, width)
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES)):  # each alone, no padding
        alone = torch.tensor([query + response])
        hidden = tiny_language_model(architecture).base_model(alone).last_hidden_state[0].double()
        expected = hidden @ model.head.weight[0].double() + .25 - 3
        close(model(alone, torch.ones_like(alone))[0], expected,
              "head(last hidden state) - reference_mean at every position", 1e-5)
        close(scores[row], expected[-1], "the score of a text alone and in a padded batch: "
              "attention mask, position ids, the wrong token, or reference_mean not once?", 1e-5)
        close(values[row, : len(response)], expected[len(query) - 1: -1],
              "the values of a text alone and in a padded batch", 1e-5)
    # transformers guesses a missing attention mask from the position ids, but not in this case
    ids, mask = torch.tensor([[5, 6, 0, 0, 18, 19, 2]]), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    expected = model.score(ids[mask.bool()][None], torch.ones(1, 5).long())
    close(model.score(ids, mask), expected, "attention mask not passed on to the trunk?", 1e-5)


@every_architecture
def test_saved_and_loaded_the_scores_are_identical(architecture, tmp_path):
    model = reward_model(architecture, reference_mean=1.25)
    ids, mask, _, _ = padded(QUERIES, RESPONSES, 1, 1)
    folder = tmp_path / "run" / "reward_model"
    for place in (folder, str(folder)):  # a path or a string; again into the same folder
        model.save_pretrained(place)
        loaded = RewardModel.from_pretrained(place)
        assert torch.equal(loaded.score(ids, mask), model.score(ids, mask)), (
            "other scores after loading: is reference_mean saved? the head?")
    assert loaded.reference_mean == 1.25
    assert not any(module.training for module in loaded.modules()), "loaded in eval mode"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert parameter.requires_grad, "a loaded model can be trained on (the critic)"


@every_architecture
def test_the_preference_loss_reaches_trunk_and_head_and_no_padding(architecture):
    model = reward_model(architecture)
    ids, mask, _, _ = padded(QUERIES, RESPONSES, 2, 2, pad_id=39)
    preference_loss(*model.score(ids, mask).chunk(2)).backward()
    for name, parameter in model.named_parameters():
        if name != "head.bias":  # it shifts both scores of a pair: no gradient
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.head.bias.grad.abs() < 1e-7, "the bias is no part of any difference"
    embedding = next(p.grad for p in model.parameters() if p.shape == (40, 32))
    assert (embedding[39] == 0).all(), "a score depends on the padding token"
