"""Whatever a visitor sends that the app cannot use, they read why, and their walk is as it was; no browser is needed."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed_media import MALFORMED_MEDIA, OTHER_KINDS, image_bytes
from PIL import Image
from tiny_models import property_test, tiny_pipeline, tiny_transformer
from video_files import gray_frames, write_video
from written_paths import watched_writes


gradio = pytest.importorskip("gradio")

from diffusers_far.commands.app import RecordedWalks, WorldLimits, WorldModel  # noqa: E402
from diffusers_far.commands.app.ui import AppParts, Handlers  # noqa: E402
from diffusers_far.commands.arguments import parse_play  # noqa: E402
from diffusers_far.commands.play import main  # noqa: E402


NAMES = ["forward", "left", "right"]
GOOD_SETTINGS = (1, 1.0, 0.0, "exact", 0)
PLACES = ("num_inference_steps", "guidance_scale", "flex_rope_slope", "short_cache", "max_long_frames")
LONGEST_MESSAGE = 400  # characters
VISITOR = SimpleNamespace(session_hash="ann")


class RecordedWalk:
    """One walk of nine frames, in the place of a dataset."""

    titles, num_frames = ["Recording 1"], [9]
    start = RecordedWalks.start

    def __init__(self, limits: WorldLimits):
        self.limits, self.rows = limits, [None]

    def _walk(self, walk: int) -> tuple[np.ndarray, list[int]]:
        return np.ascontiguousarray(gray_frames(9, 8, 12)), [0, 1, 2] * 3


@pytest.fixture(scope="module")
def model() -> WorldModel:
    transformer = tiny_transformer(num_actions=3, action_shift=1, long_patch_size=2, trained_frames=4)
    return WorldModel(tiny_pipeline(transformer, height=8, width=12, action_names=NAMES))


@pytest.fixture
def handlers(model) -> Iterator[Handlers]:
    """Of an app in which one visitor has walked three frames."""
    limits = WorldLimits()
    handlers = Handlers(AppParts(model, RecordedWalk(limits), limits))
    handlers.begin_recorded(VISITOR, 0, 4, 3, *GOOD_SETTINGS)
    for action in (0, 1, 2):
        handlers.step(VISITOR, action, *GOOD_SETTINGS)
    yield handlers
    handlers.files.cleanup()


def refusal(handlers: Handlers, handler: str, *arguments) -> str:
    """What the visitor reads. The walk must be as it was, and go on as it would have, and no file be written."""
    visitor = handlers.visitors.visitor(VISITOR.session_hash)
    world, frames, twin = visitor.world, visitor.world.frames, visitor.world.fork()
    with watched_writes() as written, pytest.raises(gradio.Error) as error:
        getattr(handlers, handler)(VISITOR, *arguments)
    assert written == []
    assert visitor.world is world and np.array_equal(world.frames, frames)
    assert np.array_equal(world.step(0), twin.step(0))
    world.rewind(1)
    message = error.value.message
    assert message.isprintable() and 10 < len(message) <= LONGEST_MESSAGE and "Traceback" not in message
    assert error.value.print_exception is False, "the server's log is no place for a visitor's mistakes"
    return message


def settings_with(name: str, value: object) -> tuple:
    return tuple(value if place == name else good for place, good in zip(PLACES, GOOD_SETTINGS))


WRONG_SETTINGS = {
    "num_inference_steps": [0, -1, 101, 1.5, 10**30, float("nan"), float("inf"), "5", "", None, True, [5], {}],
    "guidance_scale": [-0.1, 10.1, float("nan"), float("-inf"), "strong", "1", None, False, [1.0]],
    "flex_rope_slope": [-1, 5.1, float("nan"), "steep", None, [0.1]],
    "short_cache": ["", "fast", 0, 65, -1, 1.5, None, True, ["exact"]],
    "max_long_frames": [-1, 10_001, 1.5, float("nan"), "", "all", True, [8]],
}
SETTINGS = [(name, value) for name, values in WRONG_SETTINGS.items() for value in values]
STARTS = [
    *[(walk, 4, 3) for walk in (1, -1, 0.5, "0", None, True, [0], 10**30)],
    *[(0, frame, 3) for frame in (-1, 8, 9, 2.5, float("nan"), "4", None, [4])],
    *[(0, 4, num_context) for num_context in (0, -1, 65, 1.5, float("inf"), "3", None, [3])],
]
ACTIONS = [-1, 3, 1.0, 0.5, float("nan"), "0", "forward", None, True, [0], {}, 10**30]
BRANCHES = [-1, 1, 0.0, "0", None, True, [0]]


def test_more_than_a_hundred_malformed_inputs_are_tried():
    assert len(MALFORMED_MEDIA) + len(SETTINGS) + len(STARTS) + len(ACTIONS) + len(BRANCHES) > 100


@pytest.mark.parametrize(
    "wrong",
    ["--port 0", "--port 65536", "--port -1", "--port http", "--max_visitors 0", "--max_visitors many", "--share"],
)
def test_calls_of_the_command_that_are_wrong_are_refused(capsys, wrong):
    with pytest.raises(SystemExit) as end:
        parse_play(["--model", "m", *wrong.split()])
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error" in message and wrong.split()[0] in message


@pytest.mark.parametrize("model", ["./nowhere", "/etc", "/dev/null"])
def test_a_model_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match="no pipeline's folder"):
        main(parse_play(["--model", model]))


@pytest.mark.parametrize("fault", MALFORMED_MEDIA)
def test_uploads_that_are_none_are_refused(handlers, tmp_path, fault):
    path = MALFORMED_MEDIA[fault](tmp_path)
    message = refusal(handlers, "begin_uploaded", str(path), 4, *GOOD_SETTINGS)
    assert str(tmp_path) not in message, "the page shows where uploads lie"


@pytest.mark.parametrize("path", ["", None, "/", "/etc", "/dev/zero", "/proc/self/mem", "a\0b.mp4", "\udcff.mp4"])
def test_paths_that_are_no_uploads_are_refused(handlers, path):
    refusal(handlers, "begin_uploaded", path, 4, *GOOD_SETTINGS)


@pytest.mark.parametrize("kind", ["text", "playlist", "list of clips", "HTML"])
def test_files_of_the_machine_are_not_shown(handlers, tmp_path, kind):
    (tmp_path / "upload.mp4").write_bytes(OTHER_KINDS[kind])
    assert "walk" not in refusal(handlers, "begin_uploaded", str(tmp_path / "upload.mp4"), 4, *GOOD_SETTINGS)
    assert "root:" not in refusal(handlers, "begin_uploaded", "/etc/passwd", 4, *GOOD_SETTINGS)


LARGE = {
    "more frames": lambda path: Image.new("L", (4, 4)).save(
        path, "GIF", save_all=True, append_images=[Image.new("L", (4, 4), level % 256) for level in range(1001)]
    ),
    "larger frames": lambda path: Image.new("L", (2049, 2049)).save(path, "PNG"),
    "more bytes": lambda path: path.write_bytes(image_bytes("PNG") + bytes(20 * 2**20)),
}


@pytest.mark.parametrize("what", LARGE)
def test_uploads_beyond_the_limits_are_refused(handlers, tmp_path, what):
    LARGE[what](tmp_path / "upload.png")
    assert "upload.png" in refusal(handlers, "begin_uploaded", str(tmp_path / "upload.png"), 4, *GOOD_SETTINGS)


@pytest.mark.parametrize("name", ["view.mp4", "view", "view.txt", "..view..png", "a b\n.png", "%2e%2e%2fview", "-rf"])
def test_what_an_upload_is_called_does_not_matter(handlers, tmp_path, name):
    (tmp_path / name).write_bytes(image_bytes("PNG"))
    with watched_writes() as written:
        scene, _ = handlers.begin_uploaded(VISITOR, str(tmp_path / name), 4, *GOOD_SETTINGS)
    assert "Your image" in scene and written == []


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_settings_out_of_range_or_of_another_kind_are_refused(handlers, name, value):
    refusal(handlers, "step", 0, *settings_with(name, value))
    refusal(handlers, "begin_recorded", 0, 4, 3, *settings_with(name, value))


@pytest.mark.parametrize("settings", [(), (1,), (1, 1.0, 0.0, "exact"), (1, 1.0, 0.0, "exact", 0, 0)])
def test_too_few_or_too_many_settings_are_refused(handlers, settings):
    refusal(handlers, "step", 0, *settings)


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_are_not_there_are_refused(handlers, start):
    refusal(handlers, "begin_recorded", *start, *GOOD_SETTINGS)


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_that_are_not_there_are_refused(handlers, action):
    assert "forward, left, right" in refusal(handlers, "step", action, *GOOD_SETTINGS)


@pytest.mark.parametrize("branch", BRANCHES)
def test_branches_that_are_not_there_are_refused(handlers, branch):
    refusal(handlers, "show", branch)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
)


@property_test
@given(settings=st.tuples(*[values] * 5), action=values)
def test_whatever_a_step_is_given_it_is_taken_or_refused(handlers, settings, action):
    """By chance all may be right: then there is one more frame, and it is taken back."""
    world = handlers.visitors.visitor(VISITOR.session_hash).world
    num_before = world.num_new_frames
    try:
        handlers.step(VISITOR, action, *settings)
    except gradio.Error as error:
        assert error.message.isprintable() and len(error.message) <= LONGEST_MESSAGE
        assert world.num_new_frames == num_before
    else:
        assert world.num_new_frames == num_before + 1
        world.rewind(1)


@property_test
@given(data=st.data(), name=st.sampled_from(["clip.mp4", "clip.gif", "clip.webp"]))
def test_uploads_with_bytes_changed_are_read_or_refused(handlers, tmp_path, data, name):
    path = tmp_path / name
    if name == "clip.mp4":
        write_video(path, gray_frames(6))
    else:
        frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in gray_frames(6)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        scene, _ = handlers.begin_uploaded(VISITOR, str(path), 4, *GOOD_SETTINGS)
    except gradio.Error as error:
        assert name in error.message and str(tmp_path) not in error.message
    else:
        assert "Your" in scene


@pytest.mark.parametrize(
    ("handler", "arguments"),
    [
        ("step", (0, *GOOD_SETTINGS)),
        ("rewind", (1,)),
        ("fork", ()),
        ("show", (0,)),
        ("save", ()),
    ],
)
def test_nothing_is_done_before_there_is_a_walk(model, handler, arguments):
    handlers = Handlers(AppParts(model))
    with watched_writes() as written, pytest.raises(gradio.Error, match="no (rollout|branch)"):
        getattr(handlers, handler)(VISITOR, *arguments)
    assert written == []


def test_autoplay_switches_itself_off_where_nothing_can_be_done(model):
    with pytest.warns(UserWarning, match="no rollout"):
        *seen, is_on, timer = Handlers(AppParts(model)).autoplay(VISITOR, *GOOD_SETTINGS)
    assert is_on is False and timer.active is False and seen == [gradio.skip(), gradio.skip()]


def test_a_download_is_written_among_the_apps_own_alone(handlers, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "copies"))
    with watched_writes() as written:
        handlers.save(VISITOR)
    places = (handlers.files.name, tmp_path / "copies")
    assert [path for path in written if not any(path.is_relative_to(place) for place in places)] == []


def test_downloads_do_not_pile_up(handlers):
    for _ in range(3 * WorldLimits().max_files):
        (handlers.new_download_folder() / "walk.mp4").touch()
    assert len(list(Path(handlers.files.name).iterdir())) <= WorldLimits().max_files + 1


def test_a_walk_without_frames_to_take_back_says_so(handlers):
    handlers.rewind(VISITOR, 8)  # as many as there are
    assert "0 frames were made" in refusal(handlers, "rewind", 8)
