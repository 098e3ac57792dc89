"""Predictions made in the page and the boxes that settle them, in a small book and a browser."""

import re
from pathlib import Path

import pytest
from scratch_book import findings, render, shown, visits

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyter_book")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Playwright's own event loop
]

CHOICE = """\
<div class="prediction" id="01-where">

**Your prediction.** Where does the sharpness $\\lambda_1$ end?

1. well below the edge.
2. at $2/\\eta$, **twenty**
3. far above it, where the run diverges before anybody can measure a thing on a telephone

</div>"""
NUMBER = """\
<div class="prediction" id="01-times" data-min="0" data-max="50" data-step="1" data-unit="times">

**Your prediction.** How many times longer is the random step?

</div>"""
SETTLED = """\
<div class="settled" data-prediction="01-where" data-answer="2">

**It was: at $2/\\eta$.** The network is steered there.

</div>"""
# As code cells make them: Markdown with HTML blocks in it.
COMPUTED = """\
<div class="settled" data-prediction="01-times" data-answer="24">

It takes **24.3** times the length.

</div>"""
HERO = """\
<figure>
<svg role="img" aria-label="a line that rises" width="200" height="60"><path d="M0 60 200 0" \
stroke="gray"/></svg>
</figure>

**Below the picture**, $x^2$ in a paragraph of its own."""
UNKNOWN = '<div class="settled" data-prediction="nowhere" data-answer="1">\n\nWords.\n\n</div>'
FORBID = """Object.defineProperty(window, "localStorage", {
    get() { throw new DOMException("forbidden", "SecurityError"); }});"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    chapter = [
        "# One\n\nA question?",
        shown("hero", markdown=HERO, plain="a line"),
        f"## Predict\n\n{CHOICE}\n\n{NUMBER}",
        f"## Theory\n\n{SETTLED}",
        shown("times", markdown=COMPUTED, plain="24.3"),
        UNKNOWN,
    ]
    aside = ["# An aside\n\nWords.", CHOICE.replace("01-where", "where")]
    return render(tmp_path_factory.mktemp("book"), index=["# A book"], one=chapter, aside=aside)


@pytest.fixture
def visit(browser, folder):
    yield from visits(browser, folder)


def box(page, id="01-where"):
    return page.locator(f'div.prediction[id="{id}"]')


def answer(page, id="01-where"):
    return page.locator(f'div.settled[data-prediction="{id}"]')


def said(page, id="01-where") -> str:
    return " ".join(answer(page, id).inner_text().split())


def test_a_list_becomes_named_choices_and_the_answer_asks_for_one(visit):
    page = visit("one.html")
    group = page.get_by_role("group", name=re.compile("Where does the sharpness"))
    assert group.get_by_role("radio").count() == 3
    assert group.get_by_role("radio", checked=True).count() == 0
    assert said(page).startswith("You made no prediction: go back. It was: at")
    back = answer(page).get_by_role("link", name="go back")
    assert back.get_attribute("href") == "#01-where"
    back.click()
    assert box(page).bounding_box()["y"] < 300
    assert "Words." in answer(page, "nowhere").inner_text()
    assert "You" not in answer(page, "nowhere").inner_text()


def test_a_choice_is_shown_where_it_is_settled_in_words_and_not_by_colour_alone(visit):
    page = visit("one.html")
    page.get_by_label("well below the edge").check()
    assert said(page).startswith("You said: well below the edge (✗ wrong) · It was: at")
    page.get_by_label(re.compile("twenty")).check()
    assert re.match(r"You said: at .*, twenty \(✓ right\) · It was: at", said(page))
    page.wait_for_function("() => document.querySelector('.settled__said mjx-container') !== null")
    assert "\\(" not in answer(page).inner_text()
    assert answer(page).get_attribute("data-verdict") == "right"


def test_the_choice_outlives_the_page_and_can_be_taken_back(visit):
    page = visit("one.html")
    page.get_by_label("well below the edge").check()
    page.reload()
    assert page.get_by_label("well below the edge").is_checked()
    assert said(page).startswith("You said: well below")
    page.goto(page.url.replace("one.html", "aside.html"))  # another page, another prediction
    assert page.get_by_role("radio", checked=True).count() == 0
    page.go_back()
    page.get_by_role("button", name="Clear").first.click()
    assert said(page).startswith("You made no prediction")
    page.reload()
    assert page.get_by_role("radio", checked=True).count() == 0


def test_choices_and_numbers_can_be_made_from_the_keyboard_alone(visit):
    page = visit("one.html")
    page.get_by_label("well below the edge").focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    assert page.get_by_label(re.compile("twenty")).is_checked()
    handle = page.get_by_role("slider", name=re.compile("How many times"))
    handle.focus()
    assert handle.get_attribute("aria-valuetext") == "nothing chosen yet"
    page.keyboard.press("Enter")  # the middle, where it stands
    assert handle.get_attribute("aria-valuetext") == "25 times"
    page.keyboard.press("ArrowRight")
    assert handle.get_attribute("aria-valuetext") == "26 times"


def test_a_number_is_right_near_or_not(visit):
    page = visit("one.html")
    assert said(page, "01-times").startswith("You made no prediction: go back.")
    for value, verdict in (
        ("24", "✓ right"),
        ("26", "✓ right"),
        ("30", "≈ near"),
        ("50", "✗ wrong"),
    ):
        page.get_by_role("slider").fill(value)
        expected = f"You said: {value} times ({verdict}) · It was: 24 times It takes 24.3 times"
        assert said(page, "01-times").startswith(expected)
    page.reload()
    assert page.get_by_role("slider").input_value() == "50"


def test_it_works_for_as_long_as_the_page_where_storage_is_forbidden(visit):
    page = visit("one.html", script=FORBID)
    page.get_by_label("well below the edge").check()
    assert said(page).startswith("You said: well below")


def test_a_stored_choice_that_is_none_any_more_counts_as_none(visit):
    page = visit("one.html")
    page.evaluate("localStorage.setItem(`sam-lab:${location.pathname}#01-where`, '7')")
    page.reload()
    assert said(page).startswith("You made no prediction")


def test_without_a_script_the_boxes_are_readable_text(visit):
    page = visit("one.html", javascript=False)
    assert page.locator("input:visible").count() == 0
    for words in ("well below the edge", "twenty", "far above it", "How many times longer"):
        assert words in page.locator("article").inner_text()
    assert said(page).startswith("It was:")
    assert said(page, "01-times") == "It takes 24.3 times the length."


def test_markdown_that_a_cell_computes_is_rendered_inside_its_boxes(visit):
    page = visit("one.html")
    assert page.locator(".cell_output figure svg").is_visible()
    assert page.locator(".cell_output p strong", has_text="Below the picture").count() == 1
    assert page.locator(".cell_output .settled strong", has_text="24.3").count() == 1


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_nothing_and_nothing_hangs_over_the_side(scheme, width, visit):
    page = visit("one.html", color_scheme=scheme, viewport={"width": width, "height": 900})
    assert findings(page) == []
    page.get_by_label(re.compile("far above it")).check()
    page.get_by_role("slider").fill("30")
    assert findings(page) == []
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
    for each in page.locator("div.prediction, div.settled").all():
        edges = each.bounding_box()
        assert edges["x"] >= 0 and edges["x"] + edges["width"] <= width
        assert each.evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_on_paper_stand_the_choices_and_what_was_said_without_the_buttons(visit):
    page = visit("one.html")
    page.get_by_label("well below the edge").check()
    page.emulate_media(media="print")
    assert page.get_by_role("button", name="Clear").count() == 0
    assert page.locator(".settled__said").first.is_visible()
