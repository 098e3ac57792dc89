"""Search, filters and summary of the ledger's page, in a small book in a real browser."""

from pathlib import Path

import pytest
from scratch_book import findings, render, shown, visits

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyter_book")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Playwright's own event loop
]

HEADER = ["Statement", "Source", "Kind", "Criterion", "Set"]
YES, NO = "1.01 [0.98, 1.04] (3 seeds): reproduced", "2.0 [1.9, 2.1] (3 seeds): not reproduced"
OPEN = (
    "1.1 [0.9, 1.3] (3 seeds): inconclusive (it does not apply in 1 of 3 seeds: it is reproduced)"
)
OUT = "does not apply (undefined: SAM was no flatter than SGD here); 5 seeds"
NOT = "not run"


COMMAND = "`python -m sam_lab.experiments run it --scale paper --seeds 3 --out book/results`"


def tables(*experiments: tuple[str, list[str], list[list[str]]]) -> list[str]:
    parts = []
    for title, scales, rows in experiments:
        lines = [[*HEADER, *scales], ["---"] * (5 + len(scales)), *rows]
        lead = [f"- *{scale}*: images 500 (paper: 60,000). Not run: {COMMAND}." for scale in scales]
        parts.append(f"**{title}**")
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n".join(lead) + f"\n\n{table}")
    return parts


EDGE = (
    "Sharpness along gradient descent",
    ["Laptop", "Desktop", "Fast", "Paper"],
    [
        [
            *("**It rises to $2/\\eta$**", "Cohen et al. 2021", "paper", "≥ 1", "before"),
            *(YES, YES, YES, NOT),
        ],
        ["Random steps do nothing", "control", "control", "≤ 1", "after", NO, YES, YES, NOT],
    ],
)
LATE = (
    "The switching time",
    ["Laptop", "Paper"],
    [
        ["Late SAM is as flat", "Zhou et al. 2025", "paper", "≥ 0.8", "before", OUT, NOT],
        ["It comes down fast", "Zhou et al. 2025, code", "code", "≥ 2", "before", NO, NOT],
        ["The flat valley stays", "this book", "ours", "≥ 1", "before", OPEN, NOT],
    ],
)
OTHER = "| Word | Meaning |\n| --- | --- |\n| seed | a number |"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    def cells(experiment):
        return [shown("show()", markdown=text, plain=text) for text in tables(experiment)]

    page = [
        "# The ledger\n\nWords.",
        f"## How to read a row\n\n{OTHER}",
        "## Part III · Late in training",
        *cells(LATE),
        "## Part I · The edge",
        *cells(EDGE),
        "## Do you doubt a row?\n\nRun it.",
    ]
    return render(tmp_path_factory.mktemp("book"), index=["# A book"], ledger=page)


@pytest.fixture
def visit(browser, folder):
    yield from visits(browser, folder)


def statements(page) -> list[str]:
    cells = page.locator('table.ledger tr:visible td[data-label="Statement"]').all_inner_texts()
    return [" ".join(cell.split())[:12].strip() for cell in cells]


RISES, RANDOM, FLAT = "It rises to", "Random steps", "Late SAM is"
FAST, VALLEY = "It comes dow", "The flat val"


def bars(page) -> dict[str, list[str]]:
    boxes = page.locator(".ledger-bars > div").all()
    return {
        box.locator("h3").inner_text(): [
            " ".join(item.split()) for item in box.locator("li").all_inner_texts()
        ]
        for box in boxes
    }


def test_without_filters_everything_is_shown_and_counted(visit):
    page = visit("ledger.html")
    assert statements(page) == [FLAT, FAST, VALLEY, RISES, RANDOM]
    assert page.get_by_role("status").inner_text() == "5 of 5 claims"
    found = bars(page)
    assert list(found) == ["Laptop", "Desktop", "Fast", "Paper"]
    assert found == {
        "Laptop": [
            "✓ 1 reproduced",
            "✗ 2 not reproduced",
            "≈ 1 inconclusive",
            "– 1 does not apply",
        ],
        "Desktop": ["✓ 2 reproduced"],
        "Fast": ["✓ 2 reproduced"],
        "Paper": ["… 5 not run"],
    }
    assert page.get_by_role("button", name="Show all").count() == 0
    assert page.locator("table:not(.ledger)").is_visible()  # is none of its business


def test_each_filter_leaves_the_rows_that_it_names(visit):
    page = visit("ledger.html")
    for label, option, expected in (
        ("Part or experiment", "Part III · Late in training", [FLAT, FAST, VALLEY]),
        ("Part or experiment", "Sharpness along gradient descent", [RISES, RANDOM]),
        ("Source", "Zhou et al. 2025", [FLAT]),
        ("Kind", "paper", [FLAT, RISES]),
        ("Criterion set", "after", [RANDOM]),
        ("Scale", "Desktop", [RISES, RANDOM]),
        ("Verdict", "reproduced", [RISES, RANDOM]),
        ("Verdict", "not reproduced", [FAST, RANDOM]),
        ("Verdict", "inconclusive", [VALLEY]),
        ("Verdict", "does not apply", [FLAT]),
        ("Verdict", "not run", [FLAT, FAST, VALLEY, RISES, RANDOM]),
    ):
        page.get_by_label(label, exact=True).select_option(label=option)
        assert statements(page) == expected, option
        assert page.get_by_role("status").inner_text() == f"{len(expected)} of 5 claims"
        headings = " ".join(page.locator("article h2:visible").all_inner_texts())
        assert ("Part I ·" in headings) == bool({RISES, RANDOM} & set(expected))
        assert "How to read" in headings and "doubt" in headings
        page.get_by_role("button", name="Show all").click()
        page.wait_for_function("() => location.hash === ''")
        assert page.get_by_role("status").inner_text() == "5 of 5 claims"


def test_the_address_keeps_the_filters(visit):
    page = visit("ledger.html")
    page.get_by_label("Part or experiment").select_option(label="The switching time")
    page.get_by_label("Verdict").select_option(label="not reproduced")
    assert page.url.endswith("#part=the-switching-time&verdict=not-reproduced")
    page.reload()
    assert statements(page) == [FAST]


def test_a_scale_and_a_verdict_belong_together_and_the_bar_follows(visit):
    page = visit("ledger.html#scale=desktop&verdict=not-reproduced")
    assert page.get_by_role("status").inner_text() == "No claim of 5 matches."
    page.get_by_label("Scale", exact=True).select_option("Laptop")
    assert statements(page) == [FAST, RANDOM]
    assert bars(page) == {"Laptop": ["✗ 2 not reproduced"]}
    assert page.locator('td[data-label="Desktop"]:visible').count() == 0
    scales = page.locator(".ledger-scales li:visible em").all_inner_texts()
    assert scales == ["Laptop", "Laptop"]  # each experiment's line of the scale that is shown
    page.get_by_label("Part or experiment").select_option(label="The switching time")
    assert page.locator(".ledger-scales:visible").count() == 1


def test_search_finds_words_of_statement_source_and_experiment(visit):
    page = visit("ledger.html")
    for words, expected in (
        ("flat", [FLAT, VALLEY]),
        ("VALLEY flat", [VALLEY]),
        ("switching zhou", [FLAT, FAST]),
        ("nothing of the kind", []),
    ):
        page.get_by_role("searchbox", name="Search").fill(words)
        page.wait_for_timeout(250)
        assert statements(page) == expected
    assert "search=nothing" in page.url


def test_a_source_in_the_address_may_be_a_part_of_several(visit):
    page = visit("ledger.html#verdict=not-reproduced&source=Zhou")
    assert statements(page) == [FAST]
    assert page.get_by_label("Source", exact=True).input_value() == "zhou"
    page.evaluate("location.hash = 'source=Zhou'")
    page.get_by_text("2 of 5 claims").wait_for()
    page.evaluate("location.hash = 'do-you-doubt-a-row'")  # an anchor is no filter
    page.wait_for_timeout(100)
    assert statements(page) == [FLAT, FAST]


def test_filters_can_be_set_from_the_keyboard_alone(visit):
    page = visit("ledger.html")
    page.get_by_role("searchbox").focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("p")  # the kind that begins with it
    page.get_by_text("2 of 5 claims").wait_for()
    assert statements(page) == [FLAT, RISES]


def test_cards_are_still_tables_to_those_who_hear_them(visit):
    page = visit("ledger.html")
    table = page.get_by_role("table", name="The switching time")
    assert table.get_by_role("row").count() == 4
    assert table.get_by_role("columnheader", name="Criterion").count() == 1
    assert table.get_by_role("cell").count() == 21


def test_without_a_script_the_tables_stand_there_whole(visit):
    page = visit("ledger.html", javascript=False)
    assert page.locator("article table tbody tr:visible").count() == 6
    assert page.locator("article form:visible").count() == 0
    assert OUT in page.locator("article").inner_text()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_nothing_and_nothing_hangs_over_the_side(scheme, width, visit):
    page = visit("ledger.html", color_scheme=scheme, viewport={"width": width, "height": 900})
    assert findings(page) == []
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
    for each in page.locator(".ledger-controls *:visible, table.ledger td:visible").all():
        edges = each.bounding_box()
        assert edges["x"] >= 0 and edges["x"] + edges["width"] <= width
    page.get_by_label("Verdict").select_option(label="not reproduced")
    assert findings(page) == []


def test_four_scales_stand_side_by_side_and_on_a_telephone_those_not_run_take_no_room(visit):
    def cells(width):
        page = visit("ledger.html", viewport={"width": width, "height": 900})
        row = page.get_by_role("row").filter(has_text="Random steps")
        found = row.locator("td[data-verdict]:visible")
        return [(cell.bounding_box(), cell.get_attribute("data-label")) for cell in found.all()]

    wide, narrow = cells(1280), cells(390)
    assert [label for _, label in wide] == ["Laptop", "Desktop", "Fast", "Paper"]
    assert len({box["y"] for box, _ in wide}) == 1
    assert [label for _, label in narrow] == ["Laptop", "Desktop", "Fast"]
    assert len({box["x"] for box, _ in narrow}) == 1
