"""Draw the README's figure from the records, into the file that is named: `make figure`."""

import sys

import matplotlib

from localgpt_core.report.losses import final_losses
from localgpt_core.report.results import load_results
from localgpt_core.report.style import use_style

if __name__ == "__main__":
    matplotlib.use("Agg")  # no window
    use_style()
    results = load_results("rules")
    arms = "bp, kp grape, grape block norm kp, sign weight, sign uniform, fa, dfa, frozen body".split(", ")
    final_losses(results, arms, results.floors()).savefig(sys.argv[1], dpi=200)
