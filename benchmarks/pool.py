"""Many players on one model: frames a second of sessions of unequal length in a pool, beside a batch of equal length and beside
sessions that take turns.

python -m benchmarks.pool --model checkpoints/far-crafter --output pool.json
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from diffusers_far import FARPipeline, FARSession, SessionPool
from diffusers_far.command_line import HelpWithDefaults

from .measurement import Measurement, Row
from .session import random_action
from .table import show_rows
from .timing import describe_machine, time_in_turn


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--model", required=True, help="Folder of a pipeline.")
    parser.add_argument("--num_players", type=int, default=10, help="Sessions that share passes.")
    parser.add_argument("--shortest", type=int, default=3, help="Frames of the shortest session.")
    parser.add_argument("--longest", type=int, default=200, help="Frames of the longest session.")
    parser.add_argument("--num_inference_steps", type=int, default=4, help="Denoising steps of each frame.")
    parser.add_argument("--num_rounds", type=int, default=9, help="Timed frames of each rival, in turn.")
    parser.add_argument("--device", default="cpu", help="Where the pipeline runs.")
    parser.add_argument("--output", type=Path, help="JSON file; must not exist.")
    args = parser.parse_args()
    if not 2 <= args.shortest <= args.longest:
        parser.error(f"--shortest is {args.shortest} and --longest {args.longest}; pass 2 at least, in this order.")
    for name in ("num_players", "num_rounds"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} is {getattr(args, name)}; pass at least 2.")
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    return args


def run(pipe: FARPipeline, lengths: Sequence[int], num_inference_steps: int, num_rounds: int) -> Iterator[Row]:
    """Yield a row for each rival of the pool: a batch of the mean length, one of the greatest length, and turns."""
    start = partial(random_session, pipe, num_inference_steps)
    pool, mean, num_players = SessionPool(max_players=len(lengths)), round(sum(lengths) / len(lengths)), len(lengths)
    players = [pool.add(start(num_frames, 1)) for num_frames in lengths]
    action = random_action(pipe.transformer.config, torch.Generator().manual_seed(0))

    def in_turn(sessions: Sequence[FARSession]) -> None:
        for session in sessions:
            session.step(action)

    rivals: dict[str, Callable[[], object]] = {
        "pool": lambda: pool.step(dict.fromkeys(players, action)),
        f"batch of {mean} frames": partial(start(mean, num_players).step, action),
        f"batch of {max(lengths)} frames": partial(start(max(lengths), num_players).step, action),
        "in turn": partial(in_turn, [start(num_frames, 1) for num_frames in lengths]),
    }
    seconds = time_in_turn(rivals, num_rounds)
    throughput = {name: per_second(each, num_players) for name, each in seconds.items()}
    for name in list(rivals)[1:]:
        yield Row(
            case="pool",
            settings={"players": num_players, "frames": f"{min(lengths)} to {max(lengths)}", "rival": name},
            measurements={
                "pool": throughput["pool"],
                "rival": throughput[name],
                "pool / rival": throughput["pool"].per(throughput[name], "share"),
            },
        )


def per_second(seconds: Measurement, num_players: int) -> Measurement:
    """Frames a second, of all players together."""
    return Measurement(tuple(num_players / each for each in seconds.values), "frames/s")


def random_session(pipe: FARPipeline, num_inference_steps: int, num_frames: int, batch_size: int) -> FARSession:
    """A session behind random frames and actions, at the size that the pipeline knows; its frames are pixels."""
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    video = torch.rand(
        batch_size, num_frames, 3, pipe.config.height or 64, pipe.config.width or 64, generator=generator
    )
    actions = [[random_action(config, generator) for _ in range(num_frames - 1)] for _ in range(batch_size)]
    takes_actions = pipe.transformer.takes_actions
    return pipe.start_session(
        video=video,
        actions=torch.stack([torch.stack(each) for each in actions]) if takes_actions else None,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )


def main(args: argparse.Namespace) -> None:
    pipe = FARPipeline.from_pretrained(args.model).to(args.device)
    lengths = torch.linspace(args.shortest, args.longest, args.num_players).round().int().tolist()
    results = {"machine": describe_machine(), "model": args.model, "steps": args.num_inference_steps}
    show_rows(run(pipe, lengths, args.num_inference_steps, args.num_rounds), results, args.output)


if __name__ == "__main__":
    main(parse_args())
