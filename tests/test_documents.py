"""README, citation, licence and the pages of the book in Markdown say what is so."""

import copy
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from book_tool import ROOT, book

from sam_lab.experiments import Result, judge

yaml = pytest.importorskip("yaml")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(title: str) -> list[str]:
    """The Python under a heading of the README."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run_and_show_the_edge():
    (snippet,) = snippets("The library in ten lines")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 16
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in done.stdout.splitlines()]
    first, last = rows[0], rows[-1]
    assert first[2] < 0.75 * first[3]  # the sharpness begins below 2 / lr …
    assert last[2] == pytest.approx(last[3], rel=0.15)  # … and ends at it
    assert last[1] < first[1]  # while the loss has fallen


def test_the_three_lines_of_the_readme_are_two_passes_and_a_step():
    model, loss_fn = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    x, y = torch.rand(8, 3), torch.rand(8, 2)
    w, params = copy.deepcopy(model), list(model.parameters())
    namespace = {"model": model, "loss_fn": loss_fn, "x": x, "y": y}
    namespace["optimizer"] = torch.optim.SGD(params, lr=0.5)
    exec(snippets("SAM in your own training loop")[0], namespace)
    clean = loss_fn(w(x), y)
    assert namespace["loss"].item() == clean.item()
    grads = torch.autograd.grad(clean, list(w.parameters()))
    length = torch.cat([g.flatten() for g in grads]).norm()
    there = {
        name: p + 0.05 * g / length
        for (name, p), g in zip(w.named_parameters(), grads, strict=True)
    }
    perturbed = loss_fn(torch.func.functional_call(w, there, x), y)
    grads = torch.autograd.grad(perturbed, list(w.parameters()))
    for p, old, g in zip(params, w.parameters(), grads, strict=True):
        torch.testing.assert_close(p, old - 0.5 * g)


def test_the_training_loop_of_the_readme_runs_as_printed(capsys):
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(snippets("SAM in your own training loop")[1], namespace)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    model, sam = namespace["model"], namespace["sam"]
    assert all(p.isfinite().all() for p in model.parameters())
    assert 70 < sam.steps <= 80  # on a GPU the scaler may skip some while it finds its scale
    # four micro-batches a step, and those of the second pass are not counted
    assert model[1].num_batches_tracked == 4 * 80
    assert namespace["scheduler"].get_last_lr() == [pytest.approx(0, abs=1e-9)]


CHAPTERS = book.chapters()


def test_the_readme_lists_every_chapter_in_the_order_of_the_book_by_its_own_title():
    section = README.split("\n## Read and run\n")[1].split("\n## ")[0]
    found = re.findall(r"^- \[(.+?)\]\((.+?)\)", section, flags=re.MULTILINE)
    listed = [(title, Path(target)) for title, target in found]
    targets = {target for _, target in listed}
    assert listed == [(book.title(page), page) for page in book.pages() if page in targets]
    assert targets >= set(CHAPTERS)


def test_the_front_page_lists_every_chapter_by_number_and_title():
    cells = json.loads((ROOT / "book" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    listed = re.findall(r"^(\d+)\. \[(.+?)\]\((.+?)\)", text, flags=re.MULTILINE)
    numbered = enumerate(CHAPTERS, start=1)
    assert listed == [(str(n), book.title(page), page.name) for n, page in numbered]


def test_every_file_the_readme_and_contributing_link_to_exists():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
        targets += re.findall(r'(?:src|href)="(?!\w+:|#)([^"]+)"', text)
        missing = [target for target in targets if not (ROOT / target).exists()]
        assert not missing, name


def test_the_citation_carries_the_version_and_the_address_if_there_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    import sam_lab

    assert citation["version"] == sam_lab.__version__
    assert citation.get("repository-code", "") == book.configuration()["repository"]["url"]
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


def test_the_licence_covers_code_and_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in text
    assert "https://creativecommons.org/licenses/by/4.0/" in text


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split()
    described = re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE)
    assert sorted(phony) == sorted(described)


CLOSING = (ROOT / "book" / "closing.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_closing_page_says_of_each_claim_what_the_stored_runs_say():
    """Below each of its paragraphs, in a comment, stand the verdicts that it puts into words."""
    comments = re.findall(r"<!-- held by tests/test_documents\.py\n(.*?)\n-->", CLOSING, re.DOTALL)
    said = [tuple(line.split(" | ")) for comment in comments for line in comment.splitlines()]
    assert len(comments) == CLOSING.count("<!--")
    verdicts = {
        (name, verdict.claim.id): verdict.verdict
        for name in {result for result, _, _ in said}
        for verdict in judge(Result.load(ROOT / "book" / "results" / f"{name}.json"))
    }
    found = [(result, claim, verdicts.get((result, claim))) for result, claim, _ in said]
    assert said == found


def test_every_paper_that_a_page_links_to_is_in_the_bibliography():
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    known = set(re.findall(r"^ *(?:eprint|doi) *= *\{(.+)\}", entries, flags=re.MULTILINE))
    pages = sorted([*(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.ipynb")])
    for page in pages:
        text = page.read_text(encoding="utf-8")
        linked = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", text))
        linked |= set(re.findall(r"\(https://doi\.org/([^\s)]+)\)", text))
        assert linked <= known, page.name


def test_the_page_on_the_library_shows_every_room():
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"automodule:: sam_lab\.(\w+)", page))
    rooms = {room.name for room in pkgutil.iter_modules([str(ROOT / "sam_lab")])}
    assert shown == {room for room in rooms if not room.startswith("_")}
