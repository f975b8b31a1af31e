"""Where the runs of a suite are made, and how far they are.

The scheduler of `localgpt_core.experiments` makes runs in processes of this machine. Here are the tasks of a
Ray cluster, an array of jobs for SLURM, and what any process can see of the runs of all three.
"""

from localgpt_core.engines.ray import ray_runs
from localgpt_core.engines.slurm import array_script, submit
from localgpt_core.engines.status import EVERY_S, RunStatus, Watch, screen, summary, table, watching

__all__ = [
    "ENGINES",
    "EVERY_S",
    "RunStatus",
    "Watch",
    "array_script",
    "ray_runs",
    "screen",
    "submit",
    "summary",
    "table",
    "watching",
]

ENGINES = ("local", "ray", "slurm")
