"""Sliders: complete as HTML, live in a kernel, usable by mouse, keyboard and screen reader."""

import base64
import io
import json
import re
import sys
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from sam_lab import widgets
from sam_lab.widgets import Axis, Frame, Grid, Panel, Slider, film, slider, sliders

VIEW = "application/vnd.jupyter.widget-view+json"


def draw(value):
    figure = Figure(figsize=(3, 2), dpi=96)
    x = np.linspace(0, 1, 50)
    figure.add_subplot().plot(x, np.cos(10 * float(value) * x))
    return figure


def small(values=(0.1, 0.2, 0.3), **changes):
    return slider(draw, values, **{"label": "learning rate η", "alt": "A wave", **changes})


RATES_AND_RADII = {"learning rate η": [0.4, 0.8, 1.4], "radius ρ": [0, 0.02]}


def draw_two(rate, radius):
    figure = draw(rate)
    figure.axes[0].axhline(10 * radius)
    return figure


def two(values=RATES_AND_RADII, **changes):
    return sliders(draw_two, values, **{"alt": "A wave and a line", **changes})


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

    def all(self, tag):
        return [found for name, found in self.tags if name == tag]

    def one(self, tag):
        (attributes,) = self.all(tag)
        return attributes


def stored_in(text):
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
    stored = stored_in(html)
    alts = [frame["alt"] for frame in stored["frames"]]
    assert alts == ["Wave of 0.1", "Wave of 0.2", "Wave of 0.3"]
    assert [axis["texts"] for axis in stored["axes"]] == [["0.1 s", "0.2 s", "0.3 s"]]
    sources = [bool(frame["src"]) for frame in stored["frames"]]
    assert sources == [True, False, True]  # the first stands once


def test_two_sliders_are_one_picture_with_two_labelled_ranges():
    made = two(
        start=(0.8, 0.02),
        units={"radius ρ": "m"},
        caption="Move them.",
        alt=lambda rate, radius: f"Wave of {rate}, line at {radius}",
    )
    html = made._repr_mimebundle_()["text/html"]
    page = Parsed(html)
    assert page.one("img")["src"] == made.frames[3].src
    assert page.one("img")["alt"] == "Wave of 0.8, line at 0.02"
    inputs = page.all("input")
    names = [control["id"] for control in inputs]
    assert [label["for"] for label in page.all("label")] == names
    assert [output["for"] for output in page.all("output")] == names
    assert [(control["type"], control["min"], control["max"]) for control in inputs] == [
        ("range", "0", "2"),
        ("range", "0", "1"),
    ]
    assert [control["value"] for control in inputs] == ["1", "1"]
    assert [control["aria-valuetext"] for control in inputs] == ["0.8", "0.02 m"]
    assert re.findall(">(.*)</label>", html) == ["learning rate η", "radius ρ"]
    assert re.findall(">(.*)</output>", html) == ["0.8", "0.02 m"]
    assert "<figcaption>Move them.</figcaption>" in html
    stored = stored_in(html)
    texts = [axis["texts"] for axis in stored["axes"]]
    assert texts == [["0.4", "0.8", "1.4"], ["0 m", "0.02 m"]]
    assert [frame["alt"] for frame in stored["frames"]] == [
        f"Wave of {rate}, line at {radius}" for rate in (0.4, 0.8, 1.4) for radius in (0, 0.02)
    ]
    sources = [frame["src"] for frame in stored["frames"]]
    assert sources == [frame.src if frame is not made.frames[3] else "" for frame in made.frames]


def test_every_combination_is_drawn_once_and_shows_what_was_drawn_for_it():
    drawn = []

    def watch(rate, radius):
        drawn.append((rate, radius))
        return draw_two(rate, radius)

    made = sliders(watch, RATES_AND_RADII, alt="A wave")
    assert drawn == [(rate, radius) for rate in (0.4, 0.8, 1.4) for radius in (0, 0.02)]
    assert made.html and made.frames and len(drawn) == 6
    assert len({frame.png for frame in made.frames}) == 6
    for stops, values in {(0, 1): (0.4, 0.02), (2, 0): (1.4, 0)}.items():
        alone = slider(lambda values: draw_two(*values), [values], label="x", alt="x", format="{}")
        assert made.grid.frame(stops).png == alone.frames[0].png


def test_one_of_several_sliders_is_a_slider():
    several = sliders(draw, {"learning rate η": [0.1, 0.2, 0.3]}, alt="A wave", start=[0.2])
    assert several.html == small(start=0.2).html


@pytest.mark.parametrize("make", [small, two])
def test_the_html_asks_for_nothing(make):
    html = make().html
    addresses = {
        value for _, tag in Parsed(html).tags for key, value in tag.items() if key == "src"
    }
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "http" not in re.sub(r"[A-Za-z0-9+/=]{200,}", "", html) and "url(" not in html


def made_of(first="x", second="y", text="2", start=0, png=b"png", size=(1, 1), alt="B", caption=""):
    """Two sliders over four frames that were never drawn; what is given belongs to one of them."""
    axes = (Axis(first, ("1", text)), Axis(second, ("1", "2"), start))
    frames = {stops: Frame(b"%d%d" % stops, (1, 1), "A") for stops in ((0, 0), (0, 1), (1, 0))}
    last = Frame(png, (1, 1), alt)
    frames[0, start] = Frame(frames[0, start].png, size, "A")
    return Slider(Grid(axes, {**frames, (1, 1): last}.__getitem__), caption)


@pytest.mark.slow
def test_the_same_slider_has_the_same_html_and_another_has_another_id():
    assert small().html == small().html and two().html == two().html
    others = [
        {},
        {"first": "z"},
        {"second": "z"},
        {"first": "y", "second": "x"},
        {"text": "3"},
        {"start": 1},
        {"png": b"other"},
        {"size": (2, 2)},
        {"alt": "C"},
        {"caption": "Move them."},
    ]
    ids = {Parsed(made_of(**changes).html).one("figure")["id"] for changes in others}
    assert len(ids) == len(others)


def test_text_is_escaped():
    nasty = 'a "b" <i> & </script><script>alert(1)</script>'
    html = small(label=nasty, alt=nasty, caption=nasty, unit=nasty).html
    page = Parsed(html)
    assert len(page.scripts) == 2 and not [tag for tag, _ in page.tags if tag == "i"]
    assert page.one("img")["alt"].startswith(nasty)
    assert stored_in(html)["axes"][0]["texts"][0] == f"0.1 {nasty}"


def test_one_alt_text_is_told_apart_by_the_value():
    made = small(alt="A wave.", unit="s")
    assert made.frames[2].alt == "A wave (learning rate η: 0.3 s)."
    assert two().frames[1].alt == "A wave and a line (learning rate η: 0.4, radius ρ: 0.02)."


def test_values_may_be_text_and_numbers_have_a_format():
    made = slider(lambda v: draw(len(v)), ["tanh", "relu!"], label="activation", alt="A wave")
    assert made.grid.axes == (Axis("activation", ("tanh", "relu!"), 0),)
    assert small([1, 10], format="{:.1f}").grid.axes[0].texts == ("1.0", "10.0")
    assert repr(made) == "[interactive figure: activation, from tanh to relu!]"
    assert made._repr_mimebundle_()["text/plain"] == repr(made)
    assert repr(two()) == (
        "[interactive figure: learning rate η, from 0.4 to 1.4; radius ρ, from 0 to 0.02]"
    )


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": {}}, "values must name at least one slider, got none"),
        ({"values": {"rate": [1], "radius ρ": []}}, "at least one value, got none for 'radius ρ'"),
        ({"values": {"rate": [1], "radius": [2, 2]}}, r"values must differ .* got \['2', '2'\]"),
        ({"values": {"rate": [1], " ": [1]}}, "label must say what the slider changes"),
        ({"start": (0.8, 0.5)}, "start must be one of the values 0, 0.02, got 0.5"),
        ({"start": (0.8,)}, r"start must hold a value for each of \['learn.*'\], got \(0.8,\)"),
        ({"start": (0.8, 0, 0)}, "start must hold a value for each"),
        ({"units": {"radius": "m"}}, r"units must be those of the sliders .* got \['radius'\]"),
        ({"alt": " "}, "alt must describe the figure, got an empty text for 0.4, 0"),
        (
            {"alt": lambda rate, radius: "A wave" if radius < rate / 50 else ""},
            "text for 0.4, 0.02",
        ),
    ],
)
def test_what_makes_no_sliders_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        two(**changes)


def test_draw_must_return_figures_of_one_size():
    with pytest.raises(TypeError, match="draw must return a matplotlib Figure, got None"):
        slider(lambda value: None, [1], label="x", alt="Nothing")
    with pytest.raises(ValueError, match="figures of one size"):
        slider(lambda v: Figure(figsize=(v, 1)), [1, 2], label="x", alt="Nothing")
    with pytest.raises(TypeError, match="draw must return a matplotlib Figure, got None"):
        sliders(lambda x, y: None, {"x": [1], "y": [1]}, alt="Nothing")
    with pytest.raises(ValueError, match=r"figures of one size, got \[\(96, 96\), \(96, 192\)\]"):
        sliders(lambda x, y: Figure(figsize=(x, y)), {"x": [1], "y": [1, 2]}, alt="Nothing")


# --- live ----------------------------------------------------------------------------------------


class Fake:
    """A widget that remembers how it was made and can be moved."""

    def __init__(self, content=None, **traits):
        self.content = content
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
    made = defaultdict(list)

    def remember(name):
        def make(*args, **traits):
            made[name].append(Fake(*args, **traits))
            return made[name][-1]

        return make

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
    (box,) = ipywidgets_7["VBox"]
    picture, control, caption = box.content
    assert [picture] == ipywidgets_7["Image"] and [control] == ipywidgets_7["SelectionSlider"]
    assert [caption] == ipywidgets_7["HTML"] and caption.content == "&lt;b&gt;"
    assert control.options == [("0.1", 0), ("0.2", 1), ("0.3", 2)] and control.value == 1
    assert control.description == "learning rate η" and control.continuous_update
    assert picture.value == shown.frames[1].png
    control.move(2)
    assert picture.value == shown.frames[2].png
    assert shown._repr_mimebundle_()[VIEW] == bundle[VIEW]
    assert len(ipywidgets_7["VBox"]) == 1


def test_a_kernel_gets_a_control_for_each_of_several_sliders(ipywidgets_7):
    shown = two(start=(0.8, 0.02), caption="Move them.", units={"radius ρ": "m"})
    bundle = shown._repr_mimebundle_()
    assert bundle[VIEW]["model_id"] == "model" and bundle["text/html"] == shown.html
    picture, rate, radius, _ = ipywidgets_7["VBox"][0].content
    assert [rate, radius] == ipywidgets_7["SelectionSlider"]
    assert [rate.description, radius.description] == ["learning rate η", "radius ρ"]
    assert rate.options == [("0.4", 0), ("0.8", 1), ("1.4", 2)]
    assert radius.options == [("0 m", 0), ("0.02 m", 1)]
    assert (rate.value, radius.value) == (1, 1) and rate.continuous_update
    assert picture.value == shown.frames[3].png
    for control, stop, index in [(radius, 0, 2), (rate, 2, 4), (radius, 1, 5), (rate, 0, 1)]:
        control.move(stop)
        assert picture.value == shown.frames[index].png


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
    picture, control = ipywidgets_7["VBox"][0].content
    assert control.value == 4 and not control.continuous_update  # 0.31 is the nearest to 0.3
    control.move(2)
    control.move(4)
    control.move(2)
    assert drawn == [0.1, 0.3, 0.31, 0.2]
    assert picture.value == small([0.2]).frames[0].png
    assert len(stored_in(shown.html)["frames"]) == 2


def test_live_text_starts_where_the_figure_starts(ipywidgets_7):
    kinds = {"tanh": 1, "relu": 2, "gelu": 3}
    for live, start in ((["relu", "gelu", "tanh"], 2), (["relu", "gelu"], 0)):
        made = slider(lambda v: draw(kinds[v]), ["tanh"], label="x", alt="A wave", live=live)
        assert made.live.start == (start,)


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
from sam_lab.widgets import slider, sliders
def draw(value, start=0):
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([start, value])
    return figure
shown = slider(draw, [1, 2], label="slope", alt="A line", live=[1, 1.5, 2])
both = sliders(draw, {"end": [1, 2], "start": [3, 4]}, alt="A line", start=(2, 3))
display(both)
shown"""
    move = """
picture, control = shown._widget.children
before = picture.value
control.value = 1
print(control.options, control.label, picture.value != before, len(picture.value) > 1000)
picture, end, start = both._widget.children
start.value, end.value = 1, 0
print(end.label, start.label, picture.value == both.frames[1].png)"""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell(move)]
    )
    client(notebook, timeout=120, kernel_name="python3").execute()
    for output in notebook.cells[0].outputs:
        assert set(output.data) == {"text/plain", "text/html", VIEW}
        assert output.data[VIEW]["model_id"]
    said = notebook.cells[1].outputs[0].text
    assert said == "(('1', 0), ('1.5', 1), ('2', 2)) 1.5 True True\n1 4 True\n"


# --- films ---------------------------------------------------------------------------------------

FALL = [3.0, 1.0, 2.0, 0.5]


def panel(alt="A line falls", vertices=4, members=4, readings=None):
    """A line with a marker at its end, and a collection of curves and one of dots."""
    figure = Figure(figsize=(3, 2), dpi=96)
    ax = figure.add_subplot()
    ax.set(xlim=(0, 3), ylim=(0, 4), xticks=[], yticks=[])
    (line,) = ax.plot([0, 1, 2, 3][:vertices], FALL[:vertices], marker="o", markevery=[-1])
    curves = LineCollection([[(0, y), (1, 0), (3, y)] for y in FALL][:members])
    ax.add_collection(curves)
    dots = ax.scatter([0, 1, 2, 3], FALL)
    readings = {"loss": FALL} if readings is None else readings
    return Panel(figure, [line, curves, dots], alt, readings)


def short(*panels, moments=(0, 1, 2, 3), **changes):
    return film(panels or [panel()], moments, **{"label": "step", "seconds": 0.6, **changes})


def test_a_film_is_a_picture_of_its_end_with_a_button_and_a_labelled_range():
    made = short(caption="A & B", unit="s")
    bundle = made._repr_mimebundle_()
    assert bundle == {"text/plain": "[film: step, from 0 s to 3 s]", "text/html": made.html}
    page = Parsed(made.html)
    figure, image, control = page.one("figure"), page.one("img"), page.one("input")
    assert figure["class"] == "sam-film" and re.fullmatch(r"sam-film-\w{10}", figure["id"])
    assert image["alt"] == "A line falls" and (image["width"], image["height"]) == ("288", "192")
    assert page.one("label")["for"] == control["id"] == page.one("output")["for"]
    assert (control["type"], control["min"], control["max"]) == ("range", "0", "3")
    assert page.one("button")["type"] == "button"
    (hidden,) = [tag for _, tag in page.tags if "hidden" in tag]
    assert hidden["class"] == "sam-slider__controls"
    assert "<figcaption>A &amp; B</figcaption>" in made.html
    assert re.findall("<dt[^>]*>(.*?)</dt><dd[^>]*>(.*?)</dd>", made.html) == [("loss", "0.50")]
    assert "sam-slider" not in figure["class"]  # its picture is not one of several frames


def test_a_film_holds_drawings_and_what_is_said_of_each_moment():
    stored = stored_in(short(unit="s", autoplay=True).html)
    assert stored["axis"] == {"label": "step", "texts": ["0 s", "1 s", "2 s", "3 s"], "start": 0}
    assert stored["readings"] == [["3.00", "1.00", "2.00", "0.50"]]
    two_panels = short(replace(panel(), name="Left"), panel(), panel(readings={}))
    assert stored_in(two_panels.html)["spoken"][1] == "1; Left: loss 1.00; loss 1.00"
    assert stored["spoken"][1] == "1 s; loss 1.00" and len(stored["spoken"]) == 4
    assert (stored["period"], stored["autoplay"]) == (200, True)
    (svg,) = stored["drawings"]
    tree = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    line, curves, dots = (
        next(each for each in tree.iter() if each.get("id") == f"FILM-0-{name}")
        for name in ("line-0", "stack-1", "stack-2")
    )
    assert len(re.findall("[ML]", line.find(f"{space}path").get("d"))) == 4
    assert len(curves.findall(f"{space}path")) == len(dots.findall(f"{space}g/{space}use")) == 4
    assert "<style" not in svg and "<metadata" not in svg  # a style sheet would be the page's too
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert all(each.startswith("FILM-0-") for each in ids) and len(set(ids)) == len(ids)
    asked = set(re.findall(r"(?:url\(|href=\")#([^\")]*)", svg))
    assert asked and asked <= set(ids)


def test_a_film_asks_for_nothing_and_two_alike_are_the_same():
    html = short(panel(), panel("Another")).html
    assert html == short(panel(), panel("Another")).html
    assert [image["src"][:15] for image in Parsed(html).all("img")] == ["data:image/png;"] * 2
    pages = set(re.findall(r"https?:[^\s\"\\]*", html))
    assert pages == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names
    assert len(stored_in(html)["drawings"]) == 2 and len(html) < 100_000


def test_a_long_line_keeps_every_vertex_of_its_film():
    """Matplotlib drops vertices of lines that it has seen at a length of 128 and more."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots()
    (line,) = ax.plot(range(300), range(300))
    figure.canvas.draw()
    film([Panel(figure, [line], "A line")], range(300), label="x")


def test_a_film_escapes_text_and_closes_its_figures():
    from matplotlib import pyplot

    nasty = 'a "b" <i> & </script><script>alert(1)</script>'
    given = panel(nasty, readings={nasty: FALL})
    html = short(given, label=nasty, caption=nasty, unit=nasty).html
    page = Parsed(html)
    assert len(page.all("script")) == 2 and not page.all("i")
    assert page.one("img")["alt"] == nasty
    before = pyplot.get_fignums()
    figure, ax = pyplot.subplots()
    (line,) = ax.plot([1, 2])
    film([Panel(figure, [line], "A line")], ["a", "b"], label="x")
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: film([], [1, 2], label="x"), "needs a panel and two moments or more, got 0 and 2"),
        (lambda: short(moments=[1]), "needs a panel and two moments or more, got 1 and 1"),
        (lambda: short(moments=[1, 1, 2, 3]), "moments must differ as they are written"),
        (lambda: short(seconds=0), "seconds must be above 0, got 0"),
        (lambda: short(label=" "), "label must say"),
        (lambda: short(panel(alt=" ")), "alt must describe the drawing"),
        (lambda: short(panel(readings={"y": [1.0]})), r"a moment \(4\), got 1 of 'y'"),
        (lambda: short(panel(vertices=3)), r"a moment \(4\), got 3 in Line2D"),
        (lambda: short(panel(members=2)), r"a moment \(4\), got 2 in .*LineCollection"),
    ],
)
def test_what_makes_no_film_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
    """What a reader sees of a figure: picture, alt text, values, and what a screen reader says."""
    image, controls = figure.locator("img"), figure.locator("input").all()
    return (
        image.get_attribute("src"),
        image.get_attribute("alt"),
        figure.locator("output").all_inner_texts(),
        [control.get_attribute("aria-valuetext") for control in controls],
    )


def expected(made, *stops):
    frame = made.grid.frame(stops)
    texts = [axis.texts[stop] for axis, stop in zip(made.grid.axes, stops, strict=True)]
    return frame.src, frame.alt, texts, texts


@pytest.mark.browser
def test_arrow_keys_change_picture_text_and_value(page):
    made = small(start=0.2, unit="s")
    figure = page(made).locator("figure")
    assert state(figure) == expected(made, 1)
    figure.locator("label").click()  # the label belongs to the input
    for key, index in [
        ("ArrowRight", 2),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("Home", 0),
        ("End", 2),
    ]:
        figure.page.keyboard.press(key)
        assert state(figure) == expected(made, index), key


@pytest.mark.browser
def test_the_mouse_changes_picture_text_and_value(page):
    made = small()
    figure = page(made).locator("figure")
    box = figure.locator("input").bounding_box()
    middle = box["y"] + box["height"] / 2
    mouse = figure.page.mouse
    mouse.click(box["x"] + box["width"] - 3, middle)
    assert state(figure) == expected(made, 2)
    mouse.down()
    mouse.move(box["x"] + box["width"] / 2, middle)
    assert state(figure) == expected(made, 1)
    mouse.move(box["x"] + 3, middle)
    mouse.up()
    assert state(figure) == expected(made, 0)


@pytest.mark.browser
def test_each_of_two_sliders_answers_to_the_keyboard_and_keeps_the_others_place(page):
    made = two(start=(0.8, 0), units={"radius ρ": "m"})
    figure = page(made).locator("figure")
    press = figure.page.keyboard.press
    assert state(figure) == expected(made, 1, 0)
    figure.locator("label").nth(1).click()  # each label belongs to its input
    press("ArrowRight")
    assert state(figure) == expected(made, 1, 1)
    figure.locator("label").nth(0).click()
    press("ArrowRight")
    assert state(figure) == expected(made, 2, 1)
    press("Tab")
    press("Home")
    assert state(figure) == expected(made, 2, 0)
    press("Shift+Tab")
    press("Home")
    assert state(figure) == expected(made, 0, 0)
    names = [figure.get_by_role("slider", name=axis.label).count() for axis in made.grid.axes]
    assert names == [1, 1]


@pytest.mark.browser
def test_the_mouse_moves_each_of_two_sliders(page):
    made = two()
    figure = page(made).locator("figure")
    mouse = figure.page.mouse

    def at(control, share):
        box = figure.locator("input").nth(control).bounding_box()
        return box["x"] + 3 + share * (box["width"] - 6), box["y"] + box["height"] / 2

    mouse.click(*at(1, 1))
    assert state(figure) == expected(made, 0, 1)
    mouse.move(*at(0, 0))
    mouse.down()
    mouse.move(*at(0, 0.5))
    assert state(figure) == expected(made, 1, 1)
    mouse.move(*at(0, 1))
    mouse.up()
    assert state(figure) == expected(made, 2, 1)


@pytest.mark.browser
def test_a_slider_keeps_its_size_and_place_when_its_value_changes(page):
    figure = page(two({"rate": [1, 1000], "kind": ["a", "rather long"]})).locator("figure")
    inputs = figure.locator("input").all()
    before = [control.bounding_box() for control in inputs]
    assert len({(box["x"], box["width"]) for box in before}) == 1  # below each other
    for control in inputs:
        control.press("End")
    assert [control.bounding_box() for control in inputs] == before


@pytest.mark.browser
def test_several_on_a_page_move_alone_even_twins(page):
    one, other = small(), small([1, 2], label="frequency")
    tab = page(one, other, one)
    first, second, twin = (tab.locator("figure").nth(index) for index in range(3))
    twin.locator("label").click()
    tab.keyboard.press("ArrowRight")
    assert state(first) == expected(one, 0)
    assert state(second) == expected(other, 0)
    assert state(twin) == expected(one, 1)
    names = tab.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(names) == len(set(names)) == 6  # of three figures and their inputs


@pytest.mark.browser
def test_three_alike_with_two_sliders_each_move_alone(page):
    made = two()
    tab = page(made, made, made)
    figures = tab.locator("figure").all()
    for index, control, stops in [(2, 0, (1, 0)), (1, 1, (0, 1))]:
        figures[index].locator("label").nth(control).click()
        tab.keyboard.press("ArrowRight")
        assert state(figures[index]) == expected(made, *stops)
    assert state(figures[0]) == expected(made, 0, 0)
    assert state(figures[2]) == expected(made, 1, 0)
    names = tab.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(names) == len(set(names)) == 9
    tied = "figure => [...figure.querySelectorAll('output')].map(output => output.htmlFor.value)"
    for figure in figures:
        inputs = [control.get_attribute("id") for control in figure.locator("input").all()]
        assert figure.evaluate(tied) == inputs


@pytest.mark.browser
def test_it_fits_a_telephone_and_axe_finds_nothing(page):
    long = {"a label that goes on for rather longer than a line": [1, 2], "radius ρ": [0, 0.02]}
    tab = page(
        small(caption="A wave."),
        small([1, 2], label="frequency"),
        two(caption="A wave and a line."),
        two(),
        two(long, units={"radius ρ": "of the whole"}),
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(tab).response["violations"]
    assert [(rule["id"], rule["impact"]) for rule in found] == []


@pytest.mark.browser
@pytest.mark.parametrize("make", [small, two])
def test_without_scripts_the_first_picture_remains(make, browser):
    made = make()
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_content(made.html)
    assert tab.locator("img").is_visible()
    assert tab.locator("img").get_attribute("src") == made.frames[0].src
    controls = "label, input, output"
    assert not any(part.is_visible() for part in tab.locator(controls).all())
    context.close()


SEEN = """figure => ({
  vertices: figure.querySelector('[id$="line-0"] > path').getAttribute("d").match(/[ML]/g).length,
  curves: [...figure.querySelectorAll('[id$="stack-1"] > path')].map((e) => e.style.opacity),
  dots: [...figure.querySelectorAll('[id$="stack-2"] use')].map((e) => e.style.display),
  reading: figure.querySelector("dd").textContent,
  spoken: figure.querySelector("input").getAttribute("aria-valuetext"),
  moment: figure.querySelector("output").value,
  button: figure.querySelector("button").textContent,
})"""


@pytest.mark.browser
def test_a_film_opens_at_its_first_moment_and_answers_to_the_keyboard(page):
    figure = page(short()).locator("figure")
    drawing = figure.get_by_role("img", name="A line falls")
    assert drawing.count() == 1 and drawing.evaluate("e => e.tagName") == "svg"
    seen = figure.evaluate(SEEN)
    assert seen == {
        "vertices": 1,
        "curves": ["1", "0", "0", "0"],
        "dots": ["", "none", "none", "none"],
        "reading": "3.00",
        "spoken": "0; loss 3.00",
        "moment": "0",
        "button": "▶ Play",
    }
    figure.locator("label").click()
    figure.page.keyboard.press("ArrowRight")
    figure.page.keyboard.press("ArrowRight")
    seen = figure.evaluate(SEEN)
    assert (seen["vertices"], seen["reading"], seen["spoken"]) == (3, "2.00", "2; loss 2.00")
    assert seen["curves"] == ["0.2025", "0.45", "1", "0"]
    line = figure.locator('[id$="line-0"]')
    head = line.locator("use")
    last = line.locator("path").first.get_attribute("d").split("L")[-1].split()
    assert [head.get_attribute(name) for name in "xy"] == last


@pytest.mark.browser
def test_a_film_plays_to_its_end_is_paused_and_plays_again(page):
    figure = page(short(seconds=30)).locator("figure")
    tab, button = figure.page, figure.get_by_role("button")
    tab.clock.install()
    button.focus()
    tab.keyboard.press("Space")
    assert button.inner_text() == "❚❚ Pause"
    tab.clock.run_for(10_500)
    assert figure.evaluate(SEEN)["moment"] == "1"
    tab.keyboard.press("Enter")
    tab.clock.run_for(60_000)
    assert figure.evaluate(SEEN)["moment"] == "1" and button.inner_text() == "▶ Play"
    tab.keyboard.press("Enter")
    tab.clock.run_for(60_000)
    assert figure.evaluate(SEEN)["moment"] == "3" and button.inner_text() == "▶ Play"
    button.click()
    assert figure.evaluate(SEEN)["moment"] == "0"
    figure.locator("input").press("End")  # who takes the slider has paused it
    assert button.inner_text() == "▶ Play" and figure.evaluate(SEEN)["vertices"] == 4


@pytest.mark.browser
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_film_plays_by_itself_only_where_it_may(page, motion):
    tab = page(short())
    tab.emulate_media(reduced_motion=motion)
    alone = page(short(autoplay=True)).locator("figure")
    tab.wait_for_timeout(1500)
    assert alone.evaluate(SEEN)["moment"] == ("0" if motion == "reduce" else "3")
    still = page(short()).locator("figure")
    tab.wait_for_timeout(400)
    assert still.evaluate(SEEN)["moment"] == "0"


@pytest.mark.browser
def test_films_fit_a_telephone_move_alone_and_axe_finds_nothing(page):
    made = short(panel(), panel("Another"), caption="Two lines.")
    tab = page(made, made)
    first, twin = tab.locator("figure").all()
    twin.locator("label").click()
    tab.keyboard.press("End")
    assert [each.evaluate(SEEN)["vertices"] for each in (first, twin)] == [1, 4]
    names = tab.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(names) == len(set(names))
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(tab).response["violations"]
    assert [(rule["id"], rule["impact"]) for rule in found] == []


@pytest.mark.browser
def test_without_scripts_the_end_of_a_film_remains(browser):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_content(short().html)
    assert tab.locator("img").is_visible() and tab.locator("dd").inner_text() == "0.50"
    assert not any(part.is_visible() for part in tab.locator("button, label, input, output").all())
    context.close()


def test_a_slider_can_be_made_of_frames():
    frame = Frame(b"png", (1, 1), "A dot")
    made = Slider(Grid((Axis("x", ("1",)),), {(0,): frame}.__getitem__))
    assert made.frames == [frame]
    assert made._repr_mimebundle_()["text/html"].count("data:image/png") == 1
