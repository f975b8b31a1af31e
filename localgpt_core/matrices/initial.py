r"""How a feedback matrix B (error_features x in_features) starts.

===========  =======================================================================  =======================
mode         entries                                                                  entry RMS
===========  =======================================================================  =======================
gaussian     independent N(0, feedback_std^2)                                         feedback_std (expected)
orthogonal   semi-orthogonal: all singular values equal                               feedback_std
ortho_he     semi-orthogonal                                                          sqrt(2 / error_features)
sparse       ``fa_sparse_k`` Gaussian non-zeros per row at random places              feedback_std in each row
===========  =======================================================================  =======================

``orthogonal`` differs from ``gaussian`` in its spectrum only. The numbers are drawn where their generator
lives. At the start of a model that is the CPU, so that a seed means the same matrix on every device.
Semi-orthogonal matrices come from the QR decomposition of a Gaussian one, with the signs of R's diagonal
removed, which makes them uniform (Mezzadri 2007).
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from localgpt_core.common.validation import require

__all__ = ["StartOptions", "initial_feedback"]


class StartOptions(Protocol):
    """The options that say how a matrix starts; `localgpt_core.rules.RuleOptions` has them."""

    fa_init_mode: str
    fa_sparse_k: int
    feedback_std: float


def initial_feedback(
    options: StartOptions, error_features: int, weight: Tensor, generator: torch.Generator
) -> Tensor:
    """Return B (error_features x in_features) in the dtype and on the device of ``weight`` (out x in).

    It is contiguous, and without numbers on the meta device.

    Raises:
        ValueError: If ``fa_sparse_k`` exceeds ``in_features``.
    """
    shape = (error_features, weight.shape[1])
    k, allowed = options.fa_sparse_k, f"must be at most in_features={weight.shape[1]}"
    require(options.fa_init_mode != "sparse" or k <= weight.shape[1], "fa_sparse_k", k, allowed)
    if weight.is_meta:
        return weight.new_empty(shape)
    if options.fa_init_mode == "sparse":
        feedback = _sparse(shape, k, generator) * options.feedback_std
    elif options.fa_init_mode == "gaussian":
        feedback = _gaussian(shape, generator) * options.feedback_std
    else:
        he = options.fa_init_mode == "ortho_he"
        rms = math.sqrt(2 / error_features) if he else options.feedback_std
        feedback = _semi_orthogonal(shape, generator) * rms
    return feedback.to(device=weight.device, dtype=weight.dtype).contiguous()


def _gaussian(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def _semi_orthogonal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a semi-orthogonal matrix scaled to entry RMS 1."""
    tall = _gaussian((max(shape), min(shape)), generator)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign() * math.sqrt(max(shape))
    return q if shape[0] >= shape[1] else q.T


def _sparse(shape: tuple[int, int], k: int, generator: torch.Generator) -> Tensor:
    """Return a matrix with ``k`` non-zeros in each row, every row of RMS 1."""
    rows, columns = shape
    k = k or max(1, columns // 16)
    like = {"dtype": torch.float64, "device": generator.device}
    places = torch.rand(shape, generator=generator, **like).topk(k, dim=1).indices
    values = _gaussian((rows, k), generator)
    values = values / values.square().mean(dim=1, keepdim=True).sqrt() * math.sqrt(columns / k)
    return torch.zeros(shape, **like).scatter_(1, places, values)
