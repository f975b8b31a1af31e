"""Which layers of a foreign module can learn by a rule, and what takes their place.

The new layers hold the very Parameter objects of the old ones, and are of the old one's class as well, so
that whoever asks what a layer is, to merge an adapter into its weight, gets a true answer. transformers'
``Conv1D`` keeps its weight as (in x out); its replacement does too and hands the transpose to the autograd
Function.
"""

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from localgpt_core.common.validation import require
from localgpt_core.convert.taps import Taps
from localgpt_core.convert.upkeep import Upkeep
from localgpt_core.layers import convolution
from localgpt_core.layers.convolution import LocalConv2d
from localgpt_core.layers.linear import LocalLayer, LocalLinear
from localgpt_core.rules import RuleOptions

__all__ = ["Converted", "ConvertedLinear", "choose", "output_width", "replacement", "why_nothing"]

FILTERED = "left out by the filter"
UNCALLED = "nn.MultiheadAttention uses its weight without calling it"
OWN_FORWARD = "has a forward pass of its own"
NO_WEIGHT = "its weight is computed from other parameters, or not there yet"
IN_AN_IMAGE = "a convolution has no token for each of the output's errors"
QUANTISED = "is quantised: it has no weight that could learn"
COMPILED = "torch.compile holds it alone and would go on calling the original: localize first, then compile"


class Converted(LocalLayer):
    """A `LocalLayer` in the place of ``original``: its parameters, hooks, mode and attributes are shared."""

    def __init__(
        self,
        original: nn.Module,
        name: str,
        options: RuleOptions,
        key: tuple[int | str, ...],
        taps: Taps,
        upkeep: Upkeep,
        is_output: bool,
        error_features: int | None,
    ) -> None:
        # Not nn.Linear.__init__: it would allocate a weight and draw it from the global random state.
        vars(self).update(vars(original))
        vars(self).pop("_compiled_call_impl", None)
        self._buffers = dict(original._buffers)
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        self.place, self.taps, self.upkeep = name, taps, upkeep
        self.out_features, self.in_features = self.oriented(self.weight).shape
        self._take_rule(options, is_output, error_features)
        if self.rule.buffer_name is not None:
            self.register_buffer(self.rule.buffer_name, None)
            self.reset_feedback(*key)

    def forward(self, x: Tensor, taps: list[Tensor] | None = None) -> Tensor:
        """Return y (..., out) for x (..., in); without ``taps`` the conversion's own are used."""
        if taps is not None:
            return super().forward(x, taps)
        own: list[Tensor] = []
        y = super().forward(x, own)
        if self.upkeep.owed and not (self.exact or self.probed or torch.compiler.is_compiling()):
            self.upkeep.look(self, y)
        if own:
            self.taps.add(self.place, y, own)
        publishes = self.is_output and self.rule.error == "output" and y.requires_grad
        return self.taps.publish(self.place, y) if publishes else y


class ConvertedLinear(Converted, LocalLinear):
    """In the place of ``nn.Linear``."""


class ConvertedConv2d(Converted, LocalConv2d):
    """In the place of ``nn.Conv2d``."""


@cache
def _converted_conv1d() -> type[Converted]:
    """Return what takes the place of transformers' ``Conv1D``, whose weight is (in x out)."""
    from transformers.pytorch_utils import Conv1D

    def oriented(self: Converted, tensor: Tensor) -> Tensor:
        return tensor.T

    own = {
        "oriented": oriented,
        "__module__": __name__,
        "__doc__": "In the place of transformers' ``Conv1D``.",
    }
    return type("ConvertedConv1D", (Converted, Conv1D), own)


def __getattr__(name: str) -> type[Converted]:
    """Make ``ConvertedConv1D`` on demand: a pickled model asks for it by name."""
    if name == "ConvertedConv1D":
        return _converted_conv1d()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _linear_kinds() -> dict[type[nn.Module], Callable[[], type[Converted]]]:
    """Return what can be replaced by what. Where transformers is not imported, nobody has a Conv1D."""
    kinds: dict[type[nn.Module], Callable[[], type[Converted]]] = {
        nn.Linear: lambda: ConvertedLinear,
        nn.Conv2d: lambda: ConvertedConv2d,
    }
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None:
        kinds[utils.Conv1D] = _converted_conv1d
    return kinds


def _linear_kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _linear_kinds() if isinstance(module, kind)), None)


def replacement(layer: nn.Module) -> type[Converted]:
    """Return the class that takes the place of a layer that can be replaced."""
    return _linear_kinds()[_linear_kind(layer)]()


def output_width(layer: nn.Module) -> int:
    """Return the width of the output of a layer that can be replaced."""
    return layer.weight.shape[0 if isinstance(layer, nn.Linear | nn.Conv2d) else 1]


def _obstacle(
    name: str, child: nn.Module, attentions: list[str], compiled: list[str], direct: bool
) -> str | None:
    """Return why a layer cannot be replaced; None if it can."""
    if isinstance(child, nn.Conv2d):
        problem = IN_AN_IMAGE if direct else convolution.obstacle(child)
        if problem is not None:
            return problem
    if any(name.startswith(attention) for attention in attentions):
        return UNCALLED
    if any(name == f"{holder}_orig_mod" for holder in compiled):
        return COMPILED
    # Subclasses that only carry another name, such as NonDynamicallyQuantizableLinear, do no harm.
    if type(child).forward is not _linear_kind(child).forward or "forward" in vars(child):
        return OWN_FORWARD
    weight = child._parameters.get("weight")
    return NO_WEIGHT if weight is None or isinstance(weight, UninitializedParameter) else None


def _is_quantised(child: nn.Module) -> bool:
    return type(child).__module__.startswith("torch.ao.nn.") and hasattr(child, "_packed_params")


def choose(
    module: nn.Module, filter: Callable[[str, nn.Module], bool] | None, direct: bool
) -> tuple[dict[nn.Module, list[str]], dict[str, str]]:
    """Return the layers to replace with their names, and what stays exact with the reason.

    ``direct`` says whether the rule uses the output's error.
    """
    every: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        every.setdefault(child, []).append(name)
    attentions, compiled = (
        [
            f"{name}.".lstrip(".")
            for child, names in every.items()
            if isinstance(child, kind)
            for name in names
        ]
        for kind in (nn.MultiheadAttention, torch._dynamo.OptimizedModule)
    )
    chosen: dict[nn.Module, list[str]] = {}
    exact: dict[str, str] = {}
    for child, names in every.items():
        wanted = child is not module and (filter is None or any(filter(name, child) for name in names))
        if isinstance(child, LocalLayer):
            allowed = f"learns by method={child.rule.options.method!r} already: restore it first"
            require(not wanted, "layer", names[0], f"{allowed}, or leave it out by filter")
        elif _linear_kind(child) is None:
            if _is_quantised(child):
                exact |= dict.fromkeys(names, QUANTISED)
            elif not isinstance(child, nn.Embedding | nn.EmbeddingBag):
                own = [name for name, p in child.named_parameters(recurse=False) if p.ndim > 1]
                words = f"a parameter that {type(child).__name__} uses itself"
                exact |= {f"{names[0]}.{name}".lstrip("."): words for name in own}
        else:
            obstacles = [_obstacle(name, child, attentions, compiled, direct) for name in names]
            obstacle = next((words for words in obstacles if words), None if wanted else FILTERED)
            if obstacle is None:
                chosen[child] = names
            else:
                exact |= dict.fromkeys(names, obstacle)
    return chosen, exact


def why_nothing(module: nn.Module, exact: dict[str, str]) -> str:
    """Return why nothing of ``module`` can be replaced, given what `choose` left exact."""
    if _linear_kind(module) is not None:
        return "a layer is replaced in the module that holds it: give that one"
    reasons = "; ".join(f"{name} {words}" for name, words in exact.items())
    return "holds no linear layer that could be replaced" + (f": {reasons}" if reasons else "")
