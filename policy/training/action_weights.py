"""Weights of the action's dimensions in the loss, so that small corrections count where large motions are rare."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policy.data.windows import Windows
from policy.model.normalizer import AffineNormalizer, Normalizer
from policy.training.errors import action_deviation

# A dimension with at least this standard deviation, in half ranges, has the weight 1; no weight is above HEAVIEST.
USUAL_DEVIATION, HEAVIEST = 0.3, 20.0


def weights_by_spread(training: Windows, normalizer: Normalizer | AffineNormalizer) -> Tensor:
    """Weigh each dimension of the action by how far its values spread within their range.

    Actions are normalised to their range. A wrist that turns far now and then, and hardly at all when it matters, then
    has small numbers only, and an error in them costs next to nothing: measured on `hanoi-cpu-lite-single-task1`, such
    a policy corrected 3 % of an error of the wrist within a chunk. The square of the ratio of a usual deviation to the
    dimension's own makes up for it.

    Args:
        training: the training windows.
        normalizer: the policy's, of actions.

    Returns:
        (action_dim,) float32, from 1 to 20; 1 for a dimension that never changes.

    Raises:
        ValueError: the demonstrations have other actions than the policy, as they may in a run that only rectifies.
    """
    deviation = torch.from_numpy(np.nan_to_num(action_deviation(training))).to(torch.float32)
    scale = normalizer.scale.cpu()
    if deviation.shape != scale.shape:
        raise ValueError(
            "train.action_weights=spread weighs the numbers of an action by how far the demonstrated ones spread; these"
            f" have {len(deviation)} and those of the policy {len(scale)}: leave it out"
        )
    normalized = deviation / scale
    weights = (USUAL_DEVIATION / normalized).square().clamp(1.0, HEAVIEST)
    return torch.where(normalized > 0, weights, 1.0)


def spread_matters(training: Windows, normalizer: Normalizer | AffineNormalizer) -> bool:
    """Whether `weights_by_spread` differ from equal weights; not where the demonstrations have other actions."""
    try:
        return bool((weights_by_spread(training, normalizer) > 1).any())
    except ValueError:
        return False
