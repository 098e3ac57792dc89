r"""When to switch to SAM, on MNIST-1D: small enough for every factor, with a large test set.

Sequences of 40 numbers after ten glyphs (Greydanus & Kobak 2020) come from a generator, so the test
set can be as large as a difference in test error needs: with 20,000 examples a share of 0.3 has a
standard error of 0.3 points, and less for the difference of two networks on the same examples.
"""

from __future__ import annotations

import dataclasses

from sam_lab.experiments.lab.experiment import Experiment
from sam_lab.experiments.late import late_phase
from sam_lab.experiments.recipe import Recipe

LAPTOP = late_phase.Config(
    # its generator has standardized the data
    Recipe("mnist1d", 4000, 20_000, hidden=(100, 100), epochs=80, tol=2e-2),
    late=(0.25, 0.5, 0.75, 0.9, 0.95),
    early=(0.25, 0.5, 0.75, 0.9),
    schedules=("constant", "steps", "drop"),
    rhos=(0.1, 0.05, 0.2),
    smoothings=(0.1, 0.0),
    carried=(True, False),
)
# The paper has no MNIST-1D; this is the same question asked of a wider network and more data.
PAPER = dataclasses.replace(
    LAPTOP,
    recipe=LAPTOP.recipe.but(
        train=40_000, test=100_000, hidden=(500, 500), epochs=200, measured=10_000
    ),
)

EXPERIMENT = Experiment(
    name="late_mnist1d",
    title="Late SAM on MNIST-1D: the switching time, and what decides",
    source="Zhou et al. 2025 (arXiv:2410.10373), figures on the switching time",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=late_phase.settings,
    run=late_phase.run,
    claims=[*late_phase.CLAIMS, *late_phase.FACTOR_CLAIMS],
    cost=late_phase.cost,
)
