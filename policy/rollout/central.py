"""Plans for simulators in other processes, sampled in one: a GPU serves all of them in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from policy.common.device import torch_threads
from policy.control.planning import PlanRequest, sample_plans
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.cells import PLAN_BATCH, Cell, program_of

Chunks = list[NDArray[np.float32]]


@dataclass(frozen=True)
class PlansDue:
    """What a process sends when its environments cannot go on without new plans.

    Attributes:
        cell: index of their cell.
        requests: one for each environment.
    """

    cell: int
    requests: Sequence[PlanRequest]


def plans_from(connection: Connection, cell: int) -> Callable[[Sequence[PlanRequest]], Chunks]:
    """Return a function that has the plans of a cell sampled at the other end of a connection, and waits for them."""

    def plans(requests: Sequence[PlanRequest]) -> Chunks:
        if not requests:
            return []
        connection.send(PlansDue(cell, requests))
        chunks: Chunks = connection.recv()
        return chunks

    return plans


class CentralPlanner:
    """Samples the plans of several processes together.

    Args:
        policies: the policies that cells refer to, on the device that samples.
        cells: the cells whose plans are sampled.
    """

    def __init__(self, policies: Sequence[DiffusionPolicy], cells: Sequence[Cell]) -> None:
        self._programs = [program_of(policies[cell.policy], cell) for cell in cells]

    def answer(self, due: Sequence[PlansDue]) -> list[Chunks]:
        """Sample the plans of each process, in their order; those of one cell share the network calls."""
        answers: list[Chunks] = [[] for _ in due]
        for cell in dict.fromkeys(one.cell for one in due):
            asking = [number for number, one in enumerate(due) if one.cell == cell]
            requests = [request for number in asking for request in due[number].requests]
            with torch_threads(1):  # as in every other rollout
                chunks = iter(sample_plans(self._programs[cell], requests, PLAN_BATCH))
            for number in asking:
                answers[number] = [next(chunks) for _ in due[number].requests]
        return answers


def without_weights(policies: Sequence[DiffusionPolicy]) -> list[DiffusionPolicy]:
    """Copies that take no memory, for processes which know what a policy observes and do not sample from it."""
    return [copy.deepcopy(policy).to("meta") for policy in policies]
