"""What is printed reaches whoever reads it, and is no reason to fail for whoever does not.

A letter that the terminal's encoding lacks is shown as a question mark. A stream that is not there, as under
``pythonw`` or after ``>&-``, takes everything. What is only said (progress, news) may also meet a reader that
has gone away; what was asked for (a table, a text) may not: `print` then raises, and the command fails.
"""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from localgpt_core.common.validation import printable

__all__ = ["interrupt_at_the_end_of_stdin", "say", "starting", "steady_streams", "tell"]


class Steady:
    """A text stream that passes on what it can and never raises."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        """Return what else a stream has from the stream itself."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, or nothing where nobody can read it."""
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if that works."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(OSError, ValueError):
            return self.stream.isatty()
        return False


def say(text: str) -> None:
    """Print what is news but not the result, to stderr, on one line; nothing fails."""
    if sys.stderr is not None:  # print would take None for stdout
        print(printable(text), file=Steady(sys.stderr), flush=True)


def tell(text: str) -> None:
    """Print what has come of a command whose result is in its files, to stdout; nothing fails."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        abandon_stdout()


@contextmanager
def starting() -> Iterator[None]:
    """Let Ctrl-C end the process at once, with status 130, inside the ``with`` block, which imports.

    A module of C code may make another error of a KeyboardInterrupt, or print it and go on.
    """
    usual = signal.getsignal(signal.SIGINT)
    takes_signals = threading.current_thread() is threading.main_thread()
    if not takes_signals or usual is not signal.default_int_handler:  # who ignores Ctrl-C goes on doing so
        yield
        return
    signal.signal(signal.SIGINT, lambda *signum_and_frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def interrupt_at_the_end_of_stdin() -> None:
    """Let the end of stdin be a Ctrl-C: whoever holds the other end of the pipe is gone, or lets go of it."""

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def abandon_stdout() -> None:
    """Let nothing more be written to a stdout that has failed, Python's own last flush included."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if sys.stdout is sys.__stdout__:
            os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    sys.stdout = io.StringIO()


def _forgiving(stream: TextIO | None) -> TextIO:
    """Return ``stream`` with question marks for the letters it lacks, or one that nobody reads for none."""
    if stream is None or getattr(stream, "closed", False):
        return io.StringIO()
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


@contextmanager
def steady_streams() -> Iterator[None]:
    """Print as this module says inside the ``with`` block; a warning is one line there."""
    before = sys.stdout, sys.stderr, warnings.formatwarning
    modes = [(stream, stream.errors) for stream in before[:2] if hasattr(stream, "reconfigure")]
    sys.stdout, sys.stderr = _forgiving(sys.stdout), Steady(_forgiving(sys.stderr))
    warnings.formatwarning = lambda message, *others, **more: f"warning: {message}\n"
    try:
        yield
    finally:
        sys.stdout, sys.stderr, warnings.formatwarning = before
        for stream, errors in modes:
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)
