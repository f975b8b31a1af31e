"""The spread of Jacobians over tokens: by hand, against torch's own Jacobian, and where it must be none."""

import pytest
import torch
from cases import SIZES, T, make_batch, make_model
from torch.func import jacrev

from localgpt_core.matrices.jacobian import mean_jacobians
from localgpt_core.measure.spread import jacobian_spread, spread_of, token_jacobians

C, V = SIZES["n_embd"], SIZES["vocab_size"]
PLACES = ["blocks.0.attn", "blocks.0", "blocks.1.attn", "blocks.1"]


def test_two_matrices_by_hand():
    jacobians = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]]])
    head = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    # Mean (1.5, 2), of squared length 6.25; those of the two are 9 and 16.
    found = spread_of(jacobians, head + torch.tensor([[1.5, 2.0], [0.0, 0.0]]))
    assert found.share == pytest.approx(6.25 / 12.5)
    assert found.mean_cosine == pytest.approx((3 * 1.5 / (3 * 2.5) + 4 * 2 / (4 * 2.5)) / 2)
    assert found.head_cosine == pytest.approx(6.25 / (2.5 * 10.25**0.5))
    assert found.head_ratio == pytest.approx(2.5 / 10.25**0.5)
    nothing = spread_of(torch.zeros(2, 2, 2), head)
    assert nothing.share != nothing.share and nothing.head_ratio == 0


def above(model, place):
    """Return the function from the stream of one sequence (T, C) at ``place`` to its logits (T, V)."""
    block, _, attention = place.removeprefix("blocks.").partition(".")
    at = int(block)

    def logits(x):
        x, taps = x[None], []
        if attention:
            x = x + model.blocks[at].mlp(model.blocks[at].ln2(x), taps)
        for later in model.blocks[at + 1 :]:
            x = later(x, taps)
        return model.head(model.ln_f(x), taps)[0]

    return logits


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "dfa", "dfa_granularity": "sublayer", "dropout": 0.3}, {"freeze_emb": True}],
    ids=str,
)
def test_every_jacobian_is_that_of_torch(options):
    model, (idx, _) = make_model(**options), make_batch(rows=2)
    exact = make_model().eval()
    exact.load_state_dict(model.state_dict(), strict=False)
    found = token_jacobians(model, idx)
    assert [*found] == PLACES and model.training
    assert all(p.grad is None for p in model.parameters())
    x = exact.tok_emb(idx) + exact.pos_emb.weight[:T]
    for i, block in enumerate(exact.blocks):
        middle = x + block.attn(block.ln1(x), [])
        x = block(x, [])
        for place, stream in ((f"blocks.{i}.attn", middle), (f"blocks.{i}", x)):
            for row in range(2):
                whole = jacrev(above(exact, place))(stream[row].detach())  # (T, V, T, C)
                for t in range(T):
                    torch.testing.assert_close(
                        found[place][2 * t + row], whole[t, :, t], rtol=1e-9, atol=1e-12
                    )
    few = token_jacobians(model, idx, positions=[3, 1])
    assert all(torch.equal(few[p], torch.cat([found[p][6:8], found[p][2:4]])) for p in PLACES)


def test_where_the_way_to_the_logits_is_linear_all_tokens_have_the_heads_matrix():
    model = make_model(n_layer=1, ln_mode="none")
    model.blocks[0].mlp.proj.weight.data.zero_()
    for spread in jacobian_spread(model, make_batch()[0]).values():
        for value in (spread.share, spread.mean_cosine, spread.head_cosine, spread.head_ratio):
            assert value == pytest.approx(1.0, abs=1e-12)


def test_behind_the_last_norm_only_the_size_and_one_direction_of_a_token_differ():
    """sigma_t J_t = H (1 - 1/C - z_t z_t^T / C): by the derivative of LayerNorm."""
    model, (idx, _) = make_model(), make_batch()
    found, head = token_jacobians(model, idx, normalised=True)["blocks.1"], model.output_matrix().detach()
    streams = []
    model.ln_f.register_forward_pre_hook(lambda module, args: streams.append(args[0].detach()))
    model(idx)
    x = streams[0].transpose(0, 1).flatten(0, 1)
    variance = x.var(dim=1, correction=0)
    z = (x - x.mean(dim=1, keepdim=True)) / (variance + 1e-5).sqrt()[:, None]
    for jacobian, direction in zip(found, z, strict=True):
        kept = torch.eye(C).double() - (1 + torch.outer(direction, direction)) / C
        torch.testing.assert_close(jacobian, head @ kept, rtol=1e-9, atol=1e-12)
    raw = token_jacobians(model, idx)["blocks.1"]
    sizes = (variance + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(found, raw * sizes, rtol=1e-9, atol=1e-12)
    assert jacobian_spread(model, idx, normalised=True)["blocks.1"].share > 0.8


@pytest.mark.parametrize("norm", [False, True])
def test_the_mean_is_the_one_that_feedback_is_held_against(norm):
    """`mean_jacobians` draws signs for what tokens do to each other: over many draws it is the same."""
    model = make_model(method="dfa", dfa_granularity="block", dfa_norm=norm, n_layer=1)
    idx, point = make_batch(rows=1)[0], model.blocks[0].feedback
    draws = [mean_jacobians(model, lambda: model.logits(idx), {point}, seed)[point] for seed in range(3)]
    found = token_jacobians(model, idx, normalised=norm)["blocks.0"].mean(dim=0)
    # Behind the last block nothing of one token reaches another, so that each draw is exact.
    for draw in draws:
        torch.testing.assert_close(draw, found, rtol=1e-9, atol=1e-12)


def test_positions_that_are_not_there_are_refused():
    model, (idx, _) = make_model(), make_batch()
    with pytest.raises(ValueError, match="position=5: must be an integer of at least 0 and at most 4"):
        jacobian_spread(model, idx, positions=[0, 5])
    with pytest.raises(ValueError, match=r"positions=\[\]: must be one position or more"):
        jacobian_spread(model, idx, positions=[])
