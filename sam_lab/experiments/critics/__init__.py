"""Experiments of part VII: what flatness does not explain, and who said so."""
