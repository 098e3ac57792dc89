"""Execute, check and render the book: the commands behind the Makefile.

    python tools/book.py build         execute what changed, then render      (make book)
    python tools/book.py store [FILE]  execute, store the outputs in book/    (make notebooks)
    python tools/book.py render        render the stored outputs              (make html)
    python tools/book.py check         nbval against the stored outputs,      (make check)
                                       unless proven before and CI is unset
    python tools/book.py clean FILE    take timings, paths and the like out   (before a commit)

Notebooks run here and nowhere else: Jupyter Book only renders, because its own execution neither
fails on a failing cell nor notices that the library under a chapter has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 36  # of a notebook's name in the lines of progress
CELL_TIMEOUT = 600  # seconds; a whole chapter is meant to take at most 180

# One environment for every kernel, so that the outputs stored, built and checked are the same ones.
# One thread, because the order of a sum, and with it the last bits of a float32, depends on their
# number, and because the matrices here are small: a second thread gains nothing, and where another
# process wants the same core its waiting costs tens of times the work. And the CPU, because the
# stored outputs were made there. A reader's own Jupyter or Colab does not come through here and
# uses the threads and the GPU it has.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # The widest instructions that every recent x86 processor has: with wider ones, sums are rounded
    # otherwise, and a training run ends elsewhere.
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # no warning about frozen modules from the debugger
}

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
TEXT_ONLY = {"text/plain", WIDGET_VIEW}
NOISY_METADATA = {"ExecuteTime", "colab", "collapsed", "execution", "id", "outputId", "scrolled"}
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class BookError(Exception):
    """Something a reader of the command line can act on; printed without a traceback."""


# ── What the book consists of ─────────────────────────────────────────────────────────────────


def configuration(root: Path = ROOT) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    return config


def toc(root: Path = ROOT) -> dict[str, Any]:
    contents: dict[str, Any] = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return contents


def pages(root: Path = ROOT) -> list[Path]:
    """Every page of the table of contents, in reading order, relative to ``root``."""

    def names(node: dict[str, Any]) -> Iterator[str]:
        if "file" in node:
            yield node["file"]
        for part in [*node.get("parts", []), *node.get("chapters", []), *node.get("sections", [])]:
            yield from names(part)

    contents = toc(root)
    found = []
    for name in [contents["root"], *names(contents)]:
        sources = [path for path in (root / f"{name}.ipynb", root / f"{name}.md") if path.is_file()]
        if len(sources) != 1:
            raise BookError(
                f"_toc.yml lists {name!r}, which must be exactly one file, {name}.ipynb or "
                f"{name}.md; found {len(sources)}"
            )
        found.append(sources[0].relative_to(root))
    return found


def chapters(root: Path = ROOT) -> list[Path]:
    """The numbered pages listed under ``chapters``: ``sections`` of a chapter are side pages."""
    contents = toc(root)
    listed = [
        chapter
        for part in [contents, *contents.get("parts", [])]
        for chapter in part.get("chapters", [])
    ]
    names = {Path(chapter["file"]) for chapter in listed}
    found = [page for page in pages(root) if page.with_suffix("") in names]
    return [page for page in found if re.match(r"\d\d_", page.name)]


def notebooks(root: Path = ROOT) -> list[Path]:
    return [page for page in pages(root) if page.suffix == ".ipynb"]


def title(page: Path, root: Path = ROOT) -> str:
    """The first heading of a page."""
    if page.suffix == ".ipynb":
        prose = [cell.source for cell in read(root / page).cells if cell.cell_type == "markdown"]
    else:
        prose = [(root / page).read_text(encoding="utf-8")]
    found = re.search(r"^# +(.+)$", "\n".join(prose), flags=re.MULTILINE)
    if not found:
        raise BookError(f"{page} has no title: no line that begins with one # and a space")
    return found[1]


def first_cell(root: Path = ROOT, address: str | None = None) -> str:
    """The first code cell of every notebook.

    Args:
        address: where the cell clones from outside a checkout, anything that git understands; empty
            for nowhere. By default the address in ``_config.yml``.
    """
    repository = configuration(root)["repository"]
    template = (root / "book" / "_template" / "first_cell.py.in").read_text(encoding="utf-8")
    url = repository["url"] if address is None else address
    return template.replace("{url}", url).replace("{branch}", repository["branch"]).rstrip("\n")


def read(path: Path) -> NotebookNode:
    try:
        notebook: NotebookNode = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds; all of them mean the same here
        raise BookError(f"{path} is not a valid notebook: {error}") from error
    return notebook


def write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def dumps(notebook: NotebookNode) -> str:
    text: str = nbformat.writes(notebook, version=nbformat.NO_CONVERT)
    return text + "\n"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stamp(notebook: NotebookNode, setup: str) -> NotebookNode:
    """Give the notebook the current first code cell: replace an older one, or insert it."""
    marker = setup.splitlines()[0]
    code = code_cells(notebook)
    if code and code[0].source.splitlines()[:1] == [marker]:
        code[0].source = setup
        tags = code[0].metadata.get("tags", [])
        if not {"hide-input", "remove-input", "remove-cell"} & set(tags):
            code[0].metadata["tags"] = [*tags, "hide-input"]  # folded in the book, open elsewhere
        return notebook
    at = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), None)
    cell = nbformat.v4.new_code_cell(setup, id="first-cell", metadata={"tags": ["hide-input"]})
    notebook.cells.insert(len(notebook.cells) if at is None else at, cell)
    return notebook


# ── Cleaning: what of an executed notebook is worth keeping ───────────────────────────────────


def clean(notebook: NotebookNode, root: Path = ROOT) -> NotebookNode:
    """Remove from an executed notebook, in place, whatever is of this machine or this minute.

    Timings, stderr, local paths, widget state and widget views go; execution counts become 1…n and
    cells without an id get one that depends on their source alone.

    Raises:
        BookError: an output is an error, or a widget that shows nothing without a kernel.
    """
    notebook.metadata = NotebookNode(
        {key: notebook.metadata[key] for key in ("mystnb",) if key in notebook.metadata},
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python", "pygments_lexer": "ipython3"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    taken: set[str] = set()
    count = 0
    for number, cell in enumerate(notebook.cells, start=1):
        identifier = cell.get("id") or hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        while identifier in taken:
            identifier = f"{identifier[:40]}-{number}"
        taken.add(identifier)
        cell.id = identifier
        for key in NOISY_METADATA & set(cell.metadata):
            del cell.metadata[key]
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _clean_outputs(cell.outputs, count, f"cell {number}", root)
    return notebook


def _clean_outputs(
    outputs: list[NotebookNode], count: int, where: str, root: Path
) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "error":
            raise BookError(f"{where} holds an error output: {output.ename}: {output.evalue}")
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            text = without_paths(ANSI.sub("", output.text), root)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += text
            else:
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=text))
            continue
        data = output.data
        if WIDGET_VIEW in data and set(data) <= TEXT_ONLY:
            raise BookError(f"{where} shows a widget without a text/html fallback for the book")
        data.pop(WIDGET_VIEW, None)
        for mime, value in data.items():
            if isinstance(value, str) and mime.startswith("text/"):
                data[mime] = without_paths(value, root)
        output.metadata = NotebookNode()
        if output.output_type == "execute_result":
            output.execution_count = count
        kept.append(output)
    return kept


def without_paths(text: str, root: Path = ROOT) -> str:
    """``text`` with this checkout and this home directory taken out of it."""
    for path, short in ((root, "."), (Path.home(), "~")):
        if path != Path(path.anchor):
            text = text.replace(f"{path}{os.sep}", "" if short == "." else "~/")
            text = re.sub(rf"{re.escape(str(path))}(?![\w-]|\.\w)", short, text)
    return text


# ── Executing, and not executing twice ────────────────────────────────────────────────────────


def environment_key(root: Path = ROOT) -> str:
    """A hash of everything but its own cells that the outputs of a notebook depend on."""
    digest = hashlib.sha256()
    files = [root / "constraints.txt"]
    for package in ("sam_lab", "benchmarks"):
        files += (root / package).rglob("*")
    files += (root / "book" / "results").glob("*.json")
    for path in sorted(files):
        if path.is_file() and path.suffix not in {".pyc", ".tmp"}:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    installed = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    facts = [platform.python_version(), platform.machine(), *sorted(installed)]
    digest.update(json.dumps([facts, KERNEL_ENVIRONMENT]).encode())
    return digest.hexdigest()


def key(notebook: NotebookNode, environment: str) -> str:
    """A hash of the code cells on top of the environment's; prose does not change an output."""
    cells = [[cell.source, cell.metadata] for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps([environment, cells], sort_keys=True).encode()).hexdigest()


class Progress:
    """One line a chapter: name, cells done, seconds. Rewritten in place on a terminal."""

    def __init__(self, name: str, cells: int) -> None:
        self.name, self.cells, self.done = name, cells, 0
        self.started = time.monotonic()
        self.in_place = sys.stdout.isatty()
        if self.in_place:
            self.draw(end="")

    def draw(self, end: str, note: str = "") -> None:
        seconds = time.monotonic() - self.started
        line = f"{self.name:<{WIDTH}} {self.done:>3}/{self.cells} cells {seconds:>6.1f} s{note}"
        print(f"\r\x1b[K{line}" if self.in_place else line, end=end, flush=True)

    def step(self) -> None:
        self.done += 1
        if self.in_place:
            self.draw(end="")

    def finish(self, note: str = "") -> None:
        self.draw(end="\n", note=note)


def execute(
    notebook: NotebookNode,
    name: Path,
    root: Path = ROOT,
    *,
    kernel: str = "python3",
    timeout: int = CELL_TIMEOUT,
) -> NotebookNode:
    """Run every code cell, in place, in a fresh kernel whose directory is the notebook's.

    Args:
        kernel: the name of a Jupyter kernel; the default is that of the Python that runs this.
        timeout: seconds that a cell may take.

    Raises:
        BookError: a cell failed; names the chapter, the cell, its first line and the error.
    """
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    progress = Progress(str(name), len(code_cells(notebook)))
    current = 0

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index

    def complete(cell: NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            progress.step()

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name=kernel,
        store_widget_state=False,
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(root / name.parent)}},
        on_cell_start=start,
        on_cell_complete=complete,
    )
    try:
        client.execute(env=kernel_environment(root))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        progress.finish(note="  FAILED")
        raise BookError(_failure(notebook, name, current, error, timeout)) from None
    progress.finish()
    return notebook


def kernel_environment(root: Path = ROOT) -> dict[str, str]:
    # A profile of one's own would leak into the outputs: IPython is given an empty one.
    profile = root / "_build" / "ipython"
    profile.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **KERNEL_ENVIRONMENT, "IPYTHONDIR": str(profile)}


def _failure(notebook: NotebookNode, name: Path, index: int, error: Exception, timeout: int) -> str:
    cell = notebook.cells[index]
    code_number = len([c for c in notebook.cells[: index + 1] if c.cell_type == "code"])
    first_line = next((line for line in cell.source.splitlines() if line.strip()), "")
    traceback = ""
    if isinstance(error, CellExecutionError):
        what = f"{error.ename}: {error.evalue}"
        traceback = "\n\n" + ANSI.sub("", error.traceback).strip()
    elif isinstance(error, CellTimeoutError):
        what = f"still running after {timeout} s"
    else:
        what = f"the kernel died ({error})"
    return (
        f"{name}: cell {index + 1} (code cell {code_number}) failed\n"
        f"  first line: {first_line}\n  error:      {what}{traceback}"
    )


def outputs_of(name: Path, root: Path = ROOT, environment: str | None = None) -> tuple[Path, bool]:
    """Execute ``root/name`` unless that was done already.

    Returns:
        The executed and cleaned notebook below ``_build/executed``, with today's prose around the
        outputs, and whether anything had to run.
    """
    notebook = stamp(read(root / name), first_cell(root))
    wanted = key(notebook, environment or environment_key(root))
    cached = root / "_build" / "executed" / name
    key_file = cached.with_suffix(".key")
    fresh = not (
        cached.is_file()
        and key_file.is_file()
        and key_file.read_text(encoding="utf-8").strip() == wanted
    )
    if fresh:
        key_file.unlink(missing_ok=True)
        execute(notebook, name, root)
    else:
        old = code_cells(read(cached))
        for cell, done in zip(code_cells(notebook), old, strict=True):
            cell.outputs = done.outputs
    try:
        write(cached, dumps(clean(notebook, root)))
    except BookError as error:
        raise BookError(f"{name}: {error}") from None
    write(key_file, wanted + "\n")
    return cached, fresh


def execute_all(root: Path = ROOT, only: Sequence[Path] = ()) -> dict[Path, Path]:
    """Every notebook of the book (or those named) with its executed copy, a line of progress each.

    Raises:
        BookError: a name in ``only`` that the table of contents does not list, or a failing cell.
    """
    unknown = [str(name) for name in only if name not in notebooks(root)]
    if unknown:
        raise BookError(f"{', '.join(unknown)}: not a notebook that _toc.yml lists")
    environment = environment_key(root)
    executed, ran = {}, 0
    for name in only or notebooks(root):
        executed[name], fresh = outputs_of(name, root, environment)
        if not fresh:
            print(f"{name!s:<{WIDTH}} unchanged, not executed")
        ran += fresh
    print(f"{ran} of {len(executed)} notebooks executed" if ran else "Nothing to execute.")
    return executed


def store(root: Path = ROOT, only: Sequence[Path] = ()) -> None:
    """Write the executed outputs, and the current first cell, into the committed notebooks."""
    for name, executed in execute_all(root, only).items():
        text = executed.read_text(encoding="utf-8")
        changed = text != (root / name).read_text(encoding="utf-8")
        if changed:
            write(root / name, text)
        print(f"{name!s:<{WIDTH}} {'stored' if changed else 'already up to date'}")


def tidy(files: Sequence[Path], root: Path = ROOT) -> None:
    """Clean notebooks where they lie, without a run; a clean one is not written.

    Raises:
        BookError: a file is no notebook, or holds an output that cannot be kept; names the file.
    """
    for path in files:
        notebook = read(path)
        before = path.read_text(encoding="utf-8")
        try:
            after = dumps(clean(notebook, root))
        except BookError as error:
            raise BookError(f"{path}: {error}") from None
        if after != before:
            write(path, after)
            print(f"{path!s:<{WIDTH}} cleaned")


# ── Rendering ─────────────────────────────────────────────────────────────────────────────────


def assemble(root: Path, executed: dict[Path, Path]) -> Path:
    """The source tree Jupyter Book renders: the book's files, with executed notebooks if given.

    A tree of its own, with every page at its own path, so that links into the repository are right
    and Jupyter Book never writes beside the sources.
    """
    source = root / "_build" / "source"
    shutil.rmtree(source, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp", "_template")
    shutil.copytree(root / "book", source / "book", ignore=ignore)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, source / name)
    for page, path in executed.items():
        shutil.copy(path, source / page)
    return source


def tree_key(source: Path, root: Path) -> str:
    """A hash of everything that a rendered page depends on."""
    digest = hashlib.sha256(environment_key(root).encode())
    for path in sorted(source.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def render(
    root: Path = ROOT,
    executed: dict[Path, Path] | None = None,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> Path:
    """Render to ``_build/html`` with warnings as errors, unless that very book lies there already.

    Args:
        executed: executed copies to render instead of the outputs stored in ``book/``.
        run: what starts Jupyter Book.

    Raises:
        BookError: Jupyter Book failed or warned.
    """
    pages(root)  # a wrong table of contents has a clearer message here than in Sphinx
    source = assemble(root, executed or {})
    build = root / "_build"
    index, key_file = build / "html" / "index.html", build / "html.key"
    wanted = tree_key(source, root)
    if index.is_file() and key_file.is_file() and key_file.read_text().strip() == wanted:
        print(f"The book is up to date: {index}")
        return index
    key_file.unlink(missing_ok=True)
    # From nothing: what a removed page leaves behind would be read as part of the book.
    shutil.rmtree(build / "html", ignore_errors=True)
    shutil.rmtree(build / ".doctrees", ignore_errors=True)
    started = time.monotonic()
    program = str(Path(sys.executable).with_name("jupyter-book"))
    command = [program, "build", str(source), "--path-output", str(root), "--all", "-W"]
    result = run([*command, "--keep-going", "-q"], capture_output=True, text=True, cwd=root)
    if result.returncode != 0 or not index.is_file():
        report = ANSI.sub("", result.stdout + result.stderr)
        report = report.split("\nTraceback (most recent call last):\n", 1)[0]  # Jupyter Book's own
        raise BookError(f"rendering failed; warnings count as errors:\n{report.strip()}")
    shutil.rmtree(build / "html" / "reports", ignore_errors=True)
    write(key_file, wanted + "\n")
    print(f"Rendered {len(pages(root))} pages in {time.monotonic() - started:.0f} s: {index}")
    return index


# ── Checking the stored outputs ───────────────────────────────────────────────────────────────


def proof(notebook: NotebookNode, environment: str, root: Path = ROOT) -> str:
    """A hash of all that a comparison depends on: what runs, what it has to give, and how."""
    digest = hashlib.sha256(key(notebook, environment).encode())
    outputs = [cell.outputs for cell in code_cells(notebook)]
    digest.update(json.dumps(outputs, sort_keys=True).encode())
    for path in (root / "tests" / "nbval.cfg", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def record_of(name: Path, root: Path = ROOT) -> Path:
    """Where the last proof of a notebook is kept."""
    return root / "_build" / "proven" / name.with_suffix(".key")


def check(root: Path = ROOT) -> None:
    """Run the notebooks again with nbval, two at a time, and compare with the outputs they store.

    A notebook that has given these very outputs before, with the same code, library and pins, is
    passed over, unless the environment variable ``CI`` is set.

    Raises:
        BookError: a cell failed, or gave another output; the report is printed before.
    """
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", str(root / "tests" / "nbval.cfg")]
    command += ["--nbval-cell-timeout", str(CELL_TIMEOUT)]
    # The project's own pytest settings (coverage, time limits, warnings) are for its own tests.
    command += ["-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-q"]

    def compare(name: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
        started = time.monotonic()
        done = subprocess.run(
            [*command, str(name)],
            cwd=root,
            env=kernel_environment(root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return time.monotonic() - started, done

    environment = environment_key(root)
    due: dict[Path, str] = {}
    for name in notebooks(root):
        wanted, record = proof(read(root / name), environment, root), record_of(name, root)
        if record.is_file() and record.read_text() == wanted and not os.environ.get("CI"):
            print(f"{name!s:<{WIDTH}} proven before", flush=True)
        else:
            record.unlink(missing_ok=True)
            due[name] = wanted

    failed = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, (seconds, done) in zip(due, pool.map(compare, due), strict=True):
            if done.returncode == 0:
                write(record_of(name, root), due[name])
            else:
                failed.append(str(name))
                print(done.stdout)
            verdict = "FAILED" if done.returncode else "gives its stored outputs"
            print(f"{name!s:<{WIDTH}} {verdict:<24} {seconds:>6.1f} s", flush=True)
    if failed:
        raise BookError(
            f"{', '.join(failed)}: not the stored outputs; `make notebooks` stores new ones"
        )


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["build", "store", "render", "check", "clean"])
    parser.add_argument("notebook", nargs="*", type=Path, help="with store and clean: only these")
    given = parser.parse_args(arguments)
    command, only = given.command, given.notebook
    if only and command not in ("store", "clean"):
        parser.error("only `store` and `clean` take the names of notebooks")
    try:
        if command == "build":
            render(root, execute_all(root))
        elif command == "store":
            store(root, only)
        elif command == "render":
            render(root)
        elif command == "clean":
            tidy(only or [root / name for name in notebooks(root)], root)
        else:
            check(root)
    except BookError as error:
        print(f"\nbook: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbook: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
