r"""GrAPE, layer-local: turn a feedback matrix towards its weight with forward probes only.

For probes v ~ N(0, I_in), y = v W^T is a forward pass of the layer (its JVP) and y_hat = v B^T one of the
feedback. One gradient step reduces the mean over the probes of

    1 - cos(y_hat, y),   with   d(1 - cos)/dB = -(u - cos(y_hat, y) u_hat) v^T / |y_hat|,

u and u_hat being y and y_hat divided by their norms. In expectation that gradient points from B to W, because
E[v v^T] = I. With n probes in a space of dimension d the step that shrinks the misalignment fastest is
n / (n + d + 1) of the way: the misalignment loses that share at every step, whatever the layer's size.
A layer with a single output has no angle between y and y_hat, and is only scaled.

The scale follows from the same probes: E|v W^T|^2 = |W|_F^2, so B is multiplied by |y| / |y_hat|. As B turns
to W, numerator and denominator share their sampling error and the ratio becomes exact.

A second use of the same probes is the block Kaczmarz step: the smallest change of B that explains them,

    B <- B + lr (y - y_hat)^T (v v^T)^-1 v                        (out x n) (n x n) (n x in).

With lr = 1 it makes B exact on the n directions that were probed, norm included, so that the misalignment
loses n / d of its square at every step, and all of it where n >= d.

Half precision, whose rounding is of the size of a step, is moved in float32.

Neither labels, nor a backward pass, nor W^T are used. Source of the idea: Caillon et al. 2026, whose
alignment is against the network's Jacobian; the layer-local form replaces it by the layer's own.
"""

import torch
from torch import Tensor

from localgpt_core.common.modes import in_float32

__all__ = ["align_to_weight", "project_to_weight"]


@torch.no_grad()
@in_float32
def align_to_weight(
    weight: Tensor, feedback: Tensor, n_probe: int, lr: float, generator: torch.Generator
) -> None:
    """Move ``feedback`` (out x in) in place by one alignment step towards ``weight`` (out x in).

    ``lr`` is relative to the optimal step ``n_probe / (n_probe + in + 1)``. A layer whose weight or feedback
    gives no response (all zero) is left as it is: it has no direction to follow.
    """
    tiny = torch.finfo(weight.dtype).tiny
    in_features = weight.shape[1]
    probes = torch.randn(n_probe, in_features, generator=generator, device=weight.device, dtype=weight.dtype)
    response = probes @ weight.T
    predicted = probes @ feedback.T
    response_norm = response.norm(dim=1, keepdim=True)
    predicted_norm = predicted.norm(dim=1, keepdim=True)
    total, total_predicted = response_norm.norm(), predicted_norm.norm()
    alive = (total > tiny) & (total_predicted > tiny)

    direction = response / response_norm.clamp_min(tiny)
    predicted /= predicted_norm.clamp_min(tiny)
    cosine = (direction * predicted).sum(dim=1, keepdim=True)
    rate = lr * n_probe / (n_probe + in_features + 1)
    # |v W^T| is |W|_F on average: it gives the unit-free direction the size of the weight.
    size = total / n_probe**0.5
    direction.addcmul_(cosine, predicted, value=-1).mul_(alive * size * (rate / n_probe))
    feedback.mul_(torch.where(alive, total / total_predicted, 1.0))
    torch.addmm(feedback, direction.T, probes, out=feedback)


def orthonormal(probes: Tensor) -> Tensor:
    """Return an orthonormal basis (in x n) of the span of Gaussian ``probes`` (in x n).

    On a GPU, which takes 50 launches for QR, Cholesky's where n <= in / 2: so few are far from dependent.
    """
    few = 2 * probes.shape[1] <= probes.shape[0]
    return basis_by_cholesky(probes) if few and probes.is_cuda else torch.linalg.qr(probes).Q


def basis_by_cholesky(probes: Tensor) -> Tensor:
    """Return an orthonormal basis (in x n) of the span of ``probes`` (in x n), far from dependent."""
    lower = torch.linalg.cholesky_ex(probes.T @ probes).L
    return torch.linalg.solve_triangular(lower, probes.T, upper=False).T


@torch.no_grad()
@in_float32
def project_to_weight(
    weight: Tensor, feedback: Tensor, n_probe: int, lr: float, generator: torch.Generator
) -> None:
    """Move ``feedback`` (out x in) in place by one block Kaczmarz step towards ``weight`` (out x in).

    More probes than ``in`` would add nothing and are not drawn. In exact arithmetic ``lr = 1`` gives
    ``v feedback^T = v weight^T`` for every probe v.
    """
    in_features = weight.shape[1]
    shape = (in_features, min(n_probe, in_features))
    probes = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
    # Orthonormal probes of the same span: v v^T is then the identity and needs no inverse.
    directions = orthonormal(probes)
    missing = weight @ directions - feedback @ directions
    torch.addmm(feedback, missing, directions.T, alpha=lr, out=feedback)
