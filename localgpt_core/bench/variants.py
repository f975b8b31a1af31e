"""What a benchmark measures: models under a rule or with an option, and what each is held against."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.bench.plain import PlainGPT
from localgpt_core.common.validation import Refusal
from localgpt_core.config import LocalGPTConfig
from localgpt_core.experiments.suites import Suite
from localgpt_core.layers.linear import LocalLinear
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.rules import RULES, RuleOptions

__all__ = ["Variant", "arms_of", "variants", "with_softmax_written_out"]

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "precision", "compile")

Change = Callable[[LocalGPT], LocalGPT | PlainGPT]


class PlainLinear(nn.Linear):
    """``torch.nn.Linear`` that accepts, and ignores, the taps of `LocalLinear`."""

    def forward(self, x: Tensor, taps: list[Tensor] | None = None) -> Tensor:
        """Return x W^T + b."""
        return functional.linear(x, self.weight, self.bias)


def with_plain_linears(model: LocalGPT) -> LocalGPT:
    """Return ``model`` with every LocalLinear replaced by torch's own layer, weights kept."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LocalLinear):
                plain = PlainLinear(child.in_features, child.out_features, child.bias is not None)
                plain.load_state_dict({key: child.state_dict()[key] for key, _ in child.named_parameters()})
                setattr(module, name, plain)
    return model


def with_softmax_written_out(model: LocalGPT) -> LocalGPT:
    """Return ``model`` with softmax attention by products and a softmax, not by torch's one operation."""
    for block in model.blocks:
        block.attn.exact = True
    return model


@dataclass(frozen=True)
class Variant:
    """A model to measure, and what it is measured against; a change is made to the model once it is built."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    against: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    train_against: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    change_reference: Change | None = None


# What changes the cost of a step under a rule, by what it adds to the rule's name.
WAYS = {
    "": {},
    " + grape": {"fa_grape": True},
    " + grape, kaczmarz": {"fa_grape": True, "fa_grape_update": "kaczmarz"},
    " block": {"dfa_granularity": "block"},
    " block norm": {"dfa_granularity": "block", "dfa_norm": True},
    " block norm + grape": {"dfa_granularity": "block", "dfa_norm": True, "fa_grape": True},
}


def rule_variants() -> list[Variant]:
    """Return every registered rule, in each of the `WAYS` that its configuration accepts."""
    exact = RuleOptions.method
    found = [Variant(f"{exact} (against torch.nn.Linear)", change_reference=with_plain_linears)]
    for way, options in WAYS.items():
        for name in RULES:
            with suppress(Refusal):
                LocalGPTConfig(method=name, **options)
                if name != exact:
                    found.append(Variant(name + way, {"method": name, **options}))
    return found


def as_plain(model: LocalGPT) -> PlainGPT:
    """Return a GPT of torch's own layers, of the sizes of ``model``."""
    return PlainGPT(model.config)


# What is compared with the GPT that everybody writes, and what a profile shows unless a suite says otherwise.
COMPARED = {
    "bp softmax": {"attn_mode": "softmax"},
    "bp": {},
    "fa": {"method": "fa"},
    "dfa": {"method": "dfa"},
    "kp + grape, kaczmarz": {"method": "kp", **WAYS[" + grape, kaczmarz"]},
    "dfa block norm + grape": {"method": "dfa", **WAYS[" block norm + grape"]},
}


def plain_gpt() -> Variant:
    """Return the GPT that everybody writes."""
    return Variant("plain GPT", change=as_plain)


def plain_variants() -> list[Variant]:
    """Return what is measured against the GPT that everybody writes, and that GPT."""
    against = [
        Variant(f"{name} (against a plain GPT)", options, change_reference=as_plain)
        for name, options in COMPARED.items()
    ]
    return [plain_gpt(), *against]


def variants(width: int) -> list[Variant]:
    """Return what is measured at a residual stream of ``width``."""
    softmax = {"attn_mode": "softmax"}
    fours = {"vq_codes": 16, "vq_groups": width // 4, "vq_rms": "fixed"}  # 4 bits for every four units
    return [
        *plain_variants(),
        *rule_variants(),
        Variant("ste_sigmoid", {"ste_sigmoid": True}),
        Variant("ste_gelu", {"ste_gelu": True}),
        Variant("gelu steps", {"ste_gelu": True, "gelu_surrogate": "steps"}),
        Variant("ln ste", {"ln_mode": "ste"}),
        Variant("ln center_scale", {"ln_mode": "center_scale"}),
        Variant("ln projected", {"ln_mode": "projected"}),
        Variant("softmax", softmax),
        Variant(
            "softmax fused (against softmax)",
            {**softmax, "fuse_attn_local": True},
            softmax,
            change_reference=with_softmax_written_out,
        ),
        Variant(
            "torch's attention (against softmax)",
            softmax,
            softmax,
            change_reference=with_softmax_written_out,
        ),
        Variant(f"mlp_topk {width}", {"mlp_topk": width}),
        Variant(f"resid_topk {width // 2}", {"resid_topk": width // 2}),
        Variant("vq 256 codes", {"vq_codes": 256}),
        Variant("vq 4096 codes", {"vq_codes": 4096}),
        *(
            Variant(f"vq {width // 4} x 16 codes, {how}", fours | {"vq_backward": how})
            for how in ("identity", "tangent", "rotation")
        ),
        Variant("resid_bits 4", {"resid_bits": 4}),
        Variant(f"subspace rank {width // 4}", {"subspace_rank": width // 4}),
        Variant("subspace constrained", {"subspace_rank": width // 4, "subspace_mode": "constrain"}),
        Variant("gates", {"gated_blocks": True}),
    ]


def arms_of(suite: Suite) -> list[Variant]:
    """Return the arms of a suite as what is measured, each against backpropagation at its own sizes."""
    return [Variant(a.name, a.model, sizes_of(a.model), a.train, sizes_of(a.train)) for a in suite.arms]


def sizes_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that change what any rule costs, which the reference shares."""
    return {name: value for name, value in options.items() if name in SIZES}
