"""Telling others of a run while it goes, where that is asked for.

A tracker takes three calls, start, log and finish; one writes TensorBoard's files, one hands everything on to
a module that is called as Weights & Biases is. A run is the same with and without a tracker, and goes on when
its tracker fails. Training imports none of this unless a tracker is given, and no package of an extra either.
"""

from localgpt_core.tracking.log import RunLog
from localgpt_core.tracking.module import ModuleTracker
from localgpt_core.tracking.named import tracker_of
from localgpt_core.tracking.tensorboard import TensorBoard
from localgpt_core.tracking.tracker import Guarded, TrackedRun, Tracker

__all__ = ["Guarded", "ModuleTracker", "RunLog", "TensorBoard", "TrackedRun", "Tracker", "tracker_of"]
