"""Run benchmarks by name, show tables, write JSON.

python -m benchmarks                                  # all
python -m benchmarks step growth --output some.json   # some
python -m benchmarks frame --frames 16 --num_rounds 2  # quick: one length
"""

import argparse
from functools import partial
from itertools import chain
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults

from .cases import CASES, all_rows
from .memory import in_fresh_process
from .models import SEED
from .table import show_rows
from .timing import describe_machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="All by default.")
    parser.add_argument(
        "--num_rounds", type=int, default=9, help="Timed runs of each rival, in turn; fewer where runs are long."
    )
    parser.add_argument("--frames", type=int, nargs="+", help="Of `frame`: only contexts of so many frames.")
    parser.add_argument("--pipeline", type=Path, help="Of `frame`: folder of the world, of those shipped by default.")
    parser.add_argument("--output", type=Path, help="JSON file, written after every case; must not exist.")
    args = parser.parse_args()
    if args.num_rounds < 2:
        parser.error(f"--num_rounds is {args.num_rounds}; a spread needs 2 runs at least.")
    if args.frames is not None and min(args.frames) < 2:
        parser.error(
            f"--frames has {min(args.frames)}; the last of them is written behind others, so pass 2 at least."
        )
    if args.pipeline is not None and not args.pipeline.is_dir():
        parser.error(f"--pipeline {args.pipeline} is no folder; name one that a pipeline was saved to.")
    sizes = {"frame_counts": args.frames and tuple(args.frames), "pipeline": args.pipeline}
    args.sizes = {name: size for name, size in sizes.items() if size is not None}
    if args.sizes and args.cases != ["frame"]:
        parser.error(
            f"--frames and --pipeline are of `frame`, but the cases are {args.cases or 'all'}; name it alone."
        )
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    return args


def main(args: argparse.Namespace) -> None:
    results = {"machine": describe_machine(), "seed": SEED, "num_rounds": args.num_rounds}
    # How fast large temporary tensors are made depends on what the process has freed before, so each case has its own.
    cases = (
        in_fresh_process(all_rows, partial(CASES[name], **args.sizes), args.num_rounds) for name in args.cases or CASES
    )
    show_rows(chain.from_iterable(cases), results, args.output)


if __name__ == "__main__":
    main(parse_args())
