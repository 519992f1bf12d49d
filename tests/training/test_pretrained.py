import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import random_clip, tiny_pipeline, tiny_separable, tiny_transformer

from benchmarks.studies.scripts import load_script
from diffusers_far.training.pretrained import as_flow_map, pipeline_settings, with_conditions


def test_another_number_of_actions_renews_that_table_and_says_so(caplog):
    transformer = tiny_transformer(num_actions=3)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        renewed = with_conditions(transformer, num_actions=5)
    assert "`num_actions` was 3 and is 5" in caplog.text
    assert renewed.config.num_actions == 5
    for name, tensor in renewed.state_dict().items():
        if "action_embedder" not in name:
            assert torch.equal(tensor, before[name])
    table, old_table = renewed.action_embedder.embedding_table.weight, before["action_embedder.embedding_table.weight"]
    assert table.shape[0] == 6 and torch.equal(table[-1], old_table[-1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_both_tables_of_a_separable_model_are_renewed_and_keep_their_null_rows():
    model = tiny_separable(num_actions=3)
    renewed, before = with_conditions(model, num_actions=5), model.state_dict()
    for name, tensor in renewed.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("action_embedder" not in name), name
        if "action_embedder" in name:
            assert tensor.shape[0] == 6 and torch.equal(tensor[-1], before[name][-1])


def test_a_pipeline_of_a_flow_model_that_became_a_flow_map_takes_few_steps_of_its_scheduler(tmp_path):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.register_to_config(num_inference_steps=50, guidance_scale=2.0, fps=5)
    pipe.save_pretrained(tmp_path)
    settings = SimpleNamespace(
        pretrained_model_name_or_path=str(tmp_path),
        revision=None,
        objective="far",
        num_validation_inference_steps=None,
    )
    settings.fps = settings.action_names = settings.num_inference_steps = settings.short_cache = None
    build = load_script("train_far").build_pipeline
    for guidance, expected in ((None, 2.0), (3.0, 1.0)):
        settings.flow_map_guidance = guidance
        made = build(settings, as_flow_map(pipe.transformer), pipe.vae, (4, 4, 4))
        assert type(made.scheduler) is FlowMapEulerDiscreteScheduler and made.scheduler.config.shift == 3.0
        assert (made.config.num_inference_steps, made.config.guidance_scale, made.config.fps) == (4, expected, 5)
    made.save_pretrained(tmp_path / "flow map")
    settings.pretrained_model_name_or_path, settings.flow_map_guidance = str(tmp_path / "flow map"), None
    made.register_to_config(num_inference_steps=2)
    made.save_pretrained(tmp_path / "flow map")
    again = build(settings, made.transformer, pipe.vae, (4, 4, 4))
    assert type(again.scheduler) is FlowMapEulerDiscreteScheduler and again.config.num_inference_steps == 2


def test_without_actions_the_rest_of_the_model_is_as_it_was():
    transformer = tiny_transformer(num_actions=3)
    free = with_conditions(transformer, num_actions=None)
    assert not free.takes_actions
    clip = random_clip(free, 3)
    assert free(clip.latents, clip.timestep).sample.isfinite().all()


def test_equal_conditions_change_nothing():
    transformer = tiny_transformer(num_actions=3)
    assert with_conditions(transformer, num_actions=3) is transformer


def test_what_is_no_condition_is_refused():
    with pytest.raises(ValueError, match="`conditions` has \\['num_layers'\\]"):
        with_conditions(tiny_transformer(), num_layers=1)


def test_what_a_pipeline_says_of_itself_is_taken_over(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=0.5)
    names = ["forward", "left", "right"]
    pipe = tiny_pipeline(tiny_transformer(num_actions=3), scheduler=scheduler, fps=8.75, action_names=names)
    pipe.register_to_config(num_inference_steps=5, guidance_scale=1.4, short_cache=4)
    pipe.save_pretrained(tmp_path)
    settings = pipeline_settings(str(tmp_path), num_actions=3)
    assert settings.pop("scheduler").config.shift == 0.5
    trained = tiny_pipeline(tiny_transformer(num_actions=3), **settings)
    assert trained.config.fps == 8.75 and trained.config.action_names == names
    assert trained.default_inference_steps == 5 and trained.default_guidance_scale == 1.4
    assert trained.default_short_cache == 4
    assert "action_names" not in pipeline_settings(str(tmp_path), num_actions=4)


def test_a_transformer_alone_brings_no_settings(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    assert pipeline_settings(str(tmp_path), num_actions=None) == {}
