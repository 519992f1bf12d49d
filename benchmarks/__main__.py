"""Run benchmarks by name, show a table, write JSON.

python -m benchmarks            # all cases
python -m benchmarks step --output step.json
"""

import argparse
import json
from pathlib import Path

from . import step
from .timing import describe_machine


CASES = {"step": step.run}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="All by default.")
    parser.add_argument("--num_rounds", type=int, default=9, help="Timed runs of each rival, in turn.")
    parser.add_argument("--output", type=Path, help="JSON file; must not exist.")
    args = parser.parse_args()
    if args.num_rounds < 2:
        parser.error(f"--num_rounds is {args.num_rounds}; a spread needs 2 runs at least.")
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    return args


def main(args: argparse.Namespace) -> None:
    rows = []
    for name in args.cases or CASES:
        for row in CASES[name](args.num_rounds):
            if not rows or rows[-1]["case"] != row["case"]:
                print(
                    f"{'case':<8}{'model':<14}{'frames':>7}{'FAR':>9}{'limit':>9}{'naive':>9}{'of limit':>10}{'x naive':>9}"
                )
            print(
                f"{row['case']:<8}{row['model']:<14}{row['frames']:>7}{row['far_seconds']:>8.3f}s"
                f"{row['limit_seconds']:>8.3f}s{row['naive_seconds']:>8.3f}s{row['share_of_limit']:>10.0%}"
                f"{row['faster_than_naive']:>9.1f}",
                flush=True,
            )
            rows.append(row)
    if args.output is not None:
        machine = {
            **describe_machine(),
            "seed": 0,
            "num_rounds": args.num_rounds,
        }
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
