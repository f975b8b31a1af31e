"""What came out of a run (`RunRecord`), and how records are kept: a small JSON file each, named by digest."""

import codecs
import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from localgpt_core.common.files import atomic_write, parse_json, read_regular
from localgpt_core.common.validation import Refusal, require
from localgpt_core.experiments.consistency import STATUSES, check_consistency, check_fields, checksum
from localgpt_core.experiments.specs import RunSpec

__all__ = [
    "RunRecord",
    "export_bundle",
    "import_bundle",
    "load_records",
    "matching",
    "read_record",
]

SCHEMA = 1
LARGEST_RECORD, LARGEST_BUNDLE = 2**26, 2**32  # bytes
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
        final_val_loss: Nats per character on the whole validation split after the last step; None unless
            finished.
        best_val_loss: The lowest one measured, None if there is none.
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
        spec = RunSpec.from_dict(self.spec)
        require(spec.digest == self.digest, "digest", self.digest, f"its spec has {spec.digest}")
        require(spec.seed == self.seed, "seed", self.seed, f"its spec has {spec.seed}")
        check_fields(self)

    @property
    def run_spec(self) -> RunSpec:
        """The spec as an object."""
        return RunSpec.from_dict(self.spec)

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
                of its numbers contradict each other, see `localgpt_core.experiments.consistency`.
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
    path = Path(path)
    try:
        record = RunRecord.from_json(read_regular(path, LARGEST_RECORD).decode("utf-8-sig"))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Refusal(f"record {path} is refused: {error}") from None
    require(path.stem == record.digest, "record", str(path), f"must be named {record.digest}.json")
    return record


def _warn(problem: str) -> None:
    warnings.warn(problem, stacklevel=3)


def load_records(
    root: str | os.PathLike[str], on_problem: Callable[[str], None] = _warn
) -> dict[str, RunRecord]:
    """Return every record below ``root`` by digest.

    A file that is damaged or foreign is named to ``on_problem`` (default: a warning), and the rest goes on.
    What is hidden, a name with a dot in front, is no record: editors and systems keep their own things there.
    Where two files have one digest, a run that broke down gives way to one that did not, and a run without
    diagnostics to one with them.
    """
    records: dict[str, RunRecord] = {}
    for path in sorted(_json_files(Path(root), on_problem)):
        try:
            record = read_record(path)
        except ValueError as error:
            on_problem(str(error))
        else:
            _keep(records, record)
    return records


def _json_files(root: Path, on_problem: Callable[[str], None]) -> Iterator[Path]:
    """Yield every JSON file below ``root`` but what is hidden."""

    def unreadable(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # else it is not there
            on_problem(f"folder {error.filename} cannot be read: {error.strerror}")

    for folder, below, files in os.walk(root, onerror=unreadable):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if name.endswith(".json") and not name.startswith("."):
                yield Path(folder, name)


def _keep(records: dict[str, RunRecord], record: RunRecord) -> bool:
    """Add ``record`` unless that would replace one that says as much; return whether it was added."""
    known = records.get(record.digest)
    says_more = known is not None and bool(record.diagnostics) and not known.diagnostics
    keep = known is None or known.status == "failed" or says_more
    if keep:
        records[record.digest] = record
    return keep


def matching(beginning: str, records: Collection[str]) -> str:
    """Return the digest of ``records`` that begins so.

    Raises:
        ValueError: Unless there is exactly one.
    """
    found = [digest for digest in records if digest.startswith(beginning)]
    require(len(found) == 1, "digest", beginning, f"{len(found)} of {len(records)} records match")
    return found[0]


def export_bundle(records: Iterable[RunRecord], path: str | os.PathLike[str]) -> None:
    """Write records to one jsonl file, atomically."""
    atomic_write(path, "".join(record.to_json() + "\n" for record in records))


def import_bundle(
    path: str | os.PathLike[str], root: str | os.PathLike[str], on_problem: Callable[[str], None] = _warn
) -> list[Path]:
    """Write each record of a bundle to ``root/<suite>/<digest>.json`` and return the paths.

    A damaged line is named to ``on_problem``, and the rest goes on. A record that is already there is kept
    unless its run broke down.

    Raises:
        ValueError: If the file cannot be read.
    """
    found = list(bundled(path))
    problems = [problem for problem in found if isinstance(problem, Refusal)]
    none = f"has no line that is a record; {problems[0]}" if problems else ""
    require(len(problems) < len(found), "bundle", str(path), none)
    present = load_records(root, on_problem)
    written = []
    for record in found:
        if isinstance(record, Refusal):
            on_problem(str(record))
        elif _keep(present, record):
            written.append(record.write(Path(root) / record.suite))
    return written


def bundled(path: str | os.PathLike[str]) -> Iterator[RunRecord | Refusal]:
    """Yield for each line of a bundle its record, or why there is none.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        data = read_regular(path, LARGEST_BUNDLE).removeprefix(codecs.BOM_UTF8).removesuffix(b"\n")
    except OSError as error:
        raise Refusal(f"bundle {path} cannot be read: {error}") from None
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            yield RunRecord.from_json(line.decode())
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            yield Refusal(f"bundle {path}, line {number} is refused: {error}")
