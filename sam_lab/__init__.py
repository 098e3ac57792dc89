"""Sharpness-aware minimisation and the edge of stability, measured.

A closure that computes a loss flows through pure mathematics and comes out as a figure whose
numbers can be traced. Needs torch and numpy alone; everything else is imported on first use.
"""

from sam_lab.adversarial import fgsm, pgd
from sam_lab.curvature import Hessian
from sam_lab.gauss_newton import GaussNewton
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM
from sam_lab.stability import gd_edge, heavy_ball_edge, sam_edge
from sam_lab.tracker import SharpnessTracker

__all__ = [
    "SAM",
    "EdgeRecorder",
    "GaussNewton",
    "Hessian",
    "SharpnessTracker",
    "__version__",
    "fgsm",
    "gd_edge",
    "heavy_ball_edge",
    "pgd",
    "sam_edge",
]

__version__ = "0.1.0"
