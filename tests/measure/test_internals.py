"""What goes on inside a model: counts, shares and gates, against slow versions and planted cases."""

import math
from types import SimpleNamespace

import pytest
import torch
from cases import make_batch, make_model, normal
from torch import nn
from torch.nn import functional

from localgpt_core import VQResidualDir
from localgpt_core.measure.inside import (
    choices,
    code_radial_shares,
    concentration,
    entropy_bits,
    gates,
    radial_shares,
    unused_share,
)

IDX, TARGETS = make_batch(rows=3)
C = 12


def inputs_of(model, name):
    """Return what module ``name`` was given in a forward pass."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDX)
    hook.remove()
    return seen[0]


# ------------------------------------------------------------ counts


def test_unused_share_and_entropy_by_hand():
    counts = torch.tensor([4, 0, 2, 2, 0])
    assert unused_share(counts) == pytest.approx(0.4)
    assert entropy_bits(counts) == pytest.approx(1.5, abs=1e-12)
    assert entropy_bits(torch.ones(16)) == pytest.approx(4, abs=1e-12)
    assert entropy_bits(torch.tensor([0, 7])) == 0
    assert math.isnan(entropy_bits(torch.zeros(3)))


def test_the_winners_of_the_mlp_are_counted():
    model = make_model(mlp_topk=9)
    counts = choices(model, IDX)
    assert list(counts) == ["blocks.0.mlp", "blocks.1.mlp"]
    for i in range(2):
        hidden = inputs_of(model, f"blocks.{i}.mlp.proj")
        by_hand = [int((hidden[..., unit] != 0).sum()) for unit in range(4 * C)]
        assert counts[f"blocks.{i}.mlp"].tolist() == by_hand
        assert sum(by_hand) == 9 * IDX.numel()


BEHIND = {
    "vq": {"vq_codes": 11},
    "subspace": {"subspace_rank": 5},
    "block": {},
    "constrain": {"subspace_rank": 5, "subspace_mode": "constrain"},
    "feedback": {"method": "dfa", "dfa_granularity": "block"},
}


@pytest.mark.parametrize("options", BEHIND.values(), ids=BEHIND)
def test_the_winners_of_the_stream_are_counted_whatever_comes_behind(options):
    model = make_model(resid_topk=5, **options)
    counts = choices(model, IDX)
    resid = [counts[f"blocks.{i}.resid"] for i in range(2)]
    assert all(found.shape == (C,) and found.sum() == 5 * IDX.numel() for found in resid)
    assert not torch.equal(*resid)


def test_the_codes_are_counted_where_there_is_a_codebook():
    model = make_model(vq_codes=11, bottleneck_at="1")
    counts = choices(model, IDX)
    assert list(counts) == ["blocks.1.vq"]
    h, codebook = inputs_of(model, "blocks.1.vq"), model.blocks[1].vq.codebook
    nearest = [max(range(11), key=lambda k: torch.dot(codebook[k], token)) for token in h.flatten(0, 1)]
    assert counts["blocks.1.vq"].tolist() == [nearest.count(k) for k in range(11)]
    assert choices(make_model(), IDX) == {}


def test_the_codes_of_every_group_are_counted():
    model = make_model(vq_codes=5, vq_groups=3, bottleneck_at="0")
    counts = choices(model, IDX)["blocks.0.vq"]
    h, codebook = inputs_of(model, "blocks.0.vq").flatten(0, 1), model.blocks[0].vq.codebook
    for j in range(3):
        part = h[:, 4 * j : 4 * j + 4]
        nearest = [max(range(5), key=lambda k, t=t: torch.dot(codebook[j, k], t)) for t in part]
        assert counts[j].tolist() == [nearest.count(k) for k in range(5)]
    assert counts.shape == (3, 5)
    expected = sum(entropy_bits(row) for row in counts) / 3
    assert entropy_bits(counts) == pytest.approx(expected, abs=1e-12)


def test_concentration_against_a_loop():
    model = make_model()
    found = concentration(model, IDX)
    for i in range(2):
        shares = []
        for token in inputs_of(model, f"blocks.{i}.mlp.proj").flatten(0, 1):
            power, carried, units = sorted((token**2).tolist(), reverse=True), 0.0, 0
            while carried < 0.9 * sum(power):
                carried += power[units]
                units += 1
            shares.append(units / len(power))
        assert found[f"blocks.{i}"] == pytest.approx(sum(shares) / len(shares), rel=1e-9)


def test_concentration_by_hand():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Identity()
            self.blocks = [SimpleNamespace(mlp=SimpleNamespace(proj=self.proj))]

        def forward(self, hidden):
            self.proj(hidden)

    # Of 9 + 1 the first unit carries exactly 90 %; equal units are all needed; of 8 + 2 both are.
    tokens = torch.tensor([[[0.0, -3, 0, 1], [1, 1, 1, -1], [8**0.5, 0, 0, 2**0.5]]], dtype=torch.float64)
    assert concentration(Toy(), tokens) == {"blocks.0": pytest.approx((1 / 4 + 1 + 2 / 4) / 3, abs=1e-12)}


# ------------------------------------------------------------ norms


@pytest.mark.parametrize("options", [{}, {"method": "fa"}, {"ln_mode": "center_scale"}, {"ln_mode": "ste"}])
def test_the_radial_share_is_what_the_exact_derivative_removes(options):
    model = make_model(**options)
    shares = radial_shares(model, IDX, TARGETS)
    assert list(shares) == [f"blocks.{i}.ln{j}" for i in range(2) for j in (1, 2)] + ["ln_f"]
    for name, share in shares.items():
        norm, seen = model.get_submodule(name), {}
        hook = norm.register_forward_hook(lambda m, a, y, seen=seen: seen.update(x=a[0].detach(), y=y))
        loss = model(IDX, TARGETS)[1]
        hook.remove()
        (g,) = torch.autograd.grad(loss, seen["y"])
        x = seen["x"].clone().requires_grad_(True)
        gamma = getattr(norm, "ln", norm).weight.detach()
        (exact,) = torch.autograd.grad(functional.layer_norm(x, (C,), gamma), x, g)
        sigma = (x.detach().var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        centred = g * gamma - (g * gamma).mean(-1, keepdim=True)
        removed = centred - exact * sigma
        assert share == pytest.approx((removed.norm() / centred.norm()).item() ** 2, rel=1e-6)
        assert 0 < share < 1


def test_a_radial_gradient_has_share_one_and_a_tangential_one_none():
    class Toy(nn.Module):
        def __init__(self, radial):
            super().__init__()
            self.ln_f, self.radial = nn.LayerNorm(C).double(), radial

        def forward(self, x, targets):
            y = self.ln_f(x)
            # With eps the normalised input is a little shorter than sqrt(C): the loss |y|^2 / 2 is radial.
            return None, (y.square().sum() / 2 if self.radial else (y * torch.roll(y.detach(), 1, -1)).sum())

    x = normal(4, C).requires_grad_(True)
    assert radial_shares(Toy(True), x, None)["ln_f"] == pytest.approx(1, abs=1e-3)
    assert radial_shares(Toy(False), x, None)["ln_f"] < 0.5


def test_without_normalisation_or_gradient_there_is_no_share():
    assert radial_shares(make_model(ln_mode="none"), IDX, TARGETS) == {}
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    assert all(math.isnan(share) for share in radial_shares(model, IDX, TARGETS).values())


def test_looking_changes_nothing():
    model = make_model(dropout=0.3, mlp_topk=9, vq_codes=11)
    model.blocks[0].eval()
    torch.manual_seed(0)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    choices(model, IDX), concentration(model, IDX), radial_shares(model, IDX, TARGETS), gates(model)
    code_radial_shares(model, IDX, TARGETS)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("groups", [1, 3])
def test_the_radial_share_at_a_codebook_is_what_a_tangent_leaves_out(groups):
    options = {"vq_codes": 5, "vq_groups": groups, "bottleneck_at": "1"}
    model = make_model(**options)
    found = code_radial_shares(model, IDX, TARGETS)
    vq, seen = model.blocks[1].vq, {}
    hook = vq.register_forward_hook(lambda m, a, y: seen.update(h=a[0].detach(), y=y))
    (g,) = torch.autograd.grad(model(IDX, TARGETS)[1], seen["y"])
    hook.remove()
    h = seen["h"].requires_grad_(True)
    twin = VQResidualDir(C, 5, groups=groups, backward="tangent").double()
    (kept,) = torch.autograd.grad(twin(h), h, g)
    assert found == {"blocks.1.vq": pytest.approx(1 - (kept.norm() / g.norm()).item() ** 2, rel=1e-9)}
    assert 0.01 < found["blocks.1.vq"] < 0.99
    assert code_radial_shares(make_model(), IDX, TARGETS) == {}


def test_where_no_gradient_arrives_a_codebook_has_no_share():
    model = make_model(vq_codes=5).requires_grad_(False)
    model.head.weight.requires_grad_(True)
    assert all(math.isnan(share) for share in code_radial_shares(model, IDX, TARGETS).values())


# ------------------------------------------------------------ gates


def test_gates_by_name():
    model = make_model(gated_blocks=True)
    found = gates(model)
    assert list(found) == [f"blocks.{i}.alpha_{part}" for i in range(2) for part in ("attn", "mlp")]
    assert found["blocks.1.alpha_mlp"] == model.blocks[1].alpha_mlp.item()
    assert gates(make_model()) == {}
