"""What narrows the residual stream: exactly k winners, a frozen codebook, a frozen subspace."""

import pytest
import torch
from cases import B, T, normal
from reference import nearest

from localgpt_core import FrozenSubspace, HardTopK, VQResidualDir
from localgpt_core.bottlenecks import selection
from localgpt_core.bottlenecks.selection import keep, largest

C, K = 6, 11

# ------------------------------------------------------------ HardTopK


def top_k(x, k, grad_output):
    x = x.detach().clone().requires_grad_(True)
    y = HardTopK.apply(x, k)
    return y.detach(), torch.autograd.grad(y, x, grad_output)[0]


def test_top_k_by_hand():
    x = torch.tensor([[0.1, -3.0, 2.0, 0.0], [5.0, 4.0, -6.0, 1.0]])
    y, grad = top_k(x, 2, torch.arange(1.0, 9.0).view(2, 4))
    assert y.tolist() == [[0.0, -3.0, 2.0, 0.0], [5.0, 0.0, -6.0, 0.0]]
    assert grad.tolist() == [[0.0, 2.0, 3.0, 0.0], [5.0, 0.0, 7.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", range(1, C + 1))
def test_exactly_k_of_largest_magnitude_survive(k, dtype):
    x, g = normal(B, T, C, dtype=dtype), normal(B, T, C, seed=1, dtype=dtype)
    y, grad = top_k(x, k, g)
    kept = y != 0
    assert y.dtype == grad.dtype == dtype
    assert kept.sum(-1).eq(k).all()
    assert torch.equal(y, x * kept) and torch.equal(grad, g * kept)
    losers = x.abs().masked_fill(kept, 0).amax(-1)
    winners = x.abs().masked_fill(~kept, torch.inf).amin(-1)
    assert (losers <= winners).all()


@pytest.mark.parametrize("value", [1.0, -2.0, 0.0])
@pytest.mark.parametrize("k", [1, 3, C])
def test_ties_keep_exactly_k(k, value):
    x = torch.full((B, T, C), value)
    y, grad = top_k(x, k, torch.ones_like(x))
    assert grad.sum(-1).eq(k).all() and set(grad.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(y, x * grad)


@pytest.mark.parametrize("shape", [(C,), (0, C), (2, 1, 3, C)], ids=str)
def test_top_k_of_any_leading_shape(shape):
    x = normal(*shape)
    y, grad = top_k(x, 2, torch.ones_like(x))
    assert y.shape == grad.shape == x.shape
    assert (y != 0).sum(-1).eq(2).all()


def test_top_k_of_a_transposed_input():
    x = normal(C, T).T
    y, grad = top_k(x, 2, normal(C, T, seed=1).T)
    dense = top_k(x.contiguous(), 2, normal(C, T, seed=1).T.contiguous())
    assert torch.equal(y, dense[0]) and torch.equal(grad, dense[1])


def test_a_row_that_is_not_a_number_keeps_k_entries_and_spoils_no_other_row():
    x = normal(T, C)
    expected = top_k(x, 2, torch.ones_like(x))[0]
    x[1, 3] = torch.nan
    y, grad = top_k(x, 2, torch.ones_like(x))
    assert grad.sum(-1).eq(2).all() and y[1].isnan().any()
    others = torch.arange(T) != 1
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("shape", [(T, C), (B, T, C), (0, C)], ids=str)
def test_the_selection_is_a_well_formed_operator(shape):
    torch.library.opcheck(selection._winners_on_the_cpu, (normal(*shape).abs(), 2))
    torch.library.opcheck(selection._winners_on_the_cpu, (torch.ones(shape), 2))
    # Strides of its own: a compiler that expects others fails far from here.
    torch.library.opcheck(
        selection._winners_on_the_cpu, (normal(*shape[::-1], shape[-1]).abs().transpose(0, 1), 2)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_keeps_entries_as_they_are(dtype):
    x, mask = normal(B, T, C).to(dtype), normal(B, T, C, seed=1) > 0
    for a, b in ((x, mask), (x.transpose(0, 2), mask.transpose(0, 2))):
        assert torch.equal(keep(a, b), torch.where(b, a, 0)) and keep(a, b).is_contiguous()
    x[~mask] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(dtype).repeat(x.numel())[: (~mask).sum()]
    kept = keep(x, mask)
    assert torch.equal(kept, torch.where(mask, x, 0)) and kept.isfinite().all()
    torch.library.opcheck(selection._keep_on_the_cpu, (x, mask))
    torch.library.opcheck(selection._keep_on_the_cpu, (x.transpose(0, 1), mask.transpose(0, 1)))


# What torch.compile uses of PyTorch is partly deprecated by PyTorch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_top_k_compiles_into_one_graph():
    torch._dynamo.reset()
    x, g = normal(B, T, C).requires_grad_(True), normal(B, T, C, seed=1)

    def function(x):
        return 3 * HardTopK.apply(torch.tanh(x), 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(x), x, g)
    assert torch.equal(torch.autograd.grad(compiled(x), x, g)[0], expected)


@pytest.mark.parametrize("k", [0, -1, C + 1, 2.0])
def test_top_k_checks_k(k):
    with pytest.raises(ValueError, match=f"k={k!r}: must be an integer of at least 1 and at most {C}"):
        HardTopK.apply(normal(T, C), k)


# ------------------------------------------------------------ VQResidualDir


def test_quantised_tokens_have_the_nearest_direction_and_their_own_norm():
    vq = VQResidualDir(C, K).double()
    h = 3 * normal(B, T, C)
    out = vq(h)
    torch.testing.assert_close(out, nearest(h, vq.codebook), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.norm(dim=-1), h.norm(dim=-1), rtol=1e-6, atol=0)
    assert len(vq.codes(h).unique()) > 3
    assert torch.equal(out, vq.codebook[vq.codes(h)] * h.norm(dim=-1, keepdim=True))


def test_the_nearest_code_is_that_of_the_largest_cosine_and_not_of_the_largest_product():
    # Not an accident of unit norms: the codes do have norm 1.
    codebook = VQResidualDir(C, 500).codebook
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(500))
    assert codebook.mean().abs() < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_search_finds_the_largest_entry_and_the_first_of_equals(dtype):
    scores = normal(B, T, K).to(dtype)
    assert torch.equal(largest(scores), scores.argmax(-1))
    assert torch.equal(largest(torch.ones(B, T, K, dtype=dtype)), torch.zeros(B, T, dtype=torch.long))


@pytest.mark.parametrize("shape", [(T, K), (B, T, K), (0, K)], ids=str)
def test_the_search_is_a_well_formed_operator(shape):
    torch.library.opcheck(selection._largest_on_the_cpu, (normal(*shape),))
    torch.library.opcheck(selection._largest_on_the_cpu, (normal(*shape[::-1], shape[-1]).transpose(0, 1),))


def test_quantising_twice_changes_nothing():
    vq = VQResidualDir(C, K).double()
    once = vq(normal(B, T, C))
    torch.testing.assert_close(vq(once), once, rtol=1e-6, atol=0)
    assert torch.equal(vq.codes(once), vq.codes(normal(B, T, C)))


def test_a_zero_token_stays_zero():
    h = torch.zeros(T, C, requires_grad=True)
    out = VQResidualDir(C, K)(h)
    assert torch.equal(out, torch.zeros(T, C))
    (grad,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(grad, torch.ones(T, C))


def test_the_codebooks_gradient_is_the_identity():
    vq = VQResidualDir(C, K).double()
    h, g = normal(B, T, C).requires_grad_(True), normal(B, T, C, seed=1)
    assert torch.equal(torch.autograd.grad(vq(h), h, g)[0], g)
    assert not list(vq.parameters())
    assert list(vq.state_dict()) == ["codebook"]


def test_codebooks_share_one_default_and_follow_their_seed():
    torch.manual_seed(1)
    default = VQResidualDir(C, K).codebook
    torch.manual_seed(2)
    assert torch.equal(default, VQResidualDir(C, K).codebook)
    # What an unseeded generator of PyTorch gives.
    expected = torch.nn.functional.normalize(torch.randn(K, C, generator=torch.Generator()), dim=-1)
    assert torch.equal(default, expected)
    seeded = [VQResidualDir(C, K, seed=seed).codebook for seed in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2]) and not torch.equal(seeded[0], default)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_codebook_serves_half_tokens(dtype):
    vq = VQResidualDir(C, K)
    h = normal(B, T, C, dtype=dtype)
    out = vq(h)
    assert out.dtype == dtype
    torch.testing.assert_close(out.norm(dim=-1), h.norm(dim=-1), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("sizes", "field"), [((0, K), "d_model"), ((C, 0), "n_codes"), ((C, 1.5), "n_codes")]
)
def test_the_codebooks_sizes_are_checked(sizes, field):
    with pytest.raises(ValueError, match=f"{field}=.*: must be an integer of at least 1"):
        VQResidualDir(*sizes)


# ------------------------------------------------------------ FrozenSubspace


@pytest.mark.parametrize("rank", [1, 3, C])
def test_the_subspace_is_an_orthogonal_projection_of_its_rank(rank):
    subspace = FrozenSubspace(C, rank)
    torch.testing.assert_close(subspace.Q.T @ subspace.Q, torch.eye(rank), rtol=0, atol=1e-6)
    subspace.double()
    project = subspace(torch.eye(C, dtype=torch.float64))
    torch.testing.assert_close(project, project.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(project @ project, project, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(project, tol=1e-3) == rank
    h, g = normal(B, T, C).requires_grad_(True), normal(B, T, C, seed=1)
    out = subspace(h)
    torch.testing.assert_close(out, h @ project, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(out, h, g)[0], g @ project, rtol=1e-12, atol=1e-14)
    assert not list(subspace.parameters()) and list(subspace.state_dict()) == ["Q"]


def test_subspaces_share_one_default_and_follow_their_seed():
    torch.manual_seed(1)
    default = FrozenSubspace(C, 3).Q
    torch.manual_seed(2)
    assert torch.equal(default, FrozenSubspace(C, 3).Q)
    assert torch.equal(default, FrozenSubspace(C, 3, seed=42).Q)
    assert not torch.equal(default, FrozenSubspace(C, 3, seed=1).Q)


@pytest.mark.parametrize("rank", [0, C + 1, -1, 2.5])
def test_the_rank_is_checked(rank):
    with pytest.raises(ValueError, match=f"rank={rank!r}: must be an integer of at least 1 and at most {C}"):
        FrozenSubspace(C, rank)
