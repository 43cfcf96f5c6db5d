"""What there is before anything is trained: folder, data, models; what is wrong is said here."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

import toy
from engine.batches import posts_per_update
from engine.checkpoints import is_finished
from engine.data import check_titles, load_task
from engine.devices import available_memory, pick_device, pick_dtype
from engine.folder import Run
from engine.judges import load_judge
from engine.memory import check_memory, memory_plan, peak_of
from engine.models import causal_config, from_hub, go_offline_unless_reachable
from engine.models import load_for_training, load_tokenizer
from engine.origin import SOURCES, check_folder, describe, describe_hub, recorded
from engine.processes import agreed, start_processes
from engine.reward import RewardModel
from engine.settings import JUDGES, SettingError


def prepare_run(settings):
    """What there is before anything is trained: the run's folder, its data, tokenizer and model to
    start from, and reward model and judge, None where they are trained here. None for a run that is
    finished. Whatever is missing, wrong or too large for this machine ends the run here."""
    device = start_processes(pick_device(settings.device))
    dtype = pick_dtype(settings.dtype, device)
    folder, flags = settings.output_dir, (settings.restart, settings.resume)
    if settings.resume and settings.checkpoint_activations is None:  # what was chosen then
        settings.checkpoint_activations = recorded(folder, "checkpoint_activations")
    config = describe(vars(settings))
    # First what takes no time
    with agreed():
        posts_per_update(settings)
        check_folder(folder, config, *flags)
    if settings.resume and is_finished(folder):
        shutil.rmtree(Path(folder, "checkpoints"), ignore_errors=True)  # a kill may have left them
        print(f"{folder} is finished, nothing to resume: see {Path(folder, 'report.md')}")
        return None
    # Then what is read or downloaded. The folder is made last, when nothing is wrong
    with agreed():
        judge, start, reward_model, dtype = load_given(settings, device, dtype)
        data = load_data(settings)
        tokenizer, model = start or toy.make_start(data[0], settings, device)
        check_fit(settings, data, tokenizer)
        config["checkpoint_activations"] = bool(settings.checkpoint_activations)
        config["from_hub"] = describe_hub(config, data)
        run = Run(folder, config, *flags, settings.save_seconds, device, dtype)
    return run, data, tokenizer, model, reward_model, judge


def load_given(settings, device, dtype):
    """The judge, (tokenizer, language model), and the reward model; None for what is made here, and
    for a judge that is this run's own reward model. And the type to multiply in."""
    given = [vars(settings)[name] for name in SOURCES if vars(settings)[name]]
    if not all(source in JUDGES or Path(source).exists() for source in given):  # hub ids
        go_offline_unless_reachable()
    start, small = settings.sft_model or settings.base_model, settings.fast_dev_run
    reward_model = load_reward_model(settings) if settings.reward_model else None
    if start and not small:
        plan_memory(settings, start, device, dtype)
    judge = model = None
    if settings.judge != "reward_model":
        judge = load_judge(settings.judge, small, device, dtype)
    if start:
        *model, dtype = load_for_training(start, device, dtype, settings)
    return judge, model, reward_model, dtype


def plan_memory(settings, start, device, dtype):
    """Raise SettingError if the models won't fit into memory, even where activations are computed
    twice, which this switches on if it has to."""
    configs = [causal_config(name) for name in (start, settings.judge) if name not in JUDGES]
    plan = memory_plan(settings, *configs, device=device, dtype=dtype)
    available, where = available_memory(device)
    if settings.checkpoint_activations is None and peak_of(plan) > available:
        print("memory: too little, so activations are computed twice (--checkpoint_activations)")
        settings.checkpoint_activations = True
        plan = memory_plan(settings, *configs, device=device, dtype=dtype)
    check_memory(plan, available, where)


def load_reward_model(settings):
    """The reward model of an earlier run, from a folder or the hub."""
    if settings.reward_model.count("/") == 1 and not Path(settings.reward_model).exists():
        settings.reward_model = from_hub(snapshot_download, settings.reward_model)
    try:
        return from_hub(RewardModel.from_pretrained, settings.reward_model)
    except SettingError as error:
        raise SettingError(f"--reward_model {error} (expected the reward_model/ folder of a run, "
                           "or the hub id of one)") from None


def load_data(settings):
    """Posts with references to train on, and held out to judge on; comparisons to train on, and
    held out; no post on both sides. In the tiny world the comparisons are still posts here."""
    if not settings.posts:
        return toy.make_data(settings)
    # 2,000 pairs tell an accuracy to +- .02; the hub's validation part has 83,802
    most, measured = (64, 16) if settings.fast_dev_run else (settings.max_posts or None, 2000)
    return load_task(settings.posts, settings.comparisons, settings.seed, most, measured)


def check_fit(settings, data, tokenizer):
    """What would else be found when its stage begins, after hours: a post whose title has no room
    for its cue, and a reward model that reads other token ids."""
    if settings.posts:
        posts, held_out, compared, compared_held_out = data
        for source, rows in ((settings.posts, posts + held_out),
                             (settings.comparisons, compared + compared_held_out)):
            check_titles(rows, source, tokenizer, settings.query_length, settings.prompt_newlines)
    given = settings.reward_model
    if given and load_tokenizer(given).get_vocab() != tokenizer.get_vocab():
        raise SettingError(f"--reward_model {given}: it was trained with another tokenizer than "
                           "the SFT model; pass one that fits")
