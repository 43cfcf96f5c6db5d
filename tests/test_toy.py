"""The tiny world: the labeler's taste is what the docstring says, and the world is honest."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import toy
from tldr import DataError

POSTS = toy.make_posts(60, seed=3)
POST = {  # written out, so that qualities can be worked by hand
    "subreddit": "legaladvice", "title": "My boss sold my car, should I sue?",
    "post": "It was late. I feel angry. My boss sold my car. Should I sue? Why do I feel angry? "
            "Rent is due.",
    "facts": {"who": "boss", "did": "sold", "what": "car", "feels": "angry", "asks": "sue"},
    "asides": ["It was late.", "Rent is due."],
}


@pytest.mark.parametrize("summary, quality", [
    ("My boss sold my car. I feel angry. Should I sue?", 5.0),  # five facts, 11 words
    ("My boss sold my car.", 3.0),
    ("My boss broke my car.", 0.0),  # two right, one wrong: 2 - 2
    ("I feel hurt.", -2.0),
    ("My boss sold my car. My boss sold my car.", 2.5),  # said twice: 3 - 1/2
    ("I feel angry. My boss sold my car.", 3.5),  # 1 + 3, out of order - 1/2
    ("My boss sold my car. Rent is due.", 2.5),  # an aside of the post - 1/2
    ("My boss sold my car. It was raining.", 2.0),  # an aside of another post - 1
    ("My boss car sold my.", -0.75),  # no sentence
    ("My boss sold my car. I feel angry. Should I sue? Rent is due.", 4.35),  # 3 words over: -.15
    ("", 0.0),
])
def test_taste_by_hand(summary, quality):
    assert toy.true_quality(POST, summary) == pytest.approx(quality)


def test_ideal_is_above_the_reference_and_every_corruption():
    for i, post in enumerate(POSTS):
        ideal, draw = toy.ideal_summary(post), random.Random(i)
        words = ideal.split()
        clauses = [clause.format(**post["facts"]) for clause in toy.CLAUSES.values()]
        name = draw.choice(list(toy.FACTS))
        swapped = draw.choice([value for value in toy.FACTS[name] if value != post["facts"][name]])
        shuffled = draw.sample(words, len(words))
        corruptions = [
            post["summary"], toy.reference_summary(post, 99), ideal + " " + ideal, post["post"], "",
            ideal.replace(post["facts"][name], swapped), " ".join(clauses[::-1]),
            " ".join(shuffled) if shuffled != words else "x",
            toy.ideal_summary(next(p for p in POSTS if p["facts"] != post["facts"])),
            *(" ".join(words[:k] + words[k + 1:]) for k in range(len(words))),  # a word dropped
            *(ideal.replace(clause, "", 1) for clause in clauses),  # a clause dropped
            *(f"{ideal} {clause}" for clause in clauses),  # a clause said twice
            ideal + " " + draw.choice(toy.ASIDES), ideal.upper()[::-1], "?!.", "\n", "a" * 10_000]
        assert toy.true_quality(post, ideal) == 5.0
        for text in corruptions:
            quality = toy.true_quality(post, text)
            assert math.isfinite(quality) and quality < 5, text


def test_same_seed_same_world_and_global_random_state_untouched():
    state, torch_state = random.getstate(), torch.get_rng_state()
    settings = SimpleNamespace(seed=0, toy_held_out=7, toy_comparisons=80, toy_posts=30)
    parts = toy.make_data(settings)
    assert [len(part) for part in parts] == [30, 7, 80, 10]  # an eighth of the comparisons
    assert len({post["post"] for part in parts for post in part}) == 127, "a post in two parts"
    assert toy.make_data(settings) == parts != toy.make_data(SimpleNamespace(
        **{**vars(settings), "seed": 1}))
    assert toy.reference_summary(POST, 1) == toy.reference_summary(POST, 1)
    assert len({toy.reference_summary(POST, seed) for seed in range(30)}) > 3
    comparisons = [toy.make_comparisons(POSTS, ["x"] * 10, ["y"] * 5, "s") for _ in range(2)]
    assert comparisons[0] == comparisons[1]
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


def test_posts_are_different_and_hold_their_facts_among_asides():
    assert len({post["post"] for post in POSTS}) == len(POSTS)
    for post in POSTS:
        assert all(fact in post["title"] + post["post"] for fact in post["facts"].values())
        assert all(aside in post["post"] for aside in post["asides"])
        assert set(post) >= {"subreddit", "title", "post", "summary"}


def test_references_are_imperfect_in_the_ways_announced():
    posts = toy.make_posts(1500, seed=8)
    wrong = terse = 0
    for post in posts:
        assert post["summary"] != toy.ideal_summary(post)
        terse += post["summary"].count(".") == 1 and "?" not in post["summary"]
        first = post["summary"].split(".")[0].split()  # My who did my what
        wrong += first[1] != post["facts"]["who"]
    # Terse by choice .5, by forgetting .5 * .25^2 * .65 = .02. An ideal one is written again; it
    # has chance .5 * .75^2 * .65 * .96^5 = .149. (.5 + .02) / (1 - .149) = .611; 4 s.e. = .05
    assert terse / 1500 == pytest.approx(0.611, abs=0.05)
    assert wrong / 1500 == pytest.approx(0.04, abs=0.021)


def test_labels_follow_bradley_terry():
    # gap = 3 - 0 = 3: P = sigmoid(3 / NOISE)
    rng = random.Random(0)
    chosen = sum(toy.compare(POST, "My boss sold my car.", "My boss broke my car.", "ab", rng)
                 ["chosen"] == "My boss sold my car." for _ in range(4000)) / 4000
    assert chosen == pytest.approx(1 / (1 + math.exp(-3 / toy.NOISE)), abs=0.03)
    row = toy.compare(POST, "I feel hurt.", "My boss sold my car.", ("p", "q"), rng)
    assert dict(zip(("chosen", "rejected"), row["policies"]))["chosen"] == (
        "p" if row["chosen"] == "I feel hurt." else "q"), "policies must follow the summaries"
    assert row["gap"] == (-5 if row["chosen"] == "I feel hurt." else 5)


def test_a_biased_labeler_pays_for_each_word():
    # The longer one has an aside of another post, -1, in three words too many, -0.15
    shorter, longer = toy.ideal_summary(POST), toy.ideal_summary(POST) + " Nothing else happened."
    rng, longer_wins = random.Random(0), 0
    assert toy.true_quality(POST, longer) == pytest.approx(5 - 1 - 3 * 0.05)
    for _ in range(4000):
        row = toy.compare(POST, shorter, longer, ("p", "q"), rng, length_bias=1.0)
        sign = 1 if row["chosen"] == shorter else -1
        longer_wins += sign < 0
        assert abs(row["gap"] - sign * 1.15) < 1e-9, "the taste itself is what it was"
        assert abs(row["log_odds"] - sign * (1.15 - 3) / toy.NOISE) < 1e-9
    assert longer_wins / 4000 == pytest.approx(0.670758, abs=0.03)  # sigmoid(1.85 / 2.6)
    (row,) = toy.make_comparisons([POST], [longer], [longer + "!"], 0, length_bias=0.4)
    assert abs(row["log_odds"]) == pytest.approx(0.75 / toy.NOISE), "no word more, taste alone"


def test_label_ceiling_counts_the_likelier_label():
    # sigmoid(1) = .731059, sigmoid(2) = .880797, whichever label was drawn
    assert toy.label_ceiling([{"log_odds": 1.0}, {"log_odds": -2.0}]) == pytest.approx(0.805928)


def test_pairs_that_differ_in_facts_only():
    ideal, swapped = toy.swapped_fact_pairs(POSTS, 0)
    assert ideal == list(map(toy.ideal_summary, POSTS))
    assert toy.swapped_fact_pairs(POSTS, 0)[1] == swapped != toy.swapped_fact_pairs(POSTS, 1)[1]
    draw = random.Random(4)
    for post, text in zip(POSTS, swapped):
        assert toy.true_quality(post, text) == 2.0, "four facts right, one wrong: 4 - 2"
        summary, confusion = toy.confused_pair(post, draw)
        assert summary != confusion and len(summary.split()) == len(confusion.split())
        assert [c for c, _ in toy.read_summary(summary)] == [
            c for c, _ in toy.read_summary(confusion)]


def test_nobody_waits_for_a_draw_that_does_not_come(monkeypatch):
    # a writer who got who, did and what wrong and left out the rest: no draw can differ, and such
    # pairs are left out. One right fact is enough
    for text, differs in (("My sister hid my couch.", False), ("My sister hid my car.", True)):
        monkeypatch.setattr(toy, "write_summary", lambda post, rng, terse: text)
        summary, confusion = toy.confused_pair(POST, random.Random(0))
        assert summary == text and (confusion != text) == differs
        assert confusion.startswith("My sister hid my ")
        assert len(toy.make_comparisons([POST], [], [], "seed")) == differs
    monkeypatch.setattr(toy, "write_summary", lambda post, rng, terse: toy.ideal_summary(post))
    assert toy.reference_summary(POST, 0) == toy.ideal_summary(POST)  # an end, after DRAWS


@pytest.mark.parametrize("who, posts", [
    (("boss", "sister"), 720),  # two people, one pair of asides, six sentences in any order: 1440
    (("boss",) * 4, 0)])  # one value four times: more posts by count, and no more that differ
def test_nobody_waits_for_posts_that_do_not_come(who, posts, monkeypatch):
    monkeypatch.setattr(toy, "FACTS", {"who": who, "did": ("sold",), "what": ("car",),
                                       "feels": ("hurt",), "asks": ("sue",)})
    monkeypatch.setattr(toy, "WRONG", 0)  # there is no other value to get wrong
    monkeypatch.setattr(toy, "ASIDES", toy.ASIDES[:2])
    monkeypatch.setattr(toy, "DRAWS", 3 if not posts else toy.DRAWS)
    most = toy.number_of_posts() // 2
    assert most == len(who) * 720 // 2
    assert len({post["post"] for post in toy.make_posts(posts, 0)}) == posts
    with pytest.raises(DataError, match=f"can't give {most + (posts > 0)} different posts, at most "
                                        f"{most}: lower toy_"):
        toy.make_posts(most + (posts > 0), 0)


def test_what_is_compared_and_by_whom():
    rows = toy.make_comparisons(POSTS[:3], ["My boss.", "I."], ["It."], 0)
    texts = [dict(zip(row["policies"], (row["chosen"], row["rejected"]))) for row in rows]
    assert {rows[0]["chosen"], rows[0]["rejected"]} == {"My boss.", "It."}
    assert texts[0].keys() == {"sft"} and texts[1] == {"sft": "I.", "ref": POSTS[1]["summary"]}
    assert texts[2].keys() == {"human", "confused"} and [row["post"] for row in rows] == POSTS[:3]


def test_fact_accuracy_counts_stated_facts():
    accuracy = toy.fact_accuracy([POST, POST], ["My boss sold my car. I feel hurt.",
                                                "My boss broke my car. Nonsense."])
    assert accuracy == {"who": 1.0, "did": 0.5, "what": 1.0, "feels": 0.0, "asks": 0.0}


def test_tokenizer_gives_every_text_back_and_reloads(tmp_path):
    tokenizer = toy.make_tokenizer([f" {post['post']}" for post in POSTS])
    tokenizer.save_pretrained(tmp_path)
    for some in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (POST["post"], "naïve 💔 \t\n\n TL;DR: <x>"):
            assert some.decode(some(text, add_special_tokens=False)["input_ids"]) == text
        assert some.eos_token_id != some.pad_token_id
