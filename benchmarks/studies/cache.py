"""The study of cached rollouts: seconds of whole videos with every kind of cache, and what the cheaper ones cost in quality.

The shipped model is timed, and for a cache without long frames the same network without them.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_far import FARPipeline
from diffusers_far.files import written_whole

from .analysis import select
from .data import DataFolder
from .identity import keep_settings
from .measure import measure
from .predictors import PipelinePredictor, checkpoint_hash
from .scripts import ROOT
from .settings import CacheMode, CacheSettings, Method
from .walks import HeldOutWalks


WARM_UP_FRAMES = 2


@dataclass(frozen=True)
class CacheStudy:
    """The study in its work folder; a rollout that is timed is not timed again.

    Args:
        settings ([`CacheSettings`]): What it is.
        data ([`DataFolder`]): For the quality.
        path (`Path`): Its work folder.
        known (sequence of `dict`): Records of an earlier run; those of this very model are not made again.
    """

    settings: CacheSettings
    data: DataFolder
    path: Path
    known: Sequence[dict] = ()

    def run(self) -> list[dict]:
        """Measure the quality that is left to measure.

        Returns:
            A record for each cached mode of the long model, as of [`Study.run`], with the mode as `variant`.
        """
        self.data.require(self.data.mazes, self.data.latents)
        keep_settings(self.settings, self.path)
        pipeline = checkpoint_hash(self.settings.model)
        records = select(self.known, pipeline=pipeline)
        modes = {name: mode for name, mode in self.settings.modes.items() if mode.is_long and mode.use_cache}
        for name, mode in modes.items():
            if select(records, variant=name):
                continue
            file = self.path / pipeline / f"quality-{name}.json"
            if not file.exists():
                print(f"{self.settings.name}: quality of {mode.label}", flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(file) as unfinished:
                    unfinished.write_text(json.dumps(self._measure_quality(mode)))
            facts = {
                "variant": name,
                "seed": 0,
                "share": 1,
                "task": "quality",
                "method": "plain",
                "pipeline": pipeline,
            }
            records.append({**facts, **json.loads(file.read_text())})
        return records

    def timings(self) -> list[dict]:
        """Time what is left to time, all modes in turn, so that the machine's noise hits all alike.

        Returns:
            A `dict` for each mode and length: `mode`, `num_frames`, `seconds` of each round.
        """
        keep_settings(self.settings, self.path)
        pipes = {True: load_long_model(ROOT / self.settings.model)}
        pipes[False] = without_long_frames(pipes[True])
        for file, mode, num_frames in self._rounds():
            if not file.exists():
                print(f"{self.settings.name}: {mode.label}, {num_frames} frames", flush=True)
                self._roll_out(pipes[mode.is_long], mode, min(WARM_UP_FRAMES, num_frames))
                start = time.perf_counter()
                self._roll_out(pipes[mode.is_long], mode, num_frames)
                with written_whole(file) as unfinished:
                    unfinished.write_text(json.dumps(time.perf_counter() - start))
        return [
            {"mode": name, "num_frames": num_frames, "seconds": self._seconds(name, num_frames)}
            for name in self.settings.modes
            for num_frames in self.settings.num_frames
        ]

    def _rounds(self) -> Iterator[tuple[Path, CacheMode, int]]:
        for number in range(self.settings.num_rounds):
            for num_frames in self.settings.num_frames:
                for name, mode in self.settings.modes.items():
                    yield self._file(name, num_frames, number), mode, num_frames

    def _file(self, name: str, num_frames: int, number: int) -> Path:
        return self.path / f"seconds-{name}-{num_frames}-{number}.json"

    def _seconds(self, name: str, num_frames: int) -> list[float]:
        rounds = range(self.settings.num_rounds)
        return [round(json.loads(self._file(name, num_frames, number).read_text()), 4) for number in rounds]

    def _measure_quality(self, mode: CacheMode) -> dict:
        evaluation = self.settings.evaluation
        walks = HeldOutWalks(self.data.mazes, self.data.latents, evaluation)
        predictor = PipelinePredictor(load_long_model(ROOT / self.settings.model), mode.short_cache)
        return measure(predictor, walks, self.settings.task, Method("plain"), evaluation)

    def _roll_out(self, pipe: FARPipeline, mode: CacheMode, num_frames: int) -> None:
        """One video from nothing, in latents."""
        pipe(
            actions=torch.zeros(1, num_frames, dtype=torch.int64),
            num_frames=num_frames,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=1.0,
            use_cache=mode.use_cache,
            short_cache=mode.short_cache,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )


def load_long_model(path: Path) -> FARPipeline:
    """A pipeline whose model has long frames.

    Raises:
        ValueError: It has none.
    """
    pipe = FARPipeline.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    if pipe.transformer.config.long_patch_size is None:
        raise ValueError(f"`model` {str(path)!r} has no long frames, so nothing can be compared; name another.")
    return pipe


def without_long_frames(pipe: FARPipeline) -> FARPipeline:
    """The same network, every frame of it short: as many products a token, and so a fair rival in time, but not one that
    was trained so."""
    transformer = type(pipe.transformer).from_config(pipe.transformer.config, long_patch_size=None)
    weights = pipe.transformer.state_dict()
    transformer.load_state_dict({name: weights[name] for name in transformer.state_dict()})
    short = FARPipeline(
        transformer.to(pipe.device).eval(),
        pipe.vae,
        pipe.scheduler,
        height=pipe.config.height,
        width=pipe.config.width,
    )
    short.set_progress_bar_config(disable=True)
    return short
