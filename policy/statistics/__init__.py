"""Figures with their uncertainty: of one cell, of two cells on the same episodes, and which cell to recommend.

A cell is a checkpoint with its settings.
"""

from policy.statistics.intervals import bootstrap_interval, wilson_interval
from policy.statistics.paired import (
    PairedDifference,
    compare_means,
    compare_success,
    holm,
    mcnemar_test,
    non_inferiority_test,
    paired_interval,
)
from policy.statistics.recommendation import CellVerdict, Recommendation, episodes_needed, recommend

__all__ = [
    "CellVerdict",
    "PairedDifference",
    "Recommendation",
    "bootstrap_interval",
    "compare_means",
    "compare_success",
    "episodes_needed",
    "holm",
    "mcnemar_test",
    "non_inferiority_test",
    "paired_interval",
    "recommend",
    "wilson_interval",
]
