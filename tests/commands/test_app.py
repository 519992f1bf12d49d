"""The world behind the app, on a tiny pipeline; the page itself is tested in a browser."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from tiny_models import property_test, tiny_pipeline, tiny_transformer
from video_files import gray_frames, truncate, write_video

from diffusers_far.data.media_files import MediaLimits


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

from diffusers_far.commands.app import (  # noqa: E402
    RecordedWalks,
    Settings,
    Start,
    Visitor,
    VisitorStore,
    World,
    WorldError,
    WorldLimits,
    WorldModel,
    uploaded_start,
)
from diffusers_far.commands.app.view import psnr, scene_html  # noqa: E402


NAMES = ["forward", "left", "right"]
QUICK = Settings(num_inference_steps=1)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    transformer = tiny_transformer(num_actions=3, action_shift=1, long_patch_size=2, trained_frames=4)
    return WorldModel(tiny_pipeline(transformer, height=8, width=12, action_names=NAMES))


@pytest.fixture
def start() -> Start:
    """Three frames of context and four that were recorded after them."""
    frames = np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8)
    return Start("Maze <1>", frames[:3], [0, 1], frames[3:], (2, 2, 0, 1))


def begin(store: VisitorStore, name: str, start: Start) -> Visitor:
    with store.starting(name) as visitor:
        visitor.begin(start, QUICK)
    return visitor


def frames_after(world: World, *actions: int) -> np.ndarray:
    return np.stack([world.step(action) for action in actions])


def test_a_true_frame_stands_beside_each_one_while_the_walk_follows_the_record(model, start):
    world = World(model, start, QUICK)
    assert world.follows_record and world.recorded_action == 2
    frames_after(world, 2, 2)
    assert world.follows_record and np.array_equal(world.true_frames, start.true_frames[:2])
    world.step(1)
    assert not world.follows_record and world.recorded_action is None
    assert np.array_equal(world.true_frames, start.true_frames[:2])
    world.rewind(1)
    assert world.follows_record and world.recorded_action == 0


def test_the_record_ends(model, start):
    world = World(model, start, QUICK)
    frames_after(world, 2, 2, 0, 1)
    assert world.follows_record and world.recorded_action is None and len(world.true_frames) == 4
    world.step(1)
    assert not world.follows_record and len(world.true_frames) == 4


def test_autoplay_takes_the_recorded_way_and_then_the_last_action_again(model, start):
    world = World(model, start, QUICK)
    for _ in range(6):
        world.step(world.autoplay_action())
    assert world.actions == [2, 2, 0, 1, 1, 1]


def test_going_back_and_stepping_again_makes_the_same_frames(model, start):
    world = World(model, start, QUICK)
    frames = frames_after(world, 0, 1, 2, 0)
    world.rewind(3)
    assert np.array_equal(world.frames[-1], frames[0])
    assert np.array_equal(frames_after(world, 1, 2, 0), frames[1:])


def test_a_fork_leaves_the_walk_that_it_came_from_alone(model, start):
    world = World(model, start, QUICK)
    world.step(2)
    twin = world.fork()
    theirs = frames_after(twin, 0, 0)
    assert world.actions == [2] and world.num_new_frames == 1
    assert np.array_equal(frames_after(world, 0, 0), theirs)


@pytest.mark.parametrize("num_frames", [0, 3, -1, True, 1.0, "1"])
def test_nobody_goes_back_before_the_start(model, start, num_frames):
    world = World(model, start, QUICK)
    frames_after(world, 0, 0)
    with pytest.raises(WorldError, match="2 frames were made"):
        world.rewind(num_frames)
    assert world.num_new_frames == 2


@property_test
@given(action=st.none() | st.integers() | st.floats() | st.booleans() | st.text(max_size=4))
def test_only_the_models_actions_are_taken(model, start, action):
    world = World(model, start, QUICK)
    if type(action) is int and 0 <= action < 3:
        world.step(action)
    else:
        with pytest.raises(WorldError, match="forward, left, right"):
            world.step(action)
        assert world.num_new_frames == 0


def test_a_walk_has_an_end(model, start):
    world = World(model, start, QUICK, WorldLimits(max_new_frames=2))
    frames_after(world, 0, 0)
    with pytest.raises(WorldError, match="all there may be; go back"):
        world.step(0)
    world.rewind(1)
    world.step(1)


def test_one_visitors_flex_rope_is_not_anothers(model, start):
    plain, decaying = (World(model, start, Settings(1, flex_rope_slope=slope)) for slope in (0.0, 5.0))
    for world in (plain, decaying):
        world.session.rollout  # both exist before either steps
    slopes = []
    for world in (plain, decaying, plain, decaying):
        world.step(0)
        slopes.append((model.pipe.config.flex_rope or {}).get("slope", 0.0))
    assert slopes == [0.0, 5.0, 0.0, 5.0]


def test_settings_change_between_steps(model, start):
    world = World(model, start, QUICK)
    world.step(0)
    world.configure(Settings(num_inference_steps=2, guidance_scale=2.0))
    world.step(0)
    assert world.session.config.num_inference_steps == 2 and world.session.config.guidance_scale == 2.0


def test_a_model_starts_with_the_settings_that_it_is_shipped_with(start):
    own = {"num_inference_steps": 3, "guidance_scale": 1.4, "flex_rope": {"slope": 0.2, "schedule": "constant"}}
    own["short_cache"] = 2
    transformer = tiny_transformer(num_actions=3, action_shift=1, long_patch_size=2)
    model = WorldModel(tiny_pipeline(transformer, height=8, width=12, action_names=NAMES, **own))
    assert model.default_settings == Settings(3, 1.4, 0.2, 2)
    world = World(model, start, model.default_settings)
    world.step(0)
    assert (world.session.config.num_inference_steps, world.session.config.guidance_scale) == (3, 1.4)
    assert world.session.config.cache_options.short_cache == 2
    world.configure(Settings(1, flex_rope_slope=0.5))
    world.step(0)
    assert (model.pipe.config.flex_rope["slope"], model.pipe.config.flex_rope["schedule"]) == (0.5, "constant")


def test_models_that_say_nothing_have_the_settings_of_a_call(model):
    assert model.default_settings == Settings(model.pipe.default_inference_steps, 1.0, 0.0)


@pytest.mark.parametrize("settings", [Settings(1, max_long_frames=2), Settings(1, short_cache="rolling")])
def test_the_options_of_the_cache_hold_from_the_start(model, start, settings):
    world = World(model, start, settings)
    frames_after(world, 0, 1, 2)
    options = world.session.config.cache_options
    assert (options.short_cache, options.max_long_frames) == (settings.short_cache, settings.max_long_frames)


@property_test
@given(
    name=st.sampled_from(
        ["num_inference_steps", "guidance_scale", "flex_rope_slope", "max_long_frames", "short_cache"]
    ),
    value=st.text(max_size=4) | st.floats(max_value=-0.1) | st.just(float("nan")) | st.integers(min_value=20_000),
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(WorldError, match="must be a"):
        Settings(**{"num_inference_steps": 1, name: value})


def test_models_without_actions_have_one_way_on():
    model = WorldModel(tiny_pipeline(tiny_transformer(), height=8, width=12))
    world = World(model, Start("", np.zeros((2, 8, 12, 3), np.uint8), [0]), QUICK)
    world.step(world.autoplay_action())
    assert world.num_new_frames == 1


def test_models_that_have_no_buttons_are_refused():
    with pytest.raises(WorldError, match="continuous actions or classes"):
        WorldModel(tiny_pipeline(tiny_transformer(action_dim=2, action_shift=1)))


@pytest.fixture
def walks(tmp_path, monkeypatch) -> RecordedWalks:
    """Two walks of 9 frames; the grey level of a frame is ten times its number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    frames = [PILImage.fromarray(np.ascontiguousarray(frame)) for frame in gray_frames(9)]
    rows = {"video": [frames] * 2, "actions": [[0, 1, 2] * 3] * 2}
    features = Features({"video": List(Image()), "actions": List(Value("int64"))})
    (tmp_path / "mazes").mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "mazes" / "test.parquet")
    return RecordedWalks(str(tmp_path / "mazes"), (8, 12), num_actions=3)


def test_a_recorded_walk_starts_with_what_came_before_and_knows_what_comes_next(walks):
    start = walks.start(1, frame=4, num_context_frames=3)
    levels = [np.round(frames.mean(axis=(1, 2, 3)) / 10).tolist() for frames in (start.frames, start.true_frames)]
    assert levels == [[2, 3, 4], [5, 6, 7, 8]]
    assert start.actions == [2, 0] and start.true_actions == (1, 2, 0, 1)
    assert len(walks.start(0, frame=1, num_context_frames=3).frames) == 2


@pytest.mark.parametrize("wrong", [(2, 4, 3), (-1, 4, 3), ("0", 4, 3), (0, 8, 3), (0, -1, 3), (0, 4, 0), (0, 4, 65)])
def test_starts_that_are_not_there_are_refused(walks, wrong):
    with pytest.raises(WorldError):
        walks.start(*wrong)


@pytest.fixture
def own_dataset(tmp_path, monkeypatch):
    """Writes recordings of 1, 4 and 5 frames under a split of a name, with the columns that are given."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    frames = [PILImage.fromarray(np.ascontiguousarray(frame)) for frame in gray_frames(5)]
    (tmp_path / "pong").mkdir()

    def write(split: str = "test", feature=Value("int64"), **columns) -> str:
        rows = {"video": [frames[:1], frames[:4], frames], **columns}
        features = Features({"video": List(Image()), **dict.fromkeys(columns, List(feature))})
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "pong" / f"{split}.parquet")
        return str(tmp_path / "pong")

    return write


@pytest.mark.parametrize("num_missing", [0, 1])
def test_recordings_of_ones_own_are_played_from_any_split(own_dataset, num_missing):
    """The action that leads out of a recording may be missing, and recordings of one frame are passed over."""
    actions = [[0, 1, 2, 3, 1][: num_frames - num_missing] for num_frames in (1, 4, 5)]
    walks = RecordedWalks(own_dataset("validation", actions=actions), (8, 12), split="validation", num_actions=4)
    assert walks.titles == ["Recording 1", "Recording 2"] and walks.num_frames == [4, 5]
    start = walks.start(1, frame=1, num_context_frames=2)
    assert (start.actions, start.true_actions, len(start.true_frames)) == ([0], (1, 2, 3), 3)


def test_a_model_without_actions_plays_recordings_without_any(own_dataset):
    walks = RecordedWalks(own_dataset(), (8, 12), num_actions=0)
    world = World(WorldModel(tiny_pipeline(tiny_transformer(), height=8, width=12)), walks.start(0, 1, 2), QUICK)
    world.step(world.autoplay_action())
    assert world.follows_record and len(world.true_frames) == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "the model takes actions"),
        ({"actions": [[0], [0] * 4, [0, 1, 2, 3, 0]]}, "row 2 .*the action 3, but the model knows 0 to 2"),
        ({"actions": [[0], [0] * 4, [0, -1, 2, 0, 0]]}, r"row 2 .*`actions\[1\]` is -1"),
        ({"actions": [[0], [0], [0] * 5]}, "row 1 .*1 for 4 frames"),
        ({"actions": [[[0.5]], [[0.5]] * 4, [[0.5]] * 5], "feature": List(Value("float32"))}, "continuous actions"),
    ],
)
def test_a_dataset_that_the_model_cannot_play_is_refused_at_the_start(own_dataset, columns, message):
    with pytest.raises(ValueError, match=message):
        RecordedWalks(own_dataset(**columns), (8, 12), num_actions=3)


def test_an_upload_is_assumed_to_do_nothing_where_an_action_is_called_so(tmp_path):
    clip = uploaded_start(write_video(tmp_path / "a.mp4", gray_frames(6)), (8, 12), 3, ["fire", "up", "NOOP"])
    assert clip.actions == [2, 2] and "'NOOP' is assumed" in clip.note


def test_an_uploaded_clip_says_what_is_done_and_assumed(tmp_path):
    clip = uploaded_start(write_video(tmp_path / "a.mp4", gray_frames(6)), (8, 12), 4, NAMES)
    assert clip.frames.shape == (4, 8, 12, 3) and clip.actions == [0, 0, 0] and clip.true_frames is None
    assert "from 48x32 to 12x8" in clip.note and "'forward' is assumed" in clip.note


LIMITS = WorldLimits(upload=MediaLimits(max_bytes=20_000, max_frames=5, max_pixels=2000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write_video(path, gray_frames(6)), "more than 5 frames"),
        (lambda path: write_video(path, gray_frames(2, 64, 64)), "frames of 64x64"),
        (lambda path: PILImage.new("RGB", (90, 90)).save(path.with_suffix(".png")), "frames of 90x90"),
        (lambda path: path.write_bytes(b"GIF89a" + bytes(30_000)), "more than 0.0191 MiB"),
        (lambda path: truncate(write_video(path, gray_frames(4)), 0.5), "upload.mp4"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"), "neither a video nor an image"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: None, "does not exist"),
    ],
)
def test_uploads_beyond_the_limits_or_of_other_kinds_are_refused(tmp_path, make, message):
    make(tmp_path / "upload.mp4")
    path = next(tmp_path.iterdir(), tmp_path / "upload.mp4")
    with pytest.raises(WorldError, match=message) as error:
        uploaded_start(path, (8, 12), 4, NAMES, LIMITS)
    assert str(tmp_path) not in str(error.value), "the page shows where uploads lie"


def test_visitors_do_not_see_each_others_walks(model, start):
    store = VisitorStore(model)
    for name in ("ann", "ben"):
        begin(store, name, start)
    store.visitor("ann").world.step(0)
    assert store.visitor("ben").world.num_new_frames == 0


def test_visitors_fork_and_choose_between_branches(model, start):
    visitor = begin(VisitorStore(model, WorldLimits(max_branches=2)), "ann", start)
    visitor.world.step(0)
    visitor.fork().step(1)
    assert visitor.world.actions == [0, 1] and visitor.show(0).actions == [0]
    with pytest.raises(WorldError, match="all there may be"):
        visitor.fork()
    for branch in (2, -1, None, "0"):
        with pytest.raises(WorldError, match="no branch"):
            visitor.show(branch)
    visitor.begin(start, QUICK)
    assert len(visitor.branches) == 1


def test_a_start_that_fails_keeps_the_walk(model, start):
    visitor = begin(VisitorStore(model), "ann", start)
    world = visitor.world
    with pytest.raises(ValueError, match="short_cache"):
        visitor.begin(start, Settings(1, short_cache=60))
    assert visitor.world is world


def test_the_store_bounds_how_many_there_are_and_forgets_the_idle(model, start):
    now = [0.0]
    store = VisitorStore(model, WorldLimits(max_visitors=2, idle_seconds=10), clock=lambda: now[0])
    begin(store, "ann", start)
    now[0] = 8.0
    begin(store, "ben", start)
    with pytest.raises(WorldError, match="come back later"):
        begin(store, "eve", start)
    now[0] = 11.0
    begin(store, "eve", start)
    assert len(store) == 2
    store.drop("ben")
    store.drop("nobody")
    with pytest.raises(WorldError, match="Choose a start"):
        store.visitor("ann")


def test_where_all_places_are_taken_the_longest_away_make_room(model, start):
    now = [0.0]
    store = VisitorStore(model, WorldLimits(max_visitors=2, yield_seconds=10), clock=lambda: now[0])
    for now[0], name in ((0.0, "ann"), (1.0, "ben")):
        begin(store, name, start)
    now[0] = 9.0
    store.visitor("ann").world.step(0)
    now[0] = 12.0
    begin(store, "eve", start)
    assert store.visitor("ann").world.num_new_frames == 1
    with pytest.raises(WorldError, match="Choose a start"):
        store.visitor("ben")


def test_only_who_starts_is_a_visitor(model, start):
    store = VisitorStore(model, WorldLimits(max_visitors=1))
    for number in range(100):
        with pytest.raises(WorldError, match="Choose a start"):
            store.visitor(f"caller {number}")
        with pytest.raises(ValueError, match="short_cache"), store.starting(f"starter {number}") as visitor:
            visitor.begin(start, Settings(1, short_cache=60))
    assert len(store) == 0
    begin(store, "ann", start)


def test_the_scene_shows_frames_truth_and_words_without_markup_of_others(model, start):
    world = World(model, start, QUICK)
    assert "The truth, after a step." in scene_html(world)
    world.step(2)
    scene = scene_html(world, 1, 3)
    assert "Recorded frame" in scene and "branch 2 of 3" in scene and "recorded next: right" in scene
    assert "Maze &lt;1&gt;" in scene and "<1>" not in scene
    assert scene.count("<img") == 2 + 4 + 1  # the pair, the frames, the true one under the new one
    world.step(0)
    assert "another way than the recorded one" in scene_html(world)


def test_psnr_of_equal_frames_is_bounded():
    frame = np.zeros((2, 2, 3), np.uint8)
    assert psnr(frame, frame) == 100 and psnr(frame, frame + 255) == 0


def test_the_space_asks_for_what_the_library_and_the_app_are_tested_with():
    card = (EXAMPLES / "space" / "README.md").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert re.search(r"^sdk: gradio$", card, re.M)
    assert re.search(r"^sdk_version: (\S+)$", card, re.M)[1] == pins["gradio"]
    declared = [line.strip() for line in (ROOT / "setup.cfg").read_text().splitlines()]
    wanted = (EXAMPLES / "space" / "requirements.txt").read_text().splitlines()[1:]
    assert [requirement for requirement in wanted if requirement not in declared] == []
