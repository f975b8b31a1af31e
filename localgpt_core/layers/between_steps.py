r"""The contract of a training step with any network that holds feedback.

    align     once per training step, before the forward pass: every place's rule moves its feedback, by
              probes of its own layer, or by one forward-mode pass of the whole network
    mirror    before the optimiser's step: feedback that takes the steps of its weight is handed its gradient;
              that which learns from the output's error has got its own by the backward pass

In between, `publish_error` (`localgpt_core.layers.linear`) joins the taps to the network's output, so that
the backward pass brings its error to every place that uses it. A network is whatever yields its places, the
modules that are `HoldsFeedback`: a `LocalGPT`, another module after `localize`, or one that has none, where
nothing moves.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from localgpt_core.common.validation import require
from localgpt_core.layers.linear import publish_error
from localgpt_core.matrices.jacobian import jvp_estimates
from localgpt_core.parallel.parts import WHOLE, Part, Split
from localgpt_core.rules.feedback import HoldsFeedback

LOST = (
    "the weight took a step and its feedback did not, which makes Kolen-Pollack feedback alignment: give the "
    "optimiser the feedback too (Localized.parameters(), LocalGPT.mirrored()), again if a tensor was replaced"
)

__all__ = ["align", "feedback_places", "learned", "mirror", "mirrored", "publish_error", "some_entries"]


def feedback_places(network: nn.Module) -> Iterator[HoldsFeedback]:
    """Yield every place of ``network`` that has a learning rule, in the order of its modules."""
    # What network.modules() yields, without the names of all: it is asked for in every step.
    seen, waiting = set(), [network]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, HoldsFeedback):
            yield module
        waiting += reversed(module._modules.values())


def align(
    places: Iterable[HoldsFeedback],
    *key: int | str,
    network: nn.Module | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
    idx: Tensor | None = None,
    forward: Callable[[], Tensor] | None = None,
    split: Split = WHOLE,
) -> None:
    """Let every place's rule move its feedback; draws depend on ``key`` and the place only.

    A rule that aligns to the network's Jacobian needs ``network``, a function ``logits(idx)`` of it, and the
    tokens ``idx`` (B, T), of whose sequences it uses the share ``jvp_share``, rounded up; or, for these two,
    ``forward()``, which returns the logits. Without ``fa_grape_head`` the output's own feedback stays.
    ``split`` says how these sequences are cut into parts, over which the estimate is the mean.

    Raises:
        ValueError: If such a rule gets no tokens.
    """
    places = list(places)
    _notice_lost(place for place in places if place.rule.mirrors_gradient)
    aligned = [place for place in places if place.rule.aligns != "no"]
    following = [place for place in aligned if place.rule.aligns == "network" and _moves(place)]
    if following:
        if forward is None:
            require(idx is not None, "idx", idx, "needs tokens: this rule aligns to the network's Jacobian")
            idx = idx[: math.ceil(following[0].rule.options.jvp_share * len(idx))]

            def estimate(part: Part) -> dict[nn.Module, Tensor]:
                return jvp_estimates(network, partial(logits, idx[part.rows]), following, *key, part=part)

            estimates = split.total(len(idx), estimate, idx.device)
        else:
            estimates = jvp_estimates(network, forward, following, *key)
        for place, jacobian in estimates.items():
            place.rule.align_to_jacobian(place.buffer, jacobian)
    for place in aligned:
        place.align_feedback(*key, place.place)


def _moves(place: HoldsFeedback) -> bool:
    return place.rule.options.fa_grape_head or not place.is_output


def mirrored(places: Iterable[HoldsFeedback]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each trained weight with the feedback that takes the same steps, where a rule has one."""
    return ((place.weight, place.buffer) for place in places if _mirrors(place))


def learned(places: Iterable[HoldsFeedback]) -> Iterator[Tensor]:
    """Yield each feedback matrix that has a gradient of its own, e^T x: the optimiser must hold it too."""
    return (place.buffer for place in places if place.learns)


def mirror(places: Iterable[HoldsFeedback], copy: bool = True) -> None:
    """Hand the gradient of each such weight to its feedback: after clipping, before the optimiser's step.

    It is a copy, since a GradScaler, or an optimiser that writes into gradients, reaches both. Where neither
    is there, ``copy=False`` saves the time of it.

    Feedback with a gradient of its own has got it; where the derivative was exact, there is none: it is 0.

    Warns:
        UserWarning: If a weight took the step after an earlier call and its feedback did not.
    """
    mirroring = [place for place in places if place.learns or _mirrors(place)]
    _notice_lost(mirroring)
    for place in mirroring:
        trains = place.matrix is not None and place.weight.requires_grad
        gradient = place.weight.grad if trains else None
        if place.learns:
            if place.buffer.grad is None and not (trains and gradient is None):
                place.buffer.grad = torch.zeros_like(place.buffer)
        elif gradient is None:
            place.buffer.grad = None
        else:
            gradient = place.oriented(gradient)
            place.buffer.grad = gradient.clone(memory_format=torch.contiguous_format) if copy else gradient
        if gradient is None:
            continue
        if place.seen_moving != _identity(place) and not gradient.is_meta:
            place.before_step = _sample(place)


def _notice_lost(places: Iterable[HoldsFeedback]) -> None:
    """Warn of feedback that stayed behind in the first step of its tensor: no optimiser holds it."""
    stepped = [place for place in places if place.before_step is not None]
    if not stepped:
        return
    moved = [(a != b).any() for p in stepped for a, b in zip(p.before_step, _sample(p), strict=True)]
    # Together, so that the device is waited for once.
    moved = iter(torch.stack([flag.to(moved[0].device) for flag in moved]).tolist())
    lost = []
    for place, weight, feedback in zip(stepped, moved, moved, strict=True):
        place.before_step = None
        place.seen_moving = _identity(place) if weight else None
        lost += [repr(place.place)] if weight and not feedback else []
    if lost:
        warnings.warn(f"layer {', '.join(lost)}: {LOST}", stacklevel=4)


def _identity(place: HoldsFeedback) -> tuple[int, int]:
    return id(place.weight), id(place.buffer)


def some_entries(matrix: Tensor) -> Tensor:
    """Return a copy of about 64 entries of ``matrix``, always the same, by which to see whether it moved."""
    flat = matrix.detach().flatten()
    return flat[:: max(1, len(flat) // 64)].clone()


def _sample(place: HoldsFeedback) -> tuple[Tensor, Tensor]:
    return some_entries(place.matrix), some_entries(place.buffer)


def _mirrors(place: HoldsFeedback) -> bool:
    if not place.rule.mirrors_gradient or place.learns or place.matrix is None:
        return False
    allowed = "its weight is computed from other parameters, whose steps Kolen-Pollack cannot mirror"
    require("weight" in place._parameters, "layer", place.place, allowed)
    return place.weight.requires_grad
