"""Learning rules: the contract, the registry, and one file per rule."""

from localgpt_core.rules.backprop import Backprop
from localgpt_core.rules.base import RULES, LearningRule, RuleOptions
from localgpt_core.rules.direct_feedback_alignment import DirectFeedbackAlignment
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

__all__ = ["RULES", "LearningRule", "RuleOptions"]
