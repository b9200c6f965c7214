"""Demonstrations on disk, and training windows over them."""
