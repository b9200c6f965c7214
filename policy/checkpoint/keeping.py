"""Which checkpoints of a run are kept besides the newest: the last few, and the best."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from policy.checkpoint.files import (
    CONFIG,
    TRAINING_RECORD,
    TRAINING_WEIGHTS,
    WEIGHTS,
    discard,
    is_checkpoint,
    open_folder,
    replacing,
)
from policy.training.state import TrainState

KEPT = "checkpoints"
BEST = "best"
# In OCBench's chamber, the checkpoint of the least loss has 47 and 61 % success, the last one 83 and 84 %.
BY_LOSS = "; the validation loss does not tell which succeeds more often: compare both in rollouts"

Entry = dict[str, float]


def keep_checkpoint(checkpoint: Path, state: TrainState, *, keep_last: int) -> None:
    """Keep the policy of the newest checkpoint as one of the last few and, if it is the best so far, as the best.

    Args:
        checkpoint: the checkpoint folder, just written from `state`.
        state: the run's state; its history tells which checkpoint is the best.
        keep_last: number of recent checkpoints to keep; older ones are removed.

    Raises:
        SaveError: the copy cannot be written, for example because the disk is full.
    """
    kept = checkpoint.with_name(KEPT)
    for half in kept.glob(".step_*"):  # left by a kill while one was written or removed
        shutil.rmtree(half, ignore_errors=True)
    if keep_last:
        copy_checkpoint(checkpoint, kept / f"step_{state.step:07d}")
    if _is_best(kept / BEST, state):
        copy_checkpoint(checkpoint, kept / BEST)
    for folder in _outdated(kept, state.step, keep_last):
        discard(folder)


def rank(entry: Entry) -> tuple[float, ...] | None:
    """Rank a policy by a log entry: higher is better, and any rollout ranks above any validation loss.

    Args:
        entry: an entry of a run's history.

    Returns:
        Numbers to compare, or None for an entry without a rollout or a validation loss.
    """
    if "rollout/success_rate" in entry:
        return (1.0, entry["rollout/success_rate"], entry["rollout/score_mean"])
    loss = entry.get("val/loss", math.nan)
    return None if math.isnan(loss) else (0.0, -loss)


def describe_best(checkpoint: Path, state: TrainState, rollout_episodes: int) -> str:
    """Say which kept checkpoint is the best one and by which measure, and how the newest one compares.

    Args:
        checkpoint: the checkpoint folder, just written from `state`.
        state: the run's state.
        rollout_episodes: number of episodes in each rollout during training.

    Returns:
        A line for the terminal.
    """
    found = best_entry(checkpoint, state.history)
    if found is None:
        nothing = not any("val/loss" in entry for entry in state.history)
        why = ": train.val_fraction holds out episodes for validations" if nothing else ""
        return f"best saved: not known, because no checkpoint was saved right after a rollout or a validation{why}"
    best, step = checkpoint.with_name(KEPT) / BEST, int(found["step"])
    measure = measured(found, rollout_episodes)
    if step == state.step:
        return f"best saved: step {step:,}, the last, {measure}"
    last = next((entry for entry in state.history if entry["step"] == state.step), {})
    doubt = "" if "rollout/success_rate" in found else BY_LOSS
    return (
        f"best saved: step {step:,}, {measure}, kept in {best}; the last: step {state.step:,},"
        f" {measured(last, rollout_episodes)}{doubt}"
    )


def best_entry(checkpoint: Path, history: Sequence[Entry]) -> Entry | None:
    """The log entry of the best checkpoint.

    Args:
        checkpoint: the folder of the run's newest checkpoint.
        history: the run's log entries.

    Returns:
        The entry, or None if no checkpoint was saved right after a rollout or a validation.
    """
    best = checkpoint.with_name(KEPT) / BEST
    step = _step_of(best) if is_checkpoint(best) else -1
    return next((entry for entry in history if entry["step"] == step and rank(entry)), None)


def measured(entry: Entry, rollout_episodes: int) -> str:
    """What an entry ranks by, in words."""
    if "rollout/success_rate" in entry:
        return f"rollout success {entry['rollout/success_rate']:.0%} (of {rollout_episodes} episodes)"
    return f"validation loss {entry['val/loss']:.4g}" if "val/loss" in entry else "without a measurement"


def _is_best(best: Path, state: TrainState) -> bool:
    """Whether the newest log entry is of the state's own step and ranks at least as high as the best so far."""
    now = _rank_at(state.history[-1:], state.step)
    if now is None:
        return False
    before = _rank_at(state.history, _step_of(best)) if is_checkpoint(best) else None
    return before is None or now >= before


def _rank_at(history: Sequence[Entry], step: int) -> tuple[float, ...] | None:
    return next((rank(entry) for entry in history if entry["step"] == step), None)


def _step_of(folder: Path) -> int:
    try:
        return int(open_folder(folder).config["training"]["step"])
    except (ValueError, LookupError, TypeError):
        return -1  # damaged: any other checkpoint is better


def copy_checkpoint(checkpoint: Path, target: Path, *, with_training: bool = False) -> None:
    """Copy a checkpoint; on most file systems, the copy takes no room.

    Args:
        checkpoint: the checkpoint folder.
        target: replaced once the copy is complete.
        with_training: copy also what a run needs to go on from it.

    Raises:
        SaveError: the copy cannot be written, for example because the disk is full.
    """
    with replacing(target) as new:
        for name in (CONFIG, WEIGHTS, *((TRAINING_WEIGHTS, TRAINING_RECORD) if with_training else ())):
            try:
                os.link(checkpoint / name, new / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(checkpoint / name, new / name)


def _outdated(kept: Path, step: int, keep_last: int) -> list[Path]:
    """The folders to remove: those before the last few, and those of later steps, left by an earlier run."""
    found = sorted(p for p in kept.glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name))
    ours = sorted((p for p in found if _number(p) <= step), key=_number)
    return [p for p in found if _number(p) > step] + ours[: max(0, len(ours) - keep_last)]


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
