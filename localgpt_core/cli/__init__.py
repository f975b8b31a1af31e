"""The command line.

One file for the command that trains, one each for those on suites and on records, one for the rest, their
shared options, what is printed, and how a figure of the book is found. A command reads its options, calls the
rooms below and prints what they return; it imports them when it runs, so that help is there at once. An error
is one line; the exit status says whether it is the user's (2) or not (1).
"""

import signal
import sys
from contextlib import suppress

from localgpt_core.common.lazy import lazy_names

__getattr__ = lazy_names(__name__, {"app": "commands"})

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit with the status that its help explains; an error is one line."""
    try:
        from localgpt_core.cli import commands
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        commands.main()
    finally:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written; Python's own end is not to be cut
