"""The configuration of a run, and what it and that of its model do not allow together."""

from dataclasses import dataclass

from localgpt_core.common.validation import check_needs, check_values, option, require
from localgpt_core.config.model import MOST_BLOCKS, LocalGPTConfig, block_numbers
from localgpt_core.rules.base import LARGEST_SIZE

__all__ = ["CODEBOOK_BATCHES", "TrainConfig", "check_run"]

PRECISIONS = ("float64", "float32", "bfloat16")

MOST_STEPS = 10**12  # those of a century, at a thousand in 3 s
CODEBOOK_BATCHES = 32  # training batches that a codebook is fitted to


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: AdamW, linear warm-up, cosine decay, clipping, fixed validation.

    With ``anchor_only`` a step that is no anchor is a forward pass without gradients: weights, feedback and
    the optimiser's moments stay, the schedule goes on, and its loss is one of the training curve.

    With ``noise_start`` the model is first trained by its rule to predict random characters from random ones,
    both uniform, in a run of that many steps, after which the optimiser's moments are dropped: weights that
    align to fixed feedback do so before there is data (Cheon, Lee and Paik 2024).

    Each field's meaning is in its metadata and in ``localgpt train --help``. Everything here can change the
    result; where and how fast a run goes (device, threads) is not here.

    Raises:
        ValueError: Naming the field, the value and what is allowed.
    """

    seed: int = option(1, "seed of weights, feedback, batches, dropout and probes", minimum=0)
    steps: int = option(5000, "training steps", minimum=1, maximum=MOST_STEPS)
    batch_size: int = option(64, "sequences per step", minimum=1, maximum=LARGEST_SIZE)
    lr: float = option(1e-3, "peak learning rate", within="(0, inf)")
    min_lr_ratio: float = option(0.1, "final learning rate over the peak", within="[0, 1]")
    warmup: int = option(100, "steps of linear warm-up", minimum=0, maximum=MOST_STEPS)
    beta1: float = option(0.9, "AdamW's first moment decay", within="[0, 1)")
    beta2: float = option(0.99, "AdamW's second moment decay", within="[0, 1)")
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only", within="[0, inf)")
    grad_clip: float = option(1.0, "largest global gradient norm; 0 = no clipping", within="[0, inf)")
    eval_interval: int = option(
        250, "steps between evaluations on the validation split", minimum=1, maximum=MOST_STEPS
    )
    eval_iters: int = option(
        0,
        "batches of an evaluation, spread evenly over the validation split; 0 = the whole split",
        minimum=0,
        maximum=MOST_STEPS,
    )
    eval_between: int = option(
        0,
        "batches of an evaluation before the last one, spread evenly over the split; 0 = as the last one",
        minimum=0,
        maximum=MOST_STEPS,
        needs=(
            "is what eval_iters is, which is written as 0",
            lambda config: config.eval_between != config.eval_iters,
        ),
    )
    freeze_body: bool = option(False, "control: train embeddings and head only")
    freeze_blocks: str = option(
        "",
        "blocks that are not trained, such as 1,2,3; empty = none",
        needs=(
            "has no effect with freeze_body=True, which freezes every block",
            lambda config: not config.freeze_body,
        ),
    )
    anchor_interval: int = option(
        0,
        "every how many steps one is backpropagation (an anchor); 0 = never",
        minimum=0,
        maximum=lambda config: config.steps,
    )
    anchor_only: bool = option(
        False,
        "control: the anchors are the only steps taken; of the others the loss is computed and nothing moves",
        needs=("needs anchor_interval of at least 2", lambda config: config.anchor_interval > 1),
    )
    noise_start: int = option(
        0,
        "steps of a run of its own on random characters, before the first step",
        minimum=0,
        maximum=MOST_STEPS,
    )
    vq_start: int = option(
        0,
        "steps before the codebook is in use (and, with kmeans, fitted)",
        minimum=0,
        maximum=lambda config: config.steps - 1,
    )
    precision: str = option(
        "float32", "float32, bfloat16 (autocast) or float64 (parameters)", choices=PRECISIONS
    )
    compile: bool = option(False, "torch.compile the model")

    def __post_init__(self) -> None:
        check_values(self)
        block_numbers("freeze_blocks", self.freeze_blocks, MOST_BLOCKS)
        check_needs(self)

    def eval_batches(self, step: int) -> int:
        """Return of how many batches the evaluation after ``step`` steps is; 0 = the whole split."""
        return self.eval_between if self.eval_between and step < self.steps else self.eval_iters

    @property
    def frozen_blocks(self) -> list[int]:
        """The numbers of the blocks that ``freeze_blocks`` leaves at their start."""
        return block_numbers("freeze_blocks", self.freeze_blocks, MOST_BLOCKS)


def check_run(model: LocalGPTConfig, train: TrainConfig) -> None:
    """Raise ``ValueError`` for what either configuration allows and both together do not.

    These are frozen blocks that are not there, noise for codes to quantise, anchors beside other steps of a
    model whose every step is exact, a late start of no codebook, and more codes than the tokens that they
    would be fitted to.
    """
    block_numbers("freeze_blocks", train.freeze_blocks, model.n_layer)
    allowed = "must be 0 with vq_codes, which noise would collapse"
    require(not (train.noise_start and model.vq_codes), "noise_start", train.noise_start, allowed)
    anchors, allowed = train.anchor_interval, "has no effect where every derivative is exact"
    require(train.anchor_only or not (anchors and model.is_exact), "anchor_interval", anchors, allowed)
    allowed = "has no effect without vq_codes"
    require(not train.vq_start or model.vq_codes > 0, "vq_start", train.vq_start, allowed)
    if model.vq_init == "kmeans":
        tokens = CODEBOOK_BATCHES * train.batch_size * model.block_size
        streams = sum(map(model.has_bottleneck, range(model.n_layer))) if model.vq_shared else 1
        allowed = f"k-means has {tokens * streams} tokens to fit them to, and needs as many as codes"
        require(model.vq_codes <= tokens * streams, "vq_codes", model.vq_codes, allowed)
