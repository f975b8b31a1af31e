"""Operations with a backward pass of their own.

The linear layer with the one autograd Function behind every rule, feedback points, local derivatives, and
what moves between the steps of a network that holds feedback. Each is chosen at construction and works
without the GPT.
"""

from localgpt_core.bottlenecks import (
    FrozenSubspace,
    HardTopK,
    TopK,
    VQResidualDir,
    keep_winners,
    quantised,
)
from localgpt_core.layers.between_steps import align, feedback_places, learned, mirror, mirrored
from localgpt_core.layers.convolution import LocalConv2d, LocalConv2dFunction
from localgpt_core.layers.feedback_points import FeedbackPoint, ReadingPoint
from localgpt_core.layers.linear import LocalLayer, LocalLinear, LocalLinearFunction, publish_error
from localgpt_core.layers.norms import (
    EPS,
    FixedNorm,
    LayerNormProjectedSurrogate,
    LayerNormSTE,
    normalise,
    normalise_backward,
)
from localgpt_core.layers.surrogates import (
    GELUSTE,
    FusedValueMix,
    GELUStepSurrogate,
    SigmoidSTE,
    SoftmaxValueMixLocalFn,
    StraightThrough,
    SurrogateGELU,
    SurrogateSigmoid,
)
from localgpt_core.matrices.kmeans import spherical_kmeans

__all__ = [
    "EPS",
    "FeedbackPoint",
    "FixedNorm",
    "FrozenSubspace",
    "FusedValueMix",
    "GELUSTE",
    "GELUStepSurrogate",
    "HardTopK",
    "LayerNormProjectedSurrogate",
    "LayerNormSTE",
    "LocalConv2d",
    "LocalConv2dFunction",
    "LocalLayer",
    "LocalLinear",
    "LocalLinearFunction",
    "ReadingPoint",
    "SigmoidSTE",
    "SoftmaxValueMixLocalFn",
    "StraightThrough",
    "SurrogateGELU",
    "SurrogateSigmoid",
    "TopK",
    "VQResidualDir",
    "align",
    "feedback_places",
    "keep_winners",
    "learned",
    "mirror",
    "mirrored",
    "normalise",
    "normalise_backward",
    "publish_error",
    "quantised",
    "spherical_kmeans",
]
