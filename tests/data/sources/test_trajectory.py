import numpy as np
import pytest
from video_files import gray_frames, write_video

from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.sources import ClassFolderSource, NpzSource, VideoFolderSource
from diffusers_far.data.sources.trajectory import path_inside


@pytest.mark.parametrize("name", ["../a", "b/../../a", "b/../c", "/a", "a\0"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    with pytest.raises(BadExampleError, match="leads out of the folder"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize("source", [NpzSource, ClassFolderSource, VideoFolderSource])
def test_a_link_out_of_the_folder_is_refused_in_every_layout(tmp_path, source):
    names = {NpzSource: "a.npz", ClassFolderSource: "Archery/a.mp4", VideoFolderSource: "a.mp4"}
    secret, link = tmp_path / "secret", tmp_path / "data" / names[source]
    write_video(secret / "a.mp4", gray_frames(2))
    np.savez(secret / "a.npz", video=gray_frames(2), actions=np.zeros(2, int))
    link.parent.mkdir(parents=True)
    link.symlink_to(secret / link.name)
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "a.mp4"}')
    with pytest.raises(ValueError, match="is a link to .*out of the folder.*copy the file into the folder"):
        source(tmp_path / "data")[0]


def test_links_within_the_folder_and_those_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, blob = (
        tmp_path / "datasets--me--walks" / "snapshots" / "abc",
        tmp_path / "datasets--me--walks" / "blobs" / "1",
    )
    for folder in (snapshot / "0", blob.parent):
        folder.mkdir(parents=True)
    blob.touch()
    (snapshot / "0" / "a.npz").symlink_to(blob)
    (snapshot / "b.npz").symlink_to(snapshot / "0" / "a.npz")
    for folder, name in ((snapshot, "0/a.npz"), (snapshot, "b.npz"), (snapshot / "0", "a.npz")):
        assert path_inside(folder, name) == folder / name
    (tmp_path / "linked").symlink_to(snapshot)
    assert path_inside(tmp_path / "linked", "b.npz") == tmp_path / "linked" / "b.npz"


def test_links_that_lead_to_each_other_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BadExampleError, match="cannot be opened"):
        path_inside(tmp_path, "a")
