"""Product codes, fixed norms, and what takes the place of a codebook's derivative."""

import copy
import math

import pytest
import torch
from cases import B, T, make_batch, make_model, normal

from localgpt_core import VQResidualDir
from localgpt_core.bottlenecks.codebook import BACKWARDS, SHORTEST
from localgpt_core.common import exact_derivatives
from localgpt_core.common.seeds import generator
from localgpt_core.config import allowed
from localgpt_core.matrices import spherical_kmeans

C, K = 12, 5
every_group = pytest.mark.parametrize("groups", [1, 3])
every_norm = pytest.mark.parametrize("rms", allowed.CODE_NORMS)


def value_and_gradient(vq, h, g):
    h = h.detach().clone().requires_grad_(True)
    out = vq(h)
    return out.detach(), torch.autograd.grad(out, h, g)[0]


def parts(x, groups):
    """Return x (..., C) as (..., groups, C / groups)."""
    return torch.stack(x.chunk(groups, dim=-1), dim=-2)


def by_code(vq, h):
    """Return the unit vector and the code of every group of h, found one by one: (..., groups, d) each."""
    groups = vq.codebook.shape[0] if vq.codebook.ndim == 3 else 1
    books = vq.codebook.view(groups, -1, h.shape[-1] // groups)
    u = parts(h, groups)
    u = u / u.norm(dim=-1, keepdim=True)
    best = [(u[..., j, :] @ books[j].T).argmax(-1) for j in range(groups)]
    return u, torch.stack([books[j][best[j]] for j in range(groups)], dim=-2)


def on_the_sphere(vq):
    """Return ``vq`` in float64, with codes of norm 1 to its last digits."""
    vq = vq.double()
    vq.codebook /= vq.codebook.norm(dim=-1, keepdim=True)
    return vq


# ------------------------------------------------------------ by hand

# Two groups of two units: |h| is 5 and 2, u is (0.6, 0.8) and (0, -1), the codes are (0, 1) and (-1, 0).
HAND = torch.tensor([3.0, 4.0, 0.0, -2.0], dtype=torch.float64)
CODES = [[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]]
GRADIENT = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
ROOT = math.sqrt(2)
BY_HAND = {
    ("token", "identity"): [1, 0, 0, 1],
    ("token", "tangent"): [0.64, -0.48, 0, 0],
    ("token", "rotation"): [0.8, -0.6, -1, 0],
    ("fixed", "identity"): [1, 0, 0, 1],
    ("fixed", "tangent"): [0.64 * ROOT / 5, -0.48 * ROOT / 5, 0, 0],
    ("fixed", "rotation"): [0.8 * ROOT / 5, -0.6 * ROOT / 5, -ROOT / 2, 0],
}


@pytest.mark.parametrize(("rms", "backward"), BY_HAND)
def test_two_groups_by_hand(rms, backward):
    vq = VQResidualDir(4, 2, groups=2, rms=rms, backward=backward).double()
    vq.codebook.copy_(torch.tensor(CODES))
    out, grad = value_and_gradient(vq, HAND, GRADIENT)
    expected = [0, 5, -2, 0] if rms == "token" else [0, ROOT, -ROOT, 0]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    expected = torch.tensor(BY_HAND[rms, backward], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    assert vq.codes(HAND).tolist() == [1, 0]


# ------------------------------------------------------------ forward


@every_group
@every_norm
def test_every_group_takes_its_nearest_code_and_has_its_norm(groups, rms):
    vq, h = on_the_sphere(VQResidualDir(C, K, groups=groups, rms=rms)), 3 * normal(B, T, C)
    out, (_, c) = vq(h), by_code(vq, h)
    sizes = parts(h, groups).norm(dim=-1, keepdim=True) if rms == "token" else math.sqrt(C / groups)
    torch.testing.assert_close(parts(out, groups), c * sizes, rtol=1e-12, atol=1e-12)
    assert vq.codes(h).shape == ((B, T) if groups == 1 else (B, T, groups)) and vq.n_codes == K
    if rms == "fixed":
        torch.testing.assert_close(out.square().mean(dim=-1), torch.ones(B, T, dtype=torch.float64))
        assert torch.equal(vq(7 * h), out)


def test_one_group_with_its_norm_and_the_identity_is_what_it_was_to_the_last_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        vq, h, g = VQResidualDir(C, K), normal(B, T, C, dtype=dtype), normal(B, T, C, seed=1, dtype=dtype)
        out, grad = value_and_gradient(vq, h, g)
        x = h.float() if dtype == torch.bfloat16 else h
        book = vq.codebook.to(x.dtype)
        codes = torch.nn.functional.linear(x, book).argmax(-1)
        assert torch.equal(out, (book[codes] * x.norm(dim=-1, keepdim=True)).to(dtype))
        assert torch.equal(grad, g) and vq.codebook.shape == (K, C)


@pytest.mark.parametrize("shape", [(C,), (0, C), (2, 1, 3, C)], ids=str)
@pytest.mark.parametrize("backward", ["identity", *BACKWARDS])
def test_product_codes_of_any_leading_shape(shape, backward):
    vq = VQResidualDir(C, K, groups=3, rms="fixed", backward=backward).double()
    h, g = normal(*shape), normal(*shape, seed=1)
    out, grad = value_and_gradient(vq, h, g)
    rows = value_and_gradient(vq, h.reshape(-1, C), g.reshape(-1, C))
    assert out.shape == grad.shape == h.shape
    torch.testing.assert_close((out, grad), tuple(r.view(h.shape) for r in rows), rtol=1e-12, atol=1e-14)


def test_codes_of_groups_are_drawn_apart_and_follow_the_seed():
    book = VQResidualDir(C, K, groups=3).codebook
    assert book.shape == (3, K, 4) and not torch.equal(book[0], book[1])
    torch.testing.assert_close(book.norm(dim=-1), torch.ones(3, K))
    assert torch.equal(book, VQResidualDir(C, K, groups=3, rms="fixed", backward="tangent").codebook)
    assert not torch.equal(book, VQResidualDir(C, K, seed=0, groups=3).codebook)


def test_every_group_is_fitted_to_its_own_directions():
    vq, h = VQResidualDir(C, K, groups=3).double(), normal(B, 30, C) + 1
    vq.fit(h, generator(3))
    source = generator(3)
    for j, part in enumerate(h.flatten(0, 1).split(4, dim=-1)):
        assert torch.equal(vq.codebook[j], spherical_kmeans(part, K, source))


# ------------------------------------------------------------ backward


@every_group
@every_norm
def test_the_tangent_is_the_derivative_of_the_groups_directions_at_constant_length(groups, rms):
    vq = VQResidualDir(C, K, groups=groups, rms=rms, backward="tangent").double()
    h, g = normal(T, C), normal(T, C, seed=1)
    lengths = parts(h, groups).norm(dim=-1, keepdim=True) if rms == "token" else math.sqrt(C / groups)

    def smooth(x):
        x = parts(x, groups)
        return (lengths * x / x.norm(dim=-1, keepdim=True)).flatten(-2)

    step, expected = 1e-6, torch.empty(T, C, dtype=torch.float64)
    for i in range(C):
        shift = step * torch.eye(C, dtype=torch.float64)[i]
        expected[:, i] = (g * (smooth(h + shift) - smooth(h - shift))).sum(-1) / (2 * step)
    torch.testing.assert_close(value_and_gradient(vq, h, g)[1], expected, rtol=1e-7, atol=1e-9)


@every_norm
def test_the_rotation_turns_each_group_to_its_code_and_keeps_all_else(rms):
    vq, h = on_the_sphere(VQResidualDir(C, K, groups=3, rms=rms, backward="rotation")), normal(T, C)
    u, c = by_code(vq, h)
    sizes = parts(h, 3).norm(dim=-1)
    scale = torch.ones_like(sizes) if rms == "token" else 2 / sizes
    # Row by row of R: the gradient that arrives at unit i is e_i in every group.
    rows = [value_and_gradient(vq, h, torch.eye(4).double()[i].repeat(T, 3))[1] for i in range(4)]
    R = torch.stack([parts(row, 3) for row in rows], dim=-2) / scale[..., None, None]
    eye = torch.eye(4, dtype=torch.float64).expand(T, 3, 4, 4)
    torch.testing.assert_close(R @ R.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(T, 3, dtype=torch.float64))
    torch.testing.assert_close((R @ u[..., None])[..., 0], c, rtol=0, atol=1e-12)
    other = normal(T, 3, 4, seed=2)
    plane = torch.linalg.qr(torch.stack((u, c), dim=-1)).Q
    other = other - (plane @ (plane.mT @ other[..., None]))[..., 0]
    torch.testing.assert_close((R @ other[..., None])[..., 0], other, rtol=0, atol=1e-12)
    g = normal(T, C, seed=1)
    found = parts(value_and_gradient(vq, h, g)[1], 3)
    torch.testing.assert_close(found.norm(dim=-1), scale * parts(g, 3).norm(dim=-1))
    torch.testing.assert_close((found * u).sum(-1), scale * (parts(g, 3) * c).sum(-1))


def test_a_code_opposite_to_its_group_reflects_the_gradient_at_it():
    vq = VQResidualDir(2, 1, backward="rotation").double()
    vq.codebook.copy_(torch.tensor([[-1.0, 0.0]]))
    h = torch.tensor([3.0, 0.0], dtype=torch.float64)
    assert value_and_gradient(vq, h, torch.tensor([1.0, 2.0]).double())[1].tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("backward", ["identity", *BACKWARDS])
@every_norm
def test_groups_of_zeros_and_short_ones_have_finite_gradients(rms, backward):
    vq = VQResidualDir(C, K, groups=3, rms=rms, backward=backward)
    h, g = normal(T, C, dtype=torch.float32), normal(T, C, seed=1, dtype=torch.float32)
    h[:, :4], h[:, 4:8] = 0.0, 1e-20 * h[:, 4:8]
    out, grad = value_and_gradient(vq, h, g)
    assert out.isfinite().all()
    limit = 1 / SHORTEST if rms == "fixed" and backward != "identity" else 1
    sizes = parts(grad, 3).norm(dim=-1) / parts(g, 3).norm(dim=-1)
    assert (sizes[:, :2] <= 1.001 * limit).all()


@every_group
def test_the_exact_derivative_is_by_the_norms_alone(groups):
    h, g = normal(T, C), normal(T, C, seed=1)
    for backward in ("identity", "tangent", "rotation"):
        vq = VQResidualDir(C, K, groups=groups, backward=backward).double()
        u, c = by_code(vq, h)
        with exact_derivatives(vq):
            found = value_and_gradient(vq, h, g)[1]
        expected = (parts(g, groups) * c).sum(-1, keepdim=True) * u
        torch.testing.assert_close(found, expected.flatten(-2), rtol=1e-12, atol=1e-14)
    fixed = VQResidualDir(C, K, groups=groups, rms="fixed").double()
    with exact_derivatives(fixed):
        out, grad = value_and_gradient(fixed, h, g)
    assert torch.equal(grad, torch.zeros_like(g)) and torch.equal(out, fixed(h))


# ------------------------------------------------------------ in a model

GROUPS = {"vq_codes": 5, "vq_groups": 3}


@pytest.mark.parametrize("jvp_update", ["grape", "fdfa"])
def test_feedback_below_a_codebook_follows_the_exact_jacobian_whatever_stands_in_for_it(jvp_update):
    options = {"method": "dfa", "fa_grape": True, "jvp_update": jvp_update, **GROUPS}
    idx, moved = make_batch()[0], []
    for backward in ("identity", "tangent", "rotation"):
        model = make_model(**options, vq_backward=backward)
        before = copy.deepcopy(model.blocks[0].mlp.fc.feedback_weight)
        model.align_feedback("key", idx=idx)
        moved.append(model.blocks[0].mlp.fc.feedback_weight)
        assert not torch.equal(before, moved[-1])
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])
    model = make_model(**options, vq_rms="fixed", vq_backward="tangent")
    model.align_feedback("key", idx=idx)  # no number below a codebook changes a logit
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_the_codes_of_a_model_are_shared_or_not_and_are_in_its_state():
    model = make_model(**GROUPS)
    state = model.state_dict()
    assert state["blocks.0.vq.codebook"].shape == (3, 5, 4)
    assert torch.equal(state["blocks.0.vq.codebook"], state["blocks.1.vq.codebook"])
    own = make_model(**GROUPS, vq_shared=False)
    assert not torch.equal(own.blocks[0].vq.codebook, own.blocks[1].vq.codebook)
    own.load_state_dict(state)
    assert torch.equal(own(make_batch()[0])[0], model(make_batch()[0])[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_model(vq_codes=5).load_state_dict(state)


def test_a_shared_codebook_is_fitted_group_by_group_to_the_streams_of_all_blocks():
    model, idx = make_model(**GROUPS, vq_init="kmeans"), make_batch(rows=4)[0]
    before = model.blocks[0].vq.codebook.clone()
    model.fit_codebooks(idx, "key")
    after = model.blocks[0].vq.codebook
    assert torch.equal(after, model.blocks[1].vq.codebook)
    assert all(not torch.equal(after[j], before[j]) for j in range(3))


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups=0: must be an integer of at least 1 and at most 12"),
        ({"groups": 13}, "groups=13: must be an integer of at least 1 and at most 12"),
        ({"groups": 2.0}, "groups=2.0: must be an integer"),
        ({"groups": 5}, "groups=5: must divide d_model=12"),
        ({"rms": "unit"}, "rms='unit': allowed are 'token', 'fixed'"),
        ({"backward": "exact"}, "backward='exact': allowed are 'identity', 'tangent', 'rotation'"),
    ],
)
def test_what_a_codebook_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VQResidualDir(C, K, **options)


def test_a_configuration_names_what_there_is():
    assert allowed.CODE_BACKWARDS == ("identity", *BACKWARDS)
