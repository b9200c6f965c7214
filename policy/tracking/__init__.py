"""Experiment tracking: metrics are recorded with Weights & Biases, or not at all."""
