"""Cells (combinations of settings that are compared on the same episodes) and their controllers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.spaces import Box

from policy.control.planning import Plans
from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler
from policy.inference.backends import DEFAULT_WEIGHTS, PLAIN_BACKEND, SamplerProgram, compile_shared
from policy.inference.mapped import page_out
from policy.inference.onnx_backend import Onnx, OnnxModel
from policy.inference.runners import Runner
from policy.model.diffusion_policy import DiffusionPolicy

# The `plan_batch` of all rollouts: a fixed number, so that results do not depend on the number of environments.
PLAN_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of settings, which a sweep compares with others on the same episodes.

    Attributes:
        policy: index of the policy that acts.
        sampler: sampling settings.
        execution_horizon: actions executed before the next plan.
        controller: behaviour while a plan is computed, see `ControllerSettings`.
        backend: runs the sampling, see `compile_sampler`; the name of one, never `auto`.
        weights: type of the backend's weights, see `compile_sampler`.
    """

    sampler: Sampler
    execution_horizon: int
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    policy: int = 0
    backend: str = PLAIN_BACKEND
    weights: str = DEFAULT_WEIGHTS


# Index of a cell, and seed of an episode.
Task = tuple[int, int]
# Compiled sampling by the index of its cell.
Programs = Mapping[int, SamplerProgram]


def controllers_of(
    policies: Sequence[DiffusionPolicy],
    cells: Sequence[Cell],
    action_space: gymnasium.Space[Any],
    programs: Programs = {},  # noqa: B006  (never changed)
    plans_of: Callable[[int], Plans] | None = None,
) -> list[RecedingHorizonController]:
    """Make one controller per cell, with the `plan_batch` of all rollouts.

    Args:
        policies: the policies that the cells refer to.
        cells: one for each controller.
        action_space: the environment's, a `Box`.
        programs: programs that are compiled already, by the index of their cell.
        plans_of: what samples the plans of a cell, by its index, in place of a program.

    Returns:
        The controllers, in the order of the cells.
    """
    assert isinstance(action_space, Box)
    return [
        RecedingHorizonController(
            policy=policies[cell.policy],
            sampler=cell.sampler,
            execution_horizon=cell.execution_horizon,
            settings=cell.controller,
            plan_batch=PLAN_BATCH,
            program=None if plans_of else programs.get(number) or program_of(policies[cell.policy], cell),
            action_space=action_space,
            plans=plans_of and plans_of(number),
        )
        for number, cell in enumerate(cells)
    ]


def program_of(policy: DiffusionPolicy, cell: Cell) -> SamplerProgram:
    """Compile the sampling of a cell; the programs of one policy share its weights."""
    return compile_shared(policy, cell.sampler, backend=cell.backend, weights=cell.weights)


def portable_programs(
    policies: Sequence[DiffusionPolicy], cells: Iterable[Cell], folder: Path
) -> dict[Cell, SamplerProgram]:
    """Compile the cells whose backend takes seconds to compile and whose programs other processes can receive.

    Args:
        policies: the policies that the cells refer to.
        cells: the cells.
        folder: for files that hold the weights for all processes; it must stay until they have ended.

    Returns:
        The programs of these cells.
    """
    programs = {cell: program_of(policies[cell.policy], cell) for cell in cells if cell.backend == "onnx"}
    for number in {cell.policy for cell in programs}:
        page_out(weight.detach().numpy() for weight in policies[number].parameters())
    return {
        cell: replace(program, run=_portable(program.run, folder), warm_run=_portable(program.warm_run, folder))
        for cell, program in programs.items()
    }


def _portable(run: Runner, folder: Path) -> Runner:
    return run.on(run.model.packed(folder)) if isinstance(run, Onnx) and isinstance(run.model, OnnxModel) else run
