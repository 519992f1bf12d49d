"""The README of a saved pipeline: what the model is, how to use it, what it was trained on and how good it is; and who has
written it, a training or somebody who knows more."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import ModelCardData

from ..files import written_whole
from ..models.codec import spatial_compression


logger = logging.get_logger(__name__)

README = "README.md"

CARD = """---
{metadata}
---

# {title}

{kind}
For [diffusers](https://github.com/huggingface/diffusers), with the package `diffusers-far`.

## Model

| | |
|---|---|
{facts}

## Use

```bash
pip install diffusers-far
```

```python
{usage}
```

Without importing the package yourself, load it by the `pipeline.py` in this repo:

```python
{custom_loading}
```

## Training

{training}

## Source

Long-Context Autoregressive Video Modeling with Next-Frame Prediction, [arXiv:2503.19325](https://arxiv.org/abs/2503.19325).
"""

USAGE = """import torch
from diffusers_far import {pipeline}

pipe = {pipeline}.from_pretrained("{name}")
video = torch.rand(1, {num_context_frames}, 3, {height}, {width})  # yours: tensor, array in [0, 1], or a list of PIL images
{conditions}frames = pipe({arguments}).frames[0]
frames[0].save("video.gif", save_all=True, append_images=frames[1:])"""

CUSTOM_LOADING = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True)"""

FRAME_CAUSAL = """A frame-autoregressive (FAR) video model: it {task}, one frame after the other.
Attention is full inside a frame and causal between frames, so finished frames are cached."""

SEPARABLE = """A separable video model ([arXiv:2602.10095](https://arxiv.org/abs/2602.10095)) on top of FAR: it {task}, one frame after
the other. An encoder sees each finished frame once; a small decoder makes the next frame from what it says."""

WHOLE_CLIP = "A video diffusion transformer: it {task}, all new frames at once. Every frame attends to every other."

CONTEXT_FRAMES, NEW_FRAMES = 4, 8  # of the usage example


# What the Hub lists every card of ours under: its task, and the paper.
PIPELINE_TAG = "video-to-video"
TAGS = ("diffusers-far", "video-prediction", "arxiv:2503.19325")

# What a training measured, as a card tells it.
REPORTED = {
    "loss": "held-out loss",
    "psnr_of_frame_1": "PSNR of the first predicted frame, dB",
    "psnr": "PSNR, mean of the predicted frames, dB",
    "repeated_psnr": "the same of repeating the last frame, dB",
    "vae_psnr": "the VAE's reconstruction against the true frames, dB",
}

# The last line of a card that a run wrote. As long as the hash is that of the text, nobody has edited it.
_SIGNATURE = re.compile(
    r"\n<!-- Written by diffusers-far ([0-9a-f]{16}); once it is edited it is kept as it is. -->\n*\Z"
)


def model_card(
    pipe: DiffusionPipeline,
    name: str,
    training_facts: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """The model card of a [`FARPipeline`].

    Args:
        pipe ([`FARPipeline`]).
        name (`str`): The repo or folder that it will be loaded from.
        training_facts (`dict`, *optional*): What it was trained on and how, one line each, such as `{"Data": "..."}`.
        metadata (`dict`, *optional*): What the Hub is to know besides, such as `license`, `datasets` and `base_model`.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    config = pipe.transformer.config
    if pipe.transformer.takes_actions:
        task = "continues a video under actions"
    elif pipe.transformer.takes_labels:
        task = "makes or continues a video of a class"
    else:
        task = "makes or continues a video"
    kind = FRAME_CAUSAL if config.frame_causal else WHOLE_CLIP
    if pipe.transformer.is_separable:
        kind = SEPARABLE
    facts = {
        "Transformer": describe_transformer(pipe.transformer),
        "Autoencoder": describe_autoencoder(pipe.vae),
        "Frames": describe_frames(pipe),
        "Context": describe_context(config),
        "Conditions": describe_conditions(config, pipe.config.action_names),
        "FlexRoPE": describe_flex_rope(pipe.config.flex_rope),
        "Scheduler": f"`{type(pipe.scheduler).__name__}`",
        "Flow map": "makes a frame in any number of steps, such as 1, 2, 4 or 50" if config.flow_map else None,
        "By default": describe_defaults(pipe),
    }
    training = {"Longest clip": f"{config.trained_frames} frames" if config.trained_frames else "not recorded"}
    training.update(training_facts or {"Data": "not recorded"})
    return CARD.format(
        metadata=card_metadata(pipe.transformer, **(metadata or {})),
        title=name.split("/")[-1],
        kind=kind.format(task=task),
        facts="\n".join(f"| {fact} | {text} |" for fact, text in facts.items() if text),
        usage=usage_example(pipe, name),
        custom_loading=CUSTOM_LOADING.format(name=name),
        training="\n".join(f"- {fact}: {text}" for fact, text in training.items()),
    )


def card_metadata(transformer: torch.nn.Module, *, tags: Sequence[str] = (), **metadata: Any) -> str:
    """What stands in front of a card, as YAML: what every card of ours has, `tags` beside its own, and `metadata`."""
    tags = [*TAGS, *tags] + (["world-model"] if transformer.takes_actions else [])
    return ModelCardData(library_name="diffusers", pipeline_tag=PIPELINE_TAG, tags=tags, **metadata).to_yaml()


def usage_example(pipe: DiffusionPipeline, name: str) -> str:
    """Python that runs as it is, with random inputs of the kind that the model takes."""
    config = pipe.transformer.config
    height, width = example_size(pipe)
    num_frames = CONTEXT_FRAMES + NEW_FRAMES
    conditions, arguments = "", "video=video"
    if pipe.transformer.takes_actions:
        values = f"randn(1, {num_frames}, {config.action_dim})"
        if config.num_actions is not None:
            values = f"randint({config.num_actions}, (1, {num_frames}))"
        conditions = f"actions = torch.{values}  # one per context and new frame; actions[:, t] leads to frame t + 1\n"
        arguments += ", actions=actions"
    if pipe.transformer.takes_labels:
        arguments += ", class_labels=[0]"
    return USAGE.format(
        pipeline=type(pipe).__name__,
        name=name,
        num_context_frames=CONTEXT_FRAMES,
        height=height,
        width=width,
        conditions=conditions,
        arguments=f"{arguments}, num_frames={NEW_FRAMES}",
    )


def example_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """The pipeline's own size in pixels, else the multiple of what VAE and patches need that is nearest to 64."""
    config = pipe.transformer.config
    unit = spatial_compression(pipe.vae) * (config.long_patch_size or config.patch_size)
    default = max(1, round(64 / unit)) * unit
    return pipe.config.height or default, pipe.config.width or default


def describe_transformer(transformer: torch.nn.Module) -> str:
    """Size and dtype."""
    config, layers = transformer.config, len(transformer.context_network.transformer_blocks)
    if transformer.is_separable:
        layers = f"{layers} encoder and {len(transformer.denoising_network.transformer_blocks)} decoder"
    return (
        f"{count_parameters(transformer)} parameters; {layers} layers, width {transformer.inner_dim}, "
        f"{config.num_attention_heads} heads; {str(transformer.dtype).removeprefix('torch.')}"
    )


def describe_autoencoder(vae: torch.nn.Module) -> str:
    """Class, size, and what it makes of an image."""
    return (
        f"`{type(vae).__name__}`, {count_parameters(vae)} parameters; {vae.config.latent_channels} latent channels, "
        f"{spatial_compression(vae)}x smaller than the image along each side"
    )


def describe_frames(pipe: DiffusionPipeline) -> str | None:
    """Size and rate of the videos that the model knows, where the pipeline has them."""
    size = f"{pipe.config.height}x{pipe.config.width} pixels" if pipe.config.height and pipe.config.width else None
    rate = f"{pipe.config.fps:g} per second" if pipe.config.fps else None
    return ", ".join(text for text in (size, rate) if text) or None


def describe_context(config) -> str:
    """In which patches old and new frames are seen."""
    short = f"patches of {config.patch_size}x{config.patch_size} latents"
    if config.long_patch_size is None:
        return f"every frame in {short}"
    return (
        f"the last {config.short_window} frames, the new one included, in {short}; older frames in patches of "
        f"{config.long_patch_size}x{config.long_patch_size}"
    )


def describe_conditions(config, action_names: list[str] | None) -> str:
    """Actions and classes that the model takes."""
    conditions = []
    if config.num_actions is not None:
        names = ""
        if action_names:
            names = ": " + ", ".join(f"{index} {action}" for index, action in enumerate(action_names))
        conditions.append(f"{config.num_actions} discrete actions{names}")
    if config.action_dim is not None:
        conditions.append(f"continuous actions of {config.action_dim} channels")
    if config.num_actions is not None or config.action_dim is not None:
        fed = "that led to it" if config.action_shift else "taken at it"
        conditions.append(f"each frame is fed the action {fed} (`action_shift={config.action_shift}`)")
    if config.num_classes is not None:
        conditions.append(f"{config.num_classes} classes")
    return "; ".join(conditions) or "none"


def describe_defaults(pipe: DiffusionPipeline) -> str:
    """The defaults of a call."""
    per_frame = " a frame" if pipe.transformer.config.frame_causal else ""
    text = f"{pipe.default_inference_steps} steps{per_frame}, guidance {pipe.default_guidance_scale:g}"
    if pipe.default_short_cache == "exact":
        return text
    return f"{text}, `short_cache={pipe.default_short_cache!r}`"


def describe_flex_rope(flex_rope: Mapping[str, Any] | None) -> str | None:
    """The decay that the pipeline applies, from its config."""
    if flex_rope is None:
        return None
    return f"slope {flex_rope['slope']:g}, schedule `{flex_rope['schedule']}`"


def count_parameters(model: torch.nn.Module) -> str:
    """In millions, or exactly below one."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{num_parameters / 1e6:.1f} M" if num_parameters >= 1e6 else f"{num_parameters:,}"


def results_section(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, sample: str | None = None
) -> str:
    """The part of a card that says how good the model is.

    Args:
        before (`dict`, *optional*), after (`dict`, *optional*): Metrics of a [`Measurement`] without and with the
            training; `None`: not measured.
        sample (`str`, *optional*): A video file beside the card: truth on the left, prediction on the right.
    """
    measured = {heading: metrics for heading, metrics in (("before", before), ("after", after)) if metrics is not None}
    lines = ["## Results", ""]
    if not measured:
        lines += ["Not measured: the run had no validation split."]
    else:
        lines += ["Held-out trajectories; PSNR against the VAE's reconstruction of the true frames.", ""]
        lines += [f"| | {' | '.join(measured)} |", "|---" * (1 + len(measured)) + "|"]
        for name, heading in REPORTED.items():
            if all(name in metrics for metrics in measured.values()):
                values = " | ".join(f"{metrics[name]:.4g}" for metrics in measured.values())
                lines += [f"| {heading} | {values} |"]
    if sample is not None:
        lines += [
            "",
            "Truth on the left, prediction on the right:",
            "",
            f'<video controls loop src="{sample}"></video>',
        ]
    return "\n".join(lines) + "\n"


def signed(card: str) -> str:
    """The card with a last line by which `is_unedited` knows it again."""
    text = card.rstrip("\n") + "\n"
    return f"{text}\n<!-- Written by diffusers-far {_digest(text)}; once it is edited it is kept as it is. -->\n"


def is_unedited(card: str) -> bool:
    """Whether a card is as a run wrote it, down to the letter."""
    match = _SIGNATURE.search(card)
    return match is not None and _digest(card[: match.start()]) == match[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(folder: str | Path, card: str) -> bool:
    """Write `card` as the README.md of a folder, unless there is one that was edited.

    A card that an earlier launch of the run wrote is replaced: it tells of an earlier step.

    Returns:
        `bool`: Whether it was written.
    """
    readme = Path(folder) / README
    if readme.exists() and not is_unedited(readme.read_text(encoding="utf-8")):
        logger.warning(f"{str(readme)!r} was edited and is kept; what this run has to say is not in it.")
        return False
    with written_whole(readme) as unfinished:
        unfinished.write_text(signed(card), encoding="utf-8")
    return True
