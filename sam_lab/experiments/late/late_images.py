r"""When to switch to SAM, on images: digits at laptop scale, CIFAR-10 beyond.

The laptop has a fully connected network and the digits that a package carries; the desktop a small
wide residual network with batch norm on a tenth of CIFAR-10, without augmentation, so that it comes
to fit its training set as the paper's networks do; "fast" all of CIFAR-10 and a small network meant
to learn it in few epochs; the paper's scale the paper's own WRN-16-8 on all of CIFAR-10 with the
usual augmentation. "steps" is the schedule of the paper's code for that network.
"""

from __future__ import annotations

from sam_lab.experiments.lab.experiment import Experiment
from sam_lab.experiments.lab.setup import Setup
from sam_lab.experiments.late import late_phase
from sam_lab.experiments.recipe import CIFAR, CIFAR_FAST, CIFAR_TENTH, DIGITS

LAPTOP = late_phase.Config(DIGITS.but(standardize="data", tol=2e-2))
DESKTOP = late_phase.Config(CIFAR_TENTH.but(standardize="data", test=10_000), trace_tol=0.15)
FAST = late_phase.Config(
    CIFAR_FAST,
    late=(0.5, 0.75, 0.9),
    schedules=("steps",),
    rhos=(0.05,),
    trace_tol=0.2,
)
# Radius, epochs, batch, smoothing and weight decay are the usual ones for this network; the paper's
# own values for each network are not in its code.
PAPER = late_phase.Config(
    CIFAR.but(standardize="data", epochs=200, measured=5000),
    late=(0.5, 0.75, 0.875, 0.9, 0.95, 0.975),
    rhos=(0.05,),
    trace_tol=0.15,
)

SETUP = Setup(
    "Figure 1 of the paper (network, data, epochs) and its code",
    {
        "recipe.data": "cifar10",
        "recipe.train": 50_000,
        "recipe.architecture": "WRN-16-8",
        "recipe.epochs": 200,
        "recipe.augment": True,
        "recipe.measured": 5000,
        "schedules": ("steps",),
        "carried": (False,),
    },
    besides=["no cutout (paper: cutout)"],
)

EXPERIMENT = Experiment(
    name="late_images",
    title="Late SAM on images: the switching time",
    source="Zhou et al. 2025 (arXiv:2410.10373), figures on the switching time",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "fast": FAST, "paper": PAPER},
    settings=late_phase.settings,
    run=late_phase.run,
    claims=late_phase.CLAIMS,
    setup=SETUP,
    cost=late_phase.cost,
)
