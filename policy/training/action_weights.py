"""Weights of the action's dimensions in the loss, so that small corrections count where large motions are rare.

Actions that are counted from an observed number spread as they are counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.data.windows import Windows
from policy.model.normalizer import AffineNormalizer, Normalizer
from policy.model.relative_actions import ActionReference
from policy.training.errors import action_deviation

# A dimension with at least this standard deviation, in half ranges, has the weight 1; no weight is above HEAVIEST.
USUAL_DEVIATION, HEAVIEST = 0.3, 20.0


def relative_actions(training: Windows, reference: ActionReference) -> Iterator[NDArray[np.float32]]:
    """Count the actions of all windows from their reference: blocks (N, action_dim) in the data's units."""
    for observations, actions in training.chunks():
        newest = {key: torch.tensor(observations[key]) for key in reference.keys}
        yield (torch.tensor(actions) - reference(newest)).flatten(0, 1).numpy()


def weights_by_spread(
    training: Windows, normalizer: Normalizer | AffineNormalizer, reference: ActionReference | None = None
) -> Tensor:
    """Weigh each dimension of the action by how far its values spread within their range.

    Actions are normalised to their range. A wrist that turns far now and then, and hardly at all when it matters, then
    has small numbers only, and an error in them costs next to nothing: measured on `hanoi-cpu-lite-single-task1`, such
    a policy corrected 3 % of an error of the wrist within a chunk. The square of the ratio of a usual deviation to the
    dimension's own makes up for it.

    Args:
        training: the training windows.
        normalizer: the policy's, of actions.
        reference: what its actions are counted from, if they are.

    Returns:
        (action_dim,) float32, from 1 to 20; 1 for a dimension that never changes.

    Raises:
        ValueError: the demonstrations have other actions than the policy, as they may in a run that only rectifies.
    """
    spread = action_deviation(training) if reference is None else _deviation(relative_actions(training, reference))
    deviation = torch.from_numpy(np.nan_to_num(spread)).to(torch.float32)
    scale = normalizer.scale.cpu()
    if deviation.shape != scale.shape:
        raise ValueError(
            "train.action_weights=spread weighs the numbers of an action by how far the demonstrated ones spread; these"
            f" have {len(deviation)} and those of the policy {len(scale)}: leave it out"
        )
    normalized = deviation / scale
    weights = (USUAL_DEVIATION / normalized).square().clamp(1.0, HEAVIEST)
    return torch.where(normalized > 0, weights, 1.0)


def _deviation(blocks: Iterator[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The standard deviation of each dimension of values that arrive in blocks (N, D)."""
    rows, total, squares = 0, 0.0, 0.0
    for values in (block.astype(np.float64) for block in blocks):
        rows, total, squares = rows + len(values), total + values.sum(axis=0), squares + np.square(values).sum(axis=0)
    return np.asarray(np.sqrt(np.maximum(squares / rows - np.square(total / rows), 0)))
