"""What is kept of a run.

What is asked of it and the digest that names it, what came out of it, whether that is true to itself, and how
records are read from a folder and carried elsewhere. A record is small text that tables and figures are made
from.
"""

from localgpt_core.records.bundles import export_bundle, import_bundle
from localgpt_core.records.folder import load_records, matching
from localgpt_core.records.record import RunRecord, read_record
from localgpt_core.records.specs import RunSpec, resolve_spec

__all__ = [
    "RunRecord",
    "RunSpec",
    "export_bundle",
    "import_bundle",
    "load_records",
    "matching",
    "read_record",
    "resolve_spec",
]
