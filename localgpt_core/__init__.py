"""localgpt: a character GPT whose linear layers choose how they learn.

>>> from localgpt_core import load_corpus, train, LocalGPTConfig, TrainConfig
>>> sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0)
>>> result = train(LocalGPTConfig(method="fa", **sizes), TrainConfig(steps=10, batch_size=8), load_corpus())
>>> result.status
'finished'
"""

from localgpt_core.alignment import alignment
from localgpt_core.bottlenecks import FrozenSubspace, HardTopK, VQResidualDir
from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.convert import Localized, localize
from localgpt_core.corpus import Corpus, load_corpus
from localgpt_core.linear import LocalLinear
from localgpt_core.model import LocalGPT
from localgpt_core.records import RunRecord, load_records
from localgpt_core.rules import RULES, LearningRule, RuleOptions
from localgpt_core.specs import RunSpec
from localgpt_core.surrogates import (
    GELUSTE,
    LayerNormProjectedSurrogate,
    LayerNormSTE,
    SigmoidSTE,
    SoftmaxValueMixLocalFn,
)
from localgpt_core.training import TrainResult, train
from localgpt_core.transport import describe, weight_transport

__all__ = [
    "GELUSTE",
    "RULES",
    "Corpus",
    "FrozenSubspace",
    "HardTopK",
    "LayerNormProjectedSurrogate",
    "LayerNormSTE",
    "LearningRule",
    "LocalGPT",
    "LocalGPTConfig",
    "LocalLinear",
    "Localized",
    "RuleOptions",
    "RunRecord",
    "RunSpec",
    "SigmoidSTE",
    "SoftmaxValueMixLocalFn",
    "TrainConfig",
    "TrainResult",
    "VQResidualDir",
    "alignment",
    "describe",
    "load_corpus",
    "load_records",
    "localize",
    "train",
    "weight_transport",
]
