import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, List, Video
from video_files import gray_frames, write_video

from diffusers_far.data.loading import has_split, load_split, locate_dataset, stream_split
from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.streaming import require_own_file


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        load_split(str(tmp_path / "nowhere"), "train")


def test_an_unknown_split_is_refused_and_the_splits_are_named(trajectories, tmp_path):
    (tmp_path / "dataset").mkdir()
    trajectories.to_parquet(tmp_path / "dataset" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"'dev'.*\['train'\]"):
        load_split(str(tmp_path / "dataset"), "dev")


def test_a_revision_belongs_to_a_hub_id_and_not_to_a_folder(tmp_path, monkeypatch):
    assert locate_dataset("org/walks@v1") == ("org/walks", "v1")
    assert locate_dataset("org/walks") == ("org/walks", None)
    (tmp_path / "walks@home").mkdir()
    assert locate_dataset(str(tmp_path / "walks@home")) == (str(tmp_path / "walks@home"), None)
    monkeypatch.chdir(tmp_path)
    assert locate_dataset("walks@home") == ("walks@home", None)


def test_a_split_is_there_or_not_and_a_slice_of_it_too(trajectories, tmp_path):
    (tmp_path / "dataset").mkdir()
    trajectories.to_parquet(tmp_path / "dataset" / "train-00000-of-00001.parquet")
    assert has_split(str(tmp_path / "dataset"), "train[:2]") and not has_split(str(tmp_path / "dataset"), "validation")


@pytest.mark.parametrize("opened", [load_split, lambda name, split: list(iterate(stream_split(name, split)))])
def test_a_row_that_names_a_file_of_this_machine_is_refused(tmp_path, opened):
    """As a stranger's parquet file may: images and videos by a path, without their content."""
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    write_video(tmp_path / "secret.mp4", gray_frames(2))
    secrets = {"image": tmp_path / "secret.png", "video": tmp_path / "secret.mp4", "link": tmp_path / "link" / "a.mp4"}
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.mp4").symlink_to(tmp_path / "secret.mp4")
    for kind, secret in secrets.items():
        file = {"bytes": None, "path": str(secret)}
        schema = Features({"video": List(Image()) if kind == "image" else Video()}).arrow_schema
        row = {"video": [file] if kind == "image" else file}
        (tmp_path / kind).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / kind / "train.parquet")
        with pytest.raises(BadExampleError, match="secret"):
            opened(str(tmp_path / kind), "train")


def iterate(split):
    for row in split.all_rows():
        yield split.trajectory(row, "row")


@pytest.mark.parametrize(
    ("name", "place", "is_own"),
    [
        ("hf://datasets/me/walks@abc/a.mp4", "me/walks", True),
        ("zip://a.mp4::hf://datasets/me/walks@abc/a.zip", "me/walks", True),
        ("hf://datasets/me/other/a.mp4", "me/walks", False),
        ("https://example.org/a.mp4", "me/walks", False),
        ("/etc/hostname", "me/walks", False),
        ("https://example.org/a.mp4", ".", False),
        (None, "me/walks", True),
    ],
)
def test_what_a_row_of_the_hub_may_name(name, place, is_own):
    if is_own:
        require_own_file(name, place)
    else:
        with pytest.raises(BadExampleError, match="is no file of the dataset"):
            require_own_file(name, place)


@pytest.mark.parametrize("opened", [load_split, stream_split])
@pytest.mark.parametrize(("name", "content"), [("train.parquet", b"none"), ("metadata.jsonl", b'{"file_name": ')])
def test_a_damaged_dataset_is_named(tmp_path, opened, name, content):
    write_video(tmp_path / "damaged" / "a.mp4", gray_frames(2))
    (tmp_path / "damaged" / name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged' cannot be read"):
        opened(str(tmp_path / "damaged"), "train")
