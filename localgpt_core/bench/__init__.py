"""How long a step takes, and where its time goes.

Step times, memory and FLOPs of rules and options relative to backpropagation, measured in pairs within one
process, and the rows that keep them; the time of a step by kind of work, and its trace; the best rate at
which the machine multiplies matrices, the measure of both.
"""

from localgpt_core.bench.measuring import measure
from localgpt_core.bench.peak import Peaks
from localgpt_core.bench.profile import Profile, profiles, render_profiles
from localgpt_core.bench.rows import Row, read_rows, render, write_rows
from localgpt_core.bench.variants import with_softmax_written_out

__all__ = [
    "Peaks",
    "Profile",
    "Row",
    "measure",
    "profiles",
    "read_rows",
    "render",
    "render_profiles",
    "with_softmax_written_out",
    "write_rows",
]
