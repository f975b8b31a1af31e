"""Show the package's docstrings, which are written to be read in an editor, on the API page.

Four things differ from reStructuredText: a name in single backticks is code, an indented block after a colon
is code, a bar is a norm and not a substitution, and a colon in the first line of a property is punctuation
and not the end of a type. A dataclass whose fields carry their meaning as ``metadata["help"]`` gets the list
of its fields.
"""

import dataclasses
import re


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """Rewrite ``lines`` in place, before napoleon reads the Google-style sections."""
    if what == "class" and dataclasses.is_dataclass(obj) and not any("Attributes:" in line for line in lines):
        helps = [(item.name, item.metadata.get("help")) for item in dataclasses.fields(obj)]
        lines += ["", *(f":ivar {name}: {text}" for name, text in helps if text), ""]
    for number, (line, blank, block) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        if line.endswith(":") and not blank.strip() and block.strip() and _indent(block) > _indent(line):
            lines[number] = line.rstrip(":") + "::"
    literal_indent = None  # inside a literal block: the indentation of the line that announced it
    previous = ""
    for number, line in enumerate(lines):
        indent = _indent(line)
        if literal_indent is not None and line.strip() and indent <= literal_indent:
            literal_indent = None
        if literal_indent is None:
            if previous.rstrip().endswith("::") and line.strip() and indent > _indent(previous):
                literal_indent = _indent(previous)
            else:
                lines[number] = re.sub(r"``.*?``|(?<![:\w])`[^`]+`(?!_)|\|", _markup, line)
        if line.strip():
            previous = line
    if what in ("property", "attribute", "data"):
        lines.insert(0, "\\ ")  # an empty text: napoleon looks for the type in the first line only


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _markup(match: re.Match) -> str:
    text = match.group()
    if text == "|":
        return r"\|"
    return text if text.startswith("``") else f"`{text}`"


def setup(app) -> dict[str, bool]:
    """Run before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
