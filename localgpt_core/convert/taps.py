"""Direct feedback in a module that knows nothing of taps.

The layers of one conversion share an object. Each leaves its tap there when it is called; the layer that is
named as the output takes all of them, publishes the error to those that lie in the graph of its logits, and
drops the rest. What a forward pass that broke off, never reached the output or was only a recomputation has
left can therefore not enter another graph. A layer that is called again keeps of its own taps only those in
the graph of its new output, so that none pile up.

The rejected alternative is a pre-forward hook of the root that opens a new list: it fails as soon as somebody
calls a part of the module, and recomputation calls parts.
"""

import torch
from torch import Tensor

from localgpt_core.common.validation import require
from localgpt_core.layers.between_steps import publish_error

__all__ = ["Taps"]


class Taps:
    """The taps of the forward pass under way, by layer: what the layers of one conversion share."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Tensor]] = {}

    def __deepcopy__(self, memo: dict) -> "Taps":
        """Return a new one: taps belong to a graph, and a graph to the modules that built it."""
        return Taps()

    def add(self, layer: str, y: Tensor, taps: list[Tensor]) -> None:
        """Keep the taps of a call of ``layer`` that returned ``y``."""
        earlier = self.waiting.get(layer)
        self.waiting[layer] = [*_in_graph(y, earlier), *taps] if earlier else taps

    def publish(self, logits: Tensor) -> Tensor:
        """Return ``logits``; their error will reach the taps in their graph. All taps are forgotten."""
        waiting, self.waiting = self.waiting, {}
        return _publish(logits, waiting) if waiting else logits


# A compiled graph is one node until it is finished: both functions look at graphs, so they run outside.
@torch.compiler.disable
def _publish(logits: Tensor, waiting: dict[str, list[Tensor]]) -> Tensor:
    every = [tap for taps in waiting.values() for tap in taps]
    found = _in_graph(logits, every)
    for layer, taps in waiting.items():
        for tap in taps:
            if any(tap is other for other in found):
                allowed = f"must be that of the output, {tuple(logits.shape)}, but for the last dimension"
                shape = tuple(tap.shape)
                require(shape == logits.shape, f"shape of the tokens of layer {layer!r}", shape, allowed)
    return publish_error(logits, found)


@torch.compiler.disable
def _in_graph(y: Tensor, taps: list[Tensor]) -> list[Tensor]:
    """Return those of ``taps`` whose layer's call is a part of what ``y`` was computed from."""
    seen, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [below for below, _ in node.next_functions]
    return [tap for tap in taps if _origin(tap) in seen]


def _origin(tap: Tensor) -> object:
    """Return the node of the layer's call; between it and the tap are views."""
    node = tap.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node
