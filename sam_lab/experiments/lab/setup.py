"""A paper's own set-up, and in what a config departs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

__all__ = ["Setup"]

WORDS = {
    "carried": "momentum carried",
    "train": "training examples",
    "test": "test examples",
    "measured": "examples measured",
}


@dataclass(frozen=True)
class Setup:
    """What a source says about how its experiment was made.

    Args:
        source: where the facts were read, such as ``"the paper's code"``.
        facts: the paper's value for each field of the config that the source tells; a field of a
            field has a dot, ``{"recipe.epochs": 200}``. What the source does not tell stays out:
            then nothing is compared.
        besides: what departs in every config, in words, where no field says it.
    """

    source: str
    facts: Mapping[str, Any]
    besides: Sequence[str] = ()

    def departures(self, config: Any) -> list[str]:
        """In what a config departs: ``["images 10,000 (paper: 60,000)"]``; empty where in nothing.

        Raises:
            ValueError: a fact is about a field that the config does not have.
        """
        found = []
        for path, theirs in self.facts.items():
            try:
                ours = attrgetter(path)(config)
            except AttributeError:
                raise ValueError(
                    f"facts must name fields of {type(config).__name__}, got {path!r}"
                ) from None
            if ours != theirs:
                found.append(f"{_words(path)} {_show(ours)} (paper: {_show(theirs)})")
        return [*found, *self.besides]

    def compared(self) -> str:
        """The names of what is compared: ``"data, images"``."""
        return ", ".join(_words(path) for path in self.facts)


def _words(path: str) -> str:
    name = path.rpartition(".")[2]
    return WORDS.get(name, name.replace("_", " "))


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return "–".join(_show(one) for one in value) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
