"""Learning rules: the contract, the registry, one file per rule, and what holds a feedback matrix.

A rule says which error it uses, what its feedback is and how that moves; it never sees an autograd graph. A
new rule is one file and one line here, and then appears in the command line and in the contract tests.
"""

from localgpt_core.common.lazy import lazy_names
from localgpt_core.rules.base import RULES, LearningRule, RuleOptions

RULES["bp"] = "localgpt_core.rules.backprop.Backprop"
RULES["fa"] = "localgpt_core.rules.feedback_alignment.FeedbackAlignment"
RULES["dfa"] = "localgpt_core.rules.direct_feedback_alignment.DirectFeedbackAlignment"
RULES["sign_sym"] = "localgpt_core.rules.sign_symmetry.SignSymmetry"
RULES["kp"] = "localgpt_core.rules.kolen_pollack.KolenPollack"
RULES["dkp"] = "localgpt_core.rules.direct_kolen_pollack.DirectKolenPollack"
RULES["wm"] = "localgpt_core.rules.weight_mirror.WeightMirror"

__getattr__ = lazy_names(__name__, {"HoldsFeedback": "feedback", "feedback_drawn_later": "feedback"})

__all__ = ["RULES", "HoldsFeedback", "LearningRule", "RuleOptions", "feedback_drawn_later"]
