r"""Kolen-Pollack: the feedback takes the same steps as the weight, ``grad_input = grad_output @ B``.

The gradient g^T x of the weight is local to the layer: whoever keeps B has both factors too. If W and B take
the same increments and decay alike,

    W <- (1 - lr wd) W - lr u,    B <- (1 - lr wd) B - lr u,    u the optimiser's direction for g^T x,

then W - B <- (1 - lr wd) (W - B): the difference vanishes although neither ever reads the other. Here the
optimiser holds B beside W and is handed the same gradient for both, so that u is the same to the last bit.
Source: Kolen and Pollack 1994; Akrout et al. 2019.

With ``fa_grape`` forward probes remove the difference that the decay leaves, as under feedback alignment. The
two complement each other: probes find W but lag behind it while it moves, equal steps keep what was found.
"""

from localgpt_core.rules.base import SCALE_OPTIONS
from localgpt_core.rules.feedback_alignment import FeedbackAlignment

__all__ = ["KolenPollack"]


class KolenPollack(FeedbackAlignment):
    """``grad_input = grad_output @ B``, ``B`` (out x in) moving by the same increments as the weight."""

    mirrors_gradient = True
    # Equal steps are what B follows W by: another size between them would undo it.
    uses = FeedbackAlignment.uses - SCALE_OPTIONS
