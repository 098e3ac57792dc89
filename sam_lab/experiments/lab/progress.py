"""Progress of an experiment on stderr: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_EVERY = 30.0  # seconds between plain lines inside one run


class Progress:
    """Counts finished runs; inside one, :meth:`update` counts its steps."""

    def __init__(self, title: str, total: int, shown: bool = True) -> None:
        self.title, self.total, self.shown = title, total, shown
        self.done, self._fraction, self._task, self._last = 0, 0.0, "", 0.0
        self._bar = _tqdm(title, total) if shown and sys.stderr.isatty() else None

    def start(self, task: str) -> None:
        """A run begins."""
        self._task, self._fraction, self._last = task, 0.0, time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(task)

    def update(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the run are made; cheap enough to call at every step."""
        fraction = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        self._advance(fraction)
        if self._bar is None and self.shown and time.monotonic() - self._last > _LINE_EVERY:
            self._last = time.monotonic()
            self._print(f"{self._task}: {done} of {total}")

    def finish(self, seconds: float) -> None:
        """The run is finished and, where runs are kept, kept."""
        self._advance(1.0)
        self.done += 1
        if self._bar is None and self.shown:
            self._print(f"{self.done}/{self.total}  {self._task}  {seconds:.1f} s")

    def skip(self, task: str) -> None:
        """The run was found finished."""
        self._task, self._fraction = task, 0.0
        self._advance(1.0)
        self.done += 1
        if self._bar is None and self.shown:
            self._print(f"{self.done}/{self.total}  {task}  kept from before")

    def close(self) -> None:
        """No more to come."""
        if self._bar is not None:
            self._bar.close()

    def _advance(self, fraction: float) -> None:
        if self._bar is not None:
            self._bar.update(fraction - self._fraction)
        self._fraction = fraction

    def _print(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def _tqdm(title: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
    return tqdm(total=total, desc=title, bar_format=form, dynamic_ncols=True, file=sys.stderr)
