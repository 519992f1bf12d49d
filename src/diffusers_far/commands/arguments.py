"""What the commands take, and their help. Nothing that is imported here takes seconds: a wrong argument is answered at once.

A function for each command returns what was asked for; its docstring is the head of the command's help.
"""

import argparse
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..command_line import HeightAndWidth, HelpWithDefaults, number, whole_number
from ..data.rows import COMBINATION_RULES
from ..data.sources import SOURCES
from ..evaluation.protocols import PROTOCOLS, RecordingProtocol, TilesProtocol, WorldModelProtocol
from .app.settings import WorldLimits, checked_hosts


MAX_FRAMES = 100_000  # the cache makes room for all of them at the start
DEFAULT_CONTEXT_FRAMES = 32
SPLITS = ("train", "validation", "test")
ALL_PROTOCOLS = {"world_model": WorldModelProtocol, "tiles": TilesProtocol, **PROTOCOLS}
PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}

Arguments = Sequence[str] | None  # `None`: those that the process was started with


class OneLineParser(argparse.ArgumentParser):
    """Keeps the text above the flags as it is written, and says what is wrong in one line, without the usage."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        description = description and inspect.cleandoc(description)
        super().__init__(description=description, formatter_class=HelpWithDefaults, **options)

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())}; see --help.\n")


def short_cache(text: str) -> str | int:
    """An argument type: what a cache's `short_cache` may be."""
    return text if text in ("exact", "rolling") else whole_number(1, MAX_FRAMES)(text)


def parse_generate(arguments: Arguments = None, program: str | None = None) -> argparse.Namespace:
    """Continue a clip or an image under actions.

        far generate --model far-maze --video clip.mp4 --actions FFLFRR --output out.mp4
        far generate --model far-maze --video view.png --actions walk.json --num_frames 64 --output out.gif --scale 4

    `--video` is a video, a gif or webp, an image or a folder of numbered images; its last frames are the context, cut around
    their centre and resized to the size that the model knows. `--output` ends in .mp4, .gif or .webp; without a suffix it is a
    folder of PNG frames. It holds the new frames, or with `--with_context` the context before them.

    `--actions` are those that lead to the new frames, one for each: the first is taken at the last frame of the context.
    They are first letters of the model's action names (FFLFRR), digits, or names and numbers with commas between them
    (forward,2,right); or a JSON file with a list of such, or, for continuous actions, of lists of numbers.
    """
    parser = OneLineParser(parse_generate.__doc__, prog=program, allow_abbrev=False)
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


def parse_play(
    arguments: Arguments = None, program: str | None = None, *, model: str | None = None, dataset_name: str = ""
) -> argparse.Namespace:
    """Play a FAR world model in the browser: pick a start, press an action, see the next frame.

        far play --model far-pong --dataset_name pong --dataset_split validation

    Serves this machine only, at http://127.0.0.1:7860. Needs Gradio: `pip install "diffusers-far[app]"`.
    """
    # `model` and `dataset_name` are defaults: a clone of the repository has a model and recordings of its own.
    parser = OneLineParser(parse_play.__doc__, prog=program)
    parser.add_argument("--model", default=model, required=model is None, help="Pipeline folder or Hub id.")
    parser.add_argument(
        "--dataset_name",
        "--mazes",
        help="Recordings to start from, a folder or Hub id, or ''; those that come with the default model, else none.",
    )
    parser.add_argument("--dataset_split", default="test", help="Of --dataset_name.")
    parser.add_argument("--port", type=whole_number(1, 65535), default=7860)
    parser.add_argument(
        "--max_visitors", type=whole_number(1, 1000), default=WorldLimits().max_visitors, help="At one time."
    )
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Names under which a proxy serves the page; calls to other names than these and localhost are refused.",
    )
    args = parser.parse_args(arguments)
    try:
        checked_hosts(args.allowed_hosts)
    except ValueError as error:
        parser.error(str(error))
    if args.dataset_name is None:
        args.dataset_name = dataset_name if args.model == model else ""
    return args


def parse_evaluate(arguments: Arguments = None, program: str | None = None) -> argparse.Namespace:
    """Measure a model by a protocol: held-out recordings of your own, or the protocols of published figures.

        far evaluate --model far-pong --dataset_name pong --num_walks 8 --first_context_frame 0 --output scores.json
        far evaluate --protocol tiles --model far-crafter --dataset_name crafter --output tiles.json
        far evaluate --protocol teco --model far-dmlab --dataset_name dmlab --output dmlab-scores
        accelerate launch -m diffusers_far.commands evaluate --protocol mcvd --model far-ucf --dataset_name ucf-64 \\
            --output ucf-scores

    The protocols `world_model` and `tiles` write one JSON file. The others write a folder: a result for each case, so that an
    evaluation that was interrupted goes on when the same command is given again, `scores.json`, `scores.md` and samples to look
    at. `--protocol NAME --help` lists the settings of one.
    """
    choice = OneLineParser(add_help=False)
    choice.add_argument("--protocol", choices=ALL_PROTOCOLS, default="world_model")
    protocol = choice.parse_known_args(arguments)[0].protocol
    writes_one_file = issubclass(ALL_PROTOCOLS[protocol], RecordingProtocol)

    parser = OneLineParser(parse_evaluate.__doc__, prog=program, parents=[choice])
    parser.add_argument("--model", required=True, help="Pipeline folder or Hub id.")
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="Folder or Hub id: a column video; actions or label if the model takes them; pose if views are to be told apart; "
        "for worlds of tiles what make_crafter_dataset.py writes.",
    )
    parser.add_argument("--dataset_split", default="test")
    if writes_one_file:
        parser.add_argument("--output", type=Path, help="JSON file for the figures; must not exist.")
        parser.add_argument(
            "--int8", action="store_true", help="Linear layers in int8, on the CPU; see docs/speed.md."
        )
    else:
        parser.add_argument("--output", type=Path, required=True, help="Folder; one of the same evaluation goes on.")
        parser.add_argument("--lpips_weights", help="File with the state dict of `lpips.LPIPS(net='vgg')`.")
        parser.add_argument("--i3d_weights", help="The I3D network as TorchScript, for FVD.")
        parser.add_argument("--num_samples", type=int, default=4, help="Videos to write down, for each task.")
        parser.add_argument(
            "--mixed_precision",
            choices=PRECISIONS,
            help="Model's dtype; if left out, what the launcher was told, else no: float32.",
        )
    add_settings(parser.add_argument_group(f"settings of {protocol}"), ALL_PROTOCOLS[protocol])
    args = parser.parse_args(arguments)
    if writes_one_file and args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    if not writes_one_file and args.output.suffix == ".json":
        parser.error(f"--output {args.output} is a file; {protocol} keeps a result for each case, name a folder.")
    try:
        args.settings = read_settings(args, ALL_PROTOCOLS[protocol])
    except ValueError as error:
        parser.error(str(error))
    return args


def add_settings(parser: argparse._ActionsContainer, protocol_class: type) -> None:
    """A flag for each field of a protocol, with its default and help."""
    hints = get_type_hints(protocol_class)
    for each in fields(protocol_class):
        is_list = bool(get_args(hints[each.name]))
        kind = get_args(hints[each.name])[0] if is_list else hints[each.name]
        num_values = None
        if is_list:  # `tuple[int, ...]` is of any length, `tuple[int, int]` of two
            num_values = "*" if Ellipsis in get_args(hints[each.name]) else len(get_args(hints[each.name]))
        assert each.default is not MISSING, f"{each.name} of {protocol_class.__name__} has no default"
        default = each.default
        if default is None:
            default = getattr(protocol_class, "default_guidance_scale", "the pipeline's own")
        parser.add_argument(
            f"--{each.name}",
            type=kind,
            nargs=num_values,
            default=each.default,
            help=f"{each.metadata.get('help', '')} Default: {default}.".strip(),
        )


def read_settings(args: argparse.Namespace, protocol_class: type):
    """The protocol that was asked for.

    Raises:
        ValueError: A setting outside its range.
    """
    values = {each.name: getattr(args, each.name) for each in fields(protocol_class)}
    return protocol_class(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )


def parse_prepare(arguments: Arguments = None, program: str | None = None) -> argparse.Namespace:
    """Turn a folder of your own videos into a dataset to train on: frames as lossless PNG, actions, labels.

        far prepare --source npz --input dmlab/train --output dmlab-train
        far prepare --source classfolder --input UCF-101 --output ucf-64 --size 64 --frame_interval 3
        far prepare --source videofolder --input drives --output drives-64 --size 64 --test_share 0.1
        far prepare --source lerobot --input pusht --output pusht-96 --video_key observation.image

    `--source` is the layout of `--input`:

        npz          TECO's trajectories, in any subfolder: `video` uint8 (F, H, W, 3) and `actions` (F,) integers
        classfolder  `Class/video.avi`, or mp4, mkv, mov, webm, as UCF-101: the folder is the label
        videofolder  `metadata.jsonl`, a line per video: `file_name`, and `actions` and `label` where there are any
        lerobot      a LeRobot dataset of version 2 or 3: continuous actions

    Folders in `--input` that are called `train`, `validation` or `test` (or `val`, `dev` and the like) are these splits.

    The result appears under `--output` when it is whole; `load_dataset` opens it, and so do the training scripts.
    """
    parser = OneLineParser(parse_prepare.__doc__, prog=program)
    parser.add_argument("--source", choices=SOURCES, required=True, help="Layout of --input, see above.")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="New or empty folder.")

    parser.add_argument("--frame_interval", type=int, default=1, help="Keep one frame in so many.")
    rules = "; ".join(f"{rule}: {meaning}" for rule, meaning in COMBINATION_RULES.items())
    parser.add_argument(
        "--combine_actions",
        choices=COMBINATION_RULES,
        help=f"What the actions between two kept frames become; needed if there are any. {rules}.",
    )
    parser.add_argument("--num_actions", type=int, help="Number of discrete actions, for --combine_actions joint.")
    parser.add_argument("--size", type=int, nargs="+", action=HeightAndWidth)
    parser.add_argument(
        "--video_key",
        help="For lerobot: which camera, if there are several. For npz: the array's name if not `video`.",
    )
    parser.add_argument(
        "--action_key", help="For npz and lerobot: the name of the actions if not `actions` or `action`."
    )
    parser.add_argument(
        "--keep_columns",
        nargs="+",
        metavar="NAME",
        help="What else to keep of each trajectory: arrays of npz, fields of `metadata.jsonl`, columns of lerobot. Of those "
        "with a value for each frame, the values of the kept frames.",
    )

    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="Where trajectories go that no share takes; left out: by the folders that are named after splits, else train.",
    )
    parser.add_argument(
        "--validation_share",
        type=float,
        default=0.0,
        help="By a hash of the trajectory's name; of folders that are named after splits, of `train` alone.",
    )
    parser.add_argument("--test_share", type=float, default=0.0, help="Likewise: a file never changes its split.")

    parser.add_argument("--license", default="unknown", help="Hub's identifier, such as cc-by-4.0; for the card.")
    parser.add_argument("--description", default="", help="Where the data come from, for the card.")
    parser.add_argument("--skip_bad_examples", action="store_true", help="Leave damaged ones out, and list them.")
    parser.add_argument("--trajectories_per_shard", type=int, default=64)
    parser.add_argument("--num_processes", type=int, default=1)
    return parser.parse_args(arguments)


PARSERS: dict[str, Callable[..., argparse.Namespace]] = {
    "generate": parse_generate,
    "play": parse_play,
    "evaluate": parse_evaluate,
    "prepare": parse_prepare,
}
