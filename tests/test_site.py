"""The rendered book in a real browser, and its links and pictures as they stand in the files.

Rendered from the outputs stored in book/ (``make html``), which takes under a minute when it has to
be done. Needs Chromium; where ``SAM_LAB_BROWSER=required`` (``make test``), its absence is a
failure, elsewhere these tests are skipped.
"""

import functools
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from book_tool import ROOT, address, book

bs4 = pytest.importorskip("bs4")
sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyter_book")
imagesize = pytest.importorskip("imagesize")  # Sphinx brings it

HTML = ROOT / "_build" / "html"

PAGES = [str(page.with_suffix(".html")) for page in book.pages()]
# The bare theme (sphinx-book-theme 1.3.0) has one finding that axe calls serious,
# label-content-name-mismatch at the search button of its top bar. The book shows no such bar, so
# nothing has to be excused here.
GRAVE = {"serious", "critical"}
VIOLATIONS = {
    "resultTypes": ["violations"]
}  # axe need not describe all that is well: half the time

pytestmark = [
    pytest.mark.browser,
    # Playwright's own event loop, left to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="session")
def html() -> Path:
    book.render()
    return HTML


class Visit:
    """A page open in a window of its own, with what it asked for and what it complained about."""

    def __init__(self, browser, url: str, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type in {"error", "warning"} else None,
        )
        self.page.goto(url)
        # MathJax and the theme's scripts have finished when this has been answered.
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        self.page.wait_for_timeout(300)

    @property
    def elsewhere(self) -> list[str]:
        """Requests that left the file system."""
        return [
            url for url in self.requests if urlsplit(url).scheme not in {"file", "data", "blob"}
        ]


@pytest.fixture(scope="module", params=PAGES)
def page_name(request) -> str:
    """Every page in turn: all tests that look at one run together."""
    return request.param


@pytest.fixture(scope="module")
def look(page_name, browser, html):
    """``look(width, scheme)``: the page in such a window, which the tests share. They only look."""
    opened: dict[tuple[int, str], Visit] = {}

    def window(width: int = 1280, scheme: str = "light") -> Visit:
        if (width, scheme) not in opened:
            opened[width, scheme] = Visit(browser, (html / page_name).as_uri(), width, scheme)
        return opened[width, scheme]

    yield window
    for one in opened.values():
        one.context.close()


@pytest.fixture
def visit(browser, html):
    """``visit(name)``: a page in a window that this test has to itself."""
    opened: list[Visit] = []

    def open_page(name: str) -> Visit:
        opened.append(Visit(browser, (html / name).as_uri()))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()


@functools.cache
def soup(path: Path) -> "bs4.BeautifulSoup":
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# ── In the browser ────────────────────────────────────────────────────────────────────────────


def test_the_front_door_leads_to_the_first_page(browser, html):
    page = browser.new_page()
    page.goto((html / "index.html").as_uri(), wait_until="commit")
    page.wait_for_url("**/book/index.html")
    assert page.locator("article h1").inner_text().strip()
    page.close()


def test_a_page_loads_without_a_request_elsewhere_or_a_complaint(look):
    seen = look()
    assert seen.page.title()
    assert seen.page.locator("article h1").first.inner_text()
    assert seen.elsewhere == []
    assert seen.complaints == []


def test_mathematics_is_typeset(look):
    seen = look()
    formulas = seen.page.locator("article .math").count()
    assert seen.page.locator("article mjx-container").count() >= formulas
    assert seen.page.locator("article mjx-merror").count() == 0


def test_every_slider_changes_its_figure_by_keyboard_and_by_mouse(page_name, look, visit):
    if look().page.locator(".sam-slider").count() == 0:
        return
    seen = visit(page_name)
    page = seen.page
    figures = page.locator(".sam-slider")
    places = [
        (index, axis)
        for index in range(figures.count())
        for axis in range(figures.nth(index).locator("input[type=range]").count())
    ]
    for index, axis in places:
        figure = figures.nth(index)
        handle = figure.locator("input[type=range]").nth(axis)
        image = figure.locator("img:visible").first

        def shown(image=image, figure=figure, axis=axis) -> tuple[str, str, str]:
            said = figure.locator("output").nth(axis).inner_text()
            return image.get_attribute("src"), image.get_attribute("alt"), said

        seen_so_far = [shown()]
        handle.focus()
        for press in ("Home", "ArrowRight", "End"):
            page.keyboard.press(press)
            seen_so_far.append(shown())
        first, second, last = seen_so_far[-3:]
        for part in range(3):  # the picture, its alternative text and the value beside the handle
            assert first[part] != second[part], (index, axis, part)
            if handle.get_attribute("max") != "1":  # of two values the second is the last
                assert second[part] != last[part], (index, axis, part)
        box = handle.bounding_box()
        page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
        assert shown() == first
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2, steps=4)
        page.mouse.up()
        assert shown() == last
        assert handle.evaluate("e => (e.labels[0] || {}).innerText || e.ariaLabel || ''").strip()
    assert seen.elsewhere == []
    assert seen.complaints == []


def test_the_book_opens_with_an_interactive_figure(visit):
    assert visit(PAGES[0]).page.locator("article .sam-slider").count() >= 1


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_nothing_serious(scheme, width, look):
    from axe_playwright_python.sync_playwright import Axe

    page = look(width, scheme).page
    assert page.locator("html").get_attribute("data-theme") == scheme
    # The theme makes what scrolls reachable by keyboard, a moment after the page has loaded.
    page.wait_for_function(
        "() => [...document.querySelectorAll('pre')].every(e => e.hasAttribute('tabindex'))"
    )
    found = [
        f"{violation['id']}: {node['target']} {node['html'][:120]}"
        for violation in Axe().run(page, options=VIOLATIONS).response["violations"]
        if violation["impact"] in GRAVE
        for node in violation["nodes"]
    ]
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hangs_over_the_side_of_a_telephone(scheme, look):
    page = look(390, scheme).page
    wide = page.evaluate(
        """() => [...document.querySelectorAll("article *")].filter(element => {
            const box = element.getBoundingClientRect();
            if (box.width === 0 || box.right <= innerWidth + 1) return false;
            for (let e = element.parentElement; e; e = e.parentElement)
                if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)
                    && e.getBoundingClientRect().right <= innerWidth + 1
                    && e !== document.body && e !== document.documentElement
                    && !e.matches(".bd-main, .bd-content, .bd-article-container")) return false;
            return true;
        }).map(element => element.outerHTML.slice(0, 120))"""
    )
    assert wide == []
    scrolled = "document.scrollingElement.scrollWidth - innerWidth"
    assert page.evaluate(scrolled) <= 0


def test_a_figure_of_several_panels_keeps_its_size_on_a_telephone_and_scrolls(look):
    page = look(390).page
    for figure in page.locator("article figure.wide").all():
        assert figure.locator("img").bounding_box()["width"] >= 600
        figure.evaluate("e => { e.scrollLeft = e.scrollWidth }")
        assert figure.evaluate("e => e.scrollLeft") > 0
        caption = figure.locator("figcaption").bounding_box()
        assert caption["x"] >= 0 and caption["x"] + caption["width"] <= 390  # it stays
        figure.evaluate("e => { e.scrollLeft = 0 }")


def test_on_a_desk_no_figure_scrolls(look):
    widths = "all => all.map(e => e.scrollWidth - e.clientWidth)"
    assert set(look(1280).page.locator("article figure").evaluate_all(widths)) <= {0}


def test_text_can_be_told_from_its_background_in_both_themes(look):
    for scheme, bright in (("light", False), ("dark", True)):
        page = look(scheme=scheme).page
        colour = page.locator("article p").first.evaluate("e => getComputedStyle(e).color")
        channels = [int(c) for c in re.findall(r"\d+", colour)[:3]]
        assert (sum(channels) > 384) is bright


# ── In the files ──────────────────────────────────────────────────────────────────────────────


def rendered(html: Path) -> list[Path]:
    return [path for path in html.rglob("*.html") if "_static" not in path.parts]


def test_as_wide_count_the_figures_that_are(html):
    for path in rendered(html):
        for figure in soup(path).select("article figure.align-default"):
            width, _ = imagesize.get(path.parent / unquote(figure.img["src"]))
            assert ("wide" in figure["class"]) == (width >= 900), figure["id"]


def test_every_internal_link_and_anchor_resolves(html):
    anchors: dict[Path, set[str]] = {}

    def anchors_of(path: Path) -> set[str]:
        if path not in anchors:
            page = soup(path)
            named = [tag["name"] for tag in page.find_all("a", attrs={"name": True})]
            anchors[path] = {tag["id"] for tag in page.find_all(id=True)} | set(named)
        return anchors[path]

    broken, followed = [], 0
    for source in rendered(html):
        for tag in soup(source).find_all(href=True) + soup(source).find_all(src=True):
            target = urlsplit(tag.get("href") or tag.get("src"))
            if target.scheme or target.netloc or tag.get("href") in {"", "#"}:
                continue
            path = (source.parent / unquote(target.path)).resolve() if target.path else source
            followed += 1
            if not path.is_file():
                broken.append(f"{source.name}: {target.geturl()}")
                continue
            fragment = unquote(target.fragment) if path.suffix == ".html" else ""
            if fragment and fragment not in anchors_of(path):
                broken.append(f"{source.name}: {target.geturl()} (no such anchor)")
    assert followed > 100
    assert broken == []


def test_every_picture_of_the_text_has_words_for_those_who_do_not_see_it(html):
    for name in PAGES:
        for image in soup(html / name).select("article img"):
            alt = image.get("alt", "").strip()
            assert len(alt.split()) >= 3, f"{name}: {str(image)[:100]}"
            assert Path(urlsplit(image["src"][:300]).path).name not in alt, name


def test_no_page_names_a_script_a_style_or_a_font_of_another_host(html):
    for path in rendered(html):
        page = soup(path)
        for tag in page.find_all(["script", "link", "img", "iframe", "source"]):
            if tag.name == "link" and tag.get("rel") == ["canonical"]:
                continue
            address = tag.get("src") or tag.get("href") or ""
            assert not re.match(r"(https?:)?//", address), f"{path.name}: {address}"
        inline = " ".join(script.get_text() for script in page.find_all("script"))
        assert not re.search(r"unpkg|jsdelivr|cdnjs|require\.js", inline), path.name


@pytest.mark.parametrize("name", [name for name in book.notebooks()], ids=str)
def test_notebooks_can_be_downloaded_and_open_on_colab_where_the_book_has_an_address(name, html):
    repository = book.configuration()["repository"]
    page = soup((html / name).with_suffix(".html"))
    links = {tag["href"] for tag in page.find_all("a", href=True)}
    (download,) = [link for link in links if link.endswith(name.name) and "_sources" in link]
    assert ((html / name).parent / download).is_file()
    where = repository["url"].removeprefix("https://github.com/")
    on_colab = f"{address.COLAB}/{where}/blob/{repository['branch']}/{name}" in links
    assert on_colab == bool(where)


def test_the_site_has_its_own_logo_and_icon_as_svg(html):
    page = soup(html / PAGES[0])
    icon = page.find("link", rel="icon") or page.find("link", rel="shortcut icon")
    assert icon["href"].endswith("favicon.svg")
    assert any(image["src"].endswith("logo.svg") for image in page.find_all("img"))
