"""Interactive figures that work live, on Colab, and in a page without any kernel.

:func:`slider` draws one frame a value beforehand. Its HTML is complete by itself: a picture, a
labelled range input (arrow keys and mouse), the other frames as data and a short script; it asks
for nothing from anywhere. In a kernel with ipywidgets, 7 or 8, a widget stands beside it, which can
draw a finer grid of values live. Where scripts are taken out, the first picture remains.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sam_lab._optional import require

FRAME_BYTES = 40_000  # what a frame should not exceed; fewer colours are tried until it fits
_COLORS = (128, 64, 32, 16)
_CSS_PIXELS = 96  # an inch

# Two figures with the same contents share an id: each is bound by itself, the later ones renamed.
# A browser may restore a slider's position when it reloads the page, hence the call at the end.
_SCRIPT = """
document.querySelectorAll('figure[id="ID"]').forEach((figure, n) => {
  if (figure.dataset.ready) return;
  figure.dataset.ready = "yes";
  const find = (selector) => figure.querySelector(selector);
  const [image, label, input, output] = ["img", "label", "input", "output"].map(find);
  const frames = JSON.parse(find('script[type="application/json"]').textContent);
  frames[input.defaultValue].src = image.src;
  if (n > 0) label.htmlFor = output.htmlFor = input.id += "-" + n;
  const show = () => {
    const frame = frames[input.value];
    image.src = frame.src;
    image.alt = frame.alt;
    output.value = frame.text;
    input.setAttribute("aria-valuetext", frame.text);
  };
  input.addEventListener("input", show);
  find(".sam-slider__controls").hidden = false;
  show();
});
"""


@dataclass(frozen=True)
class Frame:
    """One picture of a slider: a PNG, its size in CSS pixels, its value in words, its alt text."""

    png: bytes
    size: tuple[int, int]
    text: str
    alt: str

    @property
    def src(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Grid:
    """What a live widget can show: the values in words, where to start, and frame ``index``."""

    texts: list[str]
    start: int
    frame: Callable[[int], Frame]


class Slider:
    """An interactive figure; displaying it shows the best form that the front end knows.

    Made by :func:`slider`.

    Attributes:
        frames: the precomputed frames, one a value.
        start: index of the frame shown first.
        live: what the widget in a kernel shows; the precomputed frames unless given.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        start: int,
        label: str,
        caption: str | None = None,
        live: Grid | None = None,
    ) -> None:
        self.frames, self.start, self.label, self.caption = list(frames), start, label, caption
        self.live = live
        self._widget: Any = None

    @property
    def html(self) -> str:
        """The figure as HTML that needs no kernel, no style sheet and no network."""
        first = self.frames[self.start]
        width, height = first.size
        data = [
            {"src": "" if index == self.start else frame.src, "alt": frame.alt, "text": frame.text}
            for index, frame in enumerate(self.frames)
        ]
        # "<" would let a text end the script that holds it.
        frames = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
        contents = f"{self.label}\n{self.caption}\n{first.src}\n{frames}"
        name = f"sam-slider-{hashlib.sha256(contents.encode()).hexdigest()[:10]}"
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>\n" if self.caption else ""
        # The input speaks its value by itself, so the output is for the eye alone.
        return f"""\
<figure class="sam-slider" id="{name}" style="margin-inline:auto;max-width:{width}px">
<img class="sam-slider__frame" src="{first.src}" alt="{html.escape(first.alt)}" \
width="{width}" height="{height}" style="display:block;max-width:100%;height:auto">
<div class="sam-slider__controls" hidden style="margin:.5em 0">
<label for="{name}-input">{html.escape(self.label)}</label>
<input id="{name}-input" type="range" min="0" max="{len(self.frames) - 1}" step="1" \
value="{self.start}" autocomplete="off" aria-valuetext="{html.escape(first.text)}" \
style="width:20em;max-width:60%;vertical-align:middle">
<output for="{name}-input" aria-live="off">{html.escape(first.text)}</output>
</div>
{caption}<script type="application/json">{frames}</script>
<script>{_SCRIPT.replace("ID", name)}</script>
</figure>"""

    def __repr__(self) -> str:
        first, last = self.frames[0].text, self.frames[-1].text
        return f"[interactive figure: {self.label}, from {first} to {last}]"

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
        texts = [frame.text for frame in self.frames]
        grid = self.live or Grid(texts, self.start, self.frames.__getitem__)
        first = grid.frame(grid.start)
        picture = widgets.Image(
            value=first.png, format="png", width=first.size[0], layout={"max_width": "100%"}
        )
        control = widgets.SelectionSlider(
            options=[(text, index) for index, text in enumerate(grid.texts)],
            value=grid.start,
            description=self.label,
            continuous_update=self.live is None,  # drawing live, a frame at each stop is enough
            style={"description_width": "initial"},
            layout={"width": "auto", "max_width": "40em"},
        )

        def show(change: dict[str, Any]) -> None:
            picture.value = grid.frame(change["new"]).png

        control.observe(show, names="value")
        caption = [widgets.HTML(html.escape(self.caption))] if self.caption else []
        return widgets.VBox([picture, control, *caption])


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
    require("matplotlib", extra="book")
    values = list(values)
    if not values:
        raise ValueError("values must hold at least one value, got none")
    if not label.strip():
        raise ValueError("label must say what the slider changes, got an empty text")

    def text(value: Any) -> str:
        return f"{value if isinstance(value, str) else format.format(value)} {unit}".rstrip()

    def frame(value: Any) -> Frame:
        words = (
            alt(value) if callable(alt) else f"{alt.strip().rstrip('.')} ({label}: {text(value)})."
        )
        if not words.strip() or (isinstance(alt, str) and not alt.strip()):
            raise ValueError(f"alt must describe the figure, got an empty text for {text(value)}")
        png, size = _render(draw, value)
        return Frame(png, size, text(value), words.strip())

    def texts(given: Sequence[Any], name: str) -> list[str]:
        written = [text(value) for value in given]
        if len(set(written)) < len(written):
            raise ValueError(f"{name} must differ as they are written ({format!r}), got {written}")
        return written

    written = texts(values, "values")
    if start is not None and text(start) not in written:
        raise ValueError(f"start must be one of the values {', '.join(written)}, got {start!r}")
    first = 0 if start is None else written.index(text(start))
    frames = [frame(value) for value in values]
    sizes = {one.size for one in frames}
    if len(sizes) > 1:
        raise ValueError(f"draw must give figures of one size, got {sorted(sizes)} (CSS pixels)")
    grid = None
    if live is not None:
        finer = list(live)
        if not finer:
            raise ValueError("live must hold at least one value, got none")
        nearest = _nearest(finer, values[first])
        grid = Grid(texts(finer, "live"), nearest, cache(lambda index: frame(finer[index])))
    return Slider(frames, first, label, caption, grid)


def _nearest(values: Sequence[Any], value: Any) -> int:
    if value in values:
        return values.index(value)
    try:
        return min(range(len(values)), key=lambda index: abs(values[index] - value))
    except TypeError:  # text
        return 0


def _render(draw: Callable[[Any], Any], value: Any) -> tuple[bytes, tuple[int, int]]:
    """The figure of ``value`` as a small PNG and its size in CSS pixels; leaves no figure open."""
    from matplotlib.figure import Figure

    pyplot = sys.modules.get("matplotlib.pyplot")
    before = set(pyplot.get_fignums()) if pyplot else set()
    try:
        figure = draw(value)
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
