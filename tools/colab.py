"""Execute every notebook as Colab would: one file, an empty folder, packages that are not ours.

    python tools/colab.py [colab | lower | newest]      (make colab, make colab ENV=lower, …)

Each notebook of the last commit runs in an empty folder of its own, in a new virtual environment,
and its first cell clones the repository, here from a copy on this machine. The environment has
Colab's versions, the oldest ones that pyproject.toml promises, or the newest release of torch; with
the last two, which are not Colab's, the library's tests run as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import book


@dataclass(frozen=True)
class Environment:
    """A Python and the packages that a reader may have.

    Attributes:
        python: the version that is wanted; where it is not at hand, the running one is taken.
        bounds: what decides a version that `versions` does not give: "lower" (the oldest that
            pyproject.toml allows), "pinned" (constraints.txt) or "free" (the newest).
        versions: exact versions by name; None leaves one to pip, which takes the newest.
        extras: those of the project's extras whose packages are there; with "test" the tests run.
        missing: packages of these that are not there: a notebook does without, or fetches them.
    """

    python: str
    bounds: str
    versions: Mapping[str, str | None]
    extras: tuple[str, ...] = ("book", "test")
    missing: frozenset[str] = frozenset()


ENVIRONMENTS = {
    "colab": Environment(
        "3.13",
        "free",
        {
            "torch": "2.11.0",
            "torchvision": "0.26.0",
            "numpy": "2.1.3",
            "matplotlib": "3.10.0",
            "ipython": "7.34.0",
            "ipykernel": "6.17.1",
            "ipywidgets": "7.7.1",
        },
        extras=("book",),
        missing=frozenset(
            # The first is not on Colab; the others make the book, and no notebook imports them.
            {"pyautoattack", "jupyter-book", "nbclient", "nbformat", "sphinx-mathjax-offline"}
        ),
    ),
    "lower": Environment("3.11", "lower", {}),
    "newest": Environment("3.13", "pinned", {"torch": None, "torchvision": None}),
}

# Seconds that a cell may take: the question is whether it runs, on a busy machine too.
CELL_TIMEOUT = 3600

# What a quick look at the library is: no test that is slow or drives a browser, none of the pins.
TESTS = ["-q", "-m", "not slow and not browser", "--ignore=tests/test_environment.py"]


def requirements(environment: Environment, root: Path = book.ROOT) -> list[str]:
    """What pip is asked for: the project's own requirements, in the versions of `environment`.

    Raises:
        BookError: a version is to be the lower bound, and pyproject.toml gives none.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][extra] for extra in environment.extras]
    wanted = map(Requirement, sum(extras, project["dependencies"]))
    needed = {r.name: r for r in wanted if r.name not in environment.missing}
    needed |= {name: Requirement(name) for name in environment.versions.keys() - needed.keys()}
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(name): pin for name, _, pin in (p.partition("==") for p in pins)}

    def version(requirement: Requirement) -> str | None:
        name = requirement.name
        if name in environment.versions or environment.bounds == "free":
            return environment.versions.get(name)
        if environment.bounds == "pinned":
            return pinned[canonicalize_name(name)]
        lower = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if not lower:
            raise book.BookError(f"pyproject.toml gives no lower bound of {name}")
        return lower[0]

    return [f"{r.name}=={version(r)}" if version(r) else str(r) for r in needed.values()]


def interpreter(version: str) -> str:
    """The path of a Python of this version (such as "3.13"), else of the one that runs this."""
    program = shutil.which(f"python{version}")
    works = program and subprocess.run([program, "-c", ""], capture_output=True).returncode == 0
    return program if program and works else sys.executable


def build(folder: Path, python: str, packages: Sequence[str]) -> Path:
    """Make a virtual environment from nothing, with a Jupyter kernel; returns its Python.

    The kernel's name is that of the folder, below the folder's share/jupyter.

    Raises:
        BookError: the environment cannot be made, or the packages do not go together.
    """
    inside = folder / "bin" / "python"
    commands = [
        [python, "-m", "venv", "--clear", str(folder)],
        [str(inside), "-m", "pip", "install", "--quiet", "--no-compile", *packages],
        [str(inside), "-m", "ipykernel", "install", "--prefix", str(folder), "--name", folder.name],
    ]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise book.BookError(f"{' '.join(command)} failed:\n{done.stdout.strip()}")
    return inside


def versions(python: Path, packages: Sequence[str]) -> str:
    """Python and the packages that were asked for, with the versions that are installed."""
    names = [Requirement(package).name for package in packages]
    code = (
        "import platform, sys; from importlib.metadata import version\n"
        "print('Python', platform.python_version(), *(f', {n} {version(n)}' for n in sys.argv[1:]))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace(" ,", ",")


def publish(root: Path, folder: Path) -> Path:
    """A repository in `folder` that holds the last commit of `root`, as a host would serve it.

    Its branch is the one that _config.yml names.

    Returns:
        The repository's root.
    """
    repository = folder / "sam-lab"
    branch = book.configuration(root)["repository"]["branch"]
    for command in (
        ["git", "clone", "--quiet", str(root), str(repository)],
        ["git", "-C", str(repository), "checkout", "--quiet", "-B", branch],
    ):
        subprocess.run(command, check=True)
    return repository


def execute_all(repository: Path, kernel: str) -> list[str]:
    """Run every notebook of a published repository, each in an empty folder.

    What fails is printed at once.

    Returns:
        The names of those that failed.
    """
    setup = book.first_cell(repository, repository.as_uri())
    failures = []
    for name in book.notebooks(repository):
        notebook = book.stamp(book.read(repository / name), setup)
        with tempfile.TemporaryDirectory() as content:
            try:
                book.execute(
                    notebook,
                    Path(name.name),
                    Path(content),
                    kernel=kernel,
                    timeout=CELL_TIMEOUT,
                )
                book.clean(notebook, Path(content))  # no widget without a picture, no error
            except book.BookError as error:
                print(f"\ncolab: {error}\n", file=sys.stderr)
                failures.append(name.name)
    return failures


def test(repository: Path, python: Path) -> list[str]:
    """Run the library's quick tests in a published repository; returns failures as execute_all."""
    environment = {**os.environ, **book.KERNEL_ENVIRONMENT}
    command = [str(python), "-m", "pytest", *TESTS]
    done = subprocess.run(command, cwd=repository, env=environment)
    return ["the library's tests"] if done.returncode else []


def main(arguments: list[str] | None = None, root: Path = book.ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", nargs="?", choices=list(ENVIRONMENTS), default="colab")
    chosen = parser.parse_args(arguments).environment
    environment = ENVIRONMENTS[chosen]
    folder = root / f".venv-{chosen}"
    # A notebook must find nothing of this checkout, and no kernel but the new environment's.
    os.environ.pop("PYTHONPATH", None)
    os.environ["JUPYTER_PATH"] = str(folder / "share" / "jupyter")
    changed = ["git", "-C", str(root), "status", "--porcelain"]
    if subprocess.run(changed, capture_output=True, text=True, check=True).stdout:
        print("Only what is committed runs, and there are changes that are not.")
    started = time.monotonic()
    try:
        packages = requirements(environment, root)
        python = build(folder, interpreter(environment.python), packages)
        print(versions(python, packages))
        with tempfile.TemporaryDirectory() as outside:
            repository = publish(root, Path(outside))
            failures = execute_all(repository, folder.name)
            if "test" in environment.extras:
                failures += test(repository, python)
    except book.BookError as error:
        print(f"\ncolab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncolab: interrupted", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    print(f"{chosen}: {', '.join(failures) or 'nothing'} failed, in {seconds:.0f} s.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
