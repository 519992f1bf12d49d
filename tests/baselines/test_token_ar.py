import subprocess
import sys

import pytest
import torch
from local_hub import run_python
from transformers import AutoConfig, AutoModel

from diffusers_far import TokenARConfig, TokenARForVideo
from diffusers_far.models.frames import shift_actions


DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # As initialised by default the logits would be all but equal, and so would what a test compares.
    "initializer_range": 0.5,
}


def tiny_token_ar(seed: int = 0, **overrides) -> TokenARForVideo:
    torch.manual_seed(seed)
    config = {"num_codes": 13, "tokens_per_frame": 4, "num_actions": 3, "decoder": dict(DECODER)}
    return TokenARForVideo(TokenARConfig(**config | overrides)).eval()


def random_codes(num_frames: int = 3, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(13, (batch_size, num_frames, 4), generator=torch.Generator().manual_seed(seed))


def random_actions(num_frames: int = 3, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, (batch_size, num_frames), generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def logits_of(model: TokenARForVideo, codes: torch.Tensor, actions: torch.Tensor, mask=None) -> torch.Tensor:
    return model(codes, actions, mask).logits


def test_one_vocabulary_holds_codes_then_actions_then_the_null_token():
    model = tiny_token_ar()
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    codes, actions = random_codes(batch_size=1), torch.tensor([[0, 2, 1]])
    logits_of(model, codes, actions, torch.tensor([[False, True, True]]))
    tokens = seen[0].view(3, 5)
    assert tokens[:, 0].tolist() == [16, 13 + 2, 13 + 1]
    assert torch.equal(tokens[:, 1:], codes[0])
    assert model.decoder.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 17


def test_only_codes_can_be_predicted():
    assert logits_of(tiny_token_ar(), random_codes(), random_actions()).shape == (2, 3, 4, 13)


def test_a_code_changes_no_logits_but_those_after_it():
    model, codes, actions = tiny_token_ar(), random_codes(), random_actions()
    before = logits_of(model, codes, actions).flatten(1, 2)
    for place in range(12):
        changed = codes.flatten(1).clone()
        changed[:, place] = (changed[:, place] + 1) % 13
        after = logits_of(model, changed.view(2, 3, 4), actions).flatten(1, 2)
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        assert place == 11 or not torch.equal(after[:, place + 1 :], before[:, place + 1 :])


def test_an_action_changes_the_frame_that_it_led_to_and_no_frame_before():
    model, codes, actions = tiny_token_ar(), random_codes(), random_actions()
    before = logits_of(model, codes, actions)
    for frame in range(3):
        changed = actions.clone()
        changed[:, frame] = (changed[:, frame] + 1) % 3
        after = logits_of(model, codes, changed)
        assert torch.equal(after[:, :frame], before[:, :frame])
        assert (after[:, frame] != before[:, frame]).any(dim=-1).all()


def test_a_dropped_action_is_the_null_token_whatever_it_was():
    model, codes, mask = tiny_token_ar(), random_codes(), torch.tensor([[False, True, False]] * 2)
    actions, others = random_actions(), random_actions(seed=1)
    others[:, 1] = actions[:, 1]
    assert not torch.equal(actions, others)
    assert torch.equal(logits_of(model, codes, actions, mask), logits_of(model, codes, others, mask))
    assert not torch.equal(logits_of(model, codes, actions, mask), logits_of(model, codes, actions))


def test_the_loss_is_the_cross_entropy_of_the_codes_that_count():
    model, codes, actions = tiny_token_ar(), random_codes(), random_actions()
    labels = codes.clone()
    labels[:, 0] = -100
    loss = model(codes, actions, labels=labels).loss
    surprise = -logits_of(model, codes, actions).log_softmax(-1).gather(-1, codes[..., None])
    torch.testing.assert_close(loss, surprise[:, 1:].mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model, codes, actions = tiny_token_ar().train(), random_codes(), random_actions()
    gradients = []
    for enable in (lambda: None, model.activation_checkpointing_enable):
        enable()
        model.zero_grad()
        model(codes, actions, labels=codes).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert model.is_activation_checkpointing
    torch.testing.assert_close(*gradients)


def test_frames_fed_one_by_one_to_a_cache_give_the_logits_of_all_at_once():
    model, codes, actions = tiny_token_ar(), random_codes(), random_actions()
    cache, parts = None, []
    with torch.no_grad():
        for frame in range(3):
            now = slice(frame, frame + 1)
            output = model(codes[:, now], actions[:, now], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(model, codes, actions), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_context_frames", [0, 1, 3])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 5}], ids=["greedy", "top-k"])
def test_cached_generation_equals_uncached(num_context_frames, sampling):
    model = tiny_token_ar()
    context, actions = random_codes(num_context_frames), random_actions(num_context_frames + 3)
    cached, uncached = (
        model.generate_frames(context, actions, 3, generator=generators(0, 1), use_cache=use_cache, **sampling)
        for use_cache in (True, False)
    )
    assert cached.shape == (2, 3, 4) and cached.dtype == torch.int64
    assert torch.equal(cached, uncached)


def test_greedy_codes_are_the_likeliest_of_a_full_pass_over_them():
    model, context, actions = tiny_token_ar(), random_codes(), random_actions(5)
    new = model.generate_frames(context, actions, 2, temperature=0.0)
    fed, mask = shift_actions(actions, 1, 5)
    logits = logits_of(model, torch.cat([context, new], 1), fed, mask)
    assert torch.equal(new, logits[:, 3:].argmax(-1))


def test_greedy_generation_is_the_same_every_time_and_needs_no_seed():
    model, context, actions = tiny_token_ar(), random_codes(), random_actions(5)
    first, again = (model.generate_frames(context, actions, 2, temperature=0.0) for _ in range(2))
    assert torch.equal(first, again)


def test_the_same_seeds_give_the_same_video_and_others_another():
    model, context, actions = tiny_token_ar(), random_codes(), random_actions(5)
    first, again, other = (
        model.generate_frames(context, actions, 2, generator=generators(*seeds)) for seeds in ((0, 1), (0, 1), (0, 2))
    )
    assert torch.equal(first, again)
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_a_video_with_its_own_generator_does_not_depend_on_the_batch():
    model, context, actions = tiny_token_ar(), random_codes(), random_actions(5)
    together = model.generate_frames(context, actions, 2, generator=generators(0, 1))
    alone = model.generate_frames(context[1:], actions[1:], 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(together[1:], alone)


def test_the_last_action_leads_out_of_the_video_and_others_matter():
    model, context, actions = tiny_token_ar(), random_codes(), random_actions(5)
    with_last = model.generate_frames(context, actions, 2, temperature=0.0)
    assert torch.equal(with_last, model.generate_frames(context, actions[:, :4], 2, temperature=0.0))
    videos = set()
    for action in range(3):
        actions[:, 2] = action
        videos.add(str(model.generate_frames(context, actions, 2, temperature=0.0).tolist()))
    assert len(videos) == 3


def test_generation_never_changes_its_arguments():
    model, context, actions = tiny_token_ar(), random_codes(), random_actions(5)
    model.generate_frames(context, actions, 2)
    assert torch.equal(context, random_codes()) and torch.equal(actions, random_actions(5))


def test_a_model_without_actions_opens_every_frame_with_the_null_token():
    model = tiny_token_ar(num_actions=None)
    assert model.config.null_token == 13 and model.config.vocab_size == 14
    assert model.generate_frames(random_codes(), num_frames=2, temperature=0.0).shape == (2, 2, 4)
    with pytest.raises(ValueError, match="`actions` was given"):
        model(random_codes(), random_actions())


@pytest.mark.parametrize("load", [TokenARForVideo.from_pretrained, AutoModel.from_pretrained], ids=["own", "auto"])
def test_a_saved_model_comes_back_equal_to_the_bit(tmp_path, load):
    model = tiny_token_ar()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is TokenARForVideo and not loaded.training
    expected, weights = model.state_dict(), loaded.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(*(logits_of(each, random_codes(), random_actions()) for each in (model, loaded)))


def test_a_saved_config_comes_back_equal_with_its_decoder(tmp_path):
    config = tiny_token_ar(trained_frames=16).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TokenARConfig
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()
    assert loaded.decoder.model_type == "llama" and loaded.decoder.vocab_size == 17


def test_another_decoder_of_transformers_is_as_good(tmp_path):
    model = tiny_token_ar(decoder=DECODER | {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1})
    model.save_pretrained(tmp_path)
    loaded = TokenARForVideo.from_pretrained(tmp_path)
    assert type(loaded.decoder).__name__ == "Qwen3Model"
    context, actions = random_codes(), random_actions(4)
    assert torch.equal(*(each.generate_frames(context, actions, temperature=0.0) for each in (model, loaded)))


def test_the_decoder_config_that_was_given_stays_as_it_is():
    decoder = AutoConfig.for_model("llama", **DECODER)
    tiny_token_ar(decoder=decoder)
    assert decoder.vocab_size == 32000 and decoder.bos_token_id == 1


def test_incomplete_weights_are_refused_and_the_keys_named(tmp_path):
    model = tiny_token_ar()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "code_head.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks code_head.weight.*Fetch the folder again"):
        TokenARForVideo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_codes", 0),
        ("num_codes", True),
        ("num_codes", 10**12),
        ("tokens_per_frame", 1.5),
        ("num_actions", -1),
        ("trained_frames", float("nan")),
    ],
)
def test_a_config_of_no_sense_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}.*from 1"):
        TokenARConfig(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("hidden_size", -1),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("intermediate_size", "many"),
        ("rope_theta", float("nan")),
        ("rms_norm_eps", float("inf")),
    ],
)
@pytest.mark.parametrize(
    "form", [dict, lambda decoder: AutoConfig.for_model("llama", **decoder)], ids=["dict", "config"]
)
def test_a_decoder_of_no_sense_is_refused(name, value, form):
    try:
        decoder = form(DECODER | {name: value})
    except Exception:
        return  # transformers refuses it by itself
    with pytest.raises(ValueError, match=f"`decoder.{name}` is {value!r}"):
        TokenARConfig(num_codes=13, tokens_per_frame=4, decoder=decoder)


def test_a_decoder_that_is_no_config_is_refused():
    with pytest.raises(ValueError, match="`decoder` is 'llama'; give a config"):
        TokenARConfig(decoder="llama")


def test_a_decoder_larger_than_the_memory_is_refused_before_it_is_made():
    decoder = DECODER | {"num_hidden_layers": 1000, "hidden_size": 2**16, "head_dim": 16}
    with pytest.raises(ValueError, match="`hidden_size` 65536, `num_hidden_layers` 1000.* GiB .* this machine has"):
        tiny_token_ar(decoder=decoder)


@pytest.mark.parametrize("name, content", [("config.json", b"[]"), ("config.json", b"{"), ("model.safetensors", b"{")])
def test_a_broken_file_is_named_with_the_cure(tmp_path, name, content):
    tiny_token_ar().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{tmp_path}.*download or copy it again"):
        TokenARForVideo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"codes": torch.zeros(2, 4, dtype=torch.int64)}, r"`codes` has shape \(2, 4\).*\(batch, frames, 4\)"),
        ({"codes": torch.zeros(2, 3, 5, dtype=torch.int64)}, r"`codes` has shape \(2, 3, 5\).*encode_codes"),
        ({"codes": torch.zeros(2, 3, 4)}, "`codes` has type torch.float32.*torch.int64"),
        ({"codes": torch.full((2, 3, 4), 13)}, r"`codes` has values from 13 to 13, but `num_codes` is 13.*\[0, 13\)"),
        ({"actions": None}, r"`actions` is None.*shape \(2, 3\)"),
        ({"actions": torch.zeros(2, 2, dtype=torch.int64)}, r"`actions` has shape \(2, 2\).*\(2, 3\)"),
        ({"actions": torch.full((2, 3), -1)}, "`actions` has values from -1 to -1, but `num_actions` is 3"),
        ({"action_mask": torch.ones(2, 3)}, "`action_mask` has .* type torch.float32.*torch.bool"),
    ],
)
def test_bad_inputs_are_refused_with_value_rule_and_cure(changed, message):
    with pytest.raises(ValueError, match=message):
        tiny_token_ar()(**{"codes": random_codes(), "actions": random_actions()} | changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_frames": 0}, "`num_frames` is 0.*from 1"),
        ({"actions": random_actions(3)}, "`actions` has shape .*there are 5 frames"),
        ({"temperature": -1}, "`temperature` is -1.*0 for the likeliest"),
        ({"top_k": 0}, "`top_k` is 0.*from 1"),
        ({"top_p": 1.5}, "`top_p` is 1.5.*at most 1"),
        ({"generator": [torch.Generator()]}, "`generator` has 1 for a batch of 2.*one for each"),
    ],
)
def test_bad_arguments_of_generation_are_refused_with_value_rule_and_cure(changed, message):
    arguments = {"codes": random_codes(), "actions": random_actions(5), "num_frames": 2}
    with pytest.raises(ValueError, match=message):
        tiny_token_ar().generate_frames(**arguments | changed)


@pytest.mark.full
def test_a_pushed_model_comes_back_equal_by_importing_the_package_alone(hub, tmp_path):
    model = tiny_token_ar()
    model.save_pretrained(tmp_path / "saved")
    context, actions = random_codes(), random_actions(5)
    expected = model.generate_frames(context, actions, 2, temperature=0.0)
    torch.save((context, actions, expected), tmp_path / "video.pt")
    code = """
        import sys, torch, diffusers_far
        from transformers import AutoModel

        torch.set_num_threads(1)  # as in the process that made the video
        folder, video = sys.argv[1:]
        diffusers_far.TokenARForVideo.from_pretrained(folder).push_to_hub("org/token-ar")
        model = AutoModel.from_pretrained("org/token-ar")
        assert type(model) is diffusers_far.TokenARForVideo
        context, actions, expected = torch.load(video)
        assert torch.equal(model.generate_frames(context, actions, 2, temperature=0.0), expected)
    """
    run_python(code, hub, tmp_path / "saved", tmp_path / "video.pt")


@pytest.mark.full
def test_importing_the_package_brings_no_decoder():
    code = "import sys, diffusers_far; print([name for name in sys.modules if 'modeling_llama' in name])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
