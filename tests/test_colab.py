"""tools/colab.py: which environments there are, and that a notebook runs there as on Colab."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

pytest.importorskip("nbclient")
import colab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def asked(name: str) -> dict[str, Requirement]:
    found = map(Requirement, colab.requirements(colab.ENVIRONMENTS[name]))
    return {requirement.name: requirement for requirement in found}


# ── the environments ──────────────────────────────────────────────────────────────────────────


def test_colab_has_its_own_versions_within_the_bounds_of_the_project():
    table, packages = colab.ENVIRONMENTS["colab"].versions, asked("colab")
    assert {name: str(packages[name].specifier) for name in table} == {
        name: f"=={version}" for name, version in table.items()
    }
    for line in PROJECT["dependencies"] + EXTRAS["book"]:
        wanted = Requirement(line)
        if wanted.name in table:
            assert wanted.specifier.contains(table[wanted.name]), line
        else:
            missing = wanted.name in colab.ENVIRONMENTS["colab"].missing
            assert missing or packages[wanted.name].specifier == wanted.specifier


def test_the_lower_environment_has_every_lower_bound():
    packages = asked("lower")
    lines = PROJECT["dependencies"] + EXTRAS["book"] + EXTRAS["test"]
    assert packages.keys() == {Requirement(line).name for line in lines}
    for line in lines:
        (bound,) = [s for s in Requirement(line).specifier if s.operator == ">="]
        assert str(packages[Requirement(line).name].specifier) == f"=={bound.version}"


def test_the_newest_environment_leaves_torch_free_and_pins_the_rest():
    packages = asked("newest")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name, requirement in packages.items():
        if name in ("torch", "torchvision"):
            assert {s.operator for s in requirement.specifier} == {">="}
        else:
            assert str(requirement).replace("-", "_") in [pin.replace("-", "_") for pin in pins]


def test_a_requirement_without_a_lower_bound_is_named(tmp_path):
    (tmp_path / "constraints.txt").write_text("numpy==2.0\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy"]\noptional-dependencies = {book = [], test = []}\n'
    )
    with pytest.raises(colab.book.BookError, match="no lower bound of numpy"):
        colab.requirements(colab.ENVIRONMENTS["lower"], tmp_path)


def test_where_the_python_that_is_wanted_does_not_work_the_present_one_is_taken(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert colab.interpreter("3.13") == sys.executable
    program = tmp_path / "python3.13"
    program.write_text("#!/bin/sh\nexit 127\n")
    program.chmod(0o755)
    assert colab.interpreter("3.13") == sys.executable
    program.write_text("#!/bin/sh\nexit 0\n")
    assert colab.interpreter("3.13") == str(program)


# ── a notebook on Colab ───────────────────────────────────────────────────────────────────────

GIT = ["git", "-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with the project's first cell, a small library and two notebooks."""
    root = tmp_path / "checkout"
    (root / "book").mkdir(parents=True)
    (root / "sam_lab").mkdir()
    shutil.copytree(ROOT / "book" / "_template", root / "book" / "_template")
    shutil.copy(ROOT / "_config.yml", root)
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/good\nchapters:\n- file: book/bad\n- file: book/last\n"
    )
    (root / "sam_lab" / "__init__.py").write_text("")
    (root / "sam_lab" / "figures.py").write_text("def use_style():\n    pass\n")
    where = (
        "from pathlib import Path\nimport sam_lab\n"
        "assert Path(sam_lab.__file__).is_relative_to(Path.cwd() / 'sam-lab')"
    )
    for name, source in (("good", where), ("bad", "1 / 0"), ("last", where)):
        notebook = new_notebook(cells=[new_code_cell(source)])
        nbformat.write(notebook, root / "book" / f"{name}.ipynb")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "All"]):
        subprocess.run([*GIT, *command], cwd=root, check=True)
    return root


def test_what_is_published_is_the_last_commit_on_the_branch_of_the_configuration(project, tmp_path):
    (project / "book" / "good.ipynb").write_text("not committed")
    repository = colab.publish(project, tmp_path)
    branch = colab.book.configuration(project)["repository"]["branch"]
    command = ["git", "clone", "--quiet", "--branch", branch, repository.as_uri(), "copy"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert colab.book.read(tmp_path / "copy" / "book" / "good.ipynb")


@pytest.mark.slow
def test_every_notebook_clones_the_repository_into_an_empty_folder_and_failures_are_named(
    project, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    failures = colab.execute_all(colab.publish(project, tmp_path), "python3")
    assert failures == ["bad.ipynb"]
    said = capsys.readouterr().err
    assert "bad.ipynb: cell 2 (code cell 2) failed" in said and "ZeroDivisionError" in said
