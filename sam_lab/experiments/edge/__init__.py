"""Experiments of part I: gradient descent at the edge of stability, and measuring sharpness."""
