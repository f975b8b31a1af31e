r"""The contract of a learning rule, its options and the registry.

Every rule of this package trains a linear layer ``y = x W^T + b`` with the same two local gradients,

    grad_weight = grad_output^T x          (out x in)
    grad_bias   = sum over tokens of grad_output

and differs only in the error that the layer hands to the layer below,

    grad_input = signal(error) @ feedback

where the signal is the error itself unless a rule sends less. A rule answers three questions: which error
(the gradient that arrives at the layer's output, or the error at the output of the whole network), which
feedback matrix, and how that matrix moves. It never sees an autograd graph: `localgpt_core.layers.linear`
owns the one autograd Function that asks these questions.

A new rule is one file that subclasses `LearningRule`, one line in ``rules/__init__.py`` and one test file.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from localgpt_core.common.lazy import Registry
from localgpt_core.common.validation import check_needs, check_values, option, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["RULES", "LearningRule", "RuleOptions"]

FEEDBACK_INITS = ("gaussian", "orthogonal", "ortho_he", "sparse")
PROBE_UPDATES = ("cosine", "kaczmarz")
JVP_UPDATES = ("grape", "fdfa")
SIGN_MAGNITUDES = ("uniform", "random")
SCALES = ("start", "weight", "probes")

LARGEST_SIZE = 2**20  # units, tokens, codes, probes or sequences: a matrix of a trillion numbers

# Options that belong together: a rule names the groups it uses.
START_OPTIONS = frozenset({"fa_init_mode", "fa_sparse_k", "feedback_std", "feedback_seed"})
PROBE_OPTIONS = frozenset({"fa_grape_n_probe", "fa_grape_update", "fa_grape_lr"})
JVP_OPTIONS = frozenset({"jvp_update", "jvp_rate", "jvp_share"})
SCALE_OPTIONS = frozenset({"scale_follows", "scale_n_probe"})


# Filled by rules/__init__.py, one line a rule.
RULES = Registry()


WITHOUT_GRAPE = ("needs fa_grape=True", lambda options: options.fa_grape)
WITHOUT_SPARSE = ("needs fa_init_mode='sparse'", lambda options: options.fa_init_mode == "sparse")
OWN_SCALE = (
    "has no effect with fa_init_mode='ortho_he', which brings its own scale",
    lambda options: options.fa_init_mode != "ortho_he",
)
SCALE_STAYS = ("is a scale: needs scale_follows='start'", lambda options: options.scale_follows == "start")
NOTHING_DRAWN = (
    "has no effect with sign_magnitude='uniform'; needs 'random'",
    lambda options: "sign_magnitude" not in RULES[options.method].uses or options.sign_magnitude == "random",
)


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Which rule trains a `LocalLinear`, and with which feedback.

    Every option that the chosen rule does not use must keep its default: nothing is silently ignored.

    Attributes:
        method: Name of the rule in `RULES`.
        fa_init_mode: How a feedback matrix starts, see `localgpt_core.matrices.initial`.
        fa_sparse_k: Non-zeros per row for ``fa_init_mode="sparse"``; 0 means ``max(1, in_features // 16)``.
        feedback_std: Entry RMS of the feedback at its start (``ortho_he`` brings its own).
        feedback_seed: Seed of the feedback; None draws it from the same source as the weights.
        fa_grape: Align the feedback once per training step, from forward passes only (GrAPE): layer by layer
            under ``fa`` and ``kp``, to the network's Jacobian under ``dfa``.
        fa_grape_head: Whether the output layer's feedback is aligned as well.
        fa_grape_start: Alignment steps before the first weight step.
        fa_grape_n_probe: Probes per layer and step, under ``fa`` and ``kp``.
        fa_grape_update: What a layer does with its probes, under ``fa`` and ``kp``: ``"cosine"``, a gradient
            step on 1 - cos, or ``"kaczmarz"``, the smallest change that explains them.
        fa_grape_lr: Step of the update, relative to the best one for Gaussian probes (``"cosine"``) or to a
            full projection (``"kaczmarz"``).
        jvp_update: What a feedback matrix does with the estimate of the Jacobian, under ``dfa``: ``"grape"``,
            a gradient step on 1 - cos of each column, or ``"fdfa"``, a running mean.
        jvp_rate: Size of that step, or weight of the newest estimate in the mean.
        jvp_share: Share of the batch's sequences, rounded up, that the estimate is made from.
        sign_magnitude: Magnitudes under ``sign_sym``: ``"uniform"`` or ``"random"``, drawn once.
        scale_follows: Mean magnitude under ``sign_sym``, norm under ``fa`` without ``fa_grape``: ``"start"``:
            it stays, ``"weight"``: it is the weight's before every step, one number that is transported, or
            ``"probes"``: an estimate of that by forward passes. See `localgpt_core.matrices.scale`.
        scale_n_probe: Probes per layer and step of that estimate.
        mirror_n_probe: White-noise inputs per layer and step, under ``wm``.
        mirror_rate: Weight of the newest correlation in the mirrored feedback, under ``wm``.

    Raises:
        ValueError: For an unknown name, a value out of range, or an option that the rule does not use.
    """

    method: str = option("bp", "learning rule of every linear layer", choices=RULES)
    fa_init_mode: str = option(
        "gaussian",
        "start of the feedback: " + ", ".join(FEEDBACK_INITS),
        choices=FEEDBACK_INITS,
        needs=(SCALE_STAYS[0], lambda o: o.fa_init_mode != "ortho_he" or o.scale_follows == "start"),
    )
    fa_sparse_k: int = option(
        0,
        "non-zeros per feedback row in mode sparse; 0 = in_features // 16",
        minimum=0,
        maximum=LARGEST_SIZE,
        needs=WITHOUT_SPARSE,
    )
    feedback_std: float = option(
        0.02,
        "entry RMS of the feedback at its start",
        within="(0, inf)",
        needs=(OWN_SCALE, SCALE_STAYS),
    )
    feedback_seed: int | None = option(
        None, "seed of the feedback; none: it follows the run's seed", minimum=0, needs=NOTHING_DRAWN
    )
    fa_grape: bool = option(False, "align the feedback each step by forward passes (GrAPE)")
    fa_grape_head: bool = option(True, "align the output layer's feedback too", needs=WITHOUT_GRAPE)
    fa_grape_start: int = option(
        0,
        "alignment steps before the first weight step",
        minimum=0,
        maximum=LARGEST_SIZE,
        needs=WITHOUT_GRAPE,
    )
    fa_grape_n_probe: int = option(
        32, "probes per layer and step (fa, kp)", minimum=1, maximum=LARGEST_SIZE, needs=WITHOUT_GRAPE
    )
    fa_grape_update: str = option(
        "cosine",
        "use of the probes: " + ", ".join(PROBE_UPDATES) + " (fa, kp)",
        choices=PROBE_UPDATES,
        needs=WITHOUT_GRAPE,
    )
    fa_grape_lr: float = option(
        1.0, "alignment step, relative to the optimal one (fa, kp)", within="(0, 2]", needs=WITHOUT_GRAPE
    )
    jvp_update: str = option(
        "grape",
        "use of the Jacobian's estimate: " + ", ".join(JVP_UPDATES) + " (dfa)",
        choices=JVP_UPDATES,
        needs=WITHOUT_GRAPE,
    )
    jvp_rate: float = option(
        0.05, "weight of the newest estimate of the Jacobian (dfa)", within="(0, 1]", needs=WITHOUT_GRAPE
    )
    jvp_share: float = option(
        0.5,
        "share of the batch that the Jacobian is estimated from (dfa)",
        within="(0, 1]",
        needs=WITHOUT_GRAPE,
    )
    sign_magnitude: str = option(
        "uniform", "magnitudes of sign symmetry: " + ", ".join(SIGN_MAGNITUDES), choices=SIGN_MAGNITUDES
    )
    scale_follows: str = option(
        "start",
        "size of the feedback (fa, sign_sym): that of its start; before each step the weight's; or probes: "
        "an estimate of it by forward passes",
        choices=SCALES,
        needs=("has no effect with fa_grape=True, which brings the size along", lambda o: not o.fa_grape),
    )
    scale_n_probe: int = option(
        32,
        "probes per layer and step that estimate the size (fa, sign_sym)",
        minimum=1,
        maximum=LARGEST_SIZE,
        needs=("needs scale_follows='probes'", lambda options: options.scale_follows == "probes"),
    )
    mirror_n_probe: int = option(
        32, "white-noise inputs per layer and step (wm)", minimum=1, maximum=LARGEST_SIZE
    )
    mirror_rate: float = option(
        0.1, "weight of the newest correlation in the mirrored feedback (wm)", within="(0, 1]"
    )

    @property
    def scale_probes(self) -> int:
        """Probes per layer and step that the size of the feedback is estimated from; 0 where it is not."""
        return self.scale_n_probe if self.scale_follows == "probes" else 0

    def __post_init__(self) -> None:
        check_values(self)
        for item in fields(RuleOptions):
            value = getattr(self, item.name)
            if value != item.default and item.name != "method":
                users = [name for name, rule in RULES.items() if item.name in rule.uses]
                allowed = f"has no effect with method={self.method!r}; needs method " + " or ".join(users)
                require(item.name in RULES[self.method].uses, item.name, value, allowed)
        check_needs(self)


class LearningRule:
    """What one learning rule does with the error of a linear layer.

    A rule holds its options and no tensors. What it must remember for a layer (a feedback matrix, a scale)
    is one buffer of that layer: seeded, in the state_dict, moved with the module.

    Attributes:
        error: ``"local"``: the gradient at the layer's own output, or ``"output"``: the gradient at the
            output of the whole network.
        transports: What the backward pass reads of the weight: ``"weight"``, ``"sign"`` or ``"nothing"``.
            Where it is ``"nothing"``, the weight is not even kept for the backward pass. What `align` takes
            beside forward passes, `localgpt_core.measure.weight_transport` finds out.
        buffer_name: Name of the layer's buffer, None if the rule needs none.
        mirrors_gradient: Whether the buffer is trained: it takes the steps that error^T x makes the optimiser
            take. With a local error that is the weight's own gradient, handed to it; with the output's, that
            of a weight from x to the output, computed beside ``grad_input`` from all of the error.
        is_derivative: Whether the error that it hands down is the true derivative.
        uses: The fields of `RuleOptions` that have an effect under this rule.
        no_better_than_frozen: Why the layers below the output gain nothing from this rule, in a sentence;
            empty for a rule that trains them. The contract tests hold a rule to either.
    """

    error: ClassVar[Literal["local", "output"]] = "local"
    transports: ClassVar[Literal["weight", "sign", "nothing"]] = "nothing"
    buffer_name: ClassVar[str | None] = None
    mirrors_gradient: ClassVar[bool] = False
    is_derivative: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()
    no_better_than_frozen: ClassVar[str] = ""

    def __init__(self, options: RuleOptions) -> None:
        self.options = options

    @property
    def aligns(self) -> Literal["no", "layer", "network"]:
        """What moves the buffer once per training step: nothing, `align`, or `align_to_jacobian`."""
        return "no"

    def initial_buffer(self, weight: Tensor, error_features: int, generator: torch.Generator) -> Tensor:
        """Return the buffer at its start, in the dtype and on the device of ``weight`` (out x in).

        ``error_features`` is the width of the error that the feedback will multiply.
        """
        raise NotImplementedError(f"{type(self).__name__} declares no buffer")

    def feedback(self, weight: Tensor | None, buffer: Tensor | None) -> Tensor:
        """Return the matrix (error_features x in) of ``grad_input = error @ feedback``.

        ``weight`` is None unless ``transports`` says that the rule reads it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its feedback")

    def signal(self, error: Tensor) -> Tensor:
        """Return what is sent back of ``error`` (..., error_features), in its shape: all of it."""
        return error

    def backward_flops(self, tokens: int, error_features: int, in_features: int) -> int:
        """Return the matmul FLOPs of ``grad_input`` (tokens x in): of one product, unless a rule has more."""
        return 2 * tokens * error_features * in_features

    def align(
        self, weight: Tensor, buffer: Tensor | None, is_output: bool, generator: torch.Generator
    ) -> None:
        """Move ``buffer`` in place, once per step before the forward pass, if ``aligns`` is ``"layer"``."""
        raise NotImplementedError(f"{type(self).__name__} has no feedback to align to its layer")

    def align_flops(self, out_features: int, in_features: int, is_output: bool) -> int:
        """Return the matmul FLOPs of one `align`: none, unless a rule multiplies matrices there."""
        return 0

    def align_to_jacobian(self, buffer: Tensor, estimate: Tensor) -> None:
        """Move ``buffer`` in place towards ``estimate`` (error_features x in) of the Jacobian d logits / d x.

        Called once per training step before the forward pass where ``aligns`` is ``"network"``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no feedback to align to a Jacobian")
