"""Set the address of the repository, and write it everywhere that needs it.

    python tools/address.py URL     that of a repository on GitHub    (make address URL=…)
    python tools/address.py         that of the git remote origin     (make address)
    python tools/address.py none    none at all                       (make address URL=)

``_config.yml`` holds the address, and all other places are written from it. A copy begins without
one: an address that nobody owns is anybody's to register, and Colab runs what it finds there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import book
from book import BookError

GITHUB = re.compile(
    r"(?:https://(?:[^/@]+@)?github\.com/|git@github\.com:|ssh://git@github\.com/)"
    r"([A-Za-z0-9-]+/[A-Za-z0-9._-]+?)(?:\.git)?/?"
)
COLAB = "https://colab.research.google.com/github"
SETTING = re.compile(r"(?<=^  url: ).*$", flags=re.MULTILINE)
MARKED = re.compile(
    r"(?<=address: written by `make address`)([^\n]*\n).*?(^[^\n]*end of address)",
    flags=re.MULTILINE | re.DOTALL,
)
UNSET = """\
Nothing opens on **Colab** yet: this copy does not know the address of its repository. \
`make address URL=…` sets it (without `URL`: that of the git remote `origin`), and then every \
notebook has a link to Colab, and the book has buttons to Colab and to the repository.
"""


def github(url: str) -> str:
    """The https form of an address on GitHub, without a name or a token for logging in.

    Raises:
        BookError: ``url`` is not the address of a repository there.
    """
    found = GITHUB.fullmatch(url)
    if not found:
        raise BookError(
            f"{url!r} is not the address of a repository on GitHub, the one place from which Colab "
            "clones and opens notebooks; right would be, for instance, "
            "https://github.com/pytorch/pytorch, or `none` for no address"
        )
    return f"https://github.com/{found[1]}"


def origin(root: Path) -> str:
    """The address of the git remote ``origin``.

    Raises:
        BookError: there is no such remote.
    """
    command = ["git", "remote", "get-url", "origin"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise BookError("there is no git remote `origin`; name the address: make address URL=…")
    return done.stdout.strip()


def links(root: Path, url: str) -> str:
    """A paragraph with a link for every notebook that opens it on Colab."""
    branch = book.configuration(root)["repository"]["branch"]
    blob = f"{COLAB}/{url.removeprefix('https://github.com/')}/blob/{branch}"
    notebooks = [f"[{book.title(name, root)}]({blob}/{name})" for name in book.notebooks(root)]
    return f"Open on **Colab**, and run from the top: {', '.join(notebooks)}.\n"


def places(root: Path, url: str) -> dict[Path, str]:
    """Every file that depends on the address, with its text when the address is ``url``.

    Args:
        url: as :func:`github` gives it; empty for none.
    """
    paragraph = links(root, url) if url else UNSET
    blocks = {
        "README.md": paragraph,
        "CITATION.cff": f"repository-code: {url}\n" if url else "",
        "pyproject.toml": f'[project.urls]\nRepository = "{url}"\n' if url else "",
    }
    texts = {}
    for name, block in blocks.items():
        texts[Path(name)] = filled((root / name).read_text(encoding="utf-8"), block)
    configuration = (root / "_config.yml").read_text(encoding="utf-8")
    texts[Path("_config.yml")] = SETTING.sub(url or '""', configuration)
    for page in book.notebooks(root):
        notebook = book.stamp(book.read(root / page), book.first_cell(root, url))
        for cell in notebook.cells:
            cell.source = filled(cell.source, paragraph)
        texts[page] = book.dumps(notebook)
    return texts


def filled(text: str, block: str) -> str:
    """``text`` with ``block`` between the two marks, if it has them."""
    return MARKED.sub(lambda marks: f"{marks[1]}{block}{marks[2]}", text)


def main(arguments: list[str] | None = None, root: Path = book.ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", help="https or ssh; `none` or nothing in quotes for none")
    given = parser.parse_args(arguments).url
    try:
        url = "" if given in ("", "none") else github(origin(root) if given is None else given)
        for name, text in places(root, url).items():
            if text != (root / name).read_text(encoding="utf-8"):
                book.write(root / name, text)
                print(f"{name!s:<{book.WIDTH}} written")
    except BookError as error:
        print(f"address: {error}", file=sys.stderr)
        return 1
    print(f"The address is {url}." if url else "The address is unset.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
