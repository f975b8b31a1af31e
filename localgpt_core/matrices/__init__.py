"""Matrices that no gradient moves, as numbers.

How a feedback matrix starts, how it follows a weight, or its size, by forward probes, and the Jacobian of
the logits that it may follow instead. How a codebook is fitted to vectors. Which of these a network uses is
the business of `localgpt_core.rules` and of its layers.
"""

from localgpt_core.matrices.grape import align_to_weight, project_to_weight
from localgpt_core.matrices.initial import StartOptions, initial_feedback
from localgpt_core.matrices.jacobian import jvp_estimates, mean_jacobians
from localgpt_core.matrices.kmeans import spherical_kmeans
from localgpt_core.matrices.scale import follow_magnitude, follow_norm

__all__ = [
    "StartOptions",
    "align_to_weight",
    "follow_magnitude",
    "follow_norm",
    "initial_feedback",
    "jvp_estimates",
    "mean_jacobians",
    "project_to_weight",
    "spherical_kmeans",
]
