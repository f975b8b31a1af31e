"""A folder of records, read by digest."""

import errno
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from localgpt_core.common.validation import require
from localgpt_core.records.record import RunRecord, read_record

__all__ = ["keep", "load_records", "matching", "warn"]


def warn(problem: str) -> None:
    """Warn of a file that is refused, at the line that asked for the folder."""
    warnings.warn(problem, stacklevel=3)


def load_records(
    root: str | os.PathLike[str],
    on_problem: Callable[[str], None] = warn,
    digests: Collection[str] | None = None,
) -> dict[str, RunRecord]:
    """Return every record below ``root`` by digest, or those of ``digests``.

    A file that is damaged or foreign is named to ``on_problem`` (default: a warning), and the rest goes on.
    What is hidden, a name with a dot in front, is no record: editors and systems keep their own things there.
    Where two files have one digest, a run that broke down gives way to one that did not, and a run without
    diagnostics to one with them.
    """
    records: dict[str, RunRecord] = {}
    for path in sorted(_json_files(Path(root), on_problem)):
        if digests is not None and path.stem not in digests:
            continue
        try:
            record = read_record(path)
        except ValueError as error:
            on_problem(str(error))
        else:
            keep(records, record)
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


def keep(records: dict[str, RunRecord], record: RunRecord) -> bool:
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
