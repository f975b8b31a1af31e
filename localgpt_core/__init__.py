"""localgpt: a character GPT whose linear layers choose how they learn.

>>> from localgpt_core import load_corpus, train, LocalGPTConfig, TrainConfig
>>> sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0)
>>> result = train(LocalGPTConfig(method="fa", **sizes), TrainConfig(steps=10, batch_size=8), load_corpus())
>>> result.status
'finished'
"""

from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.convert.localize import Localized, localize
from localgpt_core.corpus.corpus import Corpus, load_corpus
from localgpt_core.experiments.records import RunRecord, load_records
from localgpt_core.experiments.specs import RunSpec
from localgpt_core.layers.bottlenecks import FrozenSubspace, HardTopK, VQResidualDir
from localgpt_core.layers.linear import LocalLinear
from localgpt_core.layers.norms import LayerNormProjectedSurrogate, LayerNormSTE
from localgpt_core.layers.surrogates import GELUSTE, SigmoidSTE, SoftmaxValueMixLocalFn
from localgpt_core.measure.alignment import alignment
from localgpt_core.measure.transport import describe, weight_transport
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.moved import find_moved_modules
from localgpt_core.rules import RULES, LearningRule, RuleOptions
from localgpt_core.training.loop import TrainResult, train

find_moved_modules()

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
