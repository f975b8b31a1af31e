"""What the pages say of themselves elsewhere, with and without the address of a repository."""

import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from sphinx.errors import ConfigError

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "book/_ext"), str(ROOT / "tools")]
import colab  # noqa: E402
import published  # noqa: E402  an extension of Sphinx, which is no package


def app(address):
    loaded = []
    options = {"repository_url": address}
    config = SimpleNamespace(html_theme_options=options, html_baseurl="", html_title="The book")
    return SimpleNamespace(config=config, loaded=loaded, setup_extension=loaded.append)


def test_without_an_address_nothing_leads_out():
    sphinx = app("")
    published.setup(sphinx)
    assert sphinx.loaded == ["sphinxext.opengraph"] and sphinx.config.html_baseurl == ""
    assert sphinx.config.html_theme_options == {"repository_url": ""}
    assert sphinx.config.ogp_enable_meta_description is True and sphinx.config.ogp_site_name == "The book"


def test_an_address_gives_the_pages_theirs_buttons_and_a_sitemap():
    sphinx = app("https://github.com/Ada/book")
    published.setup(sphinx)
    assert sphinx.loaded == ["sphinxext.opengraph", "sphinx_sitemap"]
    assert sphinx.config.html_baseurl == sphinx.config.ogp_site_url == "https://ada.github.io/book/"
    assert sphinx.config.ogp_image == "https://ada.github.io/book/_static/final-losses.png"
    assert (ROOT / "book/_static/final-losses.png").is_file()
    options = sphinx.config.html_theme_options
    assert options["use_repository_button"] and {"binderhub_url", "colab_url"} <= {*options["launch_buttons"]}
    assert options["repository_branch"] == "main"


@pytest.mark.parametrize(
    ("address", "pages"),
    {
        "https://github.com/ada/book": "https://ada.github.io/book/",
        "https://github.com/ada/book.git/": "https://ada.github.io/book/",
        "https://github.com/ada/ada.github.io": "https://ada.github.io/",
    }.items(),
)
def test_pages_are_where_github_publishes_them(address, pages):
    assert published.pages_address(address) == pages


@pytest.mark.parametrize(
    "address", ["github.com/ada/book", "https://gitlab.com/ada/book", "https://github.com/ada"]
)
def test_another_address_is_refused_by_name(address):
    with pytest.raises(ConfigError, match=r"repository\.url='.*' must be https://github\.com/OWNER/NAME"):
        published.pages_address(address)


def test_notebooks_have_the_cell_for_colab_that_the_address_asks_for():
    pages = colab.book_pages(ROOT / "book")
    assert len(pages) > 15
    for page in pages:
        notebook = nbformat.read(page, as_version=4)
        ids = [cell["id"] for cell in notebook.cells]
        colab.prepare(notebook, colab.address())
        assert ids == [cell["id"] for cell in notebook.cells], f"{page.name}: run tools/colab.py"


def test_the_cell_for_colab_comes_goes_and_follows_the_address():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title", id="title")])
    colab.prepare(notebook, "https://github.com/ada/book")
    colab.prepare(notebook, "https://github.com/ada/other")
    title, cell = notebook.cells
    assert title["id"] == "title" and cell["metadata"]["tags"] == ["remove-cell"]
    assert "git clone --quiet --depth 1 https://github.com/ada/other localgpt\n" in cell["source"]
    nbformat.validate(notebook)
    colab.prepare(notebook, "")
    assert [cell["id"] for cell in notebook.cells] == ["title"]
