"""When each of many tasks happens, exactly: tasks that wait for others, in queues that do one at a time.

start = max(end of the task before it in its queue, end + lag of every task that it waits for)
end   = start + seconds
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import accumulate

__all__ = ["Task", "most_at_once", "play"]


@dataclass(frozen=True)
class Task:
    """Work of ``seconds`` that begins once the tasks named in ``after`` are done.

    Whoever waits for this one goes on ``lag`` seconds after its end; its queue does not wait for that.
    """

    name: Hashable
    seconds: float
    after: tuple[Hashable, ...] = ()
    lag: float = 0.0


def play(queues: Mapping[Hashable, Sequence[Task]]) -> dict[Hashable, tuple[float, float]]:
    """Return start and end of every task of ``queues``, in seconds, by its name.

    Raises:
        graphlib.CycleError: If tasks wait for each other, and none of them could begin.
    """
    tasks = {task.name: task for queue in queues.values() for task in queue}
    before = {
        task.name: previous.name
        for queue in queues.values()
        for previous, task in zip(queue, queue[1:], strict=False)
    }
    needs = {name: {*task.after, before.get(name, name)} - {name} for name, task in tasks.items()}
    times: dict[Hashable, tuple[float, float]] = {}
    for name in TopologicalSorter(needs).static_order():
        arrivals = [times[other][1] + tasks[other].lag for other in tasks[name].after]
        if name in before:
            arrivals.append(times[before[name]][1])
        start = max(arrivals, default=0.0)
        times[name] = start, start + tasks[name].seconds
    return times


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """Return how many of the spans from start to end overlap at most; one ends before another starts."""
    changes = sorted(change for start, end in spans for change in ((start, 1), (end, -1)))
    return max(accumulate(change for _, change in changes), default=0)
