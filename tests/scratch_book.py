"""A small book of its own, with the real book's configuration, style and scripts, for the tests."""

import shutil
from pathlib import Path

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
