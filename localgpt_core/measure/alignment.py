r"""What a learning rule does, compared with the exact gradient of the same loss at the same weights.

Let d be the direction that the rule gives a parameter in place of a gradient, g the exact gradient:

    cosine      <d, g> / (|d| |g|)
    norm ratio  |d| / |g|
    descends    <d, g> > 0 over all parameters together: a small step along -d lowers the loss

Both are taken on one forward pass each, with the same weights, buffers, batch and dropout mask; the exact one
keeps the forward pass and replaces every rule and surrogate by the true derivative (`localgpt_core.common`).

A cosine of what is nothing but rounding says nothing. It is NaN, never 1, where a norm is zero or the exact
gradient of a parameter is at the numerical floor: below 8 eps of the largest one of the model.

The size of the residual stream belongs to every cosine: behind a final norm the loss does not depend on it, a
rule may let it grow, and the exact gradient of all that lies below then shrinks with it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from localgpt_core.common.modes import exact_derivatives
from localgpt_core.common.validation import Refusal, require
from localgpt_core.matrices.jacobian import mean_jacobians
from localgpt_core.rules.feedback import HoldsFeedback

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Alignment", "alignment", "feedback_cosines"]

FLOOR = 8.0  # times eps and the largest exact gradient


@dataclass(frozen=True)
class Alignment:
    """One comparison of a rule with the exact gradient.

    Attributes:
        cosine: Cosine of direction and exact gradient, by name of the parameter; NaN where it says nothing.
        norm_ratio: |direction| / |exact gradient|, by name; NaN likewise.
        exact_norm: Norm of the exact gradient, by name.
        residual_rms: RMS of the residual stream behind each block, in order.
        rule_rms: RMS of the error that the rule brings there.
        exact_rms: RMS of the exact gradient there.
        total_cosine: The cosine over all trained parameters together.
        descends: Whether their inner product is positive.
        floor: The numerical floor: a gradient of at most this norm may be nothing but rounding.
    """

    cosine: dict[str, float]
    norm_ratio: dict[str, float]
    exact_norm: dict[str, float]
    residual_rms: list[float]
    rule_rms: list[float]
    exact_rms: list[float]
    total_cosine: float
    descends: bool
    floor: float

    def table(self) -> "pd.DataFrame":
        """Return one row per parameter: parameter, cosine, norm ratio, exact norm."""
        import pandas as pd  # not on the training path

        columns = {"cosine": self.cosine, "norm ratio": self.norm_ratio, "exact norm": self.exact_norm}
        return pd.DataFrame(columns).rename_axis("parameter").reset_index()


def alignment(
    model: nn.Module,
    idx: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    loss: Callable[[], Tensor] | None = None,
    seed: int = 0,
) -> Alignment:
    """Compare the rule of ``model`` with the exact gradient on one batch.

    The model, its ``.grad``, its mode and torch's random state are left as they were.

    Args:
        model: A `LocalGPT`, or another module whose layers were localized.
        idx: Inputs (B, T); the loss is ``model(idx, targets)[1]``.
        targets: Targets (B, T).
        loss: Instead of ``idx`` and ``targets``: runs one forward pass and returns the loss.
        seed: Seed of the dropout masks, the same for both passes.

    Raises:
        ValueError: If the model has no trained parameter, or unless exactly one of ``loss`` and the pair
            ``idx``, ``targets`` is given.
    """
    loss = loss_of(model, idx, targets, loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise Refusal("model: has no parameter that requires a gradient")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        torch.manual_seed(seed)
        rule, stream, rule_errors = _gradients(model, loss, trained)
        torch.manual_seed(seed)
        with exact_derivatives(model):
            exact, _, exact_errors = _gradients(model, loss, trained)
    norms = {name: _norm(g) for name, g in exact.items()}
    floor = FLOOR * torch.finfo(next(iter(trained.values())).dtype).eps * max(norms.values())
    cosine, ratio = {}, {}
    for name, g in exact.items():
        d_norm = _norm(rule[name])
        says_something = norms[name] > floor and d_norm > 0
        inner = _inner(rule[name], g)
        cosine[name] = inner / d_norm / norms[name] if says_something else math.nan
        ratio[name] = d_norm / norms[name] if norms[name] > floor else math.nan
    inner = sum(_inner(rule[name], exact[name]) for name in trained)
    sizes = math.hypot(*(_norm(g) for g in rule.values())) * math.hypot(*norms.values())
    return Alignment(
        cosine=cosine,
        norm_ratio=ratio,
        exact_norm=norms,
        residual_rms=[_rms(x) for x in stream],
        rule_rms=[_rms(g) for g in rule_errors],
        exact_rms=[_rms(g) for g in exact_errors],
        total_cosine=inner / sizes if sizes > 0 else math.nan,
        descends=inner > 0,
        floor=floor,
    )


def loss_of(
    model: nn.Module, idx: Tensor | None, targets: Tensor | None, loss: Callable[[], Tensor] | None
) -> Callable[[], Tensor]:
    """Return ``loss``, or the loss in second place of ``model(idx, targets)``: exactly one must be given."""
    given = [
        name for name, value in (("idx", idx), ("targets", targets), ("loss", loss)) if value is not None
    ]
    allowed = "allowed are idx and targets, or loss alone"
    require(given in (["idx", "targets"], ["loss"]), "given", given, allowed)
    return loss or (lambda: model(idx, targets)[1])


def _gradients(
    model: nn.Module, loss: Callable[[], Tensor], trained: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor | None], list[Tensor], list[Tensor | None]]:
    """Return the gradient of each parameter, the stream behind each block and its gradient."""
    with _stream(model) as stream:
        value = loss()
    # Below the lowest trained parameter no gradient reaches the stream.
    reached = [x for x in stream if x.requires_grad]
    grads = torch.autograd.grad(value, [*trained.values(), *reached], allow_unused=True)
    n = len(trained)
    errors = iter(grads[n:])
    return (
        dict(zip(trained, grads[:n], strict=True)),
        [x.detach() for x in stream],
        [next(errors) if x.requires_grad else None for x in stream],
    )


@contextmanager
def _stream(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the residual stream behind each block, in front of a feedback point that ends the block."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for block in getattr(model, "blocks", ()):
            point = getattr(block, "feedback", None)
            if point is None:
                hook = block.register_forward_hook(lambda module, args, output: found.append(output))
            else:
                hook = point.register_forward_pre_hook(lambda module, args: found.append(args[0]))
            hooks.callback(hook.remove)
        yield found


def _norm(x: Tensor | None) -> float:
    return 0.0 if x is None else x.double().norm().item()


def _inner(a: Tensor | None, b: Tensor | None) -> float:
    return 0.0 if a is None or b is None else (a.double() * b.double()).sum().item()


def _rms(x: Tensor | None) -> float:
    return 0.0 if x is None else x.double().square().mean().sqrt().item()


def feedback_cosines(model: nn.Module, idx: Tensor, seed: int = 0) -> dict[str, float]:
    """Return the cosine between each feedback matrix of a `LocalGPT` and what it stands in for, by place.

    That is the weight where the error is local, and where it is the output's the mean Jacobian over the
    tokens of ``idx`` (B, T), `localgpt_core.matrices.mean_jacobians`. NaN where a norm is zero; a place whose
    feedback is the weight itself is left out.
    """
    places = {name: m for name, m in model.named_modules() if isinstance(m, HoldsFeedback)}
    read = {name for name, m in places.items() if m.rule.transports == "weight" and m.rule.error == "local"}
    places = {name: m for name, m in places.items() if name not in read}
    direct = {m for m in places.values() if m.rule.error == "output"}
    targets: dict[HoldsFeedback, Tensor] = {}
    if direct:
        targets = mean_jacobians(model, lambda: model.logits(idx), direct, seed, "signs")
    cosines = {}
    for name, place in places.items():
        target = targets[place] if place in direct else place.matrix.detach()
        weight = None if place.rule.transports == "nothing" else place.matrix.detach()
        feedback = place.rule.feedback(weight, place.buffer)
        sizes = _norm(feedback) * _norm(target)
        cosines[name] = _inner(feedback, target) / sizes if sizes > 0 else math.nan
    return cosines
