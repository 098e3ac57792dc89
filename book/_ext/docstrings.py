"""Let docstrings be written as they read best in code, and still come out right in the book.

Sphinx takes a docstring for reStructuredText, where ``|g|`` is a substitution, ``$x$`` is not a
formula and a Markdown table is one long line. Norms are escaped, formulas and tables become what
they are; single backticks are code by the setting ``default_role``.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

ROW = re.compile(r"^\s*\|(.*)\|\s*$")
RULE = re.compile(r"^\s*\|[\s:|-]+\|\s*$")
CODE = re.compile(r"(``.*?``|`[^`]*`)")
FORMULA = re.compile(r"\$([^$`\n]+)\$")


def prose(line: str) -> str:
    """A line with its formulas as ``math`` and every other ``|`` as a character of its own."""
    line = FORMULA.sub(r":math:`\1`", line)
    return "".join(p if "`" in p else p.replace("|", r"\|") for p in CODE.split(line))


def list_table(rows: list[str]) -> list[str]:
    """A Markdown table, header and rule first, as the directive ``list-table``."""
    table = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        for number, cell in enumerate(ROW.match(row)[1].split("|")):
            table.append(f"   {'* -' if number == 0 else '  -'} {cell.strip()}")
    return [*table, ""]


def display(lines: list[str]) -> list[str]:
    """A formula of its own, from ``$$`` to ``$$``, as the directive ``math``."""
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    formula = " ".join(line.strip() for line in lines).strip("$").strip()
    return ["", f"{indent}.. math::", "", f"{indent}   {formula}", ""]


def convert(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText; literal blocks stay as they are."""
    out: list[str] = []
    literal: int | None = None  # the indentation under which a literal block is
    at = 0
    while at < len(lines):
        line = lines[at]
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if (
            literal is None
            and at + 1 < len(lines)
            and ROW.match(line)
            and RULE.match(lines[at + 1])
        ):
            end = at
            while end < len(lines) and ROW.match(lines[end]):
                end += 1
            out += list_table(lines[at:end])
            at = end
            continue
        if literal is None and line.lstrip().startswith("$$"):
            end = at + 1
            while end < len(lines) and "".join(lines[at:end]).count("$$") < 2:
                end += 1
            out += display(lines[at:end])
            at = end
            continue
        plain = literal is not None or line.lstrip().startswith((".. ", ">>> ", "... "))
        out.append(line if plain else prose(line))
        if literal is None and line.rstrip().endswith("::"):
            literal = indent
        at += 1
    return out


def process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = convert(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
