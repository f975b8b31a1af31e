"""The figures of the book, drawn again from their pages without Jupyter.

A figure is the picture of one cell of a notebook, and most of them need little of what stands above: the
results of a suite, some labels, a helper. `page_figures` keeps for each figure the statements that it depends
on. It goes up the page from the cell: a statement counts if it may give a value to a name that is needed
below it, and a plain assignment ends the search for its names. What is kept is code that runs by itself and
says what the figure is made from: the suites whose results it loads, and whether it trains.
"""

import ast
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localgpt_core.common.notebooks import book_pages, cells_of

__all__ = ["BookFigure", "book_figures", "needed_code", "page_figures"]

SILENT = {"plt.show", "print"}  # calls that draw nothing, and want a notebook or a window


@dataclass(frozen=True)
class BookFigure:
    """A figure of the book.

    Attributes:
        name: Its name in the cell metadata, ``mystnb.figure.name``.
        page: Its notebook, relative to the folder ``book``.
        caption: Its caption, in Markdown.
        code: The cell, after the statements of the page that it depends on.
        suites: The suites whose results the code loads, by the name that it gives them.
        live: Whether the code trains models.
    """

    name: str
    page: Path
    caption: str
    code: str
    suites: tuple[str, ...]
    live: bool

    def draw(self, path: Path) -> None:
        """Run the code and save the picture as the notebook has it, in the format that ``path`` ends in."""
        import matplotlib
        import matplotlib.pyplot as plt

        from localgpt_core.report.style import SVG_METADATA, use_style

        matplotlib.use("Agg")  # no window
        with plt.rc_context():
            use_style()
            exec(compile(self.code, str(self.page), "exec"), {"__name__": self.name})
            plt.savefig(
                path, bbox_inches="tight", metadata=SVG_METADATA if path.suffix.lower() == ".svg" else None
            )
            plt.close("all")


def book_figures(book: Path, on_problem: Callable[[str], None] = warnings.warn) -> dict[str, BookFigure]:
    """Return the figures of the notebooks below ``book`` by name, in the order of the pages.

    A page that is damaged is named to ``on_problem``, and the rest goes on.
    """
    found = {}
    for page in book_pages(book):
        try:
            figures = [*page_figures(cells_of(page), page.relative_to(book))]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError) as error:
            on_problem(f"page {page} is left out: {type(error).__name__}: {error}")
        else:
            found |= {figure.name: figure for figure in figures}
    return found


def page_figures(cells: list[dict[str, Any]], page: Path) -> Iterator[BookFigure]:
    """Yield the figures of one notebook; ``cells`` are those of its JSON, or of ``nbformat``."""
    above: list[str] = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        about = cell["metadata"].get("mystnb", {}).get("figure", {})
        source = "".join(cell["source"])
        if "name" in about:
            code = needed_code(above, source)
            calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
            loads = [call for call in calls if _called(call).endswith("load_results")]
            names = [(call.args or [given.value for given in call.keywords])[0] for call in loads]
            suites = dict.fromkeys(ast.unparse(name).strip("'") for name in names)
            live = any(_called(call).split(".")[-1] == "train" for call in calls)
            yield BookFigure(about["name"], page, about.get("caption", ""), code, (*suites,), live)
        above.append(source)


def needed_code(above: Iterable[str], cell: str) -> str:
    """Return the code of ``cell`` after the statements of the cells ``above`` that it depends on."""
    own = [statement for statement in _statements(cell) if not _is_silent(statement)]
    before = [statement for source in above for statement in _statements(source)]
    kept, needed = [], set()
    for number, statement in reversed([*enumerate(before), *((len(before), line) for line in own)]):
        if number < len(before) and (_is_silent(statement) or not _may_change(statement) & needed):
            continue
        needed = needed - _sets(statement) | _loaded([statement])
        kept.append(ast.unparse(statement))
    return "\n".join(reversed(kept)) + "\n"


def _statements(source: str) -> Iterator[ast.stmt]:
    """Yield the statements of a cell, an assignment or an import of several names one by one."""
    for statement in ast.parse(source).body:
        match statement:
            case ast.Import(names=names):
                yield from (ast.Import([name]) for name in names)
            case ast.ImportFrom(module=module, names=names):
                yield from (ast.ImportFrom(module, [name], 0) for name in names)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)) if not (
                _loaded(values) & _stored(targets) or {ast.Starred} & {*map(type, [*targets, *values])}
            ):
                for target, value in zip(targets, values, strict=True):
                    yield ast.copy_location(ast.Assign([target], value), statement)
            case _:
                yield statement


def _is_silent(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Call() as call):
            return _called(call) in SILENT
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id="told"))]):
            return True  # what a sentence takes from here
        case ast.For(body=body, orelse=[]):
            return all(_is_silent(inner) for inner in body)
    return False


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _loaded(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that ``nodes`` read, without those local to a function or a comprehension."""
    names = set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                names.add(name)
            case ast.FunctionDef(args=args, body=body) | ast.Lambda(args=args, body=body):
                inner = body if isinstance(body, list) else [body]
                defaults = [part for part in (*args.defaults, *args.kw_defaults) if part is not None]
                names |= _loaded(inner) - {arg.arg for arg in ast.walk(args) if isinstance(arg, ast.arg)}
                names -= _stored(inner)
                names |= _loaded(defaults)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                targets = _stored(part.target for part in node.generators)
                names |= _loaded(ast.iter_child_nodes(node)) - targets
            case ast.For(target=target, iter=over, body=body, orelse=orelse):
                names |= _loaded([over]) | (_loaded([*body, *orelse]) - _stored([target]))
            case _:
                names |= _loaded(ast.iter_child_nodes(node))
    return names


def _stored(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that ``nodes`` may bind in their own scope."""
    names = set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.alias(name=name, asname=asname):
                names.add(asname or name.partition(".")[0])
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                pass
            case _:
                names |= _stored(ast.iter_child_nodes(node))
    return names


def _sets(statement: ast.stmt) -> set[str]:
    """Return the names whose earlier values do not matter after ``statement``."""
    match statement:
        case ast.Assign() | ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
            return _stored([statement])
    return set()


def _may_change(statement: ast.stmt) -> set[str]:
    """Return the names that ``statement`` binds, or whose objects it may change in place.

    In place: by assignment to an item or attribute, or by a method whose result is dropped.
    """
    names = _stored([statement])
    for node in ast.walk(statement):
        changed: ast.AST | None = None
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = node.value
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            method = node.value.func
            changed = method.value if isinstance(method, ast.Attribute) else None
        while isinstance(changed, ast.Attribute | ast.Subscript | ast.Call):
            changed = changed.func if isinstance(changed, ast.Call) else changed.value
        if isinstance(changed, ast.Name):
            names.add(changed.id)
    return names
