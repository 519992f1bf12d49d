"""What a frame costs: the frame before it is written to the cache, its conditions are computed, then it is denoised, at several
lengths of context, in many steps or as a flow map in few.

Of the paper's sizes the parts are timed in turn, and a frame is their sum: write + conditions of all steps + steps x step. The
context is not computed: the cache is filled with random keys, which take as long to read as others. At the shortest context
a session makes a true frame, to be compared with the sum, and with what comes out without a cache and of the naive reference.

A world that is shipped is small, so of it true frames are timed, as a player waits for them: `session.step`, the VAE included.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from diffusers_far import FARPipeline
from diffusers_far.models.codec import spatial_compression
from diffusers_far.models.frames import CLEAN_TIMESTEP, FrameBatch, blank_tensors

from ..anyflow import AnyFlowStep
from ..checks import require_close
from ..limit import Limit, denoising_pass, writing_pass
from ..measurement import Measurement, Row
from ..memory import in_fresh_process
from ..models import FLOW_MAPS, BenchmarkModel, Clip, frame_without_cache, latent_pipeline, start_session
from ..naive import NaiveCache, NaiveFAR, NaiveKeys, denoise, position_ids
from ..timing import MAX_LONG_ROUNDS, time_in_turn
from .step import FARStep, NaiveStep


FRAME_COUNTS = (16, 64, 256, 1000)  # of the context
STEP_COUNTS = (50, 4, 2, 1)
CHECKED_STEPS = 4
MOST_RIVAL_TOKENS = 20_000  # of so many the naive mask takes 3 GB in whole numbers alone
WORLDS = [Path(__file__).parents[2] / "checkpoints" / name for name in ("far-crafter", "far-maze")]

Key = tuple[str, str, str | int]  # a model, who runs it, and what: "write", "step", or conditions of so many steps


def run(
    num_rounds: int,
    models: tuple[BenchmarkModel, ...] = FLOW_MAPS,
    frame_counts: tuple[int, ...] = FRAME_COUNTS,
    step_counts: tuple[int, ...] = STEP_COUNTS,
    pipeline: Path | None = None,
) -> Iterator[Row]:
    """Yield what a frame costs, for each number of frames (2 at least) and model; then how rivals compare, and what was
    checked; then of the world in the folder `pipeline`, by default the first of `WORLDS` that is there.

    Raises:
        RuntimeError: A frame is not what it is without a cache, or by the naive reference.
    """
    num_rounds, rows = min(num_rounds, MAX_LONG_ROUNDS), []
    for num_frames in frame_counts:
        is_checked = num_frames == min(frame_counts)
        rows += in_fresh_process(measure, models, num_frames, step_counts, num_rounds, is_checked)
    world = pipeline or next(filter(Path.is_dir, WORLDS))
    rows += in_fresh_process(measure_world, world, frame_counts, step_counts, num_rounds)
    tables = list(dict.fromkeys(tuple(row.cells) for row in rows))
    yield from sorted(rows, key=lambda row: tables.index(tuple(row.cells)))


def measure(
    models: tuple[BenchmarkModel, ...],
    num_frames: int,
    step_counts: tuple[int, ...],
    num_rounds: int,
    is_checked: bool,
) -> list[Row]:
    """The frame after `num_frames` others, of all models in turn."""
    places = [Place(model, num_frames, step_counts, is_checked) for model in models]
    rivals = dict(chain(*(place.rivals.items() for place in places)))
    prepare = dict(chain(*(place.prepare.items() for place in places)))
    timings = time_in_turn(rivals, num_rounds, prepare)
    return [row for place in places for row in place.rows(timings, places[0])]


class Place:
    """A model behind a context of some frames.

    Args:
        model (`BenchmarkModel`), num_frames (`int`), step_counts (`tuple[int, ...]`).
        is_checked (`bool`): True frames are made too, and compared.

    Attributes:
        rivals, prepare (`dict`): What is timed, and what it needs before each run.
    """

    def __init__(self, model: BenchmarkModel, num_frames: int, step_counts: tuple[int, ...], is_checked: bool):
        self.model, self.num_frames, self.step_counts = model, num_frames, step_counts
        transformer, clip, size = model.build(), model.clip(num_frames + 1), model.latent_size
        self.far = far = FARFrame(transformer, clip)
        write = writing_pass(transformer, num_frames - 1, num_frames, size)
        step = denoising_pass(transformer, num_frames + 1, size)
        self.prepare: dict[Key, Callable] = {self.key("FAR", "write"): far.unwrite}
        self.rivals: dict[Key, Callable] = {
            self.key("FAR", "write"): far.write,
            **{
                self.key("FAR", number): partial(far.make_conditions, number)
                for number in (*step_counts, CHECKED_STEPS)
            },
            self.key("FAR", "step"): far,
            self.key("limit", "write"): Limit(transformer, [write]),
            self.key("limit", "step"): Limit(transformer, [step]),
        }
        num_tokens = transformer.context_plan(num_frames + 1, size, size).num_tokens
        self.has_rivals = not transformer.is_separable and num_tokens <= MOST_RIVAL_TOKENS
        if self.has_rivals:
            naive = NaiveFrame(transformer, clip)
            self.rivals |= {self.key("naive", "write"): naive.write, self.key("naive", "step"): naive}
            self.rivals[self.key("AnyFlow", "step")] = AnyFlowStep(transformer, clip)
        self.difference = None
        if is_checked:
            frame = SessionFrame(latent_pipeline(transformer), clip)
            self.difference = frame.compare(model.name, NaiveFAR(transformer) if self.has_rivals else None)
            self.rivals[self.key("session", "frame")] = partial(frame, CHECKED_STEPS)
            self.prepare[self.key("session", "frame")] = frame.go_back

    def key(self, who: str, what: str | int) -> Key:
        return self.model.name, who, what

    def seconds(self, timings: dict[Key, Measurement], who: str, num_steps: int) -> Measurement:
        """Of a frame, the sum of its parts."""
        times = {"write": 1, num_steps: 1, "step": num_steps}
        parts = [(timings.get(self.key(who, what)), number) for what, number in times.items()]
        return Measurement.total([(part, number) for part, number in parts if part is not None])

    def rows(self, timings: dict[Key, Measurement], first: "Place") -> Iterator[Row]:
        """What a frame costs; how rivals compare; whether it was right."""
        settings = {"model": self.model.name, "context": self.num_frames}
        frames = {number: self.seconds(timings, "FAR", number) for number in self.step_counts}
        ends = (self.step_counts[0], self.step_counts[-1])
        costs = {what: timings[self.key("FAR", what)] for what in ("write", "step")}
        costs |= {show_steps(number): frame for number, frame in frames.items()}
        for number in ends:
            limit = self.seconds(timings, "limit", number)
            costs[f"of the limit, {show_steps(number)}"] = limit.per(frames[number], "share")
        of_first = frames[ends[0]].per(first.seconds(timings, "FAR", ends[0]), "share")
        costs[f"of {first.model.name}, {show_steps(ends[0])}"] = of_first
        yield Row("frame", settings, costs | {"cache": self.far.num_bytes, "a frame adds": self.far.num_added_bytes})

        if self.has_rivals:
            rivals = {}
            for who in ("naive", "AnyFlow"):
                seconds = {number: self.seconds(timings, who, number) for number in ends}
                rivals[f"{who}, {show_steps(ends[0])}"] = seconds[ends[0]]
                rivals |= {
                    f"{who} / FAR, {show_steps(number)}": each.per(frames[number]) for number, each in seconds.items()
                }
            yield Row("frame", settings, rivals)
        if self.difference is not None:
            whole, parts = timings[self.key("session", "frame")], self.seconds(timings, "FAR", CHECKED_STEPS)
            checks = {"whole": whole, "parts": parts, "whole / parts": whole.per(parts), "difference": self.difference}
            yield Row("frame", settings | {"steps": CHECKED_STEPS}, checks)


def show_steps(num_steps: int) -> str:
    return f"{num_steps} steps" if num_steps > 1 else "1 step"


class FARFrame(FARStep):
    """The parts of the last frame of a clip, called for one of its steps. What is cached is random."""

    def _fill_cache(self) -> None:
        clock = self.kv_cache.outline([self.kv_cache.max_frames - 1]).state()[1]
        form = self.kv_cache.state_form(clock)
        # Those of one layer in all of them, each in memory of its own.
        random = {name: torch.randn(form[name][0][1:]).expand(form[name][0]) for name in ("keys", "values")}
        self.kv_cache.restore(blank_tensors(form, "cpu") | random, clock)

    def unwrite(self) -> None:
        """Take the last clean frame out of the cache."""
        window = FrameBatch(self.clip.latents[:, :-2], self.clip.fed_actions[:, :-2])
        self.kv_cache.rewind(self.kv_cache.num_frames - 1, window)

    @torch.no_grad()
    def write(self) -> None:
        """The frame before the last."""
        ahead = {"next_action": self.clip.fed_actions[:, -1]} if self.transformer.is_separable else {}
        conditions = {"actions": self.clip.fed_actions[:, -2:-1], **ahead}
        latents = self.clip.latents[:, -2:-1]
        self.transformer(latents, CLEAN_TIMESTEP, kv_cache=self.kv_cache, update_cache=True, **conditions)

    def make_conditions(self, num_steps: int) -> None:
        """Of all steps of a flow map."""
        timesteps = torch.linspace(1000, 0, num_steps + 1)
        self.transformer.frame_modulations(self.noisy, timesteps[:-1], r_timesteps=timesteps[1:])

    @property
    def num_bytes(self) -> Measurement:
        return Measurement((self.kv_cache.num_bytes,), "bytes")

    @property
    def num_added_bytes(self) -> Measurement:
        """By which the cache grows with each frame."""
        larger = self.kv_cache.outline([], self.kv_cache.max_frames + 1)
        return Measurement((larger.num_bytes - self.kv_cache.num_bytes,), "bytes")


class NaiveFrame(NaiveStep):
    """The same by the naive reference; all but the frame that is written is random."""

    def _fill_cache(self) -> None:
        latents, config = self.clip.latents[:, :-2], self.naive.config
        num_frames = latents.shape[1]
        plan = self.naive.context_plan(num_frames + 1, *latents.shape[-2:]).segment(0, num_frames)
        shape = (1, config.num_attention_heads, plan.num_tokens, config.attention_head_dim)
        layers = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_layers)]
        short = slice(plan.num_long_frames, num_frames)
        actions = self.clip.fed_actions[:, short]
        self.before = NaiveCache(
            NaiveKeys(layers, position_ids(plan)), plan.num_long_frames, latents[:, short], actions
        )
        self.cache = self.write()

    def write(self) -> NaiveCache:
        """The frame before the last."""
        return self.naive.write(self.clip.latents[:, -2:-1], self.clip.fed_actions[:, -2:-1], self.before)


class SessionFrame:
    """A session that makes the last frame of a clip, again and again; all frames before the last two are written. Where the
    window is encoded anew every few frames only, it makes so many.

    Args:
        pipe (`FARPipeline`), clip (`Clip`).
        settings: Of the session.
    """

    def __init__(self, pipe: FARPipeline, clip: Clip, **settings):
        self.pipe, self.clip = pipe, clip
        self.start = start_session(pipe, clip, **settings)
        self.num_frames = self.start.config.cache_options.rebuild_interval
        self.go_back()

    def go_back(self) -> None:
        """To the start, with room for the frames, which a cache seldom has to make."""
        self.session = self.start.fork()
        self.session.rollout.kv_cache.make_room(self.num_frames)

    def __call__(self, num_steps: int) -> None:
        """The frames, from where the session has gone back to."""
        self.session.set_config(num_inference_steps=num_steps)
        for _ in range(self.num_frames):
            self.session.step(self.clip.actions[:, -2])

    def compare(self, name: str, naive: NaiveFAR | None) -> Measurement:
        """A frame in a few steps, with one that is made without a cache, and with the naive reference's, where there is one."""
        clip, what = self.clip, f"a frame of {name} after {self.clip.latents.shape[1] - 1} others"
        self.go_back()
        self.session.set_config(num_inference_steps=CHECKED_STEPS)
        actions = {"action": clip.actions[:, -2], "own_action": clip.actions[:, -1]}
        made = self.session.advance(**actions, noise=clip.noise[:, -1:])
        uncached = frame_without_cache(self.pipe, clip, CHECKED_STEPS)
        differences = require_close(made, uncached, f"{what}, without a cache").values
        if naive is not None:
            cache = naive.write(clip.latents[:, :-1], clip.fed_actions[:, :-1])
            step = partial(naive.step, actions=clip.fed_actions[:, -1:], cache=cache)
            naively = denoise(step, clip.noise[:, -1:], CHECKED_STEPS)
            differences += require_close(made, naively[:, 0], what).values
        return Measurement((max(differences),), "difference")


def measure_world(
    folder: Path, frame_counts: tuple[int, ...], step_counts: tuple[int, ...], num_rounds: int
) -> list[Row]:
    """True frames of a pipeline, in as many steps as it is shipped with, too.

    Raises:
        ValueError: It has no discrete actions, or no square size of its own.
    """
    pipe = FARPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    height, width, num_actions = pipe.config.height, pipe.config.width, pipe.transformer.config.num_actions
    if num_actions is None or height is None or height != width:
        raise ValueError(
            f"{folder} has `num_actions` {num_actions}, `height` {height} and `width` {width}, but the world must take "
            "discrete actions and be square; name another with --pipeline."
        )
    model = BenchmarkModel(folder.name, pipe.transformer.config, height // spatial_compression(pipe.vae))
    rows, first = [], model.clip(min(frame_counts) + 1)
    for num_frames in frame_counts:
        clip = model.clip(num_frames + 1)
        frame = SessionFrame(pipe, clip, output_type="pt")
        numbers = sorted({*step_counts, pipe.default_inference_steps}, reverse=True)
        runs = {show_steps(number): partial(frame, number) for number in numbers}
        decode = partial(pipe.decode_frame, clip.latents[:, -1], "pt")
        timings = time_in_turn({**runs, "VAE": decode}, num_rounds, dict.fromkeys(runs, frame.go_back))
        for name in runs:
            timings[name] = Measurement(tuple(each / frame.num_frames for each in timings[name].values), "s")
        own = show_steps(pipe.default_inference_steps)
        speed = Measurement(tuple(1 / seconds for seconds in timings[own].values), "frames/s")
        cache = Measurement((frame.start.rollout.num_bytes,), "bytes")
        settings = {"model": model.name, "context": num_frames}
        rows.append(Row("frame", settings, timings | {f"frames/s, {own}": speed, "cache": cache}))
    difference = SessionFrame(pipe, first, short_cache="exact").compare(model.name, None)
    return [*rows, Row("frame", {"model": model.name, "context": min(frame_counts)}, {"difference": difference})]
