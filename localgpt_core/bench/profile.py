"""Where the time of a training step goes, by kind of work, and its trace.

Each profiled step is preceded by one that is not recorded. Ranges around what `localgpt_core.bench.kinds`
calls a scope are put there from outside, and taken away again: the training step knows nothing of them.
Steps are taken without compilation, whatever an arm says, since a compiled graph is a few kernels of all
kinds. The profiler itself costs some microseconds per operator, so that the step without it is given too.
"""

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import wraps
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from localgpt_core.bench.kinds import FEEDBACK, KINDS, NORMS, OPTIMISER, PRODUCTS, RANGE, STEP, spent
from localgpt_core.bench.measuring import Stepper, checked
from localgpt_core.bench.peak import Peaks
from localgpt_core.bench.variants import COMPARED, Variant, arms_of, plain_gpt
from localgpt_core.common.files import atomic_write
from localgpt_core.config import preset
from localgpt_core.experiments.suites import Suite
from localgpt_core.layers.norms import FixedNorm, LayerNormProjectedSurrogate, LayerNormSTE
from localgpt_core.measure.cost import flop_counter
from localgpt_core.training import step as training

__all__ = ["Profile", "profiled", "profiles", "render_profiles", "trace_files"]

COLUMNS = 7  # of a table, which is as wide as a terminal can be
WIDTH = 15  # of a column
ROOM = " " * 7  # below percentages
SHOWN = 10  # unknown operators, those with the most time


@dataclass(frozen=True)
class Profile:
    """Where the time of a variant's step goes: milliseconds by kind, which sum to the step's.

    ``unknown`` has those of operators of no known kind by their names. ``unprofiled`` is the median step
    without the profiler. ``peak_share`` is the rate of the products, their FLOPs over their time, as a share
    of the best at which the machine multiplies matrices.
    """

    name: str
    kinds: dict[str, float]
    unknown: dict[str, float]
    unprofiled: float
    peak_share: float


def profiled(suite: Suite | None) -> list[Variant]:
    """Return what is profiled: the arms of a suite, or a few rules and the GPT that everybody writes."""
    if suite is not None:
        return arms_of(suite)
    return [plain_gpt(), *(Variant(name, options) for name, options in COMPARED.items())]


def trace_files(variants: list[Variant], folder: Path) -> list[Path]:
    """Return the file in ``folder`` for the trace of each variant, numbered in their order."""
    names = [re.sub(r"[^\w.+-]+", "-", variant.name)[:60] for variant in variants]
    return [folder / f"{number:02}-{name}.json" for number, name in enumerate(names, start=1)]


def profiles(
    preset_name: str,
    peaks: Peaks,
    steps: int,
    say: Callable[[str], None],
    variants: list[Variant],
    traces: list[Path] | None = None,
) -> list[Profile]:
    """Return the profile of every variant at a preset's sizes, the mean of the middle half of ``steps``.

    The last step of each is written to its file of ``traces``. The random state of torch is kept.

    Raises:
        ValueError: For an arm that cannot run, before anything is measured.
    """
    found = []
    checked(variants, preset_name)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for number, variant in enumerate(variants):
            say(f"profiling {variant.name}")
            trace = traces[number] if traces else None
            found.append(_profile(variant, preset_name, peaks, steps, trace))
    return found


def _profile(variant: Variant, preset_name: str, peaks: Peaks, steps: int, trace: Path | None) -> Profile:
    model, config = preset(preset_name, variant.model, variant.train)
    stepper = Stepper(model, replace(config, compile=False), peaks.device, variant.change)
    flops = _product_flops(stepper)
    unprofiled = 1000 * statistics.median(stepper.seconds() for _ in range(steps))
    found = []
    for _ in range(steps):
        profiler = _recorded(stepper)
        found.append(spent(profiler.events(), stepper.device.type == "cuda"))
    if trace is not None:
        _write_trace(profiler, trace)
    found.sort(key=lambda one: sum(one[0].values()))
    middle = found[steps // 4 : steps - steps // 4]
    kinds, unknown = (_mean([one[part] for one in middle]) for part in (0, 1))
    share = peaks.share(flops, kinds[PRODUCTS] / 1000, config.precision)
    return Profile(variant.name, kinds, unknown, unprofiled, share)


def _mean(tables: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: sum(table.get(name, 0.0) for table in tables) / len(tables) for name in names}


def _recorded(stepper: Stepper) -> profile:
    """Return the profiler of one step, taken after another that warms the profiler up."""
    activities = [ProfilerActivity.CPU]
    if stepper.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    one = schedule(wait=0, warmup=1, active=1, repeat=1)
    with _marked(stepper.model), profile(activities=activities, schedule=one, acc_events=True) as profiler:
        stepper.seconds()
        profiler.step()
        with record_function(STEP):
            stepper.seconds()
        profiler.step()
    return profiler


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Let the profiler see, inside the ``with`` block, what torch does not name by itself."""
    norms = nn.LayerNorm | LayerNormSTE | LayerNormProjectedSurrogate | FixedNorm
    places = [(model, "align_feedback", FEEDBACK), (training, "mirror", FEEDBACK)]
    places += [(nn.utils, name, OPTIMISER) for name in ("clip_grad_norm_", "clip_grads_with_norm_")]
    places += [(module, "forward", NORMS) for module in model.modules() if isinstance(module, norms)]
    with ExitStack() as stack:
        for owner, name, kind in places:
            stack.enter_context(patch.object(owner, name, _in_range(kind, getattr(owner, name))))
        yield


def _in_range(kind: str, function: Callable) -> Callable:
    @wraps(function)
    def inside(*args: object, **named: object) -> object:
        with record_function(RANGE + kind):
            return function(*args, **named)

    return inside


def _product_flops(stepper: Stepper) -> int:
    """Return the FLOPs of forward and backward pass in the products of `PRODUCTS`, without attention's."""
    model = deepcopy(stepper.model)
    with flop_counter() as counter:
        model(stepper.idx, stepper.idx)[1].backward()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(counts.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))


def _write_trace(profiler: profile, path: Path) -> None:
    """Write what the profiler has seen for Perfetto, without the names of the machine and of its folders."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(written))
        trace = json.loads(written.read_text(encoding="utf-8"))
    trace.pop("host_name", None)
    atomic_write(path, json.dumps(trace | {"traceName": path.name}))


def render_profiles(found: list[Profile]) -> str:
    """Return the profiles as text tables, a column each: milliseconds and percent of the step by kind."""
    tables = [_table(found[start : start + COLUMNS]) for start in range(0, len(found), COLUMNS)]
    lines = []
    for one in found:
        most = sorted(one.unknown.items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} ({time:.3f})" for name, time in most[:SHOWN])
        left = f" and {len(most) - SHOWN} more" if len(most) > SHOWN else ""
        lines += [f"other in {one.name} (ms): {names}{left}"] if most else []
    return "\n\n".join([*tables, *(["\n".join(lines)] if lines else [])])


def _table(found: list[Profile]) -> str:
    headings = [wrap(one.name, WIDTH - 2)[::-1] for one in found]
    rows = [("", line) for line in zip_longest(*headings, fillvalue="")][::-1]
    rows[-1] = ("ms per step", rows[-1][1])
    totals = [sum(one.kinds.values()) for one in found]
    for kind in KINDS:
        times = [one.kinds[kind] for one in found]
        rows.append((kind, [f"{t:.2f} {t / total:6.1%}" for t, total in zip(times, totals, strict=True)]))
    rows.append(("step", [f"{total:.2f}{ROOM}" for total in totals]))
    rows.append(("without profiler", [f"{one.unprofiled:.2f}{ROOM}" for one in found]))
    rows.append(("products, of peak", [f"{one.peak_share:.1%}" for one in found]))
    lines = [f"{name:<18}" + "".join(f"{cell:>{WIDTH}}" for cell in cells) for name, cells in rows]
    return "\n".join(line.rstrip() for line in lines)
