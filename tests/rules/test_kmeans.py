"""Spherical k-means: planted directions are found, the objective rises, no centre is lost."""

import pytest
import torch
from cases import normal
from torch.nn import functional

from localgpt_core import VQResidualDir
from localgpt_core.common.seeds import generator
from localgpt_core.matrices.kmeans import spherical_kmeans


def objective(x, centres):
    """Return the mean cosine of each row with its nearest centre, one row at a time."""
    return sum(max(torch.dot(u, c).item() for c in centres) for u in functional.normalize(x, dim=-1)) / len(x)


def test_two_points_and_two_centres_by_hand():
    x = torch.tensor([[3.0, 0.0], [0.0, -5.0], [1.0, 0.0]], dtype=torch.float64)
    centres = spherical_kmeans(x, 2, generator(0))
    assert sorted(centres.tolist()) == [[0.0, -1.0], [1.0, 0.0]]


def test_planted_directions_are_found():
    planted = functional.normalize(normal(5, 12), dim=-1)
    members = torch.arange(200) % 5
    lengths = torch.rand(200, 1, generator=generator("lengths"), dtype=torch.float64) * 9 + 1
    x = lengths * (planted[members] + 0.05 * normal(200, 12, seed=1))
    # A start that is drawn may leave a direction out: four times as many centres as directions do not.
    centres = spherical_kmeans(x, 20, generator(1))
    best = (planted @ centres.T).max(dim=1)
    assert (best.values > 0.99).all() and best.indices.unique().numel() == 5
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(20, dtype=torch.float64))


def test_centres_serve_better_than_random_directions_and_better_than_their_start():
    x = normal(300, 6)
    centres = spherical_kmeans(x, 16, generator(2))
    start = functional.normalize(x, dim=-1)[torch.randperm(300, generator=generator(2))[:16]]
    random = functional.normalize(normal(16, 6, seed=3), dim=-1)
    assert objective(x, centres) > max(objective(x, start), objective(x, random)) + 0.02


def test_no_centre_is_lost():
    # Sixty copies of one direction: without a new start, all but a few of the centres would be empty.
    x = torch.cat((normal(1, 6).repeat(60, 1), normal(9, 6, seed=1)))
    centres = spherical_kmeans(x, 10, generator(0))
    assert centres.isfinite().all()
    torch.testing.assert_close(objective(x, centres), 1.0, rtol=0, atol=1e-12)


def test_draws_depend_on_the_generator_only():
    x = normal(80, 6)
    torch.manual_seed(1)
    first, state = spherical_kmeans(x, 7, generator("a")), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, spherical_kmeans(x, 7, generator("a")))
    assert not torch.equal(first, spherical_kmeans(x, 7, generator("b")))


def test_there_must_be_as_many_vectors_as_centres():
    assert spherical_kmeans(normal(4, 3), 4, generator(0)).shape == (4, 3)
    with pytest.raises(ValueError, match="k=5: must be at most the 4 vectors to cluster"):
        spherical_kmeans(normal(4, 3), 5, generator(0))


def test_a_codebook_is_fitted_to_tokens_of_any_leading_shape():
    vq, h = VQResidualDir(6, 8).double(), normal(5, 30, 6)
    before = vq(h)
    vq.fit(h, generator(0))
    assert torch.equal(vq.codebook, spherical_kmeans(h.flatten(0, 1), 8, generator(0)))
    assert (vq(h) - h).norm() < (before - h).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_vectors_are_clustered_in_float32_under_autocast_too(dtype):
    # Sums of many vectors: in half precision they stop growing.
    x = normal(3000, 6, dtype=dtype)
    expected = spherical_kmeans(x.float(), 7, generator(0))
    assert torch.equal(spherical_kmeans(x, 7, generator(0)), expected.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spherical_kmeans(x.float(), 7, generator(0)), expected)
    vq = VQResidualDir(6, 7)
    vq.fit(x, generator(0))
    assert torch.equal(vq.codebook, expected.to(dtype).float())
