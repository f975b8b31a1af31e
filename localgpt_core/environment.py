"""On what, and with what, something was measured."""

import platform
from pathlib import Path

import numpy as np
import torch

__all__ = ["environment"]


def environment(device: str) -> dict[str, object]:
    """Return device, threads and versions of the software, as they are noted with every measurement."""
    chosen = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _cpu_name(),
        "device_type": chosen.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "system": platform.system(),
    }


def _cpu_name() -> str:
    """Return the CPU's model name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
