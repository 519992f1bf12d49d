import math

import pytest
import torch
from tiny_models import tiny_vq

from diffusers_far.models.codec import nearest_codes
from diffusers_far.training.vae import CodebookRestart, measure_codebook


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def collapsed():
    """A VQ autoencoder of whose 16 codes only one is near to latents, and latents."""
    vq = tiny_vq()
    with torch.no_grad():
        vq.quantize.embedding.weight[1:] += 100
    return vq, torch.randn(2, 4, 8, 8, generator=generator(1))


def test_idle_codes_are_put_onto_latents_after_the_given_steps_and_not_before(collapsed):
    vq, latents = collapsed
    restart, before = CodebookRestart(vq, 3), vq.quantize.embedding.weight.clone()
    assert [restart.step(latents, generator()) for _ in range(2)] == [0, 0]
    assert torch.equal(vq.quantize.embedding.weight, before)
    assert restart.step(latents, generator()) == 15
    after = vq.quantize.embedding.weight
    assert torch.equal(after[0], before[0])
    places = latents.movedim(1, -1).reshape(-1, 4)
    assert all((places == entry).all(-1).any() for entry in after[1:])
    assert len(nearest_codes(vq, latents).unique()) > 8


def test_a_code_in_use_is_never_restarted(collapsed):
    vq, latents = collapsed
    restart = CodebookRestart(vq, 1)
    restart.step(latents, generator())
    used = nearest_codes(vq, latents).unique()
    before = vq.quantize.embedding.weight[used].clone()
    restart.step(latents, generator(1))
    assert torch.equal(vq.quantize.embedding.weight[used], before)


def test_a_resumed_count_restarts_the_same_codes_at_the_same_step(collapsed):
    vq, latents = collapsed
    first = CodebookRestart(vq, 3)
    first.step(latents, generator())
    resumed = CodebookRestart(vq, 3)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.step(latents, generator()) for _ in range(2)] == [0, 15]


def test_a_restart_after_no_step_is_refused():
    with pytest.raises(ValueError, match="`num_idle_steps` is 0.*1 or more"):
        CodebookRestart(tiny_vq(), 0)


def test_perplexity_of_one_code_is_one_and_never_above_the_codes_in_use(collapsed):
    vq, _ = collapsed
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator())
    assert measure_codebook(vq, images.split(2)) == {"codes_used": 1.0, "perplexity": 1.0}
    spread = measure_codebook(tiny_vq(), images.split(2))
    assert 1 < spread["perplexity"] <= spread["codes_used"] <= 16
    assert math.isfinite(spread["perplexity"])
