"""Files that are whole or not there: every record, checkpoint and cached corpus is written this way."""

import os
import uuid
from pathlib import Path

__all__ = ["atomic_write"]


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part of either.

    The bytes (a string is encoded as UTF-8, newlines untouched) go to a temporary file in the same folder,
    are flushed to the disk, and the file is renamed over ``path``; a rename within one folder is atomic
    (POSIX ``rename``, Windows ``MoveFileEx``). Several processes may write the same path: the last one
    wins. Missing folders are created. When anything fails, the temporary file is removed and the old file
    stays.

    Raises:
        OSError: the folder or the file cannot be written.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp: its files are private (mode 600), and a record is meant to be read by others.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
