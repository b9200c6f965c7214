"""The geometry of Push-T: features and keypoints of a state, and mirror images, as functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import choose

# Names the code of this file in the cache of converted demonstrations; raise it with every change of what it computes.
CACHE_REVISION = "a80451f38198d76709708dd939409064c49cfa1a6bb7ba3746b5dcd78fe9be72"
FEATURE_DIM = 40
KEYPOINT_DIM = 18
CORNER_DIM = 16
TABLE_SIZE = np.float32(512)

# Corners of the T in the block's own frame, in pixels of the 512 x 512 table: the bar, then the stem,
# in the order of gym-pusht's keypoints.
_CORNERS = np.array(
    [[-60, 0], [60, 0], [60, 30], [-60, 30], [-15, 30], [15, 30], [15, 120], [-15, 120]], dtype=np.float64
)
_CORNERS.setflags(write=False)
# The target as a pose of the block: x, y (pixels) and angle (radians).
TARGET_POSE = np.array([256.0, 256.0, np.pi / 4])
TARGET_POSE.setflags(write=False)
# Pixels: the scale of the corners' distances from the target, and the limit of the agent's distance from the block.
NEAR, AROUND = 30.0, 200.0
# Places in `pusht_features` of the corners, their distances from the target, and the agent in the block's frame.
_CORNERS_AT, _ERRORS_AT, _AGENT_AT = slice(6, 22), slice(22, 38), slice(38, 40)

# The nine points of `keypoint` in the public demonstrations (pusht_cchi_v7_replay.zarr.zip), in the block's own frame:
# the medians of R(angle)^T (keypoint - block xy) over its 25,650 rows, whose `state` holds the block's origin. Half the
# rows are within 0.00002 pixels of them. `python -m tests.envs.test_pusht FILE` prints them again.
_KEYPOINTS = np.array(
    [
        [9.26979, 90.04097],
        [-60.98347, -1.18673],
        [60.91276, -1.39336],
        [-0.27050, 25.54363],
        [-14.06493, 122.81585],
        [39.00274, 32.85740],
        [-39.96641, 32.72966],
        [-16.82434, 62.86318],
        [23.54146, -1.70029],
    ]
)
_KEYPOINTS.setflags(write=False)


def pusht_features(state: ArrayLike) -> NDArray[np.float32]:
    """Describe a Push-T state by features that do not jump when the angle completes a full turn.

    Args:
        state: (..., 5) agent x, agent y, block x, block y (pixels, 0 to 512) and block angle (radians).

    Returns:
        (..., 40) float32: agent xy, block xy, cosine and sine of the block angle, x, y of the T's eight corners in the
        world (pixels), in the order of gym-pusht's keypoints; then two features for the precise end of the task: the
        distance of each corner from its place on the target, x and y, as tanh(pixels / 30), and the agent's position in
        the block's frame (pixels along the block's own axes, clipped to 200).

    Raises:
        ValueError: If the last axis is not 5 long.
    """
    state = check_state(state)
    corners = _on_table(state, _CORNERS)
    features = np.empty((*state.shape[:-1], FEATURE_DIM), dtype=np.float32)
    features[..., :4] = state[..., :4]
    features[..., 4] = np.cos(state[..., 4])
    features[..., 5] = np.sin(state[..., 4])
    features[..., _CORNERS_AT] = corners
    features[..., _ERRORS_AT] = np.tanh((corners - _TARGET_CORNERS) / NEAR)
    features[..., _AGENT_AT] = np.clip(_in_block(state), -AROUND, AROUND)
    return features


def pusht_keypoints(state: ArrayLike) -> NDArray[np.float32]:
    """Compute the public demonstrations' nine keypoints of a Push-T state.

    Args:
        state: (..., 5), as for `pusht_features`.

    Returns:
        (..., 18) float32: x, y of nine points of the T in the world (pixels), in the order of the demonstrations'
        ``keypoint``. They differ from gym-pusht's keypoints, which are the eight corners.

    Raises:
        ValueError: If the last axis is not 5 long.
    """
    return _on_table(check_state(state), _KEYPOINTS).astype(np.float32)


def pusht_corners(state: ArrayLike) -> NDArray[np.float32]:
    """Compute the corners of the T in a Push-T state, as gym-pusht's ``environment_state`` lists them.

    Args:
        state: (..., 5), as for `pusht_features`.

    Returns:
        (..., 16) float32: x, y of the T's eight corners in the world (pixels), first the bar's, then the stem's.

    Raises:
        ValueError: If the last axis is not 5 long.
    """
    return _on_table(check_state(state), _CORNERS).astype(np.float32)


def pusht_state_features(observations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the demonstrations' observations into those of ``observation="features"``.

    Args:
        observations: ``"state"`` (T, 5); other keys stay as they are.

    Returns:
        The observations with ``"state"`` (T, 40) float32, see `pusht_features`.

    Raises:
        ValueError: If there is no such state.
    """
    return {**observations, "state": pusht_features(state_of(observations))}


def pusht_agent_pos(observations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the demonstrations' observations into those of ``observation="keypoints"`` or ``"image"``.

    Args:
        observations: ``"state"`` (T, 5), and ``"keypoint"`` (T, 9, 2) or ``"image"``; other keys stay as they are.

    Returns:
        The observations with ``"agent_pos"`` (T, 2) float32 in place of the state, and ``"keypoint"`` (T, 18) float32.

    Raises:
        ValueError: If there is no such state.
    """
    state = check_state(state_of(observations))
    rest = {key: value for key, value in observations.items() if key != "state"}
    if "keypoint" in rest:
        rest["keypoint"] = rest["keypoint"].reshape(len(state), -1).astype(np.float32)
    return {**rest, "agent_pos": state[..., :2].astype(np.float32)}


def pusht_keypoints_agent_pos(observations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the demonstrations' observations into those of ``observation="keypoints_agent_pos"``.

    Args:
        observations: ``"state"`` (T, 5), and ``"keypoint"`` (T, 9, 2), which is computed if it is not there; other keys
            stay as they are.

    Returns:
        The observations with ``"state"`` (T, 20) float32: x, y of the keypoints and of the finger, as diffusion_policy
        lists them.

    Raises:
        ValueError: If there is no such state.
    """
    changed = pusht_agent_pos({"keypoint": pusht_keypoints(state_of(observations)), **observations})
    keypoints, agent_pos = changed.pop("keypoint"), changed.pop("agent_pos")
    return {**changed, "state": np.concatenate([keypoints, agent_pos], axis=-1)}


def pusht_state_corners(observations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the demonstrations' observations into those of ``observation="corners"``.

    Args:
        observations: ``"state"`` (T, 5); other keys are treated as `pusht_agent_pos` treats them.

    Returns:
        The observations with ``"environment_state"`` (T, 16) float32, see `pusht_corners`, and ``"agent_pos"`` (T, 2)
        float32 in place of the state.

    Raises:
        ValueError: If there is no such state.
    """
    return {**pusht_agent_pos(observations), "environment_state": pusht_corners(state_of(observations))}


def pusht_mirror(
    observations: Mapping[str, NDArray[Any]], actions: NDArray[np.float32]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Mirror Push-T episodes across the target's axis of symmetry, the table's diagonal x + y = 512.

    The T, its target, the table and the finger are all symmetric under it, so the mirror image of a demonstration is
    another valid demonstration. A point (x, y) becomes (512 - y, 512 - x), and a block angle a becomes pi / 2 - a.

    Args:
        observations: Arrays by key, with any leading axes: ``"state"`` (..., 40) of `pusht_features`, ``"keypoint"``
            (..., 18) of `pusht_keypoints`, ``"environment_state"`` (..., 16) of `pusht_corners`, ``"agent_pos"``
            (..., 2), ``"image"`` (..., H, H, channels).
        actions: (..., 2) float32, target positions in pixels.

    Returns:
        The mirror images of both, of the same keys, shapes and dtypes.

    Raises:
        ValueError: If a key is unknown, or an array has another shape.
    """
    mirrored = {
        key: _MIRRORS[choose("Push-T observation to mirror", key, _MIRRORS)](value)
        for key, value in observations.items()
    }
    return mirrored, _mirror_points(actions)


def _mirror_features(features: NDArray[Any]) -> NDArray[Any]:
    _check_width("state", features, FEATURE_DIM)
    mirrored = np.empty_like(features)
    mirrored[..., :4] = _mirror_points(features[..., :4])
    mirrored[..., [4, 5]] = features[..., [5, 4]]
    mirrored[..., _CORNERS_AT] = _swap_corners(_mirror_points(features[..., _CORNERS_AT]))
    mirrored[..., _ERRORS_AT] = -_swap_corners(features[..., _ERRORS_AT])[..., _YX]
    mirrored[..., _AGENT_AT] = features[..., _AGENT_AT] * [-1, 1]
    return mirrored


def _swap_corners(points: NDArray[Any]) -> NDArray[Any]:
    """Exchange the left and the right corner of each of the four pairs."""
    return points.reshape(*points.shape[:-1], 4, 2, 2)[..., ::-1, :].reshape(points.shape)


def _mirror_corners(corners: NDArray[Any]) -> NDArray[Any]:
    _check_width("environment_state", corners, CORNER_DIM)
    return _swap_corners(_mirror_points(corners))


def _mirror_keypoints(keypoints: NDArray[Any]) -> NDArray[Any]:
    """Mirror the nine points; because they are not symmetric, their counterparts on the T are computed first."""
    _check_width("keypoint", keypoints, KEYPOINT_DIM)
    points = keypoints.reshape(*keypoints.shape[:-1], -1, 2)
    counterparts = (_COUNTERPARTS @ points).reshape(keypoints.shape)
    return _mirror_points(counterparts).astype(keypoints.dtype)


def _mirror_points(points: NDArray[Any]) -> NDArray[Any]:
    """Mirror x, y, x, y, ... along the last axis."""
    pairs = points.reshape(*points.shape[:-1], -1, 2)
    return (TABLE_SIZE - pairs[..., ::-1]).reshape(points.shape)


def _mirror_picture(picture: NDArray[Any]) -> NDArray[Any]:
    if picture.ndim < 3 or picture.shape[-3] != picture.shape[-2]:
        raise ValueError(f"A Push-T picture is (..., H, H, channels), as high as wide; got shape {picture.shape}.")
    return np.ascontiguousarray(np.swapaxes(picture[..., ::-1, ::-1, :], -3, -2))


def _mirror_agent(position: NDArray[Any]) -> NDArray[Any]:
    _check_width("agent_pos", position, 2)
    return _mirror_points(position)


def _check_width(key: str, values: NDArray[Any], width: int) -> None:
    """Refuse an array whose last axis is not ``width`` long.

    Raises:
        ValueError: If it is not; the message names the shape.
    """
    if values.ndim == 0 or values.shape[-1] != width:
        raise ValueError(f"Push-T's {key!r} to mirror is (..., {width}); got shape {values.shape}.")


def _counterparts() -> NDArray[np.float32]:
    """Find the (9, 9) weights that give each keypoint's left-right counterpart on the T as a combination of all nine.

    Any point of the plane is a combination of the nine keypoints with weights that sum to one and do not change when
    the T moves; these weights have the smallest norm.
    """
    ones = np.ones((len(_KEYPOINTS), 1))
    return (np.hstack([_KEYPOINTS * [-1, 1], ones]) @ np.linalg.pinv(np.hstack([_KEYPOINTS, ones]))).astype(np.float32)


def state_of(observations: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the state.

    Raises:
        ValueError: If there is none.
    """
    if "state" not in observations:
        listed = ", ".join(sorted(observations)) or "nothing"
        raise ValueError(f"Push-T's demonstrations need the key 'state' (T, 5) here; got {listed}.")
    return observations["state"]


def check_state(state: ArrayLike) -> NDArray[np.float64]:
    """Return states as float64.

    Raises:
        ValueError: If the last axis is not 5 long.
    """
    state = np.asarray(state, dtype=np.float64)
    if state.ndim == 0 or state.shape[-1] != 5:
        raise ValueError(f"A Push-T state is (..., 5): agent xy, block xy, block angle; got shape {state.shape}.")
    return state


def _on_table(state: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map points (N, 2) from the block's own frame to the table, (..., 2 N) as x, y, x, y, ..."""
    cosine, sine = np.cos(state[..., 4:]), np.sin(state[..., 4:])
    x = state[..., 2:3] + cosine * points[:, 0] - sine * points[:, 1]
    y = state[..., 3:4] + sine * points[:, 0] + cosine * points[:, 1]
    return np.stack([x, y], axis=-1).reshape(*state.shape[:-1], -1)


def _in_block(state: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map the agent's position into the block's own frame, (..., 2)."""
    cosine, sine = np.cos(state[..., 4]), np.sin(state[..., 4])
    x, y = np.moveaxis(state[..., :2] - state[..., 2:4], -1, 0)
    return np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=-1)


_COUNTERPARTS = _counterparts()
_TARGET_CORNERS = _on_table(np.array([0.0, 0.0, *TARGET_POSE]), _CORNERS)
# Exchanges x and y of eight points.
_YX = np.arange(16).reshape(8, 2)[:, ::-1].ravel()
_MIRRORS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "state": _mirror_features,
    "keypoint": _mirror_keypoints,
    "environment_state": _mirror_corners,
    "agent_pos": _mirror_agent,
    "image": _mirror_picture,
}
