"""`far generate`: refuse what cannot be done, open the inputs, let the pipeline stream new frames, write them."""

import argparse
import os

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

from ..command_line import require_one_process
from ..data.media_files import MediaClip, read_clip
from ..evaluation.media import check_frame_size, check_output, write_frames
from ..hooks.flex_rope import FlexRoPEConfig
from ..pipelines import FARPipeline
from .arguments import DEFAULT_CONTEXT_FRAMES, MAX_FRAMES
from .inputs import Actions, ActionSpace, load_pipeline


DEFAULT_FPS = 8.0
DEFAULT_NUM_FRAMES = 16


def main(args: argparse.Namespace) -> None:
    """Run with the arguments of [`parse_generate`].

    Raises:
        ValueError, OSError: What the user can mend.
        MemoryError: Too many frames for this machine.
    """
    # 1. What can be refused before a model is loaded
    require_one_process("far generate")
    diffusers_logging.disable_progress_bar()
    check_output(args.output, args.fps or DEFAULT_FPS, overwrite=args.overwrite)
    check_video(args)

    # 2. The model, the context and the actions
    pipe = load_pipeline(args.model)
    if args.flex_rope_slope is not None:
        try:
            pipe.enable_flex_rope(FlexRoPEConfig(slope=args.flex_rope_slope))
        except ValueError as error:
            raise ValueError(f"`--flex_rope_slope` {args.flex_rope_slope:g} cannot be used: {error}") from error
    clip = None if args.video is None else read_context(args, pipe)
    actions, num_frames = choose_actions(args, pipe, clip)
    fps = args.fps or pipe.config.fps or DEFAULT_FPS
    check_output(args.output, fps, overwrite=args.overwrite)
    size = (pipe.config.height, pipe.config.width) if clip is None else clip.frames.shape[1:3]
    if None not in size:
        check_frame_size(args.output, size, args.scale)

    # 3. Frame after frame
    try:
        stream = pipe.stream(
            video=None if clip is None else clip.frames,
            actions=[actions] if actions else None,
            class_labels=args.class_label,
            num_frames=num_frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator(pipe.device).manual_seed(args.seed),
            short_cache=args.short_cache,
            max_long_frames=args.max_long_frames,
        )
        progress = tqdm(stream, total=num_frames, unit="frame", desc="new frames")
        frames = np.stack([np.asarray(images[0]) for images in progress])
    except RuntimeError as error:
        if "memory" not in str(error):  # PyTorch has no class of its own for this on the CPU
            raise
        cure = "there is not enough memory; make fewer frames, or bound it with `--max_long_frames`"
        raise MemoryError(f"{cure} ({' '.join(str(error).split())[:200]})") from error
    if args.with_context and clip is not None:
        frames = np.concatenate([clip.frames, frames])

    # 4. Write
    try:
        write_frames(args.output, frames, fps, args.scale, overwrite=args.overwrite)
    except OSError as error:
        raise ValueError(f"`--output`: {error.strerror or error}") from error
    print(f"wrote {len(frames)} frames at {fps:g} a second to {str(args.output)!r}")


def check_video(args: argparse.Namespace) -> None:
    """Refuse a context that is not there, and what needs one where none is asked for."""
    if args.video is None:
        for name in ("num_context_frames", "context_actions"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name}` was given without `--video`; leave it out.")
    elif not os.path.exists(args.video):
        raise ValueError(
            f"`--video` {str(args.video)!r} does not exist; name a video, an image or a folder of images."
        )


def read_context(args: argparse.Namespace, pipe: FARPipeline) -> MediaClip:
    """The last frames of `--video`, at the model's own size; says what was done to them."""
    size = (pipe.config.height, pipe.config.width) if pipe.config.height and pipe.config.width else None
    clip = read_clip(args.video, args.num_context_frames or DEFAULT_CONTEXT_FRAMES, size)
    if args.num_context_frames is not None and args.num_context_frames > len(clip.frames):
        raise ValueError(
            f"`--num_context_frames` is {args.num_context_frames}, but `--video` {str(args.video)!r} has "
            f"{len(clip.frames)} frames; ask for fewer."
        )
    (old_height, old_width), (height, width) = clip.original_size, clip.frames.shape[1:3]
    changed = f"{width}x{height} pixels"
    if (old_height, old_width) != (height, width):
        changed = f"cut around the centre and resized from {old_width}x{old_height} to {changed}"
    print(
        f"context: the last {len(clip.frames)} of {clip.num_frames_in_file} frames of {str(args.video)!r}, {changed}"
    )
    return clip


def choose_actions(args: argparse.Namespace, pipe: FARPipeline, clip: MediaClip | None) -> tuple[Actions | None, int]:
    """All actions of the video, as the pipeline takes them, and the number of new frames.

    Raises:
        ValueError: There are too few or too many.
    """
    space = ActionSpace.of(pipe)
    new = None if args.actions is None else space.read("--actions", args.actions)
    of_context = None if args.context_actions is None else space.read("--context_actions", args.context_actions)
    num_frames = count_new_frames(args.num_frames, new, has_context=clip is not None)
    if space.is_empty:
        return None, num_frames
    num_needed = num_frames if clip is not None else num_frames - 1
    if new is None and num_needed > 0:
        raise ValueError(
            f"`--actions` is missing, but this model is steered by actions; give {num_needed}, one for each new frame."
        )
    actions = ([] if clip is None else context_actions(of_context, clip, space)) + (new or [])
    if pipe.transformer.config.action_shift == 0:
        # Such a model is fed the action that will be taken at a frame, and nobody knows that of the last one.
        actions = actions + (actions[-1:] or [space.first])
        print("assumed: the last action once more at the last new frame, which this model wants to know.")
    return actions, num_frames


def count_new_frames(num_frames: int | None, actions: Actions | None, *, has_context: bool) -> int:
    """How many frames to make: as asked for, which must agree with the actions, or as many as the actions lead to.

    Raises:
        ValueError: The actions are too few or too many.
    """
    if actions is None:
        return num_frames or DEFAULT_NUM_FRAMES
    num_reached = len(actions) if has_context else len(actions) + 1  # without context nothing leads to the first frame
    if num_frames not in (None, num_reached):
        wanted = num_frames if has_context else num_frames - 1
        raise ValueError(
            f"`--actions` has {len(actions)}, but `--num_frames` {num_frames} needs {wanted}: one for each new frame"
            f"{'' if has_context else ' but the first'}; give {wanted}, or leave `--num_frames` out to make {num_reached}."
        )
    if num_reached > MAX_FRAMES:
        raise ValueError(f"`--actions` has {len(actions)}; at most {MAX_FRAMES} frames are made at once.")
    return num_reached


def context_actions(given: Actions | None, clip: MediaClip, space: ActionSpace) -> Actions:
    """Actions between the frames of the context: the given ones, or the model's first action throughout, which is said.

    Raises:
        ValueError: They are neither for the context nor for the whole file.
    """
    num_needed = len(clip.frames) - 1
    if given is not None:
        lengths = (num_needed, clip.num_frames_in_file - 1)
        if len(given) not in lengths:
            whole = f", or {lengths[1]} for all of `--video`" if lengths[1] != num_needed else ""
            raise ValueError(
                f"`--context_actions` has {len(given)}; give {num_needed} for the {len(clip.frames)} frames of the "
                f"context{whole}: those that lead from one to the next."
            )
        return given[len(given) - num_needed :]
    if num_needed > 0:
        assumed = f"{space.action_dim} zeros" if space.action_dim else repr(space.name_of(0))
        print(
            f"assumed: {assumed} as each of the {num_needed} actions between the frames of the context, for want of "
            "`--context_actions`. Where they were others, the model is misled; `--num_context_frames 1` needs none."
        )
    return [space.first] * num_needed
