"""Files that are whole or not there: every record, checkpoint and cached corpus is written this way."""

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

from localgpt_core.common.validation import Refusal, require

__all__ = ["atomic_write", "require_writable"]

# What no other path would change: the disk is full, over its quota, read-only after an error, or broken.
FAULTS_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


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
    return folder / f".{uuid.uuid4().hex}.tmp"


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
