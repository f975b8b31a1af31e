"""Files that are whole or not there: every record, checkpoint and cached corpus is written this way.

What is read is a regular file of a size that a file of its kind can have: a pipe would be waited for, and a
device has no end.
"""

import errno
import json
import os
import re
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from localgpt_core.common.validation import Refusal, require

__all__ = [
    "LARGEST_TEXT",
    "LONGEST_INTEGER",
    "atomic_write",
    "mark",
    "parse_json",
    "read_regular",
    "require_writable",
    "sweep",
]

# What no other path would change: the disk is full, over its quota, read-only after an error, or broken.
FAULTS_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
HOST = re.sub(r"\W", "-", socket.gethostname())[:40]
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.(\d+)@" + re.escape(HOST) + r"\.tmp")
LONGEST_INTEGER = 20  # digits
LARGEST_TEXT = 2**30  # bytes of a text to learn from


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part of either.

    The bytes (a string is encoded as UTF-8, newlines untouched) go to a temporary file in the same folder,
    are flushed to the disk, and the file is renamed over ``path``; a rename within one folder is atomic
    (POSIX ``rename``, Windows ``MoveFileEx``). Several processes may write the same path: the last one
    wins. Missing folders are created. When anything fails, the temporary file is removed and the old file
    stays.

    Raises:
        OSError: the folder or the file cannot be written, or ``path`` is a folder or a device.

    """
    # A rename would put a file in the place of a link, or of /dev/null.
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent)
    try:
        _write_new(temporary, data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_writable(field: str, path: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` unless `atomic_write` could write ``path`` now; nothing is left behind.

    A file is written beside it, or in the nearest folder above it that is there: modes do not tell, for
    instance to root.

    Raises:
        ValueError: ``field=path`` and what the system says.
        OSError: the disk is full or broken.

    """
    path = Path(path)
    require(os.path.isfile(path) or not os.path.exists(path), field, str(path), "is no regular file")
    folder, missing = path.parent, [path.name]
    while not os.path.lexists(folder):
        missing.append(folder.name)
        folder = folder.parent
    sweep(folder)
    temporary = _temporary(folder)
    try:
        # The system looks at the length of the whole path, and at a name below a folder that is there.
        for place in (path, _temporary(path.parent), *(folder / name for name in missing)):
            with suppress(FileNotFoundError):
                os.lstat(place)
        _write_new(temporary, bytes(4096))
    except OSError as error:
        if error.errno in FAULTS_OF_THE_MACHINE:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise Refusal(f"{field}={str(path)!r}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(folder: Path) -> Path:
    # Not tempfile.mkstemp: its files are private (mode 600), and a record is meant to be read by others.
    return folder / f".{uuid.uuid4().hex}.{os.getpid()}@{HOST}.tmp"


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what processes of this machine that are gone, killed within a write, have left in ``folder``."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            found = TEMPORARY.fullmatch(entry.name)
            if found and not _is_alive(int(found[1])):
                with suppress(OSError):
                    os.unlink(entry)


@contextmanager
def mark(folder: Path) -> Iterator[Path]:
    """Yield an empty file of this process in ``folder``, which is there until the ``with`` block ends.

    Who sees it sees the same folder. `sweep` removes that of a process that was killed.
    """
    path = _temporary(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: If it cannot be read, is a folder, a pipe or a device, or has more than ``most`` bytes.

    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"has {found.st_size} bytes, more than {most}", str(path))
    return Path(path).read_bytes()


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is damaged, or too deep; for an integer of more digits than any of ours has, and for
            half a character (a lone surrogate), which nothing can write.

    """
    try:
        value = json.loads(text, parse_int=_short_integer)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        problem = "half a character" if isinstance(error, UnicodeEncodeError) else error
        raise Refusal(f"is not JSON ({problem})") from None
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
