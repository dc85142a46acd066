"""Data sets that the package can write."""
