"""One checkpoint is one safetensors file: tensors, and everything else as JSON in its header; no pickle.

It holds a checksum, and what is in it is held to its configuration before anything of it is used. That of a
finished run can begin a longer one where the schedule of the learning rate allows it.

The file is written atomically, so that a run killed at any moment leaves the previous checkpoint whole.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from localgpt_core.common.files import atomic_write
from localgpt_core.common.validation import Refusal, require
from localgpt_core.config import LocalGPTConfig, TrainConfig, build
from localgpt_core.config.schedule import learning_rate, steps_taken
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.measure.diagnostics import Diagnostics
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.training.curves import add_point, curve_interval
from localgpt_core.training.integrity import (
    STATE,
    check_corpus_fields,
    check_progress,
    check_tensors,
    checksum,
)
from localgpt_core.training.step import trained_names

__all__ = ["Checkpoint", "lengthened", "load_checkpoint", "save_checkpoint"]

FORMAT = "localgpt-checkpoint-2"
HEADER = {"format", "model", "train", "corpus", "progress"}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file it was read from.
        model_config: Configuration of the model.
        train_config: Configuration of the run.
        corpus: Name, sha256 and vocabulary of the corpus.
        progress: The step that comes next, the curves so far and the seconds spent.
        tensors: ``model.<name>`` of the state_dict, ``optimizer.<parameter>.<name>`` of the optimiser.
    """

    path: Path
    model_config: LocalGPTConfig
    train_config: TrainConfig
    corpus: dict[str, str]
    progress: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def restore_model(self, model: LocalGPT) -> None:
        """Load the model's parameters and buffers."""
        prefix = "model."
        state = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        # Checkpoints of old do not say whether a codebook was in use yet.
        model.quantise(self.progress["step"] >= self.train_config.vq_start)
        own = model.state_dict()
        model.load_state_dict({k: t for k, t in own.items() if k.endswith(".vq.in_use")} | state)

    def restore_optimizer(self, model: LocalGPT, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimiser's state of every trained parameter."""
        state = optimizer.state_dict()
        if steps_taken(self.progress["step"], self.train_config):
            for index, name in enumerate(trained_names(model)):
                state["state"][index] = {key: self.tensors[f"optimizer.{name}.{key}"] for key in STATE}
        optimizer.load_state_dict(state)

    def require_same_run(self, model: LocalGPTConfig, train: TrainConfig, corpus: Corpus | str) -> None:
        """Raise ValueError, naming what differs, unless this checkpoint belongs to the given run.

        ``corpus`` may be the SHA-256 of its text.
        """
        sha256 = corpus if isinstance(corpus, str) else corpus.sha256
        saved = {**asdict(self.model_config), **asdict(self.train_config), "corpus": self.corpus["sha256"]}
        asked = {**asdict(model), **asdict(train), "corpus": sha256}
        differing = [
            f"{key}={saved[key]!r}, asked {asked[key]!r}" for key in asked if saved[key] != asked[key]
        ]
        if differing:
            raise Refusal(f"checkpoint {self.path} is of another run: it has " + "; ".join(differing))

    def write(self) -> None:
        """Write the file, atomically."""
        header = {
            "format": FORMAT,
            "model": json.dumps(asdict(self.model_config)),
            "train": json.dumps(asdict(self.train_config)),
            "corpus": json.dumps(self.corpus),
            "progress": json.dumps(self.progress),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        header["sha256"] = checksum(header, tensors)
        atomic_write(self.path, save(tensors, metadata=header))


def save_checkpoint(
    path: str | os.PathLike[str],
    model: LocalGPT,
    optimizer: torch.optim.Optimizer,
    train_config: TrainConfig,
    corpus: Corpus,
    progress: dict[str, Any],
) -> None:
    """Write everything that a run needs to go on bit for bit, atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = trained_names(model)
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{names[index]}.{key}": tensor for key, tensor in state.items()})
    text = {"name": corpus.name, "sha256": corpus.sha256, "vocabulary": corpus.vocabulary}
    Checkpoint(Path(path), model.config, train_config, text, progress, tensors).write()


def load_checkpoint(path: str | os.PathLike[str], *, tensors: bool = True) -> Checkpoint:
    """Read a checkpoint; tensors are on the CPU.

    Without ``tensors``, what its header says alone: fast, but nothing is known of the rest of the file.

    Raises:
        ValueError: If the file is missing, damaged or no checkpoint of this package, naming it.
    """
    path = Path(path)
    require(os.path.isfile(path), "checkpoint", str(path), "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Refusal(f"checkpoint {path} is damaged: {error}") from None
    require(header.get("format") == FORMAT, "checkpoint", str(path), f"is not a {FORMAT} file")
    try:
        kept = header.pop("sha256", None)  # checkpoints of old have none
        require(header.keys() == HEADER, "header", sorted(header), f"must have {sorted(HEADER)}")
        whole = kept is None or not tensors or kept == checksum(header, held)
        require(whole, "sha256", kept, "is not that of its content")
        model_config = build(LocalGPTConfig, json.loads(header["model"]))
        train_config = build(TrainConfig, json.loads(header["train"]))
        corpus = json.loads(header["corpus"])
        check_corpus_fields(corpus, model_config.vocab_size)
        progress = {"losses": [], **json.loads(header["progress"])}  # checkpoints of old have none
        check_progress(progress, model_config, train_config)
        if tensors:
            check_tensors(held, model_config, train_config, progress["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        problem = error if isinstance(error, Refusal) else repr(error)
        raise Refusal(f"checkpoint {path} is damaged: {problem}") from None
    return Checkpoint(path, model_config, train_config, corpus, progress, held)


def lengthened(finished: Checkpoint, steps: int, path: Path) -> Checkpoint:
    """Return the checkpoint that a run of ``steps`` steps leaves at ``path`` where ``finished`` ended.

    What goes on from it gives the same run, to the last bit, as one that had ``steps`` steps from the start.

    Raises:
        ValueError: If ``steps`` are not more, or the learning rates of both runs differ before that place.
    """
    old = finished.train_config
    new = replace(old, steps=steps)
    done, progress = finished.progress["step"], dict(finished.progress)
    require(steps > done, "steps", steps, f"must be more than the {done} of {finished.path}")
    last, other = (learning_rate(done - 1, config) for config in (old, new))
    allowed = f"cannot go on from {finished.path}, whose learning rate has fallen to {last:.2g} where"
    allowed += f" that of {steps} steps is {other:.2g}; a run with min_lr_ratio=1 can be made longer"
    same = all(learning_rate(step, old) == learning_rate(step, new) for step in range(done))
    require(same, "steps", steps, allowed)
    losses = torch.tensor([*progress["losses"], *progress["pending"]], dtype=torch.float64)
    allowed = f"cannot go on from {finished.path}, which does not hold the loss of every step"
    require(len(losses) == done, "steps", steps, allowed)

    between, block_size = curve_interval(steps), finished.model_config.block_size
    curves = {**progress["curves"], "step": [], "tokens": [], "lr": [], "train_loss": []}
    points = range(between, done + 1, between)
    for step in points:
        add_point(curves, step, losses[step - between : step], new, block_size)
    # The last evaluation, where the longer run has none, or another one, which is then made at once.
    if done % old.eval_interval or old.eval_between:
        curves |= {key: own[:-1] for key, own in curves.items() if key.startswith("val_")}
    if "step" in progress["diagnostics"]:
        progress["diagnostics"] = _at_regular_steps(progress["diagnostics"])
    kept = len(points) * between
    progress |= {"curves": curves, "losses": losses[:kept].tolist(), "pending": losses[kept:].tolist()}
    return replace(finished, path=path, train_config=new, progress=progress)


def _at_regular_steps(diagnostics: Diagnostics) -> Diagnostics:
    """Return ``diagnostics`` without those of the run's end, if that came before the next were due."""
    gaps = [after - before for before, after in pairwise(diagnostics["step"])]
    if len({*gaps}) <= 1:
        return diagnostics
    return {
        name: {place: own[:-1] for place, own in values.items()} if isinstance(values, dict) else values[:-1]
        for name, values in diagnostics.items()
    }
