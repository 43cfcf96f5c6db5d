"""The paper's figures: what they compute, by pencil and by brute force; slow: what they show."""

import itertools
import json
import math
import random
import statistics

import pytest
import torch

import toy
from engine.report import BLACK, BLUE, GREEN
from figures import make as figures
from figures.drawing import Panel, draw_lines
from lm import pad

Figure = pytest.importorskip("matplotlib.figure").Figure
torch.set_num_threads(1)


# ---------------------------------------------------------------------------- ROUGE-L


@pytest.mark.parametrize("summary, reference, f1", [
    ("police kill the gunman", "police killed the gunman", 0.75),
    ("the gunman kill police", "police killed the gunman", 0.50),
    ("a c x e", "a b c d e f", 0.6),  # P = 3/4, R = 3/6
    ("one and the same", "one and the same", 1.0),
    ("nothing of it", "in common", 0.0), ("", "a b", 0.0), ("a b", "", 0.0), ("", "", 0.0)])
def test_rouge_l_by_pencil(summary, reference, f1):
    assert figures.rouge_l(summary, reference) == pytest.approx(f1)


def test_rouge_l_against_all_subsequences():
    def subsequences(words):
        return {tuple(itertools.compress(words, keep))
                for keep in itertools.product([0, 1], repeat=len(words))}

    rng = random.Random(0)
    for _ in range(50):
        ours, theirs = ([rng.choice("abc") for _ in range(rng.randint(1, 6))] for _ in "xy")
        common = max(map(len, subsequences(ours) & subsequences(theirs)))
        expected = 2 * common / (len(ours) + len(theirs))
        assert figures.rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(expected)


# ---------------------------------------------------------------------------- best of n


def test_best_of_n_by_pencil():
    proxy, gold = torch.tensor([[0.1, 0.4, 0.2, 0.9]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    for n, expected in ((1, 1.5), (2, 7 / 6), (3, 0.5), (4, 0.0)):
        assert figures.expected_best_of(n, proxy, gold) == pytest.approx(expected)


def test_best_of_n_is_the_mean_over_all_subsets():
    generator = torch.Generator().manual_seed(0)
    proxies, golds = (torch.rand(3, 6, generator=generator) for _ in "xy")
    for n in range(1, 7):
        picked = [gold[max(subset, key=proxy.__getitem__)].item()
                  for proxy, gold in zip(proxies, golds)
                  for subset in itertools.combinations(range(6), n)]
        assert figures.expected_best_of(n, proxies, golds) == pytest.approx(
            statistics.fmean(picked))


# ---------------------------------------------------------------------------- what is drawn


def drawn(rows, x, keys):
    """What stands on an axis: {label: (x, y, half of the interval)}."""
    axis = Figure().subplots()
    names = [*keys, *(row["line"] for row in rows if "line" in row)]
    draw_lines(axis, Panel(rows, x, keys, dict.fromkeys(names, BLACK), {}))
    return {bar.get_label(): (*(list(data) for data in bar[0].get_data()),
                              [(top - bottom) / 2 for (_, bottom), (_, top)
                               in bar[2][0].get_segments()])
            for bar in axis.containers}


def test_a_line_is_the_mean_over_seeds_with_its_standard_error():
    rows = [{"seed": seed, "line": "PPO", "width": width, "preferred": preferred}
            for width, values in ((64, (0.7, 0.8, 0.9)), (32, (0.5, 0.5, 0.5)))
            for seed, preferred in enumerate(values)]
    lines = drawn(rows, "width", ["preferred"])
    assert list(lines) == ["PPO"]
    x, y, error = lines["PPO"]
    assert x == [32, 64] and y == pytest.approx([0.5, 0.8])
    assert error == pytest.approx([0, 0.1 / math.sqrt(3)])


def test_points_of_unequal_x_are_averaged_where_they_belong_together():
    rows = [{"seed": seed, "point": point, "kl": kl, "true": true}
            for seed, point, kl, true in ((0, "a", 1.0, 0.4), (1, "a", 3.0, 0.6),
                                          (0, "b", 9.0, 0.1), (1, "b", 11.0, 0.3))]
    x, y, _ = drawn(rows, "kl", ["true"])["true"]
    assert x == [2, 10] and y == pytest.approx([0.5, 0.2])


def test_several_rows_of_a_seed_count_as_one():
    # means 2 and 6 of the two seeds: 4 +- 2.8284 / sqrt(2); four rows apart would be +- 1.29
    rows = [{"seed": seed, "step": step, "point": 0, "reward": reward}
            for seed, step, reward in ((0, 0, 1.0), (0, 1, 3.0), (1, 0, 5.0), (1, 1, 7.0))]
    x, y, error = drawn(rows, "step", ["reward"])["reward"]
    assert (x, y) == ([0.5], [4.0]) and error == pytest.approx([2])


def test_two_keys_are_two_lines_of_their_own_colours():
    rows = [{"n": n, "line": line, "true": 0.1 * n} | ({"predicted": 0.2 * n} if sees else {})
            for n in (1, 2) for line, sees in (("reward model", True), ("longest", False))]
    assert set(drawn(rows, "n", ["predicted", "true"])) == {
        "predicted, reward model", "true, reward model"}  # longest predicts nothing
    assert set(drawn(rows, "n", ["true"])) == {"reward model", "longest"}


def test_a_rate_over_nothing_and_a_stage_without_rows_are_not_drawn():
    assert drawn([], "step", ["loss"]) == {}
    rows = [{"step": 1, "true_quality": None}, {"step": 2, "true_quality": 0.5}]
    assert drawn(rows, "step", ["true_quality"])["true quality"][:2] == ([2], [0.5])


def test_the_caller_says_which_colour_and_lines_of_one_colour_differ():
    rows = [{"n": n, "line": line, "true": n, "predicted": n} for n in (1, 2) for line in "ab"]

    def shown(keys, colors):
        axis = Figure().subplots()
        draw_lines(axis, Panel(rows, "n", keys, colors, {}))
        return {bar.get_label(): (bar[0].get_color(), bar[0].get_linestyle())
                for bar in axis.containers}

    # several keys: the key decides; one: the line does
    assert shown(["predicted", "true"], {"predicted": BLUE, "true": GREEN}) == {
        "predicted, a": (BLUE, "-"), "true, a": (GREEN, "-"),
        "predicted, b": (BLUE, "--"), "true, b": (GREEN, "--")}
    assert shown(["true"], {"a": BLUE, "b": GREEN}) == {"a": (BLUE, "-"), "b": (GREEN, "-")}
    with pytest.raises(KeyError, match="b"):  # none is guessed
        shown(["true"], {"a": BLUE})


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_pictures_in_the_folder_can_be_drawn_again_from_their_numbers(name, tmp_path):
    """Each line has a colour, and what is drawn is what was written."""
    _, title, panels = figures.FIGURES[name]
    rows = json.loads((figures.HERE / f"{name}.json").read_text(encoding="utf-8"))
    figures.write_figure(tmp_path / name, rows, title, panels)
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) == rows


# ---------------------------------------------------------------------------- the tiny world


@pytest.fixture(scope="module")
def world():
    """A world without training, small enough for a fast test."""
    world = figures.World.__new__(figures.World)
    posts = toy.make_posts(40, 0)
    world.seed, world.posts, world.held_out = 0, posts[:32], posts[32:]
    world.tokenizer = toy.make_tokenizer([post["post"] for post in posts])
    torch.manual_seed(0)
    model = toy.make_model(world.tokenizer, 16)
    world.sft = lambda width: model
    return world


@pytest.mark.parametrize("shared", [False, True])
def test_the_critic_can_be_another_one_than_a_copy_of_the_reward_model(world, shared):
    model, made = figures.RewardModel(world.sft(16)), []

    def critic(policy):
        made.append(figures.RewardModel(policy))
        if shared:
            made[0].trunk = policy.base_model
        return made[0]

    small = {"ppo_episodes": 8, "ppo_batch_size": 8, "ppo_epochs": 1, "response_length": 8}
    policy, trained, log = world.ppo(16, model, critic, **small)
    assert trained is made[0] and len(log) == 1
    assert (trained.trunk is policy.base_model) == shared
    assert all(p.grad is None for p in model.parameters()), "the reward model is not trained"
    _, default, _ = world.ppo(16, model, **small)
    head = default.head.weight - model.head.weight
    assert default is not model and head.abs().max() < 1e-2, "one step from the reward model"


def test_a_point_of_fig_5_is_of_what_was_sampled(world, monkeypatch):
    """Sampled are the references here, so that nothing beats anything, and each length is known."""
    model, posts = figures.RewardModel(world.sft(16)), world.held_out
    ids, _ = pad(world.encode(posts)[1], world.tokenizer.pad_token_id, left=False)
    monkeypatch.setattr(figures.ppo, "sample", lambda *_, **__: ids)
    point = figures.measure_policy(world, model, world.sft(64))
    words = statistics.fmean(len(post["summary"].split()) for post in posts)
    assert point == pytest.approx({"kl_per_summary": 0, "predicted": 0.5, "true": 0.5,
                                   "words": words}, abs=1e-4)


def test_the_price_of_a_word_is_taken_off_a_reward(world):
    """Five words cost 3 * 0.3 more than two, behind any post; full stops and EOS cost nothing."""
    model = figures.RewardModel(world.sft(16))
    control = figures.WithoutLength(model, 0.3, world.tokenizer)
    posts = world.held_out  # of several lengths, so that shorter ones are padded
    short, long = (world.score(model, posts, [text] * len(posts))
                   - world.score(control, posts, [text] * len(posts))
                   for text in ("My boss.", "My boss sold my car."))
    assert (long - short).tolist() == pytest.approx([0.9] * len(posts), abs=1e-4)
    same = world.score(figures.WithoutLength(model, 0.0, world.tokenizer), posts)
    assert torch.equal(same, world.score(model, posts)), "without a price it is the model"


def test_each_seed_is_drawn_thin_behind_the_mean():
    rows = [{"seed": seed, "kl": kl, "true": true}
            for seed, kl, true in ((0, 1.0, 0.4), (0, 2.0, 0.8), (1, 1.0, 0.6), (1, 2.0, 0.2))]
    axis = Figure().subplots()
    draw_lines(axis, Panel(rows, "kl", ["true"], {"true": GREEN}, {}, each_seed=True))
    thin = [line for line in axis.get_lines() if line.get_linewidth() < 1]
    assert sorted(list(line.get_ydata()) for line in thin) == [[0.4, 0.8], [0.6, 0.2]]
    assert {line.get_color() for line in thin} == {GREEN}
    (mean,) = axis.containers
    assert list(mean[0].get_ydata()) == pytest.approx([0.5, 0.5])


def test_a_name_that_is_no_figure_and_a_missing_matplotlib_are_one_line(
        tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        figures.main(["no-such"])
    assert "over-optimization" in capsys.readouterr().err
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    monkeypatch.setattr(figures, "multiprocessing", None)  # before any work
    with pytest.raises(SystemExit, match="matplotlib is not installed: pip install"):
        figures.main(["all", "--output_dir", str(tmp_path)])


# ---------------------------------------------------------------------------- what they show


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    figures.main(["all", "--quick", "--output_dir", str(folder)])
    return folder


def by_seeds(folder, name, by, key, **wanted):
    """{point: mean of key over the seeds}."""
    points = {}
    for row in json.loads((folder / f"{name}.json").read_text()):
        if all(row[k] == value for k, value in wanted.items()):
            points.setdefault(row[by], []).append(row[key])
    return {point: statistics.fmean(values) for point, values in points.items()}


@pytest.mark.slow
def test_every_figure_has_its_picture_and_its_points(quick):
    for name in figures.FIGURES:
        assert (quick / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        rows = json.loads((quick / f"{name}.json").read_text())
        assert {row["seed"] for row in rows} == {0, 1}
    assert {"seed", "kl_beta", "kl_per_summary", "predicted", "true"} <= json.loads(
        (quick / "over-optimization.json").read_text())[0].keys()


@pytest.mark.slow
def test_over_optimization_the_truth_falls_while_the_prediction_is_at_its_maximum(quick):
    kl, predicted, true = (by_seeds(quick, "over-optimization", "point", key)
                           for key in ("kl_per_summary", "predicted", "true"))
    last = max(kl, key=kl.get)
    assert predicted[last] == max(predicted.values())
    assert true[last] < max(true.values()) - 0.1


@pytest.mark.slow
def test_accuracy_grows_with_data_and_stays_below_the_ceiling(quick):
    accuracy = by_seeds(quick, "reward-data", "comparisons", "accuracy", line="width 64")
    ceiling = by_seeds(quick, "reward-data", "comparisons", "accuracy", line="who knows the taste")
    assert accuracy[500] < accuracy[4000] < ceiling[4000]


@pytest.mark.slow
def test_best_of_n_the_prediction_grows_and_only_the_labelers_pick_keeps_up(quick):
    weak = f"reward model, {figures.WEAK} comparisons"
    predicted = by_seeds(quick, "best-of-n", "n", "predicted", line=weak)
    assert list(predicted.values()) == sorted(predicted.values())
    best = by_seeds(quick, "best-of-n", "n", "true", line="labeler")
    for line in (weak, "ROUGE-L", "longest", f"mean of five, {figures.WEAK} comparisons",
                 f"worst of five, {figures.WEAK} comparisons"):
        true = by_seeds(quick, "best-of-n", "n", "true", line=line)
        assert true[64] < best[64]
        assert true[1] == pytest.approx(best[1]), "the best of one is the same, whoever picks it"


@pytest.mark.slow
def test_a_labeler_who_likes_length_gets_it_and_the_control_does_not(quick):
    words, predicted, true = (
        {line: by_seeds(quick, "length-bias", "update", key, line=f"{line}, beta 0.05")
         for line in ("unbiased labeler", "biased labeler", "biased, length taken out")}
        for key in ("words", "predicted", "true"))
    biased = words["biased labeler"]
    assert biased[40] > biased[0] + 4
    for line in ("unbiased labeler", "biased, length taken out"):
        assert words[line][40] < biased[40] - 2
    # what is predicted is worth the less the more the length was paid for
    outrun = {line: predicted[line][40] - true[line][40] for line in true}
    assert max(outrun, key=outrun.get) == "biased labeler"


@pytest.mark.slow
def test_what_came_after_beats_imitation_each_in_its_own_way(quick):
    preferred = {line: by_seeds(quick, "contrast", "line", "preferred", line=line)[line]
                 for line in ("SFT", "best of 16", "PPO", "RLOO", "DPO")}
    sft, rloo = preferred["SFT"], preferred["RLOO"]  # on these two seeds RLOO does not get far
    assert sft < 0.5 and sft < rloo
    assert min(preferred[line] for line in ("best of 16", "PPO", "DPO")) > 0.6
    assert len(set(preferred.values())) == 5, "two that are the same are one model"


def committed(name):
    return json.loads((figures.HERE / f"{name}.json").read_text(encoding="utf-8"))


def told(rows, key, **wanted):
    """The mean over the seeds ± its standard error, as a README writes it."""
    numbers = [row[key] for row in rows if all(row[k] == value for k, value in wanted.items())]
    assert len(numbers) == len({row["seed"] for row in rows}), "one for each seed"
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{statistics.fmean(numbers):.3f} ± {error:.3f}".replace("0.", ".")


def test_the_committed_fig_1_is_named_as_it_is():
    """Not as in the paper: width is what PPO needs, and imitation does not gain from it."""
    rows = committed("win-rate")
    preferred = {line: [statistics.fmean(row["preferred"] for row in rows if row["line"] == line
                                         and row["width"] == width) for width in (16, 32, 64)]
                 for line in ("SFT", "PPO")}
    assert preferred["PPO"][0] < preferred["SFT"][0] - 0.1
    assert preferred["PPO"][2] > preferred["SFT"][2] + 0.4
    assert max(preferred["SFT"]) - min(preferred["SFT"]) < 0.02
    for line, numbers in preferred.items():
        assert f"{line} " + ", ".join(f"{x:.2f}"[1:] for x in numbers) in README


def test_the_committed_best_of_n_is_named_as_it_is():
    """The longest sample is as good as the best reward model's pick at n = 16, and better beyond;
    only the labeler's own pick goes on rising."""
    rows = committed("best-of-n")
    longest, model, labeler = (
        [statistics.fmean(row["true"] for row in rows if row["line"] == line and row["n"] == n)
         for n in (16, 64, 256)] for line in ("longest", "reward model, 12000 comparisons",
                                              "labeler"))
    assert abs(longest[0] - model[0]) < 0.01
    assert longest[1] > model[1] + 0.02 and longest[2] > model[2] + 0.1
    assert model == sorted(model, reverse=True) and labeler == sorted(labeler)
    assert max(longest) - min(longest) < 0.01


def test_the_committed_fig_5_rises_and_falls_in_each_seed_but_one():
    ends, kept = {}, 0
    for row in committed("over-optimization"):
        if row["line"] == "end of runs":
            ends.setdefault(row["seed"], []).append((row["kl_per_summary"], row["true"]))
    for points in ends.values():
        true = [preferred for _, preferred in sorted(points)]
        kept += max(true) >= true[0] + 0.05 and true[-1] <= max(true) - 0.10
    assert len(ends) == 6 and kept >= 5


README = (figures.HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, key, line, by, points", [
    ("over-optimization", "true", ["end of runs"], "point",
     ["start", "end of 0.2", "end of 0.05", "end of 0.0"]),
    ("length-bias", "predicted", None, "update", [40]),
    ("length-bias", "true", None, "update", [40]),
    ("best-of-n", "true", None, "n", [16, 64, 256]),
    ("contrast", "preferred", None, "line", None)])
def test_the_numbers_of_the_readme_are_those_of_the_points(name, key, line, by, points):
    rows = committed(name)
    for line in line or dict.fromkeys(row["line"] for row in rows):
        for point in points or [line]:
            assert told(rows, key, **{"line": line, by: point}) in README


def test_the_words_of_labelers_who_pay_for_length():
    rows = committed("length-bias")
    for line in dict.fromkeys(row["line"] for row in rows):
        words = statistics.fmean(row["words"] for row in rows
                                 if row["line"] == line and row["update"] == 40)
        name = line.replace("beta 0.05", "β = 0.05").replace("beta 0.0", "β = 0")
        (shown,) = [row for row in README.split("\n") if row.startswith(f"| {name} |")]
        assert shown.split("|")[2].strip() == f"{words:.1f}"
