"""localgpt: a character GPT whose linear layers choose how they learn.

>>> from localgpt_core import load_corpus, train, LocalGPTConfig, TrainConfig
>>> sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0)
>>> result = train(LocalGPTConfig(method="fa", **sizes), TrainConfig(steps=10, batch_size=8), load_corpus())
>>> result.status
'finished'
"""

import sys
from typing import TYPE_CHECKING

try:
    from localgpt_core.common.lazy import lazy_names
    from localgpt_core.moved import find_moved_modules
except KeyboardInterrupt:
    if sys.argv[0] in ("-m", "localgpt") or sys.argv[0].endswith(("/localgpt", "\\localgpt")):
        sys.exit(130)  # started as a command, which ends without a word
    raise

if TYPE_CHECKING:
    from localgpt_core.bottlenecks import FrozenSubspace, HardTopK, VQResidualDir
    from localgpt_core.config import LocalGPTConfig, TrainConfig
    from localgpt_core.convert.localize import Localized, localize
    from localgpt_core.corpus.corpus import Corpus, load_corpus
    from localgpt_core.layers.linear import LocalLinear
    from localgpt_core.layers.norms import LayerNormProjectedSurrogate, LayerNormSTE
    from localgpt_core.layers.surrogates import GELUSTE, SigmoidSTE, SoftmaxValueMixLocalFn
    from localgpt_core.measure.alignment import alignment
    from localgpt_core.measure.transport import describe, weight_transport
    from localgpt_core.model.gpt import LocalGPT
    from localgpt_core.records import RunRecord, load_records
    from localgpt_core.records.specs import RunSpec
    from localgpt_core.rules import RULES, LearningRule, RuleOptions
    from localgpt_core.training.loop import TrainResult, train

# Looked up when asked for: what only says something, as `localgpt --help`, must not wait for torch.
NAMES = {
    "Corpus": "corpus.corpus",
    "FrozenSubspace": "bottlenecks",
    "GELUSTE": "layers.surrogates",
    "HardTopK": "bottlenecks",
    "LayerNormProjectedSurrogate": "layers.norms",
    "LayerNormSTE": "layers.norms",
    "LearningRule": "rules",
    "LocalGPT": "model.gpt",
    "LocalGPTConfig": "config",
    "LocalLinear": "layers.linear",
    "Localized": "convert.localize",
    "RULES": "rules",
    "RuleOptions": "rules",
    "RunRecord": "records",
    "RunSpec": "records.specs",
    "SigmoidSTE": "layers.surrogates",
    "SoftmaxValueMixLocalFn": "layers.surrogates",
    "TrainConfig": "config",
    "TrainResult": "training.loop",
    "VQResidualDir": "bottlenecks",
    "alignment": "measure.alignment",
    "describe": "measure.transport",
    "load_corpus": "corpus.corpus",
    "load_records": "records",
    "localize": "convert.localize",
    "train": "training.loop",
    "weight_transport": "measure.transport",
}

find_moved_modules()
__getattr__ = lazy_names(__name__, NAMES)

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
