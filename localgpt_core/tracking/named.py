"""A tracker from the words of a command line."""

from localgpt_core.common.validation import Refusal, require
from localgpt_core.tracking.tracker import Guarded

__all__ = ["tracker_of"]

FOLDER, PROJECT = "runs/tensorboard", "localgpt"


def tracker_of(words: str) -> Guarded:
    """Return the tracker ``"tensorboard[:FOLDER]"`` or ``"MODULE[:PROJECT]"``; its package is imported here.

    Raises:
        ValueError: If the package is not installed, the module is not called as Weights & Biases is, or
            nothing can be written to the folder.
    """
    name, colon, place = words.partition(":")
    allowed = "must be tensorboard[:FOLDER], or a module that is called as wandb is and a [:PROJECT]"
    require(
        all(part.isidentifier() for part in name.split(".")) and bool(place or not colon),
        "track",
        words,
        allowed,
    )
    try:
        if name == "tensorboard":
            from localgpt_core.tracking.tensorboard import TensorBoard

            return Guarded(TensorBoard(place or FOLDER))
        from localgpt_core.tracking.module import ModuleTracker

        return Guarded(ModuleTracker(name, place or PROJECT))
    except ModuleNotFoundError as error:
        package = '"localgpt[tracking]"' if name == "tensorboard" else name
        needed = error.name or name
        raise Refusal(
            f"track={words!r}: needs {needed}, which is not installed: pip install {package}"
        ) from None
