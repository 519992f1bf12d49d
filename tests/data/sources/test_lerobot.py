import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from video_files import frame_numbers, gray_frames, write_video

from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.sources import LeRobotSource
from diffusers_far.pictures import encode_png


LENGTHS = (4, 6, 3)
CAMERA, OTHER_CAMERA = "observation.images.top", "observation.images.wrist"


def actions_of(episode: int, num_channels: int = 2) -> np.ndarray:
    return (100 * episode + np.arange(LENGTHS[episode] * num_channels, dtype=np.float32)).reshape(-1, num_channels)


def action_table(episodes: range | list[int], num_channels: int = 2) -> pa.Table:
    """As LeRobot writes it: a list per frame, but a plain number if there is a single channel."""
    actions = np.concatenate([actions_of(episode, num_channels) for episode in episodes])
    indices = np.repeat(episodes, [LENGTHS[episode] for episode in episodes])
    column = pa.array(actions[:, 0]) if num_channels == 1 else pa.array(actions.tolist(), pa.list_(pa.float32()))
    return pa.table({"action": column, "episode_index": pa.array(indices)})


def write_table(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_description(folder, version, data_path, video_path, cameras=(CAMERA,), camera_type="video"):
    features = {"action": {"dtype": "float32", "shape": [2]}} | {camera: {"dtype": camera_type} for camera in cameras}
    description = {
        "codebase_version": version,
        "chunks_size": 2,
        "data_path": data_path,
        "video_path": video_path,
        "features": features,
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(description))


def write_version_2(folder, num_channels=2, cameras=(CAMERA,)):
    write_description(
        folder,
        "v2.1",
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        cameras,
    )
    lines = [{"episode_index": index, "tasks": ["push"], "length": length} for index, length in enumerate(LENGTHS)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for episode, length in enumerate(LENGTHS):
        place = f"chunk-{episode // 2:03d}"
        (folder / "data" / place).mkdir(parents=True, exist_ok=True)
        pq.write_table(
            action_table([episode], num_channels), folder / "data" / place / f"episode_{episode:06d}.parquet"
        )
        for level, camera in enumerate(cameras):
            frames = gray_frames(length + level)[level:]
            write_video(folder / "videos" / place / camera / f"episode_{episode:06d}.mp4", frames)
    return folder


def write_version_3(folder):
    write_description(
        folder,
        "v3.0",
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    starts = np.cumsum((0,) + LENGTHS[:-1])
    episodes = {
        "episode_index": [0, 1, 2],
        "length": LENGTHS,
        "data/chunk_index": [0] * 3,
        "data/file_index": [0] * 3,
        f"videos/{CAMERA}/chunk_index": [0] * 3,
        f"videos/{CAMERA}/file_index": [1] * 3,
        f"videos/{CAMERA}/from_timestamp": starts / 25,
    }
    write_table(folder / "meta/episodes/chunk-000/file-000.parquet", pa.table(episodes))
    write_table(folder / "data/chunk-000/file-000.parquet", action_table(range(3)))
    write_video(folder / "videos" / CAMERA / "chunk-000" / "file-001.mp4", gray_frames(sum(LENGTHS)))
    return folder


def test_version_2_has_an_episode_per_file(tmp_path):
    source = LeRobotSource(write_version_2(tmp_path))
    assert source.names == ["episode_000000", "episode_000001", "episode_000002"]
    for episode, length in enumerate(LENGTHS):
        assert frame_numbers(list(source[episode].frames)) == list(range(length))
        assert np.array_equal(source[episode].actions, actions_of(episode))


def test_version_3_cuts_episodes_from_shared_files(tmp_path):
    source = LeRobotSource(write_version_3(tmp_path))
    first_frame = 0
    for episode, length in enumerate(LENGTHS):
        assert frame_numbers(list(source[episode].frames)) == list(range(first_frame, first_frame + length))
        assert np.array_equal(source[episode].actions, actions_of(episode))
        first_frame += length


def test_actions_of_a_single_channel_stay_continuous(tmp_path):
    actions = LeRobotSource(write_version_2(tmp_path, num_channels=1))[1].actions
    assert np.array_equal(actions, actions_of(1, num_channels=1))


def test_one_of_several_cameras_must_be_chosen(tmp_path):
    write_version_2(tmp_path, cameras=(CAMERA, OTHER_CAMERA))
    for video_key in (None, "observation.images.left"):
        with pytest.raises(ValueError, match=f"`video_key` is {video_key!r}.*{CAMERA}.*{OTHER_CAMERA}"):
            LeRobotSource(tmp_path, video_key)
    assert frame_numbers(list(LeRobotSource(tmp_path, OTHER_CAMERA)[0].frames)) == [1, 2, 3, 4]


def test_too_few_actions_are_named_with_their_file_and_episode(tmp_path):
    write_version_2(tmp_path)
    path = tmp_path / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(action_table([1]).slice(0, 2), path)
    with pytest.raises(BadExampleError, match="episode_000001.parquet' has 2 actions of episode 1.* says 6"):
        LeRobotSource(tmp_path)[1]


@pytest.mark.parametrize("content", [None, b"", b"no parquet file"])
def test_an_unreadable_file_of_actions_is_named(tmp_path, content):
    write_version_2(tmp_path)
    path = tmp_path / "data" / "chunk-000" / "episode_000001.parquet"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadExampleError, match="episode_000001.parquet"):
        LeRobotSource(tmp_path)[1]


def test_what_is_no_such_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `meta/info.json`"):
        LeRobotSource(tmp_path)
    write_description(tmp_path, "v1.6", "", "")
    with pytest.raises(ValueError, match="`codebase_version` 'v1.6'"):
        LeRobotSource(tmp_path)


def test_a_dataset_without_its_list_of_episodes_is_refused(tmp_path):
    (write_version_2(tmp_path) / "meta" / "episodes.jsonl").unlink()
    with pytest.raises(ValueError, match="meta' is incomplete.*episodes.jsonl"):
        LeRobotSource(tmp_path)


def image_table(episodes: list[int], shuffled: bool = False) -> pa.Table:
    """As LeRobot writes a dataset without videos: an image per row, and other columns beside it."""
    images = [
        {"bytes": encode_png(frame), "path": f"frame_{number:06d}.png"}
        for episode in episodes
        for number, frame in enumerate(gray_frames(LENGTHS[episode]))
    ]
    numbers = np.concatenate([np.arange(LENGTHS[episode]) for episode in episodes])
    state = pa.array([[number, 0.5] for number in numbers.tolist()], pa.list_(pa.float32()))
    table = action_table(episodes).append_column(CAMERA, pa.array(images))
    table = table.append_column("frame_index", pa.array(numbers)).append_column("observation.state", state)
    return table.take(np.random.default_rng(0).permutation(len(table))) if shuffled else table


def write_image_dataset(folder, version, shuffled=False):
    """Of version 2.0, 2.1 or 3.0, its frames in the parquet files and its `video_path` null, as LeRobot says it."""
    if version == "v3.0":
        data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        write_description(folder, version, data_path, None, camera_type="image")
        places = {"data/chunk_index": [0] * 3, "data/file_index": [0] * 3}
        episodes = pa.table({"episode_index": [0, 1, 2], "length": LENGTHS} | places)
        write_table(folder / "meta/episodes/chunk-000/file-000.parquet", episodes.take([2, 0, 1]))
        write_table(folder / "data/chunk-000/file-000.parquet", image_table([0, 1, 2], shuffled))
        return folder
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    if version == "v2.0":  # its first datasets
        data_path = "data/chunk-{episode_chunk:03d}/train-{episode_index:05d}-of-{total_episodes:05d}.parquet"
    write_description(folder, version, data_path, None, camera_type="image")
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_episodes": 3}))
    lines = [json.dumps({"episode_index": episode, "length": LENGTHS[episode]}) for episode in (1, 0, 2)]
    (folder / "meta" / "episodes.jsonl").write_text("\n\n".join(lines) + "\n\n")  # out of order, with blank lines
    for episode in range(3):
        place = {"episode_chunk": episode // 2, "episode_index": episode, "total_episodes": 3}
        write_table(folder / data_path.format(**place), image_table([episode], shuffled))
    return folder


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_images_in_parquet_are_read_in_the_order_of_their_frames(tmp_path, version, shuffled):
    source = LeRobotSource(write_image_dataset(tmp_path, version, shuffled), keep_columns=["observation.state"])
    assert source.names == ["episode_000000", "episode_000001", "episode_000002"]
    for episode, length in enumerate(LENGTHS):
        trajectory = source[episode]
        assert frame_numbers(list(trajectory.frames)) == list(range(length))
        assert np.array_equal(trajectory.actions, actions_of(episode))
        state = trajectory.columns["observation.state"]
        assert state.dtype == np.float32 and state.tolist() == [[number, 0.5] for number in range(length)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.take([0, 1, 1, 3, 4, 5]), "skips or repeats a frame"),
        (lambda table: table.drop_columns([CAMERA]), "cannot be read"),
        (lambda table: table.drop_columns(["action"]), "cannot be read"),
        (lambda table: table.set_column(2, CAMERA, pa.array([{"bytes": b"no image", "path": ""}] * 6)), "frame 0"),
        (lambda table: table.set_column(2, CAMERA, pa.array([{"path": "/etc/hostname"}] * 6)), "in the parquet file"),
    ],
)
def test_a_damaged_episode_of_images_is_named(tmp_path, change, message):
    write_image_dataset(tmp_path, "v2.1")
    path = tmp_path / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(change(image_table([1])), path)
    with pytest.raises(BadExampleError, match=f"episode_000001.parquet.*{message}"):
        list(LeRobotSource(tmp_path)[1].frames)


def test_actions_of_another_name_are_read_by_it(tmp_path):
    write_image_dataset(tmp_path, "v2.1")
    path = tmp_path / "meta" / "info.json"
    path.write_text(path.read_text().replace('"action"', '"actions"'))
    for path in tmp_path.rglob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(
            table.rename_columns([{"action": "actions"}.get(name, name) for name in table.column_names]), path
        )
    assert np.array_equal(LeRobotSource(tmp_path, action_key="actions")[1].actions, actions_of(1))
    with pytest.raises(ValueError, match="no column 'action'.*`action_key`"):
        LeRobotSource(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("info.json", "{", "info.json' is no JSON"),
        ("info.json", "[]", "info.json' has no `features`"),
        ("info.json", '{"features": []}', "info.json' has no `features`"),
        ("info.json", '{"features": {"action": 1, "a": {"dtype": "image"}}, "codebase_version": 3}', "'3'"),
        ("episodes.jsonl", '{"episode_index": 0', "episodes.jsonl', line 1 is no JSON"),
        ("episodes.jsonl", "\n[1]", "episodes.jsonl', line 2 is no JSON object"),
        ("episodes.jsonl", '{"episode_index": "zero", "length": 3}', "meta' is incomplete"),
        ("episodes.jsonl", '{"episode_index": 0}', "meta' is incomplete"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 4}\n{"episode_index": 0, "length": 4}', "one twice"),
    ],
)
def test_metadata_that_are_wrong_are_named(tmp_path, file, content, message):
    write_image_dataset(tmp_path, "v2.1")
    (tmp_path / "meta" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        LeRobotSource(tmp_path)


@pytest.mark.parametrize("template", ["../secret.parquet", "/etc/{episode_index}.parquet", "data/../../secret"])
def test_a_path_out_of_the_folder_is_refused(tmp_path, template):
    write_image_dataset(tmp_path, "v2.1")
    path = tmp_path / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_path": template}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        LeRobotSource(tmp_path)
