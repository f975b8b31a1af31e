"""Feedback drawn anew before every step: a rule in a file of its own, as somebody else would write it."""

from localgpt_core import RULES
from localgpt_core.matrices.initial import initial_feedback
from localgpt_core.rules.base import START_OPTIONS, LearningRule


class Redrawn(LearningRule):
    """``grad_input = grad_output @ B``, ``B`` (out x in) drawn anew before every step."""

    aligns = "layer"
    buffer_name = "feedback_weight"
    uses = START_OPTIONS
    no_better_than_frozen = "no weight has the time to align with a matrix that changes at every step"

    def initial_buffer(self, weight, error_features, generator):
        return initial_feedback(self.options, error_features, weight, generator)

    def feedback(self, weight, buffer):
        return buffer

    def align(self, weight, buffer, is_output, generator):
        buffer.copy_(initial_feedback(self.options, len(buffer), weight, generator))


RULES["redrawn"] = Redrawn
