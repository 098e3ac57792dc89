r"""When to switch to SAM, on images: digits at laptop scale, CIFAR-10 beyond.

The laptop has a fully connected network and the digits that a package carries; the desktop a small
wide residual network with batch norm on a tenth of CIFAR-10, without augmentation, so that it comes
to fit its training set as the paper's networks do; the paper's scale the paper's own WRN-16-8 on
all of CIFAR-10 with the usual augmentation. "steps" is the schedule of the paper's code for that
network.
"""

from __future__ import annotations

import dataclasses

from sam_lab.experiments.lab.experiment import Experiment
from sam_lab.experiments.late import late_phase
from sam_lab.experiments.recipe import CIFAR, CIFAR_TENTH, DIGITS

# The switch at a quarter, and the schedule with a drop, make the summed learning rates of the
# schedules overlap: the clock can be put to the test here too.
LAPTOP = late_phase.Config(
    DIGITS.but(standardize="data", tol=2e-2),
    late=(0.25, 0.5, 0.75, 0.9, 0.95),
    schedules=("constant", "steps", "drop"),
)
DESKTOP = late_phase.Config(CIFAR_TENTH.but(standardize="data", test=10_000), trace_tol=0.15)
# Radius, epochs, batch, smoothing and weight decay are the usual ones for this network; the paper's
# own values for each network are not in its code.
PAPER = late_phase.Config(
    CIFAR.but(standardize="data", epochs=200, measured=5000),
    late=(0.5, 0.75, 0.875, 0.9, 0.95, 0.975),
    rhos=(0.05,),
    trace_tol=0.15,
)

# On MNIST-1D the criterion was set after the first runs; it is older than the runs that decide it
# here.
CLOCK = dataclasses.replace(late_phase.learning_rate_is_the_clock, set_after=False)

EXPERIMENT = Experiment(
    name="late_images",
    title="Late SAM on images: the switching time",
    source="Zhou et al. 2025 (arXiv:2410.10373), figures on the switching time",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=late_phase.settings,
    run=late_phase.run,
    claims=[*late_phase.CLAIMS, CLOCK],
)
