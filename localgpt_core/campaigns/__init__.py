"""What a machine that is lent for minutes does in them.

A ranking of suites, the learning rates that a search among them finds, how many runs go best side by side,
and what is missing made in that order into one folder that can be carried away.
"""

from localgpt_core.campaigns.making import Campaign
from localgpt_core.campaigns.ranking import Search, Stage, best_rate, read_ranking

__all__ = ["Campaign", "Search", "Stage", "best_rate", "read_ranking"]
