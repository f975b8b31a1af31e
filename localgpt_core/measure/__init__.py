"""What a rule does.

Alignment with the exact gradient, the test for weight transport, diagnostics over training, what goes on
inside a model, how far one matrix is the Jacobian of all tokens, what a step costs, and what a pipeline of
blocks would send. A measurement leaves the model, its mode and the random state as they were.
"""

from localgpt_core.measure.alignment import Alignment, alignment, feedback_cosines
from localgpt_core.measure.cost import (
    alignment_flops,
    alignment_in_forward_passes,
    codebook_fit_flops,
    peak_memory_mib,
    peak_step_bytes,
    reset_peak_memory,
    step_bytes,
    step_flops,
)
from localgpt_core.measure.diagnostics import Diagnostics, measure_into
from localgpt_core.measure.inside import (
    choices,
    code_radial_shares,
    concentration,
    entropy_bits,
    gates,
    radial_shares,
    unused_share,
)
from localgpt_core.measure.pipeline import StageMessage, stage_message
from localgpt_core.measure.spread import JacobianSpread, jacobian_spread, token_jacobians
from localgpt_core.measure.transport import describe, weight_transport

__all__ = [
    "Alignment",
    "Diagnostics",
    "JacobianSpread",
    "StageMessage",
    "alignment",
    "alignment_flops",
    "alignment_in_forward_passes",
    "choices",
    "code_radial_shares",
    "codebook_fit_flops",
    "concentration",
    "describe",
    "entropy_bits",
    "feedback_cosines",
    "gates",
    "jacobian_spread",
    "measure_into",
    "peak_memory_mib",
    "peak_step_bytes",
    "radial_shares",
    "reset_peak_memory",
    "stage_message",
    "step_bytes",
    "step_flops",
    "token_jacobians",
    "unused_share",
    "weight_transport",
]
