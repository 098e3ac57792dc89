"""Experiments of part III: SAM late in training."""
