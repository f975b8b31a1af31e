"""Records as tables and figures.

Rows and estimates, what the records say of a suite, the book's figures in one style, and drawings that hold
no results. Every number of a page comes through here. A module is loaded when one of its names is asked for:
pandas and matplotlib take their time.
"""

from importlib import import_module
from typing import Any

NAMES = {
    "alignment_figures": ["accuracy_panels", "layer_maps", "over_training", "short_names"],
    "drawings": ["direct_paths", "feedback_paths", "model_drawing", "recall_drawing"],
    "losses": [
        "attention_maps",
        "attention_weights",
        "final_losses",
        "live_curves",
        "loss_curves",
        "loss_over",
        "singular_values",
        "start_and_end",
    ],
    "mechanism_figures": ["code_map", "norm_fields", "places_over_training", "winner_masks"],
    "runs": ["rates_table", "rates_tried", "run_frame", "run_table"],
    "results": ["SuiteResults", "book_folder", "load_results"],
    "style": ["HEIGHT", "WIDTH", "as_text", "draw_seeds", "legend", "look", "use_style", "visible"],
    "tables": [
        "all_runs",
        "arm_frame",
        "arm_table",
        "as_markdown",
        "estimate",
        "interval",
        "paired_difference",
        "say",
        "show_table",
        "suite_runs",
    ],
}

__all__ = [name for names in NAMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Return a public name of one of the modules."""
    for module, names in NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
