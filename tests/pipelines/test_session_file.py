import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from session_walks import MODELS, go_on, pipeline, start, walk

from diffusers_far import FARSession, FlexRoPEConfig
from diffusers_far.pipelines import session_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "session.safetensors"


def change_facts(path: Path, change) -> None:
    """Rewrite what a session's file says about itself."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[session_file.FORMAT])
    change(facts)
    save_file(load_file(path), path, metadata={session_file.FORMAT: json.dumps(facts)})


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_long_frames": 3, "num_sink_frames": 1}, {"short_cache": "rolling"}, {"max_history": 4}],
)
def test_a_loaded_session_goes_on_bit_equal(config, options, path):
    if config.get("long_patch_size", 2) is None and "max_history" not in options and options:
        pytest.skip("no frame is long")
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session = start(pipe, **options)
    go_on(session, actions, 0, 3)
    session.save(path)
    expected = go_on(session, actions, 3)
    loaded = FARSession.load(pipe, path)
    assert torch.equal(go_on(loaded, actions, 3), expected)
    assert loaded.num_frames == session.num_frames and torch.equal(loaded.latents, session.latents)
    assert loaded.max_history == session.max_history and loaded.num_rewindable == session.num_rewindable
    for each in (session, loaded):
        each.rewind(1)
    assert torch.equal(go_on(loaded, actions, 5), go_on(session, actions, 5))


@pytest.mark.parametrize("generator", [3, None])
def test_one_generator_for_the_batch_goes_on_too(generator, path):
    pipe = pipeline()
    session = start(pipe, generator=None)
    session.set_generator(generator)
    session.save(path)
    assert torch.equal(FARSession.load(pipe, path).step(0), session.step(0))


def test_a_session_of_nothing_but_classes_is_saved_too(path):
    pipe = pipeline(num_actions=None, num_classes=2, action_shift=0)
    session = pipe.start_session(class_labels=[1, 0], height=8, width=12, num_inference_steps=2, output_type="latent")
    session.save(path)
    loaded = FARSession.load(pipe, path)
    assert torch.equal(loaded.step(), session.step())


def test_guidance_that_was_to_be_begun_when_the_session_was_saved_is_begun(path):
    pipe = pipeline()
    session = start(pipe, guidance_scale=1.0)
    session.step(0)
    session.set_config(guidance_scale=1.5)
    session.save(path)
    assert torch.equal(FARSession.load(pipe, path).step(1), session.step(1))


@pytest.mark.full
def test_a_session_goes_on_bit_equal_in_another_process(path, tmp_path):
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe)
    go_on(session, actions, 0, 3)
    session.save(path)
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(actions, tmp_path / "actions.pt")
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from diffusers_far import FARPipeline, FARSession
        from session_walks import go_on
        torch.set_num_threads(1)
        pipe = FARPipeline.from_pretrained({str(tmp_path / "pipe")!r})
        session = FARSession.load(pipe, {str(path)!r})
        torch.save(go_on(session, torch.load({str(tmp_path / "actions.pt")!r}), 3), {str(tmp_path / "frames.pt")!r})
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "frames.pt"), go_on(session, actions, 3))


def test_a_session_is_never_written_over(path):
    session = start(pipeline())
    session.save(path)
    content = path.read_bytes()
    session.step(0)
    with pytest.raises(ValueError, match="exists and would be overwritten"):
        session.save(path)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_a_session_that_cannot_be_written_leaves_no_file(path, monkeypatch):
    session = start(pipeline())
    monkeypatch.setattr(session_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        session.save(path)
    assert list(path.parent.iterdir()) == []
    monkeypatch.undo()
    session.save(path)


def test_files_that_are_no_session_are_refused(path, tmp_path):
    pipe = pipeline()
    start(pipe).save(path)
    content = path.read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        FARSession.load(pipe, tmp_path / "truncated.safetensors")
    save_file({"weights": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no session"):
        FARSession.load(pipe, tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        FARSession.load(pipe, tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda facts: facts.update(version=1), "of version 1, but this release reads 2"),
        (lambda facts: facts.pop("latency"), "lacks 'latency'"),
        (lambda facts: facts.update(noise_device="cuda:99"), "drawn on a device of type 'cuda:99'"),
    ],
)
def test_a_file_that_this_release_cannot_go_on_with_says_why(change, message, path):
    pipe = pipeline()
    start(pipe).save(path)
    change_facts(path, change)
    with pytest.raises(ValueError, match=message):
        FARSession.load(pipe, path)


def other_weights(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[-1].attn.to_q.weight.mul_(1.01)
    return pipe


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: pipeline(num_layers=1), "another transformer: num_layers 2, here 1"),
        (lambda: pipeline().to(torch.bfloat16), "another transformer: cached dtype .*bfloat16"),
        (lambda: other_weights(pipeline()), "another transformer: weights"),
        (lambda: pipeline(FlowMatchHeunDiscreteScheduler()), "another scheduler: class 'FlowMatchEuler"),
        (lambda: pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0)), "another scheduler: shift 1.0, here 3.0"),
    ],
)
def test_a_pipeline_that_would_go_on_otherwise_is_refused(other, message, path):
    start(pipeline()).save(path)
    with pytest.raises(ValueError, match=message):
        FARSession.load(other(), path)


def test_a_session_under_flex_rope_is_loaded_under_the_same(path):
    pipe = pipeline()
    pipe.enable_flex_rope(FlexRoPEConfig(slope=0.5, schedule="constant"))
    session = start(pipe)
    session.step(0)
    session.save(path)
    expected = session.step(1)
    assert torch.equal(FARSession.load(pipe, path).step(1), expected)
    for slope in (None, 0.4):
        pipe.disable_flex_rope()
        if slope is not None:
            pipe.enable_flex_rope(FlexRoPEConfig(slope=slope, schedule="constant"))
        with pytest.raises(ValueError, match="another FlexRoPE.*slope 0.5, here"):
            FARSession.load(pipe, path)
