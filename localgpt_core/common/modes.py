"""States that a model is in for as long as a ``with`` block takes, and looks at what goes through it.

**The true derivative.** A measurement compares a rule with the exact gradient on one model: same weights,
same buffers, same dropout. Modules whose backward pass is not the derivative of their forward pass are
`MaybeExact`. Inside `exact_derivatives` they compute the same values by operations that torch differentiates
itself, in reverse and in forward mode.

Every block here gives back what it found, also where blocks are nested or end by an exception.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from localgpt_core.common.validation import require

__all__ = [
    "MaybeExact",
    "as_autocast",
    "autocast_dtype",
    "evaluation_mode",
    "exact_derivatives",
    "has_tangent",
    "in_float32",
    "in_forward_mode",
    "inputs_of",
    "narrow",
    "recorded",
    "recording",
    "set_for_a_while",
    "tf32_on_gpu",
    "watch",
    "wide",
    "without_autocast",
]

Watched = tuple[nn.Module, Callable[[Tensor], None]]


def recording() -> bool:
    """Return whether torch.jit or torch.export records what is computed."""
    # Not is_exporting(), which before torch 2.13 says so of torch.compile too.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def recorded(module: nn.Module, field: str, value: object) -> bool:
    """Return whether torch.jit or torch.export records ``module``, whose backward pass they would not keep.

    Raises:
        ValueError: In training mode, naming ``field`` and ``value``.
    """
    if recording():
        allowed = "cannot be traced or exported in training mode: call eval() first, or use torch.compile"
        require(not module.training, field, value, allowed)
    return recording()


class MaybeExact:
    """Mixin for a module whose backward pass is a rule or a surrogate unless ``exact`` is set.

    Such a module defines the two forward passes; which one is taken is decided here and nowhere else.
    """

    exact = False

    def forward(self, *args: object) -> Tensor:
        """Return what `exact_forward` or `local_forward` returns; both have the same value."""
        exact = self.exact or recorded(self, "module", type(self).__name__)
        return self.exact_forward(*args) if exact else self.local_forward(*args)

    def exact_forward(self, *args: object) -> Tensor:
        """Return the value by operations whose backward pass is their derivative."""
        raise NotImplementedError(f"{type(self).__name__} must define its exact forward pass")

    def local_forward(self, *args: object) -> Tensor:
        """Return the value by operations with a backward pass of their own."""
        raise NotImplementedError(f"{type(self).__name__} must define its own forward pass")


def in_forward_mode(*tensors: Tensor) -> bool:
    """Return whether one of ``tensors`` carries a tangent, or a transform of torch.func is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or has_tangent(*tensors)


def has_tangent(*tensors: Tensor) -> bool:
    """Return whether one of ``tensors`` carries a forward-mode tangent."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


@contextmanager
def set_for_a_while(modules: Iterable[nn.Module], name: str, value: object) -> Iterator[None]:
    """Give every module's attribute ``name`` the ``value`` inside the ``with`` block."""
    missing = object()
    before = [(module, vars(module).get(name, missing)) for module in modules]
    try:
        for module, _ in before:
            setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            delattr(module, name) if old is missing else setattr(module, name, old)


def exact_derivatives(model: nn.Module) -> AbstractContextManager[None]:
    """Make every backward pass through ``model`` exact inside the ``with`` block."""
    modules = (module for module in model.modules() if isinstance(module, MaybeExact))
    return set_for_a_while(modules, "exact", True)


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


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives to operations on the device of ``x``; None where it is off."""
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return None
    kind = x.device.type
    # The latter is for the meta device, which nothing is compiled for; torch 2.11 breaks a graph at it.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def as_autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return x and ``tensors`` in the type of torch's autocast, if it is on; like it, leave float64 alone.

    Outside of a Function, so that autograd returns the gradients in the parameters' own type.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *tensors))


def wide(x: Tensor) -> Tensor:
    """Return x in float32 at least, in which sums and decompositions are taken whatever it is itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def narrow(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the dtype of ``like``.

    A Function that ends with this has a gradient; with ``x.to(like)``, where that changes nothing, torch 2.11
    compiles one of zero.
    """
    return x if x.dtype == like.dtype else x.to(like.dtype)


@contextmanager
def tf32_on_gpu(device: torch.device) -> Iterator[None]:
    """Let a GPU round the factors of products in float32 to 10 bits inside the ``with`` block."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Leave the dtypes of operations on the device of ``x`` alone inside the ``with`` block."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def in_float32(function: Callable) -> Callable:
    """Let ``function`` see half-precision tensors in float32, and no autocast.

    What it changed in place and the tensor that it returns are rounded to the type of what it was given.
    """

    @wraps(function)
    def seeing_float32(*args: object, **named: object) -> object:
        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        widened = {id(x): wide(x) for x in given}
        with without_autocast(given[0]):
            result = function(
                *(widened.get(id(x), x) for x in args),
                **{name: widened.get(id(x), x) for name, x in named.items()},
            )
        half = [x for x in given if widened[id(x)] is not x]
        for x in half:
            if not torch.equal(wide(x), widened[id(x)]):
                x.copy_(widened[id(x)])
        return result.to(half[0].dtype) if half and isinstance(result, Tensor) else result

    return seeing_float32


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


def inputs_of(model: nn.Module, idx: Tensor, modules: Iterable[nn.Module]) -> dict[nn.Module, Tensor]:
    """Return what each of ``modules`` is given in ``model(idx)``, see `watch`."""
    found: dict[nn.Module, Tensor] = {}
    watch(model, idx, [(module, partial(found.__setitem__, module)) for module in modules])
    return found
