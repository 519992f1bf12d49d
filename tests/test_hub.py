"""What is pushed to the Hub comes back equal, for each way to load it, in a process of its own.

The end of the file needs no Hub: folders with incomplete, truncated or pickled weights.
"""

import copy
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from local_hub import LocalHub, run_python
from safetensors.torch import load_file, save_file
from tiny_models import predict, random_clip, tiny_kl, tiny_pipeline, tiny_transformer

from diffusers_far import FARPipeline, FARTransformer3DModel, FlexRoPEConfig


WEIGHTS = "diffusion_pytorch_model.safetensors"

PUSH = """
    import sys
    from diffusers_far import FARPipeline

    pipe = FARPipeline.from_pretrained(sys.argv[1])
    pipe.push_to_hub("org/maze", training_facts={"Data": "4,000 mazes"})
"""
# What every loading test ends with: the pipeline continues a video as the one that was pushed did.
ROLL_OUT = """
import sys, torch
torch.set_num_threads(1)  # as in the process that made the rollout
rollout, expected = torch.load(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
frames = pipe(**rollout, num_frames=2, num_inference_steps=2, output_type="latent").frames
assert torch.equal(frames, expected)
assert type(pipe).__name__ == "FARPipeline" and type(pipe.transformer).__name__ == "FARTransformer3DModel"
assert pipe.config.action_names == ["left", "right", "forward"] and pipe.config.flex_rope["slope"] == 0.3
"""
LOADERS = {
    "FARPipeline": """
from diffusers_far import FARPipeline
pipe = FARPipeline.from_pretrained("org/maze")
""",
    "DiffusionPipeline": """
import diffusers_far
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("org/maze")
""",
    "custom_pipeline": """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("org/maze", custom_pipeline="org/maze", trust_remote_code=True)
""",
    "components": """
import diffusers_far
from diffusers import AutoencoderTiny, AutoModel, FlowMatchEulerDiscreteScheduler
transformer = AutoModel.from_pretrained("org/maze", subfolder="transformer")
vae = AutoModel.from_pretrained("org/maze", subfolder="vae")
assert type(vae) is AutoencoderTiny
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("org/maze", subfolder="scheduler")
pipe = diffusers_far.FARPipeline(transformer, vae, scheduler, action_names=["left", "right", "forward"])
pipe.enable_flex_rope(diffusers_far.FlexRoPEConfig(0.3, "constant"))
""",
}


def maze_pipeline(**overrides):
    transformer = tiny_transformer(num_actions=3, long_patch_size=2, trained_frames=30, action_shift=1, **overrides)
    return tiny_pipeline(transformer, fps=15, action_names=["left", "right", "forward"], height=8, width=8)


@pytest.fixture(scope="module")
def maze_hub(tmp_path_factory):
    """A Hub with `org/maze`, and a file with a rollout of it."""
    folder = tmp_path_factory.mktemp("maze")
    pipe = maze_pipeline()
    pipe.enable_flex_rope(FlexRoPEConfig(0.3, "constant"))
    pipe.save_pretrained(folder / "pipeline")

    generator = torch.Generator().manual_seed(0)
    rollout = {
        "video_latents": torch.randn(1, 3, 4, 4, 4, generator=generator),
        "latents": torch.randn(1, 2, 4, 4, 4, generator=generator),
        "actions": torch.tensor([[0, 1, 2, 0]]),
    }
    frames = pipe(**rollout, num_frames=2, num_inference_steps=2, output_type="latent").frames
    torch.save((rollout, frames), folder / "rollout.pt")
    with LocalHub() as hub:
        run_python(PUSH, hub, folder / "pipeline")
        yield hub, folder / "rollout.pt"


@pytest.fixture
def pushed(hub, maze_hub):
    """`org/maze` on the test's own Hub; the path of its rollout."""
    source, rollout = maze_hub
    hub.repos.update(copy.deepcopy(source.repos))
    hub.lfs_objects.update(source.lfs_objects)
    return rollout


@pytest.mark.full
@pytest.mark.parametrize("loader", LOADERS)
def test_a_pushed_pipeline_loads_and_continues_a_video_as_before(hub, pushed, loader):
    run_python(LOADERS[loader] + ROLL_OUT, hub, pushed)


@pytest.mark.full
def test_a_pushed_repo_has_safetensors_a_card_and_the_custom_pipeline(hub, pushed):
    files = hub.repos["models/org/maze"].find().files
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{WEIGHTS}",
        "vae/config.json",
        f"vae/{WEIGHTS}",
    ]
    card = files["README.md"].content.decode()
    for fact in (
        "library_name: diffusers",
        "# maze",
        "8x8 pixels, 15 per second",
        "the last 3 frames, the new one included",
        "patches of 2x2",
        "3 discrete actions: 0 left, 1 right, 2 forward",
        "the action that led to it",
        "slope 0.3, schedule `constant`",
        "Longest clip: 30 frames",
        "Data: 4,000 mazes",
    ):
        assert fact in card, fact


@pytest.mark.full
def test_the_examples_of_a_card_run_as_they_are(hub, pushed):
    card = hub.repos["models/org/maze"].find().files["README.md"].content.decode()
    usage, custom_loading = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    run_python(usage + "assert len(frames) == 8 and frames[0].size == (8, 8)", hub)
    run_python(custom_loading + "assert pipe.config.fps == 15", hub)


@pytest.mark.full
def test_a_card_on_the_hub_outlives_the_next_push(hub, pushed, tmp_path):
    code = """
        import sys
        from pathlib import Path
        from huggingface_hub import upload_file
        from diffusers_far import FARPipeline

        upload_file(repo_id="org/maze", path_or_fileobj=b"# By hand", path_in_repo="README.md")
        pipe = FARPipeline.from_pretrained("org/maze")
        pipe.push_to_hub("org/maze", commit_message="again")
        pipe.save_pretrained("maze", push_to_hub=True, repo_id="org/maze")
        assert Path("maze/README.md").read_text() == "# By hand"
    """
    run_python(code, hub)
    assert hub.repos["models/org/maze"].find().files["README.md"].content == b"# By hand"


@pytest.mark.full
def test_a_readme_in_a_folder_is_pushed_with_it(hub, pushed):
    code = """
        from pathlib import Path
        from diffusers_far import FARPipeline

        pipe = FARPipeline.from_pretrained("org/maze")
        Path("folder").mkdir()
        Path("folder/README.md").write_text("# Mine")
        pipe.save_pretrained("folder", push_to_hub=True, commit_message="with my card")
    """
    run_python(code, hub)
    repo = hub.repos["models/local-user/folder"]
    assert repo.find().files["README.md"].content == b"# Mine"
    assert repo.find().title == "with my card"


@pytest.mark.full
def test_a_transformer_alone_comes_back_equal(hub, tmp_path):
    maze_pipeline().transformer.save_pretrained(tmp_path)
    code = """
        import sys, torch
        from diffusers import AutoModel
        from diffusers_far import FARTransformer3DModel

        pushed = FARTransformer3DModel.from_pretrained(sys.argv[1])
        pushed.push_to_hub("org/transformer")
        for cls in (FARTransformer3DModel, AutoModel):
            pulled = cls.from_pretrained("org/transformer")
            assert type(pulled) is FARTransformer3DModel and pulled.config.num_actions == 3
            torch.testing.assert_close(pulled.state_dict(), pushed.state_dict(), rtol=0, atol=0)
    """
    run_python(code, hub, tmp_path)


@pytest.mark.full
def test_lora_layers_load_from_the_hub(hub, pushed):
    code = """
        import torch
        from huggingface_hub import create_repo, upload_folder
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict
        from diffusers_far import FARPipeline

        pipe = FARPipeline.from_pretrained("org/maze")
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights("lora", layers)
        create_repo("org/lora")
        upload_folder(repo_id="org/lora", folder_path="lora")

        pipe = FARPipeline.from_pretrained("org/maze")
        pipe.load_lora_weights("org/lora", adapter_name="pulled")
        pulled = get_peft_model_state_dict(pipe.transformer, adapter_name="pulled")
        torch.testing.assert_close(pulled, layers, rtol=0, atol=0)
    """
    run_python(code, hub)


@pytest.mark.full
def test_without_the_package_the_custom_pipeline_says_what_to_install(hub, pushed):
    code = """
        import sys
        sys.modules["diffusers_far"] = None  # as if it were not installed
        from diffusers import DiffusionPipeline

        try:
            DiffusionPipeline.from_pretrained("org/maze", custom_pipeline="org/maze", trust_remote_code=True)
        except ImportError as error:
            print(error)
    """
    assert "pip install diffusers-far" in run_python(code, hub)


@pytest.mark.full
def test_pickled_weights_on_the_hub_are_refused(hub, pushed):
    code = """
        import torch
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, create_commit
        from diffusers_far import FARPipeline

        torch.save({}, "weights.bin")
        operations = [
            CommitOperationAdd("vae/diffusion_pytorch_model.bin", "weights.bin"),
            CommitOperationDelete("vae/diffusion_pytorch_model.safetensors"),
        ]
        create_commit("org/maze", operations, commit_message="pickle")
        try:
            FARPipeline.from_pretrained("org/maze")
        except OSError as error:
            print(error)
    """
    assert "Only safetensors are read" in run_python(code, hub)


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved pipeline."""
    maze_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_pipeline_loads_from_its_folder_bit_for_bit(saved):
    loaded, source = FARPipeline.from_pretrained(saved), maze_pipeline()
    assert loaded.config.action_names == ["left", "right", "forward"]
    for name in ("transformer", "vae"):
        torch.testing.assert_close(
            getattr(loaded, name).state_dict(), getattr(source, name).state_dict(), rtol=0, atol=0
        )
    clip = random_clip(source.transformer, num_frames=5)
    assert torch.equal(predict(loaded.transformer, clip), predict(source.transformer, clip))


def test_a_readme_in_the_folder_stays_as_it_is(saved, caplog):
    assert "Data: not recorded" in (saved / "README.md").read_text()
    (saved / "README.md").write_text("# Mine")
    maze_pipeline().save_pretrained(saved, training_facts={"Data": "mazes"})
    assert (saved / "README.md").read_text() == "# Mine"
    assert "`training_facts` are not written" in caplog.text


@pytest.mark.parametrize("loader", [FARPipeline, DiffusionPipeline])
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_weights_that_lack_keys_are_refused_and_the_keys_named(saved, component, loader):
    weights = load_file(saved / component / WEIGHTS)
    missing = sorted(weights)[0]
    save_file({key: tensor for key, tensor in weights.items() if key != missing}, saved / component / WEIGHTS)
    with pytest.raises(ValueError, match=f"{component}.*{re.escape(missing)}.*Fetch"):
        loader.from_pretrained(saved)


def test_a_transformer_alone_refuses_missing_and_unknown_keys(saved):
    weights = load_file(saved / "transformer" / WEIGHTS)
    weights["other.bias"] = weights.pop("proj_out.bias")
    save_file(weights, saved / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match="it lacks proj_out.bias; it has unknown other.bias"):
        FARTransformer3DModel.from_pretrained(saved / "transformer")


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_named_with_the_cure(saved, component, damage):
    path = saved / component / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>", "empty": b""}[damage])
    with pytest.raises(OSError, match=f"{component}/{WEIGHTS}.* truncated or not safetensors: download or copy it"):
        FARPipeline.from_pretrained(saved)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_pickled_weights_in_a_folder_are_refused(saved, component):
    torch.save(load_file(saved / component / WEIGHTS), saved / component / "diffusion_pytorch_model.bin")
    (saved / component / WEIGHTS).unlink()
    with pytest.raises(OSError, match=f"{WEIGHTS} found in directory .*{component}.* Only safetensors are read"):
        FARPipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match="`use_safetensors` is False"):
        FARPipeline.from_pretrained(saved, use_safetensors=False)


def test_pickled_weights_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization` is False"):
        maze_pipeline().save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.full
def test_a_pushed_variant_lies_beside_the_float32_weights(hub, pushed):
    code = """
        import torch
        from diffusers_far import FARPipeline

        full = FARPipeline.from_pretrained("org/maze")
        half = FARPipeline.from_pretrained("org/maze").to(torch.bfloat16)
        half.push_to_hub("org/maze", variant="bf16")
        for pipe, arguments in ((full, {}), (half, {"variant": "bf16", "dtype": torch.bfloat16})):
            pulled = FARPipeline.from_pretrained("org/maze", **arguments)
            for name in ("transformer", "vae"):
                weights = (getattr(each, name).state_dict() for each in (pulled, pipe))
                torch.testing.assert_close(*weights, rtol=0, atol=0)
        try:
            FARPipeline.from_pretrained("org/maze", variant="fp8")
        except ValueError as error:
            print(error)
    """
    assert "variant=fp8" in run_python(code, hub)


def test_components_given_by_the_user_need_no_weights_in_the_folder(saved):
    shutil.rmtree(saved / "vae")
    loaded = FARPipeline.from_pretrained(saved, vae=tiny_kl())
    assert loaded.vae.config.latent_channels == 4
