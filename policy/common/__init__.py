"""Modules that all rooms use: settings and their checks, registries, output folders, locks, seeds, progress bars."""
