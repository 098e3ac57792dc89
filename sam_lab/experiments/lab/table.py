"""A table that shows wherever the book is read: Jupyter, Colab, a rendered page, a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

__all__ = ["Bullets", "Table"]


class Table:
    """Rows under a header that show as a Markdown table in Jupyter, Colab and the book.

    `lead` stands before the table, `notes` after it.
    """

    def __init__(
        self,
        header: list[str],
        rows: list[list[str]],
        notes: Iterable[str] = (),
        lead: Bullets | None = None,
    ) -> None:
        self.header, self.rows, self.notes = header, rows, list(notes)
        self.lead = lead or Bullets([])

    def _repr_markdown_(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        lead = [self.lead._repr_markdown_()] if self.lead.items else []
        return "\n\n".join([*lead, table, *self.notes])

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The same as text: one block a row, for a terminal."""
        width = max((len(name) for name in self.header), default=0)
        blocks = []
        for row in self.rows:
            lines = []
            for name, cell in zip(self.header, row, strict=True):
                head = f"{name:<{width}}  "
                lines.append(
                    textwrap.fill(cell, 100, initial_indent=head, subsequent_indent=" " * len(head))
                )
            blocks.append("\n".join(lines))
        lead = [str(self.lead)] if self.lead.items else []
        return "\n\n".join([*lead, *blocks, *self.notes]) or "nothing to show"


class Bullets:
    """Sentences that show as a Markdown list, each with points of its own below it, or none."""

    def __init__(self, items: Iterable[tuple[str, list[str]]], notes: Iterable[str] = ()) -> None:
        self.items, self.notes = list(items), list(notes)

    def _repr_markdown_(self) -> str:
        lines = []
        for text, points in self.items:
            lines.append(f"- {text}")
            lines += [f"  - {point}" for point in points]
        return "\n\n".join(["\n".join(lines), *self.notes])

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The same as text, without Markdown's stars, for a terminal."""
        blocks = []
        for text, points in self.items:
            lines = [("- ", text), *(("  - ", point) for point in points)]
            for head, words in lines:
                plain, indent = words.replace("*", ""), " " * len(head)
                blocks.append(
                    textwrap.fill(plain, 100, initial_indent=head, subsequent_indent=indent)
                )
        return "\n".join([*blocks, *self.notes]) or "nothing to show"


def _cell(text: str) -> str:
    # A bar would end the cell, and inside $...$ an escaped one would mean a norm.
    def spell(formula: re.Match[str]) -> str:
        return formula[0].replace("\\|", r"\Vert{}").replace("|", r"\vert{}")

    return re.sub(r"\$[^$]+\$", spell, " ".join(text.split())).replace("|", r"\|")
