r"""The Jacobian of the logits with respect to the input of every place that has a feedback matrix.

For a token with input x at some place and logits z, J = dz/dx (V x in) says how the logits answer a change of
x there, and e J is the part of the gradient of x that comes from the token's own loss. Both functions here
average J over all tokens of a batch, because one feedback matrix serves them all:

    forward mode   `jvp_estimates`  (J p) p^T for Gaussian noise p at all places and tokens at once: one pass
                                    with dual numbers, unbiased, noisy. This is what a rule may use.
    reverse mode   `mean_jacobians` V backward passes with random signs per token. This is for measuring.

In both, what a token's input does to the logits of later tokens comes with an independent random factor and
averages out. The model is in evaluation mode meanwhile, and its derivatives are exact
(`localgpt_core.exact`). Forward mode needs two forward passes' worth of multiplications, values and tangents.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from localgpt_core.exact import evaluation_mode, exact_derivatives
from localgpt_core.feedback import HoldsFeedback, Perturbation
from localgpt_core.seeds import generator

__all__ = ["jvp_estimates", "mean_jacobians"]

Forward = Callable[[Perturbation], Tensor]


class _Noise(Perturbation):
    """Adds Gaussian noise to the tangent of every input, in forward mode."""

    def __init__(self, key: tuple[int | str, ...], asked: set[HoldsFeedback]) -> None:
        super().__init__()
        self.key, self.asked = key, asked
        self.noise: dict[HoldsFeedback, Tensor] = {}

    def perturb(self, place: HoldsFeedback, x: Tensor) -> Tensor:
        if place not in self.asked:
            return x
        source = generator(*self.key, len(self.noise), device=x.device)
        primal, tangent = forward_ad.unpack_dual(x)
        p = torch.randn(primal.shape, generator=source, device=x.device, dtype=x.dtype)
        self.noise[place] = p
        return forward_ad.make_dual(primal, p if tangent is None else tangent + p)


class _Leaves(Perturbation):
    """Adds a leaf of zeros to every input, whose gradient is that of the input at this place alone."""

    def __init__(self, asked: set[HoldsFeedback]) -> None:
        super().__init__()
        self.asked = asked
        self.leaves: dict[HoldsFeedback, Tensor] = {}

    def perturb(self, place: HoldsFeedback, x: Tensor) -> Tensor:
        if place not in self.asked:
            return x
        self.leaves[place] = torch.zeros_like(x, requires_grad=True)
        return x + self.leaves[place]


@torch.no_grad()
def jvp_estimates(
    model: nn.Module, forward: Forward, places: set[HoldsFeedback], *key: int | str
) -> dict[HoldsFeedback, Tensor]:
    """Return the estimate mean over tokens of (J p) p^T, (V x in), for each of ``places``.

    ``forward(perturbation)`` returns the logits (..., V) of ``model``. The noise depends on ``key`` only.
    """
    with evaluation_mode(model), exact_derivatives(model), forward_ad.dual_level():
        probes = _Noise(key, places)
        response = forward_ad.unpack_dual(forward(probes)).tangent
        response = response.flatten(0, -2)
        return {
            place: (response.T @ p.flatten(0, -2)).div_(len(response)) for place, p in probes.noise.items()
        }


def mean_jacobians(
    model: nn.Module, forward: Forward, places: set[HoldsFeedback], *key: int | str
) -> dict[HoldsFeedback, Tensor]:
    """Return the mean over tokens of J, (V x in), for each of ``places``; signs depend on ``key`` only."""
    with evaluation_mode(model), exact_derivatives(model), torch.enable_grad():
        leaves = _Leaves(places)
        logits = forward(leaves)
        source = generator(*key, device=logits.device)
        signs = torch.randint(2, logits.shape[:-1], generator=source, device=logits.device) * 2 - 1
        signs = signs.to(logits.dtype)[..., None]
        inputs = list(leaves.leaves.values())
        rows = []
        for v in range(logits.shape[-1]):
            total = (logits[..., v] * signs[..., 0]).sum()
            grads = torch.autograd.grad(total, inputs, retain_graph=True)
            rows.append([(grad * signs).flatten(0, -2).mean(dim=0) for grad in grads])
        return {
            place: torch.stack([row[i] for row in rows]).detach() for i, place in enumerate(leaves.leaves)
        }
