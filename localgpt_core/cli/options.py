"""Options that commands share, and one option for every field of the two configurations."""

import codecs
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from localgpt_core.cli.streams import say
from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig
from localgpt_core.corpus.corpus import Corpus

__all__ = ["CorpusName", "Device", "Preset", "Threads", "say", "text_of", "with_config_options"]

Preset = Annotated[str, typer.Option(help=" or ".join(PRESETS))]
CorpusName = Annotated[
    str, typer.Option("--corpus", help="shakespeare, tinyshakespeare, complete or a text file")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Threads = Annotated[int, typer.Option(help="CPU threads")]


def text_of(name: str, corpus: Corpus) -> Corpus:
    """Return ``corpus``, saying what a user's file has that people do not see."""
    with suppress(OSError), open(name, "rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            say(f"corpus {corpus.name!r}: the byte order mark at its start is left out")
    if "\r\n" in corpus.text:
        say(f"corpus {corpus.name!r}: its lines end in \\r\\n, and \\r is one of its symbols")
    return corpus


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
