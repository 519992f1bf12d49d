"""Tiny models with random weights, random inputs for them, and spies; shared by the tests of models and pipelines.

B batch, F frames, C latent channels, H/W latent height/width.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, VQModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_far import FARPipeline, FARTransformer3DModel, SCDTransformer3DModel
from diffusers_far.models import frame_network


torch.set_num_threads(1)  # tensors this small are slower on more

property_test = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
base_and_long = pytest.mark.parametrize("long_patch_size", [None, 2], ids=["base", "long"])


def tiny_transformer(seed: int = 0, **overrides) -> FARTransformer3DModel:
    """A transformer whose weights are all random: as initialised, modulations, gates and output would be zero, and so
    would be everything that a test compares."""
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "short_window": 3,
    }
    return randomize(FARTransformer3DModel(**{**config, **overrides}), seed).eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter, so that each one matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "embedding_table" in name or "label_embedder" in name or "null_embedding" in name:
                parameter.copy_(values)
            elif parameter.ndim > 1:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            elif ".norm_" in name:
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(0.3 * values)
    return model


@dataclass(frozen=True)
class Clip:
    """Inputs of a transformer: latents (B, F, C, H, W), timesteps (B, F) and the conditions that it takes."""

    latents: torch.Tensor
    timestep: torch.Tensor
    actions: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None

    @property
    def num_frames(self) -> int:
        return self.latents.shape[1]

    def frames(self, first_frame: int, end_frame: int) -> "Clip":
        window = slice(first_frame, end_frame)
        actions = None if self.actions is None else self.actions[:, window]
        return replace(self, latents=self.latents[:, window], timestep=self.timestep[:, window], actions=actions)

    def sample(self, index: int) -> "Clip":
        """One clip of the batch."""
        tensors = (self.latents, self.timestep, self.actions, self.class_labels)
        return Clip(*(None if tensor is None else tensor[index : index + 1] for tensor in tensors))

    def clean_but_last(self) -> "Clip":
        timestep = torch.full_like(self.timestep, -1)
        timestep[:, -1] = self.timestep[:, -1]
        return replace(self, timestep=timestep)


def random_clip(
    model: FARTransformer3DModel, num_frames: int, height: int = 4, width: int = 6, batch_size: int = 2, seed: int = 0
) -> Clip:
    """Random inputs of the kind that `model` takes, every frame at a noise level of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_frames)
    latents = torch.randn(*shape, model.config.in_channels, height, width, generator=generator)
    timestep = torch.randint(1, 1001, shape, generator=generator).float()
    actions, class_labels = None, None
    if model.config.num_actions is not None:
        actions = torch.randint(0, model.config.num_actions, shape, generator=generator)
    if model.config.action_dim is not None:
        actions = torch.randn(*shape, model.config.action_dim, generator=generator)
    if model.config.num_classes is not None:
        class_labels = torch.randint(0, model.config.num_classes, (batch_size,), generator=generator)
    return Clip(latents, timestep, actions, class_labels)


@torch.no_grad()
def predict(model: FARTransformer3DModel, clip: Clip, **kwargs) -> torch.Tensor:
    """Velocity of a clip, of its short frames."""
    return model(clip.latents, clip.timestep, actions=clip.actions, class_labels=clip.class_labels, **kwargs).sample


def predict_cached(model: FARTransformer3DModel, clip: Clip, chunks: list[int] | None = None, **cache) -> torch.Tensor:
    """Velocity of the clip's last frame against a cache of the frames before it, written in `chunks`, by default one
    by one."""
    kv_cache = fill_cache(model, clip.frames(0, clip.num_frames - 1), chunks, **cache)
    return predict(model, clip.frames(clip.num_frames - 1, clip.num_frames), kv_cache=kv_cache)


def fill_cache(model: FARTransformer3DModel, context: Clip, chunks: list[int] | None = None, **cache):
    """A cache that holds `context`, with room for a noisy frame. Its memory starts as NaN: what is read before it is
    written shows."""
    batch_size, num_frames, _, height, width = context.latents.shape
    kv_cache = model.init_kv_cache(batch_size, height, width, **{"max_frames": num_frames + 1, **cache})
    kv_cache._key_stores.fill_(float("nan"))
    kv_cache._value_stores.fill_(float("nan"))
    first_frame = 0
    for num_written in chunks or [1] * num_frames:
        written = context.frames(first_frame, first_frame + num_written)
        with torch.no_grad():
            model(
                written.latents,
                -1,
                actions=written.actions,
                class_labels=written.class_labels,
                kv_cache=kv_cache,
                update_cache=True,
            )
        first_frame += num_written
    assert first_frame == num_frames
    return kv_cache


def sharpened(model: FARTransformer3DModel) -> FARTransformer3DModel:
    """The model with sharp attention, where errors in positions show: logits four times as large."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn.norm_" in name:
                parameter.mul_(2)
    return model


def half_precision_error(model: FARTransformer3DModel, clip: Clip, frame: int, prepare=lambda model: model) -> float:
    """Error of the model in bfloat16 when it denoises one frame of the clip against a cache of the frames before it,
    relative to the same weights and inputs in float32; `prepare` sees both models."""
    half = copy.deepcopy(model).bfloat16()
    exact = prepare(copy.deepcopy(half).float())
    half = prepare(half)
    halved = replace(clip.frames(0, frame + 1), latents=clip.latents[:, : frame + 1].bfloat16())
    expected = predict_cached(exact, replace(halved, latents=halved.latents.float()), chunks=[frame])
    error = predict_cached(half, halved, chunks=[frame]).float() - expected
    return (error.norm() / expected.norm()).item()


def tensors_of(*values) -> list[torch.Tensor]:
    """Copies of all tensors in nested arguments, to compare them with later."""
    copies = []
    for value in values:
        if isinstance(value, torch.Tensor):
            copies.append(value.clone())
        elif isinstance(value, dict):
            copies.extend(tensors_of(*value.values()))
        elif isinstance(value, (list, tuple)):
            copies.extend(tensors_of(*value))
    return copies


def tiny_dc() -> AutoencoderDC:
    """4 times smaller latents, as `tiny_transformer` takes them."""
    torch.manual_seed(0)
    shared = {"block_out_channels": (8, 8, 16), "layers_per_block": (0, 1, 1), "qkv_multiscales": ((), (), ())}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shared.items()}
    return AutoencoderDC(latent_channels=4, scaling_factor=0.5, **sides).eval()


def tiny_kl() -> AutoencoderKL:
    """2 times smaller latents."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.7,
        shift_factor=0.1,
    ).eval()


def tiny_taesd() -> AutoencoderTiny:
    """2 times smaller latents."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def tiny_pipeline(transformer: FARTransformer3DModel | None = None, vae=None, scheduler=None, **kwargs) -> FARPipeline:
    """A quiet pipeline; 2 pixels per latent by default."""
    pipe = FARPipeline(
        transformer or tiny_transformer(),
        vae or tiny_taesd(),
        scheduler or FlowMatchEulerDiscreteScheduler(),
        **kwargs,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class spy_attention:
    """Records what every call of `dispatch_attention_fn` in the FAR attention is given, as `(query, key, value, mask)`."""

    def __enter__(self) -> list[tuple]:
        calls = []
        dispatch = frame_network.dispatch_attention_fn

        def record(query, key, value, attn_mask=None, **kwargs):
            calls.append((query, key, value, attn_mask))
            return dispatch(query, key, value, attn_mask=attn_mask, **kwargs)

        self._patch = patch.object(frame_network, "dispatch_attention_fn", record)
        self._patch.start()
        return calls

    def __exit__(self, *exception):
        self._patch.stop()


@contextmanager
def using_backend(model: FARTransformer3DModel, backend: str):
    """Sets an attention backend for a while; diffusers keeps the last one as the default of all other models too."""
    default, _ = _AttentionBackendRegistry.get_active_backend()
    model.set_attention_backend(backend)
    try:
        yield
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(default)


def compiled_rollout(num_frames: int, prepare=lambda model: model, **config) -> tuple[list[int], float]:
    """A cached rollout with compiled blocks, beside the same one with plain blocks. The keys grow with the video, so the
    blocks are compiled for dynamic shapes from the start.

    Returns:
        How many times a block was compiled until the end of each frame, and the largest difference.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    models = [prepare(tiny_transformer(**config)) for _ in range(2)]
    models[0].compile_repeated_blocks(dynamic=True, backend=counter)
    clip = random_clip(models[0], num_frames, 4, 4, batch_size=1)
    kv_caches = [model.init_kv_cache(1, 4, 4, num_frames) for model in models]
    counts, error = [], 0.0
    for frame in range(num_frames):
        noisy = clip.frames(frame, frame + 1)
        compiled, plain = (predict(model, noisy, kv_cache=cache) for model, cache in zip(models, kv_caches))
        error = max(error, (compiled - plain).abs().max().item())
        for model, kv_cache in zip(models, kv_caches):
            if frame + 1 < num_frames:
                predict(model, replace(noisy, timestep=-1), kv_cache=kv_cache, update_cache=True)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts, error


# Model configurations for property tests: base or long, patches, window, conditions.
CONDITIONS = ({}, {"num_actions": 3}, {"action_dim": 2}, {"num_classes": 3}, {"num_actions": 3, "num_classes": 2})


@st.composite
def model_configs(draw, is_long: bool | None = None) -> dict:
    patch_size = draw(st.sampled_from([1, 2]))
    config = {
        "patch_size": patch_size,
        "short_window": draw(st.integers(1, 4)),
        "num_layers": draw(st.integers(1, 3)),
        **draw(st.sampled_from(CONDITIONS)),
    }
    if is_long or (is_long is None and draw(st.booleans())):
        config["long_patch_size"] = patch_size * draw(st.sampled_from([1, 2, 3]))
    return config


@st.composite
def models_with_clips(draw, is_long: bool | None = None, min_frames: int = 1, max_frames: int = 8):
    """A random model with a random clip for it: any plan, any latent size that its patches divide."""
    seed = draw(st.integers(0, 2**16))
    model = tiny_transformer(seed, **draw(model_configs(is_long)))
    unit = model.config.long_patch_size or model.config.patch_size
    clip = random_clip(
        model,
        draw(st.integers(min_frames, max_frames)),
        unit * draw(st.integers(1, 3)),
        unit * draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        seed,
    )
    return model, clip


def tiny_vq() -> VQModel:
    """2 times smaller, 16 codes."""
    torch.manual_seed(0)
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )
    # As initialised all entries lie so close together that one of them is the nearest to everything.
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    return vq.eval()


def tiny_separable(seed: int = 0, **overrides) -> SCDTransformer3DModel:
    """A separable transformer of the sizes of `tiny_transformer`."""
    config = {
        "in_channels": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "short_window": 3,
    }
    return randomize(SCDTransformer3DModel(**{**config, **overrides}), seed).eval()
