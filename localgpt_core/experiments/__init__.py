"""Many runs, and what came out.

What is asked of a run and the digest that names it, suites, records, making what is missing, repeating what
is recorded, and step times. A record is small text that tables and figures are made from; nothing here
draws.
"""

from localgpt_core.experiments.bench import Row, measure, read_rows, render, write_rows
from localgpt_core.experiments.execution import execute, sample_text
from localgpt_core.experiments.records import (
    RunRecord,
    export_bundle,
    import_bundle,
    load_records,
    read_record,
)
from localgpt_core.experiments.scheduler import SuiteRun, missing_runs
from localgpt_core.experiments.specs import RunSpec, resolve_spec
from localgpt_core.experiments.suites import Arm, PlannedRun, Suite, read_config, read_suite
from localgpt_core.experiments.verification import Verdict, judge

__all__ = [
    "Arm",
    "PlannedRun",
    "Row",
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
    "measure",
    "missing_runs",
    "read_config",
    "read_record",
    "read_rows",
    "read_suite",
    "render",
    "resolve_spec",
    "sample_text",
    "write_rows",
]
