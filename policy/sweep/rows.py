"""What a row says: the settings of one cell of a sweep, its figures with their intervals, its cost and its latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from policy.common.arguments import unknown_name
from policy.control.timeline import ControllerSettings
from policy.diffusion.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from policy.diffusion.sampler import LATER_SETTINGS, Sampler

Row = dict[str, Any]

# The settings that may differ between cells, in the order of the table's first columns.
SAMPLER_AXES = tuple(field.name for field in dataclasses.fields(Sampler))
CONTROLLER_AXES = tuple(field.name for field in dataclasses.fields(ControllerSettings))
AXES = ("checkpoint", "objective", *SAMPLER_AXES, "execution_horizon", *CONTROLLER_AXES, "backend", "weights")
# Measured or counted columns that not all versions wrote.
FIGURES = (
    *("multiply_adds", "latency_ms_p90", "control_rate_hz", "latency_ms_p99", "latency_cpu_ms", "latency_quiet"),
    *("latency_threads", "busy", "waiting_rate_hz", "planning_ahead_rate_hz"),
)
# Columns of the table that sweeps of other versions do not have, with the value that stands for their absence.
LATER_COLUMNS = {
    **LATER_SETTINGS,
    "objective": DEFAULT_OBJECTIVE,
    "broke_off": 0,
    "training_seeds": 1,
    **dict.fromkeys(FIGURES),
}
# Types of the columns that all versions wrote, and of others.
NEEDED = {
    **dict.fromkeys(("cell", "checkpoint"), (str,)),
    **dict.fromkeys(("ddim_steps", "episodes"), (int,)),
    **dict.fromkeys(("success_rate", "success_low", "success_high", "latency_ms_median"), (int, float)),
}
POSSIBLE = {
    "training_seeds": (int,),
    **dict.fromkeys(("score_mean", "score_low", "score_high", "return_mean", "steps_mean", *FIGURES), (int, float)),
}


def has_recipes(rows: Sequence[Row]) -> bool:
    """Whether a row is that of several training seeds."""
    return any(row.get("training_seeds", 1) > 1 for row in rows)


def below_margin(rows: Sequence[Row], margin: float) -> bool:
    """Whether no cell's success reaches the margin: then a cell that solves nothing would not be worse by it."""
    return all(row["success_rate"] < margin for row in rows)


def costs_of(rows: Sequence[Row]) -> list[float]:
    """What ranks cells by cost: the multiply-adds per control step, which no measurement changes.

    Where a row lacks them, as those of older sweeps do, it is the calls of the denoiser per control step for all rows:
    the same order among cells of one policy, apart from the encoder's share.
    """
    if all(row.get("multiply_adds") is not None for row in rows):
        return [row["multiply_adds"] for row in rows]
    return [row["ddim_steps"] * row.get("candidates", 1) / row["execution_horizon"] for row in rows]


def varying(rows: Sequence[Row]) -> list[str]:
    """The axes other than `ddim_steps` along which the rows differ; not those whose value another one tells."""
    pairs = {(row.get("objective"), row.get("solver")) for row in rows}
    implied = {"ddim_steps"}
    if len({objective for objective, _ in pairs}) == len(pairs):
        implied.add("solver")
    if all(row.get("checkpoint") == row.get("objective") for row in rows):  # checkpoints that are called after them
        implied.add("objective")
    return [axis for axis in AXES if axis not in implied and len({row.get(axis) for row in rows}) > 1]


def label_of(rows: Sequence[Row], row: Row) -> str:
    """The settings that distinguish a row from the others, in words."""
    return ", ".join(f"{axis} {row.get(axis)}" for axis in ("ddim_steps", *varying(rows)))


def shared(rows: Sequence[Row]) -> str:
    """What all rows have in common that a table of their axes does not tell: the settings that are no defaults.

    Args:
        rows: the rows of a sweep.

    Returns:
        In words, such as `execution_horizon 5, noise_scale 0.6`; the execution horizon, for which there is no usual
        value, is always among them. Empty if they have nothing in common.
    """
    defaults = {name: getattr(Sampler, name) for name in SAMPLER_AXES if name != "ddim_steps"}
    defaults |= {name: getattr(ControllerSettings, name) for name in CONTROLLER_AXES}
    if {row.get("objective", DEFAULT_OBJECTIVE) for row in rows} != {DEFAULT_OBJECTIVE}:  # which brings its solver
        del defaults["solver"]
    found = {name: {row.get(name, default) for row in rows} - {default} for name, default in defaults.items()}
    horizons = {row.get("execution_horizon") for row in rows} - {None}
    varied = varying(rows)
    return ", ".join(
        f"{name} {value}"
        for name, values in {"execution_horizon": horizons, **found}.items()
        if name not in varied
        for value in values
    )


def checked_rows(values: Any) -> list[Row]:
    """Check the rows of a file that may have been edited.

    Raises:
        ValueError: a row lacks a column that all versions write, or has a value of another type.
    """
    if not isinstance(values, list) or not values or not all(isinstance(row, dict) for row in values):
        raise ValueError("its cells are not a list of objects")
    for number, row in enumerate(values):
        types = NEEDED | {name: known for name, known in POSSIBLE.items() if row.get(name) is not None}
        wrong = [name for name, known in types.items() if not isinstance(row.get(name), known)]
        if wrong := wrong or [name for name, value in row.items() if isinstance(value, list | dict)]:
            raise ValueError(f"{wrong[0]} of cell {number} is {row.get(wrong[0])!r}")
        if odd := (row.keys() ^ values[0].keys()) - LATER_COLUMNS.keys():
            raise ValueError(f"{min(odd)} is a column of some cells alone")
        if row.get("objective", DEFAULT_OBJECTIVE) not in OBJECTIVES:
            raise unknown_name(f"objective of cell {number}", str(row["objective"]), OBJECTIVES)
    return values


def uniform(rows: Sequence[Row], later: Mapping[str, Any] = LATER_COLUMNS) -> list[Row]:
    """Give all rows the same columns; one that was added later is left out unless a row uses it.

    Args:
        rows: the rows of one sweep, or of several that different versions wrote.
        later: the columns that were added later, with the value that means what was so before.

    Returns:
        The rows, in their order.
    """
    used = {name for name, before in later.items() if any(row.get(name, before) != before for row in rows)}
    unused = later.keys() - used
    filled = [{**row, **{name: later[name] for name in used - row.keys()}} for row in rows]
    return [{name: value for name, value in row.items() if name not in unused} for row in filled]


def stopped_early(rows: Sequence[Row]) -> list[bool]:
    """Whether each cell stopped at an earlier look than others; a sweep that knows no looks has no such cells."""
    last = max((row.get("stopped", 0) for row in rows), default=0)
    return [row.get("stopped", last) < last for row in rows]


def count_of(rows: Sequence[Row]) -> str:
    """The number of episodes in each cell, or the least and the greatest number, in words."""
    counts = sorted({row["episodes"] for row in rows})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def objective_of(row: Row) -> str:
    """The objective of a row's checkpoint; rows of older sweeps do not say it."""
    return str(row.get("objective", DEFAULT_OBJECTIVE))


def is_control(row: Row) -> bool:
    """Whether a row is that of a policy with a fixed number of calls, so that it has no curve over `ddim_steps`."""
    return OBJECTIVES[objective_of(row)].calls is not None
