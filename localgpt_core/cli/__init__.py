"""The command line.

One file for the commands that train and measure, one for those on suites and records, their shared options,
and how a run shows itself. A command reads its options, calls the rooms below and prints what they return.
An error is one line; the exit status says whether it is the user's (2) or not (1).
"""

from localgpt_core.cli.commands import app, main

__all__ = ["app", "main"]
