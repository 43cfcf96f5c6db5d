"""The tiny world: posts, imperfect human references, and a labeler whose taste is known.

It stands for r/relationships and r/legaladvice, the people who wrote the TL;DRs there, and the
labelers of the paper. A post tells five key facts (who did what to which thing, how the poster
feels, what they ask) among asides. The labeler wants a short summary that has all five facts and
invents none. Training never sees that taste (`true_quality`), only noisy choices made from it.

What it can show: the whole loop, that the reward model is a proxy, what the KL penalty is for.
What it can't: anything about language. Sentences have one form each, every fact is one word of
five, and nobody disagrees about what a good summary is: the labelers only slip.
"""

import math
import random
import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from run import SettingError

FACTS = {"who": ("landlord", "boss", "sister", "roommate", "husband"),
         "did": ("sold", "broke", "stole", "hid", "lost"),
         "what": ("car", "phone", "guitar", "couch", "passport"),
         "feels": ("angry", "scared", "guilty", "hurt", "confused"),
         "asks": ("leave", "wait", "apologize", "sue", "forgive")}
# The three clauses of a good summary, in the order a reader wants them
CLAUSES = {"event": "My {who} {did} my {what}.", "feeling": "I feel {feels}.",
           "question": "Should I {asks}?"}
ASIDES = ("It was late.", "It was raining.", "Nobody knows.", "We live together.",
          "Rent is due.", "I work nights.", "Dinner was cold.", "Nothing else happened.")
SUBREDDITS = ("relationships", "legaladvice")

WRONG = 0.04  # a reference has each fact wrong with this chance
TERSE = 0.5  # and tells nothing but the event with this one: hence SFT does not beat references
DRAWS = 200  # at most, where a draw has to differ: one does with chance .4, and .6**200 = 4e-45
NOISE = 2.6  # temperature of the labels, in units of taste: 78 % agree with it; paper: 77 % (3.3)

# ---------------------------------------------------------------------------- posts and writers


def number_of_posts():
    """How many different posts there are: facts, two asides, the order of six sentences."""
    return (math.prod(len(values) for values in FACTS.values()) * math.comb(len(ASIDES), 2)
            * math.factorial(len(CLAUSES) + 3))


def make_posts(n, seed):
    """n different posts as {"subreddit", "title", "post", "summary"} with the reference as summary.

    "facts" and "asides" are what only the labeler (and a test) may look at. SettingError for more
    than half of the posts that there are: up to there, at least every second draw is a new one.
    """
    if n > number_of_posts() // 2:
        raise SettingError(f"the tiny world can't give {n} different posts, at most "
                           f"{number_of_posts() // 2}: lower toy_posts, toy_comparisons or "
                           "toy_held_out")
    rng = random.Random(f"posts {seed}")
    posts = {}
    while len(posts) < n:
        facts = {name: rng.choice(values) for name, values in FACTS.items()}
        asides = rng.sample(ASIDES, 2)
        body = [clause.format(**facts) for clause in CLAUSES.values()]
        # each fact stands twice in a post, as it would: once to copy from, once to make sure
        body += [f"Why do I feel {facts['feels']}?", *asides]
        rng.shuffle(body)
        title = "My {who} {did} my {what}, should I {asks}?".format(**facts)
        post = {"subreddit": rng.choice(SUBREDDITS), "title": title, "post": " ".join(body),
                "facts": facts, "asides": asides}
        post["summary"] = reference_summary(post, seed)
        posts.setdefault(post["post"], post)
    return list(posts.values())


def ideal_summary(post):
    """All five facts, in order, and nothing else: the ceiling of true_quality."""
    return " ".join(clause.format(**post["facts"]) for clause in CLAUSES.values())


def write_summary(post, rng, terse):
    """A human writer: tells nothing but the event with chance `terse`, mixes up each fact with
    chance WRONG, forgets the feeling or the question, rambles."""
    facts = confuse(post["facts"], rng, WRONG)
    clauses = [CLAUSES["event"]]
    if rng.random() >= terse:
        clauses += [CLAUSES[name] for name in ("feeling", "question") if rng.random() < 0.75]
        clauses += [rng.choice(post["asides"])] * (rng.random() < 0.35)
    return " ".join(clause.format(**facts) for clause in clauses)


def confuse(facts, rng, wrong):
    """A copy of the facts with each one replaced by another value with chance `wrong`."""
    return {name: rng.choice([value for value in FACTS[name] if value != fact])
            if rng.random() < wrong else fact for name, fact in facts.items()}


def reference_summary(post, seed):
    """An imperfect human's summary: terse, forgetful, sometimes wrong, sometimes rambling."""
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
        swap = dict(zip(post["facts"].values(), confuse(post["facts"], rng, 0.4).values()))
        confusion = re.sub(r"\w+", lambda word: swap.get(word[0], word[0]), summary)
        if confusion != summary:
            break
    return summary, confusion


# ---------------------------------------------------------------------------- the labeler

# "I feel {feels}." -> "I feel (?P<feels>angry|scared|...)[.]"
GROUPS = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in FACTS.items()}
PATTERNS = {name: re.compile(re.sub("[.?]", r"[\g<0>]", clause).format(**GROUPS))
            for name, clause in CLAUSES.items()}


def read_summary(summary):
    """Sentences of a summary as (clause name, stated facts), or (None, sentence) if it is none."""
    for sentence in map(str.strip, re.findall(r"[^.?!]*[.?!]|[^.?!]+$", summary)):
        matches = ((name, pattern.fullmatch(sentence)) for name, pattern in PATTERNS.items())
        yield next(((name, m.groupdict()) for name, m in matches if m), (None, sentence))


def true_quality(post, summary):
    """The labeler's taste, a finite number for any text; ideal_summary has the highest, 5.

    +1 a fact that is right, -2 one that is not (an invention costs more than a gap, as labelers are
    told in App. C.5); -1/2 a repeated clause, one out of order, or an aside; -1 an aside the post
    does not have; -3/4 a sentence that is none; -1/20 a word beyond the length of the ideal.
    """
    order, seen = list(CLAUSES), []
    quality = -0.05 * max(0, len(summary.split()) - len(ideal_summary(post).split()))
    for clause, stated in read_summary(summary):
        if clause is None:
            quality -= 0.75 if stated not in ASIDES else 0.5 if stated in post["asides"] else 1.0
        elif clause in seen:
            quality -= 0.5
        else:
            quality -= 0.5 * any(order.index(clause) < order.index(earlier) for earlier in seen)
            quality += sum(1 if post["facts"][name] == stated[name] else -2 for name in stated)
            seen.append(clause)
    return quality


def fact_accuracy(posts, summaries):
    """Of the facts that the summaries state, the share that is right, by fact."""
    right = {name: [] for name in FACTS}  # a bool for each time it is stated; 0 if it never is
    for post, summary in zip(posts, summaries):
        for clause, facts in read_summary(summary):
            for name, fact in facts.items() if clause else ():
                right[name].append(fact == post["facts"][name])
    return {name: sum(bools) / max(1, len(bools)) for name, bools in right.items()}


def compare(post, summary_a, summary_b, policies, rng):
    """A comparison in the format of tldr.load_comparisons. The labeler slips: the better summary is
    chosen with probability sigmoid(difference of taste / NOISE) (Bradley-Terry, as in section 3.4).
    "gap" (taste of chosen minus rejected) is for measuring, never for training.
    """
    gap = true_quality(post, summary_a) - true_quality(post, summary_b)
    pair, names = [summary_a, summary_b], list(policies)
    if rng.random() >= 1 / (1 + math.exp(-gap / NOISE)):
        pair, names, gap = pair[::-1], names[::-1], -gap
    return {"post": post, "chosen": pair[0], "rejected": pair[1], "policies": names, "gap": gap}


def make_comparisons(posts, samples_a, samples_b, seed):
    """Comparisons of several policies' summaries (section 3.1), one per post: two SFT samples where
    the post has two, one and the reference where it has one, else a confused pair. Identical
    summaries are left out, as in tldr.py."""
    rng = random.Random(f"comparisons {seed}")
    comparisons = []
    for row, post in enumerate(posts):
        if row < len(samples_b):
            pair, policies = (samples_a[row], samples_b[row]), ("sft", "sft")
        elif row < len(samples_a):
            pair, policies = (samples_a[row], post["summary"]), ("sft", "ref")
        else:
            pair, policies = confused_pair(post, rng), ("human", "confused")
        if pair[0] != pair[1]:
            comparisons.append(compare(post, *pair, policies, rng))
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
    """Accuracy that someone who knew the taste would have on these noisy labels."""
    return sum(1 / (1 + math.exp(-abs(c["gap"]) / NOISE)) for c in comparisons) / len(comparisons)


# ---------------------------------------------------------------------------- the tiny model


def make_tokenizer(texts):
    """Byte-level BPE trained on texts (no byte is ever unknown), with separate EOS and pad."""
    tokenizer = Tokenizer(models.BPE())
    # "\n\nTITLE:" and " word" are one piece each, so the frame of a prompt costs few tokens
    pieces = Regex(r"\n*[A-Z;]+:|\n+| ?\w+| ?[^\w\s]+|\s+")
    tokenizer.pre_tokenizer = Sequence([Split(pieces, "isolated"),
                                        ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def make_model(tokenizer, width=64, layers=2, heads=4):
    """A tiny Llama from scratch, about 150,000 weights at the tiny world's vocabulary."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=heads, bos_token_id=None,
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
