r"""Direct Kolen-Pollack: direct feedback that takes the steps of a weight, ``grad_input = e @ B``.

As under direct feedback alignment, ``e = dloss/dlogits`` reaches every layer through a ``B`` (V x in) of its
own. Here B moves like a weight that led from the layer's input x straight to the output would: with its
gradient

    grad_B = sum over tokens of e^T x                         (V x in)

the optimiser takes the same kind of step, with the same decay, that it takes with the weights. Both factors
are at the layer anyway, and nothing reads a weight. At the output that gradient is the one of its weight W,
and B is handed it: W - B shrinks by the decay alone, which is Kolen-Pollack.

B answers for what the error is handed to: the input of a layer, the stream at a feedback point, the
normalised stream at one with a norm. It needs that norm: a stream that nothing normalises grows under it,
e^T x with the stream, and the blocks learn nothing.

The gradient of B does not enter the norm by which gradients are clipped, and is scaled as they are. Where a
step is exact (an anchor) no error comes in directly: the gradient of B is 0 there, but for the output's.
Torch's DistributedDataParallel, which does not average the gradient of a buffer, is not for this rule.

Source: Webster, Choi and Ahn 2021, "Learning the connections in direct feedback alignment", whose B_l hands
the error to the activations a_(l-1) and has the gradient delta_k^T a_(l-1). Their second term for AlexNet,
a_k^T delta_(l-1), is left out.
"""

from localgpt_core.rules.base import START_OPTIONS
from localgpt_core.rules.direct_feedback_alignment import DirectFeedbackAlignment

__all__ = ["DirectKolenPollack"]


class DirectKolenPollack(DirectFeedbackAlignment):
    """``grad_input = e @ B``, ``B`` (V x in) trained by its gradient ``e^T x``."""

    mirrors_gradient = True
    uses = START_OPTIONS
