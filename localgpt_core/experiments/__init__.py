"""Many runs.

Suites, making what is missing of them, and repeating what is recorded. What is kept of a run is below, in
`localgpt_core.records`; nothing here draws.
"""

from localgpt_core.experiments.execution import execute, sample_text
from localgpt_core.experiments.scheduler import SuiteRun, missing_runs
from localgpt_core.experiments.suites import Arm, PlannedRun, Suite, read_config, read_suite
from localgpt_core.experiments.verification import Verdict, judge
from localgpt_core.records import (
    RunRecord,
    RunSpec,
    export_bundle,
    import_bundle,
    load_records,
    read_record,
    resolve_spec,
)

__all__ = [
    "Arm",
    "PlannedRun",
    "RunRecord",
    "RunSpec",
    "Suite",
    "SuiteRun",
    "Verdict",
    "judge",
    "execute",
    "export_bundle",
    "import_bundle",
    "load_records",
    "missing_runs",
    "read_config",
    "read_record",
    "read_suite",
    "resolve_spec",
    "sample_text",
]
