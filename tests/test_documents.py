"""README, citation and licence say what is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
URL = CONFIG["repository"]["url"]
BRANCH = CONFIG["repository"]["branch"]


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run_and_show_the_edge():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
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


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "pyproject.toml", "CONTRIBUTING.md"])
def test_the_repository_has_one_address(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    owner = URL.rsplit("/", 1)[0]
    found = re.findall(rf"(?:{re.escape(owner)}|github/[\w-]+)/[\w.-]+", text)
    right = {URL, URL.removeprefix("https://github.com/").join(["github/", ""])}
    assert set(found) <= right
    assert found or name == "CONTRIBUTING.md"


def test_the_readme_opens_chapters_on_colab_on_the_configured_branch():
    links = re.findall(r"https://colab\.research\.google\.com/github/(\S+?)\)", README)
    repository = URL.removeprefix("https://github.com/")
    assert links
    for link in links:
        page = link.removeprefix(f"{repository}/blob/{BRANCH}/")
        assert (ROOT / page).is_file(), link


def test_every_file_the_readme_and_contributing_link_to_exists():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
        targets += re.findall(r'(?:src|href)="(?!\w+:|#)([^"]+)"', text)
        missing = [target for target in targets if not (ROOT / target).exists()]
        assert not missing, name


def test_the_citation_carries_the_version_and_the_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    import sam_lab

    assert citation["version"] == sam_lab.__version__
    assert citation["repository-code"] == URL
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
