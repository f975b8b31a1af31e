"""An index of a large folder of records: what lists and tables ask of each record, without opening its file.

To hold a record to itself takes half a millisecond, and to keep it whole forty kilobytes: of 40,000 records
that is half a minute and more than a gigabyte. The index keeps of each file its size, times and inode and the
SHA-256 of its bytes, and of its record the small fields and what is derived from the large ones. A file with
another size, time or inode is read again; one that is refused is not in the index.

The index is one file of the cache folder for each folder of records, and no more than a cache. One that is
missing or damaged, is of another folder, or was written by other code, which may judge records otherwise,
counts as empty. One that cannot be written is not. Of two processes that write it, the last one wins.

Rejected: a database. Its locks and journals can fail where one file, written as every file here is, cannot,
and to read and write that one in full takes less time than to look at 40,000 files.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from localgpt_core.common.files import atomic_write, read_regular
from localgpt_core.common.validation import require
from localgpt_core.corpus.corpus import cache_folder
from localgpt_core.records.record import RunRecord, read_hashed

__all__ = ["Index"]

LARGE = ("spec", "parameters", "curves", "sample", "provenance", "diagnostics")
# Few values for many records, each kept once, in the file and in memory.
SHARED = ("suite", "arm", "preset", "status", "environment", "settings", "corpus", "corpus_sha256")
DERIVED = ("tokens", "final_val_accuracy", "has_diagnostics")
OWN = (*(item.name for item in fields(RunRecord) if item.name not in LARGE + SHARED), *DERIVED)
LARGEST_INDEX = 2**31  # bytes
# A file that was changed twice within the tick of a file system's clock may look the same, with two contents.
# The coarsest tick is that of FAT.
TICK = 2_000_000_000  # nanoseconds

Row = list[Any]  # state of the file, SHA-256 of its bytes, numbers of the shared values, own values


class Index:
    """The index of the records below ``root``.

    `record` returns one of them, `save` writes down what was returned for the next time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = os.path.realpath(root)
        self.known: dict[str, Row] = {}
        self.shared: list[Any] = []
        with suppress(OSError, RuntimeError, ValueError):
            head, _, body = read_regular(self.path, LARGEST_INDEX).partition(b"\n")
            if head == self._head(body):
                self.shared, self.known = json.loads(body)
        self.rows: dict[str, Row] = {}
        self.numbers = {json.dumps(value): number for number, value in enumerate(self.shared)}

    @property
    def path(self) -> Path:
        """The file of the index."""
        name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()
        return cache_folder() / "records" / f"{name}.index"

    def _head(self, body: bytes) -> bytes:
        head = {"folder": self.folder, "code": _code(), "sha256": hashlib.sha256(body).hexdigest()}
        return json.dumps(head).encode()

    def record(self, name: str) -> RunRecord:
        """Return the record in the file ``name`` below the folder, without its large fields.

        Raises:
            ValueError: If it is damaged or foreign, naming the file.
        """
        path, now = os.path.join(self.folder, name), time.time_ns()
        state = _state(path)
        row = self.known.get(name)
        if row is None or row[0] != state:
            row = self._read(self.root / name, state)
        if state and max(state[1:3]) + TICK < now:
            self.rows[name] = row
        return self._light(path, row)

    def _read(self, path: Path, state: list[int]) -> Row:
        record, sha256 = read_hashed(path)
        shared = [self._number(getattr(record, name)) for name in SHARED]
        return [state, sha256, shared, [getattr(record, name) for name in OWN]]

    def _number(self, value: Any) -> int:
        number = self.numbers.setdefault(json.dumps(value), len(self.shared))
        if number == len(self.shared):
            self.shared.append(value)
        return number

    def _light(self, path: str, row: Row) -> RunRecord:
        _, sha256, shared, own = row
        record = object.__new__(LightRecord)
        values = vars(record)
        values.update(zip(OWN, own, strict=True))
        values.update(zip(SHARED, [self.shared[number] for number in shared], strict=True))
        values.update(_path=path, _sha256=sha256)
        return record

    def save(self) -> None:
        """Write the rows of the records that were asked for, if they are others than those that were read."""
        if self.rows == self.known:
            return
        body = json.dumps([self.shared, self.rows]).encode()
        with suppress(OSError, RuntimeError):
            atomic_write(self.path, self._head(body) + b"\n" + body)


class LightRecord(RunRecord):
    """A record without its large fields, until one of them is asked for.

    Then its file is read and held to itself, and the object is a plain `RunRecord` from there on. A file that
    is no longer what it was raises ``ValueError``.
    """

    def __new__(cls, *args: Any, **values: Any) -> RunRecord:
        return RunRecord(*args, **values)  # for dataclasses.replace

    def __getattr__(self, name: str) -> Any:
        if name not in LARGE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(_whole(self), name)

    def __eq__(self, other: object) -> bool:
        return _whole(self) == other

    __hash__ = RunRecord.__hash__

    def __repr__(self) -> str:
        return repr(_whole(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _whole(self).__reduce_ex__(protocol)


def _whole(record: RunRecord) -> RunRecord:
    """Read what is missing of a light record and return it, a plain one now."""
    path, sha256 = vars(record)["_path"], vars(record)["_sha256"]
    found, now = read_hashed(path)
    require(now == sha256, "record", path, "was changed after its folder was read; read the folder again")
    vars(record).update(vars(found))
    object.__setattr__(record, "__class__", RunRecord)
    return record


def _state(path: str) -> list[int]:
    """Return what tells whether a file is still the same; nothing, if it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


@cache
def _code() -> str:
    """Return the SHA-256 of the package's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
