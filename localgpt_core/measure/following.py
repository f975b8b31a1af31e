"""What feedback takes of its weight between two steps: found out by experiment, not by declaration.

A rule's `align` is run once more, on a copy of its buffer, with a weight W that notes what is done to it:

    W x or x W^T, for any other x              is a forward pass, which takes nothing
    its signs                                  "sign"
    anything computed from it, as one number   "number"
    anything computed from it that is kept     "weight"

A product with W from the other side is no forward pass, and what is computed from W is noted as W is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from localgpt_core.common.seeds import generator
from localgpt_core.layers.linear import LocalLayer

__all__ = ["taken_between_steps", "taken_in_words", "with_taken"]

PRODUCTS = ("matmul", "__matmul__", "mm", "mv", "linear")
SIGNS = ("sign", "sgn", "signbit")
SAME = ("to", "float", "double", "detach", "clone", "contiguous")
TURNS = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)
NO_NUMBERS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout)


def taken_between_steps(layer: LocalLayer) -> dict[str, int]:
    """Return how often the rule of ``layer`` takes what of its weight in one `align`, see the module.

    The layer is left as it was. Only a rule whose ``aligns`` is ``"layer"`` takes anything.
    """
    taken: dict[str, int] = {}
    if layer.rule.aligns != "layer":
        return taken

    class Noted(Tensor):
        state = "changed"  # or "whole", or "turned"

        @classmethod
        def __torch_function__(
            cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            given, name = tree_leaves((args, kwargs)), func.__name__
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
                result = tree_map(lambda x: x.as_subclass(Tensor) if type(x) is cls else x, result)
            if _holds_nothing(func, args, result, cls) or _is_forward(name, args, cls):
                return result
            if name in SIGNS:
                what = "sign"
            elif not isinstance(result, Tensor) or any(x is result for x in given):
                what = "weight"
            elif result.ndim:
                noted = result.as_subclass(cls)
                noted.state = _state(func, args[0])
                return noted
            else:
                what = "number"
            taken[what] = taken.get(what, 0) + 1
            return result

    weight, source = layer.matrix.detach().clone(), generator("taken", device=layer.weight.device)
    weight = weight.as_subclass(Noted)
    weight.state = "whole"
    layer.rule.align(weight, layer.buffer.detach().clone(), layer.is_output, source)
    return taken


def _holds_nothing(func: Callable, args: tuple, result: Any, kind: type[Tensor]) -> bool:
    """Return whether ``result`` says no more of a noted tensor than its shape and type."""
    name = func.__name__
    if name.endswith("_like") or name.startswith("new_"):
        return True
    if name in ("to", "type_as") and not isinstance(args[0], kind):
        return True
    return all(isinstance(x, NO_NUMBERS) for x in tree_leaves(result))


def _is_forward(name: str, args: tuple, kind: type[Tensor]) -> bool:
    """Return whether an operation is the product W x or x W^T with one noted tensor, W."""
    if name not in PRODUCTS or sum(isinstance(x, kind) for x in args) != 1:
        return False
    left, right = (x.state if isinstance(x, kind) else "" for x in args[:2])
    return right == "whole" if name == "linear" else left == "whole" or right == "turned"


def _state(func: Callable, of: Any) -> str:
    """Return the state of what ``func`` makes of a noted tensor in the state of ``of``."""
    before = getattr(of, "state", "changed")
    if func in TURNS:
        return {"whole": "turned", "turned": "whole"}.get(before, before)
    return before if func.__name__ in SAME else "changed"


def taken_in_words(layer: LocalLayer) -> str:
    """Return what the rule of ``layer`` takes of its weight before each step, empty for nothing."""
    return ", ".join(_words(taken_between_steps(layer)))


def with_taken(reads: str, layer: LocalLayer) -> str:
    """Return what is read of the weight of ``layer`` on the way back, and what is taken before each step."""
    words = [] if reads == "nothing" else [reads]
    words += [word for word in _words(taken_between_steps(layer)) if word not in words]
    return "weight" if "weight" in words else ", ".join(words) or reads


def _words(taken: dict[str, int]) -> list[str]:
    if "weight" in taken:
        return ["weight"]
    numbers = taken.get("number", 0)
    some = ["one number" if numbers == 1 else f"{numbers} numbers"] if numbers else []
    return [*(["sign"] if "sign" in taken else []), *some]
