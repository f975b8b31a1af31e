"""One run in parts, on several processes or one after the other, with the result that it has in one piece.

The processes, what they tell each other and what they add up; the parts that a batch is cut into, and the
random numbers of a part, which are those that its rows have in the whole batch. What is computed of a part is
the business of the rooms above.
"""

from localgpt_core.common.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "ALONE": "processes",
        "DropsOut": "parts",
        "Group": "processes",
        "Part": "parts",
        "ProcessLost": "processes",
        "Processes": "processes",
        "Split": "parts",
        "launched": "processes",
    },
)

__all__ = ["ALONE", "DropsOut", "Group", "Part", "ProcessLost", "Processes", "Split", "launched"]
