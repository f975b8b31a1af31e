"""Where the modules of earlier versions have gone: an import of ``localgpt_core.OLD`` gives the new one.

The API page of earlier versions names modules, and notebooks and scripts import from them. An old name is
looked up only when it is asked for, so that nothing is loaded for its sake.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "find_moved_modules"]

MOVED = {
    "alignment": "measure.alignment",
    "alignment_figures": "report.alignment_figures",
    "batches": "corpus.batches",
    "blocks": "model.blocks",
    "checkpoints": "training.checkpoints",
    "cli.progress": "cli.streams",
    "cli_options": "cli.options",
    "cli_records": "cli.records",
    "converted_layers": "convert.layers",
    "cost": "measure.cost",
    "diagnostics": "measure.diagnostics",
    "drawings": "report.drawings",
    "environment": "common.environment",
    "exact": "common.modes",
    "experiments.bench": "bench",
    "experiments.consistency": "records.consistency",
    "experiments.records": "records",
    "experiments.specs": "records.specs",
    "feedback": "rules.feedback",
    "feedback_points": "layers.feedback_points",
    "figures": "report.losses",
    "files": "common.files",
    "internals": "measure.inside",
    "jacobian": "matrices.jacobian",
    "kmeans": "matrices.kmeans",
    "layers.bottlenecks": "bottlenecks",
    "layers.kmeans": "matrices.kmeans",
    "linear": "layers.linear",
    "mechanism_figures": "report.mechanism_figures",
    "messages": "measure.pipeline",
    "ngrams": "corpus.ngrams",
    "plays": "corpus.plays",
    "progress": "cli.streams",
    "results": "report.results",
    "rules.feedback_init": "matrices.initial",
    "rules.grape": "matrices.grape",
    "run_state": "training.state",
    "runs": "experiments.execution",
    "scheduler": "experiments.scheduler",
    "seeds": "common.seeds",
    "shared_taps": "convert.taps",
    "specs": "records.specs",
    "steps": "training.step",
    "style": "report.style",
    "suites": "experiments.suites",
    "surrogates": "layers",
    "tables": "report.tables",
    "transport": "measure.transport",
    "validation": "common.validation",
    "verification": "experiments.verification",
    "vocabulary": "corpus.vocabulary",
    "watching": "common.modes",
}


class _Finder(MetaPathFinder, Loader):
    """Finds a module under its old name: the very module that has the new one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        sys.modules[module.__name__] = import_module(f"{__package__}.{MOVED[old]}")


class _Package(ModuleType):
    """This package: an import binds a module in it, but not where a function of the same name has to stay."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "alignment" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def find_moved_modules() -> None:
    """Let imports find the modules of earlier versions."""
    sys.meta_path.insert(0, _Finder())
    sys.modules[__package__].__class__ = _Package
