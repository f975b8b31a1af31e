"""The best rate of the machine, from products that take what a script says."""

import math
from types import SimpleNamespace

import pytest
import torch

from localgpt_core.bench import peak
from localgpt_core.bench.peak import Peaks, gemm_gflops

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch):
    """Products of n x n matrices in `seconds[n]` each, the first and the tenth of each size far slower.

    They are done when somebody waits for them, as those of a GPU are.
    """
    made = SimpleNamespace(now=0.0, queued=0.0, seconds={}, of=[], dtypes=set())

    def wait(device):
        made.now, made.queued = made.now + made.queued, 0.0

    def mm(a, b, out):
        n = len(a)
        assert a.shape == b.shape == out.shape == (n, n) and a.dtype == b.dtype == out.dtype
        assert a.std() > 0.5 and not torch.equal(a, b)
        made.queued += made.seconds[n] * (100 if made.of.count(n) in (0, 9) else 1)
        made.of.append(n)
        assert len(made.of) < 10_000, "nobody waits, and the clock stands"
        made.dtypes.add(a.dtype)

    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(peak, "wait_for", wait)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(peak, "SECONDS", 1.0)
    return made


def test_the_peak_is_the_best_rate_after_a_warm_up(products):
    products.seconds = {8: 1 / 64, 16: 1 / 32}
    # 2 x 512 FLOPs in 1/64 s, 2 x 4096 in 1/32 s: the larger ones go faster.
    assert gemm_gflops(CPU, "float32") == pytest.approx(2 * 4096 * 32 / 1e9, rel=1e-9)
    # Two to warm up, one to see how long it takes, and three rounds of a second.
    assert products.of.count(8) == 3 + 3 * 64 and products.of.count(16) == 3 + 3 * 32
    products.seconds[16] = 1.0
    assert gemm_gflops(CPU, "float32") == pytest.approx(2 * 512 * 64 / 1e9, rel=1e-9)


def test_a_precision_is_measured_once_and_with_its_type(products):
    products.seconds = {8: 1 / 64, 16: 1 / 32}
    peaks = Peaks(CPU)
    assert str(peaks).startswith("GEMM peak: not measured")
    rate = peaks.of("bfloat16")
    assert products.dtypes == {torch.bfloat16}
    made = len(products.of)
    assert peaks.of("bfloat16") == rate and len(products.of) == made
    peaks.of("float64")
    assert products.dtypes == {torch.bfloat16, torch.float64} and [*peaks.gflops] == ["bfloat16", "float64"]


def test_a_share_is_a_rate_over_the_peak_by_hand():
    peaks = Peaks(CPU, {"float32": 4.0, "float64": 1234.5})
    assert peaks.share(3e9, 2.0, "float32") == 3 / 8
    assert str(peaks) == (
        "GEMM peak: 4 GFLOP/s in float32, 1,234 GFLOP/s in float64 (the best of square products of 8, 16)"
    )


def test_the_real_peak_is_a_number(monkeypatch):
    assert 0 < gemm_gflops(CPU, "float32") < math.inf
    assert {*peak.DTYPES} == {"float32", "bfloat16", "float64"}
