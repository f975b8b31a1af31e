"""A run is made by one process at a time: a lock that dies with whoever holds it.

The lock of a run is a file without content in the hidden folder of what is unfinished. The system lets go of
it when its process ends, however that ends; a file that is left behind locks nothing.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["UNFINISHED", "claim", "is_held", "lock_of"]

UNFINISHED = ".unfinished"  # hidden: no record, see `localgpt_core.records.load_records`


def lock_of(digest: str, folder: Path) -> Path:
    """Return the file by which a process holds others off the run ``digest`` in ``folder``."""
    return folder / UNFINISHED / f"{digest}.lock"


@contextmanager
def claim(digest: str, out: Path, records: Path) -> Iterator[bool]:
    """Yield whether this process may make the run ``digest``, and no other, until the ``with`` block ends.

    Others are those that would write its record to ``out`` too, or look for it in ``records``, if there is
    such a folder that can be written to.
    """
    with ExitStack() as held:
        yield _lock(lock_of(digest, out), held) and (
            not records.is_dir() or records.samefile(out) or _lock(lock_of(digest, records), held)
        )


def is_held(digest: str, *folders: Path) -> bool:
    """Return whether a process is making the run ``digest`` in one of ``folders``.

    What a killed process has left is no lock, and is removed.
    """
    for path in (lock_of(digest, folder) for folder in folders):
        with ExitStack() as held:
            if path.exists() and not _lock(path, held):
                return True
    return False


def _lock(path: Path, held: ExitStack) -> bool:
    """Lock ``path`` until ``held`` is left, without waiting; return whether that worked."""
    lock = FileLock(path, blocking=False)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            return False
        except FileNotFoundError:  # whoever held another lock has just removed the folder
            continue
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return True
            raise
        held.callback(_release, lock)
        return True


def _release(lock: FileLock) -> None:
    """Remove the file while it is locked (who opens it now sees that it has no name any more), and let go."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()
    with suppress(OSError):
        os.rmdir(Path(lock.lock_file).parent)
