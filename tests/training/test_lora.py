import copy

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import predict, random_clip, tiny_pipeline, tiny_transformer

from diffusers_far.training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from diffusers_far.training.lora import add_lora, checkpoint_trained_only, lora_card, lora_targets, save_lora


ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
ADDED = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]


def adapted(targets=("to_q", "to_v"), dropout=0.0, **config):
    transformer = tiny_transformer(num_actions=3, **config)
    parameters = add_lora(transformer, rank=2, alpha=4.0, dropout=dropout, targets=targets)
    return transformer, parameters


def take_a_step(transformer, parameters, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(parameters, 0.1)
    clip = random_clip(transformer, num_frames=3)
    transformer(clip.latents, clip.timestep, actions=clip.actions).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_groups_name_the_layers_that_the_model_has():
    base, long = tiny_transformer(), tiny_transformer(long_patch_size=2)
    assert lora_targets(base, ["attention"]) == ATTENTION
    assert lora_targets(long, ["attention"]) == sorted(ATTENTION + ADDED)
    assert lora_targets(base, ["mlp", "to_q", "norm1.linear"]) == [
        "mlp.net.0.proj",
        "mlp.net.2",
        "norm1.linear",
        "to_q",
    ]


@pytest.mark.parametrize("name", ["query", "add_q_proj", "o_q", "norm_q"])
def test_layers_that_the_model_lacks_are_refused(name):
    with pytest.raises(ValueError, match=f"`target_modules` has '{name}'.*attention, mlp"):
        lora_targets(tiny_transformer(), ["attention", name])


def test_a_new_adapter_changes_nothing_and_training_it_changes_the_output_but_not_the_base():
    plain = tiny_transformer(num_actions=3)
    transformer, parameters = adapted()
    clip = random_clip(plain, num_frames=3)
    assert torch.equal(predict(transformer, clip), predict(plain, clip))
    assert len(parameters) == 2 * 2 * 2  # A and B of two layers in each of two blocks
    take_a_step(transformer, parameters)
    assert (predict(transformer, clip) - predict(plain, clip)).abs().max() > 1e-3
    base = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(base[name], value), name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"alpha": 0.0}, "`lora_alpha` is 0.0"),
        ({"dropout": 1.0}, "`lora_dropout` is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_transformer(), **{"rank": 2, "alpha": 1.0, "dropout": 0.0, "targets": ["to_q"], **settings})


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_to_the_bit(tmp_path):
    def start():
        accelerator = Accelerator(cpu=True)
        accelerator.free_memory()
        transformer, parameters = adapted()
        model, optimizer = accelerator.prepare(transformer, torch.optim.Adam(parameters, 0.1))
        checkpoint_trained_only(accelerator, transformer)
        return accelerator, model, parameters, optimizer

    accelerator, model, parameters, optimizer = start()
    take_a_step(model, parameters, optimizer)
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, {}, None)
    saved = load_file(checkpoint / "adapter.safetensors")
    assert len(saved) == len(parameters) and all(".lora_" in name for name in saved)
    assert not list(checkpoint.glob("model*"))
    take_a_step(model, parameters, optimizer)

    accelerator, resumed, resumed_parameters, resumed_optimizer = start()
    assert load_checkpoint(accelerator, find_checkpoint(tmp_path, "latest"), {}) == 1
    take_a_step(resumed, resumed_parameters, resumed_optimizer)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_other_layers_is_refused_and_the_difference_named(tmp_path):
    for targets in (["to_q"], ["to_v"]):
        accelerator = Accelerator(cpu=True)
        accelerator.free_memory()
        checkpoint_trained_only(accelerator, accelerator.prepare(adapted(targets)[0]))
        if targets == ["to_q"]:
            save_checkpoint(accelerator, tmp_path, 1, {}, None)
    with pytest.raises(ValueError, match="to_q.*`--target_modules`"):
        load_checkpoint(accelerator, find_checkpoint(tmp_path, "latest"), {})


def test_a_saved_adapter_does_in_another_pipeline_what_it_did_in_training(tmp_path):
    transformer, parameters = adapted(["to_q", "mlp.net.2"], dropout=0.5)
    take_a_step(transformer, parameters)
    save_lora(tiny_pipeline(transformer), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = tiny_pipeline(tiny_transformer(num_actions=3))
    fresh.load_lora_weights(tmp_path)
    clip = random_clip(transformer, num_frames=3)
    assert torch.equal(predict(fresh.transformer, clip), predict(transformer.eval(), clip))


def test_a_card_links_a_base_on_the_hub_and_only_names_one_in_a_folder(tmp_path):
    transformer, parameters = adapted()
    pipe = tiny_pipeline(copy.copy(transformer), height=8, width=8)
    num_trained = sum(parameter.numel() for parameter in parameters)
    card = lora_card(pipe, "me/doom", "org/maze", {"Steps": "7"})
    for text in (
        "base_model: org/maze\n",
        "base_model_relation: adapter\n",
        "# doom\n",
        "[org/maze](https://huggingface.co/org/maze)",
        f"{num_trained:,} trained parameters beside the {transformer.num_parameters() - num_trained:,}",
        'from_pretrained("org/maze")\npipe.load_lora_weights("me/doom")',
        "- Steps: 7",
    ):
        assert text in card, text
    (tmp_path / "maze").mkdir()
    card = lora_card(pipe, "doom", str(tmp_path / "maze"), {})
    assert "base_model:" not in card and str(tmp_path) not in card
    assert 'from_pretrained("maze")' in card
