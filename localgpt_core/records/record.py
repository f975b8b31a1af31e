"""What came out of a run, `RunRecord`: a small JSON file, named by its digest."""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from localgpt_core.common.files import atomic_write, parse_json, read_regular
from localgpt_core.common.validation import Refusal, require
from localgpt_core.records.consistency import STATUSES, check_consistency, check_fields, checksum
from localgpt_core.records.specs import RunSpec

__all__ = ["RunRecord", "read_hashed", "read_record"]

SCHEMA = 1
LARGEST_RECORD = 2**26  # bytes
# Fields that a record of this schema may lack.
ADDED_LATER = {"anchor_steps", "diagnostics"}


@dataclass(frozen=True)
class RunRecord:
    """One finished, diverged or failed run, as it is kept.

    Attributes:
        digest: Digest of ``spec``, and the name of the file.
        suite: Suite the run was made for.
        arm: Arm of that suite.
        preset: Preset that the spec was made from.
        spec: The `RunSpec` in full.
        seed: Seed of the run.
        status: ``"finished"``, ``"diverged"`` (a loss was not finite) or ``"failed"`` (``error`` says why).
        final_val_loss: Nats per character on the validation split after the last step, or on ``eval_iters``
            batches of it; None unless finished.
        best_val_loss: The lowest one that was measured as the last one is, see
            `localgpt_core.training.loop.TrainResult`; None if there is none.
        wall_time_s: Seconds, evaluation included.
        tokens_per_s: Training tokens per second, evaluation apart.
        peak_memory_mib: Peak memory of the run in MiB; see `localgpt_core.measure.cost`.
        flops_per_token: Matmul FLOPs of all training, divided by its tokens.
        parameters: ``total`` and ``trained`` parameter counts; empty for a failed run.
        curves: See `localgpt_core.training.loop.TrainResult`.
        sample: Text that the trained model wrote.
        environment: Device, threads, versions of the software.
        provenance: Command, git commit, start and end (UTC).
        error: What went wrong, for a failed run, or why a finished one has no sample.
        anchor_steps: How many of the steps were backpropagation.
        diagnostics: What the rule did over training, see `localgpt_core.measure`; empty if not measured.
        schema: Version of this layout.
    """

    digest: str
    suite: str
    arm: str
    preset: str
    spec: dict[str, Any]
    seed: int
    status: str
    final_val_loss: float | None
    best_val_loss: float | None
    wall_time_s: float
    tokens_per_s: float | None
    peak_memory_mib: float
    flops_per_token: float | None
    parameters: dict[str, int]
    curves: dict[str, list[float | None]]
    sample: str
    environment: dict[str, Any]
    provenance: dict[str, Any]
    error: str = ""
    anchor_steps: int = 0
    diagnostics: dict[str, Any] = field(default_factory=dict)
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        require(self.schema == SCHEMA, "schema", self.schema, f"this version reads {SCHEMA}")
        spec = self.run_spec
        digest = spec.digest
        require(digest == self.digest, "digest", self.digest, f"its spec has {digest}")
        require(spec.seed == self.seed, "seed", self.seed, f"its spec has {spec.seed}")
        check_fields(self)

    @cached_property
    def run_spec(self) -> RunSpec:
        """The spec as an object."""
        return RunSpec.from_dict(self.spec)

    @cached_property
    def corpus(self) -> str:
        """Name of the corpus."""
        return self.run_spec.corpus

    @cached_property
    def corpus_sha256(self) -> str:
        """SHA-256 of the text of the corpus."""
        return self.run_spec.corpus_sha256

    @cached_property
    def device_type(self) -> str:
        """The kind of device of the run, ``"cpu"`` or ``"cuda"``: the CPU if the record does not say."""
        return str(self.environment.get("device_type", "cpu"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that can change the result of the run but its seed, by name."""
        settings = {**asdict(self.run_spec.model), **asdict(self.run_spec.train)}
        del settings["seed"]
        corpus = f"{self.corpus} {self.corpus_sha256[:8]}"
        return settings | {"corpus": corpus, "device": self.device_type}

    @cached_property
    def tokens(self) -> int | None:
        """Training tokens up to the last point of the curve; None if it has none."""
        return self.curves["tokens"][-1] if self.curves.get("tokens") else None

    @cached_property
    def final_val_accuracy(self) -> float | None:
        """Share of the answers that is right after the last step; None unless finished, on answers."""
        accuracies = self.curves.get("val_accuracy")
        return accuracies[-1] if accuracies and self.status == "finished" else None

    @cached_property
    def has_diagnostics(self) -> bool:
        """Whether diagnostics were measured."""
        return bool(self.diagnostics)

    def to_json(self) -> str:
        """Return the record as JSON: floats with 6 significant digits, null for what is not finite.

        The spec keeps every digit: the digest depends on it. ``sha256`` is a checksum of all the rest.
        """
        values = _rounded(asdict(self)) | {"spec": self.spec}
        return json.dumps(values | {"sha256": checksum(values)}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Return the record of a JSON text.

        Raises:
            ValueError: If the text is damaged, has other fields, its digest is not that of its spec, or two
                of its numbers contradict each other, see `localgpt_core.records.consistency`.
        """
        values = parse_json(text)
        require(isinstance(values, dict), "record", type(values).__name__, "must be a JSON object")
        is_of_old = "sha256" not in values
        kept = values.pop("sha256", None)
        expected = {item.name for item in fields(cls)}
        odd = sorted(expected.symmetric_difference({*values} | ADDED_LATER))
        require(not odd, "fields", odd, "missing or unknown in a record")
        record = cls(**values)
        check_consistency(record)
        whole = is_of_old or kept == checksum(values)
        require(whole, "sha256", kept, "is not that of its content")
        return record

    def as_kept(self) -> "RunRecord":
        """Return the record with the digits that its file keeps; nothing is compared."""
        values = json.loads(self.to_json())
        del values["sha256"]
        return type(self)(**values)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the record to ``folder/<digest>.json``, atomically, and return the path.

        One that is there and says more stays: a finished run over one that diverged, and either over one that
        broke down.
        """
        path = Path(folder) / f"{self.digest}.json"
        with suppress(Refusal):
            if STATUSES.index(read_record(path).status) > STATUSES.index(self.status):
                return path
        atomic_write(path, self.to_json() + "\n")
        return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """Return the record in a file.

    Raises:
        ValueError: If it is damaged or foreign, naming the file.
    """
    return read_hashed(path)[0]


def read_hashed(path: str | os.PathLike[str]) -> tuple[RunRecord, str]:
    """Return the record in a file and the SHA-256 of the file's bytes; raises as `read_record`."""
    path = Path(path)
    try:
        data = read_regular(path, LARGEST_RECORD)
        record = RunRecord.from_json(data.decode("utf-8-sig"))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Refusal(f"record {path} is refused: {error}") from None
    require(path.stem == record.digest, "record", str(path), f"must be named {record.digest}.json")
    return record, hashlib.sha256(data).hexdigest()
