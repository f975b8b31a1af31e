"""What is asked of a run: `RunSpec`, and the digest that names it.

The digest is the SHA-256 of the spec's canonical JSON without the fields that have their default: a field
that is added later, with a default that changes nothing, leaves every old digest valid. Device, threads and
software are noted in the record and are not part of the digest.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from localgpt_core.common.validation import require
from localgpt_core.config import LocalGPTConfig, TrainConfig, build, check_run, preset
from localgpt_core.corpus.corpus import Corpus

__all__ = ["RunSpec", "resolve_spec"]


@dataclass(frozen=True)
class RunSpec:
    """Everything that can change the result of a run.

    Attributes:
        model: The model and its rule.
        train: The run, its seed included.
        corpus: Name of the corpus.
        corpus_sha256: SHA-256 of its text.

    Raises:
        ValueError: For what the two configurations together do not allow.
    """

    model: LocalGPTConfig
    train: TrainConfig
    corpus: str
    corpus_sha256: str

    def __post_init__(self) -> None:
        check_run(self.model, self.train)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.train.seed

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON of the spec."""
        content = {
            "model": _without_defaults(self.model),
            "train": _without_defaults(self.train),
            "corpus": [self.corpus, self.corpus_sha256],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def require_corpus(self, corpus: Corpus) -> None:
        """Raise ``ValueError`` unless ``corpus`` has the text of this spec."""
        allowed = f"the spec wants {self.corpus!r} with sha256 {self.corpus_sha256}"
        require(corpus.sha256 == self.corpus_sha256, "corpus", corpus.name, allowed)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec in full, as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunSpec":
        """Return the spec of a dictionary that `to_dict` made.

        Raises:
            ValueError: For a missing or unknown key or a refused value.
        """
        expected = {item.name for item in fields(cls)}
        require(set(values) == expected, "spec", sorted(values), f"must have the keys {sorted(expected)}")
        return cls(
            model=build(LocalGPTConfig, values["model"]),
            train=build(TrainConfig, values["train"]),
            corpus=values["corpus"],
            corpus_sha256=values["corpus_sha256"],
        )


def _without_defaults(config: LocalGPTConfig | TrainConfig) -> dict[str, Any]:
    values = {item.name: (getattr(config, item.name), item.default) for item in fields(config)}
    return {
        # 0 and 0.0 are the same dropout and must be the same text.
        name: float(value) if isinstance(default, float) else value
        for name, (value, default) in values.items()
        if value != default
    }


def resolve_spec(preset_name: str, model: dict[str, Any], train: dict[str, Any], corpus: Corpus) -> RunSpec:
    """Return the spec of a preset with overrides; the vocabulary's size is the corpus's.

    Raises:
        ValueError: For an unknown preset or field, or a refused value.
    """
    model_config, train_config = preset(preset_name, {"vocab_size": corpus.vocab_size, **model}, train)
    return RunSpec(model_config, train_config, corpus.name, corpus.sha256)
