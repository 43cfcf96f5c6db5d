"""The one table of the paper's equations: map.md and the pages are made of it by build.py.

An equation is LaTeX in which `<name>` stands for a symbol, by its key in SYMBOLS: so a symbol is
one thing in the equation and in the code.
"""

# The rows of map.md, as they stand there; and for the pages the equation of each function, one line
# or more. The pencil example is that of the first function, or of the one named in "of".
MAP = [
    {"paper": "B.2, Table 4",
     "equation": "the prompt; a post that is too long is cut at newlines",
     "functions": {"tldr.build_prompt": "", "tldr.truncate_post": "", "tldr.encode_prompts": ""},
     "test": "test_tldr.py", "of": "tldr.truncate_post",
     "pencil": "lines a, bb and cccc in a frame of three characters, at most 10: a and bb stay"},
    {"paper": "3.4",
     "equation": "maximise log π(y\\|x) on references",
     "functions": {"sft.train_sft":
                   r"\mathrm{loss} = -<mean>[\log <pi>(y_t \mid x, y_{\lt t})]"},
     "test": "test_loop.py", "pencil": "log-probs (−1, −2, −.5) and (−1.5): loss 1.25"},
    {"paper": "3.4",
     "equation": "log π(y_t \\| x, y_<t), at one temperature",
     "functions": {"lm.get_log_probs":
                   r"\log <pi>(<labels> \mid x, y_{\lt t})"
                   "\n" r"\quad = \frac{<logits>_{<labels>}}{<temperature>}"
                   r" - \log\sum_v \exp\frac{<logits>_v}{<temperature>}",
                   "lm.response_log_probs":
                   r"\log <pi>(y \mid x)"
                   "\n" r"\quad = \sum_{t=1}^{<width>} \log <pi>(y_t \mid x, y_{\lt t})"},
     "test": "test_lm.py",
     "pencil": "logits (2,0,0), (0,1,0), (0,0,3) and next tokens 1, 2, 1: "
               "−2.239545, −1.551445, −3.094923"},
    {"paper": "3.4",
     "equation": "EOS ends the episode and is an action",
     "functions": {"lm.get_response_mask":
                   r"<mask>_t = 1 \;\text{ if }\; \sum_{s \lt t} <ends>_s = 0,"
                   r" \;\text{ else }\; 0"},
     "test": "test_lm.py", "pencil": "EOS = 9: (5, 9, 7, 9) → 1 1 0 0"},
    {"paper": "3.4",
     "equation": "loss = −E log σ(r(x, y_i) − r(x, y_1−i))",
     "functions": {"reward.preference_loss":
                   r"\mathrm{loss}(r) ="
                   "\n" r"\quad -<mean>[\log <sigmoid>(<chosen> - <rejected>)]"},
     "test": "test_reward.py", "pencil": "r = (2, 0, −1) against (1, .5, −1): 0.660162"},
    {"paper": "B.1",
     "equation": "head ~ N(0, 1/(d+1)), where 1/(d+1) is the variance",
     "functions": {"reward.RewardModel": r"<head> \sim N\left(0, \frac{1}{<d> + 1}\right)"},
     "test": "test_reward.py", "pencil": "d = 3: standard deviation 0.5"},
    {"paper": "3.4",
     "equation": "the references score 0 on average",
     "functions": {"reward.normalize":
                   r"<scores>(x, y) \leftarrow <scores>(x, y) - <reference_mean>"},
     "test": "test_loop.py", "pencil": "1.5, 2.5, .5, 3.5 → −.5, .5, −1.5, 1.5"},
    {"paper": "3.4",
     "equation": "R = r(x, y) − β log π^RL(y\\|x)/π^SFT(y\\|x)",
     "functions": {"ppo.kl_penalized_rewards":
                   r"<rewards>(x, y) = <scores>(x, y) - <kl_beta> \log"
                   r"\frac{<policy>(y \mid x)}{<reference>(y \mid x)}"},
     "test": "test_ppo.py",
     "pencil": "KL terms (.2, −.5, .5), β = .05, score 2: (−.01, .025, 1.975), sum 1.99"},
    {"paper": "3.4 (γ = 1), B.1 (λ = .95)",
     "equation": "δ_t = R_t + γV_t+1 − V_t; A_t = δ_t + γλA_t+1",
     "functions": {"ppo.compute_gae":
                   r"<delta>_t = <rewards>_t + <gamma> <values>_{t+1} - <values>_t"
                   "\n" r"<advantages>_t = <delta>_t + <gamma> <lam> <advantages>_{t+1}"
                   "\n" r"<returns>_t = <advantages>_t + <values>_t"},
     "test": "test_ppo.py",
     "pencil": "R as above, V = (.1, .2, .3): A = (1.7204375, 1.71625, 1.675)"},
    {"paper": "silent; 2019 code",
     "equation": "whitened advantages",
     "functions": {"ppo.whiten":
                   r"<x> \leftarrow \frac{<x> - <mu>}{\sqrt{<variance> + 10^{-8}}}"},
     "test": "test_ppo.py",
     "pencil": "1, 2, 3, 5, padding ignored: −1.183216, −.507093, .169031, 1.521278"},
    {"paper": "3.4 (PPO, eq. 7)",
     "equation": "max(−Aρ, −A clip(ρ, 1−ε, 1+ε))",
     "functions": {"ppo.policy_loss":
                   r"<ratio> = <policy>(y_t) / <old>(y_t)"
                   "\n" r"<loss_p> = <mean>[\max(-<advantages> <ratio>,"
                   "\n" r"\qquad -<advantages> \,\mathrm{clip}(<ratio>, 1 - <clip_range>,"
                   r" 1 + <clip_range>))]"},
     "test": "test_ppo.py",
     "pencil": "ρ = (1.5, 1.5, .5, .5, 1.1), A = (1, −1, 1, −1, 2): −0.32, clipped 0.4"},
    {"paper": "silent; 2019 code",
     "equation": "½ max((V−R)², (clip V − R)²)",
     "functions": {"ppo.value_loss":
                   r"<near_old> = \mathrm{clip}(<values>, <old_values> - <clip_range>,"
                   r" <old_values> + <clip_range>)"
                   "\n" r"<loss_v> = \frac{1}{2} <mean>[\max((<values> - <returns>)^2,"
                   "\n" r"\qquad (<near_old> - <returns>)^2)]"},
     "test": "test_ppo.py", "pencil": "V_old = 1, V = (1.5, 1.1, .5), R = 2: 0.616667"},
    {"paper": "3.4, G.1",
     "equation": "V starts as the reward model, and shares no weight with π",
     "functions": {"ppo.train_ppo": r"<reference> = <policy>, \quad <values> = <scores>"
                                    r" \quad\text{at the start}"},
     "test": "test_loop.py", "pencil": "no number: both score alike before the first step"},
    {"paper": "B.1",
     "equation": "learning rates: PPO's linear, here to 1/(number of updates) of the first; "
                 "the others cosine, here to nearly 0",
     "functions": {"lm.linear_schedule": r"\eta_{<step>} / \eta_0 = 1 - <step> / <total>",
                   "lm.cosine_schedule":
                   r"\eta_{<step>} / \eta_0 = \frac{1 + \cos(\pi <step> / <total>)}{2}"},
     "test": "test_lm.py", "pencil": "4 updates from 1.5e-5, linear: 1.5, 1.125, .75, .375 e-5"},
    {"paper": "4.1, Fig. 1",
     "equation": "fraction preferred to the reference",
     "functions": {"judge.judge_pairwise":
                   r"\frac{1}{2} [<first> = \text{A}] + \frac{1}{2} [<second> = \text{B}]",
                   "judge.win_rate": r"<share> = \frac{<wins> + \frac{1}{2} <ties>}"
                                     r"{<wins> + <losses> + <ties>}"},
     "test": "test_judge.py", "pencil": "60 of 90: 0.667, interval 0.564 – 0.755",
     "of": "judge.win_rate"},
    {"paper": "F",
     "equation": "preference at equal length",
     "functions": {"judge.length_controlled_win_rate":
                   r"P(\text{win}) = <sigmoid>\left(a + b \log"
                   r"\frac{<our_lengths>}{<their_lengths>}\right)"
                   "\n" r"(a, b) = <weights>"
                   "\n" r"\text{at equal lengths:}\; <sigmoid>(a)"},
     "test": "test_judge.py",
     "pencil": "a = .4, b = 1.5: .700567 at log ratio .3, .598688 at 0"},
    {"paper": "G.3, Table 10",
     "equation": "KL of best of n = log n − (n−1)/n",
     "functions": {"judge.best_of_n_kl": r"\mathrm{KL} = \log <n> - \frac{<n> - 1}{<n>}"},
     "test": "test_judge.py", "pencil": "n = 8: 1.204442"},
]

# Further equations for the page: function -> (section of the paper, or "" where it has none; LaTeX)
OTHERS = {
    "lm.zero_off": ("", r"<x>_i \;\text{ if }\; <mask>_i = 1, \;\text{ else }\; 0"),
    "lm.masked_mean": ("", r"<mean>[<x>] = \frac{\sum_i <x>_i <mask>_i}{\sum_i <mask>_i}"),
    "lm.get_position_ids":
        ("", r"<position_ids>_i = \max\left(0, \sum_{j \le i} <attention_mask>_j - 1\right)"),
    "lm.last_token_index": ("", r"\max\{i : <attention_mask>_i = 1\}"),
    "lm.next_token": ("3.4", r"y_t \sim \mathrm{softmax}\left(<logits> / <temperature>\right)"),
    "lm.sample": ("3.4", r"y \sim <pi>(\cdot \mid x)"),
    "reward.RewardModel.score": ("3.4", r"<scores>(x, y)"),
    "reward.train_reward": ("3.4", r"<scores> = \operatorname{arg min}_r \;\mathrm{loss}(r)"),
    "reward.preference_accuracy": ("", r"<mean>\left[<chosen> \gt <rejected>\right]"),
    "ppo.penalize_missing_eos":
        ("silent; N+ detail 23", r"<scores>(x, y) \leftarrow <missing_eos> \;\text{ without EOS}"),
    "ppo.rollout":
        ("3.4", r"y \sim <old>(\cdot \mid x), \quad <old> = <policy> \;\text{ as it is}"),
    "ppo.response_values": ("3.4", r"<values>_t = <values>(x, y_{\lt t})"),
    "judge.wilson_interval":
        ("", r"(<share> - p)^2 = <z>^2 \,\frac{p (1 - p)}{<count>}"
             "\n" r"p = <center> \pm <half>"),
    "judge.best_of_n":
        ("G.3", r"y = \operatorname{arg max}_{y_1 \ldots y_{<n>}} <scores>(x, y_i)"
             "\n" r"y_i \sim <pi>(\cdot \mid x)"),
    "judge.reward_model_judge":
        ("", r"\text{A} \;\text{ if }\; <scores>(x, y_A) \ge <scores>(x, y_B)"),
    "toy.compare":
        ("3.4", r"P(\text{A is chosen}) = \frac{1}{1 + \exp(-<log_odds>)}"
                "\n" r"<log_odds> = \frac{<gap> + <length_bias> <more_words>}{<noise>}"),
    "toy.label_ceiling":
        ("", r"\frac{1}{n} \sum_{i=1}^{n} \frac{1}{1 + \exp(-|<log_odds>_i|)}"),
}

# key -> (LaTeX, meaning, unit, its names in the code). A name with a dot is valid only in that
# function (`whiten.x`), after that variable (`part.values`) or in that file (`sft.log_probs`).
SYMBOLS = {
    "pi": (r"\pi", "the probability that the language model gives a token; log_probs is its "
           "logarithm", "log_probs: nats", "lm.log_probs lm.model sft.log_probs sft.model "
           "best_of_n.model response_log_probs rlhf_minimal.sft rlhf_minimal.model"),
    "policy": (r"\pi^{\mathrm{RL}}", "the policy, the language model that PPO trains; log_probs is "
               "its log π(y_t | x, y_<t)", "log_probs: nats", "policy log_probs"),
    "old": (r"\pi_{\mathrm{old}}", "the policy that wrote the summaries of this batch",
            "old_log_probs: nats", "old_log_probs part.log_probs batch.log_probs rollout.log_probs "
            "Batch.log_probs"),
    "reference": (r"\pi^{\mathrm{SFT}}", "the supervised model, frozen: what the KL penalty holds "
                  "the policy to", "ref_log_probs: nats",
                  "reference ref_log_probs"),
    "kl_beta": (r"\beta", "weight of the KL penalty; paper: 0.05", "reward per nat", "kl_beta"),
    "scores": (r"r", "what the reward model says of a whole summary; references have mean 0",
               "log-odds of being preferred (one unit of reward)",
               "scores score reward_model"),
    "chosen": (r"r(x, y_i)", "score of the summary that the labeler preferred",
               "log-odds", "preference_loss.chosen preference_accuracy.chosen train_reward.better "
               "measure_reward_model.chosen"),
    "rejected": (r"r(x, y_{1-i})", "score of the other summary of the same post",
                 "log-odds", "preference_loss.rejected preference_accuracy.rejected "
                 "train_reward.worse measure_reward_model.rejected"),
    "sigmoid": (r"\sigma", "the logistic function 1 / (1 + exp(−d)): a difference of scores → the "
                "probability of being preferred", "a probability", "sigmoid logsigmoid"),
    "mean": (r"\mathbb{E}", "the mean: over pairs, over posts, or over all actions of a batch",
             "that of what is averaged", "masked_mean preference_loss.mean "
             "preference_accuracy.mean judge.mean"),
    "head": (r"w", "weights of the linear head that makes a score of a hidden state",
             "reward per unit of hidden state", "__init__.head forward.head"),
    "d": (r"d", "width of the model: entries of a hidden state", "a number", "__init__.d"),
    "reference_mean": (r"\bar r_{\mathrm{ref}}", "mean score of the human references, subtracted "
                       "from every score", "reward", "reference_mean"),
    "rewards": (r"R", "what is earned: at each action the KL penalty, at the last one the score "
                "too", "reward", "rewards"),
    "values": (r"V", "what the critic expects a summary still to earn, before action t", "reward",
               "ppo.values next_value critic"),
    "old_values": (r"V_{\mathrm{old}}", "the critic's value when the summaries were sampled",
                   "reward", "old_values part.values rollout.values Batch.values"),
    "near_old": (r"V_{\mathrm{clip}}", "the value, held within ε of the old one", "reward",
                 "near_old"),
    "returns": (r"\hat R", "advantage + value: what the critic learns to predict", "reward",
                "returns"),
    "delta": (r"\delta", "how far one step went better than expected", "reward", "delta"),
    "advantages": (r"A", "how much better an action turned out than the critic expected",
                   "reward; after whitening, standard deviations",
                   "advantages next_advantage"),
    "gamma": (r"\gamma", "discount of what comes a token later; paper: 1", "no unit", "gamma"),
    "lam": (r"\lambda", "trust in what happened over what the critic says; paper: 0.95", "no unit",
            "lam"),
    "ratio": (r"\rho", "how much likelier the action is now than when it was sampled",
              "no unit (log_ratio: nats)", "ratio log_ratio"),
    "clip_range": (r"\varepsilon", "how far ratio and value may move before the gradient stops; "
                   "2019 code: 0.2", "no unit (for values: reward)", "clip_range clip_range_value"),
    "loss_p": (r"L^{\pi}", "the policy's loss: what its step makes smaller",
               "that of A", "loss_p policy_loss.loss"),
    "loss_v": (r"L^V", "the critic's loss: half the squared error of its values", "reward, squared",
               "loss_v value_loss.loss"),
    "missing_eos": (r"c", "the score of a summary that never ended; N+: −1", "reward",
                    "penalize_missing_eos.value missing_eos"),
    "mu": (r"\mu", "mean over the masked entries", "that of x", "whiten.mean"),
    "variance": (r"\sigma^2", "population variance over the masked entries", "that of x, squared",
                 "variance"),
    "x": (r"x", "any tensor of numbers, one for each token", "any",
          "whiten.x masked_mean.x zero_off.x"),
    "mask": (r"m", "1 where a token is an action of the summary, EOS included; 0 at padding",
             "0 or 1", "mask"),
    "attention_mask": (r"m", "1 at a real token, 0 at padding", "0 or 1",
                       "attention_mask query_mask response_mask pad.mask sample.mask "
                       "write_summaries.mask score_summaries.mask"),
    "position_ids": (r"p", "the place of a token in its text, padding not counted", "tokens",
                     "position_ids"),
    "ends": (r"e", "1 where the token is an EOS", "0 or 1", "ends is_eos"),
    "labels": (r"y_t", "token t of the summary", "a token id", "get_log_probs.labels"),
    "logits": (r"z", "what the model puts out for each token v of the vocabulary", "nats, up to a "
               "constant", "logits"),
    "temperature": (r"\tau", "divides the logits; 0 takes the likeliest token", "no unit",
                    "temperature"),
    "width": (r"T", "columns of the responses: tokens of the longest summary", "tokens", "width T"),
    "step": (r"s", "number of the step or update, from 0", "steps",
             "lm.step sft.step reward.step update"),
    "total": (r"S", "number of all steps or updates", "steps",
              "lm.total sft.total reward.total n_updates"),
    "first": (r"v_1", "the verdict when ours is summary A", "A or B", "judge_pairwise.first"),
    "second": (r"v_2", "the verdict when ours is summary B", "A or B", "judge_pairwise.second"),
    "share": (r"\hat p", "share of the answered posts on which ours is preferred, a tie is half",
              "0 to 1", "wilson_interval.share win_rate.share"),
    "wins": (r"W", "posts on which ours was chosen in both orders", "posts", "wins"),
    "losses": (r"L", "posts on which theirs was chosen in both orders", "posts", "losses"),
    "ties": (r"U", "posts on which the two orders contradict each other, or the summaries are "
             "equal", "posts", "ties"),
    "z": (r"z", "standard errors of a 95 % interval: 1.96", "standard errors", "wilson_interval.z"),
    "count": (r"n", "answered posts", "posts", "wilson_interval.n"),
    "center": (r"p_0", "middle of the interval", "0 to 1", "center"),
    "half": (r"h", "half its length", "0 to 1", "half"),
    "our_lengths": (r"\ell_{\mathrm{ours}}", "length of our summary", "characters", "our_lengths"),
    "their_lengths": (r"\ell_{\mathrm{theirs}}", "length of theirs", "characters", "their_lengths"),
    "weights": (r"w", "the two coefficients a and b of the regression", "log-odds",
                "length_controlled_win_rate.weights"),
    "n": (r"n", "samples to choose the best from", "a number", "best_of_n.n best_of_n_kl.n "
          "settings.best_of_n"),
    "log_odds": (r"\ell", "log-odds of the label: how sure the labeler is", "log-odds",
                 "log_odds"),
    "gap": (r"(q_A - q_B)", "difference of the two summaries in the labeler's taste",
            "points of taste", "compare.gap"),
    "length_bias": (r"b", "what a word more is worth to the labeler; 0 by default",
                    "points of taste per word", "compare.length_bias"),
    "more_words": (r"w", "how many words summary A is longer", "words", "more_words"),
    "noise": (r"\nu", "temperature of the labels: with a large one the labeler slips often",
              "points of taste", "NOISE"),
}

# Functions whose pencil example is neither in the map nor in the file's own: a test of theirs
PENCIL_TESTS = {
    "toy.true_quality": "test_taste_by_hand",
    "toy.fact_accuracy": "test_fact_accuracy_counts_stated_facts",
    "toy.label_ceiling": "test_label_ceiling_counts_the_likelier_label",
    "lm.zero_off": "test_zero_off_reads_nothing_off_the_mask",
    "lm.pad": "test_pad",
    "lm.join": "test_join_puts_queries_left_and_responses_right",
    "lm.next_token": "test_every_token_may_be_drawn_and_top_p_stops_where_it_is_reached",
    "lm.sample": "test_a_padding_id_drawn_before_eos_is_an_ordinary_token",
    "lm.encode_responses": "test_encode_responses",
    "lm.cosine_schedule": "test_schedules",
    "reward.RewardModel.score": "test_the_score_stands_at_the_last_real_token",
    "ppo.penalize_missing_eos": "test_penalize_missing_eos_replaces_the_score",
    "judge.best_of_n": "test_best_of_n_takes_the_best_by_score",
    "judge.quality_judge": "test_quality_judge",
    "judge.length_accuracy": "test_length_and_post_blind_baselines",
    "tldr.truncate_post": "test_truncate_post",
}


def markdown():
    """map.md: the rows of MAP as a table."""
    lines = ["# The map: each equation, its function, its test", "",
             "The first column is the section of Stiennon et al. 2020. The last one is an example "
             "that you can redo with a pencil; the function's test has it too.", "",
             "| paper | equation | function | test | pencil example |", "|---|---|---|---|---|"]
    for row in MAP:
        functions = ", ".join(f"`{name}`" for name in row["functions"])
        cells = row["paper"], row["equation"], functions, f"`{row['test']}`", row["pencil"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "`python docs/build.py` writes this file from `equations.py`.", ""]
    return "\n".join(lines)
