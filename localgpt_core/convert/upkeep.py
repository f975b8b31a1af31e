"""What a training loop owes to feedback that moves, and a warning where it does not do it.

Aligned feedback (GrAPE, the weight mirror, a scale that follows) moves by `Localized.align_feedback`,
mirrored feedback (Kolen-Pollack) by `Localized.mirror_gradients`. `loops` writes down what a loop looks like
that does both. A loop that calls neither trains by (direct) feedback alignment and looks as if it did not. So
the first layer that is trained is watched: if its weight has taken a step after a backward pass and a call
that is owed was never made, one warning names it.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from localgpt_core.layers.between_steps import some_entries
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.rules import LearningRule

__all__ = ["Upkeep", "hook", "loops"]

CALLS = {
    "align_feedback": "localized.align_feedback(step{forward}) before every forward pass",
    "mirror_gradients": "localized.mirror_gradients() before every step of the optimiser",
}
USUAL = (
    "optimizer = torch.optim.AdamW(module.parameters())",
    "for x, y in batches:",
    "    optimizer.zero_grad()",
    "    loss_fn(module(x), y).backward()",
    "    optimizer.step()",
)


def loops(rule: LearningRule) -> dict[str, list[str]]:
    """Return, by title, the lines of the training loops that do all that ``rule`` asks of a loop.

    As code they need ``module``, ``localized``, ``batches`` of (x, y), and ``loss_fn(prediction, y)``. A rule
    whose feedback stays has the usual loop only.
    """
    make, head, *back, step = USUAL
    once, align, mirror = [f"localized.attach(optimizer{_forward(rule)})"], [], []
    if rule.aligns == "network":
        once.insert(0, "x, y = next(iter(batches))")
    if rule.aligns != "no":
        head = "for step, (x, y) in enumerate(batches):"
        align = [f"    localized.align_feedback(step{_forward(rule)})"]
    if rule.mirrors_gradient:
        make = make.replace("module", "localized")
        mirror = ["    localized.mirror_gradients()  # after clipping"]
    if not (align or mirror):
        return {"loop": [*USUAL]}
    by_hand = [make, head, *align, *back, *mirror, step]
    return {"loop": [USUAL[0], *once, *USUAL[1:]], "loop without attach": by_hand}


def _forward(rule: LearningRule) -> str:
    """Return what a call that aligns to the network's Jacobian is given."""
    return ", forward=lambda: module(x)" if rule.aligns == "network" else ""


def _without(rule: LearningRule) -> str:
    """Return what ``rule`` is where its feedback stays."""
    if rule.options.scale_follows != "start":
        return "scale_follows='start'"
    return "direct " * (rule.error == "output") + "feedback alignment"


class Upkeep:
    """The calls that a conversion by ``rule`` still waits for; shared by its layers.

    Attributes:
        owed: Names of the methods of `Localized` that have not been called yet.
    """

    def __init__(self, rule: LearningRule) -> None:
        needs = {"align_feedback": rule.aligns != "no", "mirror_gradients": rule.mirrors_gradient}
        self.rule = rule
        self.owed = [name for name, needed in needs.items() if needed]
        self.watched: str | None = None
        self.before: Tensor | None = None
        self.went_back = False

    def done(self, call: str) -> None:
        """Note that the loop has made ``call``."""
        self.owed = [name for name in self.owed if name != call]

    def look(self, layer: LocalLayer, y: Tensor) -> None:
        """Look at a forward pass of ``layer`` that returned ``y``.

        Warns:
            UserWarning: Once, if a step was taken without a call that is owed.
        """
        if not self.owed or not (layer.training and y.requires_grad and layer.weight.requires_grad):
            return
        entries = some_entries(layer.weight)
        if self.watched is None:
            self.watched, self.before = layer.place, entries
            layer.weight.register_post_accumulate_grad_hook(self._note_backward)
        elif self.watched == layer.place and self.went_back and not torch.equal(entries, self.before):
            forward = _forward(self.rule)
            calls = " and ".join(CALLS[name].format(forward=forward) for name in self.owed)
            self.owed = []
            warnings.warn(
                f"method={self.rule.options.method!r}: the weights took a step while the feedback stayed "
                f"behind, which is {_without(self.rule)}. Call {calls}, or "
                f"localized.attach(optimizer{forward}) once",
                stacklevel=2,
            )

    def _note_backward(self, weight: Tensor) -> None:
        self.went_back = True


def hook(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call ``before()`` when the gradients of a step are there, and ``after()`` when it is taken.

    Where a step computes its gradients by a closure, they are there when that returns. Returns a function
    that takes the hooks back.
    """

    def before_step(optimizer: torch.optim.Optimizer, args: tuple, named: dict) -> tuple[tuple, dict] | None:
        closure = named.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            before()
            return None

        def then_before() -> object:
            loss = closure()
            before()
            return loss

        return args[:1], named | {"closure": then_before}

    hooks = [
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_step_post_hook(lambda *args: after()),
    ]

    def take_back() -> None:
        for each in hooks:
            each.remove()

    return take_back
