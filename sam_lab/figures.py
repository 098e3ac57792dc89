"""How results look: one style, and one function a kind of figure.

Every function takes the matplotlib axes first, draws arrays on it and returns it; none touches
pyplot or any other global state. Only :func:`use_style` does, which is its job.

The figures have an opaque, soft off-white ground with dark text, so that they read the same in a
light and in a dark page. Lines and labels do not rely on colour alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from sam_lab._optional import require
from sam_lab.experiments.lab.statistics import t_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sam_lab.experiments.lab.result import Run

GROUND = "#fbfaf6"
INK = "#222222"

# Okabe & Ito's hues (2008), with lightness moved so that each has a contrast of at least 3:1 to the
# ground and any two stay apart for readers with protanopia, deuteranopia or tritanopia.
COLORS = {
    "blue": "#0a5699",
    "vermillion": "#df6500",
    "green": "#009e64",
    "purple": "#b07aac",
    "wine": "#76300f",
    "ink": INK,
}

_STYLE: dict[str, Any] = {
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": 130,
    "savefig.dpi": "figure",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "legend.facecolor": GROUND,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "mathtext.fontset": "dejavusans",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dcd9d0",
    "grid.linewidth": 0.6,
    "image.cmap": "cividis",
}


def use_style() -> None:
    """Set matplotlib's defaults to the style of the book, for the rest of the session.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="book")
    cycler = require("cycler", extra="book").cycler
    matplotlib.rcParams.update(_STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = cycler(color=list(COLORS.values()))


def trajectory(
    ax: Axes,
    x: ArrayLike,
    ys: ArrayLike,
    label: str | None = None,
    color: str | None = None,
    *,
    each: bool = False,
    linestyle: str = "-",
) -> Axes:
    """A quantity along training, over seeds: the median, and the range from least to largest.

    Args:
        x: positions, (T,).
        ys: values, (T,) for one run or (seeds, T).
        label: name for the legend.
        color: a colour; the next of the axes' cycle unless given.
        each: draw every seed as a thin line instead of the range.

    Raises:
        ValueError: shapes that do not fit.
    """
    x, ys = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(ys, dtype=float))
    if ys.ndim != 2 or x.shape != ys.shape[1:]:
        raise ValueError(f"ys must be (T,) or (seeds, T) with x (T,), got {ys.shape}, {x.shape}")
    (line,) = ax.plot(x, np.median(ys, axis=0), label=label, color=color, linestyle=linestyle)
    shade = line.get_color()
    if each:
        ax.plot(x, ys.T, color=shade, linewidth=0.7, alpha=0.45)
    elif len(ys) > 1:
        ax.fill_between(x, ys.min(axis=0), ys.max(axis=0), color=shade, alpha=0.2, linewidth=0)
    return ax


def means(
    ax: Axes,
    x: ArrayLike,
    ys: ArrayLike,
    label: str | None = None,
    color: str | None = None,
    *,
    linestyle: str = "-",
) -> Axes:
    """A quantity against a setting, over seeds: the mean, with its 95% t-interval as a bar.

    Args:
        x: positions, (T,).
        ys: values, (seeds, T); at least two seeds.
        label: name for the legend.
        color: a colour; the next of the axes' cycle unless given.

    Raises:
        ValueError: shapes that do not fit.
    """
    x, ys = np.asarray(x, dtype=float), np.asarray(ys, dtype=float)
    if ys.ndim != 2 or x.shape != ys.shape[1:] or len(ys) < 2:
        raise ValueError(f"ys must be (two seeds or more, T), x (T,), got {ys.shape}, {x.shape}")
    half = t_quantile(len(ys) - 1) * ys.std(axis=0, ddof=1) / len(ys) ** 0.5
    ax.errorbar(
        x,
        ys.mean(axis=0),
        half,
        label=label,
        color=color,
        linestyle=linestyle,
        marker="o",
        markersize=5,
        capsize=3,
        elinewidth=1.2,
    )
    return ax


def edge_line(
    ax: Axes,
    value: ArrayLike,
    label: str,
    x: ArrayLike | None = None,
    color: str = INK,
    *,
    below: bool = False,
) -> Axes:
    """A theory's edge drawn on the data: dashed, with its name beside it instead of in a legend.

    Args:
        value: one height, or heights (T,) of an edge that moves.
        label: its name, such as ``"2/η"``.
        x: positions (T,) of a moving edge.
        below: put the name below the line, where the data lie above it.

    Raises:
        ValueError: a moving edge without fitting ``x``.
    """
    heights = np.asarray(value, dtype=float)
    style: dict[str, Any] = {"color": color, "linestyle": (0, (5, 3)), "linewidth": 1.3}
    if heights.ndim == 0:
        height = float(heights)
        ax.axhline(height, **style)
        at, transform = (1.0, height), ax.get_yaxis_transform()
    else:
        if x is None or np.shape(x) != heights.shape:
            given = None if x is None else np.shape(x)
            raise ValueError(f"an edge of shape {heights.shape} needs x of that shape, got {given}")
        positions = np.asarray(x, dtype=float)
        ax.plot(positions, heights, **style)
        at, transform = (float(positions[-1]), float(heights[-1])), ax.transData
    ax.annotate(
        label,
        at,
        xycoords=transform,
        xytext=(-2, -4 if below else 3),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        color=color,
    )
    return ax


def loss_and_sharpness(
    axes: Sequence[Axes],
    runs: Sequence[Run],
    label: str | None = None,
    color: str | None = None,
    *,
    edge: float | None = None,
    edge_label: str = "2/η",
    clock: Callable[[Run], ArrayLike] | None = None,
    clock_label: str = "step",
) -> Sequence[Axes]:
    """The classic pair for one setting: loss (log) on ``axes[0]``, sharpness on ``axes[1]``.

    Args:
        axes: two axes.
        runs: the seeds of one setting, with columns ``step``, ``loss`` and ``sharpness``.
        edge: where theory puts the sharpness; drawn dashed with ``edge_label``.
        clock: horizontal positions of a run; its column ``step`` unless given. Learning rate times
            step, say, lets runs of different learning rates share the time of gradient flow.
        clock_label: name and unit of the clock.

    Raises:
        ValueError: when ``axes`` are not two, or ``runs`` is empty.
    """
    if len(axes) != 2 or not runs:
        raise ValueError(f"two axes and at least one run are needed, got {len(axes)}, {len(runs)}")
    clocks = [np.asarray(run["step"] if clock is None else clock(run), dtype=float) for run in runs]
    shared = all(np.array_equal(times, clocks[0]) for times in clocks)
    for ax, name in zip(axes, ("loss", "sharpness"), strict=True):
        shade: Any = color
        if shared:
            trajectory(ax, clocks[0], [run[name] for run in runs], label, shade)
        else:  # nothing to take a median of: a line each
            for times, run in zip(clocks, runs, strict=True):
                text = label if run is runs[0] else None
                (line,) = ax.plot(times, run[name], label=text, color=shade, linewidth=1.0)
                shade = line.get_color()
        ax.set_xlabel(clock_label)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("training loss")
    axes[1].set_ylabel("sharpness λ₁")
    if edge is not None:
        edge_line(axes[1], edge, edge_label)
    return axes


def sharpness_and_edges(
    ax: Axes,
    runs: Sequence[Any],
    label: str | None = None,
    color: str = COLORS["blue"],
    *,
    gd_edge: bool = True,
) -> Axes:
    """Sharpness along training, on a logarithmic scale, with the edges that it is to be held to.

    Args:
        runs: the seeds of one setting, or records of an `EdgeRecorder`: each with the columns
            ``step``, ``sharpness``, ``sam_edge`` and ``gd_edge``, measured at the same steps. The
            SAM edge shown is the median over them; where it is 2/η everywhere, there is only one.
        label: name of the sharpness, for the legend.
        gd_edge: whether to draw 2/η, and to read that column.

    Raises:
        ValueError: no runs, or runs measured at different steps.
    """
    if not runs:
        raise ValueError("at least one run is needed, got none")
    x, sam = (np.array([run[name] for run in runs]) for name in ("step", "sam_edge"))
    if (x != x[0]).any():
        raise ValueError("the runs must be measured at the same steps")
    trajectory(ax, x[0], [run["sharpness"] for run in runs], label, color)
    gd = np.array([run["gd_edge"] for run in runs]) if gd_edge else np.inf
    if (sam < gd).any():
        # its name belongs in the legend: it lies on the sharpness, where a label would cover both
        style: dict[str, Any] = {"linestyle": (0, (5, 3)), "linewidth": 1.3}
        ax.plot(x[0], np.median(sam, axis=0), color=COLORS["vermillion"], label="SAM edge", **style)
    if gd_edge:
        edge_line(ax, np.median(gd, axis=0), "2/η", x[0])
    ax.set(xlabel="step", ylabel="sharpness λ₁")
    return log_scale(ax, "y")


def sharpness_and_valley(axes: Sequence[Axes], run: Mapping[str, np.ndarray]) -> list[Any]:
    """A run and the valley it bounces in, as a panel of `widgets.film` wants it.

    Above the sharpness and both edges, below the loss along one direction and the weights in it;
    dashed, the valley as it was at the start.

    Args:
        axes: two axes, the upper one first.
        run: what `sam_on_quadratics.filmed` returns.

    Returns:
        What moves: each has one vertex or member a measurement.

    Raises:
        ValueError: when the axes are not two.
    """
    if len(axes) != 2:
        raise ValueError(f"two axes are needed, got {len(axes)}")
    collections = require("matplotlib.collections", extra="book")
    above, below = axes
    blue, orange = COLORS["blue"], COLORS["vermillion"]
    step, along = run["step"], run["along"]
    head: dict[str, Any] = {"marker": "o", "markevery": [-1]}
    edge_line(above, run["gd_edge"][0], "2/η")
    # the edge is the thinner one and on top: where they meet, both are seen
    (sharpness,) = above.plot(step, run["sharpness"], color=blue, lw=4.5, ms=11, **head)
    (edge,) = above.plot(step, run["sam_edge"], color=orange, lw=1.6, ms=6, **head)
    for line in (sharpness, edge):
        line.set(clip_on=False, zorder=3, solid_capstyle="butt")
    points: dict[str, Any] = {"textcoords": "offset points"}
    start = (step[0], run["sharpness"][0])
    above.annotate("sharpness", start, xytext=(9, 8), va="bottom", color=blue, **points)
    start = (step[0], run["sam_edge"][0])  # beside where it rises
    above.annotate("SAM's edge", start, xytext=(28, 0), va="center", color=orange, **points)
    below.plot(along, run["valley"][0], color=INK, linestyle=(0, (5, 3)), linewidth=1.0, alpha=0.7)
    lines = [np.column_stack([along, valley]) for valley in run["valley"]]
    valleys = collections.LineCollection(lines, colors=blue, linewidths=2.2, capstyle="round")
    below.add_collection(valleys)
    weights = below.scatter(run["position"], run["loss"], s=80, color=orange, zorder=4, linewidth=0)
    for ax in axes:
        ax.grid(False)
    return [sharpness, edge, valleys, weights]


def log_scale(ax: Axes, *names: str) -> Axes:
    """Make axes ("x", "y" or both) logarithmic, with numbers as one says them: 0.5, 2, 10."""
    ticker = require("matplotlib.ticker", extra="book")
    for name in names:
        ax.set(**{f"{name}scale": "log"})
        axis = {"x": ax.xaxis, "y": ax.yaxis}[name]
        axis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    return ax


def contour(
    ax: Axes, x: ArrayLike, y: ArrayLike, z: ArrayLike, levels: ArrayLike | int = 12
) -> Axes:
    """Level lines of a function of two variables, quiet enough to draw a path on.

    Args:
        x, y: grid lines, (X,) and (Y,).
        z: values, (Y, X).
        levels: number of levels, or the levels.

    Raises:
        ValueError: shapes that do not fit.
    """
    x, y, z = (np.asarray(part, dtype=float) for part in (x, y, z))
    if z.shape != (y.size, x.size):
        raise ValueError(f"z must be (Y, X) = ({y.size}, {x.size}), got {z.shape}")
    ax.contourf(x, y, z, levels, cmap="cividis", alpha=0.25)
    ax.contour(x, y, z, levels, colors=INK, linewidths=0.5, alpha=0.35)
    ax.grid(visible=False)
    return ax


def path(ax: Axes, points: ArrayLike, label: str | None = None, color: str | None = None) -> Axes:
    """Iterates in the plane: a dot each, a ring at the start, a square at the end.

    Args:
        points: (T, 2).

    Raises:
        ValueError: another shape.
    """
    points = np.asarray(points, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points must be (T, 2), got {points.shape}")
    across, up = points.T
    (line,) = ax.plot(across, up, marker="o", markersize=3, linewidth=1.0, label=label, color=color)
    shade = line.get_color()
    ax.plot(across[:1], up[:1], marker="o", markersize=9, color=shade, markerfacecolor="none")
    ax.plot(across[-1:], up[-1:], marker="s", markersize=6, color=shade)
    return ax


def spectrum(
    ax: Axes,
    density: Any,
    label: str | None = None,
    color: str | None = None,
    *,
    floor: float = 1e-6,
) -> Axes:
    """A spectral density on a logarithmic scale, with a band of one standard error where known.

    Args:
        density: has ``grid`` and ``density`` (G,), and perhaps ``stderr`` (G,), as
            :meth:`sam_lab.Hessian.density` returns.
        floor: the least density shown, relative to the largest.

    Raises:
        ValueError: shapes that do not fit, or a density that is nowhere positive.
    """
    grid, height = _array(density.grid), _array(density.density)
    if grid.shape != height.shape or grid.ndim != 1:
        raise ValueError(f"grid and density must be (G,), got {grid.shape} and {height.shape}")
    if not height.size or not height.max() > 0:
        raise ValueError("density must be positive somewhere")
    least = height.max() * floor
    below = least / 10  # where the axis does not reach, instead of no logarithm at all
    (line,) = ax.plot(grid, np.maximum(height, below), label=label, color=color)
    stderr = getattr(density, "stderr", None)
    if stderr is not None:
        low, high = (np.maximum(height + sign * _array(stderr), below) for sign in (-1, 1))
        ax.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_yscale("log")
    ax.set_ylim(bottom=least)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("spectral density")
    return ax


def bars(
    ax: Axes,
    names: Sequence[str],
    values: ArrayLike,
    errors: ArrayLike | None = None,
    *,
    xlabel: str,
    highlight: Sequence[str] = (),
    format: str = "{:.3g}",
) -> Axes:
    """Costs side by side: horizontal bars from top to bottom, each with its number.

    Args:
        names: (N,), one a bar.
        values: (N,).
        errors: half widths of error bars, (N,).
        xlabel: quantity and unit.
        highlight: names drawn in colour; the others are grey, all coloured when empty.

    Raises:
        ValueError: shapes that do not fit, or a name to highlight that has no bar.
    """
    values, errors, rows = _rows(names, values, errors)
    unknown = set(highlight) - set(names)
    if unknown:
        raise ValueError(f"highlight names no bar: {sorted(unknown)}; bars are {list(names)}")
    chosen = set(highlight) or set(names)
    colors = [COLORS["blue"] if name in chosen else "#8b8880" for name in names]
    ax.barh(rows, values, height=0.62, color=colors, xerr=errors, ecolor=INK, capsize=3)
    ends = values if errors is None else values + errors
    for row, value, end in zip(rows, values, ends, strict=True):
        ax.annotate(
            format.format(value), (end, row), (5, 0), textcoords="offset points", va="center"
        )
    ax.margins(x=0.12)
    return _named_rows(ax, names, rows, xlabel)


def estimates(
    ax: Axes,
    names: Sequence[str],
    values: ArrayLike,
    errors: ArrayLike,
    *,
    xlabel: str,
    truth: float | None = None,
    truth_label: str = "exact",
    color: str = COLORS["blue"],
) -> Axes:
    """Estimates with error bars from top to bottom, and the true value where it is known.

    Args:
        names: (N,), one an estimate.
        values: (N,).
        errors: half widths of the error bars, (N,).
        xlabel: quantity and unit.
        truth: drawn as a dashed line, with ``truth_label`` beside it.

    Raises:
        ValueError: shapes that do not fit.
    """
    values, errors, rows = _rows(names, values, errors)
    ax.errorbar(values, rows, xerr=errors, fmt="o", color=color, capsize=4, markersize=6)
    if truth is not None:
        ax.axvline(truth, color=INK, linestyle=(0, (5, 3)), linewidth=1.3)
        ax.annotate(
            truth_label,
            (truth, 1.0),
            xycoords=ax.get_xaxis_transform(),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
        )
    ax.margins(y=0.25)
    return _named_rows(ax, names, rows, xlabel)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu()
    return np.asarray(values, dtype=float)


def _rows(
    names: Sequence[str], values: ArrayLike, errors: ArrayLike | None
) -> tuple[np.ndarray, Any, np.ndarray]:
    heights = _array(values)
    spread = None if errors is None else _array(errors)
    if heights.shape != (len(names),) or (spread is not None and spread.shape != heights.shape):
        shapes = f"{heights.shape} and {None if spread is None else spread.shape}"
        raise ValueError(f"values and errors must be ({len(names)},), one a name, got {shapes}")
    return heights, spread, np.arange(len(names))


def _named_rows(ax: Axes, names: Sequence[str], rows: np.ndarray, xlabel: str) -> Axes:
    ax.set_yticks(rows, list(names))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(xlabel)
    return ax
