"""Language models as judges, and a judge's share of the work where there are several processes."""

import torch

import judge as judge_file
from engine.architectures import most_positions
from engine.devices import pick_device, pick_dtype
from engine.models import load_language_model
from engine.processes import share_out
from engine.settings import SettingError
from engine.texts import control_ids, front_ids, ids_after, text_ids, truncate_post
from judge import JUDGES, make_judge
from lm import get_position_ids, pad
from tldr import build_prompt

# The labelers' criteria in the order of Table 6: essence, clarity, accuracy, purpose, conciseness,
# style. The comparison is fixed: no setting of a run changes what "better" means.
QUESTION = """\
Which of two summaries of a forum post is better? A good summary tells the essence of the post, is
clear, is accurate (it says nothing that the post does not say), serves the purpose of the post, is
concise, and keeps the style of the post. Lines that begin with ">" are quoted.

The post:
{post}

Summary A:
{summary_a}

Summary B:
{summary_b}

Which summary is better? Reply with exactly one letter, A or B."""

DAY = "26 Jul 2024"  # the day that Llama 3.2's template takes where it knows no other


def quote(text):
    """Each line with "> " in front, so that nothing in a text can end the quotation: a summary that
    goes on with a "Summary B:" of its own stays summary A."""
    return "\n".join("> " + line for line in text.splitlines() or [""])


def text_around(tokenizer):
    """What stands before and after the question: a user's turn, or plain text with a cue.
    ValueError for a model that can't but think before it answers: its next token is no letter."""
    # No post is in here, so whatever looks like a control token is one, and is encoded as one
    if not tokenizer.chat_template:
        return "", "\n\nAnswer:"
    place = "{question}"
    # Some templates tell the date. It is always the same here: a run may go on past midnight
    template = (f"{{%- macro strftime_now(format) -%}}{DAY}{{%- endmacro -%}}"
                + tokenizer.get_chat_template())
    text = tokenizer.apply_chat_template(  # a template without these switches ignores them
        [{"role": "user", "content": place}], tokenize=False, add_generation_prompt=True,
        chat_template=template, enable_thinking=False, date_string=DAY)
    before, _, after = text.partition(place)
    if "<think>" in after and "</think>" not in after:
        raise ValueError("this judge thinks before it answers: choose one that answers at once")
    return before, after


def tokens_around(tokenizer):
    """text_around as token ids, before and after; the question ends with a full stop."""
    before, after = text_around(tokenizer)
    front = control_ids(tokenizer, [before])[0] if before else front_ids(tokenizer)
    return front, *ids_after(tokenizer, ".", [after], control_ids)


def answer_tokens(tokenizer):
    """(2, K): the ids of "A" and of "B" in K spellings, as they come right after the question and
    what follows it. ValueError if the tokenizer has none."""
    # "A" or " A", depending on the tokenizer and on what stands before. A spelling that takes one
    # token for "A" and two for "B" is left out, since to count the one only would favour A.
    _, after = text_around(tokenizer)
    pairs = [ids_after(tokenizer, after, [space + "A", space + "B"], control_ids)
             for space in ("", " ")]
    # A set, since "A" and " A" are the same token to some tokenizers
    spellings = {(*a, *b) for a, b in pairs
                 if len(a) == len(b) == 1 and a != b and tokenizer.unk_token_id not in a + b}
    if not spellings:
        raise ValueError('expected a tokenizer in which "A" and "B" are single, distinct tokens')
    return torch.tensor(sorted(spellings)).T


def get_prompt(tokenizer, before, after, room, post, summary_a, summary_b):
    """before + the question about one pair + after, as token ids; the question has at most `room`.

    Only the post loses its end, line by line, never a summary; None if that is not enough.
    """
    def encode(text):
        # The post as in its prompt (B.2), but nobody is asked to go on with a summary here
        shown = build_prompt({**post, "post": text}).removesuffix("\n\nTL;DR:")
        # One pass: chained `replace` calls would fill in a "{summary_b}" found in the post
        question = QUESTION.format(post=quote(shown), summary_a=quote(summary_a),
                                   summary_b=quote(summary_b))
        # Whatever is typed is text: a "<|im_end|>" does not end the judge's turn
        return text_ids(tokenizer, [question])[0]

    text = truncate_post(post["post"], lambda text: len(encode(text)) <= room)
    return None if text is None else before + encode(text) + after


@torch.no_grad()
def answer_probabilities(model, prompts, answers, batch_size):
    """Lists of token ids -> (N, 2): P(A) and P(B) as the next token, summed over their spellings.
    answers: (2, K), of answer_tokens."""
    # One forward pass and no generate(): the checkpoint's own temperature, top-p (to draw among the
    # likeliest tokens only) and repetition penalty play no part, no prose is parsed, and the same
    # question always gets the same answer.
    probabilities = torch.zeros(len(prompts), 2)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of similar length
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # Left-padded, the last position is the answer's in every row. The mask hides the pad id.
        ids, mask = (x.to(model.device) for x in pad([prompts[i] for i in rows], 0, left=True))
        logits = model(input_ids=ids, attention_mask=mask, position_ids=get_position_ids(mask),
                       logits_to_keep=1, use_cache=False).logits[:, -1]  # (B, V)
        # float32, since bfloat16 has three digits; (B, V) -> (B, 2, K) -> (B, 2)
        probabilities[rows] = logits.float().softmax(-1)[:, answers].sum(-1).cpu()
    return probabilities


def language_model_judge(model, tokenizer, batch_size=8, min_probability=0.5, max_length=2048):
    """The judge that compares P(A) and P(B) of a language model in eval mode.

    A question of more tokens than max_length or the model's limit loses the end of its post, never
    of a summary; where that is not enough, the judge abstains. ValueError where there is no room
    for two words, where the tokenizer lacks an "A" or a "B", or where the model can't but think
    before it answers.
    """
    answers = answer_tokens(tokenizer)
    before, after = tokens_around(tokenizer)
    room = (min(max_length, most_positions(model.config), tokenizer.model_max_length)
            - len(before) - len(after))
    if get_prompt(tokenizer, before, after, room, {"post": ""}, "word", "word") is None:
        raise ValueError(f"it has room for {room} tokens and the question alone takes more; choose "
                         "a judge that reads longer texts")

    def judge(posts, summaries_a, summaries_b):
        verdicts = ["A"] * len(posts)  # equal summaries need no question: "A" twice is a tie
        prompts = {}  # number of the pair -> what is asked about it
        for i, pair in enumerate(zip(summaries_a, summaries_b)):
            if pair[0] != pair[1]:
                verdicts[i] = None
                prompts[i] = get_prompt(tokenizer, before, after, room, posts[i], *pair)
        asked = [i for i in prompts if prompts[i] is not None]  # it abstains where it has no room
        probabilities = answer_probabilities(model, [prompts[i] for i in asked], answers, batch_size)
        # And it abstains where "A" and "B" are unlikely: the model was going to say something else.
        # A NaN is an abstention too
        for i, (p_a, p_b) in zip(asked, probabilities.tolist()):
            if p_a + p_b >= min_probability:
                verdicts[i] = "A" if p_a >= p_b else "B"
        return verdicts

    return judge


def load_judge(name, small=False, device=None, dtype=None):
    """JudgeConfig.judge -> a judge, for all names but "reward_model": that one has to be trained
    first, and reward_model_judge makes a judge of it.

    Raises SettingError for a model that can't judge. small: a model of the same architecture with
    random weights.
    """
    if name in JUDGES:
        return make_judge(name, None)
    # Qwen/Qwen2.5-3B-Instruct, the full preset's, is licensed for non-commercial research only;
    # Qwen/Qwen3-4B-Instruct-2507 is under Apache-2.0.
    device = device or pick_device()
    tokenizer, model = load_language_model(name, device, dtype or pick_dtype("auto", device),
                                           small=small)
    try:
        return language_model_judge(model.requires_grad_(False), tokenizer)
    except ValueError as error:
        raise SettingError(f"--judge {name}: {error}") from None


def judged(run, judge, name, posts, ours, theirs):
    """As judge.judged; each process asks about its share of the rows, and it is said where a judge
    abstains on all of them."""
    def shared(*rows):
        return share_out(judge, *rows)

    entry, outcomes = judge_file.judged(shared, name, posts, ours, theirs)
    if not entry["n"]:  # NaN in every table, so it has to be said why
        run.warn("judge", f"the judge {name} abstained on all {len(posts)} posts: its win rates "
                 "are empty; choose another one")
    return entry, outcomes
