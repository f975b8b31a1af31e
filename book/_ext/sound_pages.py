"""Take out of the built pages what makes a browser or a screen reader stumble and is not ours.

Every page would load two copies of the settings of Thebe, a button that this book has switched off, and the
second copy is an error. Names that are read aloud instead of the words that are seen do not hold them: these
words are the name then. `make check-browser` finds more of the kind after an update.
"""

from pathlib import Path

THEBE = ("THEBE_JS_URL", "sphinx-thebe.js")
REPLACED = {
    # Of a cell whose code is folded away, the summary says what a click does.
    '<summary aria-label="Toggle hidden content">': "<summary>",
    # The button of the search has its words, and the title where it is only a picture.
    ' title="Search" aria-label="Search"': ' title="Search"',
    # An entry of the bibliography, which is a list.
    ' role="doc-biblioentry"': ' role="listitem"',
    # Pictures inside the button "Color mode", whose titles would become words of it.
    **{f' title="{name}"></i>': "></i>" for name in ("Light", "Dark", "System Settings")},
}


def drop_thebe(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Take Thebe's scripts from the list of a page."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        script
        for script in scripts
        if not any(name in f"{script.filename} {script.attributes.get('body')}" for name in THEBE)
    ]


def replace(app, exception: Exception | None) -> None:
    """Replace in all built pages."""
    if exception is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = before = page.read_text(encoding="utf-8")
        for old, new in REPLACED.items():
            text = text.replace(old, new)
        if text != before:
            page.write_text(text, encoding="utf-8")


def setup(app) -> dict[str, bool]:
    """Register both; the scripts of all extensions are on the list by then."""
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", replace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
