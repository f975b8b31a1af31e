r"""What goes on inside a model: who wins, how gradients meet the norms, where the gates stand.

- ``unused``, ``entropy``, of k-WTA units and of codes: over many tokens, the share that is never chosen, and
  the entropy in bits of who is, log2 of their number if all are chosen equally often; where a codebook has
  groups, the mean of theirs;
- ``concentration``, of hidden units without k-WTA: the mean over tokens of the smallest share of units that
  carries 90 % of the squared activation;
- ``radial``, of the gradient v that arrives at a norm, gamma included and its mean taken out: the share of
  its squared length along the normalised input z, which the norm's exact derivative removes,
  sum (z mean(v z))^2 / sum (v - mean v)^2 over all tokens;
- ``vq_radial``, of the gradient g that arrives at a codebook's output: the share of its squared length along
  the groups u that it replaced, sum <g, u>^2 / sum |g|^2 over all tokens and groups, which a gradient of any
  direction has 1 / d of in groups of d units. What moves along u changes norms and no code;
- ``gates``: their values.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.bottlenecks.codebook import VQResidualDir, in_groups
from localgpt_core.common.modes import evaluation_mode, watch
from localgpt_core.layers.norms import FixedNorm, gain, normalise
from localgpt_core.model.gpt import LocalGPT

__all__ = [
    "choices",
    "code_radial_shares",
    "concentration",
    "entropy_bits",
    "gates",
    "radial_shares",
    "unused_share",
]

CARRIED = 0.9


def unused_share(counts: Tensor) -> float:
    """Return the share of entries of ``counts`` that are zero."""
    return (counts == 0).double().mean().item()


def entropy_bits(counts: Tensor) -> float:
    """Return the entropy in bits of the distribution that is proportional to ``counts``; NaN if all are 0.

    Of several rows of counts it is the mean.
    """
    p = counts.double() / counts.sum(dim=-1, keepdim=True)
    return -torch.xlogy(p, p).sum(dim=-1).mean().item() / math.log(2)


def choices(model: LocalGPT, idx: Tensor) -> dict[str, Tensor]:
    """Return how often each unit wins and each code is chosen over the tokens ``idx`` (B, T).

    By place: ``blocks.0.mlp`` (4C counts), ``blocks.0.resid`` (C) and ``blocks.0.vq`` (K, or groups x K),
    each where the configuration has it.
    """
    counts: dict[str, Tensor] = {}

    def nonzero(name: str) -> Callable[[Tensor], None]:
        return lambda x: counts.update({name: (x != 0).flatten(0, -2).sum(dim=0)})

    def chosen(name: str, vq: VQResidualDir) -> Callable[[Tensor], None]:
        def count(x: Tensor) -> None:
            groups = vq.codes(x).reshape(-1, math.prod(vq.codebook.shape[:-2])).T
            rows = [torch.bincount(codes, minlength=vq.n_codes) for codes in groups]
            counts[name] = torch.stack(rows) if len(rows) > 1 else rows[0]

        return count

    inputs, outputs = [], []
    for i, block in enumerate(model.blocks):
        if model.config.mlp_topk:
            inputs.append((block.mlp.proj, nonzero(f"blocks.{i}.mlp")))
        if hasattr(block, "winners"):
            outputs.append((block.winners, nonzero(f"blocks.{i}.resid")))
        if hasattr(block, "vq"):
            inputs.append((block.vq, chosen(f"blocks.{i}.vq", block.vq)))
    watch(model, idx, inputs, outputs)
    return counts


def concentration(model: LocalGPT, idx: Tensor) -> dict[str, float]:
    """Return the share of hidden units that carries 90 % of the squared activation, by block.

    Averaged over the tokens ``idx`` (B, T).
    """
    found: dict[str, float] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        def measure(hidden: Tensor) -> None:
            power = hidden.double().square().flatten(0, -2).sort(dim=-1, descending=True).values
            carried = power.cumsum(dim=-1) / power.sum(dim=-1, keepdim=True)
            found[name] = ((carried < CARRIED).sum(dim=-1) + 1).double().mean().item() / hidden.shape[-1]

        return measure

    watch(model, idx, [(b.mlp.proj, note(f"blocks.{i}")) for i, b in enumerate(model.blocks)])
    return found


def _norms(model: LocalGPT) -> dict[str, nn.Module]:
    """Return each norm that normalises, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("ln1", "ln2", "ln_f") and not isinstance(module, FixedNorm)
    }


def _arriving(
    model: LocalGPT, idx: Tensor, targets: Tensor, modules: dict[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return each module's input, and the gradient that the model's own backward pass brings to its output.

    None where no gradient arrives.
    """
    passed: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.enable_grad(), evaluation_mode(model), ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(
                lambda module, args, output, name=name: passed.update({name: (args[0].detach(), output)})
            )
            hooks.callback(hook.remove)
        loss = model(idx, targets)[1]
        reached = [name for name, (_, y) in passed.items() if y.requires_grad]
        grads = ()
        if reached:
            grads = torch.autograd.grad(loss, [passed[name][1] for name in reached], allow_unused=True)
    by_name = dict(zip(reached, grads, strict=True))
    return {name: (passed[name][0], by_name.get(name)) for name in modules}


def radial_shares(model: LocalGPT, idx: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the radial share of the gradient that the model's own backward pass brings to each norm.

    NaN where no gradient arrives. The random state, the mode and ``.grad`` are left as they are.
    """
    norms = _norms(model)
    return {
        name: math.nan if g is None else _radial_share(x, g * gain(norms[name]).detach())
        for name, (x, g) in _arriving(model, idx, targets, norms).items()
    }


def _radial_share(x: Tensor, v: Tensor) -> float:
    z, _ = normalise(x.double())
    centred = v.double() - v.double().mean(dim=-1, keepdim=True)
    radial = z * (centred * z).mean(dim=-1, keepdim=True)
    return (radial.square().sum() / centred.square().sum()).item()


def code_radial_shares(model: LocalGPT, idx: Tensor, targets: Tensor) -> dict[str, float]:
    """Return, by codebook, the radial share of the gradient that arrives at its output.

    That is before what takes the place of the codebook's derivative, and also while the codebook is not in
    use. NaN where no gradient arrives. The random state, the mode and ``.grad`` are left as they are.
    """
    codebooks = {name: m for name, m in model.named_modules() if isinstance(m, VQResidualDir)}
    arriving = _arriving(model, idx, targets, codebooks) if codebooks else {}
    return {
        name: math.nan if g is None else _share_along(h, g, codebooks[name].codebook)
        for name, (h, g) in arriving.items()
    }


def _share_along(h: Tensor, g: Tensor, codebook: Tensor) -> float:
    u = functional.normalize(in_groups(h.double(), codebook), dim=-1)
    along = (in_groups(g.double(), codebook) * u).sum(dim=-1)
    return (along.square().sum() / g.double().square().sum()).item()


def gates(model: LocalGPT) -> dict[str, float]:
    """Return the value of every gate by name; empty without ``gated_blocks``."""
    return {name: p.item() for name, p in model.named_parameters() if ".alpha_" in name}
