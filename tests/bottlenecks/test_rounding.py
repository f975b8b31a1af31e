"""Plain rounding of a token's numbers: levels, scale, and both derivatives."""

import pytest
import torch
from cases import B, T, make_batch, make_model, normal

from localgpt_core.bottlenecks import UniformRounding
from localgpt_core.common import exact_derivatives

C = 12


def test_two_bits_by_hand():
    h = torch.tensor([[3.0, -0.2, 1.9, -3.0], [0.0, 6.0, -4.1, 2.0]])
    # Levels -3, -1, 1, 3 and -6, -2, 2, 6.
    expected = [[3.0, -1.0, 1.0, -3.0], [2.0, 6.0, -6.0, 2.0]]
    torch.testing.assert_close(UniformRounding(2)(h), torch.tensor(expected))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_goes_to_the_nearest_of_the_levels(bits):
    h = normal(B, T, C)
    out = UniformRounding(bits)(h)
    a = h.abs().amax(-1, keepdim=True)
    levels = a * torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    distance = (h[..., None] - levels[..., None, :]).abs().amin(-1)
    torch.testing.assert_close((out - h).abs(), distance, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        (out[..., None] - levels[..., None, :]).abs().amin(-1), 0 * h, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(UniformRounding(bits)(out), out, rtol=1e-12, atol=1e-12)


def test_rounding_is_straight_through():
    h, g = normal(B, T, C).requires_grad_(True), normal(B, T, C, seed=1)
    assert torch.equal(torch.autograd.grad(UniformRounding(3)(h), h, g)[0], g)


def test_the_exact_derivative_is_by_the_scale_alone():
    module, h, g = UniformRounding(3), normal(T, C).requires_grad_(True), normal(T, C, seed=1)
    with exact_derivatives(module):
        out = module(h)
        (found,) = torch.autograd.grad(out, h, g)
    assert torch.equal(out, module(h))
    place, h = h.abs().argmax(-1, keepdim=True), h.detach()
    a = h.gather(-1, place)
    expected = torch.zeros_like(h).scatter(-1, place, (g * out.detach() / a).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(C,), (0, C), (2, 1, 3, C)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shape_and_type_and_a_token_of_zeros(shape, dtype):
    h = normal(*shape, dtype=dtype)
    out = UniformRounding(4)(h)
    assert out.shape == h.shape and out.dtype == dtype
    assert torch.equal(out, UniformRounding(4)(h.float()).to(dtype)) or dtype == torch.float64
    assert torch.equal(UniformRounding(4)(torch.zeros_like(h)), torch.zeros_like(h))


def test_the_stream_behind_each_block_is_rounded_last():
    model, idx = make_model(resid_bits=2, bottleneck_at="0"), make_batch()[0]
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(idx)
    numbers = [len((token / token.abs().max()).round(decimals=6).unique()) for token in seen[0].flatten(0, 1)]
    assert max(numbers) <= 4 < len(seen[1][0, 0].unique())
    assert set(model.state_dict()) == set(make_model().state_dict()) and not model.config.is_exact


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match=f"bits={bits!r}: must be an integer of at least 1 and at most 8"):
        UniformRounding(bits)
