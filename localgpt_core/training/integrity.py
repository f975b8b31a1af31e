"""What a checkpoint must be before anything of it is used: whole, of one run, and of that run's sizes.

A file may be damaged, cut together or foreign. The fused optimiser, for one, runs past the end of a tensor
that is too short. So names, shapes, types and ranges are held to the configuration first.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localgpt_core.common.validation import require, require_integer
from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.config.schedule import steps_taken
from localgpt_core.training.curves import check_curves
from localgpt_core.training.step import model_without_numbers, trained_names

__all__ = ["STATE", "check_corpus_fields", "check_progress", "check_tensors", "checksum"]

STATE = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each trained tensor


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header and tensors, their names, types and shapes included."""
    digest = hashlib.sha256()
    for key in sorted(header):
        digest.update(f"{key}={header[key]}\n".encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_corpus_fields(corpus: Any, vocab_size: int) -> None:
    """Raise ``ValueError`` unless ``corpus`` names a text and has the alphabet of the model."""
    require(isinstance(corpus, dict), "corpus", corpus, "must be an object")
    expected = {"name", "sha256", "vocabulary"}
    known = corpus.keys() == expected and all(isinstance(value, str) for value in corpus.values())
    require(known, "corpus", corpus, "must have the texts name, sha256, vocabulary")
    vocabulary = corpus["vocabulary"]
    canonical = [*vocabulary] == sorted({*vocabulary}) and len(vocabulary) == vocab_size
    require(canonical, "vocabulary", vocabulary, f"must be {vocab_size} different characters in order")


def check_progress(progress: Any, model: LocalGPTConfig, train: TrainConfig) -> None:
    """Raise ``ValueError`` unless ``progress`` is that of a run after some of its steps."""
    expected = {"step", "curves", "losses", "pending", "diagnostics", "train_time_s", "wall_time_s"}
    require(isinstance(progress, dict), "progress", progress, "must be an object")
    require(progress.keys() == expected, "progress", sorted(progress), f"must have {sorted(expected)}")
    step, curves = progress["step"], progress["curves"]
    require_integer("step", step, 0, train.steps)
    check_curves(curves, model.block_size, train, step)
    lost = [loss for loss in curves["val_loss"] if loss is None or not math.isfinite(loss)]
    require(not lost, "val_loss", lost, "must be finite: a run that diverged has no checkpoint")
    since = step - (curves["step"][-1] if curves["step"] else 0)
    # A run that goes on from a checkpoint of old has the losses of its later steps only.
    for name, fewest, most in (("pending", since, since), ("losses", 0, step - since)):
        values = progress[name]
        numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        require(numbers, name, type(values).__name__, "must be a list of numbers")
        require(fewest <= len(values) <= most, name, len(values), f"must have {most} losses")
    measured = progress["diagnostics"]
    require(isinstance(measured, dict), "diagnostics", measured, "must be an object")
    for name in ("train_time_s", "wall_time_s"):
        seconds = progress[name]
        fits = isinstance(seconds, int | float) and 0 <= seconds < math.inf
        require(fits, name, seconds, "must be finite and not negative")


def check_tensors(
    tensors: Mapping[str, Tensor], model_config: LocalGPTConfig, train_config: TrainConfig, step: int
) -> None:
    """Raise ``ValueError`` unless ``tensors`` are those of a run after ``step`` steps.

    These are ``model.<name>`` of the model's state, and after the first step that was taken
    ``optimizer.<name>.<state>`` for each trained tensor, with its shape and type. The model's numbers are
    finite.
    """
    blocks = {found[1] for name in tensors if (found := re.match(r"model\.blocks\.(\d+)\.", name))}
    # First, because a model of any number of blocks would have to be built to be compared.
    require(len(blocks) == model_config.n_layer, "n_layer", model_config.n_layer, f"has {len(blocks)} blocks")
    model = model_without_numbers(model_config, train_config)
    model.quantise(step >= train_config.vq_start)
    state, stepped = model.state_dict(), steps_taken(step, train_config) > 0
    expected = {f"model.{name}": (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    kinds = {name: expected[f"model.{name}"] for name in trained_names(model)} if stepped else {}
    for name, (shape, dtype) in kinds.items():
        for key in STATE:
            expected[f"optimizer.{name}.{key}"] = ((), torch.float32) if key == "step" else (shape, dtype)
    # Checkpoints of old do not say whether a codebook was in use.
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    in_use = {name: kind for name, kind in expected.items() if name.endswith(".vq.in_use")}
    found = in_use | found
    differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        allowed = f"of {len(differing)} that differ; the run has {_kind(expected.get(name))}"
        require(False, name, _kind(found.get(name)), allowed)
    for name, tensor in tensors.items():
        bad = tensor.isnan() if name.startswith("optimizer.") else ~tensor.isfinite()
        require(not bad.any(), name, f"{int(bad.sum())} of {tensor.numel()} numbers", "must be finite")


def _kind(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "none" if kind is None else f"{str(kind[1]).removeprefix('torch.')} {kind[0]}"
