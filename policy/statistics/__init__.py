"""Figures with their uncertainty: one cell, two cells on the same episodes, and the cell to recommend.

A cell is a checkpoint with its settings. Import from the modules: `results` and `intervals` (one cell), `paired` (two
cells), `recommendation`. This file imports none of them, so that a rollout does not load the statistics of a sweep.
"""
