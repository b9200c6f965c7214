"""How much of an error in where the robot is a policy corrects within one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from policy.common.seeding import derive_generator
from policy.data.corrections import Corrections
from policy.data.holding import NOTHING
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy, observed
from policy.training.corrective_noise import CorrectiveNoise

# Windows that are looked at, and the error: a share of what a number usually moves within a chunk.
WINDOWS, ERROR = 256, 0.5
# A policy that corrects less of an error than this within a chunk hardly corrects it at all. Measured on one task only:
# with 3 % of the wrist's error corrected, 1 of 24 episodes succeeded, with 36 % or more, 12 of 24.
HARDLY = 0.3


class Recovery(NamedTuple):
    """What becomes of an error of one number.

    Attributes:
        number: the number that follows an action, such as `state[5]`.
        corrected: the share that the actions of a chunk correct: 1 all of it, 0 nothing.
    """

    number: str
    corrected: float


def recoveries(policy: DiffusionPolicy, windows: Windows, corrections: Corrections, sampler: Sampler) -> list[Recovery]:
    """Move the robot in windows of demonstrations, and see how far the policy's chunks lead it back.

    Each number that follows the action is moved to both sides, and the same noise is denoised on either side. What the
    chunks differ by, times what an action moves, is the correction.

    Args:
        policy: the policy.
        windows: windows of the demonstrations that `corrections` was found in.
        corrections: what follows the policy's actions, and what moves along.
        sampler: settings of the sampler.

    Returns:
        One for each number; none if there is no window in which nothing moves but the robot and what it holds.
    """
    marked = windows.marking(corrections.held)
    spread = np.unique(
        np.linspace(0, windows.num_transitions - 1, min(8 * WINDOWS, windows.num_transitions)).astype(int)
    )
    held = marked.gather(spread)["held"].numpy()
    movable = spread[held >= NOTHING]
    if not len(movable):
        return []
    batch = marked.gather(movable[:: max(1, len(movable) // WINDOWS)])
    mover = CorrectiveNoise(corrections, 1.0, policy.config.past_actions)
    program = compile_sampler(policy, sampler, backend=PLAIN_BACKEND)

    def chunks(offsets: torch.Tensor) -> torch.Tensor:
        seen = {**batch["observations"], **mover.displaced(batch["observations"], offsets, batch["held"])}
        return program.sample_actions(observed(policy.config, seen), generator=derive_generator(0)).cpu()

    names = corrections.names
    found = []
    for place, followed in enumerate(corrections.followed):
        offsets = torch.zeros(len(batch["held"]), len(corrections.followed))
        offsets[:, place] = ERROR * followed.reach
        apart = (chunks(offsets) - chunks(-offsets))[..., followed.action].sum(dim=1).mean()
        found.append(Recovery(names[followed.number], float(-apart * followed.gain / (2 * ERROR * followed.reach))))
    return found


def describe_recoveries(found: Sequence[Recovery]) -> str:
    """Say in one sentence what a chunk corrects, and what to do where it is next to nothing."""
    shares = ", ".join(f"{one.number} {one.corrected:.0%}" for one in found)
    hardly = [one.number for one in found if one.corrected < HARDLY]
    advice = (
        f"; it hardly corrects {', '.join(hardly)}: train with train.corrective_noise=0.5 train.action_weights=spread"
        if hardly
        else ""
    )
    return f"of an error in where the robot is, one chunk corrects {shares}{advice}"
