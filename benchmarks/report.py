"""Show the results of a run as Markdown, or put them into a page.

python -m benchmarks.report docs/results/benchmarks.json                        # print all tables
python -m benchmarks.report docs/results/benchmarks.json --page docs/speed.md   # fill the page's

A page marks the place of a table by two comments, `<!-- benchmarks: step -->` and `<!-- end of step -->`; what stands between them
replaced. `machine` in place of a case is a line about what was measured on; `gpu_machine`, that of `python -m benchmarks.gpu`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from diffusers_far.command_line import HelpWithDefaults

from .measurement import Row
from .table import markdown_tables


REGION = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="JSON files that `python -m benchmarks` wrote. Where several have the same, the first one's counts.",
    )
    parser.add_argument("--page", type=Path, help="Markdown file whose marked places are filled.")
    args = parser.parse_args()
    for path in (*args.results, args.page):
        if path is not None and not path.is_file():
            parser.error(f"There is no file {path}.")
    return args


def sections(results: dict[str, Any]) -> dict[str, str]:
    """Markdown of each case of a run, and of its machine."""
    rows = [Row.from_json(row) for row in results["rows"]]
    cases = dict.fromkeys(row.case for row in rows)
    tables = {case: markdown_tables(row for row in rows if row.case == case) for case in cases}
    return {"gpu_machine" if "gpu" in results else "machine": machine_line(results), **tables}


def machine_line(results: dict[str, Any]) -> str:
    machine, gpu = results["machine"], results.get("gpu")
    device = f"{gpu['name']} with {gpu['memory']}, CUDA {gpu['cuda']}; " if gpu else ""
    return (
        f"{machine['date']}, {device}{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory']} of memory; Python {machine['python']}, torch {machine['torch']}, diffusers "
        f"{machine['diffusers']}; seed {results['seed']}, {results['num_rounds']} rounds (fewer of what takes long)."
    )


def filled(page: str, contents: dict[str, str]) -> str:
    """A page with its marked places filled; those that there are no results for are left empty."""
    return REGION.sub(lambda region: _fill(region, contents), page)


def _fill(region: re.Match, contents: dict[str, str]) -> str:
    start, name, end = region.groups()
    return f"{start}\n{contents[name]}\n\n{end}" if name in contents else f"{start}{end}"


def main(args: argparse.Namespace) -> None:
    contents = {}
    for file in reversed(args.results):
        contents |= sections(json.loads(file.read_text()))
    if args.page is None:
        for name, content in contents.items():
            print(f"## {name}\n\n{content}\n")
    else:
        args.page.write_text(filled(args.page.read_text(), contents))


if __name__ == "__main__":
    main(parse_args())
