"""How long a step takes.

Step times, memory and FLOPs of rules and options relative to backpropagation, measured in pairs within one
process, and the rows that keep them.
"""

from localgpt_core.bench.measuring import measure, with_softmax_written_out
from localgpt_core.bench.rows import Row, read_rows, render, write_rows

__all__ = ["Row", "measure", "read_rows", "render", "with_softmax_written_out", "write_rows"]
