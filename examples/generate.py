"""Continue a clip or an image under actions, from the command line.

    python examples/generate.py --model checkpoints/far-maze --video clip.mp4 --actions FFLFRR --output out.mp4
    python examples/generate.py --model checkpoints/far-maze --video view.png --actions walk.json --num_frames 64 \\
        --output out.gif --scale 4

`--video` is a video, a gif or webp, an image or a folder of numbered images; its last frames are the context, cut around
their centre and resized to the size that the model knows. `--output` ends in .mp4, .gif or .webp; without a suffix it is a
folder of PNG frames. It holds the new frames, or with `--with_context` the context before them.

`--actions` are those that lead to the new frames, one for each: the first is taken at the last frame of the context.
They are first letters of the model's action names (FFLFRR), digits, or names and numbers with commas between them
(forward,2,right); or a JSON file with a list of such, or, for continuous actions, of lists of numbers.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from argument_types import number, shown, whole_number

from diffusers_far.command_line import HelpWithDefaults, require_one_process


MAX_FRAMES = 100_000  # the cache makes room for all of them at the start
DEFAULT_CONTEXT_FRAMES = 32
DEFAULT_FPS = 8.0
OUT_OF_MEMORY = "there is not enough memory; make fewer frames, or bound it with `--max_long_frames`"

Actions = list[int] | list[list[float]]


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())}; see --help.\n")


def short_cache(text: str) -> str | int:
    """An argument type: what a cache's `short_cache` may be."""
    return text if text in ("exact", "rolling") else whole_number(1, MAX_FRAMES)(text)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=HelpWithDefaults, allow_abbrev=False)
    count = whole_number(1, MAX_FRAMES)
    parser.add_argument("--model", required=True, help="Pipeline folder or Hub id.")
    parser.add_argument("--video", type=Path, help="Context; without it the video starts from nothing.")
    parser.add_argument("--actions", help="One for each new frame: letters, digits, names, or a JSON file; see above.")
    parser.add_argument(
        "--context_actions",
        help="Those between the frames of the context, in the same forms: one fewer than its frames, or than the file's.",
    )
    parser.add_argument("--class_label", type=whole_number(0, 2**31 - 1), help="For a model of classes.")
    parser.add_argument(
        "--num_frames", type=count, help="New frames; by default as many as the actions lead to, or 16."
    )
    parser.add_argument("--output", type=Path, required=True, help=".mp4, .gif, .webp, or a folder for PNG frames.")
    parser.add_argument("--overwrite", action="store_true", help="Replace --output where it exists.")
    parser.add_argument("--with_context", action="store_true", help="Write the context before the new frames.")
    parser.add_argument(
        "--num_context_frames",
        type=count,
        help=f"The last ones of --video; {DEFAULT_CONTEXT_FRAMES}, or all if fewer.",
    )
    parser.add_argument("--num_inference_steps", type=whole_number(1, 1000), help="By default the pipeline's own.")
    parser.add_argument(
        "--guidance_scale", type=number(0, 1000), help="Guides above 1; by default the pipeline's own."
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0)
    parser.add_argument(
        "--fps", type=number(0.1, 240), help="Frames a second of --output; the model's own by default."
    )
    parser.add_argument("--scale", type=whole_number(1, 64), default=1, help="Repeat pixels, for small frames.")
    parser.add_argument("--flex_rope_slope", type=number(0, 1000), help="Attention decays beyond the trained length.")
    parser.add_argument(
        "--short_cache", type=short_cache, help="exact, rolling or a number of frames; by default the pipeline's own."
    )
    parser.add_argument("--max_long_frames", type=count, help="Forget older frames: bounded memory.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

from diffusers_far import FARPipeline, FlexRoPEConfig
from diffusers_far.data.media_files import MediaClip, read_clip
from diffusers_far.evaluation.media import check_frame_size, check_output, write_frames


def load_pipeline(model: str) -> FARPipeline:
    """A pipeline from a folder or the Hub, on the GPU where there is one.

    Raises:
        ValueError: There is none, or it is damaged or of another kind.
    """
    # A misspelt folder must not be looked for on the Hub.
    is_path = os.path.exists(model) or model.startswith((".", "/", "~")) or os.path.isdir(model.split("/")[0])
    if is_path and not os.path.isfile(os.path.join(model, "model_index.json")):
        raise ValueError(f"`--model` {shown(model)} is no pipeline's folder: it has no model_index.json; name one.")
    try:
        pipe = FARPipeline.from_pretrained(model)
    except Exception as error:  # whatever a broken folder or a Hub out of reach leads the loaders to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"`--model` {shown(model)} cannot be loaded ({reason}); name a FAR pipeline.") from error
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def read_actions(argument: str, text: str, pipe: FARPipeline) -> Actions:
    """Actions as the user wrote them, as numbers.

    Args:
        argument (`str`): Name of the argument, for messages.
        text (`str`): See the head of this file.

    Returns:
        Integers in the model's range, or for continuous actions lists of `action_dim` finite numbers.

    Raises:
        ValueError: What it cannot be read as; names the place in the list.
    """
    config = pipe.transformer.config
    if config.num_actions is None and config.action_dim is None:
        raise ValueError(f"`{argument}` was given but this model takes no actions; leave it out.")
    if text.lower().endswith(".json") or (re.search(r"[./\\]", text) and os.path.isfile(text)):
        values = read_json_list(argument, text)
    elif config.action_dim is not None:
        raise ValueError(
            f"`{argument}` is {shown(text)} but this model's actions are {config.action_dim} numbers each; give a JSON "
            "file with a list of such lists."
        )
    else:
        values = split_actions(text, pipe.config.action_names or [])
    if not values:
        raise ValueError(f"`{argument}` is {shown(text)}, which holds no actions; give one for each frame.")
    if config.action_dim is not None:
        return [continuous_action(argument, place, value, config.action_dim) for place, value in enumerate(values)]
    names = list(pipe.config.action_names or [])
    return [discrete_action(argument, place, value, names, config.num_actions) for place, value in enumerate(values)]


def read_json_list(argument: str, path: str) -> list:
    """The list in a JSON file."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"`{argument}` {shown(path)} is not a file; name a JSON file with a list.")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{argument}` {shown(path)} is not a JSON file that can be read: {reason}.") from error
    if not isinstance(values, list):
        raise ValueError(f"`{argument}` {shown(path)} holds a {type(values).__name__}; it must be a JSON list.")
    return values


def split_actions(text: str, names: Sequence[str]) -> list[str]:
    """Words where there are commas or spaces between them, else single characters, unless the whole is a name."""
    if text.strip().lower() in [name.lower() for name in names]:
        return [text.strip()]
    words = re.split(r"[\s,]+", text.strip(" ,\t\n"))
    return words if len(words) > 1 else list(words[0])


def discrete_action(argument: str, place: int, value: object, names: Sequence[str], num_actions: int) -> int:
    """The index of an action that is given as one, as a name or as the first letter of a name."""
    known = ", ".join(f"{index} {name}" for index, name in enumerate(names)) or f"0 to {num_actions - 1}"
    wrong = f"`{argument}[{place}]` is {shown(value)}, but this model's actions are {known}"
    if isinstance(value, str) and not re.fullmatch("[0-9]{1,9}", value):
        wanted = value.lower()
        matching = [index for index, name in enumerate(names) if name.lower() == wanted]
        if not matching and len(wanted) == 1:
            matching = [index for index, name in enumerate(names) if name.lower().startswith(wanted)]
        if len(matching) > 1:
            raise ValueError(f"{wrong}: several begin so; give the number or the whole name, with commas between.")
        if not matching:
            raise ValueError(f"{wrong}; give their numbers{', names or first letters' if names else ''}.")
        return matching[0]
    index = int(value) if isinstance(value, str) else value
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_actions:
        raise ValueError(f"{wrong}; give one of these.")
    return index


def continuous_action(argument: str, place: int, value: object, action_dim: int) -> list[float]:
    """An action that is a list of numbers."""
    rule = (
        f"`{argument}[{place}]` is {shown(value)}, but this model's actions are lists of {action_dim} finite numbers"
    )
    if not isinstance(value, list) or len(value) != action_dim:
        raise ValueError(f"{rule}; give as many.")
    for channel in value:
        # Beyond float32's range a number would turn infinite.
        if isinstance(channel, bool) or not isinstance(channel, (int, float)) or not abs(channel) <= 1e38:
            raise ValueError(f"{rule}.")
    return [float(channel) for channel in value]


def count_new_frames(num_frames: int | None, actions: Actions | None, *, has_context: bool) -> int:
    """How many frames to make: as asked for, which must agree with the actions, or as many as the actions lead to.

    Raises:
        ValueError: The actions are too few or too many.
    """
    if actions is None:
        return num_frames or 16
    led_to = len(actions) if has_context else len(actions) + 1  # without context nothing leads to the first frame
    if num_frames not in (None, led_to):
        wanted = num_frames if has_context else num_frames - 1
        raise ValueError(
            f"`--actions` has {len(actions)}, but `--num_frames` {num_frames} needs {wanted}: one for each new frame"
            f"{'' if has_context else ' but the first'}; give {wanted}, or leave `--num_frames` out to make {led_to}."
        )
    if led_to > MAX_FRAMES:
        raise ValueError(f"`--actions` has {len(actions)}; at most {MAX_FRAMES} frames are made at once.")
    return led_to


def choose_context_actions(given: Actions | None, clip: MediaClip, pipe: FARPipeline) -> Actions:
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
    config = pipe.transformer.config
    if num_needed > 0:
        assumed = f"{config.action_dim} zeros" if config.action_dim else f"{action_name(pipe, 0)!r}"
        print(
            f"assumed: {assumed} as each of the {num_needed} actions between the frames of the context, for want of "
            "`--context_actions`. Where they were others, the model is misled; `--num_context_frames 1` needs none."
        )
    return [[0.0] * config.action_dim if config.action_dim else 0] * num_needed


def action_name(pipe: FARPipeline, index: int) -> str:
    names = list(pipe.config.action_names or [])
    return names[index] if index < len(names) else f"action {index}"


def read_context(args: argparse.Namespace, pipe: FARPipeline) -> MediaClip | None:
    """The last frames of `--video`, at the model's own size; says what was done to them."""
    if args.video is None:
        return None
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


def join_actions(args: argparse.Namespace, pipe: FARPipeline, clip: MediaClip | None) -> tuple[Actions | None, int]:
    """All actions of the video, as the pipeline takes them, and the number of new frames."""
    config = pipe.transformer.config
    new = None if args.actions is None else read_actions("--actions", args.actions, pipe)
    given = None if args.context_actions is None else read_actions("--context_actions", args.context_actions, pipe)
    num_frames = count_new_frames(args.num_frames, new, has_context=clip is not None)
    if config.num_actions is None and config.action_dim is None:
        return None, num_frames
    if given is not None and clip is None:
        raise ValueError("`--context_actions` was given without `--video`; leave it out.")
    num_needed = num_frames if clip is not None else num_frames - 1
    if new is None and num_needed > 0:
        raise ValueError(
            f"`--actions` is missing, but this model is steered by actions; give {num_needed}, one for each new frame."
        )
    actions = ([] if clip is None else choose_context_actions(given, clip, pipe)) + (new or [])
    if config.action_shift == 0:
        # Such a model is fed the action that will be taken at a frame, and nobody knows that of the last one.
        actions = actions + (actions[-1:] or [[0.0] * config.action_dim if config.action_dim else 0])
        print("assumed: the last action once more at the last new frame, which this model wants to know.")
    return actions, num_frames


def generate(args: argparse.Namespace) -> None:
    # 1. What can be refused before a model is loaded
    if args.video is None and args.num_context_frames is not None:
        raise ValueError("`--num_context_frames` was given without `--video`; leave it out.")
    check_output(args.output, args.fps or DEFAULT_FPS, overwrite=args.overwrite)
    if args.video is not None and not os.path.exists(args.video):
        raise ValueError(
            f"`--video` {str(args.video)!r} does not exist; name a video, an image or a folder of images."
        )

    # 2. The model, the context and the actions
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.flex_rope_slope is not None:
        try:
            pipe.enable_flex_rope(FlexRoPEConfig(slope=args.flex_rope_slope))
        except ValueError as error:
            raise ValueError(f"`--flex_rope_slope` {args.flex_rope_slope:g} cannot be used: {error}") from error
    clip = read_context(args, pipe)
    actions, num_frames = join_actions(args, pipe, clip)
    fps = args.fps or pipe.config.fps or DEFAULT_FPS
    check_output(args.output, fps, overwrite=args.overwrite)
    size = (pipe.config.height, pipe.config.width) if clip is None else clip.frames.shape[1:3]
    if None not in size:
        check_frame_size(args.output, size, args.scale)
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

    # 3. Frame after frame
    progress = tqdm(stream, total=num_frames, unit="frame", desc="new frames")
    frames = np.stack([np.asarray(images[0]) for images in progress])
    if args.with_context and clip is not None:
        frames = np.concatenate([clip.frames, frames])

    # 4. Save
    try:
        write_frames(args.output, frames, fps, args.scale, overwrite=args.overwrite)
    except OSError as error:
        raise ValueError(f"`--output`: {error.strerror or error}") from error
    print(f"wrote {len(frames)} frames at {fps:g} a second to {str(args.output)!r}")


def main(args: argparse.Namespace) -> int:
    """Run with parsed arguments; returns the exit code: 0, 2 for what the user can mend, 130 if interrupted."""
    diffusers_logging.disable_progress_bar()
    try:
        require_one_process("generate.py")
        generate(args)
    except (ValueError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "memory" not in str(error):  # PyTorch has no class of its own for this on the CPU
            raise
        print(f"error: {OUT_OF_MEMORY} ({' '.join(str(error).split())[:200]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(args))
