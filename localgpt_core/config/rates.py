"""The learning rate that suits a rule: the best one of a recorded search, for who names none."""

from dataclasses import asdict
from typing import Any, NamedTuple

from localgpt_core.config.model import LocalGPTConfig
from localgpt_core.config.run import TrainConfig

__all__ = ["SEARCHED", "Rate", "recorded_rate"]

# Preset -> the suite of the search, and the best rate of the runs with these fields; of all that a run has,
# the last ones count.
SEARCHED: dict[str, tuple[str, list[tuple[dict[str, Any], float]]]] = {
    "cpu": (
        "learning-rates",
        [
            ({"method": "bp"}, 3e-3),
            ({"method": "bp", "attn_mode": "softmax"}, 3e-3),
            ({"method": "fa"}, 3e-4),
            ({"method": "fa", "fa_grape": True}, 3e-3),
            ({"method": "sign_sym"}, 3e-3),
            ({"method": "kp"}, 3e-3),
            ({"method": "wm"}, 3e-3),
            ({"method": "dfa"}, 3e-3),
            ({"method": "dfa", "fa_grape": True}, 3e-3),
            ({"method": "dfa", "dfa_granularity": "block", "dfa_norm": True}, 3e-3),
            ({"method": "dfa", "dfa_granularity": "block", "dfa_norm": True, "fa_grape": True}, 3e-3),
            ({"freeze_body": True}, 1e-3),
        ],
    )
}


class Rate(NamedTuple):
    """A learning rate, and where it comes from, in words."""

    lr: float
    source: str


def recorded_rate(preset_name: str, model: LocalGPTConfig, train: TrainConfig) -> Rate:
    """Return the best recorded rate of a model's rule at a preset, and that of ``train`` if there is none."""
    suite, searched = SEARCHED.get(preset_name, ("", []))
    own = asdict(model) | asdict(train)
    found = [(fields, lr) for fields, lr in searched if all(own[name] == v for name, v in fields.items())]
    if not found:
        return Rate(train.lr, f"preset {preset_name}'s own: no search is recorded for this rule")
    fields, lr = found[-1]
    words = ", ".join(f"{name}={value}" for name, value in fields.items())
    return Rate(lr, f"the best one recorded for {words} at preset {preset_name}, suite {suite}")
