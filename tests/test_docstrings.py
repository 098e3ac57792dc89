"""Docstrings as they read best in code come out right in the book, and their examples are true."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import sam_lab

FILE = Path(__file__).parent.parent / "book" / "_ext" / "docstrings.py"


@pytest.fixture(scope="module")
def docstrings():
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("docstrings_extension", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "formula",
    [
        ["  $$a = b,$$"],
        ["  $$a", "    = b,$$"],
        ["  $$", "  a = b,", "  $$"],
    ],
)
def test_a_formula_of_its_own_is_one_whatever_lines_it_takes(docstrings, formula):
    found = docstrings.convert(["  Then", "", *formula, "", "  for |g| > 0."])
    math = ["", "  .. math::", "", "     a = b,", ""]
    assert found == ["  Then", "", *math, "", r"  for \|g\| > 0."]


def test_formulas_in_a_line_norms_and_code_are_told_apart(docstrings):
    found = docstrings.convert(["The norm |g| of $g$, `|x|` in code."])
    assert found == [r"The norm \|g\| of :math:`g`, `|x|` in code."]


def test_a_literal_block_stays_as_it_is(docstrings):
    lines = ["So::", "", "    $$a$$ |b|", "", "and |c|"]
    assert docstrings.convert(lines) == [*lines[:-1], r"and \|c\|"]


MODULES = [
    module.name
    for module in pkgutil.walk_packages(sam_lab.__path__, "sam_lab.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_print_what_they_say(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
