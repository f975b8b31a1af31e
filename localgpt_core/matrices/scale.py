r"""The size of a feedback matrix: that of its weight, which is read, or estimated by forward probes.

One number of W (out x in) says how large it is,

    mean |W| = <W, S>_F / (out in),   S = sign(W)      to a feedback that has the signs S
    |W|_F                                              to one with a direction of its own

and whoever may not read W can drive it forward. For probes p ~ N(0, I_in), the rows of P (n x in),

    E[(W p) . (S p)] = <W, S>_F,     E|S p|^2 = |S|_F^2,     E|W p|^2 = |W|_F^2,
    mean |W| ~ |S|_F^2 / (out in) * sum(P W^T o P S^T) / sum(P S^T o P S^T)
    |W|_F    ~ sqrt(sum(P W^T o P W^T) / n).

The numerator of the first, over n out in, is an estimate too, and an unbiased one. But |S|_F^2 is known, and
with it the denominator's sampling error, which the numerator shares: for Gaussian weights the quotient has a
relative standard error of about sqrt(0.57 / (n out)) instead of sqrt((2 / in + 2.57 / out) / n), and none at
all where every magnitude is the same. The second has sqrt((1 / in + 1 / out) / (2 n)).

A weight of zeros has no size to follow, and an estimate that is not positive none to use: the feedback keeps
its own, and so its pattern. Half precision is computed in float32.

Prior art: Moskovitz, Litwin-Kumar and Abbott 2018 let feedback agree with the weight in its signs, or in its
norm, in deep convolutional networks.
"""

import torch
from torch import Tensor

from localgpt_core.common.modes import in_float32

__all__ = ["follow_magnitude", "follow_norm"]


@torch.no_grad()
@in_float32
def follow_magnitude(weight: Tensor, magnitudes: Tensor, n_probe: int, generator: torch.Generator) -> None:
    """Scale ``magnitudes`` in place to the mean magnitude of ``weight`` (out x in).

    They are one number or (out x in). With ``n_probe`` probes that mean is estimated from their answers and
    the weight's signs; 0 reads it.
    """
    if n_probe:
        signs = torch.sign(weight)
        probes = _probes(weight, n_probe, generator)
        answers = probes @ signs.T
        share = (probes @ weight.T * answers).sum() / answers.square().sum()
        mean = share * signs.abs().mean()
    else:
        mean = weight.abs().mean()
    _scale(magnitudes, magnitudes.mean(), mean)


@torch.no_grad()
@in_float32
def follow_norm(weight: Tensor, feedback: Tensor, n_probe: int, generator: torch.Generator) -> None:
    """Scale ``feedback`` (out x in) in place to the Frobenius norm of ``weight`` (out x in).

    With ``n_probe`` probes that norm is estimated from their answers; 0 reads it.
    """
    if n_probe:
        norm = (_probes(weight, n_probe, generator) @ weight.T).norm() / n_probe**0.5
    else:
        norm = weight.norm()
    _scale(feedback, feedback.norm(), norm)


def _probes(weight: Tensor, n_probe: int, generator: torch.Generator) -> Tensor:
    shape = (n_probe, weight.shape[1])
    return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)


def _scale(matrix: Tensor, size: Tensor, to: Tensor) -> None:
    """Multiply ``matrix`` by ``to / size``, so that a single number becomes ``to`` itself."""
    tiny = torch.finfo(matrix.dtype).tiny
    follows = (size > tiny) & (to > tiny)
    matrix.div_(torch.where(follows, size, 1.0)).mul_(torch.where(follows, to, 1.0))
