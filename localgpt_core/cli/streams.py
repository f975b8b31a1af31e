"""What is printed reaches whoever reads it, and is no reason to fail for whoever does not.

A letter that the terminal's encoding lacks is shown as a question mark. A stream that is not there, as under
``pythonw`` or after ``>&-``, takes everything. What is only said (progress, news) may also meet a reader that
has gone away; what was asked for (a table, a text) may not: `print` then raises, and the command fails.
A run shows itself by a bar on a terminal, and by a plain line per evaluation elsewhere.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from localgpt_core.common.validation import printable

if TYPE_CHECKING:
    from localgpt_core.training.settings import Report

__all__ = [
    "announced",
    "interrupt_at_the_end_of_stdin",
    "progress",
    "say",
    "starting",
    "steady_streams",
    "tell",
]

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
# What a narrow terminal has no room for is cut off at the right: the title, not the losses.
NARROW, NARROW_BAR = 90, "{n_fmt}/{total_fmt} {desc}"


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


@contextmanager
def progress(steps: int, title: str, done: int = 0) -> Iterator[Report]:
    """Yield the ``report`` of a run of ``steps`` steps, ``done`` of them before it was resumed.

    Both kinds of output go to stderr. The first thing shown is that the run evaluates, or goes on.
    """
    stream = None if sys.stderr is None else Steady(sys.stderr)
    if stream is None or not stream.isatty():
        say(f"{title}: {'goes on from' if done else 'evaluating at'} step {done}/{steps}")
        yield _lines(steps, title)
        return
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, file=stream) as bar:
        shown: dict[str, str] = {}

        def show(measured: dict[str, float]) -> None:
            shown.update({key[:-5]: f"{measured[key]:.3f}" for key in measured if key.endswith("_loss")})
            bar.n = int(measured["step"])
            draw(", ".join(f"{name}={loss}" for name, loss in shown.items()))

        def draw(news: str) -> None:
            narrow = (bar.format_dict["ncols"] or NARROW) < NARROW
            bar.bar_format = NARROW_BAR if narrow else BAR
            bar.set_description_str(f"{news} {title}" if narrow else f"{title}: {news}")

        draw("goes on" if done else "evaluating")
        yield show


@contextmanager
def announced(steps: int, title: str, done: int = 0) -> Iterator[None]:
    """Say that a run starts, and nothing more: one of several side by side."""
    say(f"{title}: {'goes on from' if done else 'starts at'} step {done}/{steps}")
    yield


def _lines(steps: int, title: str) -> Report:
    latest = {"train_loss": float("nan")}

    def show(measured: dict[str, float]) -> None:
        latest.update(measured)
        if "val_loss" in measured:
            train = (
                f"train {latest['train_loss']:.4f}, " if latest["train_loss"] == latest["train_loss"] else ""
            )
            step = int(measured["step"])
            say(f"{title}: step {step}/{steps}, {train}val {measured['val_loss']:.4f}")

    return show
