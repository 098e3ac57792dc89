"""States from which one run of an experiment goes on after an interruption."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sam_lab.state import save_whole

__all__ = ["Checkpoints"]


class Checkpoints:
    """Named states of one run, one file each; what is saved last under a name is what it has.

    Args:
        folder: made with the first state. None: nothing is kept, and nothing is found.
        every: seconds from one state that is saved to the next, whatever their names.

    Attributes:
        seconds: that the run has taken so far, before an interruption up to the last state.
    """

    def __init__(self, folder: Path | None = None, every: float = 60.0) -> None:
        self.folder, self.every = folder, every
        self._before, self._began = 0.0, time.perf_counter()
        self._saved = self._began

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def save(self, name: str, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep ``state()``, which holds tensors, numbers, text and containers of them, if it is
        time to; so cheap otherwise that it may be called at every step."""
        if self.folder is None or time.perf_counter() - self._saved < self.every:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_whole({"seconds": self.seconds, "state": dict(state())}, self._path(name))
        self._saved = time.perf_counter()

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The state of this name, its tensors on the device; None where there is none whole."""
        if self.folder is None:
            return None
        try:
            kept = torch.load(self._path(name), map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return None
        self._before = max(self._before, kept["seconds"])
        state: dict[str, Any] = kept["state"]
        return state

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.pt"
