"""The floors: the imports, the contracts in pyproject.toml and the pictures of ARCHITECTURE.md."""

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]["contracts"]
FLOORS = {
    contract["containers"][0]: contract["layers"]
    for contract in CONTRACTS
    if contract["type"] == "layers"
}


def test_imports_point_down():
    linter = pytest.importorskip("importlinter.cli")
    done = CliRunner().invoke(
        linter.lint_imports_command, ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    )
    assert done.exit_code == 0, done.output


def test_the_pictures_show_the_floors_that_the_linter_holds():
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    pictures = re.findall(r"`(sam_lab[\w.]*)`[^`]*:\n\n```text\n(.*?)\n```", page, re.DOTALL)
    assert {name: picture.splitlines() for name, picture in pictures} == FLOORS


def test_each_room_of_the_library_has_its_line_in_the_table():
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    told = {name for cell in re.findall(r"^\| (`.*?) \|", page, re.M) for name in cell.split(", ")}
    rooms = {room for floor in FLOORS["sam_lab"] for room in floor.split(" | ")}
    assert {name.strip("`") for name in told} == rooms - {"_optional"}
