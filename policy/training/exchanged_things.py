"""Things in a batch of demonstrations, shown where others had them, while the robot has nothing to do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from policy.common.observations import Batch
from policy.data.exchange import STAYS, Exchange
from policy.data.relations import number_names
from policy.training.numbers import joined_numbers, split_numbers


class ExchangedThings:
    """Shows things elsewhere in some windows of a batch; see `policy.data.exchange.find_exchange`.

    A policy that sees two cubes knows each demonstration by where the two are, and learns by heart what was done in it.
    With the one exchanged that does not matter yet, it has to look at the other.

    Args:
        exchange: where each thing may be shown.
        widths: how many numbers each state vector holds, in the order in which they are counted.
        share: of the windows in which a thing may be elsewhere, those in which it is.

    Attributes:
        numbers: the numbers that are exchanged, such as `state[3]`.
    """

    def __init__(self, exchange: Exchange, widths: Mapping[str, int], share: float) -> None:
        self._widths, self._share = widths, share
        self._places = [list(places) for places in exchange.places]
        sizes = [len(poses) for poses in exchange.poses]
        self._sizes = torch.tensor(sizes, dtype=torch.int64)
        self._firsts = self._sizes.cumsum(0) - self._sizes
        # The poses of all groups, one after the other; a thing with fewer numbers than others leaves the last ones out.
        self._poses = torch.zeros((sum(sizes), max(map(len, self._places), default=0)))
        for first, poses in zip(self._firsts.tolist(), exchange.poses, strict=True):
            self._poses[first : first + len(poses), : poses.shape[1]] = torch.from_numpy(poses)
        movable = (exchange.groups != STAYS).any(axis=0)
        names = number_names(widths)
        self.numbers = [
            names[place] for places, can in zip(self._places, movable, strict=True) if can for place in places
        ]

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Show each thing elsewhere in its share of the windows.

        Args:
            batch: B windows with `groups`, on the CPU.
            generator: source of what is drawn, which depends on B alone.

        Returns:
            A new batch.
        """
        if not self.numbers:
            return batch
        groups = batch["groups"]
        chosen = (torch.rand(groups.shape, generator=generator) < self._share) & (groups != STAYS)
        drawn = torch.rand(groups.shape, generator=generator)
        numbers = joined_numbers(batch["observations"], self._widths)
        for thing, places in enumerate(self._places):
            rows = chosen[:, thing].nonzero()[:, 0]
            group = groups[rows, thing]
            pose = self._firsts[group] + (drawn[rows, thing] * self._sizes[group]).long()
            numbers[rows[:, None], :, torch.tensor(places)] = self._poses[pose, : len(places), None]
        return {**batch, "observations": {**batch["observations"], **split_numbers(numbers, self._widths)}}


def describe_exchanged(numbers: Sequence[str]) -> str:
    """Say which numbers are exchanged."""
    if not numbers:
        return (
            "train.exchange changes nothing: it needs two things or more that the robot moves one at a time in ten"
            " training demonstrations or more, and no number that says how far one is from another or from the robot"
        )
    return f"while they do not matter, these are shown where another demonstration had them: {', '.join(numbers)}"
