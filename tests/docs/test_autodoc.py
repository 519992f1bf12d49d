"""Entries of the API are read from the package's source as a user sees it."""

from pathlib import Path

import pytest
from docs_site.autodoc import Package
from docs_site.pages import Autodoc


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(Path(__file__).parents[2] / "src")


def test_public_names_are_the_classes_and_functions_of_the_package(package):
    names = package.public_names()
    assert {"FARPipeline", "FARSession", "apply_flex_rope", "preset_config"} <= set(names)
    assert not {"PRESETS", "diffusers", "models"} & set(names)


def test_a_class_shows_its_documented_members_and_those_that_it_inherits_here(package):
    pipeline = package.entry(Autodoc("FARPipeline"))
    members = {member.anchor.removeprefix("FARPipeline."): member for member in pipeline.members}
    assert members["stream"].kind == "method" and members["num_timesteps"].kind == "property"
    assert members["load_lora_weights"].source == "diffusers_far/loaders/lora.py"
    assert members["from_pretrained"].kind == "classmethod"
    assert not [name for name in members if name.startswith("_")]


def test_a_list_of_members_is_taken_as_it_is_and_all_stands_for_the_documented_ones(package):
    listed = package.entry(Autodoc("FARPipeline", ("__call__", "stream")))
    assert [member.anchor for member in listed.members] == ["FARPipeline.__call__", "FARPipeline.stream"]
    extended = package.entry(Autodoc("FARPipeline", ("all", "__call__", "stream")))
    assert len(extended.members) == len(package.entry(Autodoc("FARPipeline")).members) + 1
    assert package.entry(Autodoc("FARPipeline", ("none",))).members == ()


def test_signatures_of_dataclasses_and_functions_are_written_out(package):
    config = package.entry(Autodoc("FlexRoPEConfig"))
    assert config.signature.startswith("FlexRoPEConfig(\n    slope: float = 0.1,\n")
    patchify = package.entry(Autodoc("models.functional.patchify"))
    assert patchify.signature == "patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor"
    assert (patchify.kind, patchify.short_name) == ("function", "patchify")
    stream = package.entry(Autodoc("FARPipeline", ("stream",))).members[0]
    assert stream.signature == "stream(*, output_type: str = 'pil', **arguments) -> Iterator[Frame]"
    assert (stream.anchor, stream.short_name) == ("FARPipeline.stream", "FARPipeline.stream")


@pytest.mark.parametrize("directive", [Autodoc("NoSuchClass"), Autodoc("FARPipeline", ("no_such_method",))])
def test_names_that_do_not_exist_are_refused(package, directive):
    with pytest.raises(KeyError, match="no_such_method|NoSuchClass"):
        package.entry(directive)
