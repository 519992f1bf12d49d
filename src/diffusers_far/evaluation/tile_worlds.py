"""The protocol of worlds of tiles: does a model draw what it can know, and do the worlds that it makes up hold?

Frames are those of Crafter, see `tiles`. What is measured of the model is measured of something cheap beside it: a picture
that is repeated, a world of nothing but grass, the recordings themselves. A figure says little without these.

B walks, F frames; tiles are material numbers of shape (F, 8, 6).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset

from ..data.clips import ClipBatch
from ..data.video_clips import VideoClips
from ..data.workers import Share
from ..pipelines import FARPipeline
from .metrics import Estimate, frame_psnr
from .protocols import TilesProtocol
from .tiles import (
    ACTION_NAMES,
    BACK,
    BACK_EASY,
    COLUMNS,
    DO,
    IN_VIEW,
    MATERIALS,
    NEW,
    NEW_EASY,
    NOT_SCORED,
    PLAYER,
    ROWS,
    STEPS,
    TILE_SIZE,
    DrawnWorld,
    ThereAndBack,
    Wanderer,
    cut_tiles,
    follow_world,
    label_tiles,
    load_textures,
    read_tiles,
)
from .world_model import Predictions, cut_walks, long_enough, predict_walks, require_columns


# Which labels a figure is over.
LABELS = {
    "known": (IN_VIEW, BACK, BACK_EASY),
    **{label: (label,) for label in (IN_VIEW, BACK, BACK_EASY, NEW, NEW_EASY)},
}
SOURCES = {"predicted": "FAR", "repeated": "last frame repeated", "reconstructed": "VAE (the ceiling)"}
WORLDS = {"predicted": "FAR", "true": "recordings", "grass": "all grass", "frozen": "frozen"}
MADE_UP_FIGURES = {
    "persistence": ("persistence, %", 100),
    "returned": ("returned, %", 100),
    "moved": ("moved, %", 100),
    "materials_distance": ("materials, % from the recordings'", 100),
    "distance_to_textures": ("squared distance to textures", 1),
}
RETURN_FIGURES = {"all_tiles": "all", "left_view": "left the view", "persistence": "persistence"}
GRASS = MATERIALS.index("grass")
BEYOND = MATERIALS.index("stone")  # the nearest texture to the grey beyond the world
FACING = STEPS.index((0, 1))  # at the start of a world, down
NOT_PLAYER = np.ones((COLUMNS, ROWS), bool)
NOT_PLAYER[PLAYER] = False


@dataclass(frozen=True)
class TileWalks:
    """Stretches of recordings, of one length.

    Args:
        clips (`ClipBatch`): Frames, actions and poses of B stretches.
        tiles (`np.ndarray` of shape `(B, F, 8, 6)`): What is in view; -1 beyond the world.
    """

    clips: ClipBatch
    tiles: np.ndarray


@dataclass(frozen=True)
class TileRecordings:
    """What the protocol is measured on.

    Args:
        wandering ([`TileWalks`]): The same frames of every recording, whatever the walker does there.
        ways_back ([`TileWalks`], *optional*): Of the recordings that go back over known ground, that stretch.
        whole (sequence of pairs of `np.ndarray`): Tiles and actions of every recording.
    """

    wandering: TileWalks
    ways_back: TileWalks | None
    whole: Sequence[tuple[np.ndarray, np.ndarray]]


def check_dataset(dataset: Dataset, pipe: FARPipeline, protocol: TilesProtocol) -> None:
    """Refuse what the protocol cannot work with, before anything is read or predicted.

    Raises:
        ValueError: A column is missing, or the model does not take the actions.
    """
    config = pipe.transformer.config
    reasons = {"video": "frames are compared", "actions": "walks have actions", "pose": "walks are followed"}
    reasons |= {"tiles": "tiles are compared", "label": "the model takes classes" if config.num_classes else None}
    require_columns(dataset, reasons)
    if config.num_actions != len(ACTION_NAMES):
        raise ValueError(
            f"The model has {config.num_actions or 'no'} discrete actions, but in a world of tiles there are "
            f"{len(ACTION_NAMES)}: {', '.join(ACTION_NAMES)}; evaluate a model that was trained on these."
        )
    if not pipe.is_frame_causal and (protocol.num_made_frames or protocol.return_steps):
        raise ValueError(
            "The model makes whole clips, but a made-up world is walked frame by frame; give `num_made_frames` 0 and an "
            "empty `return_steps`."
        )


def load_walks(dataset: Dataset, protocol: TilesProtocol) -> TileRecordings:
    """Cut the protocol's stretches from the first recordings that are long enough.

    Args:
        dataset (`datasets.Dataset`): As `examples/make_crafter_dataset.py` writes it.
        protocol ([`TilesProtocol`]).

    Raises:
        ValueError: Too few recordings that are long enough, or values that are not those of a world of tiles.
    """
    clips = VideoClips(dataset, conditions=("actions", "pose", "label"))
    rows = long_enough(clips, protocol)
    size = COLUMNS * TILE_SIZE
    if clips.frames(rows[0], 0, 1).shape[-2:] != (size, size):
        raise ValueError(
            f"{clips.name(rows[0])} has frames of {tuple(clips.frames(rows[0], 0, 1).shape[-2:])} pixels; tiles are read "
            f"from {size}x{size}: record the dataset with make_crafter_dataset.py."
        )
    tiles = dict(zip(rows, map(np.array, dataset.select_columns(["tiles"]).select(rows)["tiles"])))
    actions = {row: np.array(clips.trajectory(row).actions) for row in rows}
    for row in rows:
        shape = (int(clips.num_frames[row]), COLUMNS, ROWS)
        if tiles[row].shape != shape or tiles[row].max() >= len(MATERIALS):
            raise ValueError(
                f"{clips.name(row)}: `tiles` has shape {tiles[row].shape} and numbers up to {tiles[row].max()}; it needs "
                f"shape {shape} and numbers below {len(MATERIALS)}."
            )
        if not set(actions[row].tolist()) <= set(range(len(ACTION_NAMES))):
            raise ValueError(
                f"{clips.name(row)}: `actions` are {sorted(set(actions[row].tolist()))}; they must be below "
                f"{len(ACTION_NAMES)}: {', '.join(ACTION_NAMES)}."
            )
    num_frames = protocol.num_context_frames + protocol.num_frames

    def cut(starts: dict[int, int]) -> TileWalks | None:
        if not starts:
            return None
        stretches = [tiles[row][start : start + num_frames] for row, start in starts.items()]
        return TileWalks(cut_walks(clips, starts, num_frames), np.stack(stretches))

    starts = {row: find_way_back(np.array(clips.trajectory(row).pose), protocol) for row in rows}
    return TileRecordings(
        wandering=cut(dict.fromkeys(rows, protocol.first_context_frame)),
        ways_back=cut({row: start for row, start in starts.items() if start is not None}),
        whole=[(tiles[row], actions[row]) for row in rows],
    )


def find_way_back(pose: np.ndarray, protocol: TilesProtocol) -> int | None:
    """The first context frame of the stretch of a walk whose new frames all stand on places of its context: of several the
    one that leads to most places, and of these the first. `None` if there is none; `pose` has shape `(F, 3)`."""
    num_context, num_frames = protocol.num_context_frames, protocol.num_frames
    places = [tuple(place) for place in pose[:, :2].tolist()]
    lengths = {}
    for start in range(len(places) - num_context - num_frames + 1 if num_frames else 0):
        new = set(places[start + num_context : start + num_context + num_frames])
        if new <= set(places[start : start + num_context]) and len(new) >= protocol.way_back_share * num_frames:
            lengths[start] = len(new)
    return max(lengths, key=lengths.get, default=None)


def measure_walks(
    pipe: FARPipeline,
    walks: TileRecordings,
    protocol: TilesProtocol,
    on_batch_end: Callable[[int], object] = lambda num_walks: None,
    share: Share = Share(),
) -> dict:
    """The protocol's figures, ready for JSON: estimates with 95% intervals over walks. `on_batch_end` is told how many
    recordings are done since the last time, in each part. Of several processes each does its `share` of every part, and has
    the figures in the end.

    Returns:
        `dict` with the settings; `known`, see [`score_known_tiles`], of stretches of `wandering` and of `ways_back`;
        `made_up`, see [`score_made_up_worlds`]; and `return`, see [`score_returns`]: of the parts that are asked for.
    """
    scores: dict = {"protocol": asdict(protocol)}
    if protocol.num_frames:
        scores["known"] = {}
        for name in ("wandering", "ways_back"):
            stretches = getattr(walks, name)
            if stretches is not None:
                predictions = predict_walks(pipe, stretches.clips, protocol.continuation, on_batch_end, share)
                scores["known"][name] = score_known_tiles(predictions, stretches, protocol)
    if protocol.num_made_frames:
        made = make_worlds(pipe, walks.wandering, protocol, Wanderer, protocol.num_made_frames, on_batch_end, share)
        scores["made_up"] = score_made_up_worlds(made, walks)
    if protocol.return_steps:
        scores["return"] = {}
        for num_out in protocol.return_steps:
            walker = partial(ThereAndBack, num_out=num_out)
            made = make_worlds(pipe, walks.wandering, protocol, walker, 2 * num_out, on_batch_end, share)
            scores["return"][str(num_out)] = score_returns(made)
    return scores


# Known tiles


def score_known_tiles(predictions: Predictions, walks: TileWalks, protocol: TilesProtocol) -> dict:
    """How many tiles are drawn right, of those that could be known and of those that could not.

    Returns:
        `dict` with `num_walks`; `share_scored` by frame, of all tiles; `accuracy` by label, see [`label_tiles`], and for all
        "known" tiles together, with `share_of_tiles`, and for each source the accuracy of `all` frames and `by_frame`; `psnr`
        and `distance_to_textures` likewise; and `player` and `inventory`, see [`score_exact_tiles`]. Sources are the prediction, the last frame of the
        context repeated, and the VAE's reconstruction.
    """
    num_context, textures = protocol.num_context_frames, load_textures()
    clips, truth = walks.clips, walks.tiles[:, num_context:]
    of_walks = zip(clips.pose[..., :2].numpy(), walks.tiles, clips.actions.numpy())
    labels = np.stack([label_tiles(*walk, num_context) for walk in of_walks])
    frames = {name: _in_levels(getattr(predictions, name)) for name in SOURCES}  # (B, num_frames, h, w, 3)
    is_right, distance = {}, {}
    for name, made in frames.items():
        read, nearness = zip(*(read_tiles(video, textures) for video in made))
        is_right[name] = np.stack(read) == truth
        distance[name] = np.stack(nearness)[..., NOT_PLAYER].mean(-1)
    accuracy = {}
    for name, parts in LABELS.items():
        counts = np.isin(labels, parts)
        accuracy[name] = {"share_of_tiles": float(counts.mean())}
        for source, right in is_right.items():
            accuracy[name][source] = _over_walks(_mean_where(right, counts, 2), _mean_where(right, counts, 1))
    psnr = {name: frame_psnr(getattr(predictions, name), predictions.truth).numpy() for name in SOURCES}
    return {
        "num_walks": len(clips),
        "share_scored": (labels != NOT_SCORED).mean((0, 2, 3)).tolist(),
        "accuracy": accuracy,
        "psnr": {name: _over_walks(values, values.mean(1)) for name, values in psnr.items()},
        "distance_to_textures": {name: _over_walks(values, values.mean(1)) for name, values in distance.items()},
        **score_exact_tiles(frames, clips.frames.movedim(2, -1).numpy(), num_context),
    }


def score_exact_tiles(frames: dict[str, np.ndarray], true_frames: np.ndarray, num_context_frames: int) -> dict:
    """Whether the player's tile (which way it faces, on which ground) and the inventory (icons with digits) are drawn right.

    Such a tile is right if it is nearer to the true one than to all others that the true frames show at this place. Places
    that always look the same do not count.

    Args:
        frames (`dict` of `str` to `np.ndarray` of shape `(B, num_frames, 64, 64, 3)`): By source, in [0, 255].
        true_frames (`np.ndarray` of shape `(B, F, 64, 64, 3)`): Context and new frames.
        num_context_frames (`int`).

    Returns:
        `dict` with `player` and `inventory`: `num_different`, how many tiles there are to tell apart, at all places together;
        and for each source the share that is right, of `all` frames and `by_frame`.
    """
    inventory = [(column, row) for column in range(COLUMNS) for row in range(ROWS, COLUMNS)]
    scores = {}
    for name, places in {"player": [PLAYER], "inventory": inventory}.items():
        right, num_different = {source: [] for source in frames}, 0
        for place in places:
            shown = _tile_at(true_frames, place)  # (B, F, 192)
            bank, number = np.unique(shown.reshape(-1, shown.shape[-1]), axis=0, return_inverse=True)
            if len(bank) < 2:
                continue
            num_different += len(bank)
            true_number = number.reshape(shown.shape[:2])[:, num_context_frames:]
            for source, made in frames.items():
                drawn = torch.from_numpy(_tile_at(made, place)).float()
                nearest = torch.cdist(drawn, torch.from_numpy(bank).float()).argmin(-1).numpy()
                right[source].append(nearest == true_number)
        scores[name] = {"num_different": num_different}
        for source, of_places in right.items():
            of_frames = np.mean(of_places, axis=0) if of_places else np.full(frames[source].shape[:2], np.nan)
            scores[name][source] = _over_walks(of_frames, of_frames.mean(1))
    return scores


def _in_levels(video: torch.Tensor) -> np.ndarray:
    """Frames (..., 3, h, w) in [0, 1] to (..., h, w, 3) in [0, 255]."""
    return (video.movedim(-3, -1).float() * 255).cpu().numpy()


def _tile_at(frames: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """The pixels of one place: (B, F, 64, 64, 3) -> (B, F, 192)."""
    tiles = cut_tiles(frames.reshape(-1, *frames.shape[2:]))[(slice(None), *place)]
    return tiles.reshape(*frames.shape[:2], -1)


def _mean_where(values: np.ndarray, mask: np.ndarray, num_kept: int) -> np.ndarray:
    """Mean over the masked tiles, NaN where there are none, of everything but the first `num_kept` axes: (B, F, 8, 6) to
    (B,) or (B, F)."""
    axes = tuple(range(num_kept, values.ndim))
    with np.errstate(invalid="ignore"):
        return (values & mask).sum(axes) / mask.sum(axes)


def _over_walks(by_frame: np.ndarray, of_all: np.ndarray) -> dict:
    """Estimates from a value for each walk and frame, (B, F), and one for each walk, (B,)."""
    return {"all": Estimate.of(of_all).to_json(), "by_frame": [Estimate.of(each).to_json() for each in by_frame.T]}


# Made-up worlds


@dataclass(frozen=True)
class MadeWorld:
    """A world that was walked through, from the last frame of the context on. F new frames.

    Args:
        tiles (`np.ndarray` of shape `(F + 1, 8, 6)`): Material numbers, as they are read; the first frame is true.
        actions (`np.ndarray` of shape `(F,)`): Those that the walker took.
        distance (`np.ndarray` of shape `(F,)`): Mean squared difference of the tiles to the nearest textures.
    """

    tiles: np.ndarray
    actions: np.ndarray
    distance: np.ndarray


def make_worlds(
    pipe: FARPipeline,
    walks: TileWalks,
    protocol: TilesProtocol,
    new_walker: Callable[[np.random.Generator], Wanderer | ThereAndBack],
    num_frames: int,
    on_batch_end: Callable[[int], object] = lambda num_walks: None,
    share: Share = Share(),
) -> dict[str, list[MadeWorld]]:
    """Go on from the context of every walk, at the actions of a walker who sees only what was drawn.

    Recorded actions would not do: after a few frames nobody can know the land, and the walker would run into obstacles
    that the recorded one was spared.

    Returns:
        `dict` of the model's worlds ("predicted") and of two controls, walked by the same walkers: "grass", where nothing but
        grass is drawn, and "frozen", where the first frame stays.
    """
    num_context, textures = protocol.num_context_frames, load_textures()

    def make_batch(numbers: range) -> dict[str, list[MadeWorld]]:
        batch = walks.clips[numbers.start : numbers.stop]
        context_actions = batch.actions[:, : num_context - 1]
        first = read_tiles(batch.frames[:, num_context - 1].movedim(1, -1).numpy(), textures)
        session = pipe.start_session(
            video=batch.video[:, :num_context],
            actions=context_actions,
            class_labels=batch.labels if pipe.transformer.config.num_classes else None,
            **protocol.how_frames_are_made(),
            generator=protocol.noise_of(numbers),
            output_type="pt",
        )
        draws = {
            "predicted": lambda actions: read_tiles(_in_levels(session.step(actions)), textures),
            "grass": lambda actions: (np.full_like(first[0], GRASS), np.zeros_like(first[1])),
            "frozen": lambda actions: first,
        }
        worlds = {}
        for name, draw in draws.items():
            walkers = [new_walker(np.random.default_rng(protocol.seed + walk)) for walk in numbers]
            worlds[name] = walk_worlds(walkers, first[0], context_actions.numpy(), draw, num_frames)
        on_batch_end(len(numbers))
        return worlds

    of_batches = share.do(make_batch, protocol.batches(len(walks.clips)))
    return {name: [world for worlds in of_batches for world in worlds[name]] for name in of_batches[0]}


def walk_worlds(
    walkers: Sequence[Wanderer | ThereAndBack],
    first: np.ndarray,
    context_actions: np.ndarray,
    draw: Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray]],
    num_frames: int,
) -> list[MadeWorld]:
    """Walk through B worlds that are drawn as they are walked through.

    Args:
        walkers (sequence): One for each world.
        first (`np.ndarray` of shape `(B, 8, 6)`): What is in view at first.
        context_actions (`np.ndarray` of shape `(B, F)`): The actions before, which say where each player faces.
        draw (callable): From the actions `(B,)` to tiles and distances, `(B, 8, 6)` both; see [`read_tiles`].
        num_frames (`int`): New frames.
    """
    tiles, distances, actions = [first], [], []
    facing = [next((action for action in before[::-1] if action != DO), FACING) for before in context_actions]
    for _ in range(num_frames):
        seen = [DrawnWorld(view, STEPS[action]) for view, action in zip(tiles[-1], facing)]
        actions.append([walker.next_action(world) for walker, world in zip(walkers, seen)])
        facing = [before if action == DO else action for action, before in zip(actions[-1], facing)]
        new_tiles, distance = draw(torch.tensor(actions[-1]))
        tiles.append(new_tiles)
        distances.append(distance[:, NOT_PLAYER].mean(1))
    of_worlds = zip(np.stack(tiles, 1), np.array(actions).T, np.stack(distances, 1))
    return [MadeWorld(*world) for world in of_worlds]


def score_made_up_worlds(worlds: dict[str, list[MadeWorld]], walks: TileRecordings) -> dict:
    """How well made-up worlds hold, and whether they are worlds at all, beside the recordings.

    Returns:
        `dict` by world, those of [`make_worlds`] and the "true" recordings, of `dict` with `persistence`, and
        `persistence_by_quarter` of the frames; `returned`; `moved`, see [`WorldConsistency`]; `materials`, the share of each
        among the tiles that came in; `materials_distance`, the total variation distance of these shares from those of the
        recordings; and `distance_to_textures`, in squared levels. Of the recordings, the distance of materials is that of every
        second one from the others, and that to textures is that of the true frames from which the made-up worlds go on.
    """
    true_tiles = [np.where(tiles < 0, BEYOND, tiles) for tiles, _ in walks.whole]
    followed = {"true": [follow_world(tiles, actions) for tiles, (_, actions) in zip(true_tiles, walks.whole)]}
    followed |= {name: [follow_world(each.tiles, each.actions) for each in made] for name, made in worlds.items()}
    came_in = {name: np.array([world.came_in for world in found]) for name, found in followed.items()}
    scores = {}
    for name, found in followed.items():
        ours, theirs, drawn = came_in[name], came_in["true"], worlds.get(name, worlds["frozen"])
        if name == "true":
            ours, theirs = ours[::2], theirs[1::2]
        quarters = [np.array_split(world.persistence, 4) for world in found]
        scores[name] = {
            "persistence": Estimate.of([world.persistence.mean() for world in found]).to_json(),
            "persistence_by_quarter": [
                Estimate.of([quarter.mean() for quarter in each if len(quarter)]).to_json() for each in zip(*quarters)
            ],
            "returned": Estimate.of([_mean(world.returned) for world in found]).to_json(),
            "moved": Estimate.of([world.moved for world in found]).to_json(),
            "materials": dict(zip(MATERIALS, (came_in[name].sum(0) / max(came_in[name].sum(), 1)).tolist())),
            "materials_distance": materials_distance(ours, theirs).to_json(),
            "distance_to_textures": Estimate.of([each.distance.mean() for each in drawn]).to_json(),
        }
    return scores


def materials_distance(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Total variation distance between what came in, in [0, 1]; 1 where nothing did. The interval is the jackknife's over our
    worlds, as the distance of a single world would mostly be chance.

    Args:
        ours, theirs (`np.ndarray` of shape `(B, M)`): How many tiles of each material came in, by world.
    """

    def distance(counts: np.ndarray) -> float:
        if not counts.any() or not theirs.any():
            return 1.0
        return float(np.abs(counts.sum(0) / counts.sum() - theirs.sum(0) / theirs.sum()).sum() / 2)

    num_worlds = len(ours)
    without_one = [distance(np.delete(ours, world, axis=0)) for world in range(num_worlds)]
    half_width = 1.96 * (num_worlds - 1) ** 0.5 * np.std(without_one) if num_worlds > 1 else np.nan
    return Estimate(distance(ours), float(half_width), num_worlds)


def score_returns(worlds: dict[str, list[MadeWorld]]) -> dict:
    """Whether walkers who went out and came back by the same way, see [`ThereAndBack`], find what was there when they left.

    Returns:
        `dict` by world of `dict` with the shares of tiles of the last frame that are as in the first one: of `all_tiles` but the
        player's, and of those that `left_view` in between; and `persistence` on the way, without which a picture that never
        changes would be perfect.
    """
    scores = {}
    for name, made in worlds.items():
        all_tiles, left_view, persistence = [], [], []
        for world in made:
            is_right, was_in_view = world.tiles[-1] == world.tiles[0], np.ones_like(NOT_PLAYER)
            columns, rows = np.indices(NOT_PLAYER.shape)
            for x, y in np.cumsum([STEPS[action] for action in world.actions], axis=0):
                was_in_view &= (0 <= columns - x) & (columns - x < COLUMNS) & (0 <= rows - y) & (rows - y < ROWS)
            all_tiles.append(is_right[NOT_PLAYER].mean())
            left_view.append(_mean(is_right[NOT_PLAYER & ~was_in_view]))
            persistence.append(follow_world(world.tiles, world.actions).persistence.mean())
        figures = {"all_tiles": all_tiles, "left_view": left_view, "persistence": persistence}
        scores[name] = {figure: Estimate.of(values).to_json() for figure, values in figures.items()}
    return scores


def _mean(values: np.ndarray) -> float:
    """Without NaN; NaN of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


# For people


def format_scores(scores: dict) -> str:
    """The figures as tables."""
    protocol, tables = scores["protocol"], []
    made = "{num_inference_steps} steps a frame, guidance {guidance_scale}".format(**protocol)
    titles = {"wandering": "recordings go on", "ways_back": "recordings go back over known ground"}
    for name, known in scores.get("known", {}).items():
        title = f"{known['num_walks']} {titles[name]}: {protocol['num_context_frames']} frames of context; {made}"
        tables.append([title, *_known_rows(known, protocol["num_frames"])])
    if "ways_back" not in scores.get("known", {"ways_back": None}):
        tables.append(["No recording goes back over known ground."])
    if "made_up" in scores:
        title = f"Made-up worlds of {protocol['num_made_frames']} frames; {made}"
        tables.append([title, *_made_up_rows(scores["made_up"])])
    if "return" in scores:
        tables.append(
            [f"Tiles as they were after so many moves out and back, in %; {made}", *_return_rows(scores["return"])]
        )
    return "\n\n".join("\n".join(table) for table in tables)


def _row(title: str, values: Iterable) -> str:
    return f"{title:<38}" + "".join(f"{value:>15}" for value in values)


def _known_rows(known: dict, num_frames: int) -> list[str]:
    frames = sorted({2**power - 1 for power in range(num_frames.bit_length())} | {num_frames - 1})

    def rows(title: str, of_source: dict, factor: int = 100) -> list[str]:
        shown = {
            name: [of_source[name]["by_frame"][frame] for frame in frames] + [of_source[name]["all"]]
            for name in SOURCES
        }
        return [
            title,
            *(_row(f"  {SOURCES[name]}", [_show(each, factor) for each in shown[name]]) for name in SOURCES),
        ]

    lines = [_row("tiles right in %, by new frame", [*(frame + 1 for frame in frames), "all"])]
    lines.append(_row("share of tiles that are scored", [f"{known['share_scored'][frame]:.0%}" for frame in frames]))
    for label, of_label in known["accuracy"].items():
        if of_label["share_of_tiles"]:
            lines += rows(f"{label}, {of_label['share_of_tiles']:.1%} of all tiles", of_label)
    for name in ("player", "inventory"):
        lines += rows(f"{name}, told from {known[name]['num_different']} different tiles", known[name])
    lines += rows("PSNR in dB", known["psnr"], factor=1)
    return lines + rows("squared distance to textures", known["distance_to_textures"], factor=1)


def _made_up_rows(worlds: dict) -> list[str]:
    lines = [_row("", WORLDS.values())]
    for figure, (title, factor) in MADE_UP_FIGURES.items():
        lines.append(_row(title, [_show(worlds[name][figure], factor) for name in WORLDS]))
    for quarter in range(4):
        values = [worlds[name]["persistence_by_quarter"][quarter] for name in WORLDS]
        lines.append(_row(f"persistence in quarter {quarter + 1}, %", [_show(value) for value in values]))
    return lines


def _return_rows(returns: dict) -> list[str]:
    lines = [_row("moves out", returns)]
    for figure, title in RETURN_FIGURES.items():
        for name in returns[next(iter(returns))]:
            lines.append(_row(f"{title}, {WORLDS[name]}", [_show(each[name][figure]) for each in returns.values()]))
    return lines


def _show(estimate: dict, factor: int = 100) -> str:
    if estimate["mean"] is None:
        return "none"
    half_width = "" if estimate["half_width"] is None else f" ± {factor * estimate['half_width']:.1f}"
    return f"{factor * estimate['mean']:.1f}{half_width}"
