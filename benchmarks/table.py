"""Rows as tables, on screen while they come and in Markdown."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from .measurement import Row


class ScreenTable:
    """Prints rows as they come, with new headings where the case or its columns change."""

    def __init__(self):
        self._headings: tuple[str, ...] = ()
        self._widths: list[int] = []

    def print(self, row: Row) -> None:
        headings = ("case", *row.cells)
        cells = (row.case, *row.cells.values())
        if headings != self._headings:
            self._headings = headings
            self._widths = [max(len(heading), len(cell)) for heading, cell in zip(headings, cells)]
            print(f"\n{self._line(headings)}")
        print(self._line(cells), flush=True)

    def _line(self, cells: Iterable[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths)).rstrip()


def show_rows(rows: Iterable[Row], results: dict[str, Any], output: Path | None) -> None:
    """Print rows as they come, and write them with what else is in `results` to a JSON file, after every row."""
    table = ScreenTable()
    for row in rows:
        table.print(row)
        results.setdefault("rows", []).append(row.to_json())
        if output is not None:
            output.write_text(json.dumps(results, indent=2) + "\n")


def markdown_tables(rows: Iterable[Row]) -> str:
    """A table for each run of rows with the same columns."""
    tables = []
    for headings, group in groupby(rows, key=lambda row: tuple(row.cells)):
        lines = [headings, ["---"] * len(headings), *(row.cells.values() for row in group)]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)
