"""engine/reward.py: the plain reward model's numbers, for any trunk and for k summaries of a post.

The loss, the normalisation and what a score is are reward.py's, and are tested there.
"""

import copy
import math

import pytest
import torch
from common import (CONFIGS, QUERIES, RESPONSES, build, close, every_architecture, padded, t,
                    table_model, tiny_language_model, two_architectures)
from transformers import GPT2Config

import reward
from engine.reward import RewardModel, final_scores, response_scores

BY_TOKEN = [-7., 1., 2., 3., 4., 5., 6., 7., 8., -9.]  # pad 0 scores -7, EOS 9 scores -9


def table_reward(scores):
    """A reward model whose score at a position is scores[token there], whatever came before."""
    language_model = table_model([[0.] * len(scores)] * len(scores))
    model = RewardModel(language_model)
    with torch.no_grad():
        every = torch.arange(len(scores))[:, None]
        hidden = language_model.transformer(every).last_hidden_state[:, 0].double()
        model.head.weight.copy_(torch.linalg.pinv(hidden) @ t(scores))
    return model


@torch.no_grad()
def test_scores_of_a_response_begin_at_the_end_of_the_post():
    # two responses to each post, Q = 2, T = 3; the last one is one token, the rest is padding
    ids = torch.tensor([[0, 5, 6, 7, 9], [0, 5, 8, 9, 0], [3, 4, 1, 2, 9], [3, 4, 9, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1] * 5, [1, 1, 1, 0, 0]])
    shorter = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1] * 5, [1, 1, 1, 0, 0]])
    real = torch.cat([torch.ones(4, 1).bool(), mask[:, 2:].bool()], 1)
    model = table_reward(BY_TOKEN)
    for k in (1, 2):
        scores = response_scores(model, ids, mask, 3, k)
        assert scores.shape == (4, 4)
        close(scores[real], [5, 6, 7, -9, 5, 8, -9, 4, 1, 2, -9, 4, -9],
              "column 0 is the post's last token, column n the response's n-th", 1e-4)
        close(final_scores(model, ids, mask, 3, k), [-9] * 4, "the last real token of each", 1e-4)
        close(final_scores(model, ids, shorter, 3, k), [7, 8, -9, -9],
              "a response that never ended is scored at its last token", 1e-4)
    close(model.score(ids, shorter), [7, 8, -9, -9], "and so in a row of its own", 1e-4)


def test_the_model_refuses_unequal_shapes():
    model = table_reward(BY_TOKEN)
    ids = torch.tensor([[5, 6, 9], [3, 4, 9]])
    for ask in (model, model.score):
        for wrong in (torch.ones(1, 3), torch.ones(2, 1), torch.ones(1, 2, 3)):
            with pytest.raises(ValueError, match=r"input_ids \(2, 3\), attention_mask \("):
                ask(input_ids=ids, attention_mask=wrong.long())


# ---------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("width, copies, std", [(3, 100, .5), (128, 10, .088045)])
def test_head_init(width, copies, std):
    language_model = build(GPT2Config(vocab_size=4, n_embd=width, n_layer=0, n_head=1,
                                      n_positions=4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [RewardModel(language_model) for _ in range(copies)]
    assert all((model.head.bias == 0).all() for model in models), "the bias of the head starts at 0"
    weights = torch.cat([model.head.weight.detach().flatten() for model in models])
    assert abs(weights.std() / std - 1) < .12, (  # of 300 numbers: known to 4 %
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
    assert "reference_mean" not in dict(model.named_parameters()), "no gradient step moves it"
    trunk = sum(parameter.numel() for parameter in language_model.base_model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == trunk + 32 + 1, (
        "trunk + head of d weights and a bias; the language model's own head is dropped")


def test_head_and_mean_are_on_the_device_of_the_trunk():
    with torch.device("meta"):  # stands for a GPU
        language_model = build(CONFIGS["gpt2"]())
    model = RewardModel(language_model)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@two_architectures
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
        scores = model.score(ids, mask)
        for parameter in language_model.parameters():
            parameter.add_(1)
        assert torch.equal(model.score(ids, mask), scores), "and the other way round"


@two_architectures
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


def reward_model(architecture):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = RewardModel(tiny_language_model(architecture))
    with torch.no_grad():
        model.head.bias.fill_(.25)
        model.reference_mean.fill_(1.25)
    return model


@every_architecture
@torch.no_grad()
def test_scores_are_those_of_the_plain_reward_model(architecture):
    """At every real position, in padded batches; with padding in the middle as well."""
    model, plain = reward_model(architecture), reward.RewardModel(tiny_language_model(architecture))
    plain.load_state_dict(model.state_dict())
    for left, right, pad_id in ((0, 0, 0), (3, 1, 2)):
        ids, mask, _, width = padded(QUERIES, RESPONSES, left, right, pad_id)
        real = mask.bool()
        close(model(ids, mask)[real], plain(ids, mask)[real], "head(hidden) - reference_mean", 1e-6)
        close(model.score(ids, mask), plain.score(ids, mask), "at the last real token", 1e-6)
        for row, (query, response) in enumerate(zip(QUERIES, RESPONSES)):
            alone = torch.tensor([query + response])
            hidden = tiny_language_model(architecture).base_model(alone).last_hidden_state[0]
            expected = hidden @ model.head.weight[0] + .25 - 1.25
            close(model(ids, mask)[row][real[row]], expected, "attention mask, position ids", 1e-5)
    ids, mask = torch.tensor([[5, 6, 0, 0, 18, 19, 2]]), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    expected = model.score(ids[mask.bool()][None], torch.ones(1, 5).long())
    close(model.score(ids, mask), expected, "attention mask not passed on to the trunk?", 1e-5)


@every_architecture
def test_saved_and_loaded_the_scores_are_identical(architecture, tmp_path):
    """By either of the two houses: the files are the same."""
    model = reward_model(architecture)
    ids, mask, _, _ = padded(QUERIES, RESPONSES, 1, 1)
    folder = tmp_path / "run" / "reward_model"
    for place in (folder, str(folder)):  # a path or a string; again into the same folder
        model.save_pretrained(place)
        for cls in (RewardModel, reward.RewardModel):
            loaded = cls.from_pretrained(place)
            with torch.no_grad():
                assert torch.equal(loaded.score(ids, mask), model.score(ids, mask)), (
                    "other scores after loading: is reference_mean saved? the head?")
            assert type(loaded) is cls and loaded.reference_mean == 1.25
            assert not any(module.training for module in loaded.modules()), "loaded in eval mode"
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin")) + list(
        folder.glob("*.pt")), "weights are safetensors"
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert parameter.requires_grad, "a loaded model can be trained on (the critic)"


@two_architectures
@torch.no_grad()
def test_a_copy_is_the_same_model_and_a_separate_one(architecture):
    model = reward_model(architecture)
    critic = copy.deepcopy(model)
    ids, mask, _, _ = padded(QUERIES, RESPONSES)
    real = mask.bool()
    scores = model(ids, mask)
    assert torch.equal(critic(ids, mask)[real], scores[real]), (
        "the critic starts as the reward model: trunk, head and reference_mean")
    for parameter in critic.parameters():
        parameter.add_(1)
    assert torch.equal(model(ids, mask)[real], scores[real]), "training the critic moved the scores"


def test_a_preference_reaches_trunk_and_head():
    model = reward_model("llama")
    ids, mask, _, width = padded(QUERIES, RESPONSES)
    chosen, rejected = final_scores(model, ids, mask, width).chunk(2)
    reward.preference_loss(chosen, rejected).backward()
    for name, parameter in model.named_parameters():
        if name != "head.bias":  # it shifts both scores of a pair: no gradient
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.head.bias.grad.abs() < 1e-7, "the bias is no part of any difference"
