"""Node, which runs the lab's engine in tests, and numbers on their way there and back."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAB = ROOT / "book/_static/lab"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which is not installed")


def packed(tensor: Tensor) -> dict[str, str]:
    """Return a tensor's numbers as text: little-endian float32 or int32."""
    whole = not tensor.is_floating_point()
    numbers = tensor.detach().cpu().numpy().astype(np.int32 if whole else np.float32)
    return {"kind": "ints" if whole else "floats", "base64": base64.b64encode(numbers.tobytes()).decode()}


def unpacked(entry: dict[str, str]) -> Tensor:
    """Return what `packed` or the engine's side has packed, flat."""
    kind = np.int32 if entry["kind"] == "ints" else np.float32
    return torch.from_numpy(np.frombuffer(base64.b64decode(entry["base64"]), dtype=kind).copy())


def play(script: str, given: dict, folder: Path) -> dict:
    """Run ``script`` of this folder on ``given``, tensors packed, and return the JSON that it prints."""
    file = folder / "given.json"
    file.write_text(json.dumps(given, default=packed))
    command = ["node", str(HERE / script), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
