"""The door through which all that a simulator of one world returns comes in: checked here, and nowhere behind."""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.errors import DeviationError, EnvContractError, RenderingUnavailableError, nearest
from envs.spaces import Observation, check_action

LOGGER = logging.getLogger(__name__)

# What Gymnasium asks for; a vector environment returns as many values, with those of all its worlds.
RETURNED = {
    "reset": "2 values: observation and info (a dict)",
    "step": "5 values: observation, reward, terminated, truncated and info (a dict)",
}
# The key of `info` that says why an episode broke off.
BROKE_OFF = "broke_off"


class CheckedEnv(gymnasium.Wrapper[Any, NDArray[np.float32], Any, Any]):
    """An environment whose every value has been checked; `envs.make` returns no other.

    ``reset`` and ``step`` return what Gymnasium asks for, with ``is_success`` (bool) and ``score`` (in [0, 1]) in every
    info. An episode that cannot go on (an exception, an observation that is not finite or not as declared, a reward
    that is not finite) ends there: it is truncated, and ``info["broke_off"]`` says why. The next ``reset`` starts in a
    fresh simulator. A simulator that does not speak Gymnasium's language is refused by an `EnvContractError`.
    """

    def __init__(
        self, make: Callable[[], gymnasium.Env[Any, Any]], name: str, max_episode_steps: int | None = None
    ) -> None:
        """Make the environment and check what it declares.

        Args:
            make: Makes the environment; called again after an episode that broke off.
            name: The environment's name in messages.
            max_episode_steps: Control steps after which an episode is truncated, by default the environment's own
                limit: that of its ``spec``, or its attribute ``max_episode_steps``.

        Raises:
            ValueError: If a space is not one that policies take, no time limit is known, or the environment's own one
                is shorter than the given one.
        """
        self._make, self._name = make, name
        env = self._made()
        check_plain_spaces(name, env)
        own = time_limit(env)
        limit = own if max_episode_steps is None else max_episode_steps
        if limit is None:
            raise no_time_limit(name)
        if own is not None and limit > own:
            raise ValueError(
                f"{name} ends an episode after {own} control steps, and max_episode_steps={limit} does not change that:"
                f" give {own} or fewer, or leave it out"
            )
        super().__init__(env)
        self.max_episode_steps = limit
        # Looked up once: a control step should cost as little as possible.
        self._declared = [
            (key, part.shape, part.dtype, part.dtype.kind == "f") for key, part in _leaves(env.observation_space)
        ]
        self._action_size = int(np.prod(env.action_space.shape or ()))
        self._keys: set[str] = set()  # of every info so far, while none has had is_success
        self._success_known = False
        self._last: Any = None
        self._steps = 0
        self._broken = False

    def _made(self) -> gymnasium.Env[Any, Any]:
        try:
            env = self._make()
        except (ValueError, ImportError, RenderingUnavailableError, KeyboardInterrupt):
            raise  # each has a message of its own
        except BaseException as error:
            raise ValueError(f"{self._name} cannot be made: {reason_of('__init__', error)}") from error
        return _with_protocol(env, self._name)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of this episode, or None to go on with the environment's generator.
            options: Passed on.

        Returns:
            The first observation, and info with ``is_success`` False and ``score``. If the simulator cannot start it,
            zeros and info with ``broke_off``.

        Raises:
            EnvContractError: If the simulator does not return an observation and a dict.
        """
        self._steps = 0
        try:
            with contextlib.chdir("."):  # a simulator may change the current folder: relative paths are the user's
                if self._broken:
                    self.close()
                    self.env = self._made()
                    self._broken = False
                observation, info = self.env.reset(seed=seed, **({} if options is None else {"options": options}))
            self._check(observation)
        except (EnvContractError, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._last = zeros(self.observation_space)
            return self._last, self._broke_off("reset", error)
        self._last = observation
        return observation, {**info, "is_success": False, "score": self._score(info, default=0.0)}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step.

        Args:
            action: Finite numbers (A,).

        Returns:
            Observation, reward, terminated, truncated and info. If the simulator cannot go on, the last observation,
            truncated, and info with ``broke_off``.

        Raises:
            EnvContractError: If the simulator does not return five values, or its success is none.
            ValueError: If the action is not A finite numbers.
        """
        check_action(action, self._action_size)
        if self._broken:
            raise gymnasium.error.ResetNeeded("the episode broke off: call reset() first")
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
            self._check(observation)
        except (EnvContractError, KeyboardInterrupt):
            raise
        except BaseException as error:
            return self._last, 0.0, False, True, self._broke_off("step", error)
        self._last = observation
        self._steps += 1
        truncated = truncated or self._steps >= self.max_episode_steps
        success, score = info.get("is_success"), info.get("score")
        if isinstance(success, bool) and isinstance(score, float) and 0.0 <= score <= 1.0:  # as it should be
            self._success_known = True
            return observation, float(reward), terminated, truncated, info
        is_success = self._success(info, over=terminated or truncated)
        score = self._score(info, default=float(is_success))
        return observation, float(reward), terminated, truncated, {**info, "is_success": is_success, "score": score}

    def render(self) -> NDArray[np.uint8]:
        """Draw a frame.

        Returns:
            A new array (H, W, 3) uint8; a fourth channel is dropped, a grey picture is repeated.

        Raises:
            RenderingUnavailableError: If there is no such picture; the message says why.
        """
        try:
            frame: Any = self.env.render()
        except NotImplementedError as error:
            raise RenderingUnavailableError(f"{self._name} cannot draw itself: it has no render()") from error
        except (RenderingUnavailableError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise RenderingUnavailableError(f"{self._name}: {reason_of('render', error)}") from error
        picture = np.array(frame) if isinstance(frame, np.ndarray) else None
        if picture is not None and picture.ndim == 2:
            picture = picture[:, :, None]
        if (
            picture is None
            or picture.dtype != np.uint8
            or picture.ndim != 3
            or picture.shape[2] not in (1, 3, 4)
            or min(picture.shape[:2]) < 2
        ):
            raise RenderingUnavailableError(
                f"{self._name}: render() gave {_described(frame)}; (H, W, 3) uint8 is needed"
            )
        return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else np.ascontiguousarray(picture[:, :, :3])

    def close(self) -> None:
        """Close the simulator; one that fails at that is only a warning."""
        try:
            self.env.close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            warnings.warn(f"{self._name}: close() failed ({reason_of('close', error)})", stacklevel=2)

    def _check(self, observation: Any) -> None:
        """Raise ValueError if an observation is not what the space declares, or not finite."""
        for key, shape, dtype, can_be_infinite in self._declared:
            value = observation if key is None else observation.get(key)
            fits = isinstance(value, np.ndarray) and value.shape == shape
            if fits and value.dtype is dtype and value.ndim == 1 and isfinite(value.dot(value)):
                continue  # the common case, in the fewest operations
            if not fits or not np.can_cast(value.dtype, dtype, "same_kind"):
                declared = f"{dtype} of shape {shape}"
                raise DeviationError(f"{named(key)} is {_described(value)}, but it is declared as {declared}")
            if can_be_infinite and not np.isfinite(value).all():
                raise DeviationError(f"{named(key)} not finite")

    def _success(self, info: dict[str, Any], over: bool) -> bool:
        self._keys.update(info)
        if "is_success" in info:
            self._success_known = True
            return as_bool(self._name, "info['is_success']", info["is_success"])
        if over and not self._success_known:
            raise missing_success(
                self._name, ("is_success",), self._keys, "The environment's step() must put it into info."
            )
        return False

    def _score(self, info: dict[str, Any], default: float) -> float:
        score = info.get("score", default)
        try:
            value = as_number(score)
        except ValueError:
            value = np.nan
        if not 0.0 <= value <= 1.0:
            raise EnvContractError(f"{self._name}: info['score'] must be a number in [0, 1]; got {_shown(score)}")
        return value

    def _broke_off(self, where: str, error: BaseException) -> dict[str, Any]:
        LOGGER.debug("%s: an episode broke off", self._name, exc_info=error)
        self._broken = True
        return broken_off(reason_of(where, error))


class _Protocol(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The innermost wrapper: refuses what Gymnasium's own wrappers would stumble over."""

    def __init__(self, env: gymnasium.Env[Any, Any], name: str) -> None:
        super().__init__(env)
        self._name = name

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        try:
            # An environment need not take options unless somebody gives it some.
            returned: Any = self.env.reset(seed=seed, **({} if options is None else {"options": options}))
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise EnvContractError(
                f"{self._name}: reset() cannot be called with seed= ({error}); Gymnasium (0.26 and later) asks for"
                " reset(self, *, seed=None, options=None)"
            ) from error
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
            raise wrong_values(self._name, "reset", returned)
        return returned

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        returned: Any = self.env.step(action)
        if not isinstance(returned, tuple) or len(returned) != 5 or not isinstance(returned[4], dict):
            raise wrong_values(self._name, "step", returned)
        observation, reward, terminated, truncated, info = returned
        plain = isinstance(reward, float) and isinstance(terminated, bool) and isinstance(truncated, bool)
        if plain and isfinite(reward):
            return returned
        reward, terminated, truncated = self._converted(reward, terminated, truncated)
        if not isfinite(reward):
            raise DeviationError("reward not finite")
        return observation, reward, terminated, truncated, info

    def _converted(self, reward: Any, terminated: Any, truncated: Any) -> tuple[float, bool, bool]:
        try:
            number = as_number(reward)
        except ValueError as error:
            raise EnvContractError(f"{self._name}: the reward must be one number; got {_shown(reward)}") from error
        return number, as_bool(self._name, "terminated", terminated), as_bool(self._name, "truncated", truncated)


def wrong_values(name: str, method: str, returned: Any) -> EnvContractError:
    """Return the error for a method that does not return what Gymnasium asks for.

    Args:
        name: The environment's name in messages.
        method: ``reset`` or ``step``.
        returned: What it returned.
    """
    return EnvContractError(
        f"{name}: {method}() returned {_described(returned)}; Gymnasium (0.26 and later) asks for {RETURNED[method]}"
    )


def as_number(value: Any) -> float:
    """Return a number, or the one element of an array.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, float | int):
        return float(value)
    try:
        array = np.asarray(value)
        if np.ma.is_masked(value):
            raise ValueError("masked")
    except Exception as error:  # whatever an object does when it is asked for its numbers
        raise ValueError(f"one number is needed; got {_shown(value)}") from error
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise ValueError(f"one number is needed; got {_shown(value)}")
    return float(array.item())


def as_bool(name: str, what: str, value: Any) -> bool:
    """Return a truth value that is plainly one: a bool, 0 or 1 of any numeric type, or one element holding one.

    Args:
        name: The environment's name in messages.
        what: What the value is.
        value: The value.

    Raises:
        EnvContractError: If it is anything else, such as NaN or a text.
    """
    if isinstance(value, bool):
        return value
    try:
        number = as_number(value)
    except ValueError:
        number = np.nan
    if number not in (0.0, 1.0):
        raise EnvContractError(
            f"{name}: {what} must be a bool, 0 or 1, or one element holding one; got {_shown(value)}"
        )
    return bool(number)


def missing_success(name: str, wanted: Iterable[str], keys: Iterable[str], remedy: str) -> EnvContractError:
    """Return the error for a key of success that an episode never had in its infos.

    Args:
        name: The environment's name in messages.
        wanted: The key, or the keys one of which should have been there.
        keys: The keys that were there.
        remedy: What to do.
    """
    wanted, keys = list(wanted), sorted(map(str, keys))
    there = f"it has {', '.join(keys)}.{nearest(wanted[0], keys)}" if keys else "it is empty."
    return EnvContractError(
        f"{name}: {' or '.join(map(repr, wanted))} was in no info of a whole episode; {there} {remedy}"
    )


def check_plain_spaces(name: str, env: gymnasium.Env[Any, Any]) -> None:
    """Refuse spaces that policies do not take.

    Raises:
        ValueError: If the observation is neither a Box nor a Dict of Boxes, or the action is not a flat Box.
    """
    space = env.observation_space
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else (space,)
    if not all(isinstance(part, spaces.Box) for part in parts):
        raise ValueError(
            f"{name}: a policy observes a Box or a Dict of Boxes; got {space}. gymnasium.wrappers.FlattenObservation"
            " makes one Box of it; env=gym converts Tuples and discrete spaces itself"
        )
    if not isinstance(env.action_space, spaces.Box) or len(env.action_space.shape) != 1:
        raise ValueError(f"{name}: a policy acts by a Box of shape (A,); got {env.action_space}")


def no_time_limit(name: str) -> ValueError:
    """Return the error for an environment that does not say when an episode is over."""
    return ValueError(
        f"{name} has no time limit, so that an episode may never end:"
        " add env.max_episode_steps=N, the control steps after which an episode is over"
    )


def time_limit(env: gymnasium.Env[Any, Any]) -> int | None:
    """Return the control steps after which an environment truncates an episode, or None if it does not say."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return env.spec.max_episode_steps
    for name in ("max_episode_steps", "_max_episode_steps"):  # of a family, and of Gymnasium's TimeLimit
        if env.has_wrapper_attr(name) and isinstance(limit := env.get_wrapper_attr(name), int):
            return limit
    return None


def _with_protocol(env: gymnasium.Env[Any, Any], name: str) -> gymnasium.Env[Any, Any]:
    """Put the innermost wrapper around the simulator itself, inside the wrappers that it came with."""
    if not isinstance(env, gymnasium.Wrapper):
        return _Protocol(env, name)
    inner = env
    while isinstance(inner.env, gymnasium.Wrapper):
        inner = inner.env
    inner.env = _Protocol(inner.env, name)
    return env


def _leaves(space: gymnasium.Space[Any]) -> list[tuple[str | None, spaces.Box]]:
    parts = space.spaces.items() if isinstance(space, spaces.Dict) else [(None, space)]
    return [(key, part) for key, part in parts if isinstance(part, spaces.Box)]


def zeros(space: gymnasium.Space[Any]) -> Any:
    """Return an observation of zeros, for an episode that could not start."""
    arrays = {key: np.zeros(part.shape, part.dtype) for key, part in _leaves(space)}
    return arrays if isinstance(space, spaces.Dict) else arrays[None]


def named(key: str | None) -> str:
    """Name an observation in a message by its key; None for the only one."""
    return "observation" if key is None else f"observation {key!r}"


def _described(value: Any) -> str:
    """Write what a simulator returned in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, tuple):
        return f"{len(value)} values ({', '.join(type(part).__name__ for part in value)})"
    return "None" if value is None else f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    """Write a value as Python does, in 80 letters at most."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a class of the simulator's own
        text = f"a {type(value).__name__}"
    return _short(text, 80)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def broken_off(reason: str) -> dict[str, Any]:
    """The info of an episode that the simulator broke off."""
    return {"is_success": False, "score": 0.0, BROKE_OFF: reason}


def reason_of(where: str, error: BaseException) -> str:
    """Say in one line why an episode broke off, with the simulator's own line where there is one."""
    if isinstance(error, DeviationError):
        return str(error)
    frame = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename != __file__), None)
    place = "" if frame is None else f" ({Path(frame.filename).name}, line {frame.lineno})"
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) in {where}(){place}"
    try:
        text = " ".join(str(error).split())
    except Exception:  # a class of the simulator's own
        text = ""
    return f"{type(error).__name__} in {where}(){': ' if text else ''}{_short(text, 200)}{place}"
