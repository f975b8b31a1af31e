"""The steps of a suite's arms timed one arm after the other: what is measured is kept at once."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from localgpt_core.bench import measure, read_rows, write_rows
from localgpt_core.common.environment import environment
from localgpt_core.common.validation import Refusal
from localgpt_core.experiments.suites import Suite

__all__ = ["time_arms"]


def time_arms(
    suite: Suite,
    preset: str,
    device: str,
    pairs: int,
    path: Path,
    deadline: float,
    say: Callable[[str], None],
    least_s: float = 0.0,
) -> str:
    """Measure the arms of ``suite`` that have no row in the file ``path``, and write it anew after each.

    An arm is begun only if as much time is left as the longest one so far took, at first ``least_s`` seconds.
    One that cannot be measured is named, and the rest goes on. Rows of another device stay as they are.

    Returns:
        ``"complete"``, ``"failed"`` or ``"out_of_time"``.

    Raises:
        ValueError: If the file is damaged.
        OSError: If it cannot be written.
    """
    rows, measured_on = read_rows(path) if path.exists() else ({}, {})
    here = environment(device)["device"]
    if rows and measured_on.get("device") != here:
        say(
            f"{path} was measured on {measured_on.get('device')}, this is {here}: moved away, it is made anew"
        )
        return "failed"
    outcome, longest_s = "complete", least_s
    for arm in suite.arms:
        if arm.name in rows:
            continue
        start = time.monotonic()
        if start + longest_s >= deadline:
            say(f"{arm.name}: not measured, {max(0.0, deadline - start):.0f} s left are too few")
            return "out_of_time"
        try:
            found = measure(preset, torch.device(device), pairs, say, replace(suite, arms=(arm,)))
        except (Refusal, RuntimeError) as error:
            first_line = str(error).partition("\n")[0]
            say(f"{arm.name}: not measured ({type(error).__name__}: {first_line})")
            outcome = "failed"
            continue
        rows |= {row.name: row for row in found}
        write_rows([*rows.values()], path, preset, device)
        longest_s = max(longest_s, time.monotonic() - start)
    return outcome
