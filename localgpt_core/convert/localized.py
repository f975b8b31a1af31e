"""What `localize` has done to a module: a report, a way back, and what moves the feedback in training."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from localgpt_core.common.validation import require
from localgpt_core.convert.forward_mode import output_of
from localgpt_core.convert.upkeep import Upkeep, hook, loops
from localgpt_core.layers.between_steps import align, learned, mirror, mirrored
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.rules import RULES, LearningRule, RuleOptions

__all__ = ["Localized", "place_of"]

Forward = Callable[[], object]


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

        Needed with ``fa_grape``, for the weight mirror, and if ``scale_follows`` the weight; draws depend on
        ``key`` and the layer's name only, those with ``forward`` on the order in which the layers are called.

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
        places, logits = self._places(), None
        if self._rule.aligns == "network":
            output = next(place for place in places if place.is_output)
            logits = partial(output_of, self.module, output, forward)
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
        yield from learned(self._places())

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
        learning = ((place.weight, place.buffer) for place in self._places() if place.learns)
        for weight, feedback in (*self.mirrored(), *learning):
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
            parent, attribute = place_of(self.module, name)
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


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the layer called ``name``, and the attribute under which it does."""
    parent, _, attribute = name.rpartition(".")
    return module.get_submodule(parent), attribute
