"""Sliders: complete as HTML, live in a kernel, usable by mouse, keyboard and screen reader."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sam_lab import widgets
from sam_lab.widgets import Frame, Slider, slider

VIEW = "application/vnd.jupyter.widget-view+json"


def draw(value):
    figure = Figure(figsize=(3, 2), dpi=96)
    x = np.linspace(0, 1, 50)
    figure.add_subplot().plot(x, np.cos(10 * float(value) * x))
    return figure


def small(values=(0.1, 0.2, 0.3), **changes):
    return slider(draw, values, **{"label": "learning rate η", "alt": "A wave", **changes})


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts[-1] += data

    def one(self, tag):
        (attributes,) = [found for name, found in self.tags if name == tag]
        return attributes


def frames_of(text):
    return json.loads(Parsed(text).scripts[0])


def test_the_html_is_a_picture_with_a_labelled_range():
    made = small(start=0.2, unit="s", caption="Move it.", alt=lambda v: f"Wave of {v}")
    html = made._repr_mimebundle_()["text/html"]
    page = Parsed(html)
    figure, image = page.one("figure"), page.one("img")
    label, control, output = page.one("label"), page.one("input"), page.one("output")
    assert figure["class"] == "sam-slider" and re.fullmatch(r"sam-slider-\w{10}", figure["id"])
    assert image["alt"] == "Wave of 0.2" and image["src"] == made.frames[1].src
    assert (image["width"], image["height"]) == ("288", "192")
    assert label["for"] == control["id"] == output["for"]
    assert {key: control[key] for key in ("type", "min", "max", "step", "value")} == {
        "type": "range",
        "min": "0",
        "max": "2",
        "step": "1",
        "value": "1",
    }
    assert control["aria-valuetext"] == "0.2 s"
    assert "learning rate η</label>" in html and ">0.2 s</output>" in html
    assert "<figcaption>Move it.</figcaption>" in html
    stored = frames_of(html)
    assert [frame["alt"] for frame in stored] == ["Wave of 0.1", "Wave of 0.2", "Wave of 0.3"]
    assert [frame["text"] for frame in stored] == ["0.1 s", "0.2 s", "0.3 s"]
    assert [bool(frame["src"]) for frame in stored] == [True, False, True]  # the first stands once


def test_the_html_asks_for_nothing():
    html = small().html
    addresses = {
        value for _, tag in Parsed(html).tags for key, value in tag.items() if key == "src"
    }
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "http" not in re.sub(r"[A-Za-z0-9+/=]{200,}", "", html) and "url(" not in html


def test_the_same_slider_has_the_same_html_and_another_has_another_id():
    assert small().html == small().html
    ids = {Parsed(made.html).one("figure")["id"] for made in (small(), small(label="rate"))}
    assert len(ids) == 2


def test_text_is_escaped():
    nasty = 'a "b" <i> & </script><script>alert(1)</script>'
    html = small(label=nasty, alt=nasty, caption=nasty, unit=nasty).html
    page = Parsed(html)
    assert len(page.scripts) == 2 and not [tag for tag, _ in page.tags if tag == "i"]
    assert page.one("img")["alt"].startswith(nasty)
    assert frames_of(html)[0]["text"] == f"0.1 {nasty}"


def test_one_alt_text_is_told_apart_by_the_value():
    made = small(alt="A wave.", unit="s")
    assert made.frames[2].alt == "A wave (learning rate η: 0.3 s)."


def test_values_may_be_text_and_numbers_have_a_format():
    made = slider(lambda v: draw(len(v)), ["tanh", "relu!"], label="activation", alt="A wave")
    assert [frame.text for frame in made.frames] == ["tanh", "relu!"]
    assert [frame.text for frame in small([1, 10], format="{:.1f}").frames] == ["1.0", "10.0"]
    assert repr(made) == "[interactive figure: activation, from tanh to relu!]"
    assert made._repr_mimebundle_()["text/plain"] == repr(made)


def test_frames_are_small_and_true_to_the_figure():
    made = small()
    raw = io.BytesIO()
    draw(0.1).savefig(raw, dpi=96)
    exact, shown = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)
        for data in (raw.getvalue(), made.frames[0].png)
    )
    assert exact.shape == shown.shape and np.abs(exact - shown).mean() < 2
    assert all(len(frame.png) <= widgets.FRAME_BYTES for frame in made.frames)
    assert base64.b64decode(made.frames[0].src.partition(",")[2]) == made.frames[0].png


def test_a_busy_frame_is_given_fewer_colours():
    def noise(value):
        figure = Figure(figsize=(3, 2), dpi=96)
        picture = np.random.default_rng(value).random((192, 288, 3)) * [1, 0.2, 0.2]
        figure.figimage(picture)
        return figure

    (frame,) = slider(noise, [0], label="seed", alt="Noise").frames
    assert len(Image.open(io.BytesIO(frame.png)).getcolors()) <= 32


def test_a_figure_at_another_resolution_is_shown_at_its_size():
    def fine(value):
        figure = draw(value)
        figure.set_dpi(192)
        return figure

    (frame,) = slider(fine, [1], label="x", alt="A wave").frames
    assert frame.size == (288, 192)
    assert Image.open(io.BytesIO(frame.png)).size == (576, 384)


def test_no_figure_stays_open():
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    mine = plt.figure()

    def with_pyplot(value):
        plt.figure()  # one too many
        figure, ax = plt.subplots(figsize=(2, 1))
        ax.plot([0, value])
        if value == 3:
            raise RuntimeError("bad value")
        return figure

    slider(with_pyplot, [1, 2], label="x", alt="A line")
    with pytest.raises(RuntimeError, match="bad value"):
        slider(with_pyplot, [3], label="x", alt="A line")
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": []}, ValueError, "values must hold at least one"),
        ({"values": [1, 2, 1]}, ValueError, "values must differ as they are written"),
        ({"values": [1.0, 1.001], "format": "{:.1f}"}, ValueError, r"\['1.0', '1.0'\]"),
        ({"start": 0.7}, ValueError, "start must be one of the values 0.1, 0.2, 0.3, got 0.7"),
        ({"label": " "}, ValueError, "label must say what the slider changes"),
        ({"alt": ""}, ValueError, "alt must describe the figure"),
        ({"alt": lambda value: " "}, ValueError, "empty text for 0.1"),
        ({"live": []}, ValueError, "live must hold at least one"),
        ({"live": [1, 1]}, ValueError, "live must differ"),
    ],
)
def test_what_makes_no_slider_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        small(**changes)


def test_draw_must_return_figures_of_one_size():
    with pytest.raises(TypeError, match="draw must return a matplotlib Figure, got None"):
        slider(lambda value: None, [1], label="x", alt="Nothing")
    with pytest.raises(ValueError, match="figures of one size"):
        slider(lambda v: Figure(figsize=(v, 1)), [1, 2], label="x", alt="Nothing")


# --- live ----------------------------------------------------------------------------------------


class Fake:
    """A widget that remembers how it was made and can be moved."""

    def __init__(self, *children, **traits):
        self.children = children[0] if children else []
        self.__dict__.update(traits)
        self.model_id = "model"
        self._react = None

    def observe(self, react, names):
        assert names == "value"
        self._react = react

    def move(self, value):
        self.value = value
        self._react({"new": value})


@pytest.fixture
def ipywidgets_7(monkeypatch):
    """A kernel whose ipywidgets has what version 7.7 has of what we use, and no Stack."""
    made = {}

    def remember(name):
        return lambda *args, **traits: made.setdefault(name, Fake(*args, **traits))

    names = ("Image", "SelectionSlider", "HTML", "VBox")
    module = SimpleNamespace(**{name: remember(name) for name in names})
    monkeypatch.setitem(sys.modules, "ipywidgets", module)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    return made


def test_a_kernel_gets_a_widget_beside_the_html(ipywidgets_7):
    shown = small(start=0.2, caption="<b>")
    bundle = shown._repr_mimebundle_()
    assert bundle[VIEW] == {"version_major": 2, "version_minor": 0, "model_id": "model"}
    assert bundle["text/html"] == shown.html
    picture, control = ipywidgets_7["Image"], ipywidgets_7["SelectionSlider"]
    assert ipywidgets_7["VBox"].children == [picture, control, ipywidgets_7["HTML"]]
    assert control.options == [("0.1", 0), ("0.2", 1), ("0.3", 2)] and control.value == 1
    assert control.description == "learning rate η" and control.continuous_update
    assert picture.value == shown.frames[1].png
    control.move(2)
    assert picture.value == shown.frames[2].png
    assert shown._repr_mimebundle_()[VIEW] == bundle[VIEW]


def test_live_values_are_drawn_when_they_are_needed_and_once(ipywidgets_7):
    drawn = []

    def watch(value):
        drawn.append(value)
        return draw(value)

    shown = slider(
        watch, [0.1, 0.3], label="x", alt="A wave", start=0.3, live=[0.1, 0.15, 0.2, 0.25, 0.31]
    )
    assert drawn == [0.1, 0.3]
    shown._repr_mimebundle_()
    picture, control = ipywidgets_7["Image"], ipywidgets_7["SelectionSlider"]
    assert control.value == 4 and not control.continuous_update  # 0.31 is the nearest to 0.3
    control.move(2)
    control.move(4)
    control.move(2)
    assert drawn == [0.1, 0.3, 0.31, 0.2]
    assert picture.value == small([0.2]).frames[0].png
    assert len(frames_of(shown.html)) == 2


def test_live_text_starts_where_the_figure_starts(ipywidgets_7):
    kinds = {"tanh": 1, "relu": 2, "gelu": 3}
    for live, start in ((["relu", "gelu", "tanh"], 2), (["relu", "gelu"], 0)):
        made = slider(lambda v: draw(kinds[v]), ["tanh"], label="x", alt="A wave", live=live)
        assert made.live.start == start


def test_without_ipywidgets_or_kernel_there_is_the_html(monkeypatch):
    shown = small()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(shown._repr_mimebundle_()) == {"text/plain", "text/html"}
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert set(shown._repr_mimebundle_()) == {"text/plain", "text/html"}


@pytest.mark.slow
def test_in_a_kernel_with_the_installed_ipywidgets():
    pytest.importorskip("ipywidgets")
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    source = """
from matplotlib.figure import Figure
from sam_lab.widgets import slider
def draw(value):
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([0, value])
    return figure
shown = slider(draw, [1, 2], label="slope", alt="A line", live=[1, 1.5, 2])
shown"""
    move = """
picture, control = shown._widget.children
before = picture.value
control.value = 1
print(control.options, control.label, picture.value != before, len(picture.value) > 1000)"""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell(move)]
    )
    client(notebook, timeout=120, kernel_name="python3").execute()
    data = notebook.cells[0].outputs[0].data
    assert set(data) == {"text/plain", "text/html", VIEW} and data[VIEW]["model_id"]
    said = notebook.cells[1].outputs[0].text
    assert said == "(('1', 0), ('1.5', 1), ('2', 2)) 1.5 True True\n"


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture
def page(browser, tmp_path):
    """Open sliders in one page from the file system; nothing may be asked for or go wrong."""
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.set_default_timeout(10_000)
    asked, wrong = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))

    def show(*sliders):
        body = "\n".join(made.html for made in sliders)
        file = tmp_path / "page.html"
        title = "<!doctype html><html lang=en><meta charset=utf-8><title>Sliders</title><main>"
        file.write_text(f"{title}<h1>Sliders</h1>{body}</main></html>", encoding="utf-8")
        tab.goto(file.as_uri())
        return tab

    yield show
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert wrong == []
    tab.close()


def state(figure):
    """What a reader sees of a slider: picture, alt text, value, and what a screen reader says."""
    image, control = figure.locator("img"), figure.locator("input")
    return (
        image.get_attribute("src"),
        image.get_attribute("alt"),
        figure.locator("output").inner_text(),
        control.get_attribute("aria-valuetext"),
    )


def expected(frame: Frame):
    return frame.src, frame.alt, frame.text, frame.text


@pytest.mark.browser
def test_arrow_keys_change_picture_text_and_value(page):
    made = small(start=0.2, unit="s")
    figure = page(made).locator("figure")
    assert state(figure) == expected(made.frames[1])
    figure.locator("label").click()  # the label belongs to the input
    for key, index in [
        ("ArrowRight", 2),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("Home", 0),
        ("End", 2),
    ]:
        figure.page.keyboard.press(key)
        assert state(figure) == expected(made.frames[index]), key


@pytest.mark.browser
def test_the_mouse_changes_picture_text_and_value(page):
    made = small()
    figure = page(made).locator("figure")
    box = figure.locator("input").bounding_box()
    middle = box["y"] + box["height"] / 2
    mouse = figure.page.mouse
    mouse.click(box["x"] + box["width"] - 3, middle)
    assert state(figure) == expected(made.frames[2])
    mouse.down()
    mouse.move(box["x"] + box["width"] / 2, middle)
    assert state(figure) == expected(made.frames[1])
    mouse.move(box["x"] + 3, middle)
    mouse.up()
    assert state(figure) == expected(made.frames[0])


@pytest.mark.browser
def test_several_on_a_page_move_alone_even_twins(page):
    one, other = small(), small([1, 2], label="frequency")
    tab = page(one, other, one)
    first, second, twin = (tab.locator("figure").nth(index) for index in range(3))
    twin.locator("label").click()
    tab.keyboard.press("ArrowRight")
    assert state(first) == expected(one.frames[0])
    assert state(second) == expected(other.frames[0])
    assert state(twin) == expected(one.frames[1])
    names = tab.evaluate("[...document.querySelectorAll('input')].map(input => input.id)")
    assert len(set(names)) == 3


@pytest.mark.browser
def test_it_fits_a_telephone_and_axe_finds_nothing(page):
    tab = page(small(caption="A wave."), small([1, 2], label="frequency"))
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(tab).response["violations"]
    assert [(rule["id"], rule["impact"]) for rule in found] == []


@pytest.mark.browser
def test_without_scripts_the_first_picture_remains(browser):
    made = small()
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_content(made.html)
    assert tab.locator("img").is_visible()
    assert not tab.locator("input").is_visible()
    context.close()


def test_a_slider_can_be_made_of_frames():
    frame = Frame(b"png", (1, 1), "1", "A dot")
    assert Slider([frame], 0, "x")._repr_mimebundle_()["text/html"].count("data:image/png") == 1
