import copy
import json
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from session_walks import MODELS, go_on, pipeline, start, walk

from diffusers_far import FARSession, FlexRoPEConfig
from diffusers_far.models.kv_cache import FARKVCache
from diffusers_far.pipelines import session_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "session.safetensors"


def change_file(path: Path, change) -> None:
    """Rewrite a session's file as a stranger could, with a sha256 that fits: `change` is given its facts and tensors."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[session_file.FORMAT])
    tensors = load_file(path)
    changed = change(facts, tensors)
    path.unlink()
    session_file.write_session_file(tensors, json.dumps(changed if isinstance(changed, (list, str)) else facts), path)


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


def test_settings_may_be_numbers_of_numpy(path):
    pipe = pipeline()
    start(pipe, num_inference_steps=np.int64(1), guidance_scale=np.float32(1.5), max_history=np.int64(4)).save(path)
    assert FARSession.load(pipe, path).config.num_inference_steps == 1


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
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        session.save(path)
    assert list(path.parent.iterdir()) == []
    monkeypatch.undo()
    session.save(path)


def test_files_that_are_no_session_are_refused(path, tmp_path):
    pipe = pipeline()
    start(pipe).save(path)
    content = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="is no file"):
        FARSession.load(pipe, tmp_path)
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
        (lambda facts: facts.update(version=2), "of version 2, but this release reads 3"),
        (lambda facts: facts.__delitem__("latency"), "lacks 'latency'"),
        (lambda facts: facts.update(noise_device="cuda:99"), "drawn on a device of type 'cuda:99'"),
    ],
)
def test_a_file_that_this_release_cannot_go_on_with_says_why(change, message, path):
    pipe = pipeline()
    start(pipe).save(path)
    change_file(path, lambda facts, tensors: change(facts))
    with pytest.raises(ValueError, match=message):
        FARSession.load(pipe, path)


def nudged(pipe, last: bool = False):
    """Another training: one weight differs a little."""
    with torch.no_grad():
        pipe.transformer.transformer_blocks[-1].attn.to_q.weight.view(-1)[-1 if last else 0] += 1e-6
    return pipe


def with_lora(pipe, seed: int = 0, scale: float = 1.0):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "walls")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    pipe.set_adapters("walls", scale)
    pipe.transformer.eval()
    return pipe


def int8(pipe):
    pipe.transformer.quantize_int8()
    return pipe


@pytest.mark.parametrize(
    "maker, other, message",
    [
        (pipeline, lambda: pipeline(num_layers=1), "another transformer: num_layers 2, here 1"),
        (pipeline, lambda: pipeline().to(torch.bfloat16), "another transformer: cached dtype .*bfloat16"),
        (pipeline, lambda: nudged(pipeline()), "another transformer: weights"),
        (pipeline, lambda: nudged(pipeline(), last=True), "another transformer: weights"),
        (pipeline, lambda: int8(pipeline()), "another transformer: weights"),
        (lambda: int8(pipeline()), pipeline, "another transformer: weights"),
        (lambda: with_lora(pipeline()), pipeline, "another transformer: weights"),
        (lambda: with_lora(pipeline()), lambda: with_lora(pipeline(), seed=1), "another transformer: weights"),
        (lambda: with_lora(pipeline()), lambda: with_lora(pipeline(), scale=0.5), "another transformer: weights"),
        (pipeline, lambda: pipeline(FlowMatchHeunDiscreteScheduler()), "another scheduler: class 'FlowMatchEuler"),
        (pipeline, lambda: pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0)), "scheduler: shift 1.0, here 3.0"),
    ],
)
def test_a_pipeline_that_would_go_on_otherwise_is_refused(maker, other, message, path):
    start(maker()).save(path)
    with pytest.raises(ValueError, match=message):
        FARSession.load(other(), path)


def compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_blocks(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True)


def offloaded(pipe):
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))


@pytest.mark.parametrize("change", [compiled, compiled_blocks, offloaded])
def test_a_compiled_or_offloaded_pipeline_goes_on_with_a_session_and_its_own_are_taken_up_elsewhere(change, path):
    pipe, changed = pipeline(), pipeline()
    change(changed)
    session = start(pipe, num_inference_steps=1)
    session.save(path)
    loaded = FARSession.load(changed, path)
    loaded.save(path.with_name("again.safetensors"))
    again = FARSession.load(pipe, path.with_name("again.safetensors"))
    assert torch.equal(again.step(0), session.step(0))


def test_a_session_of_an_int8_pipeline_goes_on(path):
    pipe = int8(pipeline())
    session = start(pipe)
    session.step(0)
    session.save(path)
    assert torch.equal(FARSession.load(pipe, path).step(1), session.step(1))


def test_a_flipped_bit_is_told(path):
    pipe = pipeline()
    start(pipe).save(path)
    content = path.read_bytes()
    for place in (len(content) // 2, len(content) - 1, content.index(b"num_context_frames") + 22):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            FARSession.load(pipe, path)


def test_a_save_that_is_killed_leaves_nothing_under_the_name_of_the_file(path, monkeypatch):
    session = start(pipeline())
    save_file_of_safetensors = session_file.save_file

    def look(*args, **kwargs):
        assert not path.exists()
        save_file_of_safetensors(*args, **kwargs)
        assert not path.exists()

    monkeypatch.setattr(session_file, "save_file", look)
    session.save(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with pytest.raises(OSError, match="is no folder"):
        session.save(path.parent / "missing" / "session.safetensors")


def test_a_full_disk_is_named_with_the_file_and_the_room_that_is_left(path, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(session_file, "save_file", fail)
    with pytest.raises(OSError, match=f"{path}.*No space left on device.*MiB are free"):
        start(pipeline()).save(path)
    assert list(path.parent.iterdir()) == []


NAN = float("nan")


def set_fact(*place_and_value):
    """A change of one fact, by the names that lead to it."""
    *place, name, value = place_and_value

    def change(facts, tensors):
        for each in place:
            facts = facts[each]
        facts[name] = value

    return change


def poison(facts, tensors):
    tensors["past.keys"].view(-1)[-1] = NAN


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda facts, tensors: [[]], "a session of version None"),
        (lambda facts, tensors: "null", "a session of version None"),
        (set_fact("num_frames", -5), "`num_frames` is -5"),
        (set_fact("num_frames", 10**9), "999999997 of 1000000000 frames are still to be written"),
        (set_fact("clock", "num_frames", 10**9), "has forgotten"),
        (set_fact("clock", "cache", "num_frames", 10**9), "the cache's clock is"),
        (set_fact("config", "num_inference_steps", 0), "`num_inference_steps` is 0"),
        (set_fact("config", "num_inference_steps", 10**9), "`num_inference_steps` is 1000000000; .* to 1000"),
        (set_fact("config", "guidance_scale", NAN), "NaN is no number of JSON"),
        (set_fact("config", "guidance_scale", 1e999), "Infinity is no number of JSON"),
        (set_fact("config", "guidance_scale", "2"), "`guidance_scale` is '2'"),
        (set_fact("config", "guidance_scale", 1.0), "`past.* is .*; it must be"),
        (set_fact("config", "cache_options", "max_long_frames", 0), "`num_sink_frames` is 0"),
        (set_fact("config", "cache_options", None), "`cache_options` is None"),
        (set_fact("made_by", []), "lacks what is known of its transformer"),
        (set_fact("latency", "step_seconds", ["soon"]), "`step_seconds` is"),
        (set_fact("noise_device", []), "`noise_states` holds 2 generators of \\[\\]"),
        (poison, "`past.keys` has NaN"),
        (
            lambda facts, tensors: tensors.update({"past.keys": tensors["past.keys"][:, :, :-1].clone()}),
            "`past.keys` is",
        ),
        (lambda facts, tensors: tensors["frame.1.led_by"].fill_(7), "this model's actions are"),
        (lambda facts, tensors: tensors["noise_states"].zero_(), "states of the noise generators are none of"),
        (lambda facts, tensors: tensors.__delitem__("frame.0.latents"), "the first frame is missing"),
        (lambda facts, tensors: tensors.update(more=torch.ones(1)), r"the unknown ones \['more'\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_memory_is_taken(change, message, path, monkeypatch):
    pipe = pipeline()
    session = start(pipe, num_inference_steps=1)
    session.step(0)
    session.save(path)
    change_file(path, change)
    monkeypatch.setattr(FARKVCache, "make_room", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=message):
        FARSession.load(pipe, path)


def places(facts, place=()):
    """Every place in nested facts."""
    for name, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
        yield (*place, name)
        if isinstance(value, (dict, list)):
            yield from places(value, (*place, name))


VALUES = [-5, -1, 0, 1, 2, 3, 10**9, 10**40, 0.5, -0.5, NAN, True, False, None, "", "cpu", "cuda", "exact", "rolling"]
VALUES += ["pil", [], [None], ["cpu"], [[]], {}, {"scale": 0.5}, {"scale": NAN}]
TENSOR_CHANGES = [
    lambda tensor: tensor[:0],
    lambda tensor: tensor[None],
    lambda tensor: torch.cat([tensor, tensor]),
    lambda tensor: tensor.flip(0) * 0 - 1 if tensor.dtype == torch.int64 else tensor.bool(),
    lambda tensor: tensor.transpose(0, -1).contiguous(),
    lambda tensor: tensor.double(),
    lambda tensor: torch.full_like(tensor, NAN) if tensor.is_floating_point() else torch.full_like(tensor, 99),
    lambda tensor: torch.zeros(()),
]


@pytest.fixture(scope="module")
def saved_sessions(tmp_path_factory):
    """Pipelines, with files of sessions of many kinds."""
    folder, pipes = tmp_path_factory.mktemp("sessions"), []
    for number, (config, options) in enumerate(
        [
            ({}, {"max_long_frames": 3, "max_history": 4}),
            ({}, {"short_cache": "rolling"}),
            ({"long_patch_size": None}, {}),
        ]
    ):
        pipe = pipeline(**config)
        session = start(pipe, num_inference_steps=1, **options)
        go_on(session, walk(pipe)[1], 0, 4)
        session.save(folder / f"{number}.safetensors")
        pipes.append((pipe, folder / f"{number}.safetensors"))
    pipe = pipeline(num_actions=None, action_shift=0)
    pipe.start_session(height=8, width=12, num_inference_steps=1).save(folder / "empty.safetensors")
    return [*pipes, (pipe, folder / "empty.safetensors")]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_stranger_writes_into_a_file_it_is_refused_or_goes_on(data, saved_sessions, tmp_path):
    pipe, original = data.draw(st.sampled_from(saved_sessions), label="file")
    path = tmp_path / "changed.safetensors"
    path.write_bytes(original.read_bytes())

    def change(facts, tensors):
        if data.draw(st.integers(0, 3)):
            for _ in range(data.draw(st.integers(1, 2))):
                # Most of the places are what made the session; those are compared as a whole.
                known = [place for place in places(facts) if place[0] != "made_by" or len(place) < 3]
                *outer, last = data.draw(st.sampled_from(known), label="place")
                target = facts
                for name in outer:
                    target = target[name]
                if data.draw(st.booleans(), label="left out") and isinstance(target, dict):
                    del target[last]
                else:
                    target[last] = copy.deepcopy(data.draw(st.sampled_from(VALUES), label="value"))
        else:
            name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
            tensors[name] = data.draw(st.sampled_from(TENSOR_CHANGES), label="change")(tensors[name]).clone()

    change_file(path, change)
    try:
        session = FARSession.load(pipe, path)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 5000
    else:
        for _ in range(2):
            session.step(0 if pipe.transformer.takes_actions else None)
        session.rewind(min(1, session.num_rewindable))
    finally:
        path.unlink()


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


def test_a_session_of_one_sample_is_saved_with_the_actions_of_its_context(path):
    pipe = pipeline()
    session = pipe.start_session(
        video=torch.rand(1, 3, 3, 8, 12), actions=torch.tensor([[1, 2]]), num_inference_steps=1, output_type="latent"
    )
    session.save(path)
    assert torch.equal(FARSession.load(pipe, path).step(0), session.step(0))
