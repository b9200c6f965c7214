"""Benchmarks: committed commands that print a figure beside its floor or a named peer."""
