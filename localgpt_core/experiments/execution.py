"""From a `RunSpec` to a `RunRecord`: train, and note what ran, on what, with what."""

import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localgpt_core.common.environment import code_version, environment
from localgpt_core.common.seeds import generator
from localgpt_core.common.validation import require
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.corpus.vocabulary import decode, encode
from localgpt_core.experiments.records import RunRecord
from localgpt_core.experiments.specs import RunSpec
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.training.loop import TrainResult, train
from localgpt_core.training.settings import RunSettings

__all__ = ["execute", "sample_text"]

SAMPLE_CHARACTERS = 300
PACKAGE = Path(__file__).parents[1] / "__init__.py"


def sample_text(
    model: LocalGPT,
    vocabulary: str,
    prompt: str = "\n",
    characters: int = SAMPLE_CHARACTERS,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
) -> str:
    """Return ``prompt`` continued by the model.

    Raises:
        ValueError: For an empty prompt or a character outside the vocabulary.
    """
    require(len(prompt) > 0, "prompt", prompt, "must have at least one character")
    device = next(model.parameters()).device
    idx = torch.from_numpy(encode(prompt, vocabulary).astype(np.int64))[None].to(device)
    source = generator(seed, "sample", device=device)
    out = model.generate(idx, characters, temperature=temperature, top_k=top_k, generator=source)
    return decode(out[0].cpu(), vocabulary)


def execute(
    spec: RunSpec,
    corpus: Corpus,
    settings: RunSettings | None = None,
    *,
    suite: str = "",
    arm: str = "",
    preset: str = "",
    **fields: Any,
) -> tuple[RunRecord | None, TrainResult | None]:
    """Run ``spec`` and return its record and its result.

    ``settings``, or in their place ``fields`` of `RunSettings` by name, say where and how; ``suite``, ``arm``
    and ``preset`` what it is made for.

    The record is None for a run that was interrupted or ran out of time. A run that breaks down (out of
    memory, say) has a record with status ``"failed"`` and no result.

    Raises:
        ValueError: If the corpus is not the spec's, for what `localgpt_core.train` refuses, or for a
            malformed ``LOCALGPT_COMMIT``; before anything is trained.
    """
    allowed = f"the spec wants {spec.corpus!r} with sha256 {spec.corpus_sha256}"
    require(corpus.sha256 == spec.corpus_sha256, "corpus", corpus.name, allowed)
    settings = RunSettings.given(settings, fields)
    version = code_version(PACKAGE)
    start, clock = datetime.now(UTC), time.perf_counter()
    result, error, sample = None, "", ""
    try:
        result = train(spec.model, spec.train, corpus, settings)
        if result.status in ("interrupted", "out_of_time"):
            return None, result
        if result.status == "finished":
            sample = sample_text(result.model, corpus.vocabulary)
    except (RuntimeError, MemoryError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    counts = {}
    if result:
        parameters = list(result.model.parameters())
        counts["total"] = sum(p.numel() for p in parameters)
        counts["trained"] = sum(p.numel() for p in parameters if p.requires_grad)
    record = RunRecord(
        digest=spec.digest,
        suite=suite,
        arm=arm,
        preset=preset,
        spec=spec.to_dict(),
        seed=spec.seed,
        status=result.status if result else "failed",
        final_val_loss=result.final_val_loss if result and result.status == "finished" else None,
        best_val_loss=result.best_val_loss if result else None,
        wall_time_s=result.wall_time_s if result else time.perf_counter() - clock,
        tokens_per_s=result.tokens_per_s if result else None,
        peak_memory_mib=result.peak_memory_mib if result else 0.0,
        flops_per_token=result.flops_per_token if result else None,
        parameters=counts,
        anchor_steps=result.anchor_steps if result else 0,
        curves=result.curves if result else {},
        diagnostics=result.diagnostics if result else {},
        sample=sample,
        environment=environment(str(settings.device)),
        provenance={
            "command": _command(),
            **version,
            "start": start.isoformat(timespec="seconds"),
            "end": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        error=error,
    )
    return record, result


def _command() -> str:
    program = Path(sys.argv[0]).name
    program = "python -m localgpt_core" if program == "__main__.py" else program
    return f"{program} {shlex.join(map(_without_folder, sys.argv[1:]))}"


def _without_folder(argument: str) -> str:
    """Return an absolute path's last part: a record says what ran, not where somebody keeps it."""
    option, equals, value = argument.rpartition("=")
    return option + equals + Path(value).name if os.path.isabs(value) else argument
