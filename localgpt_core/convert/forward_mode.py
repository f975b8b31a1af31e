r"""One forward-mode pass of a foreign module, for feedback that follows the network's Jacobian.

    forward()     the user's: it runs the module once, in whatever way; what it returns is not used
    the output    what leaves the layer that was named as the output: a value and its tangent

`localgpt_core.matrices.jacobian` disturbs the inputs of the layers meanwhile and reads the tangent. The pass
leaves nothing behind: evaluation mode (no dropout; batch norms use their running statistics and keep them),
no graph, no ``.grad``, and torch's random state as it was.

Torch's fused kernels for attention and recurrent layers have no derivative in forward mode, and compiled code
loses tangents without a word: so these run in their parts, and compiled modules as they are written. What has
none then either is refused.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from localgpt_core.common.validation import Refusal, require
from localgpt_core.layers.linear import LocalLayer

__all__ = ["output_of"]

# Not by their context managers, which set more than that and warn of it.
FUSED = (
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
)


def output_of(module: nn.Module, output: LocalLayer, forward: Callable[[], object]) -> Tensor:
    """Run ``forward()`` and return what leaves the layer ``output`` of ``module``.

    Raises:
        ValueError: If that layer is not called exactly once, if no tangent reaches it, or if something on
            the way has no derivative in forward mode; the module in which it is and torch's reason are named.
    """
    found: list[Tensor] = []
    handle = output.register_forward_hook(lambda layer, args, y: found.append(y))
    try:
        with _unfused():
            forward()
    except (NotImplementedError, RuntimeError) as error:
        if not any(words in str(error) for words in ("forward AD", "forward mode", "jvp")):
            raise
        reason = f"has no derivative in forward mode. {str(error).splitlines()[0]}"
        raise Refusal(f"module {_innermost(module, error)!r}: {reason}") from error
    finally:
        handle.remove()
    calls, called = f"calls of the output layer {output.place!r}", len(found)
    require(called == 1, calls, called, "must be one where the feedback aligns, in forward()")
    if forward_ad.unpack_dual(found[0]).tangent is None:
        raise Refusal(f"output layer {output.place!r}: no layer that aligns has reached it in forward()")
    return found[0]


@contextmanager
def _unfused() -> Iterator[None]:
    """Let torch take what forward mode can pass, and give its switches and its random state back."""
    before = [is_on() for is_on, _ in FUSED]
    try:
        for _, turn in FUSED:
            turn(False)
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for (_, turn), was_on in zip(FUSED, before, strict=True):
            turn(was_on)


def _innermost(module: nn.Module, error: Exception) -> str:
    """Return the name of the part of ``module`` whose method raised ``error``; its own class if none did."""
    names = {id(part): name for name, part in module.named_modules()}
    selves = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    found = [names[id(part)] for part in selves if id(part) in names]
    return (found and found[-1]) or type(module).__name__
