"""The best rate at which this machine multiplies matrices, the measure of what a step makes of it.

A product of two n x n matrices is 2 n^3 FLOPs. The rate is that of products in a row, after some that do not
count, for as long as a clock needs; the best of a few sizes and rounds stands for the machine. It is measured
where and how the steps are: on their device, in their precision, with their threads.
"""

import math
import time

import torch

from localgpt_core.common.environment import wait_for

__all__ = ["Peaks", "gemm_gflops"]

SIZES = {"cpu": (512, 768, 1024), "cuda": (1024, 2048, 4096)}  # n, by the type of the device
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WARM_UP_PRODUCTS = 2
ROUNDS = 3
SECONDS = 0.1  # of a round, about


def gemm_gflops(device: torch.device, precision: str) -> float:
    """Return the best rate in GFLOP/s of products of square matrices of the `SIZES` of a device."""
    return max(_rate(n, device, DTYPES[precision]) for n in SIZES[device.type])


def _rate(n: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)

    def seconds(products: int) -> float:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        wait_for(device)
        return time.perf_counter() - start

    seconds(WARM_UP_PRODUCTS)
    products = max(1, math.ceil(SECONDS / max(seconds(1), 1e-9)))
    shortest = min(seconds(products) for _ in range(ROUNDS))
    return 2e-9 * n**3 * products / max(shortest, 1e-9)


class Peaks:
    """The best rates of a device in GFLOP/s by precision, each measured when it is first asked for.

    ``gflops`` has those that were.
    """

    def __init__(self, device: torch.device, gflops: dict[str, float] | None = None) -> None:
        self.device, self.gflops = device, dict(gflops or {})

    def of(self, precision: str) -> float:
        """Return the rate in ``precision``: ``"float32"``, ``"bfloat16"`` or ``"float64"``."""
        if precision not in self.gflops:
            self.gflops[precision] = gemm_gflops(self.device, precision)
        return self.gflops[precision]

    def share(self, flops: float, seconds: float, precision: str) -> float:
        """Return which share of the rate ``flops`` of matrix products in ``seconds`` are."""
        return flops / (seconds * 1e9 * self.of(precision))

    def __str__(self) -> str:
        """Return the rates that were measured, for people."""
        sizes = ", ".join(map(str, SIZES[self.device.type]))
        rates = ", ".join(f"{rate:,.4g} GFLOP/s in {name}" for name, rate in self.gflops.items())
        return f"GEMM peak: {rates or 'not measured'} (the best of square products of {sizes})"
