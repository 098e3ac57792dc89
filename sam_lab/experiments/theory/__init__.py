"""Experiments of part VI: why flat minima are found, theory against runs."""
