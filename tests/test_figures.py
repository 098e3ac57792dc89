"""Figures: a style legible to all in both themes, and pure functions of axes and arrays."""

import itertools
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from sam_lab import figures
from sam_lab.experiments import Run
from sam_lab.experiments.lab.statistics import t_interval
from sam_lab.figures import COLORS, GROUND, INK

# Machado, Oliveira & Fernandes (2009), severity 1.0, on linear RGB.
SIGHT = {
    "typical": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def linear(color):
    """Linear RGB of "#rrggbb"."""
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG 2 contrast ratio."""
    light, dark = sorted(
        (linear(color) @ [0.2126, 0.7152, 0.0722] for color in (one, other)), reverse=True
    )
    return (light + 0.05) / (dark + 0.05)


def lab(rgb):
    """CIELAB of linear RGB, white point D65."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture
def ax():
    return Figure().add_subplot()


@pytest.fixture
def axes():
    return Figure().subplots(2, 1)


def test_the_measures_of_colour_are_right():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    np.testing.assert_allclose(lab(linear("#ffffff")), [100, 0, 0], atol=0.05)
    np.testing.assert_allclose(lab(linear("#ff0000")), [53.24, 80.09, 67.20], atol=0.1)


@pytest.mark.parametrize("name", COLORS)
def test_every_colour_stands_out_from_the_ground(name):
    assert contrast(COLORS[name], GROUND) >= 3


def test_text_is_easy_to_read():
    assert contrast(INK, GROUND) >= 7


@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_colours_stay_apart_for_everyone(sight):
    seen = {name: lab(SIGHT[sight] @ linear(color)) for name, color in COLORS.items()}
    apart = {
        (one, other): np.linalg.norm(seen[one] - seen[other])
        for one, other in itertools.combinations(seen, 2)
    }
    assert min(apart.values()) >= 20, min(apart, key=apart.get)


def test_the_style_is_set_when_asked_for():
    with matplotlib.rc_context():
        figures.use_style()
        assert matplotlib.rcParams["figure.facecolor"] == GROUND
        assert matplotlib.rcParams["savefig.facecolor"] == GROUND
        assert list(matplotlib.rcParams["axes.prop_cycle"]) == [
            {"color": color} for color in COLORS.values()
        ]


@pytest.mark.slow
def test_drawing_touches_neither_pyplot_nor_the_defaults():
    code = textwrap.dedent("""
        import sys
        from types import SimpleNamespace
        import numpy as np
        from sam_lab import figures
        assert "matplotlib" not in sys.modules, "importing the module is free"
        import matplotlib
        from matplotlib.figure import Figure
        from sam_lab.experiments import Run
        before = matplotlib.rcParams.copy()
        ax = lambda: Figure().add_subplot()
        figures.trajectory(ax(), [0, 1], [[1, 2], [2, 3]], "a")
        figures.means(ax(), [0, 1], [[1, 2], [2, 3]], "a")
        figures.edge_line(ax(), 2.0, "2/η")
        figures.log_scale(ax(), "x", "y")
        run = Run({}, 0, {"step": [0, 1], "loss": [2, 1], "sharpness": [1, 2]})
        figures.loss_and_sharpness(Figure().subplots(2), [run], edge=2.0)
        figures.contour(ax(), [0, 1], [0, 1], [[0, 1], [1, 2]])
        figures.path(ax(), [[0, 1], [1, 2]])
        figures.spectrum(ax(), SimpleNamespace(grid=[0, 1], density=[1, 0]))
        figures.bars(ax(), ["a"], [1], xlabel="seconds")
        figures.estimates(ax(), ["a"], [1], [1], xlabel="trace")
        assert matplotlib.rcParams.copy() == before
        assert "matplotlib.pyplot" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trajectory_is_the_median_and_the_range_over_seeds(ax):
    ys = np.array([[1.0, 5.0], [2.0, 4.0], [9.0, 0.0]])
    assert figures.trajectory(ax, [0, 10], ys, "sharpness", COLORS["green"]) is ax
    (line,) = ax.lines
    assert line.get_label() == "sharpness" and line.get_color() == COLORS["green"]
    np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [10, 4]])
    corners = ax.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} == {(0, 1), (0, 9), (10, 0), (10, 5)}


def test_a_trajectory_can_show_each_seed(ax):
    figures.trajectory(ax, [0, 1], [[1.0, 2.0], [3.0, 4.0]], each=True)
    assert len(ax.lines) == 3 and not ax.collections
    assert len({line.get_color() for line in ax.lines}) == 1


def test_one_run_has_no_range(ax):
    figures.trajectory(ax, torch.arange(2), torch.tensor([1.0, 2.0]))
    assert len(ax.lines) == 1 and not ax.collections


def test_means_over_seeds_carry_their_interval(ax):
    ys = np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 7.0]])
    figures.means(ax, [0, 1], ys, "late")
    line, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[0, 2], [1, 5]])
    ends = [t_interval(column) for column in ys.T]
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], ends, rtol=1e-9)
    assert ax.get_legend_handles_labels()[1] == ["late"]


def test_an_edge_is_dashed_and_named_beside_it(ax):
    figures.edge_line(ax, 10.0, "2/η")
    figures.edge_line(ax, [3.0, 2.0], "SAM edge", [0, 5])
    level, moving = ax.lines
    assert level.is_dashed() and moving.is_dashed()
    assert set(level.get_ydata()) == {10.0}
    np.testing.assert_array_equal(moving.get_xydata(), [[0, 3], [5, 2]])
    assert [(text.get_text(), text.xy) for text in ax.texts] == [
        ("2/η", (1.0, 10.0)),
        ("SAM edge", (5.0, 2.0)),
    ]
    assert ax.get_legend_handles_labels() == ([], [])


def _runs(lengths):
    return [
        Run(
            {"lr": 0.2},
            seed,
            {
                "step": np.arange(n),
                "loss": np.exp(-np.arange(n)) * (seed + 1),
                "sharpness": np.arange(n) + seed,
            },
        )
        for seed, n in enumerate(lengths)
    ]


def test_loss_and_sharpness_of_one_setting(axes):
    figures.loss_and_sharpness(axes, _runs([4, 4, 4]), "η = 0.2", COLORS["blue"], edge=10.0)
    loss, sharpness = axes
    assert (loss.get_yscale(), loss.get_ylabel()) == ("log", "training loss")
    assert sharpness.get_ylabel() == "sharpness λ₁" and sharpness.get_xlabel() == "step"
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 2 * np.exp(-np.arange(4)), rtol=1e-5)
    np.testing.assert_allclose(sharpness.lines[0].get_ydata(), [1, 2, 3, 4])
    assert [text.get_text() for text in sharpness.texts] == ["2/η"]


def test_runs_of_different_lengths_are_a_line_each(axes):
    figures.loss_and_sharpness(axes, _runs([3, 5]), "η = 0.2")
    for ax in axes:
        assert [len(line.get_xdata()) for line in ax.lines] == [3, 5]
        assert len({line.get_color() for line in ax.lines}) == 1
        assert ax.get_legend_handles_labels()[1] == ["η = 0.2"]


def test_a_clock_of_ones_own(axes):
    figures.loss_and_sharpness(
        axes,
        _runs([3]),
        clock=lambda run: run.settings["lr"] * run["step"],
        clock_label="time η × step",
    )
    np.testing.assert_allclose(axes[0].lines[0].get_xdata(), [0, 0.2, 0.4])
    assert axes[1].get_xlabel() == "time η × step"


def edged(sam_edge, steps=(0, 5, 10)):
    """A run of an EdgeRecorder, as far as the figure reads it."""
    columns = {"step": steps, "sharpness": [1.0, 2.0, 1.5], "sam_edge": sam_edge}
    return {name: np.array(values) for name, values in columns.items()} | {"gd_edge": np.full(3, 4)}


def test_sharpness_stands_beside_both_edges_and_the_moving_one_is_the_median(ax):
    runs = [edged([3.0, 2.0, level]) for level in (1.0, 1.5, 1.8)]
    figures.sharpness_and_edges(ax, runs, "SAM")
    sharpness, sam, gd = ax.lines
    assert sharpness.get_ydata().tolist() == [1.0, 2.0, 1.5]
    assert sam.get_ydata().tolist() == [3.0, 2.0, 1.5]
    assert gd.get_ydata().tolist() == [4, 4, 4]
    assert [text.get_text() for text in ax.texts] == ["2/η"]
    assert ax.get_legend_handles_labels()[1] == ["SAM", "SAM edge"]
    assert ax.get_yscale() == "log"


def test_a_valley_and_what_moves_in_it_have_one_part_a_measurement():
    axes = Figure().subplots(2)
    run = edged([0.5, 1.0, 1.5]) | {
        "position": np.array([0.0, -0.1, 0.1]),
        "loss": np.array([1.0, 1.2, 1.1]),
        "along": np.array([-0.2, 0.0, 0.2]),
        "valley": np.array([[2.0, 1.0, 2.0], [1.9, 1.0, 1.9], [1.8, 0.9, 1.8]]),
    }
    sharpness, edge, valleys, weights = figures.sharpness_and_valley(axes, run)
    assert sharpness.get_ydata().tolist() == [1.0, 2.0, 1.5]
    assert edge.get_ydata().tolist() == [0.5, 1.0, 1.5]
    assert [path[:, 1].tolist() for path in valleys.get_segments()] == run["valley"].tolist()
    assert weights.get_offsets().tolist() == [[0.0, 1.0], [-0.1, 1.2], [0.1, 1.1]]
    assert [text.get_text() for text in axes[0].texts] == ["2/η", "sharpness", "SAM's edge"]
    assert axes[1].lines[0].get_ydata().tolist() == [2.0, 1.0, 2.0]  # stays
    with pytest.raises(ValueError, match="two axes are needed, got 1"):
        figures.sharpness_and_valley(axes[:1], run)


def test_a_logarithmic_axis_says_its_numbers_plainly(ax):
    ax.plot([0.4, 6.0], [1, 2])
    figures.log_scale(ax, "x")
    ax.figure.canvas.draw()
    said = {tick.get_text() for tick in ax.get_xticklabels(which="both")}
    assert {"0.5", "1", "2", "5"} <= said
    assert ax.get_yscale() == "linear"


def test_the_name_of_an_edge_may_stand_below_it(ax):
    figures.edge_line(ax, 1.0, "above")
    figures.edge_line(ax, 1.0, "below", below=True)
    assert [text.get_va() for text in ax.texts] == ["bottom", "top"]


def test_gradient_descent_has_one_edge(ax):
    figures.sharpness_and_edges(ax, [edged([4.0, 4.0, 4.0])])
    assert [text.get_text() for text in ax.texts] == ["2/η"]


def test_runs_of_one_figure_share_their_steps(ax):
    with pytest.raises(ValueError, match="same steps"):
        figures.sharpness_and_edges(ax, [edged([3, 2, 1]), edged([3, 2, 1], (0, 4, 10))])
    with pytest.raises(ValueError, match="at least one run"):
        figures.sharpness_and_edges(ax, [])


def test_a_path_on_level_lines(ax):
    figures.contour(ax, np.linspace(-1, 1, 5), np.linspace(-2, 2, 7), np.ones((7, 5)).cumsum(0))
    figures.path(ax, [[0, 1], [0.5, -1], [0.2, 0.1]], "η = 0.2", COLORS["wine"])
    steps, start, end = ax.lines
    np.testing.assert_array_equal(steps.get_xydata(), [[0, 1], [0.5, -1], [0.2, 0.1]])
    np.testing.assert_array_equal(start.get_xydata(), [[0, 1]])
    np.testing.assert_array_equal(end.get_xydata(), [[0.2, 0.1]])
    assert len({marker.get_marker() for marker in (steps, end)}) == 2


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_spectrum_on_a_logarithmic_scale(ax, kind):
    density = SimpleNamespace(
        grid=kind([0.0, 1.0, 2.0]), density=kind([2.0, 0.0, 0.5]), stderr=kind([0.1, 0.1, 0.6])
    )
    figures.spectrum(ax, density, "trained", floor=1e-3)
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] == pytest.approx(2e-3)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 2e-4, 0.5])
    assert ax.get_xlabel() == "eigenvalue of the Hessian" and ax.get_ylabel() == "spectral density"
    assert len(ax.collections) == 1


def test_bars_carry_their_numbers_and_errors(ax):
    figures.bars(ax, ["ours", "theirs"], [10, 80], [1, 5], xlabel="seconds", highlight=["ours"])
    assert [bar.get_width() for bar in ax.patches] == [10, 80]
    assert [text.get_text() for text in ax.texts] == ["10", "80"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["ours", "theirs"]
    ours, theirs = (bar.get_facecolor() for bar in ax.patches)
    assert ours == matplotlib.colors.to_rgba(COLORS["blue"]) != theirs
    assert ax.get_xlabel() == "seconds" and ax.yaxis_inverted()


def test_estimates_beside_the_truth(ax):
    figures.estimates(ax, ["16", "64"], [99, 101], [8, 3], xlabel="trace", truth=100.0)
    (line,) = [line for line in ax.lines if line.is_dashed()]
    assert set(line.get_xdata()) == {100.0}
    assert [text.get_text() for text in ax.texts] == ["exact"]
    assert ax.get_xlabel() == "trace"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda ax: figures.means(ax, [0], [[1]]), "two seeds or more"),
        (lambda ax: figures.trajectory(ax, [0, 1], [1, 2, 3]), r"got \(1, 3\), \(2,\)"),
        (lambda ax: figures.edge_line(ax, [1, 2], "edge"), "needs x of that shape, got None"),
        (lambda ax: figures.edge_line(ax, [1, 2], "edge", [1]), r"needs x of that shape, got \(1"),
        (lambda ax: figures.loss_and_sharpness([ax], []), "two axes and at least one run"),
        (lambda ax: figures.contour(ax, [0, 1], [0], [[1], [2]]), r"\(1, 2\), got \(2, 1\)"),
        (lambda ax: figures.path(ax, [1, 2]), r"points must be \(T, 2\), got \(2,\)"),
        (
            lambda ax: figures.spectrum(ax, SimpleNamespace(grid=[0], density=[1, 2])),
            r"got \(1,\) and \(2,\)",
        ),
        (
            lambda ax: figures.spectrum(ax, SimpleNamespace(grid=[0], density=[0])),
            "positive somewhere",
        ),
        (lambda ax: figures.bars(ax, ["a"], [1, 2], xlabel="s"), r"must be \(1,\), one a name"),
        (
            lambda ax: figures.bars(ax, ["a"], [1], xlabel="s", highlight=["b"]),
            r"highlight names no bar: \['b'\]",
        ),
        (lambda ax: figures.estimates(ax, ["a"], [1], [1, 2], xlabel="s"), "one a name"),
    ],
)
def test_what_does_not_fit_is_refused(ax, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(ax)
