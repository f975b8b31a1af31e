"""The three presets, and configurations from values by name."""

import math
from dataclasses import fields
from typing import Any

from localgpt_core.common.validation import require, require_choice
from localgpt_core.config.model import LocalGPTConfig
from localgpt_core.config.run import TrainConfig

__all__ = ["DEVICES", "PRESETS", "build", "preset"]

# tiny: tests and live cells; cpu and gpu: nanoGPT's published character configurations.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0.0},
        {"batch_size": 8, "steps": 300, "warmup": 30, "eval_interval": 100},
    ),
    "cpu": (
        {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0},
        {"batch_size": 12, "steps": 2000, "eval_interval": 500},
    ),
    "gpu": (
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2},
        {"batch_size": 64, "steps": 5000, "eval_interval": 250, "precision": "bfloat16", "compile": True},
    ),
}

# The kind of device that the runs of a preset are made for: what its tables and figures show.
DEVICES = {"tiny": "cpu", "cpu": "cpu", "gpu": "cuda"}


def preset(
    name: str, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> tuple[LocalGPTConfig, TrainConfig]:
    """Return the configurations of preset ``name`` with the fields in ``model`` and ``train`` replaced.

    Raises:
        ValueError: For an unknown preset or field, or a value that the configurations refuse.
    """
    require_choice("preset", name, PRESETS)
    model_preset, train_preset = PRESETS[name]
    return (
        build(LocalGPTConfig, {**model_preset, **(model or {})}),
        build(TrainConfig, {**train_preset, **(train or {})}),
    )


def build(cls: type, values: dict[str, Any]) -> Any:
    """Return ``cls(**values)``, an unknown key raising ValueError with the known ones.

    Raises:
        ValueError: For an unknown key or a refused value.
    """
    defaults = {item.name: item.default for item in fields(cls)}
    for key in values:
        require(key in defaults, "field", key, "allowed are " + ", ".join(sorted(defaults)))
    return cls(**{key: _as_default(value, defaults[key]) for key, value in values.items()})


def _as_default(value: Any, default: Any) -> Any:
    """Return an integer as a float where the field is one: TOML and JSON write 1 for 1.0."""
    try:
        return float(value) if type(value) is int and isinstance(default, float) else value
    except OverflowError:
        return math.inf if value > 0 else -math.inf
