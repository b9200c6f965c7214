"""The instrument: success against `ddim_steps`, with intervals and latency."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policy.arguments import check_arguments, unknown_name
from policy.checkpoint import Checkpoint
from policy.controller import check_execution_horizon
from policy.evaluation import Cell, EpisodeResult, chunk_latency, program_of, summarize
from policy.inference import check_backend
from policy.ledger import cell_id
from policy.sampler import Sampler

Row = dict[str, Any]

# What may differ between cells, in the order of the table's first columns.
AXES = ("checkpoint", *(field.name for field in dataclasses.fields(Sampler)), "execution_horizon", "backend", "weights")


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """A cell with what its results depend on, the episode's seed apart.

    Attributes:
        cell: how it acts.
        checkpoint: whose policy.
        env: settings of the environment.
    """

    cell: Cell
    checkpoint: Checkpoint
    env: Mapping[str, Any]

    @property
    def axes(self) -> Row:
        """The values that tell it from other cells."""
        settings = dataclasses.asdict(self.cell.sampler)
        return {
            "checkpoint": str(self.checkpoint.path),
            **settings,
            "execution_horizon": self.cell.execution_horizon,
            "backend": self.cell.backend,
            "weights": self.cell.weights,
        }

    @property
    def settings(self) -> Row:
        """JSON data for the ledger: the policy by its weights, wherever they lie."""
        return {**self.axes, "checkpoint": self.checkpoint.digest, "env": dict(self.env)}


def make_cells(
    checkpoints: Sequence[Checkpoint],
    env: Mapping[str, Any],
    *,
    ddim_steps: int | Sequence[int],
    sampler: Mapping[str, Any],
    execution_horizon: int | Sequence[int] | None,
    backend: str | Sequence[str] = "eager",
    weights: str | Sequence[str] = "float32",
) -> list[SweepCell]:
    """Every combination of the settings; a list of values makes an axis.

    Args:
        checkpoints: one or more.
        env: settings of the environment.
        ddim_steps: denoising steps.
        sampler: the other sampler settings, by name.
        execution_horizon: actions executed before the next plan; None takes each checkpoint's own.
        backend: what samples, see `compile_sampler`.
        weights: of the backend.

    Returns:
        The cells, `ddim_steps` changing fastest.

    Raises:
        ValueError: an axis that is empty, repeats a value, or holds one that does not fit.
    """
    if "ddim_steps" in sampler:
        raise ValueError(
            f"a sweep takes its steps from ddim_steps=[...]; got sampler.ddim_steps={sampler['ddim_steps']}"
        )
    names = [field.name for field in dataclasses.fields(Sampler)]
    if unknown := [name for name in sampler if name not in names]:
        raise unknown_name("setting of sampler", unknown[0], names)
    axes = {
        "backend": axis_values("backend", backend),
        "weights": axis_values("weights", weights),
        "execution_horizon": axis_values("execution_horizon", execution_horizon),
        **{name: axis_values(f"sampler.{name}", values) for name, values in sampler.items()},
        "ddim_steps": axis_values("ddim_steps", ddim_steps),
    }
    cells = []
    for index, checkpoint in enumerate(checkpoints):
        config, schedule = checkpoint.policy.config, checkpoint.policy.schedule
        for values in itertools.product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            running = {name: settings.pop(name) for name in ("backend", "weights")}
            check_backend(**running)
            horizon = settings.pop("execution_horizon")
            horizon = checkpoint.execution_horizon if horizon is None else horizon
            check_execution_horizon(horizon, config.action_horizon)
            chosen = Sampler(**check_arguments("sampler", Sampler, settings))
            chosen.check(schedule.num_steps)
            cell = Cell(policy=index, sampler=chosen, execution_horizon=horizon, **running)
            cells.append(SweepCell(cell=cell, checkpoint=checkpoint, env=env))
    seen: dict[str, SweepCell] = {}
    for one in cells:
        if (twin := seen.setdefault(cell_id(one.settings), one)) is not one:
            raise ValueError(f"{twin.axes} and {one.axes} are the same cell: give each value and each policy once")
    return cells


def axis_values(name: str, given: Any) -> list[Any]:
    """The values of an axis: those of a list, or the one value given.

    Raises:
        ValueError: none, or one twice.
    """
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    if not values:
        raise ValueError(f"{name} is empty: give one value or more, such as ddim_steps=[1,2,4,8]")
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"{name} must not repeat a value; got {values}")
    return values


def row_of(cell: SweepCell, results: Sequence[EpisodeResult]) -> Row:
    """One cell as JSON data: its settings, its figures with their intervals, and the latency of a chunk.

    Args:
        cell: the cell.
        results: of its episodes.

    Returns:
        The row.
    """
    policy = cell.checkpoint.policy
    latency = chunk_latency(policy, cell.cell.sampler, program=program_of(policy, cell.cell))
    return {
        **cell.axes,
        **summarize(results),
        **latency,
        # Planning between two chunks leaves the robot waiting at any rate above this.
        "control_rate_hz": 1e3 * cell.cell.execution_horizon / latency["latency_ms_median"],
    }


def varying(rows: Sequence[Row]) -> list[str]:
    """The axes besides `ddim_steps` along which the rows differ."""
    return [axis for axis in AXES if axis != "ddim_steps" and len({row.get(axis) for row in rows}) > 1]
