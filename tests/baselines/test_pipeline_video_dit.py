"""The pipeline of the Video DiT baseline makes whole clips, and leaves the context that it is given as it is."""

from unittest.mock import patch

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONDITIONS, property_test, tiny_pipeline, tiny_taesd, tiny_transformer

from diffusers_far import FARPipeline, FARTransformer3DModel, VideoDiTPipeline
from diffusers_far.baselines.pipeline_video_dit import load_pipeline
from diffusers_far.data.clips import ClipBatch
from diffusers_far.evaluation.world_model import WorldModelProtocol, predict_walks


NUM_CONTEXT, NUM_NEW, BATCH_SIZE, SIZE = 3, 2, 2, (4, 6)
MODES = pytest.mark.parametrize("context_mode", ["noised", "clean"])
FLOW_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def video_dit(context_mode: str = "noised", scheduler=None, **config) -> VideoDiTPipeline:
    transformer = tiny_transformer(frame_causal=False, **config)
    pipe = VideoDiTPipeline(
        transformer, tiny_taesd(), scheduler or FlowMatchEulerDiscreteScheduler(), context_mode=context_mode
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_latents(num_frames: int, batch_size: int = BATCH_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, num_frames, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def conditions_of(model: FARTransformer3DModel, num_frames: int = NUM_CONTEXT + NUM_NEW) -> dict[str, torch.Tensor]:
    generator, conditions = torch.Generator().manual_seed(1), {}
    if model.config.num_actions:
        conditions["actions"] = torch.randint(0, 3, (BATCH_SIZE, num_frames), generator=generator)
    if model.config.action_dim:
        conditions["actions"] = torch.randn(BATCH_SIZE, num_frames, model.config.action_dim, generator=generator)
    if model.config.num_classes:
        conditions["class_labels"] = torch.randint(0, 2, (BATCH_SIZE,), generator=generator)
    return conditions


def new_latents(pipe: VideoDiTPipeline, **arguments) -> torch.Tensor:
    defaults = {"num_frames": NUM_NEW, "num_inference_steps": 3, "output_type": "latent"}
    return pipe(**{**defaults, **arguments}).frames


class SpiedForward:
    """Runs the model, or `velocity` in its place, and records the latents and timesteps of every call."""

    def __init__(self, velocity=None):
        self.latents, self.timesteps, self.velocity = [], [], velocity
        self._forward = FARTransformer3DModel.forward

    def __enter__(self) -> "SpiedForward":
        spy = self

        def forward(model, hidden_states, timestep, **arguments):
            spy.latents.append(hidden_states.clone())
            spy.timesteps.append(timestep.clone())
            if spy.velocity is not None:
                return (spy.velocity(hidden_states, timestep),)
            return spy._forward(model, hidden_states, timestep, **arguments)

        self._patch = patch.object(FARTransformer3DModel, "forward", forward)
        self._patch.start()
        return self

    def __exit__(self, *exception) -> None:
        self._patch.stop()


def test_a_clean_context_is_shown_as_it_is_at_every_step():
    context = random_latents(NUM_CONTEXT)
    with SpiedForward() as spy:
        new_latents(video_dit("clean"), video_latents=context)
    assert len(spy.latents) == 3
    for latents, timestep in zip(spy.latents, spy.timesteps):
        assert torch.equal(latents[:, :NUM_CONTEXT], context)
        assert (timestep[:, :NUM_CONTEXT] == -1).all()
        assert (timestep[:, NUM_CONTEXT:] == timestep[0, -1]).all() and timestep[0, -1] > 0


def test_a_noised_context_is_at_the_level_of_the_new_frames_with_one_noise_throughout():
    context = random_latents(NUM_CONTEXT)
    with SpiedForward() as spy:
        new_latents(video_dit("noised"), video_latents=context, generator=seeds(1, 2))
    noises = []
    for latents, timestep in zip(spy.latents, spy.timesteps):
        assert (timestep == timestep[0, 0]).all()
        time = timestep[0, 0] / 1000
        noises.append((latents[:, :NUM_CONTEXT] - (1 - time) * context) / time)
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-3)
    assert 0.8 < noises[0].std() < 1.2


@MODES
def test_the_given_context_is_not_changed(context_mode):
    context = random_latents(NUM_CONTEXT)
    given_context = context.clone()
    new_latents(video_dit(context_mode), video_latents=context)
    assert torch.equal(context, given_context)


@MODES
@pytest.mark.parametrize(
    ("scheduler", "tolerance"),
    [
        (FlowMatchEulerDiscreteScheduler(), 1e-4),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 1e-4),
        (FlowMatchHeunDiscreteScheduler(), 1e-4),
        (UniPCMultistepScheduler(**FLOW_UNIPC), 1e-2),  # its timesteps are rounded to whole numbers
    ],
    ids=["euler", "shifted", "heun", "unipc"],
)
def test_a_model_that_knows_the_true_velocity_gives_the_true_clip(context_mode, scheduler, tolerance):
    clip = random_latents(NUM_CONTEXT + NUM_NEW)

    def true_velocity(latents, timestep):
        time = timestep[..., None, None, None] / 1000
        return (latents - clip) / time

    with SpiedForward(true_velocity):
        made = new_latents(video_dit(context_mode, scheduler), video_latents=clip[:, :NUM_CONTEXT])
    torch.testing.assert_close(made, clip[:, NUM_CONTEXT:], rtol=0, atol=tolerance)


@property_test
@given(
    st.sampled_from(["noised", "clean"]),
    st.sampled_from(CONDITIONS),
    st.booleans(),
    st.integers(0, NUM_CONTEXT),
    st.sampled_from([0, 1]),
)
def test_a_batch_equals_its_members(context_mode, condition, is_guided, num_context, action_shift):
    pipe = video_dit(context_mode, action_shift=action_shift, **condition)
    conditions = conditions_of(pipe.transformer, num_context + NUM_NEW)
    context = random_latents(num_context) if num_context else None
    guidance_scale = 2.0 if is_guided and condition else 1.0
    size = {} if num_context else {"height": 8, "width": 12}

    def make(part: slice) -> torch.Tensor:
        values = {name: value[part] for name, value in conditions.items()}
        video_latents = None if context is None else context[part]
        generators = seeds(7, 8)[part] if condition or num_context else seeds(7, 8)[:1]
        arguments = {"guidance_scale": guidance_scale, "generator": generators, **size, **values}
        return new_latents(pipe, video_latents=video_latents, **arguments)

    together = make(slice(0, 2))
    for member in range(len(together)):
        torch.testing.assert_close(together[member], make(slice(member, member + 1))[0], rtol=0, atol=1e-5)


@MODES
def test_a_seed_makes_one_clip_and_another_seed_another(context_mode):
    pipe, context = video_dit(context_mode), random_latents(NUM_CONTEXT)
    first, again, other = (
        new_latents(pipe, video_latents=context, generator=seeds(*pair)) for pair in ((1, 2), (1, 2), (3, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


@MODES
def test_every_new_frame_depends_on_the_context_and_on_later_frames_actions(context_mode):
    """What tells this baseline from FAR: frames are made together, so the last action reaches the first new frame."""
    pipe = video_dit(context_mode, num_actions=3, action_shift=1)
    context, actions = random_latents(NUM_CONTEXT), torch.zeros(BATCH_SIZE, NUM_CONTEXT + NUM_NEW, dtype=torch.int64)
    made = new_latents(pipe, video_latents=context, actions=actions, generator=seeds(1, 2))
    changed = actions.clone()
    changed[:, -2] = 2  # leads to the last new frame
    assert not torch.equal(
        made[:, 0], new_latents(pipe, video_latents=context, actions=changed, generator=seeds(1, 2))[:, 0]
    )
    changed = actions.clone()
    changed[:, -1] = 2  # leads out of the clip
    assert torch.equal(made, new_latents(pipe, video_latents=context, actions=changed, generator=seeds(1, 2)))
    other_context = random_latents(NUM_CONTEXT, seed=5)
    assert not torch.equal(
        made[:, 0], new_latents(pipe, video_latents=other_context, actions=actions, generator=seeds(1, 2))[:, 0]
    )


def test_given_noise_and_several_videos_of_a_context():
    pipe, context = video_dit("clean"), random_latents(NUM_CONTEXT)
    noise = random_latents(NUM_NEW, 4, seed=3)
    made = new_latents(pipe, video_latents=context, latents=noise, num_videos_per_context=2)
    alone = new_latents(pipe, video_latents=context[1:], latents=noise[3:])
    assert made.shape == (4, NUM_NEW, 4, *SIZE)
    torch.testing.assert_close(made[3:], alone, rtol=0, atol=1e-5)


def test_a_model_that_makes_frame_after_frame_is_refused():
    pipe = VideoDiTPipeline(tiny_transformer(), tiny_taesd(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="`frame_causal=True`.*load it as a `FARPipeline`"):
        pipe(video_latents=random_latents(2), num_frames=1)


def test_it_has_no_stream_no_session_and_no_flex_rope():
    assert not any(hasattr(video_dit(), name) for name in ("stream", "start_session", "enable_flex_rope"))
    with pytest.raises(ValueError, match="`frame_causal=False`: it has no past"):
        VideoDiTPipeline(**video_dit().components, flex_rope={"slope": 0.1})


@pytest.mark.parametrize("name", ["use_cache", "max_long_frames", "callback_on_step_end", "callback_on_frame_end"])
def test_what_only_frame_after_frame_can_have_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"`{name}` was given but this pipeline makes all frames at once"):
        video_dit()(video_latents=random_latents(2), num_frames=1, **{name: None})


def test_its_call_takes_its_arguments_in_the_order_of_a_far_pipeline():
    pipe, context = video_dit("clean"), random_latents(NUM_CONTEXT)
    size = {"num_inference_steps": 3, "output_type": "latent", "generator": seeds(1)[0]}
    made = pipe(None, context, None, None, NUM_NEW, **{**size, "generator": seeds(1)[0]}).frames
    assert torch.equal(made, new_latents(pipe, video_latents=context, **size))


def test_modes_and_caches_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="`context_mode` is 'dirty'; choose one of noised, clean"):
        video_dit("dirty")
    with pytest.raises(ValueError, match="`use_cache` is False but"):
        video_dit()(video_latents=random_latents(2), num_frames=1, short_cache="rolling")


def test_a_clip_longer_than_the_training_s_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr("diffusers_far.baselines.pipeline_video_dit.logger.warning", warnings.append)
    pipe = video_dit(trained_frames=5)
    new_latents(pipe, video_latents=random_latents(3))
    assert not warnings
    new_latents(pipe, video_latents=random_latents(4))
    assert "6 frames, context included, but the transformer was trained on 5" in warnings[0]


def test_another_pipeline_takes_over_its_components():
    pipe = video_dit()
    assert VideoDiTPipeline.from_pipe(pipe).components == pipe.components


def test_a_folder_is_loaded_as_what_it_is(tmp_path):
    """Training saves every folder as a `FARPipeline`."""
    tiny_pipeline(tiny_transformer(frame_causal=False)).save_pretrained(tmp_path / "saved-by-training")
    tiny_pipeline().save_pretrained(tmp_path / "far")
    pipe = load_pipeline(tmp_path / "saved-by-training", context_mode="clean")
    assert type(pipe) is VideoDiTPipeline and pipe.config.context_mode == "clean"
    assert type(load_pipeline(tmp_path / "far")) is FARPipeline

    pipe.save_pretrained(tmp_path / "video-dit")
    again = load_pipeline(tmp_path / "video-dit")
    assert again.config.context_mode == "clean"
    pipe.set_progress_bar_config(disable=True)
    again.set_progress_bar_config(disable=True)
    context = random_latents(NUM_CONTEXT)
    made, made_again = (new_latents(each, video_latents=context, generator=seeds(1, 2)) for each in (pipe, again))
    assert torch.equal(made, made_again)


def test_it_takes_a_far_pipeline_s_place_in_the_world_model_protocol():
    pipe = video_dit("clean", num_actions=3, action_shift=1)
    generator = torch.Generator().manual_seed(0)
    walks = ClipBatch(
        frames=torch.randint(0, 256, (3, 5, 3, 8, 12), generator=generator, dtype=torch.uint8),
        actions=torch.randint(0, 3, (3, 5), generator=generator),
        pose=torch.zeros(3, 5, 3),
    )
    protocol = WorldModelProtocol(
        num_walks=3,
        num_context_frames=3,
        num_frames=2,
        num_inference_steps=2,
        guidance_scale=1.0,
        batch_size=2,
        mirrored_actions=(1, 2),
    )
    predictions = predict_walks(pipe, walks, protocol)
    assert predictions.predicted.shape == (3, 2, 3, 8, 12) and predictions.mirrored.shape == (3, 1, 3, 8, 12)
