r"""The contract of a training step with any network that holds feedback.

    align     once per training step, before the forward pass: every place's rule moves its feedback, by
              probes of its own layer, or by one forward-mode pass of the whole network
    mirror    before the optimiser's step: feedback that takes the steps of its weight is handed its gradient

In between, `publish_error` (`localgpt_core.layers.linear`) joins the taps to the network's output, so that
the backward pass brings its error to every place that uses it. A network is whatever yields its places, the
modules that are `HoldsFeedback`: a `LocalGPT`, another module after `localize`, or one that has none, where
nothing moves.
"""

import math
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from localgpt_core.common.validation import require
from localgpt_core.layers.linear import publish_error
from localgpt_core.matrices.jacobian import jvp_estimates
from localgpt_core.rules.feedback import HoldsFeedback

__all__ = ["align", "feedback_places", "mirror", "mirrored", "publish_error"]


def feedback_places(network: nn.Module) -> Iterator[HoldsFeedback]:
    """Yield every place of ``network`` that has a learning rule, in the order of its modules."""
    return (module for module in network.modules() if isinstance(module, HoldsFeedback))


def align(
    places: Iterable[HoldsFeedback],
    *key: int | str,
    network: nn.Module | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
    idx: Tensor | None = None,
) -> None:
    """Let every place's rule move its feedback; draws depend on ``key`` and the place only.

    A rule that aligns to the network's Jacobian needs ``network``, a function ``logits(idx)`` of it, and the
    tokens ``idx`` (B, T), of whose sequences it uses the share ``jvp_share``, rounded up. Without
    ``fa_grape_head`` the output's own feedback stays.

    Raises:
        ValueError: If such a rule gets no tokens.
    """
    places = list(places)
    following = [place for place in places if place.rule.aligns == "network" and _moves(place)]
    if following:
        require(idx is not None, "idx", idx, "needs tokens: this rule aligns to the network's Jacobian")
        used = idx[: math.ceil(following[0].rule.options.jvp_share * len(idx))]
        estimates = jvp_estimates(network, lambda: logits(used), following, *key)
        for place, jacobian in estimates.items():
            place.rule.align_to_jacobian(place.buffer, jacobian)
    for place in places:
        place.align_feedback(*key, place.place)


def _moves(place: HoldsFeedback) -> bool:
    return place.rule.options.fa_grape_head or not place.is_output


def mirrored(places: Iterable[HoldsFeedback]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each trained weight with the feedback that takes the same steps, where a rule has one."""
    return ((place.weight, place.buffer) for place in places if _mirrors(place))


def mirror(places: Iterable[HoldsFeedback]) -> None:
    """Hand the gradient of each such weight to its feedback: after clipping, before the optimiser's step."""
    for place in filter(_mirrors, places):
        gradient = place.weight.grad
        place.buffer.grad = None if gradient is None else place.oriented(gradient).contiguous()


def _mirrors(place: HoldsFeedback) -> bool:
    return place.rule.mirrors_gradient and place.matrix is not None and place.weight.requires_grad
