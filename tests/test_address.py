"""The repository's address: one place holds it, every other follows, and without it none is named.

The addresses here are those of repositories that exist, so that no name is left to register.
"""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from book_tool import ROOT, address, book
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

URL = "https://github.com/pytorch/pytorch"
COLAB = "https://colab.research.google.com/github/pytorch/pytorch/blob/main/book"
CARRIERS = {Path(name) for name in ("README.md", "CITATION.cff", "pyproject.toml", "_config.yml")}
CARRIERS |= set(book.notebooks())
UNREAD = shutil.ignore_patterns("results", "__pycache__", ".ipynb_checkpoints")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """This checkout's files that may carry an address, without one."""
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=UNREAD)
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, tmp_path)
    assert address.main(["none"], tmp_path) == 0
    return tmp_path


def texts(root: Path) -> dict[Path, str]:
    """Every file of text below ``root``."""
    files = [path for path in root.rglob("*") if path.is_file() and ".git" not in path.parts]
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in files}


def carriers(root: Path, words: str) -> set[Path]:
    return {name for name, text in texts(root).items() if words in text}


# ── one place and the others ──────────────────────────────────────────────────────────────────


def test_all_places_of_this_checkout_follow_the_one():
    url = book.configuration()["repository"]["url"]
    assert url == "" or url == address.github(url)
    wanted = address.places(ROOT, url)
    assert wanted.keys() == CARRIERS
    stale = [str(name) for name, text in wanted.items() if text != (ROOT / name).read_text("utf-8")]
    assert stale == [], "`make address URL=…` writes them"


@pytest.mark.slow
def test_setting_an_address_writes_it_everywhere(copy, capsys):
    assert address.main([URL], copy) == 0
    assert carriers(copy, "pytorch/pytorch") == CARRIERS
    said = capsys.readouterr().out
    assert all(str(name) in said for name in CARRIERS) and f"The address is {URL}." in said
    assert book.configuration(copy)["repository"]["url"] == URL
    assert yaml.safe_load((copy / "CITATION.cff").read_text())["repository-code"] == URL
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Repository": URL}
    for name in book.notebooks(copy):
        notebook = book.read(copy / name)
        assert book.code_cells(notebook)[0].source == book.first_cell(copy, URL)
        link = f"[{book.title(name, copy)}]({COLAB}/{name.name})"
        assert carriers(copy, link.replace('"', '\\"')) == {
            Path("README.md"),
            Path("book/index.ipynb"),
        }


def test_without_an_address_none_is_named_and_the_front_pages_say_how_to_set_it(copy):
    assert carriers(copy, "colab.research.google.com") == {Path("book/_ext/buttons.py")}
    assert "repository-code" not in yaml.safe_load((copy / "CITATION.cff").read_text())
    assert "urls" not in tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    for name in book.notebooks(copy):
        assert book.code_cells(book.read(copy / name))[0].source == book.first_cell(copy, "")
    assert carriers(copy, address.UNSET.strip()) == {Path("README.md"), Path("book/index.ipynb")}


@pytest.mark.slow
@pytest.mark.parametrize("none", ["none", ""])
def test_an_address_can_be_set_changed_and_unset_without_a_trace(copy, none, capsys):
    before = texts(copy)
    address.main(["https://github.com/pytorch/vision"], copy)
    address.main([URL], copy)
    assert carriers(copy, "pytorch/vision") == set()
    assert address.main([none], copy) == 0
    assert capsys.readouterr().out.endswith("The address is unset.\n")
    assert texts(copy) == before


@pytest.mark.slow
def test_what_carries_the_address_already_is_not_written_again(copy, capsys):
    address.main([URL], copy)
    capsys.readouterr()
    assert address.main([URL], copy) == 0
    assert capsys.readouterr().out == f"The address is {URL}.\n"


# ── which addresses ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given",
    [
        URL,
        f"{URL}/",
        f"{URL}.git",
        "git@github.com:pytorch/pytorch.git",
        "ssh://git@github.com/pytorch/pytorch",
        "https://name:secret@github.com/pytorch/pytorch.git",  # which must not get into a file
    ],
)
def test_every_form_of_an_address_becomes_the_https_one(given):
    assert address.github(given) == URL


@pytest.mark.parametrize(
    "given",
    [
        "https://gitlab.com/pytorch/pytorch",
        "https://github.com/pytorch",
        "https://github.com/pytorch/pytorch/tree/main",
        "https://github.com.localhost/pytorch/pytorch",
        'https://github.com/pytorch/py"torch',
        f"{URL}\n",
        "/srv/book",
    ],
)
def test_anything_else_is_refused_by_name_and_changes_nothing(given, copy, capsys):
    before = texts(copy)
    assert address.main([given], copy) == 1
    said = capsys.readouterr().err
    assert f"{given!r} is not the address of a repository on GitHub" in said
    assert URL in said
    assert texts(copy) == before


def test_without_an_argument_the_remote_origin_gives_the_address(copy, capsys):
    git = ["git", "-C", str(copy)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert address.main([], copy) == 1
    assert "there is no git remote `origin`" in capsys.readouterr().err
    remote = "git@github.com:pytorch/pytorch.git"
    subprocess.run([*git, "remote", "add", "origin", remote], check=True)
    assert address.main([], copy) == 0
    assert book.configuration(copy)["repository"]["url"] == URL


@pytest.mark.parametrize(
    ("given", "passed"), [([], ""), (["URL="], " ''"), ([f"URL={URL}"], f" '{URL}'")]
)
def test_make_passes_on_the_address_it_is_given(given, passed):
    command = ["make", "--dry-run", "--old-file=.venv/.installed", "address", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"tools/address.py{passed}" in [
        line.partition(" ")[2].rstrip() for line in done.stdout.splitlines()
    ]


# ── in the rendered book ──────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_book_has_buttons_with_an_address_and_none_without(tmp_path):
    """A book of two pages, with the extensions and the settings of this one."""
    bs4 = pytest.importorskip("bs4")
    for folder in ("_ext", "_static", "_template"):
        shutil.copytree(ROOT / "book" / folder, tmp_path / "book" / folder)
    shutil.copy(ROOT / "book" / "references.bib", tmp_path / "book")
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "_config.yml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    toc = "format: jb-book\nroot: book/index\nchapters:\n- file: book/01_one\n"
    (tmp_path / "_toc.yml").write_text(toc, encoding="utf-8")
    for name in ("index", "01_one"):
        cells = [new_markdown_cell(f"# {name}\n\nWords."), new_code_cell("6 * 7")]
        notebook = book.clean(new_notebook(cells=cells))
        (tmp_path / "book" / f"{name}.ipynb").write_text(book.dumps(notebook), encoding="utf-8")

    def links() -> set[str]:
        book.render(tmp_path)
        page = (tmp_path / "_build" / "html" / "book" / "01_one.html").read_text(encoding="utf-8")
        found = bs4.BeautifulSoup(page, "html.parser").find_all("a", href=True)
        return {link["href"] for link in found}

    assert address.main(["none"], tmp_path) == 0
    assert not [link for link in links() if "colab" in link or "github" in link]
    assert address.main([URL], tmp_path) == 0
    with_address = links()
    assert {URL, f"{COLAB}/01_one.ipynb"} <= with_address
    assert any(link.startswith(f"{URL}/issues/new") for link in with_address)
