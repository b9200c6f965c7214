"""A grid of cells on the same episodes: its rows, what they show, and how people see it."""
