"""Learning rules: the contract, the registry, one file per rule, and what holds a feedback matrix.

A rule says which error it uses, what its feedback is and how that moves; it never sees an autograd graph. A
new rule is one file and one line here, and then appears in the command line and in the contract tests.
"""

from localgpt_core.rules.backprop import Backprop
from localgpt_core.rules.base import RULES, LearningRule, RuleOptions
from localgpt_core.rules.direct_feedback_alignment import DirectFeedbackAlignment
from localgpt_core.rules.feedback import HoldsFeedback, feedback_drawn_later
from localgpt_core.rules.feedback_alignment import FeedbackAlignment
from localgpt_core.rules.kolen_pollack import KolenPollack
from localgpt_core.rules.sign_symmetry import SignSymmetry
from localgpt_core.rules.weight_mirror import WeightMirror

RULES["bp"] = Backprop
RULES["fa"] = FeedbackAlignment
RULES["dfa"] = DirectFeedbackAlignment
RULES["sign_sym"] = SignSymmetry
RULES["kp"] = KolenPollack
RULES["wm"] = WeightMirror

__all__ = ["RULES", "HoldsFeedback", "LearningRule", "RuleOptions", "feedback_drawn_later"]
