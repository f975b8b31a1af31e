r"""Which matrices an error passes on its way to a parameter: found out by experiment, not by declaration.

One matrix at a time is replaced by other numbers, and a pass forward and backward shows which gradients
change. Where the matrix is a layer's weight, the layer's *output* is held at its recorded values: the forward
pass is the same to the last bit, while everything that reads the weight, at any time and by any path, sees
other numbers. A gradient that changes has read it. Weights are replaced twice, once with their signs kept and
once with random ones, to tell a rule that reads magnitudes from one that reads signs. An entry of 0 has no
sign to keep: another number stands in for it in all that is compared.

That no gradient changes proves something only where one could have. So the control multiplies the error at
the layer by random numbers instead of its feedback matrix or weight. If even that changes no gradient, the
layer is *silent*: no error arrives at it, or what it hands down reaches no trained parameter.

What is judged is the way back of one training step, and what feedback takes of its weight between two steps
(`localgpt_core.measure.following`). How a feedback matrix comes to resemble its weight by forward passes, or
by equal increments, which take nothing, is the rule's business.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from localgpt_core.common.modes import set_for_a_while
from localgpt_core.common.seeds import generator, normal_like
from localgpt_core.common.validation import require
from localgpt_core.layers.feedback_points import ReadingPoint
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.measure.alignment import alignment, loss_of
from localgpt_core.measure.following import taken_in_words, with_taken
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.rules.feedback import HoldsFeedback

__all__ = ["describe", "weight_transport"]

Reads = Literal["weight", "sign", "nothing", "silent"]
Gradients = dict[str, Tensor | None]


def weight_transport(
    model: nn.Module,
    idx: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    loss: Callable[[], Tensor] | None = None,
) -> dict[str, str]:
    """Return for each `LocalLayer` what the backward pass reads of its weight: the executable proof.

    ``"weight"``: some gradient of the model depends on its magnitudes, ``"sign"``: on its signs only,
    ``"nothing"``: on neither, although one depends on the error that the layer hands down. ``"silent"``: on
    neither, and on no error from this layer, so that nothing is shown. That is so where the error at the
    layer is zero or absent (behind a gate at 0, say), or where no parameter below it is trained.

    What the feedback takes of the weight before each step is added: ``"one number"`` instead of nothing where
    its norm is read, ``"sign, one number"`` where that is the mean magnitude, and the way back reads signs.

    The loss is ``model(idx, targets)[1]``, or what ``loss()`` returns, which runs one forward pass of a
    module with any signature. The model is left as it was; run it on the CPU, where equal computations give
    equal bits.

    Raises:
        ValueError: Unless exactly one of ``loss`` and the pair ``idx``, ``targets`` is given.
    """
    probe = _Probe(model, loss_of(model, idx, targets, loss))
    found = {name: reads for name, (reads, _) in _readers(probe).items()}
    return {name: with_taken(reads, model.get_submodule(name)) for name, reads in found.items()}


@dataclass(frozen=True)
class _Probe:
    """A model with the loss of one batch, and its gradients while nothing is replaced."""

    model: nn.Module
    loss: Callable[[], Tensor]

    def gradients(self) -> Gradients:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        places = [module for module in self.model.modules() if isinstance(module, HoldsFeedback)]
        probed = set_for_a_while(places, "probed", True)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), probed:
            torch.manual_seed(0)
            grads = torch.autograd.grad(self.loss(), list(trained.values()), allow_unused=True)
        return dict(zip(trained, grads, strict=True))


def _changed(before: Gradients, now: Gradients) -> set[str]:
    """Return the names of the gradients that differ; what is not a number is the same everywhere."""
    return {
        name
        for name, g in before.items()
        if g is not None and not torch.allclose(g, now[name], rtol=0.0, atol=0.0, equal_nan=True)
    }


@contextmanager
def _replaced(tensor: Tensor, values: Tensor) -> Iterator[None]:
    kept = tensor.detach().clone()
    tensor.data.copy_(values)
    try:
        yield
    finally:
        tensor.data.copy_(kept)


@contextmanager
def _output_held(layer: nn.Module, recorded: list[Tensor]) -> Iterator[None]:
    """Hold the outputs of ``layer`` at ``recorded``, one entry per call; their backward pass stays."""
    calls = iter(recorded)

    def hold(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return next(calls) + (output - output.detach())

    hook = layer.register_forward_hook(hold)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _other_feedback(layer: LocalLayer, source: torch.Generator) -> Iterator[None]:
    """Let the error at ``layer`` be multiplied by random numbers instead of what its rule says."""
    feedback = layer.rule.feedback

    def other(weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        usual = feedback(weight, buffer)
        return torch.randn(usual.shape, generator=source, device=usual.device, dtype=usual.dtype)

    layer.rule.feedback = other
    try:
        yield
    finally:
        del layer.rule.feedback


def _recorded(probe: _Probe, layers: dict[str, nn.Module]) -> tuple[Gradients, dict[str, list[Tensor]]]:
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs[name].append(output.detach())

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        return probe.gradients(), outputs
    finally:
        for hook in hooks:
            hook.remove()


def _readers(probe: _Probe) -> dict[str, tuple[Reads, set[str]]]:
    """Return for each layer what is read of its weight, and by which parameters' gradients."""
    layers = {name: m for name, m in probe.model.named_modules() if isinstance(m, LocalLayer)}
    # A weight may be tied: the values that an embedding looks up in it are held as well.
    owners = {name: m for name, m in probe.model.named_modules() if isinstance(m, LocalLayer | nn.Embedding)}
    before, outputs = _recorded(probe, owners)
    found: dict[str, tuple[Reads, set[str]]] = {}
    for name, layer in layers.items():
        source = generator(name, device=layer.weight.device)
        found[name] = _readers_of(probe, layer, before, owners, outputs, source)
    return found


def _readers_of(
    probe: _Probe,
    layer: LocalLayer,
    before: Gradients,
    owners: dict[str, nn.Module],
    outputs: dict[str, list[Tensor]],
    source: torch.Generator,
) -> tuple[Reads, set[str]]:
    """Return what is read of one weight, and by which parameters' gradients."""
    weight = layer.weight.detach()

    def gradients_with(values: Tensor) -> Gradients:
        with ExitStack() as held:
            for owner, module in owners.items():
                if module.weight is layer.weight:
                    held.enter_context(_output_held(module, outputs[owner]))
            held.enter_context(_replaced(layer.weight, values))
            return probe.gradients()

    random = torch.rand(weight.shape, generator=source, device=weight.device, dtype=weight.dtype)
    full = torch.where(weight == 0, 0.5 + random, weight)
    usual = before if torch.equal(full, weight) else gradients_with(full)
    signs = torch.where(random < 0.5, -1.0, 1.0).to(weight.dtype)
    by_magnitude = _changed(usual, gradients_with(full * (0.5 + random)))
    by_sign = _changed(usual, gradients_with(full * signs))
    if by_magnitude or by_sign:
        return "weight" if by_magnitude else "sign", by_magnitude | by_sign
    with _other_feedback(layer, source):
        return "nothing" if _changed(before, probe.gradients()) else "silent", set()


def _carriers(probe: _Probe, before: Gradients) -> dict[str, list[str]]:
    """Return for each parameter the matrices that its error has passed, weights and feedback."""
    carriers: dict[str, list[str]] = {name: [] for name in before}
    words = {"weight": "W of", "sign": "sign W of"}
    for layer, (reads, readers) in _readers(probe).items():
        for name in readers:
            carriers[name].append(f"{words[reads]} {layer}")
    for place, module in probe.model.named_modules():
        if isinstance(module, HoldsFeedback) and module.buffer is not None and module.buffer.ndim == 2:
            other = normal_like(module.buffer, generator(place)).to(module.buffer)
            with _replaced(module.buffer, other):
                for name in _changed(before, probe.gradients()):
                    carriers[name].append(f"B of {place}")
    return carriers


def describe(model: nn.Module, *, loss: Callable[[], Tensor] | None = None) -> str:
    """Return a table that says, for each parameter, which error trains it and which matrices that has passed.

    Found out as `weight_transport` does, on a small random batch of a `LocalGPT`, or for another module by
    ``loss()``, which runs one forward pass and returns the loss. The error is ``exact`` where direction and
    exact gradient agree, ``output`` where it came from the logits through a feedback matrix, ``local`` where
    it was handed down layer by layer, ``silent`` where none arrives or only rounding does (at most 8 eps
    of the model's largest exact gradient), ``none`` for a parameter that this configuration does not train.

    A last line says what the feedback takes of its weight between the steps, if that is anything.
    """
    if loss is None:
        require(isinstance(model, LocalGPT), "loss", loss, f"is needed for a {type(model).__name__}")
        config, source = model.config, generator("describe")
        idx = torch.randint(config.vocab_size, (2, min(config.block_size, 8)), generator=source, device="cpu")
        idx = idx.to(next(model.parameters()).device)
        loss = loss_of(model, idx, idx.flip(1), None)
    measured = alignment(model, loss=loss)
    probe = _Probe(model, loss)
    before = probe.gradients()
    arrives = {name for name, g in before.items() if g is not None and g.norm() > measured.floor}
    output = {
        name for name, m in model.named_modules() if isinstance(m, HoldsFeedback) and m.rule.error == "output"
    }
    # Where points read the head, its weight brings the output's error to them.
    if any(isinstance(module, ReadingPoint) for module in model.modules()):
        output.add("W of head")
    carriers = _carriers(probe, before)
    rows = [("parameter", "error", "has passed")]
    for name, _ in model.named_parameters():
        passed = carriers[name] if name in arrives else []
        if name not in before:
            error = "none"
        elif name not in arrives:
            error = "silent"
        elif measured.cosine[name] > 1 - 1e-6 and abs(measured.norm_ratio[name] - 1) < 1e-4:
            error = "exact"
        else:
            direct = any(p in output or p.removeprefix("B of ") in output for p in passed)
            error = "output" if direct else "local"
        first = sorted(passed, key=lambda matrix: not (matrix.startswith("B of") or matrix in output))
        rows.append((name, error, _shortened(first)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    taken = Counter(taken_in_words(m) for m in model.modules() if isinstance(m, LocalLayer))
    del taken[""]
    lines += [f"taken before each step: {words} of W in {number} layers" for words, number in taken.items()]
    return "\n".join(lines)


def _shortened(matrices: list[str]) -> str:
    if len(matrices) <= 2:
        return ", ".join(matrices)
    return f"{matrices[0]}, {matrices[1]} and {len(matrices) - 2} more"
