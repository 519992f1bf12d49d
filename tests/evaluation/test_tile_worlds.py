"""The protocol of tiles: what a perfect, a repeating and a cheating model score, and what is refused."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List, Value
from diffusers import AutoencoderTiny
from launched import in_threads
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.baselines.pipeline_video_dit import VideoDiTPipeline
from diffusers_far.data.loading import load_split
from diffusers_far.evaluation.protocols import TilesProtocol
from diffusers_far.evaluation.tile_worlds import (
    SOURCES,
    TileRecordings,
    check_dataset,
    find_way_back,
    format_scores,
    load_walks,
    materials_distance,
    measure_walks,
    score_exact_tiles,
    score_known_tiles,
    score_made_up_worlds,
    score_returns,
    walk_worlds,
)
from diffusers_far.evaluation.tiles import (
    COLUMNS,
    DO,
    MATERIALS,
    MOVES,
    PLAYER,
    ROWS,
    STEPS,
    WALKABLE,
    DrawnWorld,
    ThereAndBack,
    Wanderer,
)
from diffusers_far.evaluation.world_model import Predictions


pytest.importorskip("crafter")  # is played in the place of a model

EXAMPLES = Path(__file__).parents[2] / "examples"
WALKS = EXAMPLES / "crafter_walks"
sys.path.insert(0, str(EXAMPLES))

from crafter_world.game import CrafterWorld  # noqa: E402


GRASS, SAND, STONE, LAVA = (MATERIALS.index(name) for name in ("grass", "sand", "stone", "lava"))
LEFT, RIGHT, UP, DOWN = MOVES


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Of the walks that the repository has: one makes round trips, one wanders, one goes out for 128 frames and back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return load_split(str(WALKS), "test").select(range(3))


@pytest.fixture(scope="module")
def protocol() -> TilesProtocol:
    return TilesProtocol(num_walks=3, num_frames=5, num_made_frames=3, return_steps=(1, 2), num_inference_steps=1)


@pytest.fixture(scope="module")
def walks(dataset, protocol) -> TileRecordings:
    return load_walks(dataset, protocol)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    coders = {f"{name}coder_block_out_channels": (4,) * 4 for name in ("en", "de")}
    coders |= {f"num_{name}coder_blocks": (1,) * 4 for name in ("en", "de")}
    return tiny_pipeline(tiny_transformer(num_actions=5, action_shift=1), AutoencoderTiny(**coders).eval())


def predictions(stretches, predicted=None) -> Predictions:
    """The truth as prediction, if none is given, and as reconstruction."""
    truth = stretches.clips.video[:, 32:]
    return Predictions(
        truth=truth,
        predicted=truth if predicted is None else predicted,
        repeated=stretches.clips.video[:, 31:32].expand_as(truth),
        reconstructed=truth,
    )


# Stretches


def test_a_way_back_begins_where_all_that_follows_was_walked_before(dataset, protocol, walks):
    pose = np.array(dataset[2]["pose"])
    assert find_way_back(pose, replace(protocol, num_frames=24)) == 128 - 32
    for pose in walks.ways_back.clips.pose:
        assert {tuple(place) for place in pose[32:].tolist()} <= {tuple(place) for place in pose[:32].tolist()}
    assert walks.wandering.clips.video.shape == (3, 37, 3, 64, 64) and walks.wandering.tiles.shape == (3, 37, 8, 6)
    assert torch.equal(walks.wandering.clips.pose[0], torch.tensor(dataset[0]["pose"])[64:101])


def test_to_stand_still_is_no_way_back(protocol):
    pose = np.zeros((80, 3))
    assert find_way_back(pose, protocol) is None
    assert find_way_back(pose, replace(protocol, way_back_share=0.2)) == 0
    assert find_way_back(np.arange(240).reshape(80, 3), protocol) is None


def test_recordings_without_a_way_back_are_scored_without_one(dataset, protocol, walks):
    there = replace(protocol, way_back_share=5.0)
    assert load_walks(dataset, there).ways_back is None
    scores = {"protocol": vars(protocol), "known": {}}
    assert "No recording goes back over known ground." in format_scores(scores)


# Known tiles


def test_a_perfect_model_draws_everything_right(walks, protocol):
    for stretches in (walks.wandering, walks.ways_back):
        scores = score_known_tiles(predictions(stretches), stretches, protocol)
        for name, of_label in scores["accuracy"].items():
            for estimate in (of_label["predicted"]["all"], *of_label["predicted"]["by_frame"]):
                assert estimate["mean"] == (1.0 if estimate["num_samples"] else None), name
        assert scores["psnr"]["predicted"]["all"]["mean"] == 100
        assert scores["player"]["predicted"]["all"]["mean"] == 1.0
        assert 0 < scores["accuracy"]["known"]["share_of_tiles"] <= np.mean(scores["share_scored"]) < 1
    assert scores["accuracy"]["new"]["share_of_tiles"] == 0  # of the ways back


def test_a_repeating_model_is_right_where_the_land_stays_as_it_was(walks, protocol):
    tiles, stretches = walks.wandering.tiles, walks.wandering
    scores = score_known_tiles(predictions(stretches, predictions(stretches).repeated), stretches, protocol)
    columns, rows = np.indices((COLUMNS, ROWS))
    expected, steps = [], (stretches.clips.pose[:, 32] - stretches.clips.pose[:, 31]).int().tolist()
    for (before, after), (x, y, _) in zip(tiles[:, 31:33], steps):
        stays = (0 <= columns + x) & (columns + x < COLUMNS) & (0 <= rows + y) & (rows + y < ROWS) & (after >= 0)
        stays[PLAYER] = False
        expected.append((after == before)[stays].mean())
    in_view = scores["accuracy"]["in view"]
    assert in_view["predicted"] == in_view["repeated"] and any(map(any, steps))
    assert in_view["predicted"]["by_frame"][0]["mean"] == pytest.approx(np.mean(expected))
    assert scores["psnr"]["predicted"] == scores["psnr"]["repeated"]


def test_a_wrong_tile_costs_its_share_of_its_label_and_frame(walks, protocol):
    stretches = walks.ways_back
    predicted = stretches.clips.video[:, 32:].clone()
    predicted[:, 1, :, :48, :8] = 1.0  # a white first column, in the second new frame
    scores = score_known_tiles(predictions(stretches, predicted), stretches, protocol)
    known = scores["accuracy"]["known"]["predicted"]["by_frame"]
    distance = scores["distance_to_textures"]
    assert distance["predicted"]["by_frame"][0] == distance["reconstructed"]["by_frame"][0]
    assert distance["predicted"]["by_frame"][1]["mean"] > distance["reconstructed"]["by_frame"][1]["mean"] + 500
    assert known[1]["mean"] < 0.9 and all(known[frame]["mean"] == 1 for frame in (0, 2, 3, 4))


def test_player_and_inventory_are_right_if_no_other_true_tile_is_nearer():
    """Two frames of context and two new ones; three looks of the player, two of one icon."""
    rng = np.random.default_rng(0)
    frames = np.zeros((1, 4, 64, 64, 3), np.uint8)
    looks = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    frames[0, :, 24:32, 32:40] = looks[[0, 1, 2, 0]]
    frames[0, 3, 48:56, 16:24] = 200
    near = frames[:, 2:].astype(np.float32) * 0.9
    turned = near.copy()
    turned[0, 0, 24:32, 32:40] = looks[1]
    scores = score_exact_tiles({"predicted": near, "repeated": turned}, frames, 2)
    assert scores["player"]["num_different"] == 3 and scores["inventory"]["num_different"] == 2
    assert scores["player"]["predicted"]["all"]["mean"] == scores["inventory"]["predicted"]["all"]["mean"] == 1
    assert [each["mean"] for each in scores["player"]["repeated"]["by_frame"]] == [0, 1]


def test_what_always_looks_the_same_says_nothing():
    frames = np.zeros((2, 4, 64, 64, 3), np.uint8)
    scores = score_exact_tiles({"predicted": frames[:, 2:].astype(np.float32)}, frames, 2)
    assert scores["player"]["predicted"]["all"] == {"mean": None, "half_width": None, "num_samples": 0}


# Made-up worlds


class Land:
    """A true world that is drawn as the rule says; -1 beyond a window is never reached in these tests."""

    def __init__(self, land, place):
        self.land, self.place = land, np.array(place)

    def view(self):
        x, y = self.place - PLAYER
        return self.land[x : x + COLUMNS, y : y + ROWS]

    def draw(self, actions):
        ahead = self.place + STEPS[actions[0]]
        self.place = ahead if self.land[tuple(ahead)] in WALKABLE else self.place
        return self.view()[None], np.zeros((1, COLUMNS, ROWS))


def patches(size=400) -> np.ndarray:
    """Grass with sand and, here and there, stones."""
    return np.random.default_rng(0).choice([GRASS, SAND, STONE], (size, size), p=[0.6, 0.3, 0.1])


def walk(walker, draw, first, num_frames):
    return walk_worlds([walker], first[None], np.array([[RIGHT, DO]]), draw, num_frames)


@pytest.fixture(scope="module")
def worlds():
    """By name: true land, grass, and a frozen picture, all walked by wanderers with the same seed."""
    land = Land(patches(), (200, 200))
    first = land.view().copy()
    draws = {
        "predicted": land.draw,
        "grass": lambda actions: (np.full((1, COLUMNS, ROWS), GRASS), np.zeros((1, COLUMNS, ROWS))),
        "frozen": lambda actions: (first[None], np.ones((1, COLUMNS, ROWS))),
    }
    return {name: walk(Wanderer(np.random.default_rng(0)), draw, first, 128) for name, draw in draws.items()}


def test_a_true_world_holds_and_those_that_only_seem_to_are_given_away(worlds, walks):
    true = worlds["predicted"][0]
    whole = [(true.tiles, np.append(true.actions, DO))] * 2
    scores = score_made_up_worlds(worlds, replace(walks, whole=whole))
    predicted, grass, frozen = (scores[name] for name in ("predicted", "grass", "frozen"))
    assert predicted["persistence"]["mean"] == predicted["returned"]["mean"] == 1
    assert predicted["moved"]["mean"] == scores["true"]["moved"]["mean"] < 1
    assert predicted["materials_distance"]["mean"] == scores["true"]["materials_distance"]["mean"] == 0
    assert [each["mean"] for each in grass["persistence_by_quarter"][1:]] == [1, 1, 1]
    assert grass["moved"]["mean"] == 1 > predicted["moved"]["mean"]
    assert grass["materials_distance"]["mean"] == pytest.approx(1 - scores["true"]["materials"]["grass"])
    assert frozen["persistence"]["mean"] < 0.7
    assert frozen["distance_to_textures"]["mean"] == scores["true"]["distance_to_textures"]["mean"] == 1


def test_materials_are_as_far_apart_as_their_shares():
    counts = np.array([[4, 0, 0], [0, 4, 0]])
    assert materials_distance(counts, counts).mean == 0
    assert materials_distance(counts, np.array([[0, 0, 3]])).mean == 1
    estimate = materials_distance(counts, np.array([[2, 2, 4]]))
    assert estimate.mean == pytest.approx(0.5) and estimate.num_samples == 2
    assert estimate.half_width == 0  # without either it is 0.75
    assert materials_distance(counts, np.zeros((1, 3), int)).mean == 1


@pytest.mark.parametrize("num_out", [2, 8])
def test_what_was_left_is_found_again_in_a_true_world_alone(num_out):
    land = Land(patches(), (200, 200))
    first = land.view().copy()
    draws = {
        "predicted": land.draw,
        "grass": lambda actions: (np.full((1, COLUMNS, ROWS), GRASS), np.zeros((1, COLUMNS, ROWS))),
        "frozen": lambda actions: (first[None], np.zeros((1, COLUMNS, ROWS))),
    }
    worlds = {
        name: walk(ThereAndBack(np.random.default_rng(3), num_out), draw, first, 2 * num_out)
        for name, draw in draws.items()
    }
    scores = score_returns(worlds)
    assert all(scores["predicted"][name]["mean"] == 1 for name in ("all_tiles", "left_view", "persistence"))
    assert scores["grass"]["left_view"]["mean"] < 0.9
    # A picture that does not change is perfect in the end, and shows on the way that it is none.
    assert scores["frozen"]["left_view"]["mean"] == 1 and scores["frozen"]["persistence"]["mean"] < 0.7


def test_tiles_that_left_the_view_are_told_by_the_way():
    """Two steps to the right and back: the two columns on the left were out of view."""
    first = np.full((COLUMNS, ROWS), GRASS)
    last = first.copy()
    last[0, 0] = SAND

    class Right:
        def next_action(self, world):
            return RIGHT if len(tiles) > 2 else LEFT

    tiles = [first, first, first, last]
    draw = lambda actions: (tiles.pop(0)[None], np.zeros((1, COLUMNS, ROWS)))  # noqa: E731
    scores = score_returns({"predicted": walk(Right(), draw, first, 4)})["predicted"]
    assert scores["left_view"]["mean"] == pytest.approx(1 - 1 / 12)
    assert scores["all_tiles"]["mean"] == pytest.approx(1 - 1 / 47)


# Walkers


def test_there_and_back_ends_where_it_began_and_never_turns_round_on_its_way_out():
    for seed in range(8):
        land = Land(patches(), (200, 200))
        walker = ThereAndBack(np.random.default_rng(seed), 12)
        actions = walk(walker, land.draw, land.view(), 24)[0].actions
        steps = np.array([STEPS[action] for action in actions])
        assert land.place.tolist() == [200, 200]
        assert np.array_equal(steps[12:], -steps[:12][::-1])
        assert not (steps[1:12] == -steps[:11]).all(1).any() or DO in actions


def test_walkers_who_are_walled_in_stand_still_and_nobody_walks_into_lava():
    for material in (STONE, LAVA):
        world = DrawnWorld(np.full((COLUMNS, ROWS), material), STEPS[DOWN])
        assert ThereAndBack(np.random.default_rng(0), 3).next_action(world) == DO
    assert Wanderer(np.random.default_rng(0)).next_action(world) == DO
    tiles = np.full((COLUMNS, ROWS), LAVA)
    tiles[PLAYER[0] + 1, PLAYER[1]] = SAND
    walker = Wanderer(np.random.default_rng(0))
    assert {walker.next_action(DrawnWorld(tiles, STEPS[DOWN])) for _ in range(50)} == {RIGHT}


# The whole protocol


def test_the_whole_protocol_gives_figures_for_json_and_for_people(dataset, protocol, pipe):
    done = []
    short = replace(protocol, num_context_frames=8, num_frames=5, return_steps=(1, 2))
    protocol = short.with_defaults_of(pipe)
    walks = load_walks(dataset, protocol)
    check_dataset(dataset, pipe, protocol)
    scores = measure_walks(pipe, walks, protocol, done.append)
    json.dumps(scores, allow_nan=False)
    assert set(scores["known"]["wandering"]["accuracy"]) >= {"known", "in view", "back", "new"}
    assert len(scores["known"]["ways_back"]["accuracy"]["known"]["predicted"]["by_frame"]) == 5
    assert set(scores["made_up"]) == {"predicted", "true", "grass", "frozen"} and set(scores["return"]) == {"1", "2"}
    assert sum(done) <= protocol.num_walks * protocol.num_parts
    shown = format_scores(scores)
    for text in (*SOURCES.values(), "8 frames of context; 1 steps a frame", "worlds of 3 frames", "left the view"):
        assert text in shown


def test_a_world_is_made_the_same_alone_and_beside_others(dataset, protocol, pipe):
    quick = replace(protocol, num_context_frames=2, num_frames=0, return_steps=()).with_defaults_of(pipe)
    walks = load_walks(dataset, quick)
    together, alone = (measure_walks(pipe, walks, replace(quick, batch_size=size)) for size in (3, 1))
    assert together["made_up"]["predicted"]["moved"] == alone["made_up"]["predicted"]["moved"]
    for made in (together, alone):
        assert set(made) == {"protocol", "made_up"}
    expected = together["made_up"]["predicted"]["distance_to_textures"]["mean"]
    assert alone["made_up"]["predicted"]["distance_to_textures"]["mean"] == pytest.approx(expected, rel=1e-4)


def test_two_processes_have_both_the_figures_of_one(dataset, protocol, pipe, monkeypatch):
    quick = replace(protocol, num_context_frames=2, num_frames=2, return_steps=(1,), batch_size=2).with_defaults_of(
        pipe
    )
    walks = load_walks(dataset, quick)
    expected = json.dumps(measure_walks(pipe, walks, quick))

    def measure(share):
        return json.dumps(measure_walks(pipe, walks, quick, share=share))

    assert in_threads(2, measure, monkeypatch) == [expected] * 2


class TheGame:
    """Has the part of a pipeline that makes worlds, and plays Crafter itself where a model would draw."""

    transformer = SimpleNamespace(config=SimpleNamespace(num_classes=None))

    def __init__(self, seed) -> None:
        self.start = CrafterWorld(seed, area=32)
        self.start.start()

    def start_session(self, *, video, actions, **settings):
        self.game = copy.deepcopy(self.start)
        for action in actions[0]:
            frame = self.step(action[None])
        assert torch.equal(frame, video[:, -1])
        return self

    def step(self, actions):
        return torch.from_numpy(self.game.act(actions.item()))[None].movedim(-1, 1).float() / 255


def test_the_game_itself_holds_and_everything_is_found_again(dataset, protocol):
    protocol = replace(protocol, first_context_frame=0, num_context_frames=8, num_frames=0, num_made_frames=40)
    protocol, dataset = replace(protocol, num_walks=1, return_steps=(6,)), dataset.select([1])
    scores = measure_walks(TheGame(dataset[0]["seed"]), load_walks(dataset, protocol), protocol)
    made, returned = scores["made_up"], scores["return"]["6"]["predicted"]
    assert made["predicted"]["persistence"]["mean"] > 0.999  # a tree is felled now and then
    assert made["predicted"]["moved"]["mean"] > 0.8 * made["true"]["moved"]["mean"]
    assert {name: returned[name]["mean"] for name in returned} == {"all_tiles": 1, "left_view": 1, "persistence": 1}
    assert made["predicted"]["distance_to_textures"]["mean"] < 100  # what is beyond the world has no texture


def test_each_part_can_be_left_out(dataset, protocol, pipe):
    nothing = replace(protocol, num_frames=0, num_made_frames=0, return_steps=()).with_defaults_of(pipe)
    walks = load_walks(dataset, nothing)
    assert walks.ways_back is None and nothing.num_parts == 0
    assert set(measure_walks(pipe, walks, nothing)) == {"protocol"}


# What is refused


@pytest.mark.parametrize("column", ["video", "actions", "pose", "tiles"])
def test_a_missing_column_is_named_before_anything_is_read(dataset, protocol, pipe, column):
    with pytest.raises(ValueError, match=f"no `{column}`"):
        check_dataset(dataset.remove_columns(column), pipe, protocol)


@pytest.mark.parametrize(("conditions", "named"), [({}, "no discrete"), ({"num_actions": 3}, "3 discrete")])
def test_a_model_of_other_actions_is_refused(dataset, protocol, conditions, named):
    with pytest.raises(ValueError, match=f"The model has {named} actions, but .* 5: move_left"):
        check_dataset(dataset, tiny_pipeline(tiny_transformer(**conditions)), protocol)


def test_a_model_of_whole_clips_walks_through_no_world(dataset, protocol):
    transformer = tiny_transformer(num_actions=5, action_shift=1, frame_causal=False)
    pipe = VideoDiTPipeline(transformer, tiny_pipeline().vae, tiny_pipeline().scheduler)
    with pytest.raises(ValueError, match="`num_made_frames` 0 and an empty `return_steps`"):
        check_dataset(dataset, pipe, protocol)
    check_dataset(dataset, pipe, replace(protocol, num_made_frames=0, return_steps=()))


def test_too_few_walks_are_refused(dataset, protocol):
    with pytest.raises(ValueError, match="`num_walks` is 4, but 3 of 3 recordings reach frame 101"):
        load_walks(dataset, replace(protocol, num_walks=4))
    with pytest.raises(ValueError, match="0 of 3 recordings reach frame 266"):
        load_walks(dataset, replace(protocol, num_frames=170))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tiles", [[[0] * 6] * 8] * 10, r"`tiles` has shape \(10, 8, 6\)"),
        ("tiles", [[[12] * 6] * 8] * 256, "numbers up to 12"),
        ("actions", [5] * 256, r"`actions` are \[5\]"),
    ],
)
def test_values_of_another_world_are_told_with_their_row(dataset, protocol, column, value, message):
    features = {"tiles": List(List(List(Value("int64")))), "actions": List(Value("int64"))}
    one = dataset.select([0]).remove_columns(column).add_column(column, [value], feature=features[column])
    with pytest.raises(ValueError, match=f"Trajectory 0.*{message}"):
        load_walks(one, replace(protocol, num_walks=1))


def test_frames_of_another_size_are_refused(dataset, protocol):
    half = [[Image().encode_example(image.resize((32, 32))) for image in dataset[0]["video"]]]
    one = dataset.select([0]).remove_columns("video").add_column("video", half, feature=List(Image()))
    with pytest.raises(ValueError, match=r"Trajectory 0.* has frames of \(32, 32\) pixels; tiles are read from 64x64"):
        load_walks(one, replace(protocol, num_walks=1))


@pytest.mark.parametrize("return_steps", [(0,), (2, 2), (-1, 4)])
def test_numbers_of_moves_that_are_none_are_refused(return_steps):
    with pytest.raises(ValueError, match="`return_steps`"):
        TilesProtocol(return_steps=return_steps)
