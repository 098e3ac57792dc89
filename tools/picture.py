"""Draw the README's picture, book/_static/edge.svg, from the stored runs of edge_of_stability.

python tools/picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

from sam_lab import figures, gd_edge
from sam_lab.experiments import Result, get

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    result = Result.load(ROOT / "book" / "results" / "edge_of_stability.laptop.json")
    lrs = get("edge_of_stability").presets["laptop"].lrs
    figures.use_style()
    # The same file from the same runs: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "edge", "svg.fonttype": "path"})
    figure, ax = plt.subplots(figsize=(7.0, 3.8))
    for lr, name in zip(lrs, ("blue", "vermillion", "green"), strict=True):
        runs = result.select(path="gd", loss="mse", activation="tanh", lr=lr)
        color = figures.COLORS[name]
        times = runs[0]["step"] * lr
        figures.trajectory(ax, times, [run["sharpness"] for run in runs], f"η = {lr:g}", color)
        figures.edge_line(ax, gd_edge(lr), f"2/η = {gd_edge(lr):.3g}", color=color)
    ax.set(xlabel="learning rate × steps", ylabel="sharpness λ₁", xlim=(0, None), ylim=(0, None))
    ax.set_title("Gradient descent on MNIST sharpens the loss up to 2/η, and stays")
    ax.legend(loc="lower right")
    figure.savefig(ROOT / "book" / "_static" / "edge.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
