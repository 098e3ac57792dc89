"""Keep every page free of requests to other hosts.

``sphinx-thebe``, which Jupyter Book always loads, puts a script on every page that points at a
content delivery network and declares its constants twice, an error in the console. The book offers
no live kernel in the page, so both of its scripts go. MathJax itself comes from
``sphinx-mathjax-offline``.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def is_thebe(script: Any) -> bool:
    """Whether a script of the page, as Sphinx keeps it, is one of sphinx-thebe's."""
    body = (getattr(script, "attributes", None) or {}).get("body") or ""
    return "THEBE_JS_URL" in body or "sphinx-thebe" in str(getattr(script, "filename", script))


def drop_thebe(app: Sphinx, pagename: str, template: str, context: dict, doctree: Any) -> None:
    scripts = context.get("script_files")
    if scripts:
        scripts[:] = [script for script in scripts if not is_thebe(script)]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
