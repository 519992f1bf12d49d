"""What the studies will cost, before they are run: an estimate from counted operations and an assumed speed."""

from .flops import meta_transformer
from .results import STUDIES
from .settings import CacheSettings, Method, StudySettings, Task, Variant, read_settings
from .training import model_config, num_steps, step_flops


def training_flops(settings: StudySettings) -> float:
    """All trainings of a study."""
    per_seed = sum(
        num_steps(settings, variant, 1) * step_flops(settings, variant) for variant in settings.trainings.values()
    )
    return len(settings.seeds) * per_seed


def measuring_flops(settings: StudySettings) -> float:
    """All rollouts of a study, the autoencoder left out. Those of other models than FAR count as FAR's."""
    return sum(
        len(settings.seeds) * len(settings.budget.shares) * rollout_flops(settings, variant, task, method)
        for variant in settings.variants.values()
        for task in settings.tasks.values()
        for method in settings.methods.values()
    )


def rollout_flops(settings: StudySettings, variant: Variant, task: Task, method: Method) -> float:
    """The rollouts of all walks. A token of a frame costs at every step what it costs in training without the backward
    pass; what it attends to is counted too. What was not trained costs nothing."""
    if variant.script is None:
        return 0.0
    config = model_config(settings, variant) if variant.script == "train_far" else settings.transformer
    transformer = meta_transformer(config)
    per_token = 2 * (transformer.num_parameters() - 6 * transformer.config.num_layers * transformer.inner_dim**2)
    num_passes = settings.evaluation.num_inference_steps + 1
    total = 0.0
    for num_frames in range(task.num_context_frames + 1, task.num_context_frames + task.num_frames + 1):
        plan = transformer.context_plan(num_frames, settings.latent_size, settings.latent_size)
        num_keys = plan.num_tokens
        if method.kind == "window":
            num_keys = min(num_keys, settings.training["num_frames"] * plan.tokens_per_short_frame)
        # The window is written anew with every frame, by a long model and by the sliding window alike.
        is_rewritten = method.kind == "window" or plan.num_long_frames > 0
        tokens = num_passes * plan.tokens_per_short_frame + (num_keys if is_rewritten else 0)
        attention = 4 * transformer.inner_dim * transformer.config.num_layers * num_keys
        total += tokens * (per_token + attention)
    return settings.evaluation.num_walks * total


def describe_plan(flops_per_second: float) -> str:
    """A line for each study."""
    lines = [f"{'study':<16}{'runs':>6}{'training':>16}{'measuring':>16}{'hours':>8}"]
    for name in STUDIES:
        settings = read_settings(name)
        if isinstance(settings, CacheSettings):
            lines.append(f"{name:<16}   trains nothing: {len(settings.modes)} modes, {settings.num_rounds} rounds")
            continue
        training, measuring = training_flops(settings), measuring_flops(settings)
        hours = (training + measuring) / flops_per_second / 3600
        runs = len(settings.seeds) * len(settings.trainings)
        lines.append(f"{name:<16}{runs:>6}{training / 1e12:>10.0f} TFLOP{measuring / 1e12:>10.0f} TFLOP{hours:>8.1f}")
    lines.append(f"Hours at {flops_per_second:.1e} operations a second: an estimate.")
    return "\n".join(lines)
