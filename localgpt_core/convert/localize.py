r"""Localize: any torch module learns by a rule, its linear layers replaced in place.

    forward    unchanged, bit for bit
    backward   grad_input = error @ feedback at every replaced layer      (`localgpt_core.layers.linear`)

The new layers share the parameters of the old ones (`localgpt_core.convert.layers`): optimisers, tied
weights, hooks and the keys of the state_dict stay valid, and the feedback comes as buffers beside them.

Beyond the reach of a conversion is a weight that a module uses without calling the layer that holds it.
`Localized.exact` lists what is left as it was, and why.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from localgpt_core.common.validation import require, require_choice
from localgpt_core.convert.forward_mode import output_of
from localgpt_core.convert.layers import choose, output_width, replacement, why_nothing
from localgpt_core.convert.taps import Taps
from localgpt_core.convert.upkeep import Upkeep, hook, loops
from localgpt_core.layers.between_steps import align, mirror, mirrored
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.rules import RULES, LearningRule, RuleOptions

__all__ = ["Localized", "localize"]

Forward = Callable[[], object]

NEED_INPUTS = {
    "fa_grape_start": "needs inputs, which localize has not: call align_feedback(step, forward=...) that often",
    "jvp_share": "has no effect here: forward runs the module on the share of a batch that you choose",
}


@dataclass(frozen=True, eq=False)
class Localized:
    """What `localize` has done to a module.

    Attributes:
        module: The module.
        options: The rule and its feedback.
        layers: The new layers by name; a layer with two names is there twice.
        exact: What stays as it was, by name, and why: linear layers, and matrices that a module uses itself.
        originals: The replaced layers, by name.
        upkeep: Which calls between the steps have been made.
    """

    module: nn.Module
    options: RuleOptions
    layers: dict[str, LocalLayer]
    exact: dict[str, str]
    originals: dict[str, nn.Module]
    upkeep: Upkeep

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the replaced layers."""
        return tuple(self.layers)

    def align_feedback(self, *key: int | str, forward: Forward | None = None) -> None:
        """Let the rule move its feedback: once per training step, before the forward pass.

        Needed with ``fa_grape`` and for the weight mirror; draws depend on ``key`` and the layer's name only,
        those with ``forward`` on the order in which the layers are called.

        Args:
            key: Where the draws come from, the number of the step for instance.
            forward: For a rule that aligns to the network's Jacobian, ``dfa`` with ``fa_grape``, which
                estimates it from one pass in forward mode: runs the module once, as in
                ``lambda: module(x)``. What it returns is not used: the loss that `alignment` takes will do,
                and targets are not needed. The module is in evaluation mode meanwhile, and afterwards it,
                every ``.grad`` and torch's random state are what they were. Layers that are not called keep
                their feedback.

        Raises:
            ValueError: If such a rule gets no ``forward``, or one that does not run the output layer exactly
                once; if the tokens of a layer do not begin with those of the output; for an operation that
                has no derivative in torch's forward mode.
        """
        self._require_forward(forward)
        places = self._places()
        output = next((place for place in places if place.is_output), None)
        logits = partial(output_of, self.module, output, output.place, forward) if forward and output else None
        align(places, *key, network=self.module, forward=logits)
        self.upkeep.done("align_feedback")

    def _require_forward(self, forward: Forward | None) -> None:
        needed = "is needed by a rule that aligns to the network's Jacobian: lambda: module(x), for instance"
        require(forward is not None or self._rule.aligns != "network", "forward", forward, needed)

    @property
    def _rule(self) -> LearningRule:
        return RULES[self.options.method](self.options)

    def parameters(self) -> Iterator[Tensor]:
        """Yield what an optimiser must have: the module's parameters and the feedback of Kolen-Pollack."""
        yield from self.module.parameters()
        yield from (feedback for _, feedback in self.mirrored())

    def mirrored(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained weight with the feedback that takes the same steps (Kolen-Pollack).

        For an optimiser with groups: the feedback belongs into that of its weight. Call `mirror_gradients`
        before every step.
        """
        return mirrored(self._places())

    def mirror_gradients(self) -> None:
        """Hand the gradient of each weight to its feedback: after clipping, before the optimiser's step."""
        self.upkeep.done("mirror_gradients")
        mirror(self._places())

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        *key: int | str,
        step: int = 0,
        forward: Forward | None = None,
    ) -> Callable[[], None]:
        """Let ``optimizer`` do what a loop owes to the feedback: nothing else is to be called then.

        The feedback of Kolen-Pollack enters the group of its weight and gets its gradient at the beginning
        of every step, or after the step's closure; feedback that aligns does so now and after every step, for
        the next one. Its draws depend on ``key``, the number of the step and the layer's name. An optimiser
        that is wrapped (``.optimizer``, as accelerate does) is unwrapped.

        Args:
            optimizer: Any but LBFGS, made before or after `localize`.
            key: Where the draws come from, a seed for instance.
            step: Steps that were taken before, if the module goes on from what was stored after them: its
                feedback is aligned for the next one already.
            forward: As for `align_feedback`; called now and after every step, with what the module is to be
                run on then. ``lambda: module(x)`` takes the ``x`` of the step that was just taken.

        Returns:
            A function that takes it back, but for the feedback in the groups.

        Raises:
            ValueError: If the optimiser holds no weight of these layers, or evaluates gradients itself; for
                ``forward`` as `align_feedback` does.
        """
        self._require_forward(forward)
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        kind = type(optimizer).__name__
        allowed = "evaluates gradients within its step, where they cannot be mirrored"
        require(not isinstance(optimizer, torch.optim.LBFGS), "optimizer", kind, allowed)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        allowed = "holds no weight of the layers that learn by the rule"
        require(any(id(place.weight) in held for place in self._places()), "optimizer", kind, allowed)
        for weight, feedback in self.mirrored():
            for group in optimizer.param_groups:
                if any(p is weight for p in group["params"]) and id(feedback) not in held:
                    group["params"].append(feedback)
        if step == 0:
            self.align_feedback(*key, 0, forward=forward)
        steps = itertools.count(step + 1)

        def align_for_the_next() -> None:
            self.align_feedback(*key, next(steps), forward=forward)

        return hook(optimizer, self.mirror_gradients, align_for_the_next)

    def _places(self) -> list[LocalLayer]:
        return list(dict.fromkeys(self.layers.values()))

    def restore(self) -> None:
        """Put the original layers back, with the parameters and in the mode that the new ones have now."""
        for name, layer in self.layers.items():
            parent, attribute = _place(self.module, name)
            if getattr(parent, attribute) is layer:
                self.originals[name].training = layer.training
                setattr(parent, attribute, self.originals[name])

    def describe(self) -> str:
        """Return a table of what was changed and of what stays exact, and the training loop as code.

        Where the rule asks something of the loop there are two, with `attach` and without.
        """
        changed = [
            (name, f"{layer.in_features} -> {layer.out_features}" + ", the output" * layer.is_output)
            for name, layer in self.layers.items()
        ]
        width = max(len(name) for name in [*self.layers, *self.exact])
        lines = [f"method={self.options.method!r}: {len(changed)} layers changed, {len(self.exact)} exact"]
        for title, rows in (("changed", changed), ("exact", self.exact.items())):
            lines += [title, *(f"  {name:<{width}}  {words}" for name, words in rows)] if rows else []
        for title, code in loops(self._rule).items():
            lines += [title, *(f"  {line}" for line in code)]
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

    These are ``nn.Linear``, transformers' ``Conv1D`` and, for a rule with a local error, ``nn.Conv2d``.
    Values of the forward pass, parameters and torch's random state stay as they are. An optimiser made before
    stays valid, but for the feedback of Kolen-Pollack, which `Localized.attach` gives it.

    Args:
        module: Any module that holds linear layers.
        options: The rule and its feedback.
        method: Name of the rule, instead of ``options``.
        filter: Called with the name of a layer and the layer; only where it returns true, the layer is
            replaced. One with several names is replaced if it is for any of them. Default: all.
        output: Name of the layer whose output is the network's, called once in a forward pass. It learns from
            its exact local gradient, which is the output's error. A rule that uses the output's error needs
            it, and every replaced layer must then work on the tokens of the output: ``x`` (..., in), logits
            (..., V), with equal leading dimensions. Where the output pools the tokens of a sample, ``x``
            (B, T, in) and logits (B, V), each of them gets the error of its sample, grad_x[b, t] = e[b] @ F.
        seed: Seed of the feedback, unless ``feedback_seed`` is given.
        rule_options: Further fields of `RuleOptions`, beside ``method``.

    Raises:
        ValueError: For an unknown name, if nothing is left to replace or it was replaced before, for a rule
            that lacks its output layer, and for options of one that aligns to the network's Jacobian which
            need inputs.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> print(localize(network, method="dfa", output="2"))
        method='dfa': 2 layers changed, 0 exact
        changed
          0  3 -> 5
          2  5 -> 2, the output
        loop
          optimizer = torch.optim.AdamW(module.parameters())
          for x, y in batches:
              optimizer.zero_grad()
              loss_fn(module(x), y).backward()
              optimizer.step()
    """
    options = _options(options, method, rule_options)
    rule = RULES[options.method](options)
    if rule.aligns == "network":
        for name, allowed in NEED_INPUTS.items():
            value = getattr(options, name)
            require(value == RuleOptions.__dataclass_fields__[name].default, name, value, allowed)
    chosen, exact = choose(module, filter, rule.error == "output")
    names = list(dict.fromkeys(name for found in chosen.values() for name in found))
    require(bool(names), "module", type(module).__name__, why_nothing(module, exact))
    if output is not None:
        require_choice("output", output, names)
    allowed = f"method={options.method!r} needs the name of the output layer: one of " + ", ".join(names)
    require(output is not None or rule.error != "output", "output", output, allowed)

    taps, upkeep = Taps(), Upkeep(rule)
    error_features = None
    if output is not None:
        error_features = output_width(module.get_submodule(output))
    layers: dict[str, LocalLayer] = {}
    originals: dict[str, nn.Module] = {}
    for original, found in chosen.items():
        key = seed if options.feedback_seed is None else options.feedback_seed, "localize", found[0]
        is_output = output in found
        layer = replacement(original)(
            original, found[0], options, key, taps, upkeep, is_output, error_features
        )
        for name in found:
            layers[name], originals[name] = layer, original
    for name, layer in layers.items():
        parent, attribute = _place(module, name)
        setattr(parent, attribute, layer)
    localized = Localized(module, options, layers, exact, originals, upkeep)
    for step in range(options.fa_grape_start):
        align(dict.fromkeys(layers.values()), seed, "start", step)
    return localized


def _options(options: RuleOptions | None, method: str | None, others: dict[str, object]) -> RuleOptions:
    given = {**({} if method is None else {"method": method}), **others}
    if options is not None:
        require(not given, "options", options, "allowed are options or their fields by name, not both")
        return options
    require(method is not None, "method", method, "allowed are " + ", ".join(map(repr, RULES)))
    for name in given:
        require_choice("option", name, [item.name for item in fields(RuleOptions)])
    return RuleOptions(**given)
