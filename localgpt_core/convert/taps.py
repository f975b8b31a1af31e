"""Direct feedback in a module that knows nothing of taps.

The layers of one conversion share an object. Each leaves its tap there when it is called; the layer that is
named as the output takes all of them, publishes the error to those that lie in the graph of its logits, and
drops the rest. What a forward pass that broke off, never reached the output or was only a recomputation has
left can therefore not enter another graph. A layer that is called again keeps of its own taps only those in
the graph of its new output, so that none pile up. Every thread has its own.

The rejected alternative is a pre-forward hook of the root that opens a new list: it fails as soon as somebody
calls a part of the module, and recomputation calls parts.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from localgpt_core.common.validation import require
from localgpt_core.layers.between_steps import publish_error

__all__ = ["Taps"]

PUBLISHED = "localgpt: the layer of this call, once the output's error is on its way to it"


class Taps(threading.local):
    """The taps of the forward pass under way, by layer: what the layers of one conversion share."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Tensor]] = {}

    def __reduce__(self) -> tuple:
        """Copy and send it empty: taps belong to a graph, and a graph to the modules that built it."""
        return Taps, ()

    def add(self, layer: str, y: Tensor, taps: list[Tensor]) -> None:
        """Keep the taps of a call of ``layer`` that returned ``y``."""
        earlier = self.waiting.get(layer)
        self.waiting[layer] = [*_in_graph(y, earlier), *taps] if earlier else taps

    def publish(self, output: str, logits: Tensor) -> Tensor:
        """Return the ``logits`` of the layer ``output``; their error will reach the taps in their graph.

        All taps are forgotten. The leading dimensions of the logits are the first ones of a layer's tokens;
        where the layer has further ones, the output has pooled them: with logits (B, V) and a layer's input
        x (B, T, in), grad_x[b, t] = e[b] @ F at every token t.

        Raises:
            ValueError: If the tokens of a layer do not begin with those of the output.
            RuntimeError: If the output was called before on what one of the layers has computed.
        """
        waiting, self.waiting = self.waiting, {}
        return _publish(output, logits, waiting)


# A compiled graph is one node until it is finished: both functions look at graphs, so they run outside.
@torch.compiler.disable
def _publish(output: str, logits: Tensor, waiting: dict[str, list[Tensor]]) -> Tensor:
    nodes = set(_graph(logits))
    earlier = sorted(node.metadata[PUBLISHED] for node in nodes if PUBLISHED in node.metadata)
    if earlier:
        raise RuntimeError(
            f"output layer {output!r}: called twice in one forward pass on what layer {earlier[0]!r} has "
            "computed, which would get the error of one call only: call it once, on both inputs together"
        )
    found = []
    for layer, taps in waiting.items():
        for tap in taps:
            if _origin(tap) in nodes:
                _check_shape(layer, tap.shape, output, logits.shape)
                _origin(tap).metadata[PUBLISHED] = layer
                found.append(tap)
    return publish_error(logits, found)


def _check_shape(layer: str, tap: torch.Size, output: str, logits: torch.Size) -> None:
    allowed = f"must begin with the dimensions of the output {output!r}, {tuple(logits)}, without its last"
    fits = tap[:-1][: len(logits) - 1] == logits[:-1]
    require(fits, f"shape of the tokens of layer {layer!r}", tuple(tap), allowed)
    allowed = f"was {tap[-1]} when the module was localized: restore it, and localize it again"
    require(tap[-1] == logits[-1], f"width of the output {output!r}", logits[-1], allowed)


@torch.compiler.disable
def _in_graph(y: Tensor, taps: list[Tensor]) -> list[Tensor]:
    """Return those of ``taps`` whose layer's call is a part of what ``y`` was computed from."""
    nodes = set(_graph(y))
    return [tap for tap in taps if _origin(tap) in nodes]


def _graph(y: Tensor) -> Iterator[object]:
    """Yield the nodes that ``y`` was computed by, down to the outputs of earlier forward passes."""
    seen, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if type(node).__name__ != "_PublishErrorBackward":
                ahead += [below for below, _ in node.next_functions]


def _origin(tap: Tensor) -> object:
    """Return the node of the layer's call; between it and the tap are views."""
    node = tap.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node
