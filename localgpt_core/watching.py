"""Look at what goes through single modules during one forward pass, and leave nothing behind."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from localgpt_core.exact import evaluation_mode

__all__ = ["Watched", "watch"]

Watched = tuple[nn.Module, Callable[[Tensor], None]]


@torch.no_grad()
def watch(
    model: nn.Module, idx: Tensor, inputs: Iterable[Watched] = (), outputs: Iterable[Watched] = ()
) -> None:
    """Run ``model(idx)`` in evaluation mode and hand the watched inputs and outputs to their watchers.

    The model's modes and hooks are afterwards what they were.
    """
    with evaluation_mode(model), ExitStack() as hooks:
        for module, note in inputs:
            hook = module.register_forward_pre_hook(lambda module, args, note=note: note(args[0]))
            hooks.callback(hook.remove)
        for module, note in outputs:
            hook = module.register_forward_hook(lambda module, args, output, note=note: note(output))
            hooks.callback(hook.remove)
        model(idx)
