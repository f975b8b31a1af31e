"""Small texts, configurations and records that the tests of training, records and commands share."""

import signal
from dataclasses import replace
from functools import cache

from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.records import RunRecord
from localgpt_core.records.specs import RunSpec
from localgpt_core.training import state as run_state
from localgpt_core.training.step import learning_rate

WORDS = "a rose by any other name would smell as sweet and so would I. what is in it?".split()


# A suite of two arms on the text in toy.txt, and the sizes of its runs as options of `localgpt train`.
TOY_SUITE = """
question = "Which?"
preset = "tiny"
seeds = [1]
corpus = "toy.txt"
model = { n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }
train = { steps = 4, batch_size = 2, eval_interval = 4 }
[arms.bp]
[arms.frozen]
train = { freeze_body = true }
"""
# Two arms of seconds, for what is done to a suite while it runs.
SHORT_SUITE = """
question = "Which?"
preset = "tiny"
seeds = SEEDS
corpus = "CORPUS"
model = { n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }
train = { steps = STEPS, batch_size = 2, warmup = 2, eval_interval = EVERY }
[arms.bp]
[arms.fa]
model = { method = "fa" }
"""
PATIENCE_S = 600  # how long a busy machine may need for a few seconds of work
TOY_SIZES = "--preset tiny --n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2".split()


def short_suite(corpus: object, seeds: list[int], steps: int = 300, every: int = 30) -> str:
    """Return a suite of two arms; a run of it is evaluated after so many steps."""
    values = {"CORPUS": corpus, "SEEDS": seeds, "STEPS": steps, "EVERY": every}
    text = SHORT_SUITE
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text


def toy_text(characters: int = 2003) -> str:
    """Return words in a fixed, irregular order: easy to learn something of, impossible to know by heart."""
    state, words = 1, []
    while sum(map(len, words)) < characters:
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        words.append(WORDS[(state >> 16) % len(WORDS)])
        words.append("\n" if state >> 27 == 0 else " ")
    return "".join(words)[:characters]


@cache
def toy_corpus(characters: int = 2003) -> Corpus:
    text = toy_text(characters)
    return Corpus("toy", text, "".join(sorted(set(text))))


def toy_model(**changes) -> LocalGPTConfig:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 7, "dropout": 0.0}
    return LocalGPTConfig(**{**sizes, "vocab_size": toy_corpus().vocab_size, **changes})


def toy_train(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 20, "batch_size": 3, "warmup": 4, "eval_interval": 5, **changes})


def toy_spec(seed: int = 1, **changes) -> RunSpec:
    corpus = toy_corpus()
    return RunSpec(toy_model(**changes), toy_train(seed=seed), corpus.name, corpus.sha256)


def toy_curves(
    spec: RunSpec, final: float | None = 2.5, best: float | None = 2.25
) -> dict[str, list[float | None]]:
    """Return curves of ``spec`` with two training losses, that end with ``final`` and go down to ``best``.

    Without ``final`` they end where the loss is no longer a number.
    """
    train = spec.train
    steps = sorted({(train.steps + 1) // 2, train.steps})
    evaluated = [s for s in range(train.steps + 1) if s % train.eval_interval == 0 or s == train.steps]
    start = 3.25 if best is None or len(evaluated) > 2 else best
    return {
        "step": steps,
        "tokens": [step * train.batch_size * spec.model.block_size for step in steps],
        "lr": [float(f"{learning_rate(step - 1, train):.6g}") for step in steps],
        "train_loss": [3.0, 2.5][-len(steps) :],
        "val_step": evaluated,
        "val_loss": [start, *[3.25 if best is None else best] * (len(evaluated) - 2), final],
    }


def toy_record(spec: RunSpec | None = None, **changes) -> RunRecord:
    """Return a record as a run leaves it, with numbers that nobody measured and that fit each other.

    What ``changes`` says is taken as it is.
    """
    spec = spec or toy_spec()
    status = changes.get("status", "finished")
    final = changes.get("final_val_loss", 2.5 if status == "finished" else None)
    best = changes.get("best_val_loss", 2.25 if final is None else min(2.25, final))
    record = RunRecord(
        digest=spec.digest,
        suite="toys",
        arm=spec.model.method,
        preset="tiny",
        spec=spec.to_dict(),
        seed=spec.seed,
        status="finished",
        final_val_loss=final,
        best_val_loss=best,
        wall_time_s=12.0,
        tokens_per_s=1000.0,
        peak_memory_mib=100.0,
        flops_per_token=5000.0,
        parameters={"total": 1000, "trained": 900},
        curves=toy_curves(spec, final, best),
        sample="a rose",
        environment={"device": "toy", "cpu_capability": "AVX2", "threads": 1, "torch": "2", "python": "3"},
        provenance={"command": "localgpt", "start": "2026-01-01T00:00:00+00:00"},
    )
    if status == "failed":
        nothing = {"best_val_loss": None, "tokens_per_s": None, "flops_per_token": None, "sample": ""}
        record = replace(record, **nothing, parameters={}, curves={}, error="MemoryError: none left")
    return replace(record, **changes)


def interrupt_after(monkeypatch, step):
    """Press Ctrl-C during the step that ends at ``step``."""
    original = run_state.training_step

    def interrupted(model, optimizer, config, idx, targets, at, *others):
        loss = original(model, optimizer, config, idx, targets, at, *others)
        if at + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(run_state, "training_step", interrupted)
