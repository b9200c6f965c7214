"""Any registered Gymnasium environment with continuous actions, with plain spaces and a rule of success."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.wrappers import TransformAction, TransformObservation
from numpy.typing import NDArray

from envs.checked import as_bool, missing_success
from envs.errors import EnvContractError, import_extra, nearest
from envs.rendering import rendering_errors, require_rgb_array
from envs.spaces import Observation, plain_actions, plain_observations


class Package(NamedTuple):
    """A package that registers its ids when it is imported."""

    module: str
    title: str
    extra: str
    ids: str  # regular expression that the beginnings of its ids match


PACKAGES = (
    Package(
        "gymnasium_robotics",
        "gymnasium-robotics",
        "robotics",
        r"(Fetch|HandReach|HandManipulate|AntMaze_|PointMaze_|AdroitHand|FrankaKitchen)",
    ),
    Package("gym_pusht", "Push-T (gym-pusht)", "pusht", r"gym_pusht/"),
    Package("metaworld", "Meta-World", "metaworld", r"Meta-World/"),
)


class Outcome(NamedTuple):
    """Success and score of an episode after a control step."""

    is_success: bool
    score: float


class EpisodeState(NamedTuple):
    """The facts about an episode after a control step, from which success is judged."""

    name: str  # of the environment, for messages
    info: dict[str, Any]
    keys: AbstractSet[str]  # of every info so far, those of earlier episodes too
    terminated: bool
    truncated: bool
    total: float  # sum of rewards so far


SuccessRule = Callable[[EpisodeState], Outcome]


class GymEnv(gymnasium.Wrapper[Any, NDArray[np.float32], Any, Any]):
    """A Gymnasium environment with plain spaces (`envs.spaces`), and ``is_success`` and ``score`` in every info.

    Its resets are as reproducible as the wrapped environment's own ``reset(seed=...)``.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        rule: SuccessRule,
        *,
        observation_keys: Sequence[str] | None = None,
        image_size: int | None = None,
        control_hz: float | None = None,
    ) -> None:
        """Wrap ``env``.

        Args:
            env: The simulator.
            rule: The rule of success, see `parse_success`.
            observation_keys: Keys of a Dict observation to keep, by default all.
            image_size: Height and width to which images are resized; by default they keep their size.
            control_hz: Control steps per second, by default the rate that ``env`` states.

        Raises:
            ValueError: If its spaces do not fit.
        """
        observations = plain_observations(env.observation_space, observation_keys, image_size)
        actions = plain_actions(env.action_space)
        observed = TransformObservation(env, observations.convert, observations.space)
        super().__init__(TransformAction[Any, Any, Any](observed, actions.convert, actions.space))
        self._rule = rule
        self._name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self._return = 0.0
        self._keys: set[str] = set()
        rate = control_hz or control_hz_of(env.unwrapped)
        self.metadata = {**env.metadata, **({} if rate is None else {"render_fps": rate})}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of this episode, or None to go on with the environment's generator.
            options: Passed on.

        Returns:
            The first observation, and info with ``is_success`` False and the current ``score``.

        Raises:
            ValueError: If the observation does not have the shape that the simulator declares.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        self._return = 0.0
        score = self._rule(EpisodeState(self._name, info, self._keys, False, False, 0.0)).score
        return observation, {**info, "is_success": False, "score": score}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step.

        Args:
            action: Finite numbers (A,). They are clipped to the simulator's bounds and converted to its own shape and
                dtype.

        Returns:
            Observation, reward, terminated, truncated and info.

        Raises:
            ValueError: If the action is not A finite numbers, or the observation does not have the declared shape.
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        self._keys.update(info)
        outcome = self._rule(EpisodeState(self._name, info, self._keys, terminated, truncated, self._return))
        return observation, float(reward), terminated, truncated, {**info, **outcome._asdict()}

    def render(self) -> Any:
        """Draw a frame, (H, W, 3) uint8.

        Raises:
            RenderingUnavailableError: If this machine cannot render, or ``render_mode`` is None.
        """
        require_rgb_array(self.env.render_mode)
        with rendering_errors():
            return self.env.render()


def make_gym(
    id: str,
    *,
    render_mode: str | None = None,
    kwargs: dict[str, Any] | None = None,
    observation_keys: list[str] | None = None,
    image_size: int | None = None,
    success: str = "info:is_success",
    control_hz: float | None = None,
    max_episode_steps: int | None = None,
) -> GymEnv:
    """Make any registered environment with a Box action.

    Args:
        id: Registered id. ``"module:Id"`` imports the module first; the ids of gymnasium-robotics, gym-pusht and
            Meta-World need no module.
        render_mode: ``None`` or ``"rgb_array"``.
        kwargs: Passed on to the environment.
        observation_keys: Keys of a Dict observation to keep, by default all; see `envs.spaces.plain_observations`.
        image_size: Height and width to which images are resized, as ``dataset.image_size`` resizes those of
            demonstrations; by default they keep their size.
        success: The rule of success, see `parse_success`.
        control_hz: Control steps per second; by default the simulator's ``control_hz``, ``control_freq`` or 1 / ``dt``,
            or else ``metadata["render_fps"]``. It is the speed of videos, and is compared with the demonstrations'.
        max_episode_steps: Control steps after which an episode is truncated, by default as the id is registered.

    Raises:
        MissingExtraError: If the id belongs to one of these packages and the package is not installed.
        ValueError: If the id is not registered, a space does not fit, or the rule of success is malformed.
    """
    rule = parse_success(success)
    require_registered(id)
    with making(id):
        # Some environments cannot draw and do not take the argument.
        drawing: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
        env: gymnasium.Env[Any, Any] = gymnasium.make(
            id, max_episode_steps=max_episode_steps, disable_env_checker=True, **drawing, **(kwargs or {})
        )
    try:
        return GymEnv(env, rule, observation_keys=observation_keys, image_size=image_size, control_hz=control_hz)
    except ValueError as error:
        raise ValueError(f"{id}: {error}") from error


@contextmanager
def making(id: str, amount: str = "") -> Iterator[None]:
    """Turn Gymnasium's errors in making an environment into sentences.

    Args:
        id: The registered id.
        amount: How many of them are made, for the message, such as " with 8 worlds".

    Raises:
        ValueError: If it cannot be made, because it does not take the user's arguments, for instance.
    """
    try:
        yield
    except (TypeError, gymnasium.error.Error) as error:  # Gymnasium's own words name the arguments
        raise ValueError(f"{id} cannot be made{amount}: {error}") from error


def parse_success(text: str) -> SuccessRule:
    """Turn a description of success into a rule.

    Args:
        text: ``"info:KEY"`` (success is ``info[KEY]``; ``info:is_success`` also accepts the key ``success``),
            ``"termination"`` (reaching a terminal state is success) or ``"return>=NUMBER"`` (the sum of rewards
            at the end of the episode decides).

    Returns:
        The rule. Its score is the return so far / NUMBER, clipped to [0, 1], for a positive NUMBER, and
        0 or 1 otherwise.

    Raises:
        ValueError: If the text is none of these.
    """
    if text == "termination":
        return lambda state: Outcome(state.terminated, float(state.terminated))
    if match := re.fullmatch(r"info:(\w+)", text):
        keys = ("is_success", "success") if match[1] == "is_success" else (match[1],)
        return lambda state: _outcome_from_info(state, keys)
    if match := re.fullmatch(r"return>=(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text):
        threshold = float(match[1])
        return lambda state: _outcome_from_return(state, threshold)
    raise ValueError(
        f"success={text!r} is not understood; allowed: 'info:KEY', 'termination' or 'return>=NUMBER', without spaces."
    )


def _outcome_from_info(state: EpisodeState, keys: tuple[str, ...]) -> Outcome:
    found = {key: as_bool(state.name, f"info[{key!r}]", state.info[key]) for key in keys if key in state.info}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key}={value}" for key, value in found.items())
        raise EnvContractError(f"{state.name}: info has {said}: choose one, with env.success=info:KEY")
    if (state.terminated or state.truncated) and not state.keys & set(keys):
        raise missing_success(
            state.name,
            keys,
            state.keys,
            "env.success=info:KEY chooses a key, env.success=termination or 'env.success=\"return>=NUMBER\"' need none",
        )
    is_success = any(found.values())
    return Outcome(is_success, float(is_success))


def _outcome_from_return(state: EpisodeState, threshold: float) -> Outcome:
    # Success is judged at the end only: a return can fall again, and one that must stay above -200 starts at 0.
    is_success = (state.terminated or state.truncated) and state.total >= threshold
    score = min(max(state.total / threshold, 0.0), 1.0) if threshold > 0 else float(is_success)
    return Outcome(is_success, score)


def require_registered(id: str) -> None:
    """Look an id up, after importing the module that registers it: the one in the id, or the package known for it.

    Args:
        id: As for `make_gym`.

    Raises:
        MissingExtraError: If a known package is needed and not installed.
        ValueError: If the module or the id does not exist.
    """
    module, _, name = id.rpartition(":")
    if not module and name in gymnasium.registry:
        return
    package = next((p for p in PACKAGES if p.module == module or (not module and re.match(p.ids, name))), None)
    if package is not None:
        import_extra(package.module, title=package.title, extra=package.extra)
    elif module:
        try:
            importlib.import_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may do anything, sys.exit too
            reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            meant = f" Write it without '.py': {module[:-3]}:{name}." if re.fullmatch(r"\w+\.py", module) else ""
            raise ValueError(f"The module of {id!r} cannot be imported: {reason}.{meant}") from error
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise ValueError(
            f"{name!r} is not a registered Gymnasium id.{nearest(name, gymnasium.registry)} "
            "Ids of other packages are written 'module:Id'."
        ) from error


def control_hz_of(simulator: Any) -> float | None:
    """Return the control rate by a simulator's attributes; None if only its metadata, or nothing, states one.

    A ``dt`` comes last: beside a rate, as in gym-pusht, it is the time step of the physics.
    """
    for name in ("control_hz", "control_freq", "dt"):
        value = getattr(simulator, name, None)
        if isinstance(value, int | float | np.floating) and value > 0:
            return 1.0 / float(value) if name == "dt" else float(value)
    return None
