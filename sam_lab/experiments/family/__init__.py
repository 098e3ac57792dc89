"""Experiments of part V: the variants of SAM, at equal cost."""
