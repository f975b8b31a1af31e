"""Train again, and make small, the models that write in the pages: `tools/sampler_models.py [ARM ...]`.

They are runs of suite `claims`, all with its first seed. Each is made again, or goes on where it was stopped,
with its checkpoint in `runs/sampler`; it must end where its record says, up to what rounding moves. Matrices
are then rounded to 8 bits, each row on a scale of its own, and written to `book/_static/sampler/models` as
scripts, since a page that is opened from a disk may fetch no file.
"""

import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localgpt_core import Corpus, LocalGPT, LocalGPTConfig, load_corpus
from localgpt_core.common.files import atomic_write
from localgpt_core.experiments.execution import execute, steps_done
from localgpt_core.experiments.suites import PlannedRun, read_suite
from localgpt_core.records import read_record
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.settings import RunSettings
from localgpt_core.training.step import evaluate

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "runs/sampler"
MODELS = ROOT / "book/_static/sampler/models"
SUITE = "claims"
ARMS = ("bp", "kp grape", "dfa grape block kp", "sign weight", "fa probes", "frozen body")
ROUNDING = 0.05  # nats that a run may end away from its record
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
LARGEST = 127


def rounded(matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return ``matrix`` in 8 bits and the scale of each row: row i is about ``scales[i] * integers[i]``."""
    values = matrix.detach().double().numpy()
    largest = np.abs(values).max(axis=1)
    scales = (np.where(largest > 0, largest, 1) / LARGEST).astype(np.float32)
    return np.rint(values / scales[:, None].astype(np.float64)).astype(np.int8), scales


def packed(model: LocalGPT) -> dict[str, dict[str, str]]:
    """Return the parameters of ``model`` as text, little-endian: matrices in 8 bits, vectors as float32."""

    def text(numbers: np.ndarray) -> str:
        return base64.b64encode(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).decode()

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            found[name] = {"floats": text(parameter.detach().numpy())}
        else:
            integers, scales = rounded(parameter)
            found[name] = {"bytes": text(integers), "scales": text(scales)}
    return found


@torch.no_grad()
def round_weights(model: LocalGPT) -> None:
    """Put the rounded numbers in the place of the model's own."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            integers, scales = rounded(parameter)
            parameter.copy_(torch.from_numpy(integers * scales[:, None]))


@torch.no_grad()
def plain(model: LocalGPT) -> LocalGPT:
    """Return the model that computes the same with nothing but parameters.

    What is written into a subspace alone is written by the matrix P W, with the projector P; embeddings that
    learn there are their start plus the projection of what they learnt.
    """
    same = LocalGPT(LocalGPTConfig(**{name: getattr(model.config, name) for name in SIZES}))
    same.load_state_dict({name: value for name, value in model.named_parameters()})
    for block, written in zip(model.blocks, same.blocks, strict=True):
        if block.constrains:
            for layer in (written.attn.o_proj, written.mlp.proj):
                layer.weight.copy_(block.subspace(layer.weight.T).T)
    if model.config.subspace_embeddings == "constrain":
        for name in ("tok_emb", "pos_emb"):
            start, embedding = getattr(model, f"{name}_start"), getattr(same, name)
            embedding.weight.copy_(start + model.blocks[0].subspace(embedding.weight - start))
    return same


def trained(planned: PlannedRun, corpus: Corpus) -> LocalGPT:
    """Return the model of a run, which is made as far as it has not been yet."""
    spec = planned.spec
    path = CHECKPOINTS / f"{spec.digest}.safetensors"
    if steps_done(path) < spec.train.steps:
        execute(spec, corpus, RunSettings(checkpoint=path, resume=True, threads=1))
    saved = load_checkpoint(path)
    model = LocalGPT(saved.model_config)
    saved.restore_model(model)
    return plain(model)


def script(planned: PlannedRun, corpus: Corpus) -> str:
    """Return the script that hands a model to the page."""
    spec, arm = planned.spec, planned.arm
    recorded = read_record(ROOT / f"book/records/{SUITE}/{spec.digest}.json").final_val_loss
    model = trained(planned, corpus)
    again = evaluate(model, corpus.val, spec.train)
    if abs(again - recorded) > ROUNDING:
        raise SystemExit(f"{arm.name}: recorded {recorded:.4f} nats, now {again:.4f}")
    round_weights(model)
    held = {
        "label": arm.label,
        "digest": spec.digest,
        "seed": spec.seed,
        "loss": round(evaluate(model, corpus.val, spec.train), 4),
        "vocabulary": corpus.vocabulary,
        "config": {name: asdict(spec.model)[name] for name in SIZES},
        "parameters": packed(model),
    }
    print(f"{arm.name}: recorded {recorded:.4f}, now {again:.4f}, in 8 bits {held['loss']:.4f}")
    return f'"use strict";\nlab.define("models/{slug(arm.name)}", () => ({json.dumps(held)}));\n'


def slug(arm: str) -> str:
    """Return the name that the model of an arm has in files and pages."""
    return arm.replace(" ", "-")


def main() -> None:
    """Make the models of the arms that are named, or of all."""
    asked = sys.argv[1:] or ARMS
    corpus = load_corpus()
    runs = read_suite(ROOT / f"book/suites/{SUITE}.toml").plan(corpus)
    first = {run.arm.name: run for run in reversed(runs)}
    for arm in asked:
        atomic_write(MODELS / f"{slug(arm)}.js", script(first[arm], corpus))


if __name__ == "__main__":
    main()
