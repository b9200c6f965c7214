"""Ways to act that are compared on the same episodes, and the controllers that act so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium.spaces import Box

from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler
from policy.inference.backends import DEFAULT_BACKEND, SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy

# Rows of one planning call in rollouts, always: see RecedingHorizonController.plan_batch.
PLAN_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to act: what a sweep compares with others on the same episodes.

    Attributes:
        policy: which of the policies at hand, by number.
        sampler: how chunks are sampled.
        execution_horizon: actions executed before the next plan.
        controller: what happens while a plan is made.
        backend: what samples, see `compile_sampler`.
        weights: of the backend.
    """

    sampler: Sampler
    execution_horizon: int
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    policy: int = 0
    backend: str = DEFAULT_BACKEND
    weights: str = "float32"


# Number of a cell, and the episode's seed.
Task = tuple[int, int]
# Compiled sampling by the number of its cell.
Programs = Mapping[int, SamplerProgram]


def controllers_of(
    policies: Sequence[DiffusionPolicy],
    cells: Sequence[Cell],
    action_space: gymnasium.Space[Any],
    programs: Programs = {},  # noqa: B006  (never changed)
) -> list[RecedingHorizonController]:
    """One controller a cell, planning in batches of the size that all rollouts use.

    Args:
        policies: what acts.
        cells: one for each controller.
        action_space: a `Box`.
        programs: those of the cells, by number, that are compiled already.

    Returns:
        The controllers.
    """
    assert isinstance(action_space, Box)
    return [
        RecedingHorizonController(
            policy=policies[cell.policy],
            sampler=cell.sampler,
            execution_horizon=cell.execution_horizon,
            settings=cell.controller,
            plan_batch=PLAN_BATCH,
            program=programs.get(number) or program_of(policies[cell.policy], cell),
            action_space=action_space,
        )
        for number, cell in enumerate(cells)
    ]


def program_of(policy: DiffusionPolicy, cell: Cell) -> SamplerProgram:
    """The compiled sampling of a cell."""
    return compile_sampler(policy, cell.sampler, backend=cell.backend, weights=cell.weights)


def portable_programs(policies: Sequence[DiffusionPolicy], cells: Iterable[Cell]) -> dict[Cell, SamplerProgram]:
    """The programs of those cells whose backend takes seconds to compile and can be sent to other processes."""
    return {cell: program_of(policies[cell.policy], cell) for cell in cells if cell.backend == "onnx"}
