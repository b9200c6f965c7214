"""Which numbers of an observation follow a number of the action: they change by it times a constant."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policy.data.relations import moves

# A number of the observation follows a number of the action if its changes are that number times a constant, to this
# share of their variance.
FOLLOWS = 0.9
# Transitions in which something interferes, such as the end of a joint's range or a contact, are left out of that.
INTERFERED = 0.05
# Where a number stays although its action is larger than usual, a joint or a hand is at an end of its range. These
# transitions are left out before, if they are at most this share of those with a larger action. In OCBench's tasks the
# wrist stays in up to a third of them, a hand that presses with its fingers closed in two thirds to three quarters, and
# one that closes on things in 86 % and more, whose changes are not the action times a constant besides.
AT_THE_END = 0.8
# Numbers that are looked at for each action: those that change most like it.
LIKELY = 5
# What follows the action does so in the first part of each episode, too, to this share.
FOLLOWS_EARLY = 0.5


def find_followed(
    change: NDArray[np.float64], actions: NDArray[np.float64], early: NDArray[np.bool_]
) -> list[tuple[int, int, float]]:
    """Find which numbers follow which action, one to one.

    An object that is carried changes as the action says, too, but not where nothing but the robot has moved yet. Of
    actions that are alike, such as those of two fingers, a number follows the one that explains more of it.

    Args:
        change: (N, D) changes of the numbers in N transitions.
        actions: (N, A).
        early: (N,) whether a transition lies in the first part of its episode.

    Returns:
        The place of the number, that of the action, and the change for an action of 1, in the order of the actions.
    """
    found: dict[int, tuple[float, int, float]] = {}
    inner = change.T @ actions
    shares = np.square(inner) / np.maximum(np.square(change).sum(axis=0)[:, None], np.finfo(np.float64).tiny)
    # An action that never changes says nothing: a clock would follow it.
    for action in np.flatnonzero(np.ptp(actions, axis=0)).tolist():
        for number in np.argsort(-shares[:, action])[:LIKELY].tolist():
            gain, share = _following(actions[:, action], change[:, number], early)
            if share:
                found[number] = max(found.get(number, (0.0, 0, 0.0)), (share, action, gain), key=lambda one: one[0])
                break
    return sorted(((number, action, gain) for number, (_, action, gain) in found.items()), key=lambda one: one[1])


def _following(
    cause: NDArray[np.float64], effect: NDArray[np.float64], early: NDArray[np.bool_]
) -> tuple[float, float]:
    """Find the factor between an action and the changes that follow it, and their share of it; zeros if they do not."""
    strong = np.abs(cause) > np.sqrt(np.square(cause).mean())
    at_the_end = strong & ~moves(effect)
    kept = ~at_the_end if at_the_end.sum() <= AT_THE_END * strong.sum() else np.ones_like(strong)
    first = kept & early
    gain, share = proportional(cause[kept], effect[kept])
    follows = share >= FOLLOWS and proportional(cause[first], effect[first])[1] >= FOLLOWS_EARLY
    return (gain, share) if follows else (0.0, 0.0)


def proportional(cause: NDArray[np.float64], effect: NDArray[np.float64]) -> tuple[float, float]:
    """Find the factor between two columns, where nothing interferes.

    Args:
        cause: (N,).
        effect: (N,).

    Returns:
        The factor, and the share of the effect that it explains; zeros if nothing moves.
    """
    kept = np.ones(len(cause), dtype=np.bool_)
    gain = float(cause @ effect) / max(float(cause @ cause), float(np.finfo(np.float64).tiny))
    kept[np.argsort(np.abs(effect - gain * cause))[len(cause) - round(INTERFERED * len(cause)) :]] = False
    cause, effect = cause[kept], effect[kept]
    total, power = float(effect @ effect), float(cause @ cause)
    if not (total > 0 and power > 0):
        return 0.0, 0.0
    return float(cause @ effect) / power, float(cause @ effect) ** 2 / (power * total)
