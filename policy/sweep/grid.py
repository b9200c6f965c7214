"""The cells of a sweep, one for each combination of its settings, and the row of results of each cell."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.checkpoint import Checkpoint
from policy.common.arguments import check_arguments, unknown_name
from policy.control.timeline import ControllerSettings
from policy.diffusion.coefficients import takes_steps_of_ddim
from policy.diffusion.objective import OBJECTIVES
from policy.diffusion.sampler import LATER_SETTINGS, Sampler
from policy.inference.backends import DEFAULT_BACKEND, DEFAULT_WEIGHTS, check_backend, choose_backend
from policy.inference.onnx_backend import check_installed
from policy.model.cost import multiply_adds
from policy.rollout.cells import Cell
from policy.rollout.ledger import cell_id, recorded_settings
from policy.sweep.rows import CONTROLLER_AXES, SAMPLER_AXES, Row


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """A cell with everything that its results depend on, except the episode's seed.

    Attributes:
        cell: its settings.
        checkpoint: the checkpoint whose policy acts.
        env: settings of the environment.
    """

    cell: Cell
    checkpoint: Checkpoint
    env: Mapping[str, Any]

    @property
    def axes(self) -> Row:
        """The values that distinguish it from other cells."""
        return {
            "checkpoint": str(self.checkpoint.path),
            **dataclasses.asdict(self.cell.sampler),
            "execution_horizon": self.cell.execution_horizon,
            **dataclasses.asdict(self.cell.controller),
            "backend": self.cell.backend,
            "weights": self.cell.weights,
        }

    @property
    def settings(self) -> Row:
        """JSON data for the ledger.

        The checkpoint is identified by its weights, wherever the folder is. The device is included, because results
        depend on its rounding.
        """
        device = self.checkpoint.policy.device.type
        axes = {**self.axes, "checkpoint": self.checkpoint.digest, "device": device, "env": dict(self.env)}
        return {name: value for name, value in axes.items() if LATER_SETTINGS.get(name, ...) != value}

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds per control step: the cost that ranks cells, which depends on no measurement."""
        policy, cell = self.checkpoint.policy, self.cell
        horizons = cell.execution_horizon, policy.config.action_horizon
        candidates, steps = cell.controller.candidates_of(*horizons), cell.controller.steps_per_plan(*horizons)
        return multiply_adds(policy).per_step(cell.sampler.ddim_steps, candidates, steps)


def make_cells(
    checkpoints: Sequence[Checkpoint],
    env: Mapping[str, Any],
    *,
    ddim_steps: int | Sequence[int],
    sampler: Mapping[str, Any],
    controller: Mapping[str, Any],
    execution_horizon: int | Sequence[int] | None,
    backend: str | Sequence[str],
    weights: str | Sequence[str] = DEFAULT_WEIGHTS,
) -> list[SweepCell]:
    """Make a cell of every combination of the settings; a list of values makes an axis.

    Args:
        checkpoints: one or more.
        env: settings of the environment.
        ddim_steps: denoising steps.
        sampler: the other sampler settings, by name; those that are missing are each checkpoint's own.
        controller: settings of `ControllerSettings`, by name.
        execution_horizon: actions executed before the next plan; None takes each checkpoint's own.
        backend: runs the sampling, see `compile_sampler`; `auto` is settled by `with_backends`.
        weights: type of the backend's weights, see `compile_sampler`.

    Returns:
        The cells; `ddim_steps` changes fastest. A checkpoint whose objective does not have a setting of the sampler has
        no such axis: with a fixed number of calls, it has one cell where others have a cell for each number of steps. A
        solver that is `ddim` with few steps has no cell there beside that of `ddim`, nor has `eta` with one step.

    Raises:
        ValueError: an axis that is empty, repeats a value or holds one that does not fit any checkpoint; an unknown
            setting; or two equal cells.
    """
    if "ddim_steps" in sampler:
        raise ValueError(
            f"a sweep takes its steps from ddim_steps=[...]; got sampler.ddim_steps={sampler['ddim_steps']}"
        )
    for group, given, known in (("sampler", sampler, SAMPLER_AXES), ("controller", controller, CONTROLLER_AXES)):
        if unknown := [name for name in given if name not in known]:
            raise unknown_name(f"setting of {group}", unknown[0], known)
    axes: dict[str, list[Any]] = {
        "backend": axis_values("backend", backend),
        "weights": axis_values("weights", weights),
        "execution_horizon": axis_values("execution_horizon", execution_horizon),
        **{name: axis_values(f"controller.{name}", values) for name, values in controller.items()},
        **{name: axis_values(f"sampler.{name}", values) for name, values in sampler.items()},
        "ddim_steps": axis_values("ddim_steps", ddim_steps),
    }
    objectives = list(dict.fromkeys(checkpoint.policy.config.objective for checkpoint in checkpoints))
    _check_one_has(axes, objectives)
    cells = [
        SweepCell(cell=_cell(number, checkpoint, settings), checkpoint=checkpoint, env=env)
        for number, checkpoint in enumerate(checkpoints)
        for settings in _combinations(axes, checkpoint.policy.config.objective)
    ]
    check_distinct(cells)
    every = [one.cell for one in cells]
    return [one for one in cells if (plain := _plain(one.cell)) == one.cell or plain not in every]


def _combinations(axes: Mapping[str, Sequence[Any]], objective: str) -> list[Row]:
    """The settings of each cell of a checkpoint: an axis of which its objective has no value is not one of its axes."""
    own = {
        name: [value for value in values if name not in SAMPLER_AXES or OBJECTIVES[objective].has(name, value)]
        for name, values in axes.items()
    }
    own = {name: values for name, values in own.items() if values}
    return [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]


def _plain(cell: Cell) -> Cell:
    """The cell that gives the same actions, to the bit, with the solver `ddim` or without noise on the way."""
    sampler = cell.sampler
    if takes_steps_of_ddim(sampler.solver, sampler.ddim_steps):
        sampler = dataclasses.replace(sampler, solver="ddim")
    if sampler.ddim_steps == 1:  # the last step never adds noise
        sampler = dataclasses.replace(sampler, eta=0.0)
    return dataclasses.replace(cell, sampler=sampler)


def _check_one_has(axes: Mapping[str, Sequence[Any]], objectives: Sequence[str]) -> None:
    """Reject a value of a sampler setting that no checkpoint of the sweep has; the numbers of steps are ignored then.

    Raises:
        ValueError: see `Sampler.settled`.
    """
    for name, values in axes.items():
        for value in values if name in SAMPLER_AXES and name != "ddim_steps" else ():
            if not any(OBJECTIVES[objective].has(name, value) for objective in objectives):
                alone = Sampler(**check_arguments("sampler", Sampler, {name: value}))
                alone.settled(objectives[0], num_steps=alone.ddim_steps)


def repeats(ddim_steps: Sequence[int], solvers: Sequence[str], etas: Sequence[float]) -> list[str]:
    """Say which combinations have no cell, because it would be another one again."""
    same = {solver: [str(steps) for steps in ddim_steps if takes_steps_of_ddim(solver, steps)] for solver in solvers}
    said = [
        f"{solver} with ddim_steps=[{','.join(steps)}] is ddim, to the bit: it has no cells of its own there"
        for solver, steps in same.items()
        if steps and "ddim" in solvers
    ]
    if 1 in ddim_steps and 0 in etas and (noisy := [f"{eta:g}" for eta in etas if eta]):
        said.append(
            f"sampler.eta=[{','.join(noisy)}] with ddim_steps=1 is eta=0, to the bit: it has no cells of its own there"
        )
    return said


def fixed_calls(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Say of each objective with a fixed number of calls that its checkpoints have no cell for each number of steps."""
    return [
        f"a policy with objective={objective} {OBJECTIVES[objective].calls_in_words}: it is one cell for all ddim_steps"
        for objective in dict.fromkeys(checkpoint.policy.config.objective for checkpoint in checkpoints)
        if OBJECTIVES[objective].calls
    ]


def check_distinct(cells: Sequence[SweepCell]) -> None:
    """Reject two equal cells.

    Raises:
        ValueError: two cells are equal; the message gives the settings that are written differently.
    """
    seen: dict[str, SweepCell] = {}
    for one in cells:
        if (twin := seen.setdefault(cell_id(one.settings), one)) is not one:
            differ = [axis for axis in twin.axes if twin.axes[axis] != one.axes[axis]] or [*twin.axes]
            first, second = (", ".join(f"{axis} {cell.axes[axis]}" for axis in differ) for cell in (twin, one))
            raise ValueError(f"{first} and {second} are the same cell: give each value and each policy once")


def with_backends(cells: Sequence[SweepCell], ledger: Path | None) -> list[SweepCell]:
    """Settle once what `backend=auto` means: a ledger's back end, which its results depend on, or the fastest one.

    Args:
        cells: cells whose back end may be `auto`.
        ledger: the file of an earlier run that goes on, which need not exist; None for a new run.

    Returns:
        The cells with the names of back ends that exist.

    Raises:
        ValueError: the ledger has results of several back ends, or of one whose packages are missing; or two cells are
            equal now.
    """
    named = {one.cell.backend for one in cells} - {DEFAULT_BACKEND}
    settled = {
        weights: _backend_of([one for one in cells if one.cell.weights == weights], ledger, named)
        for weights in dict.fromkeys(one.cell.weights for one in cells if one.cell.backend == DEFAULT_BACKEND)
    }
    chosen = [
        dataclasses.replace(one, cell=dataclasses.replace(one.cell, backend=settled[one.cell.weights]))
        if one.cell.backend == DEFAULT_BACKEND
        else one
        for one in cells
    ]
    check_distinct(chosen)
    if settled:
        print(f"backend: {', '.join(dict.fromkeys(settled.values()))}")
    return chosen


def _backend_of(cells: Sequence[SweepCell], ledger: Path | None, named: Collection[str]) -> str:
    """The back end of cells with the same type of weights; the results of those that are named are other cells'."""
    weights, known = cells[0].cell.weights, [] if ledger is None else recorded_settings(ledger)
    found = dict.fromkeys(str(row["backend"]) for row in known if row.get("weights") == weights and "backend" in row)
    before = [backend for backend in found if backend not in named]
    if len(before) > 1:
        raise ValueError(f"{ledger} has results of several back ends: say which with backend=[{','.join(before)}]")
    if not before:
        policies = list({one.cell.policy: one.checkpoint.policy for one in cells}.values())
        return choose_backend(policies, [one.cell.sampler for one in cells], weights)
    (backend,) = before
    try:
        check_installed(backend)
    except ValueError as error:
        raise ValueError(f"{ledger} cannot go on here. {error}, or choose another output_dir=") from error
    return backend


def _cell(number: int, checkpoint: Checkpoint, settings: Row) -> Cell:
    """Make the cell of one combination of the axes, and check its settings."""
    sampling = {name: value for name, value in settings.items() if name in SAMPLER_AXES}
    sampler = checkpoint.sampler_with(check_arguments("sampler", Sampler, sampling))
    given = {name: value for name, value in settings.items() if name in CONTROLLER_AXES}
    controller = ControllerSettings(**check_arguments("controller", ControllerSettings, given))
    horizon = settings["execution_horizon"]
    horizon = checkpoint.execution_horizon if horizon is None else horizon
    controller.check(horizon, checkpoint.policy.config.action_horizon)
    backend = {name: settings[name] for name in ("backend", "weights")}
    check_backend(**backend)
    return Cell(
        policy=number,
        sampler=checkpoint.policy.settled(sampler),
        execution_horizon=horizon,
        controller=controller,
        **backend,
    )


def axis_values(name: str, given: Any) -> list[Any]:
    """The values of an axis: those of a list, or a single value.

    Raises:
        ValueError: the list is empty, or repeats a value.
    """
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    if not values:
        raise ValueError(f"{name} is empty: give one value, or several as {name}=[...,...], or leave {name}= out")
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"{name} must not repeat a value; got {values}")
    return values


def row_of(cell: SweepCell, figures: Row, latency: Row) -> Row:
    """The row of a cell as JSON data: its settings, its figures with their intervals, its cost and its latency.

    Args:
        cell: the cell.
        figures: of its episodes, see `summarize`.
        latency: its measured columns, see `latencies_of`.

    Returns:
        The row.
    """
    objective = cell.checkpoint.policy.config.objective
    return {**cell.axes, "objective": objective, **figures, "multiply_adds": cell.multiply_adds, **latency}


def ids_of(cells: Sequence[SweepCell]) -> tuple[str, ...]:
    """The ids of cells in the ledger."""
    return tuple(cell_id(cell.settings) for cell in cells)
