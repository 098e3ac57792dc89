"""Measurements against peers; no part of the package."""
