"""From a `RunSpec` to a `RunRecord`: train, and note what ran, on what, with what."""

import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from localgpt_core.common.environment import TRACEBACK_VARIABLE, code_version, environment
from localgpt_core.common.files import require_writable
from localgpt_core.common.validation import Refusal, require
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.model.sampling import sample_text
from localgpt_core.parallel.processes import ProcessLost
from localgpt_core.records import RunRecord, read_record
from localgpt_core.records.specs import RunSpec
from localgpt_core.training.checkpoints import Checkpoint, lengthened, load_checkpoint
from localgpt_core.training.loop import TrainResult, train
from localgpt_core.training.settings import RunSettings

__all__ = ["execute", "left_to_do", "sample_text", "steps_done"]

PACKAGE = Path(__file__).parents[1] / "__init__.py"


def left_to_do(
    specs: Sequence[RunSpec], out: Path, *, resume: bool = False, overwrite: bool = False
) -> list[RunSpec]:
    """Return the runs that are to be made in the folder ``out``, where none may destroy another.

    These are all of them, but with ``resume``, of several, only those that are not finished. A run that has
    nothing there begins, with ``resume``, with the longest finished one that is the same but for its steps:
    its checkpoint is written.

    Raises:
        ValueError: With neither ``resume`` nor ``overwrite`` for a run that has a checkpoint or a record
            there, with ``resume`` where nothing is left to do, nothing was begun, or a shorter run cannot be
            made longer, and with both.
    """
    require(not (resume and overwrite), "resume", resume, "goes on with a run, overwrite starts it again")
    if overwrite:
        return [*specs]
    files = [(out / f"{spec.digest}.safetensors", out / f"{spec.digest}.json") for spec in specs]
    if not resume:
        for checkpoint, path in files:
            finished = _finished(path) is not None
            known = "is that of this finished run" if finished else "is that of this run"
            offer = "--resume goes on, " if os.path.lexists(checkpoint) and not finished else ""
            for field, file in (("record", path), ("checkpoint", checkpoint)):
                allowed = f"{known}; {offer}--overwrite starts it again"
                require(not os.path.lexists(file), field, str(file), allowed)
        return [*specs]
    left = [spec for spec, places in zip(specs, files, strict=True) if not _is_over(spec, *places)]
    allowed = "is that of this finished run; --overwrite starts it again"
    require(bool(left), "record", str(files[-1][1]), allowed)
    new = [spec for spec in left if not (out / f"{spec.digest}.safetensors").is_file()]
    longer = [found for spec in new if (found := _lengthened(spec, out)) is not None]
    begun = longer or any(checkpoint.is_file() for checkpoint, _ in files)
    require(begun, "resume", str(files[0][0]), "this run has no checkpoint")
    for checkpoint in longer:
        checkpoint.write()
    return left


def _lengthened(spec: RunSpec, out: Path) -> Checkpoint | None:
    """Return the checkpoint of ``spec`` after the longest finished run in ``out`` that differs in steps."""
    found = []
    for path in out.glob("*.json"):
        record = _finished(path)
        steps = record.run_spec.train.steps if record is not None else spec.train.steps
        if steps < spec.train.steps and path.with_suffix(".safetensors").is_file():
            same = replace(spec, train=replace(spec.train, steps=steps)) == record.run_spec
            found += [(steps, path.with_suffix(".safetensors"))] if same else []
    if not found:
        return None
    steps, path = max(found)
    checkpoint = load_checkpoint(path)
    checkpoint.require_same_run(spec.model, replace(spec.train, steps=steps), spec.corpus_sha256)
    return lengthened(checkpoint, spec.train.steps, out / f"{spec.digest}.safetensors")


def steps_done(checkpoint: Path) -> int:
    """Return the step from which a run goes on: 0 without a checkpoint."""
    return load_checkpoint(checkpoint, tensors=False).progress["step"] if checkpoint.is_file() else 0


def _is_over(spec: RunSpec, checkpoint: Path, path: Path) -> bool:
    """Return whether a run has a record, of which no later, unfinished start of it left a checkpoint."""
    if checkpoint.is_file():
        load_checkpoint(checkpoint).require_same_run(spec.model, spec.train, spec.corpus_sha256)
    record = _finished(path)
    # One that was interrupted while it wrote its sample has a record already.
    whole = not checkpoint.is_file() or steps_done(checkpoint) == spec.train.steps
    return whole and record is not None and record.sample != ""


def _finished(path: Path) -> RunRecord | None:
    """Return the record in a file if it can be read and its run finished."""
    with suppress(Refusal):
        record = read_record(path)
        return record if record.status == "finished" else None
    return None


def execute(
    spec: RunSpec,
    corpus: Corpus,
    settings: RunSettings | None = None,
    *,
    suite: str = "",
    arm: str = "",
    preset: str = "",
    out: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> tuple[RunRecord | None, TrainResult | None]:
    """Run ``spec`` and return its record and its result.

    ``settings``, or in their place ``fields`` of `RunSettings` by name, say where and how; ``suite``, ``arm``
    and ``preset`` what it is made for. A finished run's record is written to the folder ``out`` before the
    model writes its sample, so that nothing that happens then can lose it.

    The record is None for a run that was interrupted or ran out of time. A run that breaks down (out of
    memory, say) has a record with status ``"failed"`` and no result.

    Raises:
        ValueError: If the corpus is not the spec's, for what `localgpt_core.train` refuses, for a malformed
            ``LOCALGPT_COMMIT``, or where ``out`` cannot be written; before anything is trained.
        OSError: If a file cannot be written once the run is over.
    """
    spec.require_corpus(corpus)
    settings = RunSettings.given(settings, fields)
    settings.prepare()
    if out is not None:
        require_writable("out", Path(out) / f"{spec.digest}.json")
    # Made before the run, so that what a record cannot hold is refused in time.
    draft = RunRecord(
        digest=spec.digest,
        suite=suite,
        arm=arm,
        preset=preset,
        spec=spec.to_dict(),
        seed=spec.seed,
        status="failed",
        final_val_loss=None,
        best_val_loss=None,
        wall_time_s=0.0,
        tokens_per_s=None,
        peak_memory_mib=0.0,
        flops_per_token=None,
        parameters={},
        curves={},
        sample="",
        environment={**environment(str(settings.device)), **_parts(settings)},
        provenance={
            "command": _command(),
            **code_version(PACKAGE),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    if settings.tracker is not None:
        _start_tracking(draft, settings)
    clock = time.perf_counter()
    result, changes, status = None, {}, "failed"
    try:
        result = train(spec.model, spec.train, corpus, settings)
    except (Refusal, OSError, ProcessLost):
        raise
    except Exception as failure:
        changes = {"error": _said(failure), "wall_time_s": time.perf_counter() - clock}
    else:
        status = result.status
        if status in ("interrupted", "out_of_time"):
            return None, result
        changes = _measured(result)
    finally:
        if settings.tracker is not None:
            settings.tracker.finish(status)
    end = {"end": datetime.now(UTC).isoformat(timespec="seconds")}
    record = replace(draft, provenance=draft.provenance | end, **changes)
    if record.status == "finished":
        if out is not None:
            record.write(out)
        record = replace(record, **_sample(result.model, corpus.vocabulary))
    return record, result


def _start_tracking(draft: RunRecord, settings: RunSettings) -> None:
    from localgpt_core.tracking.tracker import TrackedRun

    made_for = {name: getattr(draft, name) for name in ("digest", "seed", "suite", "arm", "preset")}
    name = f"{draft.arm or draft.run_spec.model.method} seed {draft.seed} {draft.digest}"
    goes_on = settings.resume and settings.checkpoint is not None and Path(settings.checkpoint).is_file()
    step = steps_done(Path(settings.checkpoint)) if goes_on else None
    settings.tracker.start(TrackedRun(name, draft.digest, draft.settings | made_for, step))


def _parts(settings: RunSettings) -> dict[str, int]:
    """Return in which parts a batch is computed, where it is not one."""
    parts = {"processes": settings.processes.count, "accumulate": settings.accumulate}
    return parts if settings.split.count > 1 else {}


def _measured(result: TrainResult) -> dict[str, Any]:
    """Return the fields of a record that a run fills."""
    same = ("status", "best_val_loss", "wall_time_s", "tokens_per_s", "peak_memory_mib", "flops_per_token")
    same += ("anchor_steps", "curves", "diagnostics")
    parameters = list(result.model.parameters())
    return {
        **{name: getattr(result, name) for name in same},
        "final_val_loss": result.final_val_loss if result.status == "finished" else None,
        "parameters": {
            "total": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
    }


def _sample(model: LocalGPT, vocabulary: str) -> dict[str, str]:
    """Return the sample of a finished run, or why there is none."""
    try:
        return {"sample": sample_text(model, vocabulary)}
    except Exception as failure:
        return {"error": f"no sample: {_said(failure)}"}


def _said(failure: Exception) -> str:
    """Return what a failure says, and show where it arose if that is asked for."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(failure)
    return f"{type(failure).__name__}: {failure}"


def _command() -> str:
    program = Path(sys.argv[0] if sys.argv else "").name
    program = "python -m localgpt_core" if program == "__main__.py" else program
    return f"{program} {shlex.join(map(_without_folder, sys.argv[1:]))}"


def _without_folder(argument: str) -> str:
    """Return an absolute path's last part: a record says what ran, not where somebody keeps it."""
    for sign in "=:":  # --out=FOLDER, --track tensorboard:FOLDER
        option, found, value = argument.rpartition(sign)
        if os.path.isabs(value):
            return option + found + Path(value).name
    return argument
