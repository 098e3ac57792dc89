"""Experiments of part IV: perturbed inputs instead of perturbed weights."""
