"""Speed on a GPU: new frames with and without the cache, with compiled blocks, and training steps.

python -m benchmarks.gpu --output docs/results/gpu.json    # all, about a minute
python -m benchmarks.gpu --parts frame --num_rounds 5      # one part
python -m benchmarks.gpu --smoke                           # the program alone, on any machine

Weights are random. Float32 is without TF32, as torch has it. `python -m benchmarks.report` shows the file as Markdown.

B batch, F frames, C latent channels, H/W latent height/width.
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusers_far import FARSession, FARTransformer3DModel
from diffusers_far.command_line import HelpWithDefaults
from diffusers_far.data.clips import ClipBatch
from diffusers_far.files import written_whole
from diffusers_far.training.clips import clip_loss
from diffusers_far.training.objective import ObjectiveDraw, TrainingObjective

from .measurement import Measurement, Row
from .models import (
    CONDITIONS,
    FAR_B,
    FAR_B_LONG,
    SEED,
    BenchmarkModel,
    Clip,
    frame_without_cache,
    latent_pipeline,
    start_session,
)
from .studies.flops import FORWARD_AND_BACKWARD, forward_flops
from .table import ScreenTable
from .timing import describe_machine, time_in_turn


TOLERANCE = 1e-3  # of a frame in float32, with the cache and without; its values are of about unit size


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        frame_places (`tuple`): Models, and the frames of the context that a new frame is made after.
        num_steps (`int`): Denoising steps of a frame.
        batch_size (`int`): Videos, where many are made at once.
        training_places (`tuple`): Models, frames of a clip, and clips of a step.
        product_size (`int`): Side of the matrices whose product is what the device can do.
        compile_backend (`str`): Of `torch.compile`.
    """

    frame_places: tuple[tuple[BenchmarkModel, int], ...]
    num_steps: int
    batch_size: int
    training_places: tuple[tuple[BenchmarkModel, int, int], ...]
    product_size: int
    compile_backend: str


FULL = Sizes(
    frame_places=((FAR_B, 64), (FAR_B_LONG, 256)),
    num_steps=50,
    batch_size=16,
    training_places=((FAR_B, 16, 32), (FAR_B_LONG, 300, 16)),
    product_size=8192,
    compile_backend="inductor",
)
TINY_CONFIG = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 1, "short_window": 3, **CONDITIONS}
TINY = BenchmarkModel("tiny", TINY_CONFIG, latent_size=4)
TINY_LONG = BenchmarkModel("tiny-long", {**TINY_CONFIG, "long_patch_size": 2}, latent_size=4)
SMOKE = Sizes(
    frame_places=((TINY, 4), (TINY_LONG, 5)),
    num_steps=2,
    batch_size=2,
    training_places=((TINY, 3, 2), (TINY_LONG, 5, 2)),
    product_size=64,
    compile_backend="eager",
)


class DeviceBenchmark:
    """Measures on one device.

    Args:
        device (`torch.device`).
        sizes (`Sizes`).
        num_rounds (`int`): Timed runs of each rival.
    """

    def __init__(self, device: torch.device, sizes: Sizes, num_rounds: int) -> None:
        self.device, self.sizes, self.num_rounds = device, sizes, num_rounds

    def frame(self, model: BenchmarkModel, num_context: int) -> Row:
        """A frame with the cache in bfloat16, beside the same without it, in float32, and many videos at once."""
        full = self.build(model)
        half = copy.deepcopy(full).bfloat16()
        clip = self.clip(model, num_context + 1)
        many = stacked(clip, self.sizes.batch_size)
        sessions = {
            "bfloat16": self.session(half, clip),
            "float32": self.session(full, clip),
            "many": self.session(half, many),
        }
        frames = {name: self.frame_of(session, many if name == "many" else clip) for name, session in sessions.items()}
        frames["no cache"] = self.synchronized(partial(self.frame_without_cache, half, clip))
        made = {name: frame().float() for name, frame in frames.items()}
        error = (made["bfloat16"] - made["float32"]).norm() / made["float32"].norm()
        exact = self.frame_without_cache(full, clip)
        difference = require_same(made["float32"], exact, f"a frame of {model.name}")
        rewinds = {name: self.synchronized(partial(session.rewind, 1)) for name, session in sessions.items()}
        timings = time_in_turn(frames, self.num_rounds, rewinds, is_warm=True)
        peaks = {}
        if self.has_peaks:
            rewinds["bfloat16"]()
            held = sessions["bfloat16"].num_bytes
            peaks["peak"] = self.peak_above(frames["bfloat16"], self.bytes_of(half) + held)
            peaks["peak without"] = self.peak_above(frames["no cache"], self.bytes_of(half))
        many_speed = per_second(self.sizes.batch_size, timings["many"], "frames/s")
        return Row(
            case="gpu_frame",
            settings={"model": model.name, "context": num_context, "steps": self.sizes.num_steps},
            measurements={
                "with cache": timings["bfloat16"],
                "without": timings["no cache"],
                "without / with": timings["no cache"].per(timings["bfloat16"]),
                "float32": timings["float32"],
                "float32 / bfloat16": timings["float32"].per(timings["bfloat16"]),
                f"frames/s of {self.sizes.batch_size} videos": many_speed,
                **peaks,
                "error of bfloat16": Measurement((error.item(),), "error"),
                "difference": difference,
            },
        )

    def compiled(self, model: BenchmarkModel, num_context: int) -> Row:
        """The same frame in bfloat16 with compiled blocks, beside the blocks as they are."""
        torch._dynamo.reset()
        plain = self.build(model).bfloat16()
        compiled = copy.deepcopy(plain)
        clip = self.clip(model, num_context + 1)
        sessions = {"eager": self.session(plain, clip), "compiled": self.session(compiled, clip)}
        # Only now: the context was written at once, in a pass of a shape that never comes again.
        compiled.compile_repeated_blocks(dynamic=True, backend=self.sizes.compile_backend)
        frames = {name: self.frame_of(session, clip) for name, session in sessions.items()}
        made = {name: frame().float() for name, frame in frames.items()}
        error = (made["compiled"] - made["eager"]).norm() / made["eager"].norm()
        rewinds = {name: self.synchronized(partial(session.rewind, 1)) for name, session in sessions.items()}
        timings = time_in_turn(frames, self.num_rounds, rewinds)
        return Row(
            case="gpu_compiled",
            settings={"model": model.name, "context": num_context, "steps": self.sizes.num_steps},
            measurements={
                **timings,
                "eager / compiled": timings["eager"].per(timings["compiled"]),
                "difference": Measurement((error.item(),), "error"),
            },
            notes={"backend": self.sizes.compile_backend},
        )

    def training(self, model: BenchmarkModel, num_frames: int, num_clips: int) -> Row:
        """A training step under autocast to bfloat16, beside a product of large matrices."""
        transformer = self.build(model).train()
        clip, size = self.clip(model, num_frames), model.latent_size
        plan = transformer.context_plan(num_frames, size, size)
        generator = torch.Generator().manual_seed(SEED)
        draws = [
            TrainingObjective().draw(num_frames, plan.num_long_frames, clip.latents.shape[2:], generator)
            for _ in range(num_clips)
        ]
        clips = stacked(clip, num_clips)
        clips = ClipBatch(clips.latents, clips.actions, None)
        draw = ObjectiveDraw.stack(draws).to(self.device)
        optimizer = torch.optim.AdamW(transformer.parameters(), fused=self.device.type == "cuda")

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = clip_loss(transformer, transformer.config, clips, draw)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        num_flops = FORWARD_AND_BACKWARD * num_clips * forward_flops(transformer, plan)
        product = MatrixProduct(self.sizes.product_size, self.device)
        timings = time_in_turn(
            {"step": self.synchronized(step), "product": self.synchronized(product)}, self.num_rounds
        )
        speed, limit = (
            per_second(flops / 1e12, timings[name], "TFLOP/s")
            for name, flops in (("step", num_flops), ("product", product.num_flops))
        )
        peaks = {"peak": self.peak_above(step, self.bytes_of(transformer, optimizer))} if self.has_peaks else {}
        return Row(
            case="gpu_training",
            settings={"model": model.name, "frames": num_frames, "clips": num_clips},
            measurements={
                "step": timings["step"],
                "frames/s": per_second(num_frames * num_clips, timings["step"], "frames/s"),
                "achieved": speed,
                "matrix product": limit,
                "of the product": speed.per(limit, "share"),
                **peaks,
            },
            notes={"arithmetic of a step, GFLOP": num_flops / 1e9, "side of the matrices": self.sizes.product_size},
        )

    @property
    def has_peaks(self) -> bool:
        return self.device.type == "cuda"

    def build(self, model: BenchmarkModel) -> FARTransformer3DModel:
        with self.device:
            return model.build()

    def clip(self, model: BenchmarkModel, num_frames: int) -> Clip:
        return mapped(model.clip(num_frames), lambda tensor: tensor.to(self.device))

    def session(self, transformer: FARTransformer3DModel, clip: Clip) -> FARSession:
        """A session that is about to make the last frame of a clip."""
        session = start_session(latent_pipeline(transformer), clip)
        session.set_config(num_inference_steps=self.sizes.num_steps)
        return session

    def frame_of(self, session: FARSession, clip: Clip) -> Callable[[], torch.Tensor]:
        return self.synchronized(partial(session.advance, clip.actions[:, -2], noise=clip.noise[:, -1:]))

    def frame_without_cache(self, transformer: FARTransformer3DModel, clip: Clip) -> torch.Tensor:
        return frame_without_cache(latent_pipeline(transformer), clip, self.sizes.num_steps)

    def synchronized(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A run that returns when the device is done."""

        def run_and_wait() -> Any:
            result = run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return result

        return run_and_wait

    def peak_above(self, run: Callable[[], Any], num_held_bytes: int) -> Measurement:
        """The most memory of a run, which works with `num_held_bytes`; whatever else is held does not count."""
        num_bytes = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        num_new_bytes = torch.cuda.max_memory_allocated(self.device) - num_bytes
        return Measurement((num_held_bytes + num_new_bytes,), "bytes")

    def bytes_of(self, transformer: FARTransformer3DModel, optimizer: torch.optim.Optimizer | None = None) -> int:
        tensors = list(transformer.parameters())
        if optimizer is not None:
            tensors += [value for state in optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in tensors)


class MatrixProduct:
    """Products of two square matrices in bfloat16: what a device can do where nothing holds it up."""

    NUM_PRODUCTS = 10

    def __init__(self, size: int, device: torch.device) -> None:
        self.matrices = [torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2)]
        self.num_flops = self.NUM_PRODUCTS * 2 * size**3

    def __call__(self) -> None:
        for _ in range(self.NUM_PRODUCTS):
            torch.matmul(*self.matrices)


def mapped(clip: Clip, change: Callable[[torch.Tensor], torch.Tensor]) -> Clip:
    return replace(clip, **{name: change(tensor) for name, tensor in vars(clip).items()})


def stacked(clip: Clip, num_clips: int) -> Clip:
    """The same clip `num_clips` times."""
    return mapped(clip, lambda tensor: tensor.repeat(num_clips, *[1] * (tensor.ndim - 1)))


def per_second(amount: float, seconds: Measurement, unit: str) -> Measurement:
    return Measurement(tuple(amount / value for value in seconds.values), unit)


def require_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> Measurement:
    difference = (actual - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"With the cache and without, {what} differs by {difference}; at most {TOLERANCE} is right."
        )
    return Measurement((difference,), "difference")


def tasks_of(benchmark: DeviceBenchmark) -> dict[str, dict[str, Callable[[], Row]]]:
    """What is measured, by part and by name of the model; what is most likely to be waited for in vain comes last."""
    sizes = benchmark.sizes
    return {
        "frame": {place[0].name: partial(benchmark.frame, *place) for place in sizes.frame_places},
        "training": {place[0].name: partial(benchmark.training, *place) for place in sizes.training_places},
        "compiled": {place[0].name: partial(benchmark.compiled, *place) for place in sizes.frame_places},
    }


PARTS = ("frame", "training", "compiled")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="All by default.")
    parser.add_argument("--num_rounds", type=int, default=3, help="Timed runs of each rival, in turn.")
    parser.add_argument("--smoke", action="store_true", help="A tiny model on any device, to try the program.")
    parser.add_argument("--output", type=Path, help="JSON file, written after every row; must not exist.")
    args = parser.parse_args(arguments)
    if args.num_rounds < 2:
        parser.error(f"--num_rounds is {args.num_rounds}; a spread needs 2 runs at least.")
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; name another file, or move it away.")
    return args


def describe_gpu(device: torch.device) -> dict[str, str | None]:
    if device.type != "cuda":
        return {"name": "no GPU", "memory": "none", "cuda": None, "cudnn": None}
    memory = torch.cuda.get_device_properties(device).total_memory
    return {
        "name": torch.cuda.get_device_name(device),
        "memory": f"{memory / 2**30:.0f} GiB",
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }


def measure(
    tasks: Mapping[str, Mapping[str, Callable[[], Row]]], results: dict[str, Any], output: Path | None
) -> list[str]:
    """Run tasks, show their rows and write them as they come.

    Returns:
        What failed, and why; the others do not suffer from it.
    """
    table, failures = ScreenTable(), []
    for part, places in tasks.items():
        for name, task in places.items():
            print(f"{part} of {name} ...", flush=True)
            try:
                row = task()
            except RuntimeError as error:  # out of memory, no compiler, a result that is wrong
                failures.append(f"{part} of {name}: {error}")
                print(failures[-1], flush=True)
                continue
            finally:
                torch.cuda.empty_cache()  # does nothing without a GPU
            table.print(row)
            results["rows"].append(row.to_json())
            if output is not None:
                with written_whole(output) as unfinished:
                    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    return failures


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available() and not args.smoke:
        raise SystemExit(
            "Torch finds no CUDA device here; run this on a machine with an NVIDIA GPU and a build of torch for CUDA, or try "
            "the program with --smoke."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMOKE if args.smoke else FULL
    tasks = tasks_of(DeviceBenchmark(device, sizes, args.num_rounds))
    results = {
        "machine": describe_machine(),
        "gpu": describe_gpu(device),
        "is_smoke": args.smoke,
        "seed": SEED,
        "num_rounds": args.num_rounds,
        "rows": [],
    }
    failures = measure({part: tasks[part] for part in args.parts}, results, args.output)
    if failures:
        raise SystemExit("Not measured:\n" + "\n".join(failures))


if __name__ == "__main__":
    main(parse_args())
