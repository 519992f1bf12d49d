"""Measure the claims about FAR, at a size that a desk can afford.

    python -m benchmarks.studies prepare --data_dir outputs/studies-data
    python -m benchmarks.studies convergence --data_dir outputs/studies-data --work_dir outputs/studies
    python -m benchmarks.studies plan
    python -m benchmarks.studies plot
    python -m benchmarks.studies report
    python -m benchmarks.studies recipes

A study that was interrupted goes on when the same command is given again, from its work folder and from its numbers, which are
in `docs/results/STUDY.json` as far as they are there: a study may take several days, and machines. With `--variants` or `--seeds`
it does these runs alone; several such commands may share a work folder and a machine, and one without them writes the
numbers of all. From the numbers of the seeds that are complete `plot` draws, and `report` writes the tables of
`docs/results.md`. `recipes` prints what the paper's recipes cost.
"""

import argparse
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults

from .data import DataFolder, prepare
from .plan import describe_plan
from .plots import PLOTS, draw
from .recipes import recipe_table
from .report import all_sections, rewrite
from .results import STUDIES, finished_results, run_part, run_study
from .scripts import ROOT
from .settings import CacheSettings, read_settings
from .study import StudyPart


RESULTS, IMAGES, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "images", ROOT / "docs" / "results.md"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in STUDIES:
        study = commands.add_parser(name, help="A study; runs what is left of it.")
        study.add_argument("--data_dir", type=Path, required=True, help="What `prepare` has made.")
        study.add_argument("--work_dir", type=Path, required=True, help="Gets a folder of this study's runs.")
        study.add_argument("--results_dir", type=Path, help="For the numbers; docs/results, or in the work folder.")
        study.add_argument("--variants", nargs="+", help="These alone; the cache study has none.")
        study.add_argument("--seeds", nargs="+", type=int, help="These alone.")
        study.add_argument(
            "--smoke", action="store_true", help="Seconds instead of hours, and figures without meaning."
        )
    data = commands.add_parser("prepare", help="Mazes, latents and codes.")
    data.add_argument("--data_dir", type=Path, required=True)
    data.add_argument("--num_processes", type=int, default=1, help="That encode at a time.")
    data.add_argument("--smoke", action="store_true", help="Very little of everything.")
    plan = commands.add_parser("plan", help="Runs, operations and hours of each study.")
    plan.add_argument("--flops_per_second", type=float, default=4e10, help="Of this machine, in training.")
    commands.add_parser("recipes", help="Operations and hours of the paper's recipes.")
    plot = commands.add_parser("plot", help="Draw the studies that were run.")
    plot.add_argument("studies", nargs="*", choices=[[], *PLOTS], help="All by default.")
    report = commands.add_parser("report", help="Rewrite the tables of the page.")
    report.add_argument("--page", type=Path, default=PAGE)
    for command in (plot, report):
        command.add_argument("--results_dir", type=Path, default=RESULTS)
        command.add_argument("--images_dir", type=Path, default=IMAGES)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """A study, up to its file of numbers, or a part of it."""
    settings, work = read_settings(args.command, smoke=args.smoke), args.work_dir / args.command
    results_dir = args.results_dir or (args.work_dir / "results" if args.smoke else RESULTS)
    data, part = DataFolder(args.data_dir), StudyPart(args.variants, args.seeds)
    if part.is_whole:
        print(f"Wrote {run_study(settings, data, work, results_dir, smoke=args.smoke)}")
    elif isinstance(settings, CacheSettings):
        raise ValueError(
            f"`--variants` or `--seeds` is given, but {args.command} has no runs to choose from; leave it out."
        )
    else:
        run_part(settings, data, work, results_dir, part)
        print("These runs are done; without `--variants` and `--seeds` the numbers are written.")


def plot(args: argparse.Namespace) -> None:
    for name in args.studies or PLOTS:
        results = finished_results(name, args.results_dir)
        if results is None:
            print(f"{name}: no seed is finished yet")
            continue
        path = args.images_dir / f"study-{name}.png"
        draw(results, path)
        print(f"Drew {path}")


def main(args: argparse.Namespace) -> None:
    if args.command in STUDIES:
        run(args)
    elif args.command == "prepare":
        prepare(DataFolder(args.data_dir), num_processes=args.num_processes, smoke=args.smoke)
    elif args.command == "plan":
        print(describe_plan(args.flops_per_second))
    elif args.command == "recipes":
        print(recipe_table())
    elif args.command == "plot":
        plot(args)
    else:
        args.page.write_text(rewrite(args.page.read_text(), all_sections(args.results_dir, args.images_dir)))


if __name__ == "__main__":
    main(parse_args())
