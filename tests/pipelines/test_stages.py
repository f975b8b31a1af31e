"""What a stage computes, keeps and sends, against sums by hand; tables of it; times that were measured."""

import json
from pathlib import Path

import pytest

from localgpt_core import LocalGPT, LocalGPTConfig
from localgpt_core.config import preset
from localgpt_core.measure import StageMessage, stage_message
from localgpt_core.pipelines import (
    Pipeline,
    layers_per_stage,
    link_rows,
    measured_flops_per_s,
    paper_config,
    pipeline_rows,
    simulate,
)
from localgpt_core.pipelines.stages import stages_of
from localgpt_core.pipelines.tables import SIZES, parameters

BENCHMARKS = Path(__file__).parents[2] / "book" / "benchmarks"
C, T, V, L = 6, 5, 7, 4
BLOCK, HEAD, PRODUCT = 24 * C * C + 4 * T * C, 2 * C * V, 2 * V * C
DIRECT = {"method": "dfa", "dfa_granularity": "block"}
GRAPE = {**DIRECT, "fa_grape": True, "jvp_share": 0.25}


def config(**changes):
    sizes = {"n_layer": L, "n_head": 1, "n_embd": C, "block_size": T, "vocab_size": V}
    return LocalGPTConfig(**{**sizes, **changes})


def stages(number=2, options=None, **pipeline):
    return stages_of(config(**(options or {})), Pipeline(stages=number, **pipeline))


@pytest.mark.parametrize(
    ("layers", "number", "vocab_size", "expected"),
    [
        (4, 1, 7, [4]),
        (4, 2, 7, [2, 2]),
        (5, 2, 7, [3, 2]),
        (5, 3, 7, [2, 2, 1]),
        (4, 4, 10_000, [1, 1, 1, 1]),
        (16, 4, 2 * 82, [5, 4, 4, 3]),  # the head is two blocks: 3 + 2 = 5
        (16, 4, 100_000, [5, 5, 5, 1]),
    ],
)
def test_blocks_are_spread_so_that_the_slowest_stage_has_least(layers, number, vocab_size, expected):
    # 2 C V = V / 82 blocks
    assert layers_per_stage(config(n_layer=layers, vocab_size=vocab_size), number) == expected


def test_no_stage_is_without_a_block():
    with pytest.raises(ValueError, match="stages=5: must be an integer of at least 1 and at most 4"):
        simulate(config(), Pipeline(stages=5))


@pytest.mark.parametrize("options", [{}, {"method": "fa"}, {"method": "kp", "fa_grape": True}], ids=str)
def test_a_chain_of_errors_by_hand(options):
    first, last = stages(2, options, kept_numbers=10.0)
    assert (first.forward_flops, last.forward_flops) == (2 * BLOCK, 2 * BLOCK + HEAD)
    assert (first.backward_flops, last.backward_flops) == (4 * BLOCK, 2 * (2 * BLOCK + HEAD))
    assert (first.forward_bits, first.error_bits) == (16 * C, 16 * C)
    assert (last.forward_bits, last.error_bits) == (0, 16 * V)
    assert first.activation_bits == last.activation_bits == 2 * 10 * C * 16
    assert first.feedback_bits == last.feedback_bits == 0


@pytest.mark.parametrize(("granularity", "points"), [("block", 1), ("sublayer", 2)])
def test_direct_feedback_by_hand(granularity, points):
    first, last = stages(2, {**DIRECT, "dfa_granularity": granularity})
    assert first.forward_flops == 2 * BLOCK
    assert first.backward_flops == 4 * BLOCK + 2 * points * PRODUCT
    assert last.backward_flops == 2 * (2 * BLOCK + HEAD) + 2 * points * PRODUCT
    assert (first.forward_bits, first.error_bits, last.error_bits) == (16 * C, 16 * V, 16 * V)
    assert first.feedback_bits == 2 * points * V * C * 16


def test_one_matrix_for_all_is_multiplied_once_where_that_is_narrower():
    first, last = stages(2, {**DIRECT, "dfa_source": "head"})  # C = 6 < V = 7
    assert (first.error_bits, first.backward_flops) == (16 * C, 4 * BLOCK)
    assert last.backward_flops == 2 * (2 * BLOCK + HEAD) + PRODUCT
    assert first.feedback_bits == 0
    first, last = stages(2, {**DIRECT, "dfa_source": "head", "vocab_size": 5})
    assert (first.error_bits, first.backward_flops) == (16 * 5, 4 * BLOCK + 2 * 2 * 5 * C)


def test_tangents_by_hand():
    first, last = stages(2, GRAPE, probes=3, tangent_cost=1.5)
    tau = 3 * 0.25
    assert first.forward_flops == 2 * BLOCK * (1 + 1.5 * tau)
    assert last.forward_flops == (2 * BLOCK + HEAD) * (1 + 1.5 * tau)
    assert first.backward_flops == 4 * BLOCK + 2 * PRODUCT * (1 + tau)
    assert first.forward_bits == 16 * C * (1 + tau)
    assert first.error_bits == 16 * V * (1 + tau)
    # One tangent for every token, at the cost of a forward pass: twice the time and traffic forward.
    whole, _ = stages(2, {**GRAPE, "jvp_share": 1.0})
    plain, _ = stages(2, DIRECT)
    assert whole.forward_flops == 2 * plain.forward_flops and whole.forward_bits == 2 * plain.forward_bits


def test_a_narrow_stream_is_what_is_sent():
    first, _ = stages(2, {"resid_topk": 2})
    assert (first.forward_bits, first.error_bits) == (2 * 16 + 4, 2 * 16)  # binom(6, 2) = 15 places
    first, _ = stages(2, {"subspace_rank": 3, **GRAPE}, bits=32)
    assert (first.forward_bits, first.error_bits) == (3 * 32 * 1.25, 32 * V * 1.25)
    # The first of two stages has blocks 0 and 1, and what counts is its end.
    ends = [stages(2, {"resid_topk": 2, "bottleneck_at": at})[0].forward_bits for at in ("0", "1")]
    assert ends == [16 * C, 36]


def test_errors_at_every_layer_go_both_ways_and_are_refused():
    with pytest.raises(ValueError, match="^dfa_granularity='layer': must be 'block' or 'sublayer' in a pipe"):
        simulate(config(method="dfa"), Pipeline(stages=2))


def test_the_forward_pass_of_a_block_is_that_of_the_model():
    from localgpt_core.measure.cost import forward_flops

    model, _ = preset("tiny", {"attn_mode": "softmax"})
    import torch

    counted = forward_flops(LocalGPT(model), torch.zeros(3, model.block_size, dtype=torch.long))
    (whole,) = stages_of(model, Pipeline(stages=1))
    assert counted == whole.forward_flops * 3 * model.block_size


def test_a_measured_step_is_what_one_stage_takes_and_several_share():
    rows = json.loads((BENCHMARKS / "options-cpu.json").read_text())["rows"]
    measured = {row["name"]: row["milliseconds"] for row in rows}
    for name, options in {"fa": {"method": "fa"}, "dfa block norm": {**DIRECT, "dfa_norm": True}}.items():
        model, run = preset("cpu", options)
        rate = measured_flops_per_s(model, measured[name], run.batch_size)
        machine = {"flops_per_s": rate, "utilisation": 1.0, "latency_s": 0.0, "bandwidth_bits_per_s": 1e99}
        parts = Pipeline(stages=1, micro_batches=3, micro_batch_size=run.batch_size // 3, **machine)
        assert simulate(model, parts).seconds == pytest.approx(measured[name] / 1e3)
        split = simulate(model, Pipeline(stages=4, micro_batches=3, micro_batch_size=4, **machine))
        busy = 4 * split.seconds * (1 - split.bubble)
        assert busy == pytest.approx(measured[name] / 1e3)


@pytest.mark.parametrize(("ms", "batch", "field"), [(0.0, 1, "milliseconds"), (1.0, 0, "batch_size")])
def test_a_measured_step_is_checked(ms, batch, field):
    with pytest.raises(ValueError, match=f"^{field}="):
        measured_flops_per_s(config(), ms, batch)


# Tables


@pytest.mark.parametrize(("size", "number"), [("1 B", 1e9), ("100 B", 1e11)])
def test_the_models_on_paper_have_their_size(size, number):
    assert parameters(paper_config(size)) == pytest.approx(number, rel=0.03)


def test_parameters_are_those_of_the_matrices_of_a_model():
    model = LocalGPT(config())
    assert parameters(config()) == sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_a_table_has_a_row_for_each_and_says_what_the_simulation_says():
    pipeline = Pipeline(micro_batches=3)
    rows = pipeline_rows(pipeline, stages=(1, 4), sizes=("1 B",), resid_bits=4)
    assert [(row["stages"], row["rule"]) for row in rows] == [
        (number, rule)
        for number in (1, 4)
        for rule in ("bp", "dfa, block", "dfa, head's matrix", "grape, block")
    ]
    step = simulate(paper_config("1 B", "dfa, block", resid_bits=4), Pipeline(micro_batches=3, stages=4))
    (row,) = (row for row in rows if (row["stages"], row["rule"]) == (4, "dfa, block"))
    assert (row["size"], row["seconds"], row["backward_bytes"]) == ("1 B", step.seconds, step.backward_bytes)
    assert row["in_flight"] == max(step.in_flight) == 3
    width = SIZES["1 B"]["n_embd"]
    assert row["forward_bytes"] == 3 * 2048 * (4 * width + 16) / 8


@pytest.mark.parametrize(("size", "rule", "field"), [("2 B", "bp", "size"), ("1 B", "fa", "rule")])
def test_a_table_is_of_what_it_knows(size, rule, field):
    with pytest.raises(ValueError, match=f"^{field}="):
        pipeline_rows(stages=(1,), sizes=(size,), rules=(rule,))


def test_a_token_on_a_link_by_hand():
    message = StageMessage(forward=1000, backward=500, broadcast=2000)
    slow, _, fast = link_rows(message)
    assert [slow[f"{way}_us"] for way in ("forward", "backward", "broadcast")] == [10, 5, 20]
    assert fast == {
        "link": "10 Gbit/s",
        "forward_us": pytest.approx(0.1),
        "backward_us": pytest.approx(0.05),
        "broadcast_us": pytest.approx(0.2),
        "tokens_per_s": pytest.approx(1e10 / 2500),
    }
    (row,) = link_rows(stage_message(preset("cpu")[0], 0), {"own": 2048.0})
    assert row["forward_us"] == 1e6 and row["tokens_per_s"] == 1  # 16 bits of 128 units
    assert link_rows(StageMessage(0, 0, 0), {"own": 1.0})[0]["tokens_per_s"] is None
    with pytest.raises(ValueError, match="links=0: must be positive"):
        link_rows(message, {"cut": 0})
