"""Bundles: the records of a folder as one file, a line each, to carry from one machine to another."""

import codecs
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from localgpt_core.common.files import atomic_write, read_regular
from localgpt_core.common.validation import Refusal, require
from localgpt_core.records.folder import keep, load_records, warn
from localgpt_core.records.record import RunRecord

__all__ = ["export_bundle", "import_bundle"]

LARGEST_BUNDLE = 2**32  # bytes


def export_bundle(records: Iterable[RunRecord], path: str | os.PathLike[str]) -> None:
    """Write records to one jsonl file, atomically."""
    atomic_write(path, "".join(record.to_json() + "\n" for record in records))


def import_bundle(
    path: str | os.PathLike[str], root: str | os.PathLike[str], on_problem: Callable[[str], None] = warn
) -> list[Path]:
    """Write each record of a bundle to ``root/<suite>/<digest>.json`` and return the paths.

    A damaged line is named to ``on_problem``, and the rest goes on. A record that is already there is kept
    unless its run broke down, or only the new one has diagnostics: there is one record for a digest, whatever
    it was made on, and how many are left out for one of another kind of device is said.

    Raises:
        ValueError: If the file cannot be read.
    """
    found = list(bundled(path))
    problems = [problem for problem in found if isinstance(problem, Refusal)]
    none = f"has no line that is a record; {problems[0]}" if problems else ""
    require(len(problems) < len(found), "bundle", str(path), none)
    present = load_records(root, on_problem)
    written, elsewhere = [], 0
    for record in found:
        if isinstance(record, Refusal):
            on_problem(str(record))
        elif keep(present, record):
            written.append(record.write(Path(root) / record.suite))
        else:
            elsewhere += present[record.digest].device_type != record.device_type
    if elsewhere:
        on_problem(f"{elsewhere} records left out: the run is recorded here, made on another kind of device")
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
