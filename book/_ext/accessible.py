"""What a reader who does not see the page depends on.

A figure without alternative text is warned of, and so fails the build: myst-nb would give it the
name of its file, which a screen reader reads out. The text belongs into the cell's metadata,
``{"mystnb": {"image": {"alt": "…"}}}``. The bibliography loses the role of a list, which Sphinx
gives it although its entries are no list items. The arrow that unfolds the side pages of a chapter
gets the name that the theme leaves out. And a figure of several panels is marked as wide: on a
telephone it keeps a size at which its labels can be read, and scrolls (see the style sheet).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import imagesize
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

WIDE = 900  # pixels of a picture whose labels cannot be read at the width of a telephone


def is_written(alt: str, uri: str) -> bool:
    """Whether ``alt`` is words somebody wrote, and not the image's path or file name."""
    return " " in alt.strip() and PurePosixPath(uri).name not in alt


def check_images(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for image in doctree.findall(nodes.image):
        if not is_written(image.get("alt", ""), image.get("uri", "")):
            where = image.get("uri", "an image")
            logger.warning("%s has no alternative text", where, location=(docname, image.line))


def mark_wide(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for figure in doctree.findall(nodes.figure):
        for image in figure.findall(nodes.image):
            width, _ = imagesize.get(Path(app.srcdir) / image["uri"])
            if width >= WIDE:
                # The theme puts an output that scrolls into the order of tabs.
                figure["classes"] += ["output", "wide"]


def drop_list_role(app: Sphinx, pagename: str, template: str, context: dict, doctree: Any) -> None:
    wrong = '<div role="list" class="citation-list">'
    context["body"] = context.get("body", "").replace(wrong, '<div class="citation-list">')


def name_arrows(app: Sphinx, pagename: str, template: str, context: dict, doctree: Any) -> None:
    navigation = context.get("generate_toctree_html")
    if navigation:
        context["generate_toctree_html"] = lambda *args, **options: str(
            navigation(*args, **options)
        ).replace("<summary>", '<summary aria-label="Side pages">')


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", check_images)
    app.connect("doctree-resolved", mark_wide)
    app.connect("html-page-context", drop_list_role)
    app.connect("html-page-context", name_arrows, priority=900)  # after the theme's own
    return {"parallel_read_safe": True, "parallel_write_safe": True}
