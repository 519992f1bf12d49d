"""Build the documentation as static HTML that loads nothing from elsewhere.

    python scripts/build_docs.py --output_dir outputs/docs

reads `docs/` and the package's source, and imports neither the package nor torch.
"""

import argparse
from pathlib import Path

from docs_site.site import Site


ROOT = Path(__file__).parents[1]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="Folder of the pages, with _toctree.yml.")
    parser.add_argument("--source", type=Path, default=ROOT / "src", help="Folder of the package.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Replaced.")
    args = parser.parse_args(arguments)
    if (
        args.output_dir.is_dir()
        and any(args.output_dir.iterdir())
        and not (args.output_dir / "search_index.js").exists()
    ):
        parser.error(f"--output_dir {args.output_dir} holds something else than a built site; name another folder.")
    return args


def main(args: argparse.Namespace) -> None:
    site = Site(args.docs, args.source)
    site.write(args.output_dir)
    print(f"{len(site.pages)} pages in {args.output_dir}; open {(args.output_dir / 'index.html').resolve()}")


if __name__ == "__main__":
    main(parse_args())
