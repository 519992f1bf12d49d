import pytest
import torch

from diffusers_far import PRESETS, FARTransformer3DModel, preset_config


# Millions of parameters. Source: FAR, arXiv:2503.19325, table 1.
PAPER_PARAMETERS = {
    "far-b": 130,
    "far-m": 230,
    "far-l": 457,
    "far-xl": 674,
    "far-b-long": 158,
    "far-m-long": 280,
}


@pytest.mark.parametrize("name", PAPER_PARAMETERS)
def test_a_preset_has_as_many_parameters_as_the_paper_says(name):
    with torch.device("meta"):
        model = FARTransformer3DModel(**preset_config(name))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PAPER_PARAMETERS[name], rel=0.015)


def test_every_preset_of_the_paper_exists_and_no_other():
    assert set(PRESETS) == set(PAPER_PARAMETERS)


def test_overrides_win_over_the_preset_and_leave_it_as_it_is():
    config = preset_config("far-b-long", num_layers=2, num_actions=4)
    assert config == {"num_layers": 2, "num_attention_heads": 12, "long_patch_size": 4, "num_actions": 4}
    assert preset_config("far-b-long")["num_layers"] == 12


def test_an_unknown_preset_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="`name` is 'far-s'.*far-b.*far-m-long"):
        preset_config("far-s")
