"""The programs in tools/ as modules, for the tests: they lie in no package."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import address  # noqa: E402

import book  # noqa: E402

__all__ = ["ROOT", "address", "book"]
