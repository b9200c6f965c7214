"""Simulators that step many worlds in one call, as one pool of environments with plain spaces and a rule of success."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import iterate
from numpy.typing import NDArray

from envs.checked import broken_off, named, no_time_limit, reason_of, wrong_values, zeros
from envs.errors import DeviationError
from envs.gym_env import EpisodeState, SuccessRule, control_hz_of, making, parse_success, require_registered
from envs.spaces import Observation, plain_actions, plain_observations

Info = dict[str, Any]
# What `Env.step` returns: observation, reward, terminated, truncated and info.
Stepped = tuple[Observation, float, bool, bool, Info]
FINAL = "final_info"


class VectorWorlds:
    """The worlds of a `gymnasium.vector.VectorEnv`, each of which plays one episode of a given seed at a time.

    All worlds start together, and one that is over waits for the others. Of the three ways in which a vector
    environment may treat such a world (`AutoresetMode`), two start its next episode by themselves, with a seed of their
    own. Such an episode is nobody's, and what is seen of it is dropped.

    Each world returns what an environment of `envs.make` does, with ``is_success`` and ``score`` in every info; an
    observation or a reward that is not finite ends its episode, and ``info["broke_off"]`` says why.

    Attributes:
        observation_space: that of one world.
        action_space: that of one world.
        metadata: of the simulator, with its control rate.
        max_episode_steps: Control steps after which an episode is truncated.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        rule: SuccessRule,
        *,
        max_episode_steps: int | None = None,
        observation_keys: Sequence[str] | None = None,
        image_size: int | None = None,
        control_hz: float | None = None,
    ) -> None:
        """Wrap ``env``.

        Args:
            env: The simulator.
            rule: The rule of success, see `envs.gym_env.parse_success`.
            max_episode_steps: By default as the simulator's ``spec`` says.
            observation_keys: As for `envs.gym_env.make_gym`.
            image_size: As for `envs.gym_env.make_gym`.
            control_hz: As for `envs.gym_env.make_gym`.

        Raises:
            ValueError: If its spaces do not fit, or no time limit is known.
        """
        self._name = env.spec.id if env.spec else type(env.unwrapped).__name__
        limit = max_episode_steps or (env.spec.max_episode_steps if env.spec else None)
        if limit is None:
            raise no_time_limit(self._name)
        observations = plain_observations(env.single_observation_space, observation_keys, image_size)
        actions = plain_actions(env.single_action_space)
        self.env, self.num_envs, self.max_episode_steps = env, env.num_envs, limit
        self.observation_space, self.action_space = observations.space, actions.space
        self._observed, self._acted = observations.convert, actions.convert
        self._rule, self._keys = rule, set[str]()
        self._mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        rate = control_hz or control_hz_of(env.unwrapped)
        self.metadata = {**env.metadata, **({} if rate is None else {"render_fps": rate})}
        self._running = np.zeros(self.num_envs, dtype=np.bool_)
        self._steps, self._returns = 0, np.zeros(self.num_envs)

    @property
    def unwrapped(self) -> VectorEnv[Any, Any, Any]:
        """The simulator."""
        return self.env.unwrapped

    def start(self, seeds: Sequence[int]) -> list[tuple[Observation, Info]]:
        """Start an episode in each of the first worlds; further worlds stay idle.

        Args:
            seeds: One seed for each world that is used, at least one.

        Returns:
            The first observation and info of each of these worlds. If the simulator cannot start them, zeros and info
            with ``broke_off``.

        Raises:
            EnvContractError: If the simulator does not return an observation and a dict.
        """
        idle = [seeds[-1]] * (self.num_envs - len(seeds))
        each = cast(int, [*seeds, *idle])  # which the annotation of `reset` leaves out
        try:
            with contextlib.chdir("."):  # a simulator may change the current folder: relative paths are the user's
                returned: Any = self.env.reset(seed=each)
        except Exception as error:
            return [(zeros(self.observation_space), broken_off(reason_of("reset", error))) for _ in seeds]
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
            raise wrong_values(self._name, "reset", returned)
        seen, infos = returned
        self._steps, self._returns[:] = 0, 0.0
        self._running[:] = np.arange(self.num_envs) < len(seeds)
        return [self._started(world, raw, infos) for world, raw in enumerate(self._apart(seen)) if world < len(seeds)]

    def step(self, actions: Mapping[int, NDArray[np.float32]]) -> dict[int, Stepped]:
        """Advance all worlds by one control step.

        Args:
            actions: (A,) finite numbers for each world whose episode is going on.

        Returns:
            What `Env.step` returns, for each of these worlds. If the simulator cannot go on, all of their episodes are
            over, with zeros and info with ``broke_off``: which world it is of is not known.

        Raises:
            EnvContractError: If the simulator does not return five values.
            ValueError: If an action is not A finite numbers, or belongs to a world whose episode is over.
        """
        if stray := [world for world in actions if not self._running[world]]:
            raise ValueError(f"world {stray[0]} has no episode: call start()")
        nothing = np.zeros(self.action_space.shape, np.float32)
        raw = np.stack([self._acted(actions.get(world, nothing)) for world in range(self.num_envs)])
        try:
            returned: Any = self.env.step(raw)
        except Exception as error:
            return self._broken(actions, "step", error)
        if not isinstance(returned, tuple) or len(returned) != 5 or not isinstance(returned[4], dict):
            raise wrong_values(self._name, "step", returned)
        seen, rewards, terminations, truncations, infos = returned
        self._steps += 1
        stepped = {
            world: self._stepped(
                world, one, float(rewards[world]), bool(terminations[world]), bool(truncations[world]), infos
            )
            for world, one in enumerate(self._apart(seen))
            if world in actions
        }
        for world, (_, _, terminated, truncated, _) in stepped.items():
            self._running[world] = not (terminated or truncated)
        if self._mode is AutoresetMode.DISABLED and (over := np.asarray(terminations) | np.asarray(truncations)).any():
            # Such a world must not be stepped; what it does until the next start is of no account.
            try:
                self.env.reset(options={"reset_mask": over})
            except Exception as error:
                going_on = [world for world in actions if self._running[world]]
                return {**stepped, **self._broken(going_on, "reset", error)}
        return stepped

    def stop(self, world: int) -> None:
        """End a world's episode before its time: at success, for instance."""
        self._running[world] = False

    def close(self) -> None:
        """Close the simulator."""
        self.env.close()

    def _broken(self, worlds: Iterable[int], where: str, error: Exception) -> dict[int, Stepped]:
        """End the episodes of worlds because their simulator raised an error."""
        reason = reason_of(where, error)
        for world in worlds:
            self._running[world] = False
        return {world: self._over(reason) for world in worlds}

    def _over(self, reason: str) -> Stepped:
        """What the last step of an episode gives that the simulator broke off."""
        return zeros(self.observation_space), 0.0, False, True, broken_off(reason)

    def _apart(self, observations: Any) -> Iterator[Any]:
        return iterate(self.env.observation_space, observations)

    def _started(self, world: int, raw: Any, infos: Mapping[str, Any]) -> tuple[Observation, Info]:
        info = info_of(infos, world)
        try:
            observation = self._checked(raw)
        except DeviationError as error:
            return zeros(self.observation_space), {**info, **broken_off(str(error))}
        score = self._rule(EpisodeState(self._name, info, self._keys, False, False, 0.0)).score
        return observation, {**info, "is_success": False, "score": score}

    def _stepped(
        self, world: int, raw: Any, reward: float, terminated: bool, truncated: bool, infos: Mapping[str, Any]
    ) -> Stepped:
        over = terminated or truncated
        info = info_of(infos, world)
        if over and self._mode is AutoresetMode.SAME_STEP:  # the rest of `infos` is of the next episode
            info = info_of(infos.get(FINAL, {}), world)
        truncated = truncated or self._steps >= self.max_episode_steps
        self._keys.update(info)
        try:
            if not isfinite(reward):
                raise DeviationError("reward not finite")
            # In the same step, the observation is the next episode's first one; nobody acts on it.
            observation = self._observed(raw) if over else self._checked(raw)
        except DeviationError as error:
            return self._over(str(error))
        self._returns[world] += reward
        state = EpisodeState(self._name, info, self._keys, terminated, truncated, float(self._returns[world]))
        return observation, reward, terminated, truncated, {**info, **self._rule(state)._asdict()}

    def _checked(self, raw: Any) -> Observation:
        observation = self._observed(raw)
        for key, array in (observation if isinstance(observation, dict) else {None: observation}).items():
            if not np.isfinite(array).all():
                raise DeviationError(f"{named(key)} not finite")
        return observation


def info_of(infos: Mapping[str, Any], world: int) -> Info:
    """The info of one world out of those of all: `_KEY` says which worlds have a KEY, where it is there."""
    found: Info = {}
    for key, values in infos.items():
        mask = infos.get(f"_{key}")
        if key.startswith("_") or key in (FINAL, "final_obs") or (mask is not None and not mask[world]):
            continue
        if isinstance(values, dict):
            found[key] = info_of(values, world)
        else:
            found[key] = values[world] if np.ndim(values) or isinstance(values, list | tuple) else values
    return found


def make_gym_vector(
    id: str,
    *,
    worlds: int,
    kwargs: dict[str, Any] | None = None,
    observation_keys: list[str] | None = None,
    image_size: int | None = None,
    success: str = "info:is_success",
    control_hz: float | None = None,
    max_episode_steps: int | None = None,
) -> VectorWorlds:
    """Make the vector environment of a registered id: its own ``vector_entry_point``, or else copies in one process.

    Args:
        id: As for `envs.gym_env.make_gym`, like all that follow.
        worlds: Number of worlds.
        kwargs: Passed on to the environment.
        observation_keys: Keys of a Dict observation to keep.
        image_size: Height and width to which images are resized.
        success: The rule of success.
        control_hz: Control steps per second.
        max_episode_steps: Control steps after which an episode is truncated.

    Raises:
        MissingExtraError: If the id belongs to a package that is not installed.
        ValueError: If the id is not registered, a space does not fit, or the rule of success is malformed.
    """
    rule = parse_success(success)
    require_registered(id)
    limited: dict[str, Any] = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    with making(id, f" with {worlds} worlds"):
        env = gymnasium.make_vec(id, num_envs=worlds, **limited, **(kwargs or {}))
    try:
        return VectorWorlds(
            env,
            rule,
            max_episode_steps=max_episode_steps,
            observation_keys=observation_keys,
            image_size=image_size,
            control_hz=control_hz,
        )
    except ValueError as error:
        raise ValueError(f"{id}: {error}") from error
