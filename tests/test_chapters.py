"""The rules every notebook of the book keeps; CONTRIBUTING.md says them in words."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from book_tool import ROOT, book

from sam_lab.experiments import ledger_rows

NOTEBOOKS = book.notebooks()
CHAPTERS = book.chapters()  # what a chapter lists as its sections are side pages
HEADINGS = [
    "Before you start",
    "Predict",
    "Theory",
    "From scratch",
    "Experiment",
    "Claims",
    "What would change our mind",
    "Exercises",
    "Summary",
    "References",
]
MOST_CODE_LINES = 120
WORDS = (1500, 2500)
HEADLINES = (5, 7)
PREDICTIONS = (2, 3)
# folders of experiments, in the book's order
PARTS = ("edge", "sam", "late", "inputs", "family", "theory", "critics")
# Marks of a moment or a machine that have no place in a stored output.
PASSING = re.compile(
    r"/home/|/Users/|/root\b|/tmp/|[A-Z]:\\\\|\b0x[0-9a-f]{6,}\b"
    r"|Wall time|CPU times|\d(?:it/s|s/it)\b|Traceback \(most recent|Warning:",
)


def load(name: Path) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / name, as_version=4)


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def texts(output: nbformat.NotebookNode) -> list[str]:
    """What an output says in words, pictures that lie inside HTML left out."""
    if output.output_type == "stream":
        return [output.text]
    values = [v for m, v in output.get("data", {}).items() if m.startswith("text/")]
    return [re.sub(r"data:[\w/+;=-]+,[A-Za-z0-9+/=]+", "", value) for value in values]


def read_through(notebook: nbformat.NotebookNode) -> str:
    """The prose as a reader comes by it: text cells, and sentences that code cells compute."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts += [data["text/markdown"]] if "text/markdown" in data else []
    return "\n\n".join(parts)


def section(text: str, heading: str) -> str:
    """What stands under the heading that begins with these words, without code blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.split(rf"^## +{re.escape(heading)}.*$", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def shows_a_picture(data: dict) -> bool:
    words = "\n".join(data.get(mime, "") for mime in ("text/html", "text/markdown"))
    drawn = re.search(r"<figure|<svg|<img|!\[", words)
    return bool(drawn) or any(mime.startswith("image/") for mime in data)


def boxes(text: str, kind: str) -> list[tuple[dict[str, str], str]]:
    """The predictions of a page, or where it settles them: attributes, and what is inside."""
    found = re.findall(rf'<div class="{kind}"(.*?)>(.*?)</div>', text, flags=re.DOTALL)
    return [(dict(re.findall(r'([\w-]+)="(.*?)"', tag)), inside) for tag, inside in found]


every_notebook = pytest.mark.parametrize("name", NOTEBOOKS, ids=str)
every_chapter = pytest.mark.parametrize("name", CHAPTERS, ids=str)


def test_the_table_of_contents_lists_every_notebook_of_the_book():
    on_disk = {path.relative_to(ROOT) for path in (ROOT / "book").glob("*.ipynb")}
    assert on_disk == set(NOTEBOOKS)
    assert CHAPTERS


@every_notebook
def test_the_first_code_cell_is_the_common_one(name):
    assert book.code_cells(load(name))[0].source == book.first_cell()


def run_first_cell(folder: Path, address: str, times: int) -> subprocess.CompletedProcess:
    """Run the first cell, made for ``address``, in a folder without a checkout, and say ROOT."""
    (folder / "cell.py").write_text(book.first_cell(address=address), encoding="utf-8")
    driver = f"for _ in range({times}): exec(open('cell.py').read())\nprint(ROOT)"
    command = [sys.executable, "-c", driver]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_first_cell_clones_the_configured_branch_once_where_there_is_no_checkout(tmp_path):
    origin, reader = tmp_path / "origin", tmp_path / "reader"
    origin.mkdir()
    reader.mkdir()
    (origin / "sam_lab").symlink_to(ROOT / "sam_lab", target_is_directory=True)
    author = ["-c", "user.name=Somebody", "-c", "user.email=somebody@localhost"]
    branch = book.configuration()["repository"]["branch"]
    for step in (
        ["init", "--quiet", "--initial-branch", branch],
        ["add", "sam_lab"],
        [*author, "commit", "--quiet", "--message", "The library"],
        ["checkout", "--quiet", "--orphan", "another"],  # not what a bare clone would take
    ):
        subprocess.run(["git", *step], cwd=origin, check=True)
    done = run_first_cell(reader, origin.as_uri(), times=2)  # a reader runs the cell again
    assert done.stdout.splitlines() == [str(reader / "sam-lab")], done.stderr


def test_the_first_cell_says_what_is_missing_where_there_is_neither_checkout_nor_address(tmp_path):
    done = run_first_cell(tmp_path, "", times=1)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "RuntimeError: This notebook does not know the address of its repository"
    )
    assert "make address URL=…" in last
    assert [path.name for path in tmp_path.iterdir()] == ["cell.py"]


@every_notebook
def test_the_notebook_is_stored_executed_once_from_top_to_bottom(name):
    cells = book.code_cells(load(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@every_notebook
def test_the_stored_notebook_is_what_storing_writes(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == book.dumps(book.clean(nbformat.reads(text, as_version=4)))


@every_notebook
def test_outputs_hold_no_error_no_stderr_and_nothing_of_one_machine_or_moment(name):
    notebook = load(name)
    # "widgets" makes GitHub refuse to show a notebook, and the book needs no widget state.
    assert "widgets" not in notebook.metadata
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            where = f"{name}, cell {number}"
            assert output.output_type != "error", where
            assert output.get("name") != "stderr", where
            assert book.WIDGET_VIEW not in output.get("data", {}), where
            for text in texts(output):
                assert not PASSING.search(text), f"{where}: {PASSING.search(text)[0]!r}"


@every_notebook
def test_every_picture_has_alternative_text_written_for_it(name):
    for number, cell in enumerate(load(name).cells, start=1):
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        if any(mime.startswith("image/") for bundle in data for mime in bundle):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 5, f"{name}, cell {number}: alt text {alt!r}"


@every_notebook
def test_links_to_other_pages_name_files_that_exist(name):
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose(load(name)))
    missing = [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()]
    assert not missing


@every_chapter
def test_the_chapter_has_the_sections_of_every_chapter_in_their_order(name):
    text = re.sub(r"```.*?```", "", prose(load(name)), flags=re.DOTALL)
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1
    found = re.findall(r"^## +(.*)$", text, flags=re.MULTILINE)
    order = [next((h for h in HEADINGS if title.startswith(h)), None) for title in found]
    assert [heading for heading in order if heading] == HEADINGS


@every_chapter
def test_the_chapter_opens_with_a_question_and_a_picture(name):
    """Title and question, the common first cell, the hero picture, and only then the rest."""
    cells = load(name).cells
    codes = [at for at, cell in enumerate(cells) if cell.cell_type == "code"]
    sources = enumerate(cell.source for cell in cells)
    start = next(at for at, source in sources if re.search(r"^## +Before", source, re.MULTILINE))
    opening = "\n".join(cell.source for cell in cells[: codes[0]])
    assert opening.startswith("# ") and "?" in opening
    shown = [
        o.get("data", {}) for cell in cells[codes[0] + 1 : start] for o in cell.get("outputs", [])
    ]
    assert any(shows_a_picture(data) for data in shown)
    assert "$$" not in "\n".join(cell.source for cell in cells[:start]), "no formula before it"


@every_chapter
def test_every_prediction_is_settled_once_further_down_with_one_of_its_choices(name):
    text = read_through(load(name))
    predicted, settled = boxes(text, "prediction"), boxes(text, "settled")
    ids = [box["id"] for box, _ in predicted]
    assert PREDICTIONS[0] <= len(ids) <= PREDICTIONS[1]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith(f"{name.name[:2]}-") for id in ids), ids
    assert ids == [box["id"] for box, _ in boxes(section(text, "Predict"), "prediction")]
    after = re.split(r"^## +Predict.*$", text, flags=re.MULTILINE)[1].split("\n## ", 1)[1]
    answers = {box["data-prediction"]: box["data-answer"] for box, _ in boxes(after, "settled")}
    assert sorted(answers) == sorted(ids) and len(settled) == len(ids)
    for box, inside in predicted:
        choices = re.findall(r"^(\d+)\. ", inside, flags=re.MULTILINE)
        if "data-max" in box:
            assert not choices
            low, answer, high = box["data-min"], answers[box["id"]], box["data-max"]
            assert float(low) <= float(answer) <= float(high), box["id"]
        else:
            assert len(choices) >= 2 and answers[box["id"]] in choices, box["id"]
    for _, inside in predicted + settled:  # inside HTML, Markdown needs the blank lines
        assert inside.startswith("\n\n") and inside.endswith("\n\n"), inside[:80]


@every_chapter
def test_the_chapter_is_neither_a_leaflet_nor_a_book(name):
    """Prose and exercises; not code, formulas, the list of references, and what cells compute."""
    text = re.sub(r"```.*?```", " ", prose(load(name)), flags=re.DOTALL)
    text = re.sub(r"\$[^$]*\$", " ", text.split("\n## References")[0])
    text = re.sub(r"</?[a-z][^<>]*>|\]\([^)]*\)", " ", text)
    words = len(re.findall(r"[^\W\d_]{2,}", text))
    assert WORDS[0] <= words <= WORDS[1], f"{words} words"


@every_chapter
def test_the_chapter_shows_no_more_code_than_a_reader_reads(name):
    hidden = {"hide-input", "remove-input", "hide-cell", "remove-cell"}
    visible = [
        line
        for cell in book.code_cells(load(name))[1:]
        if not hidden & set(cell.metadata.get("tags", []))
        for line in cell.source.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(visible) <= MOST_CODE_LINES, f"{len(visible)} lines"


@every_chapter
def test_the_claims_of_the_chapter_are_a_few_headlines_and_a_way_to_the_ledger(name):
    notebook = load(name)
    calls = [cell for cell in book.code_cells(notebook) if "experiments.headlines(" in cell.source]
    assert calls
    shown = section(read_through(notebook), "Claims")
    lists = [o.data["text/markdown"] for cell in calls for o in cell.outputs if "data" in o]
    assert all(text in shown for text in lists)
    headlines = re.findall(r"^[-*] ", "\n".join(lists), flags=re.MULTILINE)
    assert HEADLINES[0] <= len(headlines) <= HEADLINES[1], f"{len(headlines)} headlines"
    assert "](ledger.ipynb" in shown


@every_chapter
def test_every_exercise_says_how_hard_it_is(name):
    exercises = re.findall(
        r"^(?:\*\*|#{3,} +)\d+.*$", section(prose(load(name)), "Exercises"), flags=re.MULTILINE
    )
    assert len(exercises) >= 3
    assert [line for line in exercises if not re.search(r"(?<!★)★{1,3}(?!★)", line)] == []


@every_chapter
def test_the_summary_ends_with_one_sentence_in_bold(name):
    last = section(read_through(load(name)), "Summary").strip().split("\n\n")[-1].strip()
    assert re.fullmatch(r"\*\*(?:(?!\*\*).)+\*\*", last, flags=re.DOTALL), last[-200:]
    sentence = last.strip("*").strip()
    assert re.search(r"[.!?]$", sentence), sentence
    assert not re.search(r"[.!?]\s+[A-Z]", sentence), f"more than one sentence: {sentence}"


@every_chapter
def test_solutions_are_folded_and_everything_folded_is_unfolded_again(name):
    text = prose(load(name))
    assert text.count("<details") == text.count("</details>") >= 3
    # Markdown inside HTML is Markdown only after a blank line, in the book and on GitHub alike.
    assert not re.search(r"</summary>[ \t]*\n(?!\s*\n)", text)


@every_chapter
def test_the_chapter_has_an_interactive_figure_that_needs_no_kernel(name):
    outputs = [o for cell in book.code_cells(load(name)) for o in cell.outputs]
    pages = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("sam-slider" in page for page in pages)


def test_the_ledger_shows_every_claim_once_under_the_part_of_the_book_it_belongs_to():
    cells = load(Path("book/ledger.ipynb")).cells
    captions = [part["caption"] for part in book.toc()["parts"]][: len(PARTS)]
    found = {}
    for title, shown in pairwise(cells):
        if title.source.removeprefix("## ") in captions:
            tables = "\n".join(output.data["text/markdown"] for output in shown.outputs)
            rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
            statements = [row[0].strip("| *") for row in rows]
            found[title.source[3:]] = [s for s in statements if s not in {"Statement", "---"}]
    assert list(found) == captions
    everything = ledger_rows(ROOT / "book" / "results")
    assert {row.part for row in everything} == set(PARTS)
    for part, shown in zip(PARTS, found.values(), strict=True):
        expected = [row.statement for row in everything if row.part == part]
        assert len(shown) == len(expected)
        # In a table the bars of a formula are spelt otherwise.
        assert {s for s in expected if not re.search(r"[$|]", s)} <= set(shown)
