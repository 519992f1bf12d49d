"""Videos with a `metadata.jsonl`, the layout that `datasets` calls videofolder."""

import json
from pathlib import Path

from ..faults import BadExampleError
from ..video import iter_video
from .trajectory import Trajectory


class VideoFolderSource:
    """A line of `metadata.jsonl` per video: `file_name`, and `actions` and `label` where there are any.

    Args:
        folder (`str` or `Path`): Holds `metadata.jsonl`; `file_name` counts from here. A label is a string, or an
            integer from 0.

    Raises:
        ValueError: If there is no `metadata.jsonl`, or a line of it is wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.metadata_path = self.folder / "metadata.jsonl"
        if not self.metadata_path.is_file():
            raise ValueError(
                f"`folder` {str(folder)!r} has no `metadata.jsonl`; write one with a line such as "
                '{"file_name": "a.mp4", "actions": [0, 1]} for each video.'
            )
        lines = self.metadata_path.read_text().splitlines()
        self.rows = {number: self._parse(number, line) for number, line in enumerate(lines, 1) if line.strip()}
        if not self.rows:
            raise ValueError(f"{str(self.metadata_path)!r} is empty; write a line for each video.")
        self.line_numbers = list(self.rows)
        self.names = [row["file_name"] for row in self.rows.values()]
        self.class_names = self._class_names()

    def __getitem__(self, index: int) -> Trajectory:
        row, path = self.rows[self.line_numbers[index]], self.folder / self.names[index]
        if not path.is_file():
            raise BadExampleError(
                f"{str(self.metadata_path)!r}, line {self.line_numbers[index]}: there is no file {str(path)!r}."
            )
        label = None if row.get("label") is None else str(row["label"])
        return Trajectory(self.names[index], iter_video(path), row.get("actions"), label)

    def _parse(self, number: int, line: str) -> dict:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(self.metadata_path)!r}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{str(self.metadata_path)!r}, line {number} has no `file_name`; name the video's file.")
        return row

    def _class_names(self) -> list[str] | None:
        labels = {row["label"] for row in self.rows.values() if row.get("label") is not None}
        if all(isinstance(label, str) for label in labels):
            return sorted(labels) or None
        if all(type(label) is int and label >= 0 for label in labels):
            return [str(label) for label in range(max(labels) + 1)]
        raise ValueError(
            f"{str(self.metadata_path)!r} has labels such as {sorted(labels, key=str)[:3]}; give strings only, or "
            "integers from 0 only."
        )
