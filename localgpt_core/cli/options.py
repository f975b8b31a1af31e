"""Options that commands share, and one option for every field of the two configurations."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig

__all__ = ["CorpusName", "Device", "Preset", "Threads", "say", "with_config_options"]

Preset = Annotated[str, typer.Option(help=" or ".join(PRESETS))]
CorpusName = Annotated[
    str, typer.Option("--corpus", help="shakespeare, tinyshakespeare, complete or a text file")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Threads = Annotated[int, typer.Option(help="CPU threads")]


def say(text: str) -> None:
    """Print what is news but not the result, to stderr."""
    print(text, file=sys.stderr, flush=True)


def _option_of(item: Field) -> inspect.Parameter:
    """Return the command-line option of a configuration field; its default is the preset's."""
    kind = int if item.name == "feedback_seed" else type(item.default)
    annotation = Annotated[kind | None, typer.Option(help=item.metadata["help"], show_default=False)]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(..., overrides)`` one option per field of the two configurations."""
    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name != "overrides"]
    options = [_option_of(item) for cls in (LocalGPTConfig, TrainConfig) for item in fields(cls)]

    def wrapped(**arguments: Any) -> None:
        given = {option.name: arguments.pop(option.name) for option in options}
        overrides = {name: value for name, value in given.items() if value is not None}
        command(**arguments, overrides=overrides)

    wrapped.__signature__ = signature.replace(parameters=[*own, *options])
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped
