import torch

from diffusers_far.baselines.token_ar import CodeSampling, draw_uniform


def frequencies(sampling: CodeSampling, logits: torch.Tensor, num_draws: int = 20_000) -> torch.Tensor:
    """How often each code is drawn from one row of logits."""
    uniform = draw_uniform(1, num_draws, torch.Generator().manual_seed(0))[0]
    codes = sampling(logits.expand(num_draws, -1), uniform)
    return torch.bincount(codes, minlength=len(logits)) / num_draws


def test_codes_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(0)
        torch.testing.assert_close(
            frequencies(CodeSampling(temperature), logits), expected.float(), rtol=0, atol=0.015
        )


def test_top_k_and_top_p_rule_the_others_out():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log() + 3
    assert (frequencies(CodeSampling(top_k=1), logits) > 0).tolist() == [True, False, False, False]
    assert (frequencies(CodeSampling(top_p=0.6), logits) > 0).sum() == 2


def test_a_code_of_no_probability_is_not_hit_at_the_ends_of_the_range():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    largest = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    assert CodeSampling()(logits, torch.zeros(1)).item() == 1
    assert CodeSampling()(logits, largest[None]).item() == 2


def test_temperature_zero_is_the_limit_of_small_temperatures():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    uniform = draw_uniform(1, 50, torch.Generator().manual_seed(1))[0]
    assert torch.equal(CodeSampling(0)(logits, uniform), CodeSampling(1e-6)(logits, uniform))


def test_a_single_generator_and_a_list_of_one_draw_the_same():
    alone, listed = torch.Generator().manual_seed(3), [torch.Generator().manual_seed(3)]
    assert torch.equal(draw_uniform(1, 5, alone), draw_uniform(1, 5, listed))
