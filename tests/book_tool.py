"""tools/book.py as a module, for the tests: it is a program and lies in no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
ROOT = Path(__file__).parents[1]

_specification = importlib.util.spec_from_file_location("sam_lab_book", ROOT / "tools" / "book.py")
book = importlib.util.module_from_spec(_specification)
sys.modules["sam_lab_book"] = book
_specification.loader.exec_module(book)
