"""What an installed distribution needs, from its metadata."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed_by(*names: str) -> set[str]:
    """These distributions and all that they require."""
    todo, seen = list(names), set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        requirements = map(Requirement, lines)
        todo += [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    return seen
