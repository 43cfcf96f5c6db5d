"""What students hand in: wrong answers to the exercises, and right ones that look unusual.

A wrong answer is our function with one thing changed, or with another body. said: what the message
that names it has to say ("" where the numbers alone are shown). Each must fail, and none may be
told something else. test_answers.py runs them all.
"""

from collections import namedtuple

# old is None: new is the whole body of the function
Answer = namedtuple("Answer", "number name old new said")


def wrong(number, name, old, new, said=""):
    return Answer(number, name, old, new, said)


def body(number, name, new, said=""):
    return Answer(number, name, None, new, said)


SHIFTED = "return log_probs.take_along_dim(labels[:, 1:, None], -1).squeeze(-1)"
SOFTMAX = "F.log_softmax(logits / temperature, dim=-1)"
MASK = "return ends.cumsum(1) - ends == 0  # no EOS strictly before t"
PREFERENCE = "return -F.logsigmoid(chosen - rejected).mean()"
LAST = "return (positions * (attention_mask != 0)).argmax(1)"
SHIFT = "reward_model.reference_mean += scores.mean().to(reward_model.reference_mean)"
KL = "rewards = -kl_beta * zero_off(log_probs - ref_log_probs, mask)"
PAY = "return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))"
DELTA = "delta = rewards[:, t] + gamma * next_value - values[:, t]"
NEXT = "delta + gamma * lam * next_advantage"
ZEROED = "    rewards, values = zero_off(rewards, mask), zero_off(values, mask)\n"
GAE = "return advantages, zero_off(advantages + values, mask)"
WHITE = "return zero_off(deviations * torch.rsqrt(variance + 1e-8), mask != 0)"
CLIPPED = "clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)"
LOSS = "loss = masked_mean(torch.max(plain, clipped), mask)"
HALVED = "loss = 0.5 * masked_mean(torch.max(plain, clipped), mask)"
SHARE = "return loss, masked_mean((clipped > plain).to(loss.dtype), mask)"
NEAR = "near_old = values.clamp(old_values - clip_range, old_values + clip_range)"
VOTES = "((first == \"A\") + (second == \"B\")) / 2"
HALF = "half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))"
ROWS = "(x * mask).sum(1) / mask.sum(1)"

WRONG = [
    # ------------------------------------------------------------------------ 1
    body(1, "no shift", "return F.log_softmax(logits / temperature, -1).gather(-1, labels[:, :, "
         "None]).squeeze(-1)", "at their own token"),
    wrong(1, "the first logits dropped", "logits[:, :-1].to", "logits[:, 1:].to",
          "at their own token"),
    body(1, "shifted back", "log_probs = F.log_softmax(logits[:, 1:].float() / temperature, -1)\n"
         "    return log_probs.gather(-1, labels[:, :-1, None])[..., 0]", "shifted"),
    wrong(1, "the last column of both", SHIFTED, SHIFTED.replace("1:, None", ":-1, None"),
          "at their own token"),
    wrong(1, "the likeliest", SHIFTED, "return log_probs.max(-1).values", "likeliest"),
    wrong(1, "summed", SHIFTED, SHIFTED + ".sum(-1)", "sum|wrong shape"),
    wrong(1, "sign", SHIFTED, SHIFTED.replace("return ", "return -"), "sign"),
    wrong(1, "logits", SOFTMAX, "logits / temperature", "no log_softmax"),
    wrong(1, "probabilities", SOFTMAX, "F.softmax(logits / temperature, dim=-1)", "probabilities"),
    wrong(1, "no temperature", SOFTMAX, "F.log_softmax(logits, dim=-1)", "not use the temperature"),
    wrong(1, "multiplied", SOFTMAX, "F.log_softmax(logits * temperature, dim=-1)", "multiplied"),
    wrong(1, "divided after", SOFTMAX, "F.log_softmax(logits, dim=-1) / temperature",
          "divided the log-probs"),
    wrong(1, "log of softmax", SOFTMAX, "F.softmax(logits / temperature, dim=-1).log()",
          "log_softmax"),
    wrong(1, "half precision", ".to(torch.promote_types(logits.dtype, torch.float32))", "",
          "bfloat16"),
    wrong(1, "detached", SHIFTED, SHIFTED + ".detach()", "no gradient"),
    wrong(1, "in place", "log_probs = " + SOFTMAX, "logits /= temperature\n"
          "    log_probs = F.log_softmax(logits, dim=-1)", "changed"),
    wrong(1, "over the positions", SOFTMAX, "F.log_softmax(logits / temperature, dim=1)",
          "over the positions"),
    wrong(1, "the labels of row 0", SHIFTED, SHIFTED.replace("labels[", "labels[:1].expand_as("
          "labels)[")),
    wrong(1, "no return", SHIFTED, SHIFTED.replace("return ", ""), "None"),
    wrong(1, "one axis too many", SHIFTED, SHIFTED.replace(".squeeze(-1)", ""), "wrong shape"),
    wrong(1, "a list", SHIFTED, SHIFTED + ".tolist()", "a list"),
    # ------------------------------------------------------------------------ 2
    wrong(2, "EOS left out", MASK, "return ends.cumsum(1) == 0", "left EOS out"),
    wrong(2, "all", MASK, "return ends.cumsum(1) >= 0", "after EOS"),
    wrong(2, "ids != pad", MASK, "return responses != 0", "!= pad"),
    wrong(2, "up to the last EOS", MASK, "after = ends.flip(1).cumsum(1).flip(1)\n"
          "    return (after > 0) | (ends.sum(1, keepdim=True) == 0)", "last"),
    wrong(2, "numbers", MASK, "return (ends.cumsum(1) - ends == 0).long()", "torch.bool"),
    wrong(2, "one more", MASK, "before = ends.cumsum(1) - ends\n"
          "    return before.cumsum(1) - before == 0", "one token too many"),
    wrong(2, "always 9", "is_eos(responses, eos_token_id)", "is_eos(responses, 9)", "eos_token_id"),
    wrong(2, "never ended", MASK, "return torch.arange(ends.shape[1]) <= ends.argmax(1)[:, None]",
          "without EOS"),
    wrong(2, "only EOS", MASK, "return ends == 0", "nothing else"),
    wrong(2, "up to the second EOS", MASK, "return ends.cumsum(1) <= 1", "second one"),
    wrong(2, "over the batch", MASK, MASK.replace("cumsum(1)", "cumsum(0)"), "down the batch"),
    wrong(2, "one id", "is_eos(responses, eos_token_id)", "(responses == eos_token_id)",
          "get AttributeError"),
    wrong(2, "the first id", "is_eos(responses, eos_token_id)", "(responses == "
          "torch.as_tensor(eos_token_id).flatten()[0])", "first of several"),
    body(2, "a loop for one id", """rows = []
    for row in responses.tolist():
        end = row.index(eos_token_id) if eos_token_id in row else len(row)
        rows.append([t <= end for t in range(len(row))])
    return torch.tensor(rows)""", "none of the ids"),
    wrong(2, "inverted", MASK, "return ends.cumsum(1) - ends != 0", "exchanged"),
    wrong(2, "no return", MASK, MASK.replace("return ", ""), "None"),
    wrong(2, "in place", MASK, "responses[ends.cumsum(1) - ends != 0] = -1\n"
          "    return responses != -1", "changed"),
    # ------------------------------------------------------------------------ 3
    wrong(3, "swapped", PREFERENCE, "return -F.logsigmoid(rejected - chosen).mean()", "exchanged"),
    wrong(3, "a sum", PREFERENCE, "return -F.logsigmoid(chosen - rejected).sum()", "sum"),
    wrong(3, "per pair", PREFERENCE, "return -F.logsigmoid(chosen - rejected)",
          "one loss a pair|wrong shape"),
    wrong(3, "sign", PREFERENCE, "return F.logsigmoid(chosen - rejected).mean()", "sign"),
    wrong(3, "no log", PREFERENCE, "return -torch.sigmoid(chosen - rejected).mean()", "logarithm"),
    wrong(3, "log of sigmoid", PREFERENCE, "return -torch.log(torch.sigmoid(chosen - rejected))"
          ".mean()", "logsigmoid"),
    wrong(3, "small number", PREFERENCE, "return -torch.log(torch.sigmoid(chosen - rejected) "
          "+ 1e-8).mean()", "logsigmoid"),
    wrong(3, "detached", PREFERENCE, PREFERENCE + ".detach()", "no gradient"),
    wrong(3, "item", PREFERENCE, PREFERENCE + ".item()", "a float"),
    wrong(3, "all against all", PREFERENCE, "return -F.logsigmoid(chosen[:, None] - rejected)"
          ".mean()", r"\(B, B\)"),
    wrong(3, "mean inside", PREFERENCE, "return -F.logsigmoid((chosen - rejected).mean())",
          "before"),
    wrong(3, "half detached", "chosen - rejected).mean", "chosen - rejected.detach()).mean", ""),
    wrong(3, "hinge", PREFERENCE, "return F.relu(1 - chosen + rejected).mean()", "hinge"),
    wrong(3, "DPO's beta", PREFERENCE, PREFERENCE.replace("(chosen - rejected)", "(0.1 * (chosen - "
          "rejected))"), "DPO"),
    wrong(3, "each by itself", PREFERENCE, "return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)"
          ").mean()", "by itself"),
    wrong(3, "gap clamped", PREFERENCE, "return -F.logsigmoid((chosen - rejected).clamp(-20, 20))"
          ".mean()", "clamp"),
    wrong(3, "no return", PREFERENCE, PREFERENCE.replace("return ", ""), "None"),
    wrong(3, "in place", PREFERENCE, "chosen = chosen.detach().sub_(rejected)\n"
          "    return -F.logsigmoid(chosen).mean()", "changed|no gradient"),
    # ------------------------------------------------------------------------ 4
    wrong(4, "last column", LAST, "return positions[-1].expand(len(attention_mask))",
          "last column"),
    wrong(4, "counted", LAST, "return attention_mask.sum(1) - 1", "counted"),
    wrong(4, "first pad", LAST, "return (attention_mask == 0).long().argmax(1) - 1", "first pad"),
    wrong(4, "one too far", LAST, LAST + " + 1", "one too far"),
    wrong(4, "over the batch", LAST, LAST.replace("argmax(1)", "argmax(0)"), "column"),
    wrong(4, "first", LAST, "return attention_mask.argmax(1)", "first real token"),
    wrong(4, "float", LAST, LAST + ".float()", "index"),
    wrong(4, "keepdim", LAST, LAST.replace("argmax(1)", "argmax(1, keepdim=True)"), "wrong shape"),
    wrong(4, "from the right", LAST, "return attention_mask.flip(1).argmax(1)", "from the right"),
    wrong(4, "the longest row", LAST, LAST.replace("argmax(1)", "argmax(1).max().expand("
          "len(attention_mask))"), "last column"),
    wrong(4, "no return", LAST, LAST.replace("return ", ""), "None"),
    # ------------------------------------------------------------------------ 5
    wrong(5, "nothing changed", SHIFT, "mean = reward_model.reference_mean\n"
          "    mean = mean + scores.mean()", "not changed"),
    wrong(5, "sign", SHIFT, SHIFT.replace("+=", "-="), "sign"),
    wrong(5, "sum", SHIFT, SHIFT.replace("mean().", "sum()."), "sum"),
    wrong(5, "assigned", SHIFT, SHIFT.replace("+=", "="), "second time"),
    wrong(5, "adds raw scores", SHIFT, "mean = scores.mean() + reward_model.reference_mean\n"
          "    reward_model.reference_mean += mean", "second time"),
    wrong(5, "mean of batch means", SHIFT, "reward_model.reference_mean += torch.stack([part.mean()"
          " for part in scores.split(batch_size)]).mean()", "batch means"),
    wrong(5, "first batch", SHIFT, SHIFT.replace("scores", "scores[:batch_size]"), "first batch"),
    wrong(5, "None", SHIFT, "reward_model.reference_mean = None", "to None"),
    wrong(5, "median", SHIFT, SHIFT.replace("mean().", "median()."), "median"),
    wrong(5, "no queries", "score_summaries(reward_model, queries,", "score_summaries(reward_model,"
          " [[] for query in queries],", "without their posts"),
    wrong(5, "the queries' scores", "score_summaries(reward_model, queries, references,",
          "score_summaries(reward_model, queries, queries,", ""),
    wrong(5, "gradient", SHIFT, "reward_model.reference_mean = reward_model.reference_mean + "
          "reward_model.weight * 0 + scores.mean()", "gradient"),
    wrong(5, "spread", SHIFT, SHIFT + "\n    reward_model.weight.data /= scores.std()", "spread"),
    wrong(5, "the last one", SHIFT, SHIFT.replace("scores.mean()", "scores[-1]"), "one score"),
    wrong(5, "the first one", SHIFT, SHIFT.replace("scores.mean()", "scores[0]"), "first score"),
    wrong(5, "half of it", SHIFT, SHIFT.replace("scores.mean()", "0.5 * scores.mean()"), "half"),
    # ------------------------------------------------------------------------ 6
    wrong(6, "sign", KL, KL.replace("-kl_beta", "kl_beta"), "sign of the KL"),
    wrong(6, "every token", PAY, "return rewards + scores[:, None] * mask", "every token"),
    wrong(6, "every column", PAY, "return rewards + scores[:, None]", "every token"),
    wrong(6, "last column", PAY, "rewards[:, -1] += scores\n    return rewards", "last column"),
    wrong(6, "padding pays", KL, "rewards = -kl_beta * (log_probs - ref_log_probs)", "padding"),
    wrong(6, "squared", KL, KL.replace("log_probs - ref_log_probs", "0.5 * (log_probs - "
          "ref_log_probs) ** 2"), "squared"),
    wrong(6, "k3", KL, KL.replace("log_probs - ref_log_probs", "(ref_log_probs - log_probs).exp() "
          "- 1 - (ref_log_probs - log_probs)"), "always positive"),
    wrong(6, "ratio", KL, KL.replace("log_probs - ref_log_probs", "(log_probs - ref_log_probs)"
          ".exp()"), "exp"),
    wrong(6, "no KL", KL, KL.replace("-kl_beta", "0"), "no KL"),
    wrong(6, "no score", PAY, "return rewards", "no score"),
    wrong(6, "no beta", KL, KL.replace("-kl_beta *", "-"), "beta"),
    wrong(6, "beta is .05", KL, KL.replace("kl_beta", "0.05"), "beta"),
    wrong(6, "beta on all", PAY, PAY.replace("scores[", "(kl_beta * scores)["), "beta"),
    wrong(6, "assigned", PAY, "return rewards.scatter(1, last, scores[:, None])", "in the place"),
    wrong(6, "[:, last] +=", PAY, "rewards[:, last[:, 0]] += scores\n    return rewards",
          r"rewards\[:, last\]"),
    wrong(6, "first action", PAY, PAY.replace("last,", "last * 0,"), "first action"),
    wrong(6, "one after", PAY, PAY.replace("last,", "(last + 1).clamp(max=mask.shape[1] - 1),"),
          "one place"),
    wrong(6, "mean score", PAY, PAY.replace("scores[", "scores.mean().expand(len(mask))["),
          "mean"),
    wrong(6, "per token score", PAY, PAY.replace("scores[:, None]", "(scores / mask.sum(1))"
          "[:, None]"), "length"),
    wrong(6, "KL at the end", KL, KL + "\n    rewards = torch.zeros_like(rewards).scatter(1, "
          "mask.long().cumsum(1).argmax(1, keepdim=True), rewards.sum(1, keepdim=True))",
          "whole KL"),
    wrong(6, "in place", KL, "log_probs -= ref_log_probs\n    rewards = -kl_beta * zero_off("
          "log_probs, mask)", "changed"),
    wrong(6, "the length of row 0", "last = mask", "last = mask[:1].expand_as(mask)", ""),
    wrong(6, "no return", PAY, PAY.replace("return ", ""), "None"),
    wrong(6, "cumsum", PAY, "at_end = mask.long().cumsum(1) == mask.sum(1, keepdim=True)\n"
          "    return rewards + scores[:, None] * at_end"),
    wrong(6, "edge of the mask", PAY, "edge = torch.zeros_like(mask)\n    edge[:, :-1] = mask[:, "
          ":-1] & ~mask[:, 1:]\n    return rewards + scores[:, None] * edge"),
    wrong(6, "clipped score", PAY, PAY.replace("scores[", "scores.clamp(-1, 1)[")),
    wrong(6, "absolute", KL, KL.replace("log_probs - ref_log_probs", "(log_probs - ref_log_probs)"
          ".abs()"), "absolute"),
    wrong(6, "cut off", KL, KL.replace("log_probs - ref_log_probs", "(log_probs - ref_log_probs)"
          ".clamp(min=0)"), "cut the log-ratios"),
    wrong(6, "weighted", KL, KL.replace("log_probs - ref_log_probs", "log_probs.exp() * (log_probs "
          "- ref_log_probs)"), "weighted"),
    wrong(6, "a quotient", KL, KL.replace("log_probs - ref", "log_probs / ref"), "divided"),
    wrong(6, "mean KL", KL, KL + " / mask.sum(1, keepdim=True)", "length"),
    wrong(6, "shared out", PAY, "return rewards + (scores / mask.sum(1))[:, None] * mask",
          "shared"),
    wrong(6, "mask multiplied", KL, "rewards = -kl_beta * mask * (log_probs - ref_log_probs)",
          "padding in, which is NaN"),
    wrong(6, "reward per summary", PAY, PAY + ".sum(1)", "one reward a summary"),
    # ------------------------------------------------------------------------ 7
    wrong(7, "lambda ignored", NEXT, "delta + gamma * next_advantage", "lambda"),
    wrong(7, "deltas", NEXT, "delta", "deltas"),
    wrong(7, "no V", DELTA, "delta = rewards[:, t]", "no V"),
    wrong(7, "no V'", DELTA, "delta = rewards[:, t] - values[:, t]", "no V'"),
    wrong(7, "returns twice", GAE, "advantages = zero_off(advantages + values, mask)\n"
          "    return advantages, advantages", "returns"),
    wrong(7, "order", GAE, "return zero_off(advantages + values, mask), advantages", "order"),
    wrong(7, "gamma not on V'", DELTA, DELTA.replace("gamma * ", ""), "discount V'"),
    wrong(7, "gamma not on A'", NEXT, "delta + lam * next_advantage", "discount A'"),
    wrong(7, "exchanged", DELTA, DELTA.replace("gamma", "lam"), "exchanged"),
    wrong(7, "mask ignored", ZEROED, "    mask = torch.ones_like(mask)\n", "padding"),
    wrong(7, "V of the padding", ZEROED, "", "padding"),
    wrong(7, "bootstrapped", "next_value = next_advantage = torch.zeros_like(values[:, 0])",
          "next_advantage = torch.zeros_like(values[:, 0])\n    next_value = values[:, -1]",
          "after the last action"),
    wrong(7, "forwards", "reversed(range(values.shape[1]))", "range(values.shape[1])", "forwards"),
    body(7, "forwards, right deltas", """rewards, values = rewards * mask, values * mask
    after = torch.cat([values[:, 1:], 0 * values[:, :1]], 1)
    advantages = (rewards + gamma * after - values) * mask
    for t in range(1, mask.shape[1]):
        advantages[:, t] += gamma * lam * advantages[:, t - 1] * mask[:, t]
    return advantages, advantages + values""", "forwards"),
    wrong(7, "t = 0 is left out", "reversed(range(values.shape[1]))", "range(values.shape[1] - 1, "
          "0, -1)", "t = 0"),
    wrong(7, "A - V", GAE, GAE.replace("+ values", "- values"), r"A \+ V"),
    wrong(7, "plus V", DELTA, DELTA.replace("- values", "+ values"), "add V"),
    wrong(7, "1 - lambda", NEXT, NEXT.replace("lam", "(1 - lam)"), "1 - lambda"),
    wrong(7, "lambda is .95", NEXT, NEXT.replace("lam", "0.95"), "do not use lam"),
    wrong(7, "constants", ZEROED, "    gamma, lam = 1.0, 0.95\n" + ZEROED, "do not use"),
    wrong(7, "rows averaged", GAE, "advantages = advantages.mean(0, keepdim=True)"
          ".expand_as(advantages)\n    " + GAE, ""),
    wrong(7, "length of row 0", ZEROED, "    mask = mask[:1].expand_as(mask)\n" + ZEROED,
          "first one ends"),
    wrong(7, "returns are advantages", GAE, "return advantages, advantages", "advantages"),
    wrong(7, "returns are sums", GAE, "return advantages, zero_off(rewards.flip(1).cumsum(1)"
          ".flip(1), mask)", "sums of rewards"),
    wrong(7, "one result", GAE, "return advantages", "two"),
    wrong(7, "None beside it", GAE, "return advantages, None", "not numbers"),
    wrong(7, "discounted sums", GAE, "total = rewards.clone()\n    for t in reversed(range(total"
          ".shape[1] - 1)):\n        total[:, t] += gamma * total[:, t + 1]\n"
          "    return advantages, total", "sums of rewards"),
    wrong(7, "a constant off", GAE, "return advantages + 1e-2 * mask, zero_off(advantages + "
          "values, mask)"),
    wrong(7, "gradient", "@torch.no_grad()\n", "", "gradient"),
    wrong(7, "in place", ZEROED, "    rewards[mask == 0] = 0\n" + ZEROED, "changed"),
    wrong(7, "whitened", GAE, "advantages = whiten(advantages, mask)\n    " + GAE, "whitened"),
    # ------------------------------------------------------------------------ 8
    wrong(8, "padding in the mean", "mean = masked_mean(x, mask)", "mean = x.mean()", "padding"),
    body(8, "mask forgotten", "return (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt() * mask",
         "padding"),
    body(8, "mask forgotten, all", "return (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()",
         "padding"),
    wrong(8, "n - 1", "masked_mean(deviations**2, mask)", "x[mask != 0].var()", "n - 1"),
    wrong(8, "mean added", WHITE, WHITE.replace(", mask", " + mean, mask"), "added the mean"),
    wrong(8, "mean kept", WHITE, WHITE.replace("deviations", "x"), "not subtract"),
    wrong(8, "no deviation", WHITE, "return zero_off(deviations, mask != 0)", "not divide"),
    wrong(8, "variance", WHITE, "return zero_off(deviations / (variance + 1e-8), mask != 0)",
          "by the variance"),
    body(8, "rows", f"mean = {ROWS}\n    x = x - mean[:, None]\n"
         f"    var = {ROWS.replace('x', 'x**2')}\n"
         "    return x * mask * torch.rsqrt(var[:, None] + 1e-8)", "each row"),
    wrong(8, "no 1e-8", WHITE, WHITE.replace(" + 1e-8", ""), "0 / 0"),
    wrong(8, "1e-8 outside", WHITE, "return zero_off(deviations / (variance.sqrt() + 1e-8), "
          "mask != 0)", "under the root"),
    wrong(8, "1e-5", WHITE, WHITE.replace("1e-8", "1e-5"), "1e-5"),
    body(8, "zeros in the mean", "x = x * mask\n    x = (x - x.mean()) * mask\n"
         "    return x * torch.rsqrt(masked_mean(x**2, mask) + 1e-8)", "as zeros"),
    body(8, "zeros in both", "x = x * mask\n    return (x - x.mean()) / (x.std() + 1e-8) * mask",
         "as zeros"),
    wrong(8, "square of x", "masked_mean(deviations**2, mask)", "masked_mean(x**2, mask)",
          r"x\^2"),
    body(8, "not zero, of junk", "mean = masked_mean(x, mask)\n    return (x - mean) * torch.rsqrt("
         "masked_mean((x - mean) ** 2, mask) + 1e-8)", "off the mask"),
    wrong(8, "first axis", "mean = masked_mean(x, mask)", "mean = x[0][mask[0]].mean()"),
    wrong(8, "not zero", WHITE, "return deviations * torch.rsqrt(variance + 1e-8)", "off the mask"),
    wrong(8, "in place", "zero_off(x, mask != 0)", "x.mul_(mask)", "changed"),
    wrong(8, "no return", WHITE, WHITE.replace("return ", ""), "None"),
    wrong(8, "a vector", WHITE, "return (deviations * torch.rsqrt(variance + 1e-8))[mask != 0]",
          "wrong shape"),
    # ------------------------------------------------------------------------ 9
    wrong(9, "sign", LOSS, LOSS.replace("loss = ", "loss = -"), "sign"),
    wrong(9, "sign of both", "advantages = zero_off(advantages, mask)",
          "advantages = -zero_off(advantages, mask)", "sign"),
    wrong(9, "smaller", LOSS, LOSS.replace("max(", "min("), "smaller"),
    wrong(9, "never", CLIPPED, "clipped = plain", "never clip"),
    wrong(9, "always", LOSS, "loss = masked_mean(clipped, mask)", "always"),
    wrong(9, "above only", CLIPPED, CLIPPED.replace("1 - clip_range, ", "max="), "large ratios"),
    wrong(9, "upside down", "zero_off(log_probs, mask) - zero_off(old_log_probs, mask)",
          "zero_off(old_log_probs, mask) - zero_off(log_probs, mask)", "upside down"),
    wrong(9, "sum", LOSS, LOSS.replace("masked_mean(", "zero_off(") + ".sum()", "sum"),
    wrong(9, "outside", SHARE, SHARE.replace("clipped > plain", "(ratio - 1).abs() > clip_range"),
          "outside the range"),
    wrong(9, "width", LOSS, "loss = torch.max(plain, clipped).mean()", "width"),
    wrong(9, "row means", LOSS, "loss = (torch.max(plain, clipped).sum(1) / mask.sum(1)).mean()",
          "row means"),
    wrong(9, "log-ratio", CLIPPED, "clipped = -advantages * log_ratio.clamp(-clip_range, clip_range"
          ").exp()", "log-ratio"),
    wrong(9, "no exp", "torch.exp(log_ratio.clamp(max=88))", "log_ratio", "exp"),
    wrong(9, "p / p", "torch.exp(log_ratio.clamp(max=88))", "log_probs / old_log_probs",
          "divided the log-probs"),
    wrong(9, "count", SHARE, "return loss, zero_off(clipped > plain, mask).sum()", "count"),
    wrong(9, "detached", LOSS, LOSS + ".detach()", "no gradient"),
    wrong(9, "clip is .2", CLIPPED, CLIPPED.replace("clip_range", "0.2"), "clip_range"),
    wrong(9, "padding in the share", SHARE, "return loss, (clipped > plain).double().sum() / "
          "mask.numel()", "share"),
    wrong(9, "ties", SHARE, SHARE.replace("clipped > plain", "clipped >= plain"), "strictly"),
    wrong(9, "no share", SHARE, "return loss, None", "not numbers"),
    wrong(9, "a new leaf", LOSS, LOSS + "\n    loss = loss.detach().requires_grad_()",
          "no gradient"),
    wrong(9, "positive advantages", SHARE, SHARE.replace("clipped > plain", "(clipped > plain) & "
          "(advantages > 0)")),
    wrong(9, "1 / (1 + c)", CLIPPED, CLIPPED.replace("1 - clip_range", "1 / (1 + clip_range)")),
    wrong(9, "clipped detached", CLIPPED, CLIPPED + "\n    clipped = clipped.detach()"),
    wrong(9, "order", SHARE, "return masked_mean((clipped > plain).to(loss.dtype), mask), loss",
          "order"),
    wrong(9, "loss only", SHARE, "return loss", "two"),
    wrong(9, "per token", LOSS, "loss = torch.max(plain, clipped) * mask", "one loss a token"),
    wrong(9, "whitened inside", "plain = -advantages", "advantages = (advantages - advantages.mean("
          ")) / advantages.std()\n    plain = -advantages", ""),
    wrong(9, "clamp(-c, c)", CLIPPED, CLIPPED.replace("1 - clip_range, 1 + clip_range",
          "-clip_range, clip_range"), "around 0"),
    wrong(9, "in place", "advantages = zero_off(advantages, mask)", "advantages *= mask",
          "changed"),
    wrong(9, "one mask", LOSS, "loss = masked_mean(torch.max(plain, clipped), mask[:1].expand_as("
          "mask))", "width"),
    # ------------------------------------------------------------------------ 10
    wrong(10, "no half", HALVED, LOSS, "1/2"),
    wrong(10, "both errors", HALVED, "loss = 0.5 * masked_mean(plain + clipped, mask)",
          "sum of the two"),
    wrong(10, ">=", SHARE, SHARE.replace(">", ">="), "equal"),
    wrong(10, "absolute errors", HALVED, "plain, clipped = plain**.5, clipped**.5\n    " + HALVED,
          "absolute"),
    wrong(10, "Huber", HALVED, "h = torch.nn.functional.smooth_l1_loss\n    loss = 0.5 * "
          "masked_mean(torch.max(h(values, returns, reduction='none'), h(near_old, returns, "
          "reduction='none')), mask)", "Huber"),
    wrong(10, "V itself", NEAR, "near_old = values.clamp(-clip_range, clip_range)", "V itself"),
    wrong(10, "the change", NEAR, "near_old = (values - old_values).clamp(-clip_range, clip_range)",
          "change of V"),
    wrong(10, "old near V", NEAR, "near_old = old_values.clamp(values - clip_range, values + "
          "clip_range)", "old value around V"),
    wrong(10, "smaller", HALVED, HALVED.replace("max(", "min("), "smaller"),
    wrong(10, "never", "clipped = (near_old - returns) ** 2", "clipped = plain", "never clip"),
    wrong(10, "always", HALVED, "loss = 0.5 * masked_mean(clipped, mask)", "always"),
    wrong(10, "around returns", NEAR, NEAR.replace("old_values -", "returns -").replace(
        "old_values +", "returns +"), "around the returns"),
    wrong(10, "row means", HALVED,
          "loss = 0.5 * (torch.max(plain, clipped).sum(1) / mask.sum(1)).mean()", "row means"),
    wrong(10, "width", HALVED, "loss = 0.5 * torch.max(plain, clipped).mean()", "width"),
    wrong(10, "clip is .2", NEAR, NEAR.replace("clip_range", "0.2"), "clip_range"),
    wrong(10, "clipped halved", HALVED, "loss = masked_mean(torch.max(plain, 0.5 * clipped), mask)",
          "1/2"),
    wrong(10, "detached", HALVED, HALVED + ".detach()", "no gradient"),
    wrong(10, "outside", SHARE, SHARE.replace("clipped > plain", "(values - old_values).abs() > "
          "clip_range"), "outside the range"),
    wrong(10, "count", SHARE, "return loss, zero_off(clipped > plain, mask).sum()", "count"),
    wrong(10, "padding in the share", SHARE, "return loss, (clipped > plain).double().sum() / "
          "mask.numel()", "share"),
    wrong(10, "half inside", HALVED, "loss = masked_mean(torch.max(0.5 * plain, clipped), mask)",
          "1/2"),
    wrong(10, "clipped detached", "clipped = (near_old - returns) ** 2", "clipped = ((near_old - "
          "returns) ** 2).detach()"),
    wrong(10, "absolute", "plain = (values - returns) ** 2", "plain = (values - returns).abs()"),
    wrong(10, "relative", NEAR, "near_old = values.clamp(old_values * (1 - clip_range), "
          "old_values * (1 + clip_range))", "share of the old"),
    wrong(10, "sum", HALVED, "loss = 0.5 * torch.max(plain, clipped).sum()", "sum"),
    wrong(10, "loss only", SHARE, "return loss", "two"),
    wrong(10, "in place", "returns = zero_off(returns, mask)", "returns *= mask", "changed"),
    # ------------------------------------------------------------------------ 11
    wrong(11, "first order", VOTES, 'float(first == "A")', "first order"),
    wrong(11, "not turned", VOTES, VOTES.replace('second == "B"', 'second == "A"'), "turn"),
    wrong(11, "same order twice", "judge(posts, theirs, ours)", "judge(posts, ours, theirs)",
          "twice in the same order"),
    wrong(11, "exchanged", VOTES, '((first == "B") + (second == "A")) / 2', "exchanged"),
    wrong(11, "a tie for None", "None if None in (first, second)", "0.5 if None in (first, second)",
          "abstain"),
    wrong(11, "a loss for None", "None if None in (first, second) else ", "", "abstain"),
    wrong(11, "both must abstain", "None in (first, second)", "first is None and second is None",
          "abstain"),
    wrong(11, "prose", "if wrong or len", "verdicts[:] = [v and v[:1] for v in verdicts]\n"
          "        if len", "no verdict"),
    wrong(11, "upper case", "if wrong or len", "verdicts[:] = [v and v.upper() for v in verdicts]\n"
          "        wrong = set(verdicts) - {'A', 'B', None}\n        if wrong or len",
          "no verdict"),
    wrong(11, "the second isn't looked at", "for verdicts in both_orders:", "for verdicts in "
          "both_orders[:1]:", "second order"),
    wrong(11, "no tie", VOTES, 'float(first == "A" and second == "B")', "tie"),
    wrong(11, "None for a tie", VOTES, '({("A", "B"): 1.0, ("B", "A"): 0.0}).get((first, second))',
          "not numbers"),
    wrong(11, "one number", "return [None if", "return 0.5\n    return [None if", "a float"),
    wrong(11, "votes in words", VOTES, 'first + second', "not numbers"),
    wrong(11, "any win", VOTES, 'float(first == "A" or second == "B")', "tie"),
    body(11, "zip", "first, second = judge(posts, ours, theirs), judge(posts, theirs, ours)\n"
         "    if (set(first) | set(second)) - {'A', 'B', None}: raise ValueError('verdict')\n"
         "    return [None if None in pair else ((pair[0] == 'A') + (pair[1] == 'B')) / 2\n"
         "            for pair in zip(first, second)]", "one pair"),
    body(11, "post by post", """if not len(posts) == len(ours) == len(theirs):
        raise ValueError("unequal")
    outcomes = []
    for post, a, b in zip(posts, ours, theirs):
        first, second = judge([post], [a], [b])[0], judge([post], [b], [a])[0]
        if not {first, second} <= {"A", "B", None}:
            raise ValueError("no verdict")
        if first is None or second is None:
            outcomes.append(None)
        else:
            outcomes.append(0.5 if first == second else float(first == "A"))
    return outcomes""", "6 times about 3 pairs"),
    wrong(11, "not halved", VOTES, VOTES.replace(" / 2", ""), "halve"),
    wrong(11, "lists turned round", "judge(posts, theirs, ours)", "judge(posts[::-1], theirs[::-1],"
          " ours[::-1])", "turned the lists"),
    wrong(11, "posts are lost", "judge(posts, theirs", "judge(posts[::-1], theirs", ""),
    # ------------------------------------------------------------------------ 12
    wrong(12, "plain", "center = (share + z**2 / (2 * n)) / (1 + z**2 / n)\n    " + HALF,
          "center = share\n    half = z * math.sqrt(share * (1 - share) / n)", "standard errors"),
    wrong(12, "one standard error", "if n == 0", "z = 1\n    if n == 0", "one standard error"),
    wrong(12, "z is 1.96", "if n == 0", "z = 1.959964\n    if n == 0", "do not use z"),
    wrong(12, "nothing is 0", "return math.nan, math.nan", "return 0.0, 0.0", "NaN"),
    wrong(12, "nothing is all", "return math.nan, math.nan", "return 0.0, 1.0", "NaN"),
    wrong(12, "a count", "if n == 0", "share = share / max(n, 1)\n    if n == 0", "count"),
    wrong(12, "center is the share", "center = (share + z**2 / (2 * n)) / (1 + z**2 / n)",
          "center = share", "centre"),
    wrong(12, "second term", HALF, HALF.replace(" + z**2 / (4 * n**2)", ""), r"z\^2"),
    wrong(12, "half not divided", HALF, HALF.replace("z / (1 + z**2 / n)", "z"), "divide half"),
    wrong(12, "no z before the root", HALF, HALF.replace("z /", "1 /"), "left out the z"),
    wrong(12, "z^2 before the root", HALF, HALF.replace("z /", "z**2 /"), "squared the z"),
    wrong(12, "z in the centre", "share + z**2 /", "share + z /", "z in the centre"),
    wrong(12, "z under the root", HALF, HALF.replace("+ z**2 / (4", "+ z / (4"),
          "z under the root"),
    wrong(12, "n under the root", HALF, HALF.replace("n**2", "n"), "square n"),
    wrong(12, "share is the centre's top", "(share + z**2 / (2 * n))", "share", "in the centre"),
    wrong(12, "Agresti-Coull", HALF, "half = z * math.sqrt(center * (1 - center) / (n + z**2))",
          "Agresti"),
    wrong(12, "percent", "return max(center - half, 0.0), min(center + half, 1.0)",
          "return 100 * (center - half), 100 * (center + half)", "percent"),
    wrong(12, "a whole number of wins", "if n == 0", "if n:\n        share = int(share * n) / n\n"
          "    if n == 0", ""),
    wrong(12, "one end", "return max(center - half, 0.0), min(center + half, 1.0)",
          "return center - half", "a float"),
    wrong(12, "order", "return max(center - half, 0.0), min(center + half, 1.0)",
          "return min(center + half, 1.0), max(center - half, 0.0)", "order"),
    wrong(12, "center and half", "return max(center - half, 0.0), min(center + half, 1.0)",
          "return center, half", "half"),
    wrong(12, "no return", "return max(center", "max(center", "None"),
]


RIGHT = [
    body(1, "a loop", """out = torch.zeros(len(labels), labels.shape[1] - 1).double()
    for b in range(labels.shape[0]):
        for p in range(labels.shape[1] - 1):
            x = logits[b, p].double() / temperature
            out[b, p] = x[labels[b, p + 1]] - torch.logsumexp(x, 0)
    return out"""),
    body(1, "cross entropy", """V = logits.shape[-1]
    losses = F.cross_entropy(logits[:, :-1].double().reshape(-1, V) / temperature,
                             labels[:, 1:].reshape(-1), reduction="none")
    return -losses.view(len(labels), -1)"""),
    body(1, "one-hot", """one = F.one_hot(labels[:, 1:], logits.shape[-1])
    return (F.log_softmax(logits[:, :-1].float() / temperature, -1) * one).sum(-1)"""),
    body(2, "a loop", """ends, mask = torch.as_tensor(eos_token_id).reshape(-1).tolist(), []
    for row in responses.tolist():
        mask.append([not set(row[:t]) & set(ends) for t in range(len(row))])
    return torch.tensor(mask)"""),
    body(2, "shifted", """ended = is_eos(responses, eos_token_id).cumsum(1) > 0
    return ~torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1)"""),
    body(3, "softplus", "return F.softplus(rejected - chosen).mean()"),
    body(3, "logaddexp", "gap = chosen - rejected\n"
         "    return torch.logaddexp(torch.zeros_like(gap), -gap).sum() / len(gap)"),
    body(3, "a loop", """total = 0
    for a, b in zip(chosen, rejected):
        total = total - F.logsigmoid(a - b)
    return total / len(chosen)"""),
    body(4, "from the right", "L = attention_mask.shape[1]\n"
         "    return L - 1 - attention_mask.flip(1).argmax(1)"),
    body(4, "a loop", "return torch.tensor([max(i for i, x in enumerate(row) if x) "
         "for row in attention_mask.tolist()])"),
    body(5, "one by one", """total = 0
    for query, reference in zip(queries, references):
        total += score_summaries(reward_model, [query], [reference], pad_id, 1).item()
    reward_model.reference_mean = reward_model.reference_mean + total / len(queries)"""),
    body(5, "from 0", """reward_model.reference_mean.fill_(0)
    scores = score_summaries(reward_model, queries, references, pad_id, batch_size)
    reward_model.reference_mean.copy_(scores.mean())"""),
    body(6, "a loop", """rewards = torch.zeros_like(log_probs)
    for b in range(len(scores)):
        n = int(mask[b].sum())
        for t in range(n):
            rewards[b, t] = -kl_beta * (log_probs[b, t] - ref_log_probs[b, t])
        rewards[b, n - 1] += scores[b]
    return rewards"""),
    body(6, "arange", """n = mask.long().sum(1)
    rewards = (-kl_beta * (log_probs - ref_log_probs)).masked_fill(mask == 0, 0)
    rewards[torch.arange(len(n)), n - 1] += scores
    return rewards"""),
    body(6, "one-hot", """last = F_one(mask.long().sum(1) - 1, mask.shape[1])
    return scores[:, None] * last + torch.where(mask, kl_beta * (ref_log_probs - log_probs), 0)"""
         .replace("F_one", "torch.nn.functional.one_hot")),
    body(7, "row by row", """advantages = torch.zeros_like(values)
    for b in range(len(values)):
        after, advantage = 0, 0
        for t in reversed(range(int(mask[b].sum()))):
            advantage = rewards[b, t] + gamma * after - values[b, t] + gamma * lam * advantage
            advantages[b, t], after = advantage, values[b, t]
    return advantages.detach(), ((advantages + values) * mask).detach()"""),
    body(7, "a sum of deltas", """rewards, values = rewards * mask, (values * mask).detach()
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = rewards + gamma * after - values
    steps = torch.arange(mask.shape[1])
    power = (steps[:, None] - steps).to(values.dtype)  # how much later
    weights = torch.where(power >= 0, (gamma * lam) ** power.clamp(min=0), 0)
    advantages = delta @ weights * mask
    return advantages, advantages + values"""),
    body(8, "indexed", """mask = mask.bool()
    out, kept = torch.zeros_like(x), x[mask]
    out[mask] = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()
    return out"""),
    body(8, "sums", """n = mask.sum()
    mean = (x * mask).sum() / n
    variance = (x**2 * mask).sum() / n - mean**2
    return (x - mean) / (variance.clamp(min=0) + 1e-8) ** 0.5 * mask"""),
    body(9, "minus the smaller gain", """ratio = torch.exp(log_probs - old_log_probs)
    gain = torch.minimum(advantages * ratio,
                         advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))
    held = (advantages * ratio > gain) & (mask != 0)
    return -(gain * mask).sum() / mask.sum(), held.sum() / mask.sum()"""),
    body(9, "a loop", """total, held, n = 0, 0, int(mask.sum())
    for b, t in mask.nonzero().tolist():
        rho, a = (log_probs[b, t] - old_log_probs[b, t]).exp(), advantages[b, t]
        clip = min(max(rho.item(), 1 - clip_range), 1 + clip_range)
        if -a * clip > -a * rho:
            total, held = total - a * clip, held + 1
        else:
            total = total - a * rho
    return total / n, held / n"""),
    body(10, "the step clipped", """step = (values - old_values).clamp(-clip_range, clip_range)
    near = old_values + step
    errors = torch.stack([(values - returns) ** 2, (near - returns) ** 2])
    kept = mask.bool()
    return errors.amax(0)[kept].mean() / 2, (errors[1] > errors[0])[kept].double().mean()"""),
    body(11, "the second order first", """if not len(posts) == len(ours) == len(theirs):
        raise ValueError("unequal")
    turned = judge(posts, theirs, ours)
    straight = judge(posts, ours, theirs)
    if any(x not in ("A", "B", None) for x in [*turned, *straight]):
        raise ValueError("no verdict")
    points = {("A", "B"): 1.0, ("B", "A"): 0.0}
    return [None if None in pair else points.get(pair, 0.5) for pair in zip(straight, turned)]"""),
    body(11, "both orders in one call", """if not len(posts) == len(ours) == len(theirs):
        raise ValueError("unequal")
    n, said = len(posts), judge(posts + posts, ours + theirs, theirs + ours)
    if set(said) - {"A", "B", None}:
        raise ValueError("no verdict")
    return [None if said[i] is None or said[n + i] is None else
            ((said[i] == "A") + (said[n + i] == "B")) / 2 for i in range(n)]"""),
    body(12, "the quadratic equation", """if not n:
        return float("nan"), float("nan")
    a, b, c = 1 + z * z / n, -2 * share - z * z / n, share * share
    root = math.sqrt(max(b * b - 4 * a * c, 0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)"""),
]
