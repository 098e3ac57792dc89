"""tools/book.py: what it runs and does not run, what it keeps, and how it fails."""

import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from book_tool import book
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

CONFIG = """\
title: A book
author: Somebody
only_build_toc_files: true
execute: {execute_notebooks: "off"}
repository: {url: https://github.com/pytorch/pytorch, branch: trunk}
"""
TOC = "format: jb-book\nroot: book/index\nchapters:\n- file: book/01_one\n"
SETUP = "# The marker\nREPOSITORY, BRANCH = '{url}', '{branch}'\n"


def cells(*sources: str) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_markdown_cell("# One"), *map(new_code_cell, sources)])


@pytest.fixture
def project(tmp_path: Path):
    """A project of one page and one chapter; calling it writes the chapter's code cells."""
    for folder in ("book/_template", "book/results", "sam_lab", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("nbval.cfg"), tmp_path / "tests")
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "constraints.txt").write_text("numpy==1\n")
    (tmp_path / "sam_lab" / "__init__.py").write_text("ANSWER = 41\n")
    (tmp_path / "book" / "_template" / "first_cell.py.in").write_text(SETUP)
    (tmp_path / "book" / "index.md").write_text("# A book\n\nWords.\n")

    class Project:
        root = tmp_path
        name = Path("book/01_one.ipynb")
        chapter = tmp_path / name

        def write(self, *sources: str) -> None:
            nbformat.write(cells(*sources), self.chapter)

        def executed(self) -> nbformat.NotebookNode:
            return nbformat.read(tmp_path / "_build" / "executed" / self.name, as_version=4)

    made = Project()
    made.write("1 + 1")
    return made


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    return [
        output.get("text") or output.data["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


# ── the table of contents and the first cell ──────────────────────────────────────────────────


def test_pages_come_in_the_order_of_the_table_of_contents(project):
    assert book.pages(project.root) == [Path("book/index.md"), project.name]
    assert book.notebooks(project.root) == [project.name]


def test_a_page_that_is_listed_but_not_there_is_named(project):
    (project.root / "_toc.yml").write_text(TOC + "- file: book/02_gone\n")
    with pytest.raises(book.BookError, match="book/02_gone"):
        book.pages(project.root)


def test_sections_of_a_chapter_are_pages_and_no_chapters(project):
    part = "parts:\n- caption: One\n  chapters:\n"
    listed = TOC.replace("chapters:\n", part).replace("- file", "  - file")
    sections = "    sections:\n    - file: book/01_aside\n  - file: book/words\n"
    (project.root / "_toc.yml").write_text(listed + sections)
    nbformat.write(cells("1"), project.root / "book" / "01_aside.ipynb")
    (project.root / "book" / "words.md").write_text("# Words\n")
    assert book.chapters(project.root) == [project.name]
    assert book.notebooks(project.root) == [project.name, Path("book/01_aside.ipynb")]


def test_the_first_cell_carries_the_configured_address_or_another_one(project):
    start = "# The marker\nREPOSITORY, BRANCH = "
    configured = f"{start}'https://github.com/pytorch/pytorch', 'trunk'"
    assert book.first_cell(project.root) == configured
    assert (
        book.first_cell(project.root, "file:///srv/book") == f"{start}'file:///srv/book', 'trunk'"
    )
    assert book.first_cell(project.root, "") == f"{start}'', 'trunk'"


def test_a_page_has_the_title_that_its_first_heading_gives(project):
    assert book.title(project.name, project.root) == "One"
    assert book.title(Path("book/index.md"), project.root) == "A book"
    (project.root / "book" / "index.md").write_text("Words, and ## no heading.\n")
    with pytest.raises(book.BookError, match=r"book/index\.md has no title"):
        book.title(Path("book/index.md"), project.root)


def test_stamping_inserts_the_first_cell_once_and_replaces_an_older_one():
    stamped = book.stamp(cells("x = 1"), "# The marker\nnew = 1")
    assert [c.source for c in book.code_cells(stamped)] == ["# The marker\nnew = 1", "x = 1"]
    again = book.stamp(stamped, "# The marker\nnewer = 2")
    assert [c.source for c in book.code_cells(again)] == ["# The marker\nnewer = 2", "x = 1"]
    assert stamped.cells[0].cell_type == "markdown"


# ── executing ─────────────────────────────────────────────────────────────────────────────────


def test_a_chapter_runs_in_its_own_folder_and_reports_a_line(project, capsys):
    project.write("import os\nprint(os.path.basename(os.getcwd()))", "6 * 7")
    assert book.main(["store"], project.root) == 0
    assert texts(project.executed()) == ["book\n", "42"]
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("book/01_one")][:1]
    assert "3/3 cells" in line and line.endswith(" s")


def test_kernels_run_on_one_thread_and_the_cpu(project):
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    project.write(f"import os\nprint([os.environ[name] for name in {names}])")
    book.execute_all(project.root)
    assert texts(project.executed()) == ["['1', '']\n"]


def test_a_failing_cell_fails_the_command_and_is_named(project, capsys):
    project.write("x = 0", "# why\ny = 1 / x", "print('never')")
    assert book.main(["build"], project.root) == 1
    message = capsys.readouterr().err
    assert "book/01_one.ipynb: cell 4 (code cell 3) failed" in message
    assert "first line: # why" in message
    assert "ZeroDivisionError: division by zero" in message
    assert not (project.root / "_build" / "html").exists()


@pytest.mark.slow
def test_a_kernel_that_dies_is_a_failure_too(project, capsys):
    project.write("import os\nos._exit(3)")
    assert book.main(["build"], project.root) == 1
    assert "cell 3 (code cell 2) failed" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_runs_twice_unless_something_changed(project, capsys):
    log = project.root / "runs.txt"
    code = f"open({str(log)!r}, 'a').write('x')"
    project.write(code)

    def runs() -> int:
        book.execute_all(project.root)
        return len(log.read_text())

    assert runs() == 1
    capsys.readouterr()
    assert runs() == 1
    said = capsys.readouterr().out
    assert "book/01_one.ipynb" in said and "Nothing to execute." in said

    (project.root / "sam_lab" / "__init__.py").write_text("ANSWER = 42\n")
    assert runs() == 2
    (project.root / "constraints.txt").write_text("numpy==2\n")
    assert runs() == 3
    (project.root / "book" / "results" / "a.laptop.json").write_text("{}")
    assert runs() == 4
    project.write(code + ";")
    assert runs() == 5
    assert runs() == 5


@pytest.mark.slow
def test_new_prose_stands_around_old_outputs_without_a_run(project):
    project.write("import random\nprint(random.random())")
    book.execute_all(project.root)
    before = texts(project.executed())
    notebook = nbformat.read(project.chapter, as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, project.chapter)
    book.execute_all(project.root)
    assert project.executed().cells[0].source == "# Another title"
    assert texts(project.executed()) == before


@pytest.mark.slow
def test_a_chapter_that_failed_runs_again(project):
    flag = project.root / "flag"
    project.write(f"import os\nassert os.path.exists({str(flag)!r})")
    assert book.main(["store"], project.root) == 1
    flag.touch()
    assert book.main(["store"], project.root) == 0


# ── storing ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_stored_chapters_are_clean_and_storing_again_changes_nothing(project):
    project.write("import os, sys\nprint('gone', file=sys.stderr)\nprint(os.getcwd())", "'kept'")
    assert book.main(["store"], project.root) == 0
    text = project.chapter.read_text()
    notebook = nbformat.reads(text, as_version=4)
    assert [c.execution_count for c in book.code_cells(notebook)] == [1, 2, 3]
    assert texts(notebook) == ["book\n", "'kept'"]
    assert str(project.root) not in text and "gone\n" not in texts(notebook)
    assert "widgets" not in notebook.metadata
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    modified = project.chapter.stat().st_mtime_ns
    assert book.main(["store"], project.root) == 0
    assert project.chapter.stat().st_mtime_ns == modified


@pytest.mark.slow
def test_one_notebook_can_be_stored_and_an_unlisted_one_cannot(project, capsys):
    assert book.main(["store", str(project.name)], project.root) == 0
    assert texts(nbformat.read(project.chapter, as_version=4)) == ["2"]
    assert book.main(["store", "book/09_other.ipynb"], project.root) == 1
    assert "book/09_other.ipynb: not a notebook" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failing_chapter_is_not_stored(project):
    project.write("1 / 0")
    before = project.chapter.read_bytes()
    assert book.main(["store"], project.root) == 1
    assert project.chapter.read_bytes() == before


def test_notebooks_are_cleaned_where_they_lie_without_a_run(project, capsys):
    notebook = cells("1 / 0")
    stderr = new_output("stream", name="stderr", text="a warning")
    notebook.cells[1].update(outputs=[stderr], execution_count=7)
    nbformat.write(notebook, project.chapter)
    assert book.main(["clean", str(project.chapter)], project.root) == 0
    assert f"{project.chapter} cleaned" in capsys.readouterr().out
    (cell,) = book.code_cells(nbformat.read(project.chapter, as_version=4))
    assert (cell.source, cell.outputs, cell.execution_count) == ("1 / 0", [], 1)
    modified = project.chapter.stat().st_mtime_ns
    assert book.main(["clean"], project.root) == 0  # all that are listed
    assert project.chapter.stat().st_mtime_ns == modified
    assert capsys.readouterr().out == ""


def test_a_notebook_that_cannot_be_cleaned_is_named_and_stays(project, capsys):
    notebook = cells("1 / 0")
    notebook.cells[1].outputs = [new_output("error", ename="E", evalue="no", traceback=[])]
    nbformat.write(notebook, project.chapter)
    before = project.chapter.read_bytes()
    assert book.main(["clean", str(project.chapter)], project.root) == 1
    assert f"{project.chapter}: cell 2 holds an error output" in capsys.readouterr().err
    assert project.chapter.read_bytes() == before


def executed(*outputs: nbformat.NotebookNode, **metadata) -> nbformat.NotebookNode:
    cell = new_code_cell("x", outputs=list(outputs), execution_count=7, metadata=metadata)
    return new_notebook(cells=[cell], metadata={"widgets": {"state": {}}, "colab": {}})


def test_cleaning_keeps_tags_and_figure_texts_and_drops_timings():
    figure = {"image": {"alt": "A curve that rises"}}
    notebook = executed(tags=["hide-input"], mystnb=figure, execution={"iopub.execute_input": "t"})
    (cell,) = book.clean(notebook).cells
    assert cell.metadata == {"tags": ["hide-input"], "mystnb": figure}
    assert cell.execution_count == 1
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_cleaning_joins_what_was_printed_in_pieces_and_drops_stderr():
    pieces = [
        new_output("stream", name="stdout", text="a"),
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text="\x1b[31mb\x1b[0m\n"),
    ]
    (cell,) = book.clean(executed(*pieces)).cells
    assert [(o.name, o.text) for o in cell.outputs] == [("stdout", "ab\n")]


def test_cleaning_takes_the_widget_out_and_leaves_its_page():
    data = {book.WIDGET_VIEW: {"model_id": "1"}, "text/html": "<figure/>", "text/plain": "Slider"}
    (cell,) = book.clean(executed(new_output("display_data", data=data))).cells
    assert set(cell.outputs[0].data) == {"text/html", "text/plain"}


def test_a_widget_that_needs_a_kernel_is_refused():
    output = new_output("display_data", data={book.WIDGET_VIEW: {}, "text/plain": "HBox()"})
    with pytest.raises(book.BookError, match="cell 1 .*fallback"):
        book.clean(executed(output))


def test_an_error_output_is_refused():
    output = new_output("error", ename="ValueError", evalue="no", traceback=[])
    with pytest.raises(book.BookError, match="ValueError: no"):
        book.clean(executed(output))


def test_cells_get_stable_and_different_ids():
    def ids() -> list[str]:
        notebook = cells("x = 1", "x = 1")
        for cell in notebook.cells:
            del cell["id"]
        return [cell.id for cell in book.clean(notebook).cells]

    assert ids() == ids()
    assert len(set(ids())) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{root}/book/results/a.json", "book/results/a.json"),
        ("(in {root})", "(in .)"),
        ("{root}-elsewhere/x", "{root}-elsewhere/x"),
        ("{home}/.cache/sam_lab", "~/.cache/sam_lab"),
        ("2 / 3 of a path", "2 / 3 of a path"),
    ],
)
def test_local_paths_are_shortened(before, after, tmp_path):
    names = {"root": tmp_path / "checkout", "home": Path.home()}
    shortened = book.without_paths(before.format(**names), tmp_path / "checkout")
    assert shortened == after.format(**names)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    book.write(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        book.write(path, "new")
    assert path.read_text() == "old"


def test_a_damaged_notebook_is_named(project):
    project.chapter.write_text("{")
    with pytest.raises(book.BookError, match=r"01_one\.ipynb is not a valid notebook"):
        book.execute_all(project.root)


# ── checking ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_checking_passes_what_was_stored_and_names_the_notebook_that_gives_something_else(
    project, capsys
):
    project.write("print('six', 'seven')")
    assert book.main(["store"], project.root) == 0
    assert book.main(["check"], project.root) == 0
    stored = project.chapter.read_text()
    project.chapter.write_text(stored.replace('"six seven', '"six eight'))
    capsys.readouterr()
    assert book.main(["check"], project.root) == 1
    said = capsys.readouterr()
    assert "six eight" in said.out
    assert "book/01_one.ipynb: not the stored outputs" in said.err


@pytest.fixture
def compared(project, monkeypatch):
    """Check the project; the notebooks that nbval, a stand-in with this exit code, was given."""
    monkeypatch.delenv("CI", raising=False)
    given = []

    def check(returncode: int = 0) -> list[str]:
        def nbval(command, **_):
            given.append(command[-1])
            return subprocess.CompletedProcess(command, returncode, stdout="the report")

        given.clear()
        monkeypatch.setattr(book.subprocess, "run", nbval)
        assert book.main(["check"], project.root) == returncode
        return given.copy()

    return check


def test_what_was_proven_before_is_passed_over_and_said(project, compared, capsys):
    assert compared() == [str(project.name)]
    assert "gives its stored outputs" in capsys.readouterr().out
    assert compared() == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split(maxsplit=1) == [str(project.name), "proven before"]


def test_in_continuous_integration_every_notebook_is_compared_again(project, compared, monkeypatch):
    compared()
    monkeypatch.setenv("CI", "true")
    assert compared() == [str(project.name)]


def test_new_prose_leaves_a_proof_standing(project, compared):
    compared()
    notebook = nbformat.read(project.chapter, as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, project.chapter)
    assert compared() == []


def other_output(root: Path) -> None:
    path = root / "book" / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [new_output("stream", name="stdout", text="3")]
    nbformat.write(notebook, path)


CHANGES = {
    "the code": lambda root: nbformat.write(cells("1 + 2"), root / "book" / "01_one.ipynb"),
    "a stored output": other_output,
    "the library": lambda root: (root / "sam_lab" / "__init__.py").write_text("ANSWER = 42\n"),
    "a pin": lambda root: (root / "constraints.txt").write_text("numpy==2\n"),
    "a result": lambda root: (root / "book" / "results" / "a.laptop.json").write_text("{}"),
    "how outputs are compared": lambda root: (root / "tests" / "nbval.cfg").write_text(""),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_proof_falls_with_anything_that_it_rests_on(change, project, compared):
    compared()
    change(project.root)
    assert compared() == [str(project.name)]
    assert compared() == []


@pytest.mark.slow
def test_a_failure_is_no_proof_and_takes_an_older_one_away(project, compared, monkeypatch, capsys):
    compared()
    monkeypatch.setenv("CI", "true")
    assert compared(returncode=1) == [str(project.name)]
    assert "the report" in capsys.readouterr().out
    monkeypatch.delenv("CI")
    assert compared(returncode=1) == [str(project.name)]
    assert compared() == [str(project.name)]


# ── rendering ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_rendering_shows_the_outputs_says_where_and_is_not_repeated(project, capsys):
    project.write("print('six times', 7)")
    assert book.main(["build"], project.root) == 0
    index = project.root / "_build" / "html" / "index.html"
    assert str(index) in capsys.readouterr().out
    assert "six times 7" in (project.root / "_build/html/book/01_one.html").read_text()
    modified = index.stat().st_mtime_ns
    assert book.main(["build"], project.root) == 0
    said = capsys.readouterr().out
    assert "Nothing to execute." in said and "up to date" in said
    assert index.stat().st_mtime_ns == modified
    assert not list(project.root.glob("book/*.html"))


@pytest.mark.slow
def test_a_warning_fails_the_rendering(project, capsys):
    (project.root / "book" / "index.md").write_text("# A book\n\n[nowhere](gone.md)\n")
    assert book.main(["render"], project.root) == 1
    assert "gone.md" in capsys.readouterr().err
    shutil.rmtree(project.root / "_build")
