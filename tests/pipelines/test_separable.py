"""Separable models in the pipeline: calls, streams and sessions, guided by the condition or by the feature."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_models import tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far import FARPipeline, FARSession, FlexRoPEConfig


MODELS = {
    "base": {"num_actions": 3, "action_shift": 1},
    "long": {"num_actions": 3, "action_shift": 1, "long_patch_size": 2},
    "continuous": {"action_dim": 2, "action_shift": 1},
}
GUIDANCE = {
    "unguided": {},
    "condition": {"guidance_scale": 2.0},
    "feature": {"guidance_scale": 2.0, "guidance_mode": "feature"},
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
each_guidance = pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)


def pipeline(**config) -> FARPipeline:
    return tiny_pipeline(tiny_separable(**config))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context_of(pipe, num_context: int = 3, num_frames: int = 8, batch_size: int = 2) -> dict:
    """A context and actions, as arguments of a call that makes the frames after it."""
    config, generator = pipe.transformer.config, seeded(1)
    arguments = {"video_latents": torch.randn(batch_size, num_context, 4, 4, 6, generator=generator)}
    if config.num_actions:
        arguments["actions"] = torch.randint(3, (batch_size, num_frames), generator=generator)
    if config.action_dim:
        arguments["actions"] = torch.randn(batch_size, num_frames, config.action_dim, generator=generator)
    return arguments | {"num_frames": num_frames - num_context, "num_inference_steps": 2, "output_type": "latent"}


def session_of(pipe, arguments: dict, **options) -> FARSession:
    """A session with the context of a call."""
    known = arguments["video_latents"].shape[1] - 1
    actions = arguments["actions"][:, :known] if "actions" in arguments else None
    options = {"generator": seeded(), "num_inference_steps": 2, "output_type": "latent", **options}
    return pipe.start_session(video_latents=arguments["video_latents"], actions=actions, **options)


def steps(session: FARSession, arguments: dict, first: int, end: int) -> torch.Tensor:
    return torch.stack([session.step(arguments["actions"][:, frame - 1]) for frame in range(first, end)], dim=1)


@each_model
@each_guidance
def test_call_stream_and_session_make_the_same_frames(config, guidance):
    pipe = pipeline(**config)
    arguments = context_of(pipe)
    frames = pipe(**arguments, **guidance, generator=seeded()).frames
    streamed = torch.stack(list(pipe.stream(**arguments, **guidance, generator=seeded())), dim=1)
    assert torch.equal(frames, streamed)
    assert torch.equal(frames, steps(session_of(pipe, arguments, **guidance), arguments, 3, 8))


@each_model
@each_guidance
def test_frames_without_the_cache_are_the_same(config, guidance):
    pipe = pipeline(**config)
    cached, uncached = (
        pipe(**context_of(pipe), **guidance, generator=seeded(), use_cache=use_cache).frames
        for use_cache in (True, False)
    )
    assert torch.allclose(cached, uncached, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"num_classes": 2}, {"num_actions": 3}], ids=["nothing", "class", "action"])
def test_models_of_every_condition_continue_and_start_from_nothing(config):
    pipe = pipeline(**config)
    labels = {"class_labels": [0, 1]} if "num_classes" in config else {}
    arguments = context_of(pipe) | labels | {"guidance_scale": 2.0, "guidance_mode": "feature"}
    assert pipe(**arguments).frames.isfinite().all()
    del arguments["video_latents"]
    arguments |= {"height": 8, "width": 12, "num_frames": 8}
    cached = pipe(**arguments, generator=seeded()).frames
    assert torch.allclose(cached, pipe(**arguments, generator=seeded(), use_cache=False).frames, atol=1e-4)


@each_guidance
def test_a_video_with_its_own_generator_is_the_same_alone_as_in_a_batch(guidance):
    pipe = pipeline(**MODELS["base"])
    arguments = context_of(pipe) | guidance
    together = pipe(**arguments, generator=[seeded(1), seeded(2)]).frames
    alone = {name: arguments[name][1:] for name in ("video_latents", "actions")}
    assert torch.allclose(pipe(**{**arguments, **alone}, generator=[seeded(2)]).frames, together[1:], atol=1e-5)


@each_model
@each_guidance
def test_forked_rewound_and_saved_sessions_go_on_the_same(config, guidance, tmp_path):
    pipe = pipeline(**config)
    arguments = context_of(pipe)
    session = session_of(pipe, arguments, **guidance)
    steps(session, arguments, 3, 5)
    fork = session.fork()
    session.save(tmp_path / "session.safetensors")
    loaded = FARSession.load(pipe, tmp_path / "session.safetensors")
    assert loaded.config == session.config
    expected = steps(session, arguments, 5, 8)
    assert torch.equal(steps(fork, arguments, 5, 8), expected)
    assert torch.equal(steps(loaded, arguments, 5, 8), expected)
    for num_back in (1, 3):
        session.rewind(num_back)
        assert torch.allclose(steps(session, arguments, 8 - num_back, 8), expected[:, 3 - num_back :], atol=1e-5)


@pytest.mark.parametrize("config", [MODELS["base"], MODELS["long"]], ids=["base", "long"])
def test_a_step_that_failed_is_taken_again_with_another_action(config):
    pipe = pipeline(**config)
    arguments = context_of(pipe)
    session, other = session_of(pipe, arguments), session_of(pipe, arguments)
    steps(session, arguments, 3, 5), steps(other, arguments, 3, 5)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.advance(torch.tensor([0, 0]), on_step_end=fail)
    action = torch.tensor([2, 1])
    assert torch.allclose(session.step(action), other.step(action), atol=1e-5)


@each_guidance
def test_guidance_can_be_switched_on_and_off_in_a_session(guidance):
    pipe = pipeline(**MODELS["base"])
    arguments = context_of(pipe)
    mode = {name: value for name, value in guidance.items() if name == "guidance_mode"}
    session = session_of(pipe, arguments, **mode)
    steps(session, arguments, 3, 5)
    session.set_config(guidance_scale=2.0)
    guided = steps(session.fork(), arguments, 5, 6)
    whole = session_of(pipe, arguments, **mode, guidance_scale=2.0)
    assert guided.shape == (2, 1, 4, 4, 6) and whole.rollout.is_guided == session.rollout.is_guided
    session.set_config(guidance_scale=1.0)
    unguided = steps(session, arguments, 5, 6)
    assert not torch.allclose(guided, unguided, atol=1e-4)


def test_guidance_by_the_feature_needs_no_second_cache():
    pipe = pipeline(**MODELS["base"])
    arguments = context_of(pipe)
    sessions = [session_of(pipe, arguments, **GUIDANCE[name]) for name in ("unguided", "condition", "feature")]
    plain, by_condition, by_feature = (session.rollout.num_bytes for session in sessions)
    assert by_condition == 2 * plain and by_feature == plain


@each_model
def test_flex_rope_decays_in_the_encoder_cached_as_uncached(config):
    pipe = pipeline(**config)
    arguments = context_of(pipe) | {"generator": seeded()}
    plain = pipe(**arguments).frames
    pipe.enable_flex_rope(FlexRoPEConfig(0.5, "constant"))
    decayed = [pipe(**arguments | {"generator": seeded()}, use_cache=use_cache).frames for use_cache in (True, False)]
    assert torch.allclose(*decayed, atol=1e-4) and not torch.allclose(decayed[0], plain, atol=1e-3)


@pytest.mark.parametrize("options", [{"short_cache": "rolling"}, {"short_cache": 2}, {"max_long_frames": 3}], ids=str)
def test_sessions_of_cheaper_and_bounded_caches_go_on_and_back(options):
    pipe = pipeline(**MODELS["long"])
    arguments = context_of(pipe, num_frames=14)
    session = session_of(pipe, arguments, **options)
    called = pipe(**arguments, **options, generator=seeded()).frames
    assert torch.equal(steps(session, arguments, 3, 14), called)
    session.rewind(1)
    assert torch.allclose(steps(session, arguments, 13, 14), called[:, -1:], atol=0.1)


def test_a_saved_pipeline_makes_the_same_frames_and_its_card_says_what_it_is(tmp_path):
    pipe = pipeline(**MODELS["base"])
    arguments = context_of(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    for kind in (FARPipeline, DiffusionPipeline):
        loaded = kind.from_pretrained(tmp_path / "saved")
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is FARPipeline
        assert torch.equal(
            loaded(**arguments, generator=seeded()).frames, pipe(**arguments, generator=seeded()).frames
        )
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "2 encoder and 1 decoder layers" in card and "arxiv.org/abs/2602.10095" in card


def test_what_cannot_be_made_is_refused_before_any_work():
    far, separable = tiny_pipeline(tiny_transformer(num_actions=3)), pipeline(num_actions=3, learn_start=False)
    with pytest.raises(ValueError, match="`guidance_mode` is 'feature', but a FARTransformer3DModel has no feature"):
        far(**context_of(far), guidance_mode="feature")
    with pytest.raises(ValueError, match="`guidance_mode` is 'both'; choose one of condition, feature"):
        separable(**context_of(separable), guidance_mode="both")
    with pytest.raises(ValueError, match=re.escape("`video` was not given, but this model has `learn_start=False`")):
        separable(actions=torch.zeros(1, 2, dtype=torch.int64), height=8, width=8, num_frames=2)
    with pytest.raises(ValueError, match="separable with `action_shift=0`"):
        session_of(separable, context_of(separable))
    assert separable(**context_of(separable)).frames.isfinite().all()


def test_lora_layers_of_both_parts_are_scaled_saved_loaded_and_fused(tmp_path):
    pipe, other = pipeline(**MODELS["base"]), pipeline(**MODELS["base"])
    arguments = context_of(pipe)
    plain = pipe(**arguments, generator=seeded()).frames
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = pipe(**arguments, generator=seeded()).frames
    switched_off = pipe(**arguments, generator=seeded(), attention_kwargs={"scale": 0.0}).frames
    assert torch.allclose(switched_off, plain, atol=1e-5) and not torch.allclose(adapted, plain, atol=1e-3)

    layers = get_peft_model_state_dict(pipe.transformer)
    assert {name.split(".")[0] for name in layers} == {"encoder", "decoder"}
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    other.load_lora_weights(tmp_path)
    assert torch.allclose(other(**arguments, generator=seeded()).frames, adapted, atol=1e-5)
    other.fuse_lora()
    other.unload_lora_weights()
    assert torch.allclose(other(**arguments, generator=seeded()).frames, adapted, atol=1e-4)
