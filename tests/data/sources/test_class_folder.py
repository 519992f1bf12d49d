import pytest
from video_files import frame_numbers, gray_frames, truncate, write_video

from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.sources import ClassFolderSource


def test_the_folder_is_the_label_and_the_classes_are_sorted(tmp_path):
    for name in ("Surfing/v_b.avi", "Archery/v_c.mp4", "Surfing/v_a.AVI"):
        write_video(tmp_path / name, gray_frames(3), "mpeg4")
    (tmp_path / "Archery" / "notes.txt").write_text("not a video")
    (tmp_path / "Archery" / "._v_c.mp4").write_text("not a video either")
    (tmp_path / "Empty").mkdir()
    source = ClassFolderSource(tmp_path)
    assert source.class_names == ["Archery", "Surfing"]
    assert source.names == ["Archery/v_c.mp4", "Surfing/v_a.AVI", "Surfing/v_b.avi"]
    trajectories = [source[index] for index in range(3)]
    assert [trajectory.label for trajectory in trajectories] == ["Archery", "Surfing", "Surfing"]
    assert all(frame_numbers(list(trajectory.frames)) == [0, 1, 2] for trajectory in trajectories)
    assert trajectories[0].actions is None


def test_a_truncated_video_is_named_when_its_frames_are_asked_for(tmp_path):
    truncate(write_video(tmp_path / "Archery" / "v_a.mp4", gray_frames(3)), 0.5)
    with pytest.raises(BadExampleError, match="Archery/v_a.mp4"):
        list(ClassFolderSource(tmp_path)[0].frames)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    write_video(tmp_path / "v_a.mp4", gray_frames(3))
    with pytest.raises(ValueError, match="no video in its subfolders"):
        ClassFolderSource(tmp_path)
