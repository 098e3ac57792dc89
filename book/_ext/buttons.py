"""Buttons to Colab, to the repository and to its issues, where the book knows its address.

They depend on ``repository.url`` in ``_config.yml`` and on nothing else. Jupyter Book's own
settings for them would fail a book without an address.
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.config import Config


def add_buttons(app: Sphinx, config: Config) -> None:
    if config.html_theme_options.get("repository_url"):
        config.html_theme_options.update(
            launch_buttons={"colab_url": "https://colab.research.google.com"},
            use_repository_button=True,
            use_issues_button=True,
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", add_buttons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
