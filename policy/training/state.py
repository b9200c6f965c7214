"""What a training run is at one step, and how it becomes tensors and JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from policy.model.diffusion_policy import DiffusionPolicy


@dataclass(kw_only=True)
class TrainState:
    """Everything a run needs to go on exactly where it stopped.

    Attributes:
        policy: the weights being optimised.
        ema: their average, which is what acts and what checkpoints hold as the policy.
        optimizer: AdamW over `policy`.
        step: steps done, also the average's update count.
        history: what was logged.
        recent: losses since the newest log entry, finite ones only.
        teacher: the policy whose chunks are learnt from, during rectification.
        skipped: steps left out because their loss or gradient was not finite, counted from 1 as in `history`.
    """

    policy: DiffusionPolicy
    ema: DiffusionPolicy
    optimizer: torch.optim.AdamW
    teacher: DiffusionPolicy | None = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)


def run_record(state: TrainState) -> dict[str, Any]:
    """What a checkpoint notes of a run besides tensors, as JSON data."""
    return {"step": state.step, "history": state.history, "recent": state.recent, "skipped": state.skipped}


def restore_record(state: TrainState, record: dict[str, Any]) -> None:
    """Put back what `run_record` gave.

    Raises:
        KeyError: no step or no history in it.
        TypeError: something in it is of another type.
        ValueError: as before.
    """
    state.step = int(record["step"])
    state.history = list(record["history"])
    # The first checkpoints noted neither.
    state.recent = [float(loss) for loss in record.get("recent", [])]
    state.skipped = [int(step) for step in record.get("skipped", [])]


def optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """The optimiser's memory as named tensors, for a checkpoint."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, memory in state.optimizer.state_dict()["state"].items()
        for name, value in memory.items()
    }


def restore_optimizer(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    """Put the optimiser's memory back, as `optimizer_tensors` gave it.

    Raises:
        ValueError: tensors of another optimiser: a parameter without memory, or memory of another shape.
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
