"""The tiny world: posts, imperfect human references, and a labeler whose taste is known.

Read beside it: section 3.1 (summaries of several policies, compared in pairs), 3.3 (the labelers
and how often they agree), appendix C (what the labelers are told).

It stands for r/relationships and r/legaladvice, the people who wrote the TL;DRs there, and the
labelers of the paper. A post tells five key facts (who did what to which thing, how the poster
feels, what they ask) among asides. The labeler wants a short summary that has all five facts and
invents none. Training never sees that taste (`true_quality`), only noisy choices made from it.

What is done differently from the paper, and why:
- The labelers are a formula that slips at random, so that the whole loop runs in a minute, and so
  that the truth is known: whether the reward model or the policy improves is measured, not judged.
- Half of the comparisons are pairs that differ in facts alone (`confused_pair`). The paper needs
  none: its reward model starts from a language model that can read.
- The model is a Llama of 144,000 weights, from scratch, where the paper has GPT-3. There is
  no pretraining, which is why its attention gets a start (`make_model`).

What it can show: the whole loop, that the reward model is a proxy, what the KL penalty is for.
What it can't: anything about language. Sentences have one form each, every fact is one word of
five, and nobody disagrees about what a good summary is: the labelers only slip.
"""

import math
import random
import re
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tldr import DataError


@dataclass
class ToyConfig:
    # The paper prints no size of its training part; 116,722 and 6,447 follow from Table 2
    toy_posts: int = 12800  # posts with references; paper: 116,722 (Table 2)
    toy_comparisons: int = 24000  # posts to compare on; paper: 64,832 (3.2)
    toy_held_out: int = 500  # posts to judge on; paper: 6,447 (Table 2)
    toy_length_bias: float = 0.0  # points of taste for each word more; paper: App. F
    toy_width: int = 64  # d_model; paper: 2048 (1.3B, Table 3)
    toy_layers: int = 2  # layers of the model; paper: 24 (1.3B, Table 3)
    toy_heads: int = 4  # attention heads; paper: 16 (1.3B, Table 3)


# Five values for each fact, so that a guess is right once in five times. One word each, so that
# telling a fact is copying one word of the post, which even a tiny model can learn.
FACTS = {"who": ("landlord", "boss", "sister", "roommate", "husband"),
         "did": ("sold", "broke", "stole", "hid", "lost"),
         "what": ("car", "phone", "guitar", "couch", "passport"),
         "feels": ("angry", "scared", "guilty", "hurt", "confused"),
         "asks": ("leave", "wait", "apologize", "sue", "forgive")}
# The three clauses of a good summary, in the order a reader wants them. Three, and not one, so that
# a summary can be terse, complete or out of order.
CLAUSES = {"event": "My {who} {did} my {what}.", "feeling": "I feel {feels}.",
           "question": "Should I {asks}?"}
# What a post tells beside its facts, and a summary should leave out. Two of eight stand in a post.
ASIDES = ("It was late.", "It was raining.", "Nobody knows.", "We live together.",
          "Rent is due.", "I work nights.", "Dinner was cold.", "Nothing else happened.")
SUBREDDITS = ("relationships", "legaladvice")  # for the look of a prompt: no fact depends on it

# How humans err, as chances. They are set so that imitation can't beat its teachers: of the paper's
# models trained on references the largest, of 13B, wins 43 % against them (Fig. 1), here 45 %.
WRONG = 0.04  # a fact of a reference is another one: rare, as people know their own story
TERSE = 0.5  # it tells the event only: the main fault, as the paper gains in coverage most (Fig. 3)
TELLS = 0.75  # who is not terse tells the feeling, and with the same chance the question
RAMBLES = 0.35  # who is not terse adds an aside
# Of a confused copy each fact is another one with this chance: two of the five on average, so that
# the reward model gets pairs with one difference as well as with several.
MIXED_UP = 0.4
# Where a draw has to differ, so many are made at most. One differs with chance .4 or more, and
# .6**200 = 4e-45; for each post of many different ones the chance is one half.
DRAWS = 200
NOISE = 2.6  # temperature of the labels, in units of taste: 79 % agree with it; paper: 77 % (3.3)

# ---------------------------------------------------------------------------- posts and writers


def number_of_posts():
    """How many different posts there are: facts, two asides, the order of six sentences."""
    return (math.prod(len(values) for values in FACTS.values()) * math.comb(len(ASIDES), 2)
            * math.factorial(len(CLAUSES) + 3))


def draw_post(rng, seed):
    """One post with its reference summary, as make_posts returns them."""
    facts = {name: rng.choice(values) for name, values in FACTS.items()}
    asides = rng.sample(ASIDES, 2)
    # Six sentences in any order: where a fact stands says nothing, it has to be found by reading.
    body = [clause.format(**facts) for clause in CLAUSES.values()]
    # Each fact stands twice in a post, as it would: once to copy from, once to make sure. The title
    # repeats the others, but not the feeling.
    body += [f"Why do I feel {facts['feels']}?", *asides]
    rng.shuffle(body)
    title = "My {who} {did} my {what}, should I {asks}?".format(**facts)
    post = {"subreddit": rng.choice(SUBREDDITS), "title": title, "post": " ".join(body),
            "facts": facts, "asides": asides}
    post["summary"] = reference_summary(post, seed)
    return post


def make_posts(n, seed):
    """n different posts as {"subreddit", "title", "post", "summary"} with the reference as summary.

    "facts" and "asides" are what only the labeler (and a test) may look at. DataError for more
    than half of the posts that there are: up to there, at least every second draw is a new one.
    """
    most = number_of_posts() // 2
    rng, posts = random.Random(f"posts {seed}"), {}
    # About 2 n draws at most are needed. The bound is for lists that an edit made to repeat values.
    for _ in range(DRAWS * n if n <= most else 0):
        if len(posts) == n:
            break
        post = draw_post(rng, seed)
        posts.setdefault(post["post"], post)
    if len(posts) < n:
        raise DataError(f"the tiny world can't give {n} different posts, at most {most}: lower "
                        "toy_posts, toy_comparisons or toy_held_out")
    return list(posts.values())


def make_data(settings):
    """(posts, held out, to compare, to compare held out): lists of different posts. Of those to
    compare, the SFT model writes summaries first."""
    n_compared = settings.toy_comparisons
    sizes = settings.toy_held_out, n_compared // 8, n_compared, settings.toy_posts
    rows = iter(make_posts(sum(sizes), settings.seed))
    held_out, compared_held_out, compared, posts = (list(islice(rows, n)) for n in sizes)
    return posts, held_out, compared, compared_held_out


def ideal_summary(post):
    """All five facts, in order, and nothing else: the ceiling of true_quality."""
    return " ".join(clause.format(**post["facts"]) for clause in CLAUSES.values())


def write_summary(post, rng, terse):
    """A human writer: tells nothing but the event with chance `terse`, mixes up each fact with
    chance WRONG, forgets the feeling or the question, rambles."""
    facts = confuse(post["facts"], rng, WRONG)
    clauses = [CLAUSES["event"]]
    if rng.random() >= terse:
        for name in ("feeling", "question"):
            if rng.random() < TELLS:
                clauses.append(CLAUSES[name])
        aside = rng.choice(post["asides"])
        if rng.random() < RAMBLES:
            clauses.append(aside)
    return " ".join(clause.format(**facts) for clause in clauses)


def confuse(facts, rng, wrong):
    """A copy of the facts with each one replaced by another value with chance `wrong`."""
    confused = dict(facts)
    for name, fact in facts.items():
        if rng.random() < wrong:
            confused[name] = rng.choice([value for value in FACTS[name] if value != fact])
    return confused


def reference_summary(post, seed):
    """An imperfect human's summary: terse, forgetful, sometimes wrong, sometimes rambling."""
    # The post is part of the seed: the same post gets the same reference, wherever it is drawn.
    rng = random.Random(f"reference {seed} {post['title']} {post['post']}")
    for _ in range(DRAWS):
        summary = write_summary(post, rng, TERSE)
        if summary != ideal_summary(post):  # nobody here is perfect
            break
    return summary


def confused_pair(post, rng):
    """A human's summary and the same with some facts mixed up: the weak baseline among the policies
    that are compared (section 3.1 mixes policies too). Without such pairs, which differ in nothing
    but facts, a reward model this small learns form and hardly ever looks at the post.

    One writer in 160,000 got each fact wrong that the summary states. Then nothing in it can be
    mixed up, the two are equal, and make_comparisons leaves them out.
    """
    summary = write_summary(post, rng, terse=0)
    for _ in range(DRAWS):
        confused = confuse(post["facts"], rng, MIXED_UP)
        swap = {post["facts"][name]: confused[name] for name in FACTS}
        # All words at once: one after the other, a swapped word could be swapped again.
        confusion = re.sub(r"\w+", lambda word: swap.get(word[0], word[0]), summary)
        if confusion != summary:
            break
    return summary, confusion


# ---------------------------------------------------------------------------- the labeler

# A clause as a pattern that reads the facts back: "I feel (?P<feels>angry|scared|...)[.]"
GROUPS = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in FACTS.items()}
PATTERNS = {name: re.compile(re.sub("[.?]", r"[\g<0>]", clause).format(**GROUPS))
            for name, clause in CLAUSES.items()}


def read_summary(summary):
    """A list with a pair for each sentence: (clause name, {fact name: what is stated}), or
    (None, sentence) if it is none of the three clauses."""
    sentences = []
    # Up to and with the next end of a sentence; or the rest, which has none.
    for sentence in re.findall(r"[^.?!]*[.?!]|[^.?!]+$", summary):
        read = (None, sentence.strip())
        for name, pattern in PATTERNS.items():
            if match := pattern.fullmatch(sentence.strip()):
                read = (name, match.groupdict())
        sentences.append(read)
    return sentences


def true_quality(post, summary):
    """The labeler's taste, a finite number for any text; ideal_summary has the highest, 5.

    +1 a fact that is right, -2 one that is not (an invention costs more than a gap, as labelers are
    told in App. C.5); -1/2 a repeated clause, one out of order, or an aside; -1 an aside the post
    does not have; -3/4 a sentence that is none; -1/20 a word beyond the length of the ideal.

    So leaving out is never worse than making up, and nothing that can be added to an ideal summary
    makes it better. The numbers themselves are ours: the paper's labelers weigh as they like.
    """
    order, seen = list(CLAUSES), []
    # The paper asks for fewer than 48 tokens (3.2); here each word too many has its price.
    quality = -0.05 * max(0, len(summary.split()) - len(ideal_summary(post).split()))
    for clause, stated in read_summary(summary):
        # A clause told again counts as wasted room, whatever it says this time.
        if clause in seen or stated in post["asides"]:
            quality -= 0.5
        elif clause is None:  # an aside of another post, or no sentence at all
            quality -= 1.0 if stated in ASIDES else 0.75
        else:
            quality -= 0.5 * any(order.index(clause) < order.index(earlier) for earlier in seen)
            quality += sum(1 if post["facts"][name] == stated[name] else -2 for name in stated)
            seen.append(clause)
    return quality


def fact_accuracy(posts, summaries):
    """Of the facts that the summaries state, the share that is right, by fact.

    Says whether a model copies from the post: one that only knows the form has 1/5.
    """
    right = {name: [] for name in FACTS}  # a bool for each time it is stated
    for post, summary in zip(posts, summaries):
        for clause, facts in read_summary(summary):
            if clause:
                for name, fact in facts.items():
                    right[name].append(fact == post["facts"][name])
    # A fact that is never stated has 0, not a division by zero.
    return {name: sum(bools) / max(1, len(bools)) for name, bools in right.items()}


def compare(post, summary_a, summary_b, policies, rng, length_bias=0.0):
    """A comparison in the format of the real ones. The labeler slips: the better summary is
    chosen with probability sigmoid(difference of taste / NOISE) (Bradley-Terry, as in section 3.4).

    length_bias: what a word more is worth to this labeler beside the taste, as the paper's labelers
    are drawn to longer summaries (App. F). "gap" (taste of chosen minus rejected, without the bias)
    and "log_odds" (of this label) are for measuring, never for training.
    """
    gap = true_quality(post, summary_a) - true_quality(post, summary_b)
    more_words = len(summary_a.split()) - len(summary_b.split())
    log_odds = (gap + length_bias * more_words) / NOISE
    row = {"post": post, "chosen": summary_a, "rejected": summary_b, "policies": list(policies),
           "gap": gap, "log_odds": log_odds}
    # No third answer: a row of the paper's has a choice of two too, however sure the labeler was.
    if rng.random() >= 1 / (1 + math.exp(-log_odds)):
        row |= {"chosen": summary_b, "rejected": summary_a, "policies": list(policies)[::-1],
                "gap": -gap, "log_odds": -log_odds}
    return row


def make_comparisons(posts, samples_a, samples_b, seed, length_bias=0.0):
    """Comparisons of several policies' summaries (section 3.1), one per post: two SFT samples where
    the post has two, one and the reference where it has one, else a confused pair. Identical
    summaries are left out: there is nothing to choose.

    samples_a and samples_b hold summaries of the first posts, samples_b of fewer. Policies that PPO
    has trained are not among them, as they are in the paper: this is one round of its three steps.
    """
    rng = random.Random(f"comparisons {seed}")
    comparisons = []
    for row, post in enumerate(posts):
        # Which comes first says nothing: compare draws the label, and the pair is stored by it.
        if row < len(samples_b):
            pair, policies = (samples_a[row], samples_b[row]), ("sft", "sft")
        elif row < len(samples_a):
            pair, policies = (samples_a[row], post["summary"]), ("sft", "ref")
        else:
            pair, policies = confused_pair(post, rng), ("human", "confused")
        if pair[0] != pair[1]:
            comparisons.append(compare(post, *pair, policies, rng, length_bias))
    return comparisons


def swapped_fact_pairs(posts, seed):
    """Ideal summaries, and the same with one fact swapped: what only a reader can tell apart."""
    rng = random.Random(f"swapped {seed}")
    swapped = []
    for post in posts:
        name = rng.choice(list(FACTS))
        other = rng.choice([value for value in FACTS[name] if value != post["facts"][name]])
        swapped.append(ideal_summary({"facts": {**post["facts"], name: other}}))
    return [ideal_summary(post) for post in posts], swapped


def label_ceiling(comparisons):
    """Accuracy that someone who knew the taste (and the bias) would have on these noisy labels:
    what no reward model can pass. In the paper a researcher agrees with a labeler in 77 % of the
    cases (3.3)."""
    likelier = [1 / (1 + math.exp(-abs(row["log_odds"]))) for row in comparisons]
    return sum(likelier) / len(likelier)


# ---------------------------------------------------------------------------- the tiny model


def make_tokenizer(texts):
    """Byte-level BPE trained on texts (no byte is ever unknown), with separate EOS and pad.

    The paper has that of GPT-2 (B.1), whose 50,257 tokens would be most of a model this small.
    """
    tokenizer = Tokenizer(models.BPE())
    # "\n\nTITLE:" and " word" are one piece each, so the frame of a prompt costs few tokens.
    pieces = Regex(r"\n*[A-Z;]+:|\n+| ?\w+| ?[^\w\s]+|\s+")
    tokenizer.pre_tokenizer = Sequence([Split(pieces, "isolated"),
                                        ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # 4096 is never reached: merging ends when each word of the tiny world is one token, near 490.
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def make_model(tokenizer, width=64, layers=2, heads=4):
    """A tiny Llama from scratch, in eval mode; 144,000 weights at the tiny world's vocabulary.

    Two layers, because copying takes two: one looks at the word before, the other finds the place
    where that word stood. No dropout: it is 0 by default, and so it is in the 2020 code
    (openai/summarize-from-feedback). The weights come from torch's global random state.
    """
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=heads,
        bos_token_id=None,  # nothing stands in front of a prompt (B.2)
        initializer_range=width**-0.5,  # 0.02, the default, is for widths of 1000 and more
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # 1e4 blurs distant words here
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        # The paper starts from GPT-3, whose attention finds and copies words. From scratch that
        # takes most of the training; these two lines start it: look for the like, pass it on.
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    return model.eval()


def make_start(posts, settings, device):
    """What a run starts from: a tokenizer trained on the posts, and a model from scratch."""
    texts = ["r/{subreddit} {title} {post} {summary}".format(**post) for post in posts[:5000]]
    frame = "SUBREDDIT: r/\n\nTITLE: \n\nPOST: \n\nTL;DR:"
    tokenizer = make_tokenizer([f" {text}\n{text}" for text in texts] + [frame] * 10)
    torch.manual_seed(settings.seed)
    return tokenizer, make_model(tokenizer, settings.toy_width, settings.toy_layers,
                                 settings.toy_heads).to(device)
