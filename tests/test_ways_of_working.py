"""What runs by itself, before a commit and on the host, is what the Makefile runs by hand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output, writes

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
BIN = Path(sys.executable).parent


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_a_workflow_for_each_proof():
    assert set(WORKFLOWS) == {"book.yml", "lint.yml", "test.yml", "weekly.yml"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_run_targets_of_the_makefile_and_nothing_else(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))
    commands = [step["run"] for step in steps(WORKFLOWS[name]) if "run" in step]
    assert commands
    for command in commands:
        make, *arguments = command.split(" ENV=")[0].split()
        assert make == "make" and arguments and set(arguments) <= targets, command


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_may_read_and_only_the_published_pages_are_written(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    for job, what in WORKFLOWS[name]["jobs"].items():
        assert "permissions" not in what or (name, job) == ("book.yml", "publish")


def test_only_the_default_branch_is_published():
    publish = WORKFLOWS["book.yml"]["jobs"]["publish"]
    assert publish["needs"] == "build"
    conditions = set(publish["if"].split(" && "))
    assert "github.event_name == 'push'" in conditions
    assert "github.ref_name == github.event.repository.default_branch" in conditions


def test_every_environment_of_colab_is_run_once_a_week():
    pytest.importorskip("nbclient")
    import colab

    (job,) = WORKFLOWS["weekly.yml"]["jobs"].values()
    weekly = {case["environment"]: case["python"] for case in job["strategy"]["matrix"]["include"]}
    assert weekly == {name: e.python for name, e in colab.ENVIRONMENTS.items()}


def test_the_tests_run_on_the_oldest_and_the_newest_python_of_the_project():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = re.findall(r"Python :: (3\.\d+)", text)
    (job,) = WORKFLOWS["test.yml"]["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the project's hooks and nothing else in it."""
    for name in (".pre-commit-config.yaml", "pyproject.toml", "_config.yml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "book.py", tmp_path / "tools")
    (tmp_path / ".venv").symlink_to(BIN.parent)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def hook(name: str, repository: Path, *files: str) -> subprocess.CompletedProcess:
    command = ["git", "add", "--force", *files]
    subprocess.run(command, cwd=repository, check=True)
    command = [str(BIN / "pre-commit"), "run", name, "--files", *files]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def test_a_commit_has_its_style_mended(repository):
    (repository / "a.py").write_text("import os\nx = 'one'\n")
    assert hook("ruff", repository, "a.py").returncode == 1
    assert hook("ruff-format", repository, "a.py").returncode == 1
    assert (repository / "a.py").read_text() == 'x = "one"\n'
    assert hook("ruff", repository, "a.py").returncode == 0
    assert hook("ruff-format", repository, "a.py").returncode == 0


@pytest.mark.slow
def test_a_commit_has_its_notebooks_cleaned(repository):
    output = new_output("stream", name="stderr", text="a warning\n")
    cell = new_code_cell("1 + 1", outputs=[output], execution_count=7)
    (repository / "a.ipynb").write_text(writes(new_notebook(cells=[cell])))
    assert hook("notebooks", repository, "a.ipynb").returncode == 1
    assert "a warning" not in (repository / "a.ipynb").read_text()
    assert hook("notebooks", repository, "a.ipynb").returncode == 0


def test_a_commit_is_typed_as_make_types_does():
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = configuration["repos"]
    (mypy,) = [hook for hook in local["hooks"] if hook["id"] == "mypy"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (by_hand,) = re.findall(r"\$\(BIN\)/(mypy.*)", makefile)
    assert mypy["entry"] == f".venv/bin/{by_hand}"
    assert not mypy["pass_filenames"]
