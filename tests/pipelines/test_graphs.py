"""Graphs of a pipeline: played as a page plays them, they draw the pipeline's own frames."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import base_and_long, tiny_pipeline, tiny_transformer

from diffusers_far import FlexRoPEConfig, SCDTransformer3DModel
from diffusers_far.pipelines.graphs import check_graphs, export_graph, frame_graphs


ACTIONS = [0, 2, 1, 1, 0, 2, 2, 0]


def pipeline_of(long_patch_size: int | None, **config):
    transformer = tiny_transformer(long_patch_size=long_patch_size, num_actions=3, action_shift=1, **config)
    return tiny_pipeline(transformer, height=16, width=16, num_inference_steps=2)


class Player:
    """Plays the graphs as the page does: it holds keys and values frame by frame, and hands them in layer by layer."""

    def __init__(self, pipe, graphs: dict[str, Callable]):
        config = pipe.transformer.config
        self.graphs, self.frames, self.long, self.short = graphs, [], [], []
        self.null_action = config.num_actions
        self.window = float("inf") if config.long_patch_size is None else config.short_window
        self.empty = (2 * config.num_layers, config.num_attention_heads, 0, config.attention_head_dim)

    def step(self, noise: torch.Tensor, action: int | None = None) -> torch.Tensor:
        if self.frames:
            self.write(*self.frames[-1])
        action = torch.tensor([[self.null_action if action is None else action]])
        (latents,) = self.graphs["denoise"](noise, action, *self.context())
        self.frames.append((latents, action))
        return self.graphs["decode"](latents)[0]

    def write(self, latents: torch.Tensor, action: torch.Tensor) -> None:
        if len(self.short) + 2 <= self.window:
            (short,) = self.graphs["write"](latents, action, *self.context())
        else:
            oldest_latents, oldest_action = self.frames[len(self.long)]
            self.short.pop(0)
            frames = torch.cat([oldest_latents, latents], dim=1), torch.cat([oldest_action, action], dim=1)
            long, short = self.graphs["roll"](*frames, *self.context())
            self.long.append(long)
        self.short.append(short)

    def context(self) -> list[list[torch.Tensor]]:
        layers = [torch.cat([torch.empty(self.empty), *blocks], dim=2) for blocks in (self.long, self.short)]
        long, short = ([part[None] for part in each] for each in layers)
        return [long if self.window < float("inf") else [], short]


def as_returned(run: Callable) -> Callable:
    """Outputs as a tuple, as a graph gives them."""

    @torch.no_grad()
    def call(*inputs):
        outputs = run(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def played(pipe, graphs: dict[str, Callable]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of the graphs and of a session, from nothing, of the same noise."""
    player, session = Player(pipe, graphs), pipe.start_session(short_cache="rolling", output_type="pt")
    made, expected = [], []
    for number, action in enumerate([None, *ACTIONS]):
        noise = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(number))
        made.append(player.step(noise, action))
        latents = session.advance(None if action is None else torch.tensor([action]), noise=noise)
        expected.append(session.decode(latents, "pt"))
    return torch.cat(made), torch.cat(expected)


@base_and_long
def test_the_graphs_modules_draw_the_frames_of_a_session(long_patch_size):
    pipe = pipeline_of(long_patch_size)
    graphs = {name: as_returned(module) for name, (module, _) in frame_graphs(pipe).items()}
    made, expected = played(pipe, graphs)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


def test_the_latents_of_a_picture_are_the_pipelines():
    pipe = pipeline_of(None)
    module, (picture,) = frame_graphs(pipe)["encode"]
    session = pipe.start_session(video=picture[None])
    torch.testing.assert_close(module(picture), session.latents, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda pipe: pipe.register_to_config(guidance_scale=2.0), "`guidance_scale` is 2.0"),
        (lambda pipe: pipe.register_to_config(height=None), "knows no size"),
        (lambda pipe: pipe.enable_flex_rope(FlexRoPEConfig(slope=0.1, trained_frames=4)), "FlexRoPE"),
        (lambda pipe: pipe.transformer.register_to_config(action_shift=0), "`action_shift` 0"),
        (lambda pipe: pipe.transformer.register_to_config(num_actions=None), "`num_actions` is None"),
        (lambda pipe: setattr(pipe, "transformer", SCDTransformer3DModel.__new__(SCDTransformer3DModel)), "SCD"),
    ],
)
def test_a_pipeline_whose_graphs_would_draw_other_frames_is_refused(change, words):
    pipe = pipeline_of(None)
    change(pipe)
    with pytest.raises(ValueError, match="cannot become graphs") as refusal:
        check_graphs(pipe)
    assert words in str(refusal.value)


@pytest.mark.full
def test_exported_graphs_draw_the_frames_of_a_session(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `web` is not installed")

    def running(name: str, module: torch.nn.Module, inputs: tuple) -> Callable:
        path = tmp_path / f"{name}.onnx"
        export_graph(module, inputs, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(*given):
            flat = [each for part in given for each in (part if isinstance(part, list) else [part])]
            feeds = {input.name: each.numpy() for input, each in zip(session.get_inputs(), flat, strict=True)}
            return tuple(torch.from_numpy(output) for output in session.run(None, feeds))

        return run

    pipe = pipeline_of(2, num_layers=1)
    graphs = {name: running(name, *each) for name, each in frame_graphs(pipe).items()}
    made, expected = played(pipe, graphs)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)
