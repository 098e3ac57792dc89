"""Interactive figures that work live, on Colab, and in a page without any kernel.

:func:`slider` draws one frame a value beforehand, :func:`sliders` one a combination of values. The
HTML is complete by itself: a picture, a labelled range input for each slider (arrow keys and
mouse), the other frames as data and a short script; it asks for nothing from anywhere. In a kernel
with ipywidgets, 7 or 8, a widget stands beside it, which can draw a finer grid of values live.
Where scripts are taken out, the first picture remains.

:func:`film` shows something that happens: vector drawings whose lines grow, with a button that
plays them and a slider for the moment. It needs no kernel either; where scripts are taken out, the
last moment remains, as a picture.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any
from xml.etree import ElementTree

import numpy as np

from sam_lab._optional import require

FRAME_BYTES = 40_000  # what a frame should not exceed; fewer colours are tried until it fits
_COLORS = (128, 64, 32, 16)
_CSS_PIXELS = 96  # an inch

# Figures with the same contents come with the same ids: each is bound by itself, and the later ones
# get ids of their own. A browser may restore a slider's position when it reloads the page, hence
# the call at the end.
_SCRIPT = """
document.querySelectorAll('figure[id^="ID"]').forEach((figure, n) => {
  if (figure.dataset.ready) return;
  figure.dataset.ready = "yes";
  if (n > 0) figure.id += "-" + n;
  const find = (selector) => figure.querySelector(selector);
  const image = find("img");
  const [labels, inputs, outputs] =
    ["label", "input", "output"].map((tag) => [...figure.querySelectorAll(tag)]);
  const {axes, frames} = JSON.parse(find('script[type="application/json"]').textContent);
  const frameAt = (stops) =>
    frames[stops.reduce((index, stop, k) => index * axes[k].texts.length + stop, 0)];
  frameAt(axes.map((axis) => axis.start)).src = image.src;
  const show = () => {
    const frame = frameAt(inputs.map((input) => input.valueAsNumber));
    image.src = frame.src;
    image.alt = frame.alt;
    inputs.forEach((input, k) => {
      const text = axes[k].texts[input.value];
      outputs[k].value = text;
      input.setAttribute("aria-valuetext", text);
    });
  };
  inputs.forEach((input, k) => {
    labels[k].htmlFor = outputs[k].htmlFor = input.id = figure.id + "-input-" + k;
    input.addEventListener("input", show);
  });
  find(".sam-slider__controls").hidden = false;
  show();
});
"""

# The drawings hold all that moves: a line has a vertex a moment, of which those so far are shown; a
# collection has a member a moment, of which the present one is shown, and the last few faintly.
_FILM_SCRIPT = """
document.querySelectorAll('figure[id^="ID"]').forEach((figure, n) => {
  if (figure.dataset.ready) return;
  figure.dataset.ready = "yes";
  if (n > 0) figure.id += "-" + n;
  const find = (selector) => figure.querySelector(selector);
  const {axis, drawings, readings, spoken, period, autoplay} =
    JSON.parse(find('script[type="application/json"]').textContent);
  figure.querySelectorAll("img").forEach((image, k) => {
    image.insertAdjacentHTML("afterend", drawings[k].replaceAll("FILM", figure.id));
    const svg = image.nextElementSibling;
    svg.setAttribute("aria-label", image.alt);
    svg.style.cssText = image.style.cssText;
    image.remove();
  });
  const lines = [...figure.querySelectorAll('[id*="-line-"]')].map((group) => {
    const path = group.querySelector(":scope > path");
    const points = path.getAttribute("d").match(/[-.\\d]+ [-.\\d]+/g);
    return {path, points, head: group.querySelector("use")};
  });
  const stacks = [...figure.querySelectorAll('[id*="-stack-"]')].map((group) =>
    [...group.querySelectorAll("path, use")].filter((member) => !member.closest("defs")));
  const [input, output, button] = ["input", "output", "button"].map(find);
  const values = [...figure.querySelectorAll("dd")];
  const last = axis.texts.length - 1;
  let timer = null;
  const show = () => {
    const now = input.valueAsNumber;
    for (const {path, points, head} of lines) {
      path.setAttribute("d", "M" + points.slice(0, now + 1).join("L"));
      if (head) ["x", "y"].forEach((name, k) => head.setAttribute(name, points[now].split(" ")[k]));
    }
    for (const members of stacks)
      members.forEach((member, k) => {
        const opacity = k > now ? 0 : k === now ? 1 : 0.45 ** (now - k);
        member.style.display = opacity > 0.03 ? "" : "none";
        member.style.opacity = opacity;
      });
    values.forEach((value, k) => { value.textContent = readings[k][now]; });
    output.value = axis.texts[now];
    input.setAttribute("aria-valuetext", spoken[now]);
  };
  const pause = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "\\u25b6 Play";
  };
  const play = () => {
    if (input.valueAsNumber === last) input.value = 0;
    button.textContent = "\\u275a\\u275a Pause";
    show();
    timer = setInterval(() => {
      input.stepUp();
      show();
      if (input.valueAsNumber === last) pause();
    }, period);
  };
  button.addEventListener("click", () => (timer ? pause() : play()));
  input.addEventListener("input", () => { pause(); show(); });
  find("label").htmlFor = output.htmlFor = input.id = figure.id + "-input";
  find(".sam-slider__controls").hidden = false;
  input.value = axis.start;
  pause();
  show();
  if (autoplay && matchMedia("(prefers-reduced-motion: no-preference)").matches)
    new IntersectionObserver((seen, observer) => {
      if (!seen.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      if (!timer) play();
    }, {threshold: 0.6}).observe(figure);
});
"""


@dataclass(frozen=True)
class Frame:
    """One picture of a figure: a PNG, its size in CSS pixels, and its alternative text."""

    png: bytes
    size: tuple[int, int]
    alt: str

    @property
    def src(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Axis:
    """One slider: what it changes, its stops in words, and the index of the stop shown first."""

    label: str
    texts: tuple[str, ...]
    start: int = 0


@dataclass(frozen=True)
class Grid:
    """One frame for each combination of stops: ``frame(stops)``, one index an axis."""

    axes: tuple[Axis, ...]
    frame: Callable[[tuple[int, ...]], Frame]

    @property
    def start(self) -> tuple[int, ...]:
        """The stops shown first."""
        return tuple(axis.start for axis in self.axes)

    @property
    def frames(self) -> list[Frame]:
        """All frames; the stops of the last axis follow each other most closely."""
        stops = product(*(range(len(axis.texts)) for axis in self.axes))
        return [self.frame(each) for each in stops]


class Slider:
    """An interactive figure; displaying it shows the best form that the front end knows.

    Made by :func:`slider` and :func:`sliders`.

    Attributes:
        grid: the precomputed frames and what chooses among them.
        caption: text under the figure.
        live: what the widget in a kernel shows; the precomputed frames unless given.
    """

    def __init__(self, grid: Grid, caption: str | None = None, live: Grid | None = None) -> None:
        self.grid, self.caption, self.live = grid, caption, live
        self._widget: Any = None

    @property
    def frames(self) -> list[Frame]:
        """The precomputed frames; the values of the last slider follow each other most closely."""
        return self.grid.frames

    @property
    def html(self) -> str:
        """The figure as HTML that needs no kernel, no style sheet and no network."""
        axes, first = self.grid.axes, self.grid.frame(self.grid.start)
        width, height = first.size
        data = {
            "axes": [asdict(axis) for axis in axes],
            "frames": [
                {"src": "" if frame is first else frame.src, "alt": frame.alt}
                for frame in self.frames
            ],
        }
        # "<" would let a text end the script that holds it.
        stored = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
        contents = f"{self.caption}\n{first.size}\n{first.src}\n{stored}"
        name = f"sam-slider-{hashlib.sha256(contents.encode()).hexdigest()[:10]}"
        controls = "\n".join(_control(f"{name}-input-{k}", axis) for k, axis in enumerate(axes))
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>\n" if self.caption else ""
        return f"""\
<figure class="sam-slider" id="{name}" style="margin-inline:auto;max-width:{width}px">
<img class="sam-slider__frame" src="{first.src}" alt="{html.escape(first.alt)}" \
width="{width}" height="{height}" style="display:block;max-width:100%;height:auto">
<div class="sam-slider__controls" hidden style="margin:.5em 0">
<div style="display:grid;grid-template-columns:auto minmax(5em,22em) auto;\
gap:.3em .8em;align-items:center;justify-content:start;text-align:start">
{controls}
</div>
</div>
{caption}<script type="application/json">{stored}</script>
<script>{_SCRIPT.replace("ID", name)}</script>
</figure>"""

    def __repr__(self) -> str:
        axes = (
            f"{axis.label}, from {axis.texts[0]} to {axis.texts[-1]}" for axis in self.grid.axes
        )
        return f"[interactive figure: {'; '.join(axes)}]"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.html}
        widgets = _ipywidgets()
        if self._widget is None and widgets is not None:
            self._widget = self._make_widget(widgets)
        if self._widget is not None:
            bundle["application/vnd.jupyter.widget-view+json"] = {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self._widget.model_id,
            }
        return bundle

    def _make_widget(self, widgets: Any) -> Any:
        """The figure made of what ipywidgets 7 and 8 have in common."""
        grid = self.live or self.grid
        first = grid.frame(grid.start)
        picture = widgets.Image(
            value=first.png, format="png", width=first.size[0], layout={"max_width": "100%"}
        )
        controls = [
            widgets.SelectionSlider(
                options=[(text, index) for index, text in enumerate(axis.texts)],
                value=axis.start,
                description=axis.label,
                continuous_update=self.live is None,  # drawing live, a frame a stop is enough
                style={"description_width": "initial"},
                layout={"width": "auto", "max_width": "40em"},
            )
            for axis in grid.axes
        ]

        def show(change: dict[str, Any]) -> None:
            picture.value = grid.frame(tuple(control.value for control in controls)).png

        for control in controls:
            control.observe(show, names="value")
        caption = [widgets.HTML(html.escape(self.caption))] if self.caption else []
        return widgets.VBox([picture, *controls, *caption])


def slider(
    draw: Callable[[Any], Any],
    values: Sequence[Any],
    *,
    label: str,
    unit: str = "",
    start: Any = None,
    alt: str | Callable[[Any], str],
    caption: str | None = None,
    format: str = "{:g}",
    live: Sequence[Any] | None = None,
) -> Slider:
    """An interactive figure: ``draw(value)`` for each of ``values``, chosen by a slider.

    Works live (Jupyter, Colab) and without a kernel (the built book): see the module. Every frame
    is drawn when this is called, and every figure that ``draw`` makes is closed again.

    Args:
        draw: maps a value to a matplotlib figure; the size must be the same for all values.
        values: what the slider stops at, in order; numbers or text.
        label: what the slider changes, such as ``"learning rate η"``.
        unit: unit of the values, shown after them.
        start: the value shown first; the first one unless given.
        alt: what a reader who does not see the picture should know. A function of the value, or
            one text, to which label and value are added for each frame.
        caption: text under the figure.
        format: how a number is written, ``"{:g}"`` or such.
        live: a finer grid of values for a live kernel, whose frames are drawn as they are needed.

    Returns:
        An object that displays itself; as the last expression of a cell, or through ``display``.

    Raises:
        ValueError: empty or repeated ``values``, a ``start`` that is none of them, an empty
            ``label`` or ``alt``, frames of different sizes.
        TypeError: ``draw`` returns something other than a matplotlib figure.
        ImportError: matplotlib is not installed.
    """
    values = list(values)
    made = sliders(
        draw,
        {label: values},
        units={label: unit},
        start=None if start is None else (start,),
        alt=alt,
        caption=caption,
        format=format,
    )
    if live is not None:
        finer = list(live)
        axis = _axis(label, finer, unit, None, format, name="live")
        nearest = _nearest(finer, values[made.grid.start[0]])
        made.live = _grid(draw, [replace(axis, start=nearest)], [finer], alt)
    return made


def sliders(
    draw: Callable[..., Any],
    values: Mapping[str, Sequence[Any]],
    *,
    units: Mapping[str, str] | None = None,
    start: Sequence[Any] | None = None,
    alt: str | Callable[..., str],
    caption: str | None = None,
    format: str = "{:g}",
) -> Slider:
    """An interactive figure with several sliders: one frame for each combination of their values.

    As :func:`slider`, and every combination is drawn when this is called: with two sliders of four
    values each, 16 pictures of up to 40 kB lie in the page. ::

        sliders(draw, {"learning rate η": [0.4, 0.8], "radius ρ": [0, 0.02]}, alt="A path")

    Args:
        draw: maps one value of each slider, in their order, to a matplotlib figure; the size must
            be the same for all.
        values: for each slider what it changes, and what it stops at, in order; numbers or text.
        units: units of the values, by what the slider changes, shown after them.
        start: the values shown first, one a slider; the first ones unless given.
        alt: what a reader who does not see the picture should know. A function of the values, or
            one text, to which labels and values are added for each frame.
        caption: text under the figure.
        format: how a number is written, ``"{:g}"`` or such.

    Returns:
        An object that displays itself; as the last expression of a cell, or through ``display``.

    Raises:
        ValueError: no slider, empty or repeated values, ``units`` of no slider, a ``start`` that
            is none of the values or not one a slider, an empty label or ``alt``, frames of
            different sizes.
        TypeError: ``draw`` returns something other than a matplotlib figure.
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="book")
    stops = {label: list(given) for label, given in values.items()}
    if not stops:
        raise ValueError("values must name at least one slider, got none")
    units = units or {}
    if unknown := [label for label in units if label not in stops]:
        raise ValueError(f"units must be those of the sliders {list(stops)}, got {unknown}")
    starts = [None] * len(stops) if start is None else list(start)
    if len(starts) != len(stops):
        raise ValueError(f"start must hold a value for each of {list(stops)}, got {start!r}")
    axes = [
        _axis(label, stops[label], units.get(label, ""), first, format)
        for label, first in zip(stops, starts, strict=True)
    ]
    made = Slider(_grid(draw, axes, list(stops.values()), alt), caption)
    sizes = {frame.size for frame in made.frames}  # draws them all
    if len(sizes) > 1:
        raise ValueError(f"draw must give figures of one size, got {sorted(sizes)} (CSS pixels)")
    return made


@dataclass(frozen=True)
class Panel:
    """One drawing of a film; panels stand side by side, or below each other on a telephone.

    Attributes:
        figure: a matplotlib figure as it is at the end.
        moving: what happens in it. A line (``Line2D``) has one vertex a moment and grows; of its
            markers only the one on its last vertex may be drawn (``markevery=[-1]``), and goes
            along. A collection has one member a moment (``scatter``, ``LineCollection``) and shows
            the present one.
        alt: what a reader who does not see the drawing should know.
        readings: numbers under the drawing, by their names: one a moment.
        name: said before the readings to a reader who does not see which drawing they belong to.
    """

    figure: Any
    moving: Sequence[Any]
    alt: str
    readings: Mapping[str, Sequence[float]] = field(default_factory=dict)
    name: str = ""


class Film:
    """Drawings that play; displaying it shows them. Made by :func:`film`."""

    def __init__(self, html: str, description: str) -> None:
        self.html, self._description = html, description

    def __repr__(self) -> str:
        return f"[film: {self._description}]"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": self.html}


def film(
    panels: Sequence[Panel],
    moments: Sequence[Any],
    *,
    label: str,
    unit: str = "",
    caption: str | None = None,
    format: str = "{:g}",
    seconds: float = 10.0,
    autoplay: bool = False,
) -> Film:
    """Drawings in which something happens, with a button that plays it and a slider for the moment.

    Needs no kernel and no network. It opens at the first moment. The figures are closed.  ::

        figure, ax = plt.subplots()
        (line,) = ax.plot(steps, losses)
        film([Panel(figure, [line], alt="The loss falls.")], steps, label="step")

    Args:
        panels: the drawings.
        moments: what the slider stops at, in order; numbers or text.
        label: what passes, such as ``"step"``.
        unit: unit of the moments, shown after them.
        caption: text under the film.
        format: how a moment is written, ``"{:g}"`` or such.
        seconds: from the first moment to the last, played.
        autoplay: play once by itself when it comes into sight, unless the reader has asked for
            reduced motion.

    Returns:
        An object that displays itself.

    Raises:
        ValueError: no panel, fewer than two moments or moments that repeat, an empty label or alt
            text, ``seconds`` not above 0, or what moves does not have one vertex, member or reading
            a moment.
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="book")
    axis = _axis(label, list(moments), unit, None, format, name="moments")
    count = len(axis.texts)
    if not panels or count < 2:
        raise ValueError(
            f"a film needs a panel and two moments or more, got {len(panels)} and {count}"
        )
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds!r}")
    written = [
        {name: [f"{value:.2f}" for value in values] for name, values in panel.readings.items()}
        for panel in panels
    ]
    for panel, said in zip(panels, written, strict=True):
        if not panel.alt.strip():
            raise ValueError("alt must describe the drawing, got an empty text")
        for name, values in said.items():
            if len(values) != count:
                raise ValueError(
                    f"readings must be one a moment ({count}), got {len(values)} of {name!r}"
                )
    drawings = [_drawing(panel, number, count) for number, panel in enumerate(panels)]
    named = [(panel.name, said) for panel, said in zip(panels, written, strict=True)]
    data = {
        "axis": asdict(axis),
        "drawings": [svg for svg, _ in drawings],
        "readings": [values for said in written for values in said.values()],
        "spoken": [
            "; ".join([text, *filter(None, (_spoken(*each, k) for each in named))])
            for k, text in enumerate(axis.texts)
        ],
        "period": round(1000 * seconds / (count - 1)),
        "autoplay": autoplay,
    }
    stored = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    contents = f"{caption}\n{[(frame.alt, frame.src) for _, frame in drawings]}\n{stored}"
    name = f"sam-film-{hashlib.sha256(contents.encode()).hexdigest()[:10]}"
    shown = "\n".join(
        _panel(frame, {key: values[-1] for key, values in said.items()})
        for (_, frame), said in zip(drawings, written, strict=True)
    )
    text = f"<figcaption>{html.escape(caption)}</figcaption>\n" if caption else ""
    return Film(
        f"""\
<figure class="sam-film" id="{name}" style="margin-inline:auto;accent-color:#df6500">
<div style="display:flex;flex-wrap:wrap;gap:.6em 1em;justify-content:center">
{shown}
</div>
<div class="sam-slider__controls" hidden style="margin:.7em 0">
<div style="display:grid;grid-template-columns:6.5em auto minmax(4em,22em) auto;\
gap:.3em .8em;align-items:center;justify-content:center;text-align:start;width:100%">
<button type="button" style="font:inherit;padding:.4em;border:0;border-radius:6px;\
background:#0a5699;color:#fff;cursor:pointer">Play</button>
{_control(f"{name}-input", axis)}
</div>
</div>
{text}<script type="application/json">{stored}</script>
<script>{_FILM_SCRIPT.replace("ID", name)}</script>
</figure>""",
        f"{label}, from {axis.texts[0]} to {axis.texts[-1]}",
    )


def _spoken(name: str, readings: Mapping[str, Sequence[str]], moment: int) -> str:
    """The readings of a panel as a screen reader says them."""
    said = ", ".join(f"{key} {values[moment]}" for key, values in readings.items())
    return f"{name}: {said}" if name and said else said


def _panel(frame: Frame, readings: Mapping[str, str]) -> str:
    """A drawing as it is at the end, with its readings there."""
    said = "".join(
        f'<div><dt style="font-weight:normal;font-size:.8em">{html.escape(name)}</dt>'
        f'<dd style="margin:0;font-size:1.25em;font-variant-numeric:tabular-nums">{value}</dd>'
        "</div>"
        for name, value in readings.items()
    )
    width, height = frame.size
    return f"""\
<div style="flex:1 1 {round(0.85 * width)}px;max-width:{width}px">
<img src="{frame.src}" alt="{html.escape(frame.alt)}" width="{width}" height="{height}" \
style="display:block;max-width:100%;height:auto;border-radius:4px">
<dl style="display:flex;justify-content:space-around;margin:.4em 0;text-align:center;\
font-family:system-ui,sans-serif;line-height:1.35">{said}</dl>
</div>"""


def _drawing(panel: Panel, number: int, count: int) -> tuple[str, Frame]:
    """A panel as SVG that can play, and as a picture of its last moment; its figure is closed."""
    import matplotlib
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D

    for k, artist in enumerate(panel.moving):
        kind = "stack" if isinstance(artist, Collection) else "line"
        artist.set_gid(f"FILM-{number}-{kind}-{k}")
    raw = io.StringIO()
    # every vertex, and the same text for the same figure
    settings: Any = {"path.simplify": False, "svg.hashsalt": "film", "svg.fonttype": "path"}
    ground = panel.figure.get_facecolor()
    with matplotlib.rc_context(settings):
        for artist in panel.moving:
            if isinstance(artist, Line2D):  # its path was made with the settings of then
                artist.recache(always=True)
        panel.figure.savefig(raw, format="svg", facecolor=ground, metadata={"Date": None})
    svg = _clean(raw.getvalue(), number)
    for artist in panel.moving:
        if (found := _moments(svg, artist.get_gid())) != count:
            raise ValueError(
                f"what moves must have a vertex or member a moment ({count}), got {found} in "
                f"{artist}"
            )
        if isinstance(artist, Collection):  # the picture shows the last member alone
            for color, paint in (
                (artist.get_facecolor(), artist.set_facecolor),
                (artist.get_edgecolor(), artist.set_edgecolor),
            ):
                if len(color):
                    rgba: Any = np.resize(np.asarray(color), (count, 4))
                    rgba[:-1, 3] = 0
                    paint(rgba)
    png, size = _render(lambda: panel.figure)
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close(panel.figure)
    return svg, Frame(png, size, panel.alt.strip())


def _clean(svg: str, number: int) -> str:
    """matplotlib's SVG as part of a page: no style sheet, ids of its own, no more digits than show.

    `FILM` stands for the id of the film.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
    # what the style sheet said, which as part of a page would say it to the whole page
    svg = svg.replace('role="img"', 'role="img" stroke-linejoin="round"', 1)
    svg = re.sub(r'(\bid="|url\(#|href="#)(?!FILM)', rf"\g<1>FILM-{number}-", svg)
    svg = re.sub(
        r' (?:d|x|y)="[^"]*"',
        lambda part: re.sub(r"\d+\.\d+", lambda n: f"{round(float(n[0]), 2):g}", part[0]),
        svg,
    )
    return re.sub(r"\s+", " ", svg).replace("> <", "><").strip()


def _moments(svg: str, gid: str) -> int:
    """How many vertices the line ``gid`` has, or members the collection."""
    (group,) = (each for each in ElementTree.fromstring(svg).iter() if each.get("id") == gid)
    space = "{http://www.w3.org/2000/svg}"
    if "-line-" in gid:
        path = group.find(f"{space}path")
        return 0 if path is None else len(re.findall("[ML]", path.get("d", "")))
    kinds = (f"{space}path", f"{space}g/{space}use")
    return sum(len(group.findall(kind)) for kind in kinds)


def _axis(
    label: str, values: Sequence[Any], unit: str, start: Any, format: str, name: str = "values"
) -> Axis:
    """The slider over ``values``; errors call them ``name``."""

    def text(value: Any) -> str:
        return f"{value if isinstance(value, str) else format.format(value)} {unit}".rstrip()

    if not label.strip():
        raise ValueError("label must say what the slider changes, got an empty text")
    if not values:
        raise ValueError(f"{name} must hold at least one value, got none for {label!r}")
    written = tuple(text(value) for value in values)
    if len(set(written)) < len(written):
        raise ValueError(
            f"{name} must differ as they are written ({format!r}), got {list(written)}"
        )
    if start is None:
        return Axis(label, written)
    if text(start) not in written:
        raise ValueError(f"start must be one of the values {', '.join(written)}, got {start!r}")
    return Axis(label, written, written.index(text(start)))


def _grid(
    draw: Callable[..., Any],
    axes: Sequence[Axis],
    values: Sequence[Sequence[Any]],
    alt: str | Callable[..., str],
) -> Grid:
    """The frames over ``axes``, whose stops stand for ``values``, each drawn when first needed."""

    @cache
    def frame(stops: tuple[int, ...]) -> Frame:
        chosen = [given[stop] for given, stop in zip(values, stops, strict=True)]
        texts = [axis.texts[stop] for axis, stop in zip(axes, stops, strict=True)]
        if callable(alt):
            words = alt(*chosen).strip()
        elif words := alt.strip().rstrip("."):
            said = (f"{axis.label}: {text}" for axis, text in zip(axes, texts, strict=True))
            words = f"{words} ({', '.join(said)})."
        if not words:
            raise ValueError(
                f"alt must describe the figure, got an empty text for {', '.join(texts)}"
            )
        png, size = _render(lambda: draw(*chosen))
        return Frame(png, size, words)

    return Grid(tuple(axes), frame)


def _control(name: str, axis: Axis) -> str:
    """A row of the figure's controls: label, slider and value."""
    text = html.escape(axis.texts[axis.start])
    longest = max(map(len, axis.texts))  # room for it, or the slider would move with its value
    # The input speaks its value by itself, so the output is for the eye alone.
    return f"""\
<label for="{name}">{html.escape(axis.label)}</label>
<input id="{name}" type="range" min="0" max="{len(axis.texts) - 1}" step="1" \
value="{axis.start}" autocomplete="off" aria-valuetext="{text}" style="width:100%;margin:0">
<output for="{name}" aria-live="off" style="min-width:min({longest}ch,6em)">{text}</output>"""


def _nearest(values: Sequence[Any], value: Any) -> int:
    if value in values:
        return values.index(value)
    try:
        return min(range(len(values)), key=lambda index: abs(values[index] - value))
    except TypeError:  # text
        return 0


def _render(draw: Callable[[], Any]) -> tuple[bytes, tuple[int, int]]:
    """What ``draw`` gives as a small PNG and its size in CSS pixels; leaves no figure open."""
    from matplotlib.figure import Figure

    pyplot = sys.modules.get("matplotlib.pyplot")
    before = set(pyplot.get_fignums()) if pyplot else set()
    try:
        figure = draw()
        if not isinstance(figure, Figure):
            raise TypeError(f"draw must return a matplotlib Figure, got {figure!r:.100}")
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=figure.dpi, facecolor=figure.get_facecolor())
        size = tuple(round(inches * _CSS_PIXELS) for inches in figure.get_size_inches())
    finally:
        pyplot = sys.modules.get("matplotlib.pyplot")  # draw may have imported it
        if pyplot is not None:
            for number in set(pyplot.get_fignums()) - before:
                pyplot.close(number)
    return _compress(raw.getvalue()), (size[0], size[1])


def _compress(png: bytes) -> bytes:
    """The picture in as many palette colours as fit into `FRAME_BYTES`; at least the fewest."""
    from PIL import Image  # comes with matplotlib

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colors in _COLORS:
        small = io.BytesIO()
        picture.quantize(colors, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        if small.tell() <= FRAME_BYTES:
            break
    return small.getvalue()


def _ipywidgets() -> Any:
    """ipywidgets, when there is a kernel to answer it; None otherwise."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        return None
    try:
        return importlib.import_module("ipywidgets")
    except ImportError:
        return None
