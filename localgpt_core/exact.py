"""The true derivative in place of every learning rule and surrogate, for as long as a measurement takes.

The modules of this package whose backward pass is not the derivative of their forward pass have an attribute
``exact``. While it is set they compute the same values by operations that torch differentiates itself, in
reverse and in forward mode. A measurement can then compare a rule with the exact gradient on one model: same
weights, same buffers, same dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["MaybeExact", "evaluation_mode", "exact_derivatives"]


class MaybeExact:
    """Mixin for a module whose backward pass is a rule or a surrogate unless ``exact`` is set."""

    exact = False


@contextmanager
def exact_derivatives(model: nn.Module) -> Iterator[None]:
    """Make every backward pass through ``model`` exact inside the ``with`` block."""
    # Only those that are not exact already: an inner block must not end an outer one.
    modules = [module for module in model.modules() if isinstance(module, MaybeExact) and not module.exact]
    try:
        for module in modules:
            module.exact = True
        yield
    finally:
        for module in modules:
            del module.exact


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the ``with`` block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
