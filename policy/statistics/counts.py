"""Episodes that one of two cells alone solved, counted for each pair of cells.

Column `n` of every array here is the same episode, unless outcomes are *unpaired*: where a seed does not fix the
episode, equal seeds are different episodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from policy.statistics.checks import Array, cells_by_episodes


def discordant_counts(wins: ArrayLike, losses: ArrayLike, episodes: ArrayLike) -> tuple[Array, Array]:
    """Check the numbers of discordant episodes of pairs of cells, and broadcast them to float arrays of one shape."""
    first, second = np.broadcast_arrays(np.asarray(wins, dtype=float), np.asarray(losses, dtype=float))
    if np.any(np.less(episodes, 1)) or not np.all((first >= 0) & (second >= 0) & (first + second <= episodes)):
        raise ValueError(
            "wins and losses must be 0 or more and together at most the number of episodes, which must be 1 or more;"
            f" got {np.max(episodes)} episodes"
        )
    return first, second


def outcomes_of(success: Sequence[ArrayLike]) -> list[Array]:
    """Check the outcomes of each cell, one or more cells and episodes: a bool array per cell, of any lengths.

    Raises:
        ValueError: no cells, no episodes, or outcomes other than true and false.
    """
    if not len(success):
        raise ValueError("success must be of one or more cells; got none")
    return [cells_by_episodes([row], "success", bool)[0] for row in success]


def pair_counts(success: Sequence[ArrayLike], *, paired: bool) -> tuple[Array, Array]:
    """Compare each pair of cells on the episodes that both ran.

    Args:
        success: for each cell its outcomes, true or false; column n is the same episode.
        paired: whether a column is the same episode for all cells; cells that are not paired need
            the same number of episodes.

    Returns:
        (K, K) episodes that only the row's cell solved, and (K, K) episodes that both ran.

    Raises:
        ValueError: malformed outcomes.
    """
    if not paired:
        solved = cells_by_episodes(success, "success", bool)
        return unpaired_wins(solved), np.full((len(solved), len(solved)), solved.shape[1])
    rows = outcomes_of(success)
    lengths = np.array([len(row) for row in rows])
    solved, failed = np.zeros((2, len(rows), lengths.max()))
    for number, row in enumerate(rows):
        solved[number, : len(row)], failed[number, : len(row)] = row, ~row
    return solved @ failed.T, np.minimum.outer(lengths, lengths)


def wins_over(solved: Array) -> Array:
    """Count, from (K, N) bool, the episodes that the row's cell solved and the column's cell did not: (K, K) float."""
    counts = solved.astype(float)
    return counts @ (1 - counts).T


def unpaired_wins(solved: Array) -> Array:
    """Count wins as `wins_over` does, as if the cells had run different episodes.

    The order of each cell's episodes then means nothing, and the observed pairs are one of many possible sets. The
    counts are the mean over all orders, N p_i (1 - p_j), rounded up to whole discordant episodes with the same
    difference. The paired tests and intervals then have the variance of two independent rates. Summed over all outcomes
    of 20, 50 and 100 episodes, for rates that differ by exactly the margin, `non_inferiority_test` errs in at most
    5.01 % of cases at 5 % and `mcnemar_test` in at most 3.8 %; `paired_interval` covers at least 94.3 % at 95 %.

    Args:
        solved: (K, N) bool, N episodes of each of K cells.

    Returns:
        (K, K) float.
    """
    episodes = solved.shape[1]
    totals = solved.sum(1).astype(float)
    wins = np.outer(totals, episodes - totals) / episodes
    gains = totals[:, None] - totals
    fewer = np.minimum(np.ceil(np.minimum(wins, wins.T) - 1e-9), (episodes - abs(gains)) // 2)
    return fewer + np.maximum(gains, 0)
