import json

import pytest
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.sources import VideoFolderSource


def write_metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_rows_of_the_metadata_are_trajectories(tmp_path):
    write_video(tmp_path / "clips" / "b.mp4", gray_frames(3))
    write_video(tmp_path / "a.mp4", gray_frames(2))
    write_metadata(
        tmp_path,
        {"file_name": "clips/b.mp4", "actions": [0, 2, 1], "label": "walk"},
        "",
        {"file_name": "a.mp4", "actions": [1, 1], "label": "run"},
    )
    source = VideoFolderSource(tmp_path)
    assert source.names == ["clips/b.mp4", "a.mp4"] and source.class_names == ["run", "walk"]
    assert frame_numbers(list(source[0].frames)) == [0, 1, 2]
    assert source[0].actions == [0, 2, 1] and source[0].label == "walk"
    assert frame_numbers(list(source[1].frames)) == [0, 1]


def test_actions_and_labels_may_be_absent(tmp_path):
    write_video(tmp_path / "a.mp4", gray_frames(2))
    write_metadata(tmp_path, {"file_name": "a.mp4"})
    source = VideoFolderSource(tmp_path)
    assert source.class_names is None
    assert source[0].actions is None and source[0].label is None


def test_labels_that_are_numbers_stay_these_numbers(tmp_path):
    write_metadata(tmp_path, {"file_name": "a.mp4", "label": 3}, {"file_name": "b.mp4", "label": 1})
    assert VideoFolderSource(tmp_path).class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "a.mp4"', "line 2 is no JSON"),
        ({"file": "a.mp4"}, "line 2 has no `file_name`"),
        ({"file_name": "b.mp4", "label": 1}, "labels such as"),
        ({"file_name": "b.mp4", "label": {"a": 1}}, "labels such as"),
        ('["a.mp4"]', "line 2 is no JSON object"),
        ("[" * 100_000, "line 2 is no JSON"),
        ({"file_name": "b.mp4", "actions": 3}, "line 2 has `actions` of type int"),
        ({"file_name": "../b.mp4"}, "line 2: `file_name` '../b.mp4' leads out of the folder"),
        ({"file_name": "clips/../../b.mp4"}, "line 2: .*leads out of the folder"),
        ({"file_name": "/etc/b.mp4"}, "line 2: .*leads out of the folder"),
        ({"file_name": "a\0.mp4"}, "line 2: .*leads out of the folder"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, message):
    write_metadata(tmp_path, {"file_name": "a.mp4", "label": "walk"}, row)
    with pytest.raises(ValueError, match=f"metadata.jsonl.*{message}"):
        VideoFolderSource(tmp_path)


def test_a_missing_video_is_named_with_its_line(tmp_path):
    write_metadata(tmp_path, "", {"file_name": "missing.mp4"})
    with pytest.raises(BadExampleError, match="line 2.*missing.mp4"):
        VideoFolderSource(tmp_path)[0]


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `metadata.jsonl`"):
        VideoFolderSource(tmp_path)


def test_a_label_that_is_a_number_makes_no_list_of_a_thousand_million(tmp_path):
    write_metadata(tmp_path, {"file_name": "a.mp4", "label": 10**9})
    with pytest.raises(ValueError, match="below 100,000"):
        VideoFolderSource(tmp_path)


def test_other_fields_are_kept_on_request_and_named_otherwise(tmp_path):
    write_video(tmp_path / "a.mp4", gray_frames(2))
    write_metadata(tmp_path, {"file_name": "a.mp4", "weather": "rain", "speed": [1, 2.5]})
    trajectory = VideoFolderSource(tmp_path, keep_columns=["speed"])[0]
    assert trajectory.columns == {"speed": [1, 2.5]} and trajectory.left_out == ["weather"]
    with pytest.raises(BadExampleError, match="line 1 lacks .'wind'.; it has"):
        VideoFolderSource(tmp_path, keep_columns=["wind"])[0]
