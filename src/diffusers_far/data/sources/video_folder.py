"""Videos with a `metadata.jsonl`, the layout that `datasets` calls videofolder."""

from collections.abc import Sequence
from pathlib import Path

from ..rows import BadExampleError
from ..video import iter_video
from .trajectory import Trajectory, choose_columns, path_inside, read_json_lines


MAX_CLASSES = 100_000  # of labels that are numbers: a wrong one must not make a list of all numbers up to it
USED = ("file_name", "actions", "label")


class VideoFolderSource:
    """A line of `metadata.jsonl` per video: `file_name`, and `actions` and `label` where there are any.

    Args:
        folder (`str` or `Path`): Holds `metadata.jsonl`; `file_name` counts from here, and stays in here. A label is a
            string, or an integer from 0.
        keep_columns (sequence of `str`): Other fields that are kept.

    Raises:
        ValueError: If there is no `metadata.jsonl`, or a line of it is wrong.
    """

    splits = None

    def __init__(self, folder: str | Path, keep_columns: Sequence[str] = ()) -> None:
        self.folder, self.keep_columns = Path(folder), keep_columns
        self.metadata_path = self.folder / "metadata.jsonl"
        if not self.metadata_path.is_file():
            raise ValueError(
                f"`folder` {str(folder)!r} has no `metadata.jsonl`; write one with a line such as "
                '{"file_name": "a.mp4", "actions": [0, 1]} for each video.'
            )
        self.rows = dict(read_json_lines(path_inside(self.folder, "metadata.jsonl")))
        if not self.rows:
            raise ValueError(f"{str(self.metadata_path)!r} is empty; write a line for each video.")
        for number, row in self.rows.items():
            self._check(number, row)
        self.line_numbers = list(self.rows)
        self.names = [row["file_name"] for row in self.rows.values()]
        self.class_names = self._class_names()

    def __getitem__(self, index: int) -> Trajectory:
        row, path = self.rows[self.line_numbers[index]], path_inside(self.folder, self.names[index])
        where = f"{str(self.metadata_path)!r}, line {self.line_numbers[index]}"
        if not path.is_file():
            raise BadExampleError(f"{where}: there is no file {str(path)!r}.")
        kept, left_out = choose_columns(list(row), self.keep_columns, USED, where)
        return Trajectory(
            self.names[index],
            iter_video(path),
            row.get("actions"),
            None if row.get("label") is None else str(row["label"]),
            {name: row[name] for name in kept},
            left_out,
        )

    def _check(self, number: int, row: dict) -> None:
        where = f"{str(self.metadata_path)!r}, line {number}"
        if not isinstance(row.get("file_name"), str):
            raise ValueError(f"{where} has no `file_name`; name the video's file.")
        try:
            path_inside(self.folder, row["file_name"])
        except BadExampleError as error:
            raise ValueError(f"{where}: `file_name` {error}") from error
        if row.get("actions") is not None and not isinstance(row["actions"], list):
            raise ValueError(f"{where} has `actions` of type {type(row['actions']).__name__}; give a list.")

    def _class_names(self) -> list[str] | None:
        labels = [row["label"] for row in self.rows.values() if row.get("label") is not None]
        if all(isinstance(label, str) for label in labels):
            return sorted(set(labels)) or None
        if all(type(label) is int and 0 <= label < MAX_CLASSES for label in labels):
            return [str(label) for label in range(max(labels) + 1)]
        raise ValueError(
            f"{str(self.metadata_path)!r} has labels such as {sorted(map(repr, labels))[:3]}; give strings only, or "
            f"integers from 0 only, below {MAX_CLASSES:,}."
        )
