"""Methods for clips longer than the training's change what they claim to change, and nothing else."""

from dataclasses import replace

import pytest
import torch
from tiny_models import sharpened, tiny_pipeline, tiny_transformer, tiny_vq

from benchmarks.studies.measure import measure, score
from benchmarks.studies.predictors import (
    NearestViewPredictor,
    PipelinePredictor,
    TokenPredictor,
    applied,
    predict_in_window,
    scaled_position_ids,
)
from benchmarks.studies.settings import Evaluation, Method, Task
from benchmarks.studies.walks import WalkClips
from diffusers_far import FlexRoPEConfig, TokenARConfig, TokenARForVideo
from diffusers_far.models.functional import position_ids


TRAINED, NUM_CONTEXT, NUM_NEW = 4, 5, 3
PLAIN, WINDOW, INTERPOLATION = Method("plain"), Method("window", "window"), Method("interpolation", "interpolation")
DECAY = Method("decay", "decay", slope=2.0, schedule="constant")


def clips_of(num_context: int = NUM_CONTEXT, num_new: int = NUM_NEW, batch_size: int = 2) -> WalkClips:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_context + num_new)
    latents = torch.randn(*shape, 4, 4, 4, generator=generator)
    truth = torch.rand(batch_size, num_new, 3, 8, 8, generator=generator)
    masks = torch.zeros(batch_size, num_new, dtype=torch.bool)
    actions = torch.randint(0, 3, shape, generator=generator)
    pose = torch.zeros(*shape, 3)
    return WalkClips(range(batch_size), latents, actions, pose, truth, truth[:, :1], masks, ~masks)


def predictor_of(action_shift: int = 1) -> PipelinePredictor:
    """Of a model whose attention is sharp, so that positions and context matter to what it predicts."""
    model = sharpened(tiny_transformer(num_actions=3, action_shift=action_shift, trained_frames=TRAINED))
    return PipelinePredictor(tiny_pipeline(model))


@pytest.fixture
def predictor() -> PipelinePredictor:
    return predictor_of()


def predict(predictor: PipelinePredictor, method: Method, clips: WalkClips) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(walk) for walk in clips.walks]
    return predictor.predict(clips, method, 2, generators)


def far_apart(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first - second).abs().max().item() > 1e-3


@pytest.mark.parametrize("method", [WINDOW, INTERPOLATION], ids=lambda method: method.kind)
def test_within_the_trained_length_a_method_changes_nothing(predictor, method):
    clips = clips_of(num_context=2, num_new=1)
    torch.testing.assert_close(predict(predictor, method, clips), predict(predictor, PLAIN, clips), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [WINDOW, INTERPOLATION, DECAY], ids=lambda method: method.kind)
def test_beyond_it_a_method_changes_the_frames_and_leaves_the_model_as_it_was(predictor, method):
    clips = clips_of()
    plain = predict(predictor, PLAIN, clips)
    assert far_apart(predict(predictor, method, clips), plain)
    assert torch.equal(predict(predictor, PLAIN, clips), plain)


def test_a_window_shows_the_last_frames_that_fit_a_clip_of_the_training(predictor):
    clips = clips_of()
    made = predict(predictor, WINDOW, clips)
    changed = clips.latents.clone()
    changed[:, : NUM_CONTEXT - TRAINED + 1] += 1  # what lies before the window of the first new frame
    assert torch.equal(predict(predictor, WINDOW, replace(clips, latents=changed)), made)
    changed[:, NUM_CONTEXT - TRAINED + 1] += 1  # its first frame
    assert far_apart(predict(predictor, WINDOW, replace(clips, latents=changed))[:, 0], made[:, 0])


@pytest.mark.parametrize("action_shift", [0, 1])
def test_a_window_moves_on_over_the_frames_that_were_made(action_shift):
    """The last frame, made by hand from the frames before it."""
    predictor, clips = predictor_of(action_shift), clips_of()
    generators = [torch.Generator().manual_seed(walk) for walk in clips.walks]
    context, options = clips.latents[:, :NUM_CONTEXT], {"num_inference_steps": 2, "output_type": "latent"}
    made = predict_in_window(predictor.pipe, context, clips.actions, NUM_NEW, generator=generators, **options)
    generators = [torch.Generator().manual_seed(walk) for walk in clips.walks]
    for generator in generators:
        torch.randn(NUM_NEW - 1, 4, 4, 4, generator=generator)  # what the frames before it drew
    last = NUM_CONTEXT + NUM_NEW - 1
    video = torch.cat([context, made], dim=1)
    window = slice(last - TRAINED + 1, last)
    expected = predictor.pipe(
        video_latents=video[:, window],
        actions=clips.actions[:, window.start : last + 1],
        num_frames=1,
        generator=generators,
        **options,
    ).frames
    torch.testing.assert_close(made[:, -1:], expected, rtol=0, atol=1e-6)


def test_interpolation_puts_the_last_frame_where_training_ended(predictor):
    plan = predictor.pipe.transformer.context_plan(7, 4, 4)
    positions = scaled_position_ids(plan, scale=0.5)
    assert positions[-1, 0] == 3.0
    assert torch.equal(positions[:, 1:], position_ids(plan)[:, 1:].float())


def test_an_interpolated_rollout_is_the_same_without_a_cache(predictor):
    clips = clips_of()
    arguments = {
        "video_latents": clips.latents[:, :NUM_CONTEXT],
        "actions": clips.actions,
        "num_frames": NUM_NEW,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    made = []
    for use_cache in (True, False):
        generators = [torch.Generator().manual_seed(walk) for walk in clips.walks]
        with applied(INTERPOLATION, predictor.pipe, NUM_CONTEXT + NUM_NEW):
            made.append(predictor.pipe(**arguments, use_cache=use_cache, generator=generators).frames)
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-4)


def test_decay_is_flex_rope(predictor):
    clips = clips_of()
    made = predict(predictor, DECAY, clips)
    assert predictor.pipe.config.flex_rope is None
    predictor.pipe.enable_flex_rope(FlexRoPEConfig(DECAY.slope, DECAY.schedule))
    assert torch.equal(predict(predictor, PLAIN, clips), made)


def test_a_model_that_does_not_say_its_length_is_refused():
    predictor = PipelinePredictor(tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1)))
    with pytest.raises(ValueError, match="`trained_frames` is None"):
        predict(predictor, INTERPOLATION, clips_of())


def test_the_token_model_continues_codes_and_a_walk_does_not_depend_on_its_batch():
    decoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = TokenARConfig(num_codes=16, tokens_per_frame=16, num_actions=3, decoder=decoder)
    torch.manual_seed(0)
    predictor = TokenPredictor(TokenARForVideo(config).eval(), tiny_vq())
    clips = clips_of()
    codes = torch.randint(0, 16, (2, NUM_CONTEXT + NUM_NEW, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    clips = replace(clips, latents=codes)
    made = predict(predictor, PLAIN, clips)
    assert made.shape == clips.truth.shape and predictor.reconstruct(clips).shape == clips.truth.shape
    names = ("latents", "actions", "truth", "last_shown", "revisited", "unseen")
    alone = replace(clips, walks=[1], **{name: getattr(clips, name)[1:] for name in names})
    torch.testing.assert_close(predict(predictor, PLAIN, alone)[0], made[1], rtol=0, atol=1e-5)


def test_scores_of_walks_made_by_hand():
    """A truth of grey; frames that are off by 0.1 and 0.01 have 20 and 40 dB."""
    truth = torch.full((1, 3, 3, 4, 4), 0.5)
    predicted = truth + torch.tensor([0.1, 0.01, 0.01])[None, :, None, None, None]
    reconstructed = truth + 0.001
    stripes = torch.zeros(4, 4)
    stripes[:, ::2] = 0.02
    is_seen = torch.tensor([[True, False, False]])
    clips = WalkClips([0], truth, truth, truth, truth, truth[:, :1] + 0.1, is_seen, torch.zeros_like(is_seen))
    scores, psnr = score(predicted, reconstructed + stripes, clips, num_first_frames=2)
    assert psnr[0].tolist() == pytest.approx([20, 40, 40], abs=1e-2)
    assert scores["psnr"] == [pytest.approx(100 / 3, abs=1e-2)]
    assert scores["psnr_first"] == [pytest.approx(30, abs=1e-2)]
    assert scores["revisited"] == [pytest.approx(20, abs=1e-2)] and scores["unseen"] == [None]
    assert scores["gain"] == [pytest.approx(100 / 3 - 20, abs=1e-2)] and scores["repeated"] == [
        pytest.approx(20, abs=1e-2)
    ]
    assert scores["sharpness"] == [0.0]


class WalksOfOne:
    """Three walks that are one clip's."""

    def clips(self, task, numbers):
        clips = clips_of(task.num_context_frames, task.num_frames, batch_size=3)
        names = ("latents", "actions", "truth", "last_shown", "revisited", "unseen")
        return replace(clips, walks=numbers, **{name: getattr(clips, name)[list(numbers)] for name in names})


class SeedRecorder:
    """Predicts the truth, and remembers what it was given to draw from."""

    def __init__(self):
        self.seeds = []

    def predict(self, clips, method, num_inference_steps, generators):
        self.seeds += [generator.initial_seed() for generator in generators]
        return clips.truth

    def reconstruct(self, clips):
        return clips.truth


def test_every_walk_has_noise_of_its_own_and_the_same_for_every_model():
    recorder = SeedRecorder()
    evaluation = Evaluation(3, 2, batch_size=2, seed=100)
    scores = measure(recorder, WalksOfOne(), Task("half", 2, 2, first_new_frame=2), PLAIN, evaluation)
    assert recorder.seeds == [100, 101, 102]
    assert scores["by_walk"]["psnr"] == [100, 100, 100] and scores["by_walk"]["sharpness"] == [1, 1, 1]


def test_a_measurement_does_not_depend_on_the_batch(predictor):
    task = Task("half", 2, 2, first_new_frame=2)
    together, apart = (
        measure(predictor, WalksOfOne(), task, PLAIN, Evaluation(3, 2, batch_size=batch_size)) for batch_size in (3, 2)
    )
    assert list(together["by_walk"]) == list(apart["by_walk"]) and len(together["by_walk"]["psnr"]) == 3
    for metric in ("psnr", "sharpness", "codec"):
        assert together["by_walk"][metric] == pytest.approx(apart["by_walk"][metric], abs=1e-3)
    assert len(together["psnr_by_frame"]) == 2


def test_the_nearest_view_is_near_in_place_and_in_heading(predictor):
    """Shown are 5 views, one asked for from next to each of 3."""
    clips = clips_of(batch_size=1)
    shown = [(0.0, 0.0, 350.0), (0.0, 0.0, 180.0), (90.0, 0.0, 0.0), (90.0, 90.0, 0.0), (90.0, 90.0, 90.0)]
    asked = [(5.0, 5.0, 2.0), (85.0, 90.0, 80.0), (85.0, 2.0, 359.0)]
    nearest = NearestViewPredictor(predictor.pipe.vae, max_distance=40.0, max_turn=15.0)
    predicted = predict(nearest, PLAIN, replace(clips, pose=torch.tensor([shown + asked])))
    views = replace(clips, latents=clips.latents[:, [0, 1, 2, 3, 4, 0, 4, 2]])
    torch.testing.assert_close(predicted, nearest.reconstruct(views), rtol=0, atol=1e-6)
