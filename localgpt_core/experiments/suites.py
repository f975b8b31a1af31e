"""Suites: which runs a chapter rests on, as data.

A suite is a TOML file:

    question = "Does the body learn under feedback alignment?"
    preset = "cpu"
    seeds = [1, 2, 3]
    corpus = "shakespeare"              # optional
    diagnose_every = 200                # optional: steps between comparisons with the exact gradient
    model = { attn_mode = "softmax" }   # optional, for every arm; so is train

    [arms.fa]
    label = "feedback alignment"
    model = { method = "fa" }
    train = { lr = 3e-3 }
    seeds = [1]                         # optional, instead of the suite's; so is diagnose_every
    corpus = "recall-2"                 # optional, a corpus with a name in the place of the suite's

For tables ``claims`` see `localgpt_core.experiments.claims`. Unknown keys are errors. A run is known by its
content: one that another suite has recorded is not made again.
"""

import json
import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from localgpt_core.common.files import LONGEST_INTEGER, atomic_write, read_regular
from localgpt_core.common.validation import LARGEST, Refusal, require, require_choice, require_integer
from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig
from localgpt_core.corpus.corpus import SHA256, Corpus, load_corpus
from localgpt_core.experiments.claims import Claim, read_claims
from localgpt_core.records.consistency import check_name
from localgpt_core.records.specs import RunSpec, resolve_spec

__all__ = [
    "Arm",
    "PlannedRun",
    "Suite",
    "as_toml",
    "read_config",
    "read_seeds",
    "read_suite",
    "read_toml",
    "require_keys",
    "write_suite",
]

LARGEST_FILE = 2**20  # bytes
DEEPEST = 16  # a suite has a list in a table in a table in a table
MOST_RUNS = 10_000
SUITE_KEYS = {"question", "preset", "seeds", "corpus", "model", "train", "arms", "diagnose_every", "claims"}
ARM_KEYS = {"label", "model", "train", "seeds", "diagnose_every", "corpus"}


@dataclass(frozen=True)
class Arm:
    """One arm of a suite: a name, a label for people, what differs from the preset, its own corpus or ""."""

    name: str
    label: str
    model: dict[str, Any]
    train: dict[str, Any]
    seeds: tuple[int, ...]
    diagnose_every: int = 0
    corpus: str = ""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a suite: an arm with one of its seeds, and its text."""

    arm: Arm
    spec: RunSpec
    corpus: Corpus | None = None


@dataclass(frozen=True)
class Suite:
    """A set of arms that answers a question."""

    name: str
    path: Path
    question: str
    preset: str
    corpus: str
    arms: tuple[Arm, ...]
    claims: dict[str, Claim] = field(default_factory=dict)

    def plan(self, corpus: Corpus, preset: str | None = None) -> list[PlannedRun]:
        """Return the runs, seed by seed, so that a suite that is stopped has whole comparisons.

        ``corpus`` is that of the arms that name none. ``preset`` replaces the suite's own.

        Raises:
            ValueError: For an unknown preset or field, or a value that the configuration refuses.
        """
        seeds = dict.fromkeys(seed for arm in self.arms for seed in arm.seeds)
        planned = []
        for seed in seeds:
            for arm in self.arms:
                if seed in arm.seeds:
                    train, text = {**arm.train, "seed": seed}, _named(arm.corpus) if arm.corpus else corpus
                    try:
                        spec = resolve_spec(preset or self.preset, arm.model, train, text)
                    except ValueError as error:
                        raise Refusal(f"suite {self.path}, arm {arm.name!r}: {error}") from None
                    planned.append(PlannedRun(arm, spec, text))
        return planned


@cache
def _named(corpus: str) -> Corpus:
    """Return a corpus with a name, always the same one."""
    return load_corpus(corpus)


def read_suite(path: str | os.PathLike[str]) -> Suite:
    """Return the suite in a TOML file.

    Raises:
        ValueError: If the file is missing or no TOML, or has an unknown key or a value of a wrong kind.
    """
    path = Path(path)
    content = read_toml("suite", path)
    where = f"suite {path}: key"
    require_keys(where, content, SUITE_KEYS, {"question", "preset", "seeds", "arms"})
    require_choice(f"suite {path}: preset", content["preset"], PRESETS)
    model, train = _overrides(f"suite {path}", content)
    for key in ("question", "corpus"):
        value = content.get(key, "")
        require(isinstance(value, str), f"suite {path}: {key}", value, "must be a string")
    check_name("suite", path.stem)
    arms, runs = [], 0
    require(isinstance(content["arms"], dict) and content["arms"], where, "arms", "must be a table of arms")
    for name, arm in content["arms"].items():
        check_name(f"suite {path}: arm", name)
        require_keys(f"suite {path}, arm {name!r}: key", arm, ARM_KEYS, set())
        own_model, own_train = _overrides(f"suite {path}, arm {name!r}", arm)
        label = arm.get("label", name)
        require(isinstance(label, str), f"suite {path}, arm {name!r}: label", label, "must be a string")
        if "corpus" in arm:
            require_choice(f"suite {path}, arm {name!r}: corpus", arm["corpus"], SHA256)
        arms.append(
            Arm(
                name=name,
                label=label,
                model={**model, **own_model},
                train={**train, **own_train},
                seeds=read_seeds(f"suite {path}: seeds", (content | arm)["seeds"]),
                diagnose_every=_diagnose_every(path, (content | arm).get("diagnose_every", 0)),
                corpus=arm.get("corpus", ""),
            )
        )
        runs += len(arms[-1].seeds)
        require(runs <= MOST_RUNS, f"suite {path}: arms", len(content["arms"]), f"at most {MOST_RUNS} runs")
    return Suite(
        name=path.stem,
        path=path,
        question=content["question"],
        preset=content["preset"],
        corpus=content.get("corpus", "shakespeare"),
        arms=tuple(arms),
        claims=read_claims(f"suite {path}: claims", content.get("claims", {}), [arm.name for arm in arms]),
    )


def write_suite(suite: Suite, path: str | os.PathLike[str]) -> Suite:
    """Write a suite without its claims as a TOML file, atomically, and return it as `read_suite` reads it.

    Raises:
        OSError: If the file cannot be written.
    """
    head = {"question": suite.question, "preset": suite.preset, "corpus": suite.corpus}
    lines = [f"{key} = {as_toml(value)}" for key, value in (head | {"seeds": suite.arms[0].seeds}).items()]
    for arm in suite.arms:
        lines += ["", f"[arms.{as_toml(arm.name)}]"]
        keys = ("label", "model", "train", "seeds", "diagnose_every", *["corpus"] * bool(arm.corpus))
        lines += [f"{key} = {as_toml(getattr(arm, key))}" for key in keys]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "\n".join([*lines, ""]))
    return read_suite(path)


def as_toml(value: Any) -> str:
    """Return a text, a number, a list or a table as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {as_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else as_toml(name)


def read_config(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a model and of a run in a TOML file with the tables ``model`` and ``train``.

    Both are written as in an arm of a suite, and ``train`` may have a seed.

    Raises:
        ValueError: If the file is missing or no TOML, or has an unknown key or field.
    """
    path = Path(path)
    content = read_toml("config", path)
    require_keys(f"config {path}: key", content, {"model", "train"}, set())
    for name, cls in (("model", LocalGPTConfig), ("train", TrainConfig)):
        known = {item.name for item in fields(cls)}
        require_keys(f"config {path}, {name}: field", content.setdefault(name, {}), known, set())
    return content["model"], content["train"]


def read_toml(kind: str, path: Path) -> dict[str, Any]:
    """Return what is in a TOML file that is the ``kind`` of file that a message names.

    Raises:
        ValueError: If the file is missing or no TOML, or too deep for any of its kinds.
    """
    try:
        content = tomllib.loads(read_regular(path, LARGEST_FILE).decode("utf-8-sig"))
    except OSError as error:
        raise Refusal(f"{kind} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{kind} {path} is not TOML: {error}") from None
    _require_plain(f"{kind} {path}", content)
    return content


def _require_plain(where: str, content: dict[str, Any]) -> None:
    """Refuse what no field is, however a file writes it: tables in tables without end, a number of a page."""
    values = [(content, 0)]
    while values:  # not by recursion, which has an end of its own
        value, depth = values.pop()
        require(depth <= DEEPEST, where, "tables and lists", f"at most {DEEPEST} in each other")
        short = not isinstance(value, int) or -(10**LONGEST_INTEGER) < value < 10**LONGEST_INTEGER
        require(short, where, "a number", f"an integer has at most {LONGEST_INTEGER} digits")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        values += [(each, depth + 1) for each in inner]


def require_keys(where: str, found: dict[str, Any], allowed: set[str], needed: set[str]) -> None:
    """Raise ``ValueError``, naming ``where``, for a key that is not allowed or one that is missing."""
    require(isinstance(found, dict), where, found, "must be a table")
    for key in found:
        require(key in allowed, where, key, "allowed are " + ", ".join(sorted(allowed)))
    for key in sorted(needed):
        require(key in found, where, key, "is missing")


def _overrides(where: str, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables model and train of a suite or an arm."""
    tables = found.get("model", {}), found.get("train", {})
    for name, values in zip(("model", "train"), tables, strict=True):
        require(isinstance(values, dict), f"{where}: {name}", values, "must be a table")
    require("seed" not in tables[1], f"{where}: key", "seed", "belongs into seeds, not into train")
    return tables


def read_seeds(where: str, seeds: Any) -> tuple[int, ...]:
    """Return the seeds of a list in a TOML file; ``ValueError``, naming ``where``, if it is none."""
    valid = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed <= LARGEST for seed in seeds)
    valid = valid and len(seeds) > 0
    allowed = f"must be a list of integers of at least 0 and at most {LARGEST}"
    require(valid, where, seeds, allowed)
    require(len(set(seeds)) == len(seeds), where, seeds, "must not repeat")
    return tuple(seeds)


def _diagnose_every(path: Path, value: Any) -> int:
    require_integer(f"suite {path}: diagnose_every", value, 0)
    return value
