import io
import zipfile

import numpy as np
import pytest
from video_files import frame_numbers, gray_frames, truncate, write_video

from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.sources import NpzSource


VIDEO = gray_frames(5, 8, 8)
ACTIONS = np.array([0, 1, 2, 1, 0])


def test_trajectories_of_all_subfolders_come_in_the_order_of_their_names(tmp_path):
    for name in ("1/b.npz", "0/c.npz", "a.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez_compressed(tmp_path / name, video=VIDEO, actions=ACTIONS)
    source = NpzSource(tmp_path)
    assert source.names == ["0/c.npz", "1/b.npz", "a.npz"]
    trajectory = source[1]
    assert trajectory.name == "1/b.npz"
    assert np.array_equal(trajectory.frames, VIDEO)
    assert np.array_equal(trajectory.actions, ACTIONS)


def test_actions_alone_belong_to_the_mp4_of_the_same_name(tmp_path):
    np.savez(tmp_path / "a.npz", actions=ACTIONS)
    write_video(tmp_path / "a.mp4", gray_frames(5))
    trajectory = NpzSource(tmp_path)[0]
    assert frame_numbers(list(trajectory.frames)) == [0, 1, 2, 3, 4]
    assert np.array_equal(trajectory.actions, ACTIONS)


def test_arrays_of_other_names_are_read_by_them(tmp_path):
    np.savez(tmp_path / "a.npz", frames=VIDEO, act=ACTIONS)
    trajectory = NpzSource(tmp_path, video_key="frames", action_key="act")[0]
    assert np.array_equal(trajectory.frames, VIDEO) and np.array_equal(trajectory.actions, ACTIONS)
    with pytest.raises(
        BadExampleError, match=r"lacks `actions`; it has \['frames', 'act'\].*`video_key` and `action_key`"
    ):
        NpzSource(tmp_path)[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"video": VIDEO}, "lacks `actions`"),
        ({"actions": ACTIONS}, "lacks `video`.*a.mp4"),
        ({"video": VIDEO[0], "actions": ACTIONS}, r"`video` of shape \(8, 8, 3\)"),
        ({"video": VIDEO.transpose(0, 3, 1, 2), "actions": ACTIONS}, r"\(5, 3, 8, 8\)"),
        ({"video": VIDEO[:0], "actions": ACTIONS}, r"\(0, 8, 8, 3\)"),
        ({"video": VIDEO / 255, "actions": ACTIONS}, "type float64"),
        ({"video": np.array([object()]), "actions": ACTIONS}, "no readable `.npz`"),
    ],
)
def test_a_file_of_the_wrong_content_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadExampleError, match=f"a.npz.*{message}"):
        NpzSource(tmp_path)[0]


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    np.savez_compressed(tmp_path / "a.npz", video=VIDEO, actions=ACTIONS)
    truncate(tmp_path / "a.npz", share)
    with pytest.raises(BadExampleError, match="a.npz"):
        NpzSource(tmp_path)[0]


def test_a_file_that_only_has_the_suffix_is_named(tmp_path):
    (tmp_path / "a.npz").write_text("no archive at all")
    with open(tmp_path / "b.npz", "wb") as file:
        np.save(file, VIDEO)
    for index, name in enumerate(("a.npz", "b.npz")):
        with pytest.raises(BadExampleError, match=name):
            NpzSource(tmp_path)[index]


def test_a_folder_without_trajectories_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no `.npz`"):
        NpzSource(tmp_path)


def test_other_arrays_are_kept_on_request_and_named_otherwise(tmp_path):
    np.savez(tmp_path / "a.npz", video=VIDEO, actions=ACTIONS, position=ACTIONS / 2, seed=7)
    trajectory = NpzSource(tmp_path, keep_columns=["position"])[0]
    assert np.array_equal(trajectory.columns["position"], ACTIONS / 2) and trajectory.left_out == ["seed"]
    with pytest.raises(BadExampleError, match="a.npz' lacks .'pose'.; it has"):
        NpzSource(tmp_path, keep_columns=["pose"])[0]


def test_no_object_is_unpickled_whatever_array_it_is_in(tmp_path):
    np.savez(tmp_path / "a.npz", video=VIDEO, actions=ACTIONS, pose=np.array([{}], dtype=object))
    NpzSource(tmp_path)[0]  # never touched
    with pytest.raises(BadExampleError, match="a.npz' is no readable.*no Python objects"):
        NpzSource(tmp_path, keep_columns=["pose"])[0]


def test_an_array_that_claims_to_be_larger_than_the_memory_is_named(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 64, 64, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("video.npy", header.getvalue())
    with pytest.raises(BadExampleError, match="a.npz"):
        NpzSource(tmp_path)[0]
