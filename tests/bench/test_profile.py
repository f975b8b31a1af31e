"""Where a step's time goes: by hand on fabricated events, and on real steps."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from toys import TOY_SUITE

from localgpt_core import RULES
from localgpt_core.bench import kinds as tables
from localgpt_core.bench import profile as profiling
from localgpt_core.bench import read_rows
from localgpt_core.bench.kinds import KINDS, OPERATORS, SCOPES, STEP, spent
from localgpt_core.bench.measuring import Stepper
from localgpt_core.bench.peak import Peaks
from localgpt_core.bench.profile import Profile, profiled, profiles, render_profiles, trace_files
from localgpt_core.bench.variants import Variant, as_plain
from localgpt_core.config import preset
from localgpt_core.experiments.suites import Arm
from localgpt_core.training import step as training

CPU = torch.device("cpu")


class Events:
    """Fabricated events in the order in which they start; times in microseconds."""

    def __init__(self):
        self.all = []

    def add(self, name, own=0.0, parent=None, seq=-1, of_backward=False, kernels=(), device=DeviceType.CPU):
        event = SimpleNamespace(
            name=name,
            self_cpu_time_total=own,
            cpu_parent=parent,
            sequence_nr=seq,
            fwd_thread=int(of_backward),
            kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
            device_type=device,
            time_range=SimpleNamespace(start=len(self.all)),
            cpu_time_total=None,
        )
        self.all.append(event)
        return event

    def step(self, total):
        step = self.add(STEP, own=12345.0)
        step.cpu_time_total = total
        return step


@pytest.fixture
def events():
    return Events()


def taken(found):
    """Return the kinds that took time, and the unknown operators."""
    kinds, unknown = found
    assert [*kinds] == [*KINDS]
    return {kind: time for kind, time in kinds.items() if time}, unknown


def test_the_time_of_a_step_by_hand(events):
    step = events.step(total=10_000.0)
    linear = events.add("aten::linear", 10.0, step)
    events.add("aten::t", 400.0, linear)  # a view: no kind's
    events.add("aten::addmm", 1990.0, linear)
    events.add("aten::baddbmm", 1000.0, step)
    events.add("aten::sigmoid", 500.0, step)
    events.add("aten::gelu", 250.0, step)
    clone = events.add("aten::clone", 50.0, step)
    events.add("aten::copy_", 150.0, clone)
    events.add("LocalLinearFunction", 77.0, step)  # a Function in Python
    assert taken(spent(events.all, on_device=False)) == (
        {
            "products": 2.0,
            "attention": 1.5,
            "elementwise, sums": 0.25,
            "copies, casts": 0.2,
            "Python, launches": 10.0 - 2.0 - 1.5 - 0.25 - 0.2,
        },
        {},
    )


def test_inside_a_range_all_is_of_its_kind_and_the_outermost_decides(events):
    step = events.step(total=1000.0)
    feedback = events.add("localgpt: feedback", 1.0, step)
    norm = events.add("localgpt: norms", 2.0, feedback)
    events.add("aten::mul", 4.0, norm)
    events.add("aten::mm", 8.0, feedback)
    events.add("mine::unheard_of", 16.0, feedback)
    optimiser = events.add("Optimizer.step#AdamW.step", 32.0, step)
    events.add("aten::add_", 64.0, optimiser)
    kinds, unknown = taken(spent(events.all, on_device=False))
    assert kinds.pop("Python, launches") == pytest.approx(1.0 - 0.127)
    assert kinds == pytest.approx({"feedback": 0.031, "optimiser": 0.096}) and unknown == {}


def test_a_backward_step_is_of_the_scope_of_what_asked_for_it(events):
    step = events.step(total=1000.0)
    norm = events.add("localgpt: norms", 0.0, step)
    events.add("aten::mul", 1.0, norm, seq=7)
    events.add("aten::ones_like", 2.0, norm, seq=8)  # made no node: the number is still free
    events.add("aten::add", 4.0, step, seq=8)
    attention = events.add("aten::scaled_dot_product_attention", 8.0, step, seq=9)
    events.add("aten::_a_kernel_of_some_device", 16.0, attention, seq=9)
    for number, own in ((9, 32.0), (8, 64.0), (7, 128.0)):
        engine = events.add(f"{tables.ENGINE}XBackward0", 0.0, step, number, of_backward=True)
        node = events.add("XBackward0", 0.0, engine, number, of_backward=True)
        events.add("aten::mul", own, node)
    summed = events.add("aten::sum", 256.0, engine)  # by the engine itself
    assert summed.cpu_parent.sequence_nr == 7
    kinds, unknown = taken(spent(events.all, on_device=False))
    assert kinds.pop("Python, launches") == pytest.approx(1.0 - 0.511)
    expected = {"norms": 0.001 + 0.002 + 0.128 + 0.256, "elementwise, sums": 0.004 + 0.064}
    assert kinds == pytest.approx({**expected, "attention": 0.008 + 0.016 + 0.032}) and unknown == {}


def test_on_a_gpu_the_time_is_that_of_the_kernels(events):
    events.add("ProfilerStep*", 5.0, kernels=[("ProfilerStep*", 9000.0)])
    step = events.step(total=10_000.0)
    step.kernels = [SimpleNamespace(name=STEP, duration=9000.0)]  # a range is there too, on the device
    feedback = events.add("localgpt: feedback", 3000.0, step, kernels=[("localgpt: feedback", 500.0)])
    events.add("aten::mm", 2000.0, feedback, kernels=[("sgemm", 300.0)])
    events.add("aten::mm", 9999.0, step, kernels=[("sgemm", 3000.0), ("splitKreduce", 1000.0)])
    events.add("cudaLaunchKernel", 700.0, step)
    events.add("aten::gelu", 1.0, None, kernels=[("gelu", 500.0)])  # on autograd's own thread
    events.add("void at::native::a_kernel<float>()", device=DeviceType.CUDA)  # what an operator launched
    kinds, unknown = taken(spent(events.all, on_device=True))
    assert kinds.pop("Python, launches") == pytest.approx(10.0 - 0.3 - 4.0 - 0.5)  # nothing runs on it
    assert kinds == pytest.approx({"feedback": 0.3, "products": 4.0, "elementwise, sums": 0.5})
    assert unknown == {}


def test_an_operator_that_no_table_has_is_named(events):
    step = events.step(total=100.0)
    events.add("aten::_new_in_the_next_torch", 10.0, step)
    events.add("mine::kernel", 20.0, step)
    events.add("aten::_new_in_the_next_torch", 30.0, step)
    kinds, unknown = spent(events.all, on_device=False)
    assert unknown == pytest.approx({"aten::_new_in_the_next_torch": 0.04, "mine::kernel": 0.02})
    assert kinds["other"] == pytest.approx(0.06) and sum(kinds.values()) == pytest.approx(0.1)
    shown = render_profiles([Profile("fa", kinds, unknown, 1.0, 0.5)])
    assert "other in fa (ms): aten::_new_in_the_next_torch (0.040), mine::kernel (0.020)" in shown
    unknown = {f"mine::op{number}": 0.01 * number for number in range(1, 13)}
    shown = render_profiles([Profile("fa", kinds, unknown, 1.0, 0.5)]).splitlines()[-1]
    assert shown.startswith("other in fa (ms): mine::op12 (0.120),")
    assert shown.endswith("mine::op3 (0.030) and 2 more")


def test_the_tables_have_kinds_only_and_each_name_once():
    assert {*OPERATORS.values(), *SCOPES.values()} <= {*KINDS} - {"other"}
    names = [name for words in tables._NAMES.values() for name in words.split()]
    assert len(names) == len({*names})
    for name in names:
        assert hasattr(torch.ops.aten, name) or name == "numpy_T", name


PEAKS = Peaks(CPU, {"float32": 100.0, "float64": 50.0, "bfloat16": 50.0})
LIVE = [Variant(rule, {"method": rule}) for rule in RULES]
LIVE += [
    Variant("plain GPT", {"dropout": 0.1}, change=as_plain),
    Variant("network", {"method": "dfa", "dfa_granularity": "sublayer", "dfa_norm": True, "fa_grape": True}),
    Variant("kaczmarz", {"method": "kp", "fa_grape": True, "fa_grape_update": "kaczmarz"}),
    Variant("softmax", {"attn_mode": "softmax", "dropout": 0.1, "ln_mode": "center_scale"}),
    Variant("fused", {"attn_mode": "softmax", "fuse_attn_local": True, "ln_mode": "ste", "ste_gelu": True}),
    Variant("narrow", {"vq_codes": 64, "mlp_topk": 8, "subspace_rank": 8, "gated_blocks": True}),
    Variant("winners", {"resid_topk": 8, "ste_sigmoid": True, "ste_gelu": True, "gelu_surrogate": "steps"}),
    Variant("codes", {"vq_codes": 16, "vq_groups": 8, "vq_rms": "fixed", "vq_backward": "rotation"}),
    Variant("rounded", {"resid_bits": 4}),
    Variant("bfloat16", {"ln_mode": "none"}, train={"precision": "bfloat16", "compile": True}),
    Variant("float64", {"ln_mode": "projected"}, train={"precision": "float64", "freeze_body": True}),
]


@pytest.fixture(scope="module")
def live():
    found = profiles("tiny", PEAKS, 1, lambda text: None, LIVE)
    return {one.name: one for one in found}


def test_every_rule_and_option_has_all_its_time_in_kinds_that_are_known(live):
    usual = {*KINDS} - {"bottlenecks", "other"}
    for one in live.values():
        assert [*one.kinds] == [*KINDS] and one.unknown == {}, one.name
        shares = {kind: time / sum(one.kinds.values()) for kind, time in one.kinds.items()}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-9)
        assert all(share >= 0 for share in shares.values()), one
        assert {kind for kind, share in shares.items() if share} >= usual, one.name
        assert one.peak_share > 0 and one.unprofiled > 0
    assert all(live[name].kinds["bottlenecks"] > 0 for name in ("narrow", "winners", "codes", "rounded"))
    assert live["bp"].kinds["bottlenecks"] == 0.0


def counted(monkeypatch, options, operators):
    """Return by kind how many of some operators a step of preset tiny calls."""
    weight = property(lambda event: 1000.0 * (event.name in operators))
    monkeypatch.setattr(FunctionEvent, "self_cpu_time_total", weight)
    kinds, _ = spent(profiling._recorded(Stepper(*preset("tiny", options), CPU, None)).events(), False)
    return {kind: count for kind, count in kinds.items() if count and kind != tables.LAUNCHES}


def test_every_product_of_a_step_is_counted_where_it_belongs(monkeypatch):
    # q, k, v in one, o, fc and proj in two blocks, and the head: forward, and two backward.
    step = 3 * (2 * 4 + 1)
    products = {"aten::mm", "aten::addmm"}
    assert counted(monkeypatch, {}, products) == {"products": step}
    # Probes through W and B and their outer product, for each of 2 x 6 layers and the head.
    probes = 3 * (2 * 6 + 1)
    aligned = counted(monkeypatch, {"method": "fa", "fa_grape": True}, products)
    assert aligned == {"products": step, "feedback": probes}
    # Scores, values and the two gradients of each.
    assert counted(monkeypatch, {}, {"aten::bmm", "aten::baddbmm"}) == {"attention": 2 * (2 + 4)}


def test_a_norm_of_our_own_is_a_norm_forward_and_backward(monkeypatch):
    # Five norms, backward: g gamma, and its part without a mean over sigma.
    plain = counted(monkeypatch, {}, {"aten::mul"})
    own = counted(monkeypatch, {"ln_mode": "center_scale"}, {"aten::mul"})
    assert own["norms"] == 5 * 2
    assert {kind: count for kind, count in own.items() if kind != "norms"} == plain


def test_a_step_is_profiled_without_compilation(monkeypatch):
    monkeypatch.setattr("localgpt_core.bench.measuring.compiled", lambda model: pytest.fail("compiled"))
    (one,) = profiles("tiny", PEAKS, 1, lambda text: None, [Variant("bp", train={"compile": True})])
    assert one.kinds["products"] > 0


def test_a_profile_leaves_no_range_behind_and_takes_the_steps_that_it_would(monkeypatch):
    before = training.mirror, nn.utils.clip_grad_norm_
    model, config = preset("tiny", {"method": "kp"})
    torch.manual_seed(0)
    stepper, other = (Stepper(model, config, CPU, None) for _ in range(2))
    profiling._recorded(stepper)
    other.step()
    other.step()
    for mine, theirs in zip(stepper.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert (training.mirror, nn.utils.clip_grad_norm_) == before
    for module in stepper.model.modules():
        assert "forward" not in vars(module) and "align_feedback" not in vars(module)


def test_ranges_are_marked_around_the_work_of_a_step():
    model, config = preset("tiny", {"method": "kp", "ln_mode": "center_scale"})
    names = [event.name for event in profiling._recorded(Stepper(model, config, CPU, None)).events()]
    assert names.count(STEP) == 1
    assert names.count("localgpt: feedback") == 2  # before the forward pass, and after the backward pass
    assert names.count("localgpt: optimiser") == 1  # clipping: torch marks the rest
    assert names.count("localgpt: norms") == 2 * 2 + 1
    assert names.count("Optimizer.step#AdamW.step") == names.count("Optimizer.zero_grad#AdamW.zero_grad") == 1


def test_the_flops_of_products_are_those_outside_of_attention_and_feedback():
    options = {"method": "fa", "fa_grape": True}
    stepper = Stepper(*preset("tiny", options), CPU, None)
    assert profiling._product_flops(stepper) == 3 * 2 * 8 * 32 * (2 * 12 * 32**2 + 65 * 32)
    assert all(parameter.grad is not None for parameter in stepper.model.parameters())


def scripted(monkeypatch, totals):
    """Let steps take what a script says: ``totals`` in ms, of which half is products."""
    left = iter(totals)

    def spent(events, on_device):
        total = next(left)
        kinds = dict.fromkeys(KINDS, 0.0) | {"products": total / 2, "other": total / 2}
        return kinds, {f"op of {total}": total / 2}

    monkeypatch.setattr(profiling, "spent", spent)
    monkeypatch.setattr(profiling, "_recorded", lambda stepper: SimpleNamespace(events=lambda: []))
    monkeypatch.setattr(profiling, "_product_flops", lambda stepper: 3e6)
    times = iter([0.001, 0.002, 0.009, 0.003, 0.004] * 2)
    monkeypatch.setattr(Stepper, "seconds", lambda self: next(times))


@pytest.mark.parametrize(
    ("totals", "middle"),
    [([8.0, 100.0, 4.0, 12.0, 1.0], [4.0, 8.0, 12.0]), ([6.0], [6.0]), ([6.0, 2.0],) * 2],
)
def test_a_profile_is_the_mean_of_the_middle_half_of_the_steps(monkeypatch, totals, middle):
    scripted(monkeypatch, totals)
    peaks = Peaks(CPU, {"float32": 2.0})
    (one,) = profiles("tiny", peaks, len(totals), lambda text: None, [Variant("bp")])
    mean = sum(middle) / len(middle)
    assert one.kinds["products"] == pytest.approx(mean / 2)
    assert one.unknown == pytest.approx({f"op of {total}": total / 2 / len(middle) for total in middle})
    assert one.peak_share == pytest.approx(3e6 / (mean / 2 / 1000) / 2e9)
    assert one.unprofiled == pytest.approx({5: 3.0, 1: 1.0, 2: 1.5}[len(totals)])


def test_a_table_has_the_milliseconds_and_the_percent_of_every_kind():
    kinds = dict.fromkeys(KINDS, 0.0) | {"products": 7.5, "Python, launches": 2.5}
    one = Profile("fa", kinds, {}, 9.25, 0.875)
    long = dataclasses.replace(one, name="dfa block norm + grape", kinds=dict.fromkeys(KINDS, 1.0))
    lines = render_profiles([one, long]).splitlines()
    # Names are broken, and end on the line of the heading.
    assert lines[0].split() == ["dfa", "block"]
    assert lines[1].split() == ["ms", "per", "step", "fa", "norm", "+", "grape"]
    rows = {line[:18].strip(): line[18:].split() for line in lines[2:]}
    assert [*rows] == [*KINDS, "step", "without profiler", "products, of peak"]
    assert rows["products"] == ["7.50", "75.0%", "1.00", "8.3%"]
    assert rows["Python, launches"] == ["2.50", "25.0%", "1.00", "8.3%"]
    assert (rows["step"], rows["without profiler"]) == (["10.00", "12.00"], ["9.25", "9.25"])
    assert rows["products, of peak"] == ["87.5%", "87.5%"]
    several = render_profiles([dataclasses.replace(one, name=f"arm {number}") for number in range(9)])
    assert [len(part.splitlines()[0].split()) for part in several.split("\n\n")] == [3 + 2 * 7, 3 + 2 * 2]
    assert max(map(len, several.splitlines())) <= 18 + 7 * 15


def test_what_is_profiled_unless_a_suite_says_otherwise():
    shown = profiled(None)
    assert [variant.name for variant in shown] == [
        *("plain GPT", "bp softmax", "bp", "fa", "dfa", "kp + grape, kaczmarz", "dfa block norm + grape")
    ]
    assert [variant.change for variant in shown] == [as_plain] + [None] * 6
    arm = Arm("late", "late", {"method": "fa"}, {"freeze_body": True}, (1,), 0)
    assert profiled(SimpleNamespace(arms=[arm])) == [
        Variant("late", {"method": "fa"}, train={"freeze_body": True})
    ]


def test_a_trace_opens_in_perfetto_and_names_no_folder_of_the_machine(tmp_path):
    variants = [Variant("bp"), Variant("a/b: ü" + "x" * 80, {"method": "fa"})]
    files = trace_files(variants, tmp_path / "new")
    assert [file.name for file in files] == ["01-bp.json", f"02-a-b-ü{'x' * 55}.json"]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    profiles("tiny", PEAKS, 1, lambda text: None, variants, files)
    assert torch.equal(torch.rand(2), expected)
    assert {*(tmp_path / "new").iterdir()} == {*files}
    for file in files:
        text = file.read_text(encoding="utf-8")
        trace = json.loads(text)
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {STEP, "aten::mm", "localgpt: norms"} <= names
        assert trace["traceName"] == file.name and "host_name" not in trace
        assert not re.findall(r'"(?:[A-Za-z]:\\|/|~)[^"]*"', text)
        for place in (Path.home(), Path.cwd(), os.path.dirname(torch.__file__), tmp_path):
            assert str(place) not in text


def test_an_arm_that_cannot_run_is_refused_before_anything_is_profiled(monkeypatch):
    monkeypatch.setattr(profiling, "_profile", lambda *args: pytest.fail("profiled"))
    with pytest.raises(ValueError, match="arm 'wide': resid_topk=999"):
        profiles("tiny", PEAKS, 1, print, [Variant("bp"), Variant("wide", {"resid_topk": 999})])


def test_the_command_says_what_it_profiles_and_nothing_else(tmp_path):
    (tmp_path / "suite.toml").write_text(TOY_SUITE)

    def play(*arguments):
        command = [sys.executable, "-m", "localgpt_core", "bench", "suite.toml", "--pairs", "1", *arguments]
        return subprocess.run(
            [*command, "--preset", "tiny"], cwd=tmp_path, capture_output=True, text=True, check=True
        )

    done = play("--profile", "--trace", "traces")
    assert done.stderr.splitlines() == ["profiling bp", "profiling frozen"]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["ms", "per", "step", "bp", "frozen"]
    assert re.fullmatch(r"GEMM peak: [\d,.]+ GFLOP/s in float32 .*", lines[-1])
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["01-bp.json", "02-frozen.json"]
    assert [line.split()[:1] for line in play("--profile").stdout.splitlines()[:2]] == [["ms"], ["products"]]
    done = play("--out", "rows.json")
    rows, measured_on = read_rows(tmp_path / "rows.json")
    assert [*rows] == ["bp", "frozen"] and [*measured_on["gemm_gflops"]] == ["float32"]
    for row in rows.values():
        rate = 1e12 * row.step_gflop / row.milliseconds
        assert rate / (1e9 * measured_on["gemm_gflops"]["float32"]) == pytest.approx(row.peak_share, rel=0.01)
        assert f"{row.peak_share:.1%}" in done.stdout
