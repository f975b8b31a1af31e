r"""Localize: any torch module learns by a rule, its linear layers replaced in place.

    forward    unchanged, bit for bit
    backward   grad_input = error @ feedback at every replaced layer            (`localgpt_core.linear`)

The new layers hold the very Parameter objects of the old ones. Optimisers, tied weights, hooks and the keys
of the state_dict stay valid; the feedback comes as buffers beside them. transformers' ``Conv1D`` keeps its
weight as (in x out); its replacement does too and hands the transpose to the autograd Function.

Beyond the reach of a conversion is a weight that a module uses without calling the layer that holds it.
`Localized.exact` lists what is left as it was, and why.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from localgpt_core.linear import LocalLinear
from localgpt_core.rules import RULES, RuleOptions
from localgpt_core.shared_taps import Taps
from localgpt_core.validation import require, require_choice

__all__ = ["Localized", "localize"]

FILTERED = "left out by the filter"
UNCALLED = "nn.MultiheadAttention uses its weight without calling it"
OWN_FORWARD = "has a forward pass of its own"
NO_WEIGHT = "its weight is computed from other parameters, or not there yet"


class _ConvertedLinear(LocalLinear):
    """A `LocalLinear` in the place of ``original``: its parameters, hooks, mode and attributes are shared."""

    def __init__(
        self,
        original: nn.Module,
        name: str,
        options: RuleOptions,
        key: tuple[int | str, ...],
        taps: Taps,
        is_output: bool,
        error_features: int | None,
    ) -> None:
        # Not nn.Linear.__init__: it would allocate a weight and draw it from the global random state.
        vars(self).update(vars(original))
        vars(self).pop("_compiled_call_impl", None)
        self._buffers = dict(original._buffers)
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        self.name, self.taps = name, taps
        self.out_features, self.in_features = self.matrix.shape
        self._take_rule(options, is_output, error_features)
        if self.rule.buffer_name is not None:
            self.register_buffer(self.rule.buffer_name, None)
            self.reset_feedback(*key)

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of the shape of the weight, as a matrix (out x in)."""
        return tensor

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (out x in)."""
        return self.oriented(self.weight)

    def forward(self, x: Tensor, taps: list[Tensor] | None = None) -> Tensor:
        """Return y (..., out) for x (..., in); without ``taps`` the conversion's own are used."""
        if taps is not None:
            return super().forward(x, taps)
        own: list[Tensor] = []
        y = super().forward(x, own)
        if own:
            self.taps.add(self.name, y, own)
        return self.taps.publish(y) if self.is_output and y.requires_grad else y


class _ConvertedConv1D(_ConvertedLinear):
    """In the place of transformers' ``Conv1D``, whose weight is (in x out)."""

    def oriented(self, tensor: Tensor) -> Tensor:
        return tensor.T


def _linear_kinds() -> dict[type[nn.Module], type[_ConvertedLinear]]:
    """Return what can be replaced by what. Where transformers is not imported, nobody has a Conv1D."""
    kinds: dict[type[nn.Module], type[_ConvertedLinear]] = {nn.Linear: _ConvertedLinear}
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None:
        kinds[utils.Conv1D] = _ConvertedConv1D
    return kinds


def _linear_kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _linear_kinds() if isinstance(module, kind)), None)


def _obstacle(name: str, child: nn.Module, attentions: list[str]) -> str | None:
    """Return why a linear layer cannot be replaced; None if it can."""
    if any(name.startswith(attention) for attention in attentions):
        return UNCALLED
    # Subclasses that only carry another name, such as NonDynamicallyQuantizableLinear, do no harm.
    if type(child).forward is not _linear_kind(child).forward or "forward" in vars(child):
        return OWN_FORWARD
    weight = child._parameters.get("weight")
    return NO_WEIGHT if weight is None or isinstance(weight, UninitializedParameter) else None


@dataclass(frozen=True, eq=False)
class Localized:
    """What `localize` has done to a module.

    Attributes:
        module: The module.
        options: The rule and its feedback.
        layers: The new layers by name; a layer with two names is there twice.
        exact: What stays as it was, by name, and why: linear layers, and matrices that a module uses itself.
        originals: The replaced layers, by name.
    """

    module: nn.Module
    options: RuleOptions
    layers: dict[str, LocalLinear]
    exact: dict[str, str]
    originals: dict[str, nn.Module]

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the replaced layers."""
        return tuple(self.layers)

    def align_feedback(self, *key: int | str) -> None:
        """Let the rule move its feedback: once per training step, before the forward pass.

        Needed with ``fa_grape`` and for the weight mirror; draws depend on ``key`` and the layer's name only.
        """
        for layer in dict.fromkeys(self.layers.values()):
            layer.align_feedback(*key, layer.name)

    def mirrored(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained weight with the feedback that takes the same steps (Kolen-Pollack).

        Give the feedback to the optimiser, in the group of its weight, and call `mirror_gradients` before
        every step.
        """
        return ((layer.weight, layer.buffer) for layer in self._mirroring())

    def mirror_gradients(self) -> None:
        """Hand the gradient of each weight to its feedback: after clipping, before the optimiser's step."""
        for layer in self._mirroring():
            gradient = layer.weight.grad
            layer.buffer.grad = None if gradient is None else layer.oriented(gradient).contiguous()

    def _mirroring(self) -> Iterator[_ConvertedLinear]:
        layers = dict.fromkeys(self.layers.values())
        return (layer for layer in layers if layer.rule.mirrors_gradient and layer.weight.requires_grad)

    def restore(self) -> None:
        """Put the original layers back, with the parameters and in the mode that the new ones have now."""
        for name, layer in self.layers.items():
            parent, attribute = _place(self.module, name)
            if getattr(parent, attribute) is layer:
                self.originals[name].training = layer.training
                setattr(parent, attribute, self.originals[name])

    def describe(self) -> str:
        """Return a table of what was changed and of what stays exact."""
        changed = [
            (name, f"{layer.in_features} -> {layer.out_features}" + ", the output" * layer.is_output)
            for name, layer in self.layers.items()
        ]
        width = max(len(name) for name in [*self.layers, *self.exact])
        lines = [f"method={self.options.method!r}: {len(changed)} layers changed, {len(self.exact)} exact"]
        for title, rows in (("changed", changed), ("exact", self.exact.items())):
            lines += [title, *(f"  {name:<{width}}  {words}" for name, words in rows)] if rows else []
        return "\n".join(lines)

    __str__ = describe


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return module.get_submodule(parent), attribute


def localize(
    module: nn.Module,
    options: RuleOptions | None = None,
    *,
    method: str | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    output: str | None = None,
    seed: int = 0,
    **rule_options: object,
) -> Localized:
    """Replace the linear layers of ``module``, in place, by layers that learn by a rule.

    These are ``nn.Linear`` and transformers' ``Conv1D``. Values of the forward pass, parameters and torch's
    random state stay as they are. Create the optimiser before or after; under Kolen-Pollack, after.

    Args:
        module: Any module that holds linear layers.
        options: The rule and its feedback.
        method: Name of the rule, instead of ``options``.
        filter: Called with the name of a layer and the layer; only where it returns true, the layer is
            replaced. One with several names is replaced if it is for any of them. Default: all.
        output: Name of the layer whose output is the network's, called once in a forward pass. It learns from
            its exact local gradient, which is the output's error. A rule that uses the output's error needs
            it, and every replaced layer must then work on the tokens of the output: ``x`` (..., in), logits
            (..., V), with equal leading dimensions.
        seed: Seed of the feedback, unless ``feedback_seed`` is given.
        rule_options: Further fields of `RuleOptions`, beside ``method``.

    Raises:
        ValueError: For an unknown name, if nothing is left to replace or it was replaced before, for a rule
            that lacks its output layer, and for one that aligns to the network's Jacobian.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> print(localize(network, method="dfa", output="2"))
        method='dfa': 2 layers changed, 0 exact
        changed
          0  3 -> 5
          2  5 -> 2, the output
    """
    options = _options(options, method, rule_options)
    rule = RULES[options.method](options)
    allowed = "needs a forward pass of the whole network in forward mode, which only LocalGPT offers"
    require(rule.aligns != "network", "fa_grape", options.fa_grape, f"method={options.method!r} {allowed}")
    chosen, exact = _choose(module, filter)
    names = list(dict.fromkeys(name for found in chosen.values() for name in found))
    require(bool(names), "module", type(module).__name__, _nothing(module, exact))
    if output is not None:
        require_choice("output", output, names)
    allowed = f"method={options.method!r} needs the name of the output layer: one of " + ", ".join(names)
    require(output is not None or rule.error != "output", "output", output, allowed)

    kinds, taps = _linear_kinds(), Taps()
    error_features = None
    if output is not None:
        error_features = _features(module.get_submodule(output))
    layers: dict[str, LocalLinear] = {}
    originals: dict[str, nn.Module] = {}
    for original, found in chosen.items():
        key = seed if options.feedback_seed is None else options.feedback_seed, "localize", found[0]
        is_output = output in found
        build = kinds[_linear_kind(original)]
        layer = build(original, found[0], options, key, taps, is_output, error_features)
        for name in found:
            layers[name], originals[name] = layer, original
    for name, layer in layers.items():
        parent, attribute = _place(module, name)
        setattr(parent, attribute, layer)
    localized = Localized(module, options, layers, exact, originals)
    for step in range(options.fa_grape_start):
        localized.align_feedback(seed, "start", step)
    return localized


def _features(layer: nn.Module) -> int:
    """Return the width of the output of a layer that can be replaced."""
    return layer.weight.shape[0 if isinstance(layer, nn.Linear) else 1]


def _options(options: RuleOptions | None, method: str | None, others: dict[str, object]) -> RuleOptions:
    given = {**({} if method is None else {"method": method}), **others}
    if options is not None:
        require(not given, "options", options, "allowed are options or their fields by name, not both")
        return options
    require(method is not None, "method", method, "allowed are " + ", ".join(map(repr, RULES)))
    for name in given:
        require_choice("option", name, [item.name for item in fields(RuleOptions)])
    return RuleOptions(**given)


def _choose(
    module: nn.Module, filter: Callable[[str, nn.Module], bool] | None
) -> tuple[dict[nn.Module, list[str]], dict[str, str]]:
    """Return the layers to replace with their names, and what stays exact with the reason."""
    every: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        every.setdefault(child, []).append(name)
    attentions = [
        f"{name}."
        for child, names in every.items()
        if isinstance(child, nn.MultiheadAttention)
        for name in names
    ]
    chosen: dict[nn.Module, list[str]] = {}
    exact: dict[str, str] = {}
    for child, names in every.items():
        wanted = child is not module and (filter is None or any(filter(name, child) for name in names))
        if isinstance(child, LocalLinear):
            allowed = f"is a LocalLinear with method={child.rule.options.method!r} already: restore it first"
            require(not wanted, "layer", names[0], f"{allowed}, or leave it out by filter")
        elif _linear_kind(child) is None:
            if not isinstance(child, nn.Embedding | nn.EmbeddingBag):
                own = [name for name, p in child.named_parameters(recurse=False) if p.ndim > 1]
                words = f"a parameter that {type(child).__name__} uses itself"
                exact |= {f"{names[0]}.{name}".lstrip("."): words for name in own}
        else:
            obstacles = [_obstacle(name, child, attentions) for name in names]
            obstacle = next((words for words in obstacles if words), None if wanted else FILTERED)
            if obstacle is None:
                chosen[child] = names
            else:
                exact |= dict.fromkeys(names, obstacle)
    return chosen, exact


def _nothing(module: nn.Module, exact: dict[str, str]) -> str:
    if _linear_kind(module) is not None:
        return "a layer is replaced in the module that holds it: give that one"
    reasons = "; ".join(f"{name} {words}" for name, words in exact.items())
    return "holds no linear layer that could be replaced" + (f": {reasons}" if reasons else "")
