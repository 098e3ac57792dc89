"""The map of the works, the bibliography and the ledger name the same works."""

import importlib
import inspect
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest

from sam_lab import experiments
from sam_lab.experiments.lab.registry import part

ROOT = Path(__file__).parents[1]
STATES = ("executed", "explained", "not here")


def plain(text: str) -> str:
    """Letters without marks and without the spellings of TeX, such as ``Mueller``."""
    for spelling, letters in {r"{\"u}": "ue", "ü": "ue", "ł": "l", "Ł": "L"}.items():
        text = text.replace(spelling, letters)
    letters = unicodedata.normalize("NFKD", re.sub(r"\\[\"'`^~=.]|[{}\\]", "", text))
    return "".join(c for c in letters if not unicodedata.combining(c))


class Entry(NamedTuple):
    """A work of the bibliography."""

    key: str
    surnames: list[str]
    years: set[str]  # of its publication, and of its first version on arXiv
    address: str


class Row(NamedTuple):
    """A row of the map."""

    label: str
    address: str
    about: str
    here: str

    @property
    def state(self) -> str:
        return self.here.split("**")[1]


def bibliography(text: str) -> list[Entry]:
    entries = []
    for key, body in re.findall(r"^@\w+\{([^,]+),\n(.*?)^\}", text, flags=re.DOTALL | re.MULTILINE):
        fields = dict(re.findall(r"^ *(\w+) *= *\{(.*)\},?$", body, flags=re.MULTILINE))
        surnames = [plain(name.split(",")[0]) for name in fields["author"].split(" and ")]
        number = fields.get("eprint", "")
        years = {fields["year"]} | ({f"20{number[:2]}"} if number else set())
        if number:
            address = f"https://arxiv.org/abs/{number}"
        elif "doi" in fields:
            address = f"https://doi.org/{fields['doi']}"
        else:
            address = fields["url"]
        entries.append(Entry(key, surnames, years, address))
    return entries


def rows(page: str) -> list[Row]:
    found = re.findall(r"^\| \[(.+?)\]\((\S+?)\) \| (.+?) \| (.+?) \|$", page, flags=re.MULTILINE)
    return [Row(*row) for row in found]


def works(source: str) -> list[tuple[str, str]]:
    """First author and year of every work that a claim's source names."""
    surname, others = r"[A-Z][\w-]+", r"(?:(?:,| &| et al\.) ?[\w-]*)*"
    return re.findall(rf"({surname}){others} (\d{{4}})\b", plain(source))


PAGE = (ROOT / "book" / "map.md").read_text(encoding="utf-8")
ENTRIES = bibliography((ROOT / "book" / "references.bib").read_text(encoding="utf-8"))
ROWS = rows(PAGE)


def test_every_work_of_the_bibliography_has_one_row_and_no_other_work_has_one():
    assert sorted(row.address for row in ROWS) == sorted(entry.address for entry in ENTRIES)
    assert len({entry.address for entry in ENTRIES}) == len(ENTRIES)
    lines = [line for line in PAGE.splitlines() if re.match(r"\| (?!Work |---)", line)]
    assert len(lines) == len(ROWS)


def test_every_row_names_its_work_as_the_bibliography_does():
    for row in ROWS:
        (entry,) = (one for one in ENTRIES if one.address == row.address)
        names, year = re.fullmatch(r"(.+) \((\d{4})\)", row.label).groups()
        listed = re.split(r", | and ", plain(names))
        full = entry.surnames if len(entry.surnames) <= 3 else [f"{entry.surnames[0]} et al."]
        assert listed == full, row.label
        assert year in entry.years, row.label


def test_every_row_is_executed_explained_or_excused():
    for row in ROWS:
        assert row.here.startswith(tuple(f"**{state}**" for state in STATES)), row.label
        if row.state == "explained":
            assert re.search(r"\]\(\w+\.ipynb\)", row.here), row.label
        if row.state == "not here":
            assert re.match(r"\*\*not here\*\*, (because|being) \w+", row.here), row.label


def test_every_page_that_the_map_links_to_exists():
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(
            r"^## (.+)$", (ROOT / "book" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", PAGE):
        page, _, anchor = target.partition("#")
        assert (ROOT / "book" / page).exists(), target
        assert not anchor or anchor in headings, target


def text_of(name: str) -> str:
    """An experiment, or the room of a function of the library, as it is written.

    Raises:
        AttributeError, ImportError, ValueError: there is none of that name.
    """
    if "." not in name:
        sources = [claim.source.text for claim in experiments.get(name).claims]
        module = importlib.import_module(f"sam_lab.experiments.{part(name)}.{name}")
        return "\n".join([inspect.getsource(module), *sources])
    room, *path = name.split(".")
    module = found = importlib.import_module(f"sam_lab.{room}")
    assert path[0] in module.__all__, name
    for attribute in path:
        found = getattr(found, attribute)
    return inspect.getsource(module)


def named_in(row: Row) -> list[str]:
    """The experiments and functions in a row."""
    return re.findall(r"(?<!claim )`([\w.]+)`", row.here)


EXECUTED = [row for row in ROWS if row.state == "executed"]


@pytest.mark.parametrize("row", EXECUTED, ids=lambda row: row.label)
def test_what_is_executed_exists_and_says_whose_it_is(row):
    """Its code names the work, or the row names the claim that stands for it."""
    names, claims = named_in(row), set(re.findall(r"claim `(.+?)`", row.here))
    assert names, "it names neither an experiment nor a function"
    (entry,) = (one for one in ENTRIES if one.address == row.address)
    texts = [plain(text_of(name)) for name in names]
    found = {c.id for name in names if "." not in name for c in experiments.get(name).claims}
    assert claims <= found
    assert claims or any(entry.surnames[0] in text for text in texts), names


def test_every_work_that_a_claim_is_charged_to_is_executed():
    states = {row.address: row for row in ROWS}
    charged = {
        (work, name)
        for name in experiments.names()
        for claim in experiments.get(name).claims
        for work in works(claim.source.text)
    }
    assert len({work for work, _ in charged}) > 30
    missing = []
    for (surname, year), name in sorted(charged):
        matching = [e for e in ENTRIES if e.surnames[0] == surname and year in e.years]
        assert matching, f"{surname} {year}, a source of {name}, is not in the bibliography"
        its = [states[entry.address] for entry in matching]
        if not any(row.state == "executed" and name in named_in(row) for row in its):
            missing.append(f"{surname} {year} is a source of {name}: the map does not say so")
    assert missing == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Long & Bartlett 2024", [("Long", "2024")]),
        ("Wu, Ma & E 2018", [("Wu", "2018")]),
        ("Blanc et al. 2020; Damian, Ma & Lee 2021", [("Blanc", "2020"), ("Damian", "2021")]),
        ("Kuczyński & Woźniakowski 1992 (bounds for both)", [("Kuczynski", "1992")]),
        ("Gur-Ari et al. 2018 (top subspace)", [("Gur-Ari", "2018")]),
        ("this book, after Zhou et al. 2025", [("Zhou", "2025")]),
        ("Cohen, Damian et al. 2024", [("Cohen", "2024")]),
        ("derived in chapter 3; the factor is ours", []),
        ("Hutchinson 1990, with a t-interval", [("Hutchinson", "1990")]),
    ],
)
def test_the_works_of_a_source_are_read_off_its_text(source, expected):
    assert works(source) == expected
