import pytest
import torch

from diffusers_far.evaluation.metrics import Gaussian, frechet_distance


def random_covariance(size: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / size


def matrix_square_root(matrix: torch.Tensor) -> torch.Tensor:
    """Of a matrix with positive eigenvalues, symmetric or not."""
    eigenvalues, eigenvectors = torch.linalg.eig(matrix)
    return (eigenvectors @ torch.diag(eigenvalues.sqrt()) @ torch.linalg.inv(eigenvectors)).real


def test_the_distance_is_that_of_the_formula():
    means = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = random_covariance(6, 1), random_covariance(6, 2)
    expected = (means[0] - means[1]).square().sum() + torch.trace(
        first + second - 2 * matrix_square_root(first @ second)
    )
    ours = frechet_distance(Gaussian.of_moments(means[0], first), Gaussian.of_moments(means[1], second))
    assert ours == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("means", "deviations", "expected"),
    [((0, 3), (2, 2), 9), ((0, 0), (2, 5), 9), ((1, 2), (1, 3), 5), ((0, 0), (0, 4), 16)],
)
def test_in_one_dimension_it_is_the_differences_of_means_and_deviations_squared(means, deviations, expected):
    first, second = (
        Gaussian.of_moments(torch.tensor([float(mean)]), torch.tensor([[float(deviation) ** 2]]))
        for mean, deviation in zip(means, deviations)
    )
    assert frechet_distance(first, second) == pytest.approx(expected)


@pytest.mark.parametrize("num_samples", [5, 50])
def test_samples_and_their_moments_give_the_same_with_fewer_samples_than_features_too(num_samples):
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(num_samples, 12, generator=generator, dtype=torch.float64) + shift for shift in (0, 0.5)]
    by_moments = [Gaussian.of_moments(each.mean(0), torch.cov(each.T)) for each in samples]
    by_samples = [Gaussian.of_samples(each) for each in samples]
    assert frechet_distance(*by_samples) == pytest.approx(frechet_distance(*by_moments), rel=1e-6)
    assert by_samples[0].num_samples == num_samples


@pytest.mark.parametrize("num_samples", [5, 50])
def test_equal_samples_have_no_distance_and_the_order_does_not_matter(num_samples):
    generator = torch.Generator().manual_seed(0)
    first = 1000 + torch.randn(num_samples, 12, generator=generator)
    second = torch.randn(num_samples, 12, generator=generator)
    equal = frechet_distance(Gaussian.of_samples(first), Gaussian.of_samples(first.flip(0)))
    assert 0 <= equal < 1e-8
    there = frechet_distance(Gaussian.of_samples(first), Gaussian.of_samples(second))
    assert there == pytest.approx(frechet_distance(Gaussian.of_samples(second), Gaussian.of_samples(first)))


def test_a_shift_counts_with_its_square_whatever_the_covariance():
    samples = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    distance = frechet_distance(Gaussian.of_samples(samples), Gaussian.of_samples(samples + 2))
    assert distance == pytest.approx(8 * 4, rel=1e-5)


@pytest.mark.parametrize(
    ("features", "message"),
    [(torch.zeros(1, 4), "two at least"), (torch.zeros(4), "two at least"), (torch.full((3, 2), torch.nan), "NaN")],
)
def test_what_is_no_sample_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Gaussian.of_samples(features)


def test_features_of_two_networks_are_not_compared():
    first, second = (Gaussian.of_samples(torch.randn(4, size)) for size in (3, 5))
    with pytest.raises(ValueError, match="one network"):
        frechet_distance(first, second)
