"""The wheel, installed where there is nothing but torch and numpy, is the library as promised."""

import json
import shutil
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from needed import needed_by

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(distribution: str) -> Iterator[Path]:
    """The top-level files and folders of an installed distribution, its metadata among them."""
    found = metadata.distribution(distribution)
    for name in {file.parts[0] for file in found.files or []} - {".."}:
        yield Path(str(found.locate_file(name)))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` leaves, of a copy of what it is made from."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "sam_lab", copy / "sam_lab")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "build" / "lib" / "sam_lab").mkdir(parents=True)
    (copy / "build" / "lib" / "sam_lab" / "left_over.py").touch()
    made = Path(".venv/.installed")  # that there is an environment, make must not doubt
    run("make", "-o", str(made), "wheel", f"BIN={Path(sys.executable).parent}", cwd=copy)
    assert not (copy / "build").exists()
    (path,) = (copy / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel, torch, numpy and all that these two need.

    The two are not installed again, which would take gigabytes: the environment has links to them.
    """
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)[:-1])
    for distribution in needed_by("torch", "numpy"):
        try:
            files = list(files_of(distribution))
        except metadata.PackageNotFoundError:
            continue  # of another platform
        for file in files:
            if file.exists() and not (site / file.name).exists():
                (site / file.name).symlink_to(file)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    run(*pip, wheel, cwd=folder)
    return python


def inside(python: Path, *arguments: str) -> str:
    """Run that Python, in whose path is nothing of this checkout (-I), warnings as errors."""
    return run(python, "-I", "-W", "error", *arguments, cwd=python.parent)


def test_it_is_the_library_and_its_types_and_no_more(wheel: Path) -> None:
    assert wheel.name == f"sam_lab-{metadata.version('sam-lab')}-py3-none-any.whl"
    shown = run(sys.executable, "-m", "zipfile", "-l", wheel, cwd=wheel.parent)
    files = {line.split()[0] for line in shown.splitlines()[1:]}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "sam_lab").rglob("*.py")}
    library = {name for name in files if ".dist-info/" not in name}
    assert library == here | {"sam_lab/py.typed"}


def test_it_imports_and_takes_a_step_of_sam_with_torch_and_numpy_alone(python: Path) -> None:
    code = """
        import importlib.metadata, importlib.util, json, sys
        from importlib.resources import files
        import torch
        import sam_lab

        w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        sam = sam_lab.SAM(torch.optim.SGD([w], lr=0.5), rho=1.0)
        loss = sam.step(lambda: 0.5 * w.square().sum())
        others = ["matplotlib", "sklearn", "torchvision", "tqdm", "ipywidgets", "pytest"]
        print(json.dumps({
            "version": importlib.metadata.version("sam-lab"),
            "loss": loss.item(),
            "w": w.tolist(),
            "typed": files("sam_lab").joinpath("py.typed").is_file(),
            "others": [name for name in others if importlib.util.find_spec(name)],
            "sources": [m.__file__ for n, m in sys.modules.items() if n.startswith("sam_lab")],
        }))
        """
    found = json.loads(inside(python, "-c", textwrap.dedent(code)))
    assert found["version"] == metadata.version("sam-lab")
    assert found["loss"] == 12.5
    assert found["w"] == pytest.approx([1.2, 1.6])  # w - 0.5 * (w + w / 5)
    assert found["typed"]
    assert found["others"] == []
    environment = python.parents[1]
    assert found["sources"]
    assert all(Path(source).is_relative_to(environment) for source in found["sources"])


def test_its_command_line_lists_the_experiments(python: Path) -> None:
    from sam_lab.experiments import names

    listed = inside(python, "-m", "sam_lab.experiments", "list")
    assert {line.split()[0] for line in listed.splitlines() if line[0] != " "} == set(names())
