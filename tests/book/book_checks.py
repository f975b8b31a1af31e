"""What a page of the book must and must not hold.

`problems(notebook)` and `site_problems(page, site)` return sentences, one for each fault; an empty list is a
good page. test_book.py and test_site.py apply them to the book, and to copies with a fault planted in them.
"""

import ast
import gzip
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from bs4 import BeautifulSoup
from nbformat import NotebookNode

from localgpt_core.cli.figures import page_figures

REPOSITORY = yaml.safe_load((Path(__file__).parents[2] / "_config.yml").read_text())["repository"]["url"]
KINDS = ("plain", "html", "markdown")
NO_NUMBER = re.compile(r"(?i)(?<![\w.])[+-]?(nan|inf)(?![\w.])")
MAX_BYTES = 1_200_000
MAX_DEF_STATEMENTS = 7  # with the one that defines
MAX_COLUMNS = 85  # of code that stands on a page, which at 1400 pixels shows as many
MIN_ALT = 30
MIN_CAPTION = 20


# ---------------------------------------------------------------------------------------------- notebooks


def problems(notebook: NotebookNode, chapter: bool = True) -> list[str]:
    """Return the faults of one executed notebook; some rules hold for chapters only."""
    checks = CHECKS | CHAPTER_CHECKS if chapter else CHECKS
    return [f"{name}: {fault}" for name, check in checks.items() for fault in check(notebook)]


def executed_in_order(notebook: NotebookNode) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"cells carry the execution counts {counts}, not 1 to {len(counts)}"
    if not counts:
        yield "there is no code cell"


def clean_outputs(notebook: NotebookNode) -> Iterator[str]:
    if notebook.metadata.get("widgets"):
        yield "the notebook stores widget state"
    for place, output in outputs(notebook):
        if output.output_type == "error":
            yield f"{place} shows {output.ename}: {output.evalue}"
        if output.get("name") == "stderr":
            yield f"{place} prints to stderr: {output.text.strip()[:60]!r}"
        if "data" in output and not any(output.data.values()):
            yield f"{place} has an output that shows nothing, as a bar leaves behind; run it by make execute"
        for kind in output.get("data", {}):
            if "widget" in kind or "javascript" in kind:
                yield f"{place} shows {kind}, which is blank on the page"
            if kind in ("image/png", "image/jpeg"):
                yield f"{place} shows {kind}, which is blurred where it is enlarged; see use_style"
            if kind == "image/svg+xml" and "dc:date" in "".join(output.data[kind]):
                yield f"{place} shows SVG that holds the date; see use_style"


def shows_numbers(notebook: NotebookNode) -> Iterator[str]:
    """Yield outputs in which something stands that is no number where one was meant; a dash says that."""
    for place, output in outputs(notebook):
        shown = [output.get("text", ""), *(output.get("data", {}).get(f"text/{kind}", "") for kind in KINDS)]
        for text in ("".join(part) for part in shown):
            if not text.startswith("```") and (
                found := re.search(r"(?i)(?<![\w.])[+-]?(nan|inf)(?![\w.])", text)
            ):
                yield f"{place} shows {found[0]!r}"


def small(notebook: NotebookNode) -> Iterator[str]:
    size = len(nbformat.writes(notebook).encode())
    if size > MAX_BYTES:
        yield f"{size} bytes, more than {MAX_BYTES}"


def figures_are_described(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for alt in re.findall(r"!\[([^\]]*)\]\(", cell.source):
                yield from alt_problems(alt, f"cell {number}")
        kinds = [" ".join(output.get("data", {})) for output in cell.get("outputs", [])]
        images = [kind for kind in kinds if re.search(r"(^| )image/", kind)]
        if not images:
            continue
        mystnb = cell.metadata.get("mystnb", {})
        yield from alt_problems(mystnb.get("image", {}).get("alt"), f"cell {number}")
        figure = mystnb.get("figure", {})
        if len(figure.get("caption", "").strip()) < MIN_CAPTION:
            yield f"cell {number} has a figure without a caption (metadata mystnb.figure.caption)"
        if not figure.get("name"):
            yield f"cell {number} has a figure without a name (metadata mystnb.figure.name)"
        if len(images) > 1:
            yield f"cell {number} shows {len(images)} images under one caption"


def alt_problems(alt: str | None, place: str) -> Iterator[str]:
    alt = (alt or "").strip()
    if len(alt) < MIN_ALT or " " not in alt or re.search(r"\.(png|svg|jpe?g|gif)$", alt):
        yield f"{place} has an image whose alt text says too little: {alt!r}"


def figures_name_their_source(notebook: NotebookNode) -> Iterator[str]:
    """Yield figures from records whose caption has no `suite`, and live ones that do not say so."""
    try:
        figures = [*page_figures(notebook.cells, Path("page"))]
    except SyntaxError:
        return  # which calls_the_package tells
    for figure in figures:
        for suite in figure.suites:
            if f"`{suite}`" not in figure.caption:
                yield f"{figure.name} is drawn from suite {suite}, which its caption does not name"
        if figure.live and not re.search(r"(?i)\blive\b|\b(?:of|in) this page\b", figure.caption):
            yield f"{figure.name} shows runs of this page, and its caption does not say that they are live"


def tables_are_described(notebook: NotebookNode) -> Iterator[str]:
    for place, output in outputs(notebook):
        page = BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser")
        for table in page.find_all("table"):
            if not table.find("caption"):
                yield f"{place} has a table without a caption"
            if any(not header.get_text(strip=True) for header in table.find_all("th")):
                yield f"{place} has a table with an empty header; hide the index or name it"


def code_fits_the_page(notebook: NotebookNode) -> Iterator[str]:
    """Yield lines of code, of cells that a page shows, which it would have to scroll."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and not {"remove-cell", "remove-input"} & {
            *cell.metadata.get("tags", [])
        }:
            for line in cell.source.splitlines():
                if len(line) > MAX_COLUMNS:
                    yield f"cell {number} has a line of {len(line)} columns, over {MAX_COLUMNS}: {line}"


def shows_what_it_makes(notebook: NotebookNode) -> Iterator[str]:
    """Yield tables and sentences that are made and not shown, and folded code that shows nothing."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        with suppress(SyntaxError):  # which another check names
            for statement in ast.parse("\n".join(lines)).body[:-1]:
                made = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
                if made and ast.unparse(statement.value.func) in ("show_table", "say", "source_of"):
                    yield f"cell {number} makes what only the last line of a cell would show"
        folded = "hide-input" in cell.metadata.get("tags", [])
        if folded and not cell.outputs and cell is not code_cells(notebook)[0]:  # which imports
            yield f"cell {number} is folded away and shows nothing: tag it remove-cell"


def calls_the_package(notebook: NotebookNode) -> Iterator[str]:
    """Yield functions that belong in the package, and training loops, which `train` already has."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        try:
            tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", cell.source))
        except SyntaxError as error:
            yield f"cell {number} is not Python: {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                count = sum(isinstance(part, ast.stmt) for part in ast.walk(node))
                if count > MAX_DEF_STATEMENTS:
                    yield f"cell {number} defines {node.name}: {count} statements, over {MAX_DEF_STATEMENTS}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                bare_step = node.func.attr == "step" and not node.args and not node.keywords
                if node.func.attr in ("backward", "zero_grad") or bare_step:
                    yield f"cell {number} has a training loop of its own (.{node.func.attr})"


def stands_alone(notebook: NotebookNode) -> Iterator[str]:
    """Yield what ties a notebook to one machine or to a network."""
    folders = "home|root|tmp|usr|var|opt|mnt|work|data|content|Users|private"
    path = rf"(?<![\w.:/<])/(?:{folders})/|\b[A-Z]:\\|file://"
    network = r"https?://|\b(?:urllib|requests|httpx|urlretrieve|wget|curl|pooch)\b|[%!] ?pip\b|\.download\("
    for number, cell in enumerate(notebook.cells):
        if match := re.search(path, cell.source):
            yield f"cell {number} holds an absolute path: {match.group()!r}"
        if cell.cell_type == "code" and (match := re.search(network, cell.source)):
            yield f"cell {number} reaches for the network: {match.group()!r}"
    for place, output in outputs(notebook):
        text = output.get("text", "") + "".join(
            value for kind, value in output.get("data", {}).items() if kind.startswith("text/")
        )
        if match := re.search(path, text):
            yield f"{place} shows an absolute path: {match.group()!r}"


def no_typed_results(notebook: NotebookNode) -> Iterator[str]:
    """Yield decimals and percentages in prose, outside code and mathematics and without a citation."""
    decimal = r"(?<![\w.,])\d+(?:\.\d+(?:[eE][-+]?\d+)?|[eE]-?\d+)(?![\w]|\.\d)"
    percentage = r"(?<![\w.,])\d+(?:\.\d+)?\s?%"
    for number, cell in enumerate(notebook.cells):
        for sentence in sentences(cell.source if cell.cell_type == "markdown" else said(cell.source)):
            if CITED in sentence:
                continue
            for match in re.finditer(f"{percentage}|{decimal}", sentence):
                if re.sub(r"\s", "", match.group()) != "95%":  # the level of the intervals, not a result
                    yield f"cell {number} types {match.group()!r} in {sentence.strip()[:80]!r}"


def said(code: str) -> str:
    """Return what the cell of ``code`` types in the sentences that it says; what it computes is left out."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return ""  # which calls_the_package tells
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "say"
    ]
    texts = []
    for text in (argument for call in calls for argument in call.args):
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        texts.append("".join(part.value for part in parts if isinstance(part, ast.Constant)))
    return "\n\n".join(texts)


CITED = "\N{REFERENCE MARK}"  # stands for a citation in a sentence


def sentences(markdown: str) -> list[str]:
    """Return the prose of a Markdown cell by sentence, list item and table row, without code and formulas."""
    text = "\n".join(prose_lines(markdown))
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"(?s)\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", text)
    text = re.sub(r"\$\s*([\d.]+(?:\s*\\?%)?)\s*\$", r"\1", text)  # a bare number in dollars is prose
    text = re.sub(r"\$[^$\n]+\$", "", text)
    text = re.sub(r"\{cite[^}]*\}`[^`]*`", CITED, text)
    text = re.sub(r"\{[\w:-]+\}`[^`]*`|`+[^`]*`+", "", text)
    text = re.sub(r"\[Table [\d.]+\]\(#T_", "](", text)  # the built pages' tests compare these
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "]", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.\s))", text)
    return [part for block in blocks for part in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", block))]


def prose_lines(markdown: str) -> Iterator[str]:
    """Yield the lines outside code and formula blocks; a directive with text in it, as {note}, is prose."""
    fences: list[tuple[str, bool]] = []  # of the blocks around this line: the marker, and whether it is code
    for line in markdown.splitlines():
        if fence := re.match(r"\s*(`{3,}|~{3,}|:{3,})\s*(?:\{([^}]*)\})?(.*)", line):
            marker, directive, rest = fence.groups()
            if fences and not directive and not rest.strip() and marker.startswith(fences[-1][0]):
                fences.pop()
            else:
                is_code = directive is None or bool(re.match(r"math|code|literalinclude", directive))
                fences.append((marker, is_code))
                if not is_code:
                    yield rest
        elif not any(is_code for _, is_code in fences) and not re.match(r"\s*:[\w-]+:(?!`)", line):
            yield line


def imports_after_its_question(notebook: NotebookNode) -> Iterator[str]:
    """Yield a first cell of code that stands before the reader knows why, or below the first screen."""
    first = next((n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code"), 0)
    above = "\n".join(cell.source for cell in notebook.cells[:first])
    if not re.search(r"(?m)^# .", above) or "**The question.**" not in above:
        yield f"cell {first}, the first one of code, stands above the title or the question"
    if re.search(r"(?m)^## ", above):
        yield f"cell {first}, the first one of code, stands below the first section"


def asserts_its_result(notebook: NotebookNode) -> Iterator[str]:
    if not any(re.search(r"(?m)^\s*assert\b", cell.source) for cell in code_cells(notebook)):
        yield "no cell asserts the sign of an effect"


def has_exercises(notebook: NotebookNode) -> Iterator[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    option = r"(?:[ \t]*:[\w-]+:.*\n)*?[ \t]*"
    labels = re.findall(rf"\{{exercise(?:-start)?\}}.*\n{option}:label:\s*(\S+)", text)
    hidden = re.findall(rf"\{{solution(?:-start)?\}}[ \t]+(\S+)[ \t]*\n{option}:class:.*\bdropdown\b", text)
    if not labels:
        yield "there is no exercise with a label"
    for label in sorted(set(labels) - set(hidden)):
        yield f"exercise {label} has no solution that is hidden (:class: dropdown)"


def leads_on(notebook: NotebookNode) -> Iterator[str]:
    """Yield that a chapter does not end with a link to what comes next."""
    *_, last = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if not re.match(r"## Next\n\n(?s:.*)\[\]\([^)]+\.ipynb\)", last):
        yield "the last words are no section 'Next' with a link to another page"


def says_its_limits(notebook: NotebookNode) -> Iterator[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if not re.search(r"(?mi)^#+ .*does not show", text):
        yield "no heading 'What this does not show'"


CHECKS = {
    check.__name__: check
    for check in (
        executed_in_order,
        clean_outputs,
        small,
        figures_are_described,
        figures_name_their_source,
        code_fits_the_page,
        shows_what_it_makes,
        tables_are_described,
        shows_numbers,
        calls_the_package,
        stands_alone,
        no_typed_results,
    )
}
CHAPTER_CHECKS = {
    check.__name__: check
    for check in (imports_after_its_question, asserts_its_result, has_exercises, says_its_limits, leads_on)
}


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield f"cell {number}", output


# ------------------------------------------------------------------------------------------- built pages


def site_problems(page: Path, site: Path) -> list[str]:
    """Return the faults of one built HTML page of ``site``."""
    html = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    found = [f"loads {url}" for url in resources(html) if is_external(url)]
    found += [
        f"an inline script or style names {url}"
        for tag in html.find_all(["script", "style"])
        for url in re.findall(INLINE_LOAD, tag.string or "")
    ]

    searches = html.select("input[type=search]")
    if len(searches) != 1:
        found.append(f"has {len(searches)} search boxes")
    if number := re.match(r"(\d+)-", page.name) if page.parent.name == "chapters" else None:
        starts = {
            "article h1": "{}. ",
            "caption .caption-number": "Table {}.",
            "figcaption .caption-number": "Fig. {}.",
        }
        for selector, start in starts.items():
            for text in (shown.get_text() for shown in html.select(selector)):
                if not text.startswith(start.format(int(number[1]))):
                    found.append(f"does not count with its number: {text.strip()}")
    found += table_problems(html)
    if (weight := page_weight(page, html)) > HEAVIEST_PAGE:
        found.append(f"weighs {weight / 1e6:.2f} MB")
    if not html.select("meta[name=description]") and html.select("article.bd-article h1"):
        found.append("has no description")
    if html.select('meta[property="og:site_name"][content="Project name not set"]'):
        found.append("is of a site without a name")
    if html.select(".math") and not html.select("script[src*=mathjax]"):
        found.append("has mathematics and no MathJax")
    for image in html.select("article img"):
        found += alt_problems(image.get("alt"), str(image.get("src")))
    for button in html.select("button, .article-header-buttons a"):
        if not (button.get_text(strip=True) or button.get("aria-label") or button.get("title")):
            if not button.get("data-bs-original-title") and not button.find(["svg", "i", "img"]):
                found.append(f"has an empty button: {str(button)[:80]}")
    for link in html.select(".article-header-buttons a[href], nav a[href], .sidebar-primary-item a[href]"):
        if is_external(link["href"]) and not REPOSITORY:
            found.append(f"has a theme button that leaves the book: {link['href']}")
    for url in [*resources(html), *(link["href"] for link in html.select("a[href]"))]:
        target = unquote(urlsplit(url).path)
        if target and not urlsplit(url).scheme and not is_external(url):
            if not (page.parent / target).exists():
                found.append(f"points to {url}, which does not exist")
    return found


def table_problems(html: BeautifulSoup) -> list[str]:
    """Return the tables without a number, and the links that call one by another than its own."""
    found = []
    numbers = {}
    for table in html.select("article table[id]"):
        number = table.select_one("caption .caption-number")
        if number is None:
            found.append(f"has a table without a number: {table['id']}")
        else:
            numbers[f"#{table['id']}"] = number.get_text(strip=True)
    for link in html.select('article a[href^="#T_"]'):
        name = " ".join(link.get_text().split())
        if numbers.get(link["href"]) != name:
            found.append(f"calls {name} what is {numbers.get(link['href'])}: {link['href']}")
    return found


def page_weight(page: Path, html: BeautifulSoup) -> int:
    """Return the bytes that a server sends for a page with all it loads, compressed as servers do.

    Of a drawing that is there for two themes one is sent. What a script fetches later, such as a font of
    MathJax, is not in it.
    """
    dark = {image["src"] for image in html.select("img.in-dark")}
    loaded = {(page.parent / unquote(urlsplit(url).path)).resolve() for url in {*resources(html)} - dark}
    return sum(map(sent_bytes, {page.resolve(), *(file for file in loaded if file.is_file())}))


@cache
def sent_bytes(file: Path) -> int:
    """Return the size of ``file``, compressed unless it is already."""
    content = file.read_bytes()
    return len(content) if file.suffix in (".png", ".woff", ".woff2") else len(gzip.compress(content, 6))


def resources(html: BeautifulSoup) -> list[str]:
    """Return the addresses that a browser loads together with the page."""
    urls = [link["href"] for link in html.select("link[href]") if not set(link["rel"]) & NOT_LOADED]
    urls += [tag["src"] for tag in html.select("[src]")]
    for tag in html.select("[srcset]"):
        urls += [part.split()[0] for part in tag["srcset"].split(",") if part.strip()]
    urls += [tag["data"] for tag in html.select("object[data]")]
    for tag in html.select("[style]"):
        urls += re.findall(r"url\(['\"]?([^'\")]+)", tag["style"])
    return urls


HEAVIEST_PAGE = 1_500_000  # bytes
INLINE_LOAD = r"""(?:@import|url\(|import|src\s*=)\s*\(?["']?(https?://[^"')\s]+)"""
NOT_LOADED = {"next", "prev", "index", "search", "canonical", "author", "license", "alternate", "help"}


def stylesheet_problems(stylesheet: Path) -> list[str]:
    """Return the external files that a stylesheet loads."""
    text = stylesheet.read_text(encoding="utf-8")
    found = re.findall(r"""(?:@import\s+(?:url\()?|url\()\s*["']?((?:https?:)?//[^"')\s]+)""", text)
    return [f"loads {url}" for url in found]


def is_external(url: str) -> bool:
    return url.startswith("//") or urlsplit(url).scheme in ("http", "https", "ftp")
