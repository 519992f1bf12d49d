"""A session without end: memory and speed of a player who takes thousands of steps.

python -m benchmarks.session --model checkpoints/far-maze --num_steps 2000 --output session.json
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_far import FARPipeline, FARSession
from diffusers_far.command_line import HelpWithDefaults

from .measurement import Measurement, Row
from .memory import resident_memory
from .table import show_rows
from .timing import describe_machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--model", required=True, help="Folder of a pipeline whose model has long frames.")
    parser.add_argument("--num_steps", type=int, default=2000, help="Frames to make.")
    parser.add_argument("--num_inference_steps", type=int, default=4, help="Denoising steps of each frame.")
    parser.add_argument("--max_long_frames", type=int, default=64, help="Long frames that the cache remembers.")
    parser.add_argument("--max_history", type=int, default=64, help="Frames that the session remembers.")
    parser.add_argument("--steps_per_fork", type=int, default=100, help="A fork takes a step and is dropped so often.")
    parser.add_argument("--steps_per_row", type=int, default=200, help="Steps that a row of the table sums up.")
    parser.add_argument("--seed", type=int, default=0, help="Of noise and actions.")
    parser.add_argument("--output", type=Path, help="JSON file; must not exist.")
    args = parser.parse_args()
    for name in ("num_steps", "steps_per_fork", "steps_per_row"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; pass at least 1.")
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    return args


def run(session: FARSession, num_steps: int, steps_per_fork: int, steps_per_row: int, seed: int) -> Iterator[Row]:
    """Take random actions; yield a row every `steps_per_row` steps, and after the last one.

    Raises:
        RuntimeError: A frame is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    config = session.rollout.transformer.config
    seconds, first_step = 0.0, 0
    for step in range(num_steps):
        action = random_action(config, generator) if session.num_frames else None
        start = time.perf_counter()
        frame = session.step(action)
        seconds += time.perf_counter() - start
        if not torch.isfinite(frame).all():
            raise RuntimeError(f"Frame {step} is not finite.")
        if (step + 1) % steps_per_fork == 0:
            session.fork().step(random_action(config, generator))
        if (step + 1) % steps_per_row == 0 or step + 1 == num_steps:
            yield Row(
                case="session",
                settings={"steps": step + 1, "remembered": len(session.history.frames)},
                measurements={
                    "a step": Measurement((seconds / (step + 1 - first_step),), "s"),
                    "resident": Measurement((resident_memory(),), "bytes"),
                    "session": Measurement((session.num_bytes,), "bytes"),
                    "cache": Measurement((session.rollout.num_bytes,), "bytes"),
                },
            )
            seconds, first_step = 0.0, step + 1


def random_action(config, generator: torch.Generator) -> torch.Tensor | None:
    """An action of the kind that the model takes, or none."""
    if config.num_actions is not None:
        return torch.randint(0, config.num_actions, (), generator=generator)
    return None if config.action_dim is None else torch.randn(config.action_dim, generator=generator)


def main(args: argparse.Namespace) -> None:
    pipe = FARPipeline.from_pretrained(args.model)
    session = pipe.start_session(
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        max_long_frames=args.max_long_frames,
        max_history=args.max_history,
        output_type="pt",
    )
    settings = ("model", "num_inference_steps", "max_long_frames", "max_history", "seed")
    results = {"machine": describe_machine(), **{name: getattr(args, name) for name in settings}}
    rows = run(session, args.num_steps, args.steps_per_fork, args.steps_per_row, args.seed)
    show_rows(rows, results, args.output)


if __name__ == "__main__":
    main(parse_args())
