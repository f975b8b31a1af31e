"""On what, and with what, something is measured, and when that is done."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from localgpt_core.common.validation import require

if TYPE_CHECKING:
    import torch

__all__ = ["COMMIT_VARIABLE", "code_version", "environment", "wait_for"]

COMMIT_VARIABLE = "LOCALGPT_COMMIT"
TRACEBACK_VARIABLE = "LOCALGPT_TRACEBACK"


def environment(device: str) -> dict[str, object]:
    """Return device, threads and versions of the software, as they are noted with every measurement.

    ``cpu_capability`` is the vector unit that torch's kernels use on the processor, such as ``"AVX2"`` or
    ``"AVX512"``: sums are rounded in another order with another one, and a virtual machine's name of its
    processor does not tell.
    """
    import numpy as np
    import torch

    chosen = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _cpu_name(),
        "device_type": chosen.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "system": platform.system(),
    }


def wait_for(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given: a GPU is still at work when a call has returned."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    """Return the CPU's model name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def code_version(file: Path) -> dict[str, object]:
    """Return the commit of the repository that tracks ``file`` and whether its folder was changed since.

    Where none does, the environment variable ``LOCALGPT_COMMIT`` may name the commit; whether something was
    changed is None then.

    Raises:
        ValueError: If that variable is needed and has anything but 40 hexadecimal digits.
    """
    # A GIT_DIR, of a hook for instance, is about another repository.
    without_git = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*words: str) -> str | None:
        command = ["git", "-C", str(file.parent), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=True, env=without_git
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # A repository around an installed package does not track it and says nothing about it.
    if ask("ls-files", "--error-unmatch", "--", file.name) is None:
        named = os.environ.get(COMMIT_VARIABLE)
        valid = named is None or re.fullmatch("[0-9a-fA-F]{40}", named) is not None
        require(valid, COMMIT_VARIABLE, named, "must be the 40 hexadecimal digits of a commit")
        return {"git_commit": named, "git_dirty": None}
    changed = ask("status", "--porcelain", "--", ".")
    return {"git_commit": ask("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}
