"""Data sets of this package."""
