"""The kernels of the page "Train it here": products, GELU, and where their bytes come from."""

import itertools
import re
import shutil
import subprocess

import pytest
import torch
from node import LAB, needs_node, play, unpacked
from torch.nn import functional

KERNELS = LAB / "engine/kernel.js"
SIZES = [(1, 1, 1), (4, 8, 3), (5, 13, 7), (9, 4, 2), (3, 12, 5), (7, 65, 32)]


def product(
    layout: str, m: int, n: int, k: int, apart: int, alpha: float, beta: float
) -> tuple[dict, torch.Tensor]:
    """Return a case and its result; its rows are ``apart`` numbers further apart than they are long."""
    a = torch.randn((k, m + apart) if layout == "tn" else (m, k + apart))
    b = torch.randn((n, k + apart) if layout == "nt" else (k, n + apart))
    c = torch.randn(m, n + apart)
    left = a[:, :m].T if layout == "tn" else a[:, :k]
    right = b[:, :k].T if layout == "nt" else b[:, :n]
    expected = c.clone()
    expected[:, :n] = alpha * left.double() @ right.double() + beta * c[:, :n]
    rows = {"lda": a.shape[1], "ldb": b.shape[1], "ldc": c.shape[1]}
    return {
        "layout": layout,
        "m": m,
        "n": n,
        "k": k,
        "alpha": alpha,
        "beta": beta,
        **rows,
        "a": a,
        "b": b,
        "c": c,
    }, expected


@needs_node
def test_products_and_gelu_are_those_of_torch(tmp_path):
    kinds = [(0, 1.0, 0.0), (3, 0.5, 1.0)]
    cases = [
        product(layout, *size, *kind)
        for layout, size, kind in itertools.product(("nn", "nt", "tn"), SIZES, kinds)
    ]
    x = torch.cat((torch.linspace(-9, 9, 400), torch.linspace(-1e-3, 1e-3, 8)))
    found = play("kernels.mjs", {"products": [case for case, _ in cases], "x": x}, tmp_path)
    for (case, expected), entry in zip(cases, found["products"], strict=True):
        torch.testing.assert_close(
            unpacked(entry).view(expected.shape), expected, atol=1e-5, rtol=1e-5, msg=str(case)
        )
    u = x.double().requires_grad_()
    y = functional.gelu(u)
    (slope,) = torch.autograd.grad(y.sum(), u)
    # The formula of the error function is good to 1.5e-7, times x.
    assert (unpacked(found["gelu"]) - y.detach()).abs().max() < 1e-6
    assert (unpacked(found["slope"]) - slope).abs().max() < 1e-6
    near = x.abs() < 1e-2
    torch.testing.assert_close(unpacked(found["gelu"])[near].double(), y.detach()[near], atol=0, rtol=1e-5)


def clang_version() -> str | None:
    """Return "clang 14.0.6" or the like, None where a tool is missing."""
    if not (shutil.which("clang") and shutil.which("wasm-ld")):
        return None
    said = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True).stdout
    return f"clang {re.search(r'clang version ([0-9.]*)', said)[1].rstrip('.')}"


def test_the_bytes_are_those_of_the_source(tmp_path):
    built_with = re.search(r"with (clang [\d.]*\d)", KERNELS.read_text())[1]
    if clang_version() != built_with:
        pytest.skip(f"needs {built_with} and its wasm-ld, which made the bytes; there is {clang_version()}")
    subprocess.run(["sh", str(LAB / "engine/kernel/build.sh"), str(tmp_path / "kernel.js")], check=True)
    assert (tmp_path / "kernel.js").read_text() == KERNELS.read_text()
