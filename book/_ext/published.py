"""What the pages say of themselves elsewhere, and the ways from them to the repository once there is one.

Every page has a description and OpenGraph's tags, from its first sentences. Where `repository.url` in
_config.yml holds the address of a repository on GitHub, the pages also have buttons for it, for Binder and
for Colab (whose cell in the notebooks tools/colab.py writes), their own addresses on GitHub Pages, and a
sitemap; without it nothing on a page leads out of the book.
"""

from urllib.parse import urlsplit

from sphinx.errors import ConfigError

LAUNCH = {
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
    "notebook_interface": "jupyterlab",
}


def pages_address(repository: str) -> str:
    """Return where GitHub Pages publishes ``repository``, an address on GitHub."""
    parts = urlsplit(repository)
    names = parts.path.strip("/").removesuffix(".git").split("/")
    if (parts.scheme, parts.netloc) != ("https", "github.com") or len(names) != 2 or not all(names):
        raise ConfigError(f"repository.url={repository!r} must be https://github.com/OWNER/NAME, or empty")
    owner, name = names
    return f"https://{owner.lower()}.github.io/{'' if name == f'{owner}.github.io' else f'{name}/'}"


def lead_out(app, address: str) -> None:
    """Give the pages what needs the ``address`` of the repository."""
    app.config.html_baseurl = app.config.ogp_site_url = pages_address(address)
    app.config.ogp_image = f"{app.config.html_baseurl}_static/final-losses.png"
    app.config.sitemap_url_scheme = "{link}"
    app.config.html_theme_options |= {
        "use_repository_button": True,
        "repository_branch": "main",
        "launch_buttons": LAUNCH,
    }
    app.setup_extension("sphinx_sitemap")


def setup(app) -> dict[str, bool]:
    """Describe the pages, and lead out of the book where that leads anywhere."""
    app.setup_extension("sphinxext.opengraph")
    app.config.ogp_site_name = app.config.html_title
    app.config.ogp_enable_meta_description = True
    app.config.ogp_social_cards = {"enable": False}
    if address := app.config.html_theme_options.get("repository_url"):
        lead_out(app, address)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
