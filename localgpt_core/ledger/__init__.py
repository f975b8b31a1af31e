"""What is recorded, and what it decides: the claims of a suite, each with its interval and its verdict.

Nothing is decided by hand: a claim and its criterion stand in the suite's file from before the first run, see
`localgpt_core.experiments.claims`, and everything else is computed from the records.
"""

from localgpt_core.ledger.claims import BookClaim, book_claims, claims_page, misstated
from localgpt_core.ledger.status import SuiteStatus, book_status, broken_table, status_table
from localgpt_core.ledger.verdicts import Decision, claim_table, decide, decisions, stated

__all__ = [
    "BookClaim",
    "Decision",
    "SuiteStatus",
    "book_claims",
    "book_status",
    "broken_table",
    "claim_table",
    "claims_page",
    "decide",
    "decisions",
    "misstated",
    "stated",
    "status_table",
]
