"""What narrows the residual stream at the end of a block.

Exactly k winners, a frozen codebook, a frozen subspace, plain rounding. Each is a module that works without
the GPT.
"""

from localgpt_core.bottlenecks.codebook import VQResidualDir, quantised
from localgpt_core.bottlenecks.rounding import UniformRounding
from localgpt_core.bottlenecks.subspace import FrozenSubspace
from localgpt_core.bottlenecks.top_k import HardTopK, TopK, keep_winners

__all__ = [
    "FrozenSubspace",
    "HardTopK",
    "TopK",
    "UniformRounding",
    "VQResidualDir",
    "keep_winners",
    "quantised",
]
