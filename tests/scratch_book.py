"""A small book of its own, with the real book's configuration, style and scripts, for the tests."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
from book_tool import ROOT, book
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


def shown(source: str, **data: str) -> nbformat.NotebookNode:
    """A code cell that was executed and has shown these types of contents."""
    bundle = {f"text/{kind}": value for kind, value in data.items()}
    output = new_output("execute_result", bundle, execution_count=1)
    return new_code_cell(source, outputs=[output], execution_count=1)


def render(root: Path, **pages: list[str | nbformat.NotebookNode]) -> Path:
    """Render these pages, lists of Markdown and code cells, and return the folder they lie in.

    ``index`` is the first page. Pages whose names begin with ``aside`` become sections of the one
    before them.
    """
    folder = root / "book"
    folder.mkdir(parents=True)
    (root / "sam_lab").mkdir()
    (folder / "references.bib").touch()
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copy(ROOT / "constraints.txt", root)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("_static", "_ext"):
        shutil.copytree(ROOT / "book" / name, folder / name, ignore=ignore)
    listed = ["format: jb-book", "root: book/index", "parts:", "- caption: Part", "  chapters:"]
    for name, cells in pages.items():
        made = [new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
        notebook = new_notebook(cells=made)
        nbformat.write(book.clean(notebook, root), folder / f"{name}.ipynb")
        if name.startswith("aside"):
            listed += ["    sections:", f"    - file: book/{name}"]
        elif name != "index":
            listed.append(f"  - file: book/{name}")
    (root / "_toc.yml").write_text("\n".join(listed) + "\n")
    book.render(root)
    return root / "_build" / "html" / "book"


def visits(browser: Any, folder: Path) -> Iterator[Callable[..., Any]]:
    """For a fixture: what opens a page in a window of its own.

    In the end none of the book's own scripts must have failed, and nothing been asked for
    elsewhere.
    """
    contexts, complaints, requests = [], [], []

    def open_page(name: str, *, script: str = "", javascript: bool = True, **options: Any) -> Any:
        """``name`` with what follows it in the address; ``script`` runs before the page's own."""
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        context = browser.new_context(java_script_enabled=javascript, **options)
        contexts.append(context)
        context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(error.stack or ""))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{folder.as_uri()}/{name}")
        if javascript:
            page.evaluate("() => window.MathJax?.startup?.promise")
            page.wait_for_timeout(200)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [one for one in complaints if re.search(r"(predictions|ledger)\.js", one)] == []
    assert {urlsplit(url).scheme for url in requests} <= {"file", "data", "blob"}


def findings(page: Any) -> list[str]:
    """What axe finds in the page's text, of whatever weight."""
    from axe_playwright_python.sync_playwright import Axe

    rules = {"rules": {"region": {"enabled": False}}}  # the theme's
    found = Axe().run(page, context="article", options=rules).response["violations"]
    return [f"{one['id']}: {node['html'][:100]}" for one in found for node in one["nodes"]]
