"""One checkpoint is one safetensors file: tensors, and everything else as JSON in its header; no pickle.

The file is written atomically, so that a run killed at any moment leaves the previous checkpoint whole.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from localgpt_core.common.files import atomic_write
from localgpt_core.common.validation import Refusal, require
from localgpt_core.config import LocalGPTConfig, TrainConfig, build
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.model.gpt import LocalGPT

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT = "localgpt-checkpoint-2"
PROGRESS_KEYS = {"step", "curves", "losses", "pending", "diagnostics", "train_time_s", "wall_time_s"}
CORPUS_KEYS = {"name", "sha256", "vocabulary"}
OPTIMIZER_KEYS = {"step", "exp_avg", "exp_avg_sq"}


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
        state = {name: tensor for name, tensor in own.items() if name.endswith(".vq.in_use")} | state
        shapes = {name: tensor.shape for name, tensor in own.items()}
        fits = shapes == {name: tensor.shape for name, tensor in state.items()}
        self._require(fits, "its tensors are not those of its model")
        model.load_state_dict(state)

    def restore_optimizer(self, model: LocalGPT, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimiser's state of every trained parameter."""
        state = optimizer.state_dict()
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for index, name in enumerate(_trained_names(model, optimizer)):
            prefix = f"optimizer.{name}."
            found = {key[len(prefix) :]: t for key, t in self.tensors.items() if key.startswith(prefix)}
            self._require(
                not found or found.keys() == OPTIMIZER_KEYS, f"it has only {sorted(found)} of {name}"
            )
            shapes = {key: tuple(t.shape) for key, t in found.items() if key != "step"}
            self._require(
                all(shape == own[name] for shape in shapes.values()), f"it has {shapes} of {name} {own[name]}"
            )
            if found:
                state["state"][index] = found
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
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        atomic_write(self.path, save(tensors, metadata=header))

    def _require(self, ok: bool, problem: str) -> None:
        if not ok:
            raise Refusal(f"checkpoint {self.path} is damaged: {problem}")


def _trained_names(model: LocalGPT, optimizer: torch.optim.Optimizer) -> list[str]:
    # Feedback that takes the same steps as its weight is a buffer in the optimiser.
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


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
    names = _trained_names(model, optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{names[index]}.{key}": tensor for key, tensor in state.items()})
    text = {"name": corpus.name, "sha256": corpus.sha256, "vocabulary": corpus.vocabulary}
    Checkpoint(Path(path), model.config, train_config, text, progress, tensors).write()


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint; tensors are on the CPU.

    Raises:
        ValueError: If the file is missing, damaged or no checkpoint of this package, naming it.
    """
    path = Path(path)
    require(os.path.isfile(path), "checkpoint", str(path), "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise Refusal(f"checkpoint {path} is damaged: {error}") from None
    require(header.get("format") == FORMAT, "checkpoint", str(path), f"is not a {FORMAT} file")
    try:
        progress = {"losses": [], **json.loads(header["progress"])}  # checkpoints of old have none
        require(progress.keys() == PROGRESS_KEYS, "progress", sorted(progress), f"needs {PROGRESS_KEYS}")
        corpus = json.loads(header["corpus"])
        known = corpus.keys() == CORPUS_KEYS and all(isinstance(value, str) for value in corpus.values())
        require(known, "corpus", corpus, f"needs {CORPUS_KEYS}")
        return Checkpoint(
            path=path,
            model_config=build(LocalGPTConfig, json.loads(header["model"])),
            train_config=build(TrainConfig, json.loads(header["train"])),
            corpus=corpus,
            progress=progress,
            tensors=tensors,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(f"checkpoint {path} is damaged: {error!r}") from None
