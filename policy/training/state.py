"""The state of a training run, and its conversion to tensors and JSON and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from policy.model.config import config_to_json
from policy.model.diffusion_policy import DiffusionPolicy


@dataclass(kw_only=True)
class TrainState:
    """Everything that a run needs to continue exactly where it stopped.

    Attributes:
        policy: the weights being optimised.
        ema: their average, which acts, and which checkpoints store as the policy.
        optimizer: AdamW over `policy`.
        step: number of steps done, and of updates of the average.
        history: the log entries.
        recent: the finite losses since the last log entry.
        teacher: during rectification, the policy that makes the chunks; None before, unless the run is given one.
        skipped: steps that were skipped because their loss or gradient was not finite, counted from 1 as in `history`.
    """

    policy: DiffusionPolicy
    ema: DiffusionPolicy
    optimizer: torch.optim.AdamW
    teacher: DiffusionPolicy | None = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)


def newest_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The newest value of each metric in a history, and the step it was measured at.

    >>> newest_metrics([{"step": 20, "train/loss": 0.5, "val/loss": 0.6}, {"step": 40, "train/loss": 0.4}])
    {'train/loss': {'step': 40, 'value': 0.4}, 'val/loss': {'step': 20, 'value': 0.6}}
    """
    return {
        name: {"step": entry["step"], "value": value}
        for entry in history
        for name, value in entry.items()
        if name != "step"
    }


def run_record(state: TrainState) -> dict[str, Any]:
    """The part of the state that is not tensors, as JSON data for a checkpoint."""
    record = {"step": state.step, "history": state.history, "recent": state.recent, "skipped": state.skipped}
    return {**record, "teacher": config_to_json(state.teacher.config)} if state.teacher else record


def restore_record(state: TrainState, record: dict[str, Any]) -> None:
    """Restore the part of the state that `run_record` returned.

    Raises:
        KeyError: the step or the history is missing.
        TypeError: a value is of the wrong type.
        ValueError: a value cannot be converted to a number.
    """
    state.step = int(record["step"])
    # A metric that was not finite is null in JSON.
    state.history = [
        {name: value for name, value in {**entry}.items() if value is not None} for entry in record["history"]
    ]
    # The first checkpoints stored neither of these.
    state.recent = [float(loss) for loss in record.get("recent", [])]
    state.skipped = [int(step) for step in record.get("skipped", [])]


def optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors, for a checkpoint."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, memory in state.optimizer.state_dict()["state"].items()
        for name, value in memory.items()
    }


def restore_optimizer(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the optimiser's state from the tensors that `optimizer_tensors` returned.

    Raises:
        ValueError: the tensors do not fit the optimiser: one is missing, unknown or of another shape.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    expected = {
        f"{index}.{name}": shape
        for index, p in enumerate(parameters)
        for name, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape))
    }
    if {key: tuple(value.shape) for key, value in tensors.items()} != {k: tuple(v) for k, v in expected.items()}:
        raise ValueError("the optimiser's memory does not fit the weights")
    memory: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        memory.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": memory, "param_groups": groups})
