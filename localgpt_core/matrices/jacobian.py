r"""The Jacobian of the logits with respect to the input of every place that has a feedback matrix.

For a token with input x at some place and logits z, J = dz/dx (V x in) says how the logits answer a change of
x there, and e J is the part of the gradient of x that comes from the token's own loss. Both functions here
average J over all tokens of a batch, because one feedback matrix serves them all:

    forward mode   `jvp_estimates`  (J p) p^T for Gaussian noise p at all places and tokens at once: one pass
                                    with dual numbers, unbiased, noisy. This is what a rule may use.
    reverse mode   `mean_jacobians` V backward passes with random signs per token. This is for measuring.

In both, what a token's input does to the logits of later tokens comes with an independent random factor and
averages out. The model is in evaluation mode meanwhile, and its derivatives are exact
(`localgpt_core.common.modes`). Forward mode needs two forward passes' worth of multiplications, values and
tangents.

Forward mode also takes logits (B, V) that pool the T tokens of a sample. With J_bt = dz_b/dx_bt,

    z'_b  = sum over t of J_bt p_bt + what the noise of other places does
    J_hat = 1/(B T) sum over b of z'_b (sum over t of p_bt)^T,   E[J_hat] = mean over b and t of J_bt.

The error e_b enters at every token by one matrix, e_b @ F in the place of e_b @ J_bt, and that mean is the F
with the least sum of squared distances to the J_bt.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from localgpt_core.common.modes import evaluation_mode, exact_derivatives, tf32_on_gpu, wide, without_autocast
from localgpt_core.common.seeds import generator
from localgpt_core.common.validation import require
from localgpt_core.matrices.duals import LeanForwardMode
from localgpt_core.parallel.parts import Part

__all__ = ["jvp_estimates", "mean_jacobians"]

# Modules with a feedback matrix, which have a name and say by `disturbed` what of their input it answers for.
Places = Collection[nn.Module]
Disturb = Callable[[nn.Module, Tensor], Tensor]


@contextmanager
def _inputs_disturbed(places: Places, disturb: Disturb) -> Iterator[None]:
    """Give every place ``disturb(place, x)`` instead of its input x, for as long as the block takes."""

    def change(place: nn.Module, args: tuple) -> tuple:
        return place.disturbed(args[0], lambda x: disturb(place, x)), *args[1:]

    with ExitStack() as hooks:
        for place in places:
            hooks.callback(place.register_forward_pre_hook(change).remove)
        yield


@torch.no_grad()
def jvp_estimates(
    model: nn.Module, forward: Callable[[], Tensor], places: Places, *key: int | str, part: Part | None = None
) -> dict[nn.Module, Tensor]:
    """Return the estimate mean over tokens of (J p) p^T, (V x in), for each of ``places`` that is called.

    ``forward()`` returns the logits (..., V) of ``model``. The input of a place is (..., in), or (..., T, in)
    with further tokens; those of all its calls count alike. The noise depends on ``key`` and the order of the
    calls only. Estimates are taken in float32 at least, whose products a GPU rounds as TF32: the noise of the
    estimate is far larger. Where ``forward`` is that of a ``part`` of a batch, the noise is that of its rows,
    and the result is what it adds to the estimate of the whole.

    Raises:
        ValueError: If the pass overflows float16, if the tokens of a place do not begin with those of the
            logits, or if a place is called where torch's forward mode is off.
    """
    noise: list[tuple[nn.Module, Tensor]] = []
    tokens: Counter[nn.Module] = Counter()

    def add_noise(place: nn.Module, x: Tensor) -> Tensor:
        """Add Gaussian noise to the tangent."""
        allowed = "is called inside an autograd Function (checkpoint with use_reentrant=True is one), where "
        require(torch._C._is_fwd_grad_enabled(), "layer", place.place, f"{allowed}forward mode is off")
        source = generator(*key, len(noise), device=x.device)
        primal, tangent = forward_ad.unpack_dual(x)
        shape = primal.shape if part is None else (part.of, *primal.shape[1:])
        p = torch.randn(shape, generator=source, device=x.device, dtype=x.dtype)
        tokens[place] += p.numel() // p.shape[-1]
        p = p if part is None else p[part.rows]
        noise.append((place, p))
        return forward_ad.make_dual(primal, p if tangent is None else tangent + p)

    on = next(model.parameters()).device
    with evaluation_mode(model), exact_derivatives(model), forward_ad.dual_level(), tf32_on_gpu(on):
        with _inputs_disturbed(places, add_noise), LeanForwardMode():
            response = forward_ad.unpack_dual(forward()).tangent
        half = response.dtype == torch.float16  # torch's derivative of a norm alone is beyond its range
        allowed = "the derivative of the network overflows in it: use bfloat16 or float32"
        require(not half or bool(response.isfinite().all()), "dtype", response.dtype, allowed)
        response = wide(response)
        with without_autocast(response):
            return _mean_products(response, noise, tokens)


def _mean_products(
    response: Tensor, noise: list[tuple[nn.Module, Tensor]], tokens: Counter[nn.Module]
) -> dict[nn.Module, Tensor]:
    """Return by place the mean over the ``tokens`` of all its calls of response p^T, response (..., V)."""
    lead, sums = response.shape[:-1], {}
    for place, p in noise:
        allowed = f"must begin with the dimensions of the output, {tuple(response.shape)}, without its last"
        require(p.shape[:-1][: len(lead)] == lead, f"input of layer {place.place!r}", tuple(p.shape), allowed)
        sample = p.to(response.dtype).flatten(len(lead), -2).sum(dim=-2) if p.ndim > response.ndim else p
        sums[place] = sums.get(place, 0) + sample.to(response.dtype)
    rows = response.reshape(-1, response.shape[-1])
    return {
        place: (rows.T @ total.reshape(-1, total.shape[-1])).div_(tokens[place])
        for place, total in sums.items()
    }


def mean_jacobians(
    model: nn.Module, forward: Callable[[], Tensor], places: Places, *key: int | str
) -> dict[nn.Module, Tensor]:
    """Return the mean over tokens of J, (V x in), for each of ``places``; signs depend on ``key`` only.

    ``forward()`` returns the logits (..., V) of ``model``.
    """
    leaves: dict[nn.Module, Tensor] = {}

    def add_leaf(place: nn.Module, x: Tensor) -> Tensor:
        """Add a leaf of zeros, whose gradient is that of the input at this place alone."""
        leaves[place] = torch.zeros_like(x, requires_grad=True)
        return x + leaves[place]

    with evaluation_mode(model), exact_derivatives(model), torch.enable_grad():
        with _inputs_disturbed(places, add_leaf):
            logits = forward()
        source = generator(*key, device=logits.device)
        signs = torch.randint(2, logits.shape[:-1], generator=source, device=logits.device) * 2 - 1
        signs = signs.to(logits.dtype)[..., None]
        inputs = list(leaves.values())
        rows = []
        for v in range(logits.shape[-1]):
            total = (logits[..., v] * signs[..., 0]).sum()
            grads = torch.autograd.grad(total, inputs, retain_graph=True)
            rows.append([(grad * signs).flatten(0, -2).mean(dim=0) for grad in grads])
        return {place: torch.stack([row[i] for row in rows]).detach() for i, place in enumerate(leaves)}
