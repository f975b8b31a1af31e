"""A folder of records, read by digest."""

import errno
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from localgpt_core.common.validation import require
from localgpt_core.records.index import Index
from localgpt_core.records.record import RunRecord, read_record

__all__ = ["keep", "load_records", "matching", "warn"]

MANY = 1000  # files from which on a folder has an index


def warn(problem: str) -> None:
    """Warn of a file that is refused, at the line that asked for the folder."""
    warnings.warn(problem, stacklevel=3)


def load_records(
    root: str | os.PathLike[str],
    on_problem: Callable[[str], None] = warn,
    digests: Collection[str] | None = None,
) -> dict[str, RunRecord]:
    """Return every record below ``root`` by digest, or those of ``digests`` alone.

    A file that is damaged or foreign is named to ``on_problem`` (default: a warning), and the rest goes on.
    What is hidden, a name with a dot in front, is no record: editors and systems keep their own things there.
    Where two files have one digest, a run that broke down gives way to one that did not, and a run without
    diagnostics to one with them.

    A folder of a thousand files and more has an index, see `localgpt_core.records.index`: its records read
    their file again when one of their large fields is first asked for.
    """
    root = Path(root)
    names = sorted(_json_files(root, on_problem), key=lambda name: name.split(os.sep))
    if digests is not None:
        names = [name for name in names if Path(name).stem in digests]
    index = Index(root) if digests is None and len(names) >= MANY else None
    records: dict[str, RunRecord] = {}
    for name in names:
        try:
            record = index.record(name) if index else read_record(root / name)
        except ValueError as error:
            on_problem(str(error))
        else:
            keep(records, record)
    if index:
        index.save()
    return records


def _json_files(root: Path, on_problem: Callable[[str], None]) -> Iterator[str]:
    """Yield the name below ``root`` of every JSON file but what is hidden."""

    def unreadable(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # else it is not there
            on_problem(f"folder {error.filename} cannot be read: {error.strerror}")

    start = len(os.path.join(root, ""))
    for folder, below, files in os.walk(root, onerror=unreadable):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if name.endswith(".json") and not name.startswith("."):
                yield os.path.join(folder, name)[start:]


def keep(records: dict[str, RunRecord], record: RunRecord) -> bool:
    """Add ``record`` unless that would replace one that says as much; return whether it was added."""
    known = records.get(record.digest)
    says_more = known is not None and record.has_diagnostics and not known.has_diagnostics
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
