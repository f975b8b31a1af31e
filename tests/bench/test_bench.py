import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import make_batch, make_model
from torch import nn

from localgpt_core import RULES, LocalGPT, LocalLinear, RuleOptions
from localgpt_core.bench import Row, peak, read_rows, render, write_rows
from localgpt_core.bench import measuring as bench
from localgpt_core.bench import rows as kept_rows
from localgpt_core.bench.measuring import measure
from localgpt_core.bench.plain import PlainGPT
from localgpt_core.bench.variants import (
    Variant,
    arms_of,
    as_plain,
    variants,
    with_plain_linears,
    with_softmax_written_out,
)
from localgpt_core.config import preset
from localgpt_core.experiments.suites import Arm, read_suite
from localgpt_core.measure.cost import (
    alignment_in_forward_passes,
    flop_counter,
    peak_memory_mib,
    peak_step_bytes,
    step_bytes,
    step_flops,
)
from localgpt_core.training.step import build_model


def test_plain_linears_compute_the_same_function_and_gradients():
    config, _ = preset("tiny")
    torch.manual_seed(0)
    model = LocalGPT(config)
    idx = torch.randint(config.vocab_size, (2, 7))
    loss = model(idx, idx)[1]
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    plain = with_plain_linears(model)
    assert not any(isinstance(module, LocalLinear) for module in plain.modules())
    plain.zero_grad()
    again = plain(idx, idx)[1]
    again.backward()
    assert torch.equal(loss, again)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_torchs_attention_computes_the_same_function_and_gradients():
    config, _ = preset("tiny", {"attn_mode": "softmax"})
    results = []
    for change in (lambda model: model, with_softmax_written_out):
        torch.manual_seed(0)
        model = change(LocalGPT(config))
        idx = torch.randint(config.vocab_size, (2, 7))
        loss = model(idx, idx)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_fused_softmax_takes_no_more_memory_than_the_plain_one(batch):
    needed = []
    for fused in (False, True):
        model = LocalGPT(preset("cpu", {"attn_mode": "softmax", "fuse_attn_local": fused})[0])
        model = model if fused else with_softmax_written_out(model)
        idx = torch.zeros(batch, model.config.block_size, dtype=torch.long)
        needed.append(step_bytes(model, idx, idx))
    assert needed[1] <= needed[0]


def test_every_variant_is_measured_and_printed(monkeypatch):
    monkeypatch.setattr("localgpt_core.bench.measuring.WARM_UP_STEPS", 1)
    peaks = peak.Peaks(torch.device("cpu"))
    rows = measure("tiny", torch.device("cpu"), 2, lambda text: None, peaks=peaks)
    assert [row.name for row in rows] == [variant.name for variant in variants(32)]
    by_name = {row.name: row for row in rows}
    assert by_name["bp (against torch.nn.Linear)"].flops == 1.0
    assert by_name["fa"].flops == by_name["sign_sym"].flops == 1.0
    # An output error of 65 numbers is wider than a stream of 32: here skipping W does not pay. Per token,
    # in units of 32 x 32: 65 / 32 = 2.03 for q, k, v together, o and fc, 4 x 2.03 for proj, not 3 + 1 + 8.
    block, head = 3 * 12, 3 * 2.03125
    attention = 3 * 2  # scores and values of 32 tokens
    ratio = (2 * (24 + 7 * 2.03125 + attention) + head) / (2 * (block + attention) + head)
    assert by_name["dfa"].flops == pytest.approx(ratio, abs=0.001)
    assert by_name["vq 256 codes"].flops > 1.0
    attended, plain = by_name["torch's attention (against softmax)"], by_name["plain GPT"]
    assert attended.flops == plain.flops == 1.0
    assert plain.update == 0.0
    for row in rows:
        assert row.tokens_per_second == pytest.approx(8 * 32 / row.milliseconds * 1000)
        rate = row.step_gflop / row.milliseconds * 1000
        assert rate / row.peak_share == pytest.approx(peaks.gflops["float32"])
    text = render(rows)
    assert all(row.name in text for row in rows) and len(text.splitlines()) == len(rows) + 1


def test_every_rule_has_its_rows_and_they_keep_their_names():
    named = {variant.name: variant.model for variant in variants(128)}
    assert len(named) == len(variants(128))
    named = {name: model for name, model in named.items() if "a plain GPT" not in name}
    of_rules = {name: model for name, model in named.items() if "method" in model}
    assert {model["method"] for model in of_rules.values()} == {*RULES} - {"bp"}
    assert named["plain GPT"] == {}
    # What a rule does not take gives no row: probes for wm, an error between the blocks for a local rule.
    assert {name for name in of_rules if name.startswith(("fa", "dfa", "wm"))} == {
        *("fa", "fa + grape", "fa + grape, kaczmarz", "dfa", "dfa + grape", "wm"),
        *("dfa block", "dfa block norm", "dfa block norm + grape"),
    }
    direct = {"method": "dfa", "dfa_granularity": "block", "dfa_norm": True, "fa_grape": True}
    assert of_rules["dfa block norm + grape"] == direct
    assert of_rules["fa + grape, kaczmarz"] == {
        "method": "fa",
        "fa_grape": True,
        "fa_grape_update": "kaczmarz",
    }
    # The pages find rows by these names in what was recorded, which may be before the latest options.
    recorded = read_rows(Path(__file__).parents[2] / "book" / "benchmarks" / "options-cpu.json")[0]
    assert {*recorded} <= {variant.name for variant in variants(128)}


def test_the_arms_of_a_suite_are_measured_and_kept(tmp_path):
    suite = tmp_path / "two.toml"
    suite.write_text(
        'question = "?"\npreset = "tiny"\nseeds = [1]\n[arms.bp]\n[arms.grape]\n'
        'model = { method = "dfa", fa_grape = true }\n[arms."frozen body"]\ntrain = { freeze_body = true }\n'
    )
    rows = measure("tiny", torch.device("cpu"), 2, lambda text: None, read_suite(suite))
    assert [row.name for row in rows] == ["bp", "grape", "frozen body"]
    assert rows[0].update == 0.0 and rows[1].update > 1.0
    assert rows[0].flops == 1.0 and rows[1].flops > 1.2 and rows[2].flops < 0.8
    assert all(row.milliseconds > 0 for row in rows)
    write_rows(rows, tmp_path / "rows.json", "tiny", "cpu")
    again, measured_on = read_rows(tmp_path / "rows.json")
    assert list(again) == [row.name for row in rows]
    assert again["grape"].flops == pytest.approx(rows[1].flops, rel=1e-3)
    assert measured_on["torch"] == torch.__version__


def test_the_quartiles_of_two_pairs_lie_between_them(monkeypatch):
    """Quartiles as of a sample of a larger population would be extrapolated, to a ratio below 0 here."""
    seconds = iter([1.0, 1.0, 9.0, 1.0])
    monkeypatch.setattr(bench.Stepper, "seconds", lambda stepper: next(seconds))
    (row,) = measure("tiny", torch.device("cpu"), 2, lambda text: None, SimpleNamespace(arms=[ARM]))
    assert 1 / 9 <= row.time_low <= row.time <= row.time_high <= 9.0


ARM = Arm("bp", "bp", {}, {}, (1,), 0)


def test_a_damaged_benchmark_is_named(tmp_path):
    row = dataclasses.asdict(ROW)
    odd = [None, True, "1", -1, 10**30, [1], math.nan, math.inf]
    changed = [row | {name: value} for name in row for value in odd if name != "name" or value != "1"]
    unmeasured = {"tokens_per_second", "step_gflop", "peak_share"}  # in files of earlier versions
    changed = [one for one in changed if not any(one[name] is None for name in unmeasured)]
    changed += [row | {"unknown": 1}, {**row, "name": ["fa"]}, [1], "fa", {}]
    contents = ["", "{}", "[" * 5000, "[]", "5", '{"rows": 5, "environment": {}}']
    rates = [{"gemm_gflops": odd_rates} for odd_rates in (5, [1], None, *({"float32": one} for one in odd))]
    contents += [json.dumps({"rows": [row], "environment": odd}) for odd in (5, [1], None, *rates)]
    for content in [*contents, *(json.dumps({"rows": [one], "environment": {}}) for one in changed)]:
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(ValueError, match=r"benchmark rows\.json cannot be read"):
            read_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").unlink()
    os.mkfifo(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"benchmark rows\.json cannot be read: .* is no regular file"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"benchmark none\.json cannot be read"):
        read_rows(tmp_path / "none.json")


def test_a_benchmark_of_an_earlier_version_is_read(tmp_path):
    row = {name: value for name, value in dataclasses.asdict(ROW).items() if name in EARLIER}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row], "environment": {"threads": 1}}))
    rows, measured_on = read_rows(tmp_path / "rows.json")
    assert rows["fa"] == dataclasses.replace(ROW, tokens_per_second=None, step_gflop=None, peak_share=None)
    assert measured_on == {"threads": 1}
    assert render([*rows.values()]).splitlines()[1].split()[-2:] == ["-", "-"]
    for path in (Path(__file__).parents[2] / "book" / "benchmarks").iterdir():
        assert len(read_rows(path)[0]) > 10


def test_peak_step_bytes_counts_what_lives_at_the_same_time():
    def in_turn():
        for _ in range(3):
            torch.zeros(1000, dtype=torch.float64)

    def together():
        return [torch.zeros(1000, dtype=torch.float64) for _ in range(3)]

    assert peak_step_bytes(in_turn) == 8000
    assert peak_step_bytes(together) == 24000
    kept = torch.zeros(1000)
    assert peak_step_bytes(lambda: kept.view(10, 100)) == 0


def test_the_bytes_of_a_step_grow_with_the_batch_and_leave_the_model_alone():
    config, _ = preset("tiny", {"method": "dfa"})
    model = LocalGPT(config)
    idx = torch.randint(config.vocab_size, (4, 7))
    few, many = step_bytes(model, idx[:1], idx[:1]), step_bytes(model, idx, idx)
    gradients = 4 * model.num_params()
    assert gradients < few < many < 4 * few
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_a_tap_takes_no_memory(bias):
    layer = LocalLinear(6, 5, bias, RuleOptions(method="dfa"), error_features=10**6)
    x = torch.randn(3, 6, requires_grad=True)
    taps: list[torch.Tensor] = []
    assert peak_step_bytes(lambda: layer(x, taps)) < 1000
    assert taps[0].shape == (3, 10**6)
    assert isinstance(layer, nn.Linear)


# ------------------------------------------------------------ the numbers of a row


@pytest.fixture
def clock(monkeypatch):
    """Steps that take what a script says: `clock.seconds` by batch size, and then 1 s each.

    A step of the variant, whose batch is 4 and not 8, holds 300 bytes, one of the reference 200.
    """
    clock = SimpleNamespace(now=0.0, steps=[], seconds={})

    def step(model, optimizer, config, idx, targets, number):
        clock.steps.append((len(idx), idx.shape[1], config, model.config))
        left = clock.seconds.get(len(idx), [])
        clock.now += left.pop(0) if left else 1.0
        return torch.zeros(300 if len(idx) == 4 else 200, dtype=torch.uint8)

    monkeypatch.setattr(bench, "training_step", step)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(peak, "gemm_gflops", lambda device, precision: 4.0)
    return clock


def measured(monkeypatch, pairs, *variants):
    monkeypatch.setattr(bench, "arms_of", lambda suite: variants)
    return measure("tiny", torch.device("cpu"), pairs, lambda text: None, suite="a suite")


WARM_UP = [100.0] * 3


def test_every_number_of_a_row_by_hand(monkeypatch, clock):
    clock.seconds = {4: WARM_UP + [6.0, 2.0, 8.0, 3.0, 5.0], 8: WARM_UP + [2.0, 1.0, 2.0, 1.0, 1.0]}
    (row,) = measured(monkeypatch, 5, Variant("fa", {"method": "fa"}, train={"batch_size": 4}))
    # Pair by pair 3, 2, 4, 3, 5; the quartiles of five numbers are the second and the fourth.
    assert (row.time_low, row.time, row.time_high) == (3.0, 3.0, 4.0)
    assert row.milliseconds == 5000.0
    assert row.memory == 1.5  # 300 bytes over 200
    assert row.flops == 0.5  # 4 sequences over 8
    assert (row.name, row.update) == ("fa", 0.0)
    # 4 x 32 tokens in 5 s; a forward pass of two blocks and a head of 65 units, three times over.
    assert row.tokens_per_second == 128 / 5
    forward = 2 * 128 * (2 * 12 * 32**2 + 65 * 32 + 2 * 2 * 32 * 32)
    assert row.step_gflop == 3 * forward / 1e9
    assert row.peak_share == pytest.approx(3 * forward / 5.0 / 4e9, rel=1e-12)


def test_one_pair_is_its_own_quartile(monkeypatch, clock):
    clock.seconds = {4: [*WARM_UP, 6.0], 8: [*WARM_UP, 4.0]}
    (row,) = measured(monkeypatch, 1, Variant("bp", train={"batch_size": 4}))
    assert (row.time_low, row.time, row.time_high, row.milliseconds) == (1.5, 1.5, 1.5, 6000.0)


def test_a_variant_is_measured_against_its_own_reference(monkeypatch, clock):
    changed = []

    def change(name):
        return lambda model: changed.append((name, model.config.method)) or model

    variant = Variant(
        "grape",
        {"method": "fa", "fa_grape": True},
        against={"attn_mode": "softmax"},
        train={"batch_size": 4, "freeze_body": True},
        change=change("ours"),
        change_reference=change("the reference"),
    )
    (row,) = measured(monkeypatch, 1, variant)
    assert changed == [("ours", "fa"), ("the reference", "bp")]
    built = {(size, block, c.freeze_body, m.method, m.attn_mode) for size, block, c, m in clock.steps}
    assert built == {(4, 32, True, "fa", "sigmoid"), (8, 32, False, "bp", "softmax")}
    assert row.update > 0.0  # the variant's own: backpropagation moves no feedback


def test_what_a_variant_is_named_to_be_against_is_its_reference():
    for variant in variants(32):
        assert variant.against == ({"attn_mode": "softmax"} if "against softmax" in variant.name else {})
        references = {
            "against torch.nn.Linear": with_plain_linears,
            "against a plain GPT": as_plain,
            "against softmax": with_softmax_written_out,
        }
        named = [change for name, change in references.items() if name in variant.name]
        assert [variant.change_reference] == (named or [None])
        assert variant.change == (as_plain if variant.name == "plain GPT" else None)
    arm = Arm("late", "late", {"method": "fa"}, {"freeze_body": True}, (1,), 0)
    (variant,) = arms_of(SimpleNamespace(arms=[arm]))
    assert variant == Variant("late", {"method": "fa"}, train={"freeze_body": True})


def test_the_arms_of_a_suite_are_held_against_backpropagation_at_their_own_sizes(tmp_path):
    suite = tmp_path / "sizes.toml"
    suite.write_text(
        'question = "?"\npreset = "tiny"\nseeds = [1]\nmodel = { n_layer = 1 }\n'
        '[arms.wide]\nmodel = { n_embd = 64, method = "fa" }\ntrain = { batch_size = 2, lr = 1.0 }\n'
        "[arms.bp]\n"
    )
    wide, small = arms_of(read_suite(suite))
    assert wide.against == {"n_layer": 1, "n_embd": 64} and wide.train_against == {"batch_size": 2}
    assert small.against == {"n_layer": 1} and small.train_against == {}
    rows = measure("tiny", torch.device("cpu"), 2, lambda text: None, read_suite(suite))
    assert rows[1].flops == 1.0  # the same model
    assert rows[0].flops == pytest.approx(step_flops_of("fa", 64, 2) / step_flops_of("bp", 64, 2))


def step_flops_of(method, width, rows):
    model, train = preset("tiny", {"n_layer": 1, "n_embd": width, "method": method})
    text = torch.zeros(rows, model.block_size, dtype=torch.long)
    return step_flops(build_model(model, train), text, text)


ROW = Row("fa", 12.3456, 1.25, 1.125, 1.5, 0.75, 0.8125, 2.375, 15012.4, 1.625, 0.3125)
EARLIER = ["name", "milliseconds", "time", "time_low", "time_high", "memory", "flops", "update"]


def test_a_table_has_every_number_below_its_heading():
    heading, line = render([dataclasses.replace(ROW, name="a longer name")]).splitlines()
    below = {
        "step time": "1.25",
        "quartiles": "1.12 .. 1.50",
        "step memory": "0.75",
        "matmul FLOPs": "0.812",
        "feedback update": "2.38 forward",
        "tokens/s": "15,012",
        "of GEMM peak": "31.2%",
    }
    assert line.split() == ["a", "longer", "name", *" ".join(below.values()).split()]
    for title, numbers in below.items():
        start = heading.index(title)
        assert numbers in line[start - 2 : start + len(title) + 4], title


def test_rows_are_kept_with_four_digits_and_what_they_were_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_rows, "environment", lambda device: {"device": f"toy {device}"})
    path = tmp_path / "rows.json"
    write_rows([ROW, dataclasses.replace(ROW, name="dfa", flops=0.123449)], path, "cpu", "cuda:1")
    rows, measured_on = read_rows(path)
    assert rows["fa"] == dataclasses.replace(ROW, milliseconds=12.35, tokens_per_second=15010.0)
    assert rows["dfa"].flops == 0.1234
    assert measured_on == {"device": "toy cuda:1"} and json.loads(path.read_text())["preset"] == "cpu"
    write_rows([ROW], path, "cpu", "cpu", {"float32": 101.2345})
    assert read_rows(path)[1] == {"device": "toy cpu", "gemm_gflops": {"float32": 101.2}}


# ------------------------------------------------------------ what a step costs


def costed(**options):
    """Return a model of 2 blocks, width 12 and vocabulary 7, and a batch of 2 x 5 tokens."""
    model = make_model(torch.float32, **options)
    return model, make_batch()


WEIGHTS = 2 * 12 * 12**2 + 12 * 7  # of all matrices that a token passes
MIXING = 2 * 2 * 5 * 12  # q k^T and the mixed values, per token in two blocks
FORWARD = 2 * 10 * (WEIGHTS + MIXING)


def test_the_flops_of_a_step_and_of_its_update_by_hand():
    model, batch = costed()
    assert (step_flops(model, *batch), alignment_in_forward_passes(model, batch[0])) == (3 * FORWARD, 0.0)
    model, batch = costed(method="fa", fa_grape=True, fa_grape_n_probe=3)
    # Three probes through W and through B, and their outer product: 2 FLOPs each per weight and probe.
    update = 3 * 2 * 3 * WEIGHTS
    assert step_flops(model, *batch) == 3 * FORWARD + update
    assert alignment_in_forward_passes(model, batch[0]) == pytest.approx(update / FORWARD, rel=1e-12)


def test_torchs_attention_on_the_cpu_counts_as_it_does_written_out():
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    product = 2 * 2 * 3 * 5 * 5 * 4  # scores, or mixed values
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        mixed.sum().backward()
    assert counter.get_total_flops() == 4 * product  # two for each of the two


def test_an_anchor_costs_a_step_of_backpropagation():
    model, batch = costed(method="dfa")
    assert step_flops(model, *batch, anchor=True) == 3 * FORWARD != step_flops(model, *batch)


def test_counting_leaves_the_model_alone():
    model, batch = costed(method="fa", fa_grape=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step_flops(model, *batch), alignment_in_forward_passes(model, batch[0]), step_bytes(model, *batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_memory_of_a_gpu_is_what_was_allocated_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (1 + device.index) * 3 * 2**20)
    assert peak_memory_mib(torch.device("cuda:1")) == 6.0


def test_an_arm_that_cannot_run_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "s.toml").write_text(
        'question = "?"\npreset = "tiny"\nseeds = [1]\n[arms.bp]\n[arms.wide]\nmodel = { resid_topk = 999 }\n'
    )
    monkeypatch.setattr(bench, "_row", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match="arm 'wide': resid_topk=999"):
        bench.measure("tiny", torch.device("cpu"), 1, lambda text: None, read_suite(tmp_path / "s.toml"))


def test_the_plain_gpt_is_the_function_of_ours_with_torchs_own_parts():
    config = preset("tiny", {"attn_mode": "softmax", "bias": True})[0]
    torch.manual_seed(0)
    ours = LocalGPT(config)
    plain = PlainGPT(config)
    assert {type(m) for m in plain.modules() if not [*m.children()]} == {
        nn.Embedding,
        nn.LayerNorm,
        nn.Linear,
    }
    with torch.no_grad():
        ours.head.weight.copy_(ours.tok_emb.weight)
        for mine, other in zip(ours.blocks, plain.blocks, strict=True):
            for name, layers in {
                "qkv": [mine.attn.q_proj, mine.attn.k_proj, mine.attn.v_proj],
                "o_proj": [mine.attn.o_proj],
                "fc": [mine.mlp.fc],
                "proj": [mine.mlp.proj],
            }.items():
                getattr(other, name).weight.copy_(torch.cat([layer.weight for layer in layers]))
                getattr(other, name).bias.copy_(torch.cat([layer.bias for layer in layers]))
        plain.tok_emb.weight.copy_(ours.tok_emb.weight)
        plain.pos_emb.weight.copy_(ours.pos_emb.weight)
    idx = torch.randint(config.vocab_size, (2, 9))
    for actual, expected in zip(plain(idx, idx), ours(idx, idx), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert plain.head.weight is plain.tok_emb.weight and [*plain.mirrored()] == []
