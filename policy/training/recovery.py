"""How much of an error in where the robot is a policy corrects in a chunk, and whether it follows its own speed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from policy.common.observations import Observations, is_image
from policy.common.seeding import derive_generator
from policy.data.corrections import Corrections, find_corrections
from policy.data.demonstrations import Demonstrations
from policy.data.holding import NOTHING
from policy.data.relations import thinned
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, compile_sampler
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy, observed
from policy.statistics.fit import CORRECTED, conclude
from policy.training.corrective_noise import CorrectiveNoise
from policy.training.settings import TrainSettings

# Episodes and windows that are looked at, and the error: a share of what a number usually moves within a chunk.
EPISODES, WINDOWS, ERROR = 200, 96, 0.5
# A policy that corrects less of an error than this within a chunk hardly corrects it at all. Measured on one task only:
# with 3 % of the wrist's error corrected, 1 of 24 episodes succeeded, with 25 % or more, 71 of 96.
HARDLY = 0.2
# A window in which the robot moves: at least this share of what it usually moves within a chunk. It stalls if, seen at
# half of its speed, it goes less than half as far there. Measured on one task: a policy that stalls in 21 % of the
# windows turned back on its way in each of three failed episodes that were traced; with 1 %, those traced went on.
MOVES, STALLS = 0.3, 0.1
# With fewer windows in which it moves, this is not told.
FEW = 10
# The name of the share that stalls, in a run's history.
STALLED = "train/stalls"
# With this success or more in the last rollout while training, the task needs no more precision than the policy has.
SOLVED = 0.9
# Settings of a training that make a policy correct more; the first one blurs the robot's speed, too.
NOISE, WEIGHTS = {"corrective_noise": 0.3}, {"action_weights": "spread"}
# With these, and where it is not over-fitted, a policy may correct more after so many times the steps. Measured on one
# task, for 24,000 in place of 12,000: 20 to 22 % of the wrist's error in place of 12 to 15 %, and 79 % success in place
# of 52 %. More steps than these were not measured, and are not advised.
LONGER, LONGEST = 2, 24_000


class Recovery(NamedTuple):
    """What becomes of an error of one number.

    Attributes:
        number: the number that follows an action, such as `state[5]`.
        corrected: the share that the actions of a chunk correct: 1 all of it, 0 nothing.
    """

    number: str
    corrected: float


class Recoveries(NamedTuple):
    """What a policy makes of an observation that is not quite a demonstrated one.

    Attributes:
        numbers: one for each number that follows an action; none if nothing could be measured.
        stalls: share of the windows with a moving robot in which it would go less than half as far if it were seen at
            half of its speed; None where its speed is not observed, or two observations tell it.
    """

    numbers: Sequence[Recovery] = ()
    stalls: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the shares as entries of a run's history: `recovery/state[5]`, say, and `train/stalls`."""
        corrected = {f"{CORRECTED}{name}": share for name, share in self.numbers}
        return corrected if self.stalls is None else {**corrected, STALLED: self.stalls}


class RecoveryMeter:
    """Moves or slows the robot in windows of training episodes, and sees what policies make of it.

    The windows and the noise are the same in every call.

    Args:
        config: of the policies.
        training: windows of the training episodes, of which up to 200 are looked at.
        sampler: settings of the sampler.
    """

    def __init__(self, config: PolicyConfig, training: Windows, sampler: Sampler) -> None:
        self._config, self._training, self._sampler = config, training, sampler

    @cached_property
    def _found(self) -> tuple[Windows, Corrections] | None:
        """What is looked at; found with the first measurement, before which a trial of `recipe=auto` may end."""
        return looked_at(self._config, self._training)

    def measure(self, policy: DiffusionPolicy) -> Recoveries:
        """Measure a policy.

        Returns:
            Nothing where no action is a displacement, where pictures would show where the robot was, or where something
            else always moves.
        """
        return recoveries(policy, *self._found, self._sampler) if self._found else Recoveries()

    def metrics(self, policy: DiffusionPolicy) -> dict[str, float]:
        """Measure a policy, and return what it corrects as entries of a run's history."""
        return self.measure(policy).metrics()


def looked_at(config: PolicyConfig, training: Windows) -> tuple[Windows, Corrections] | None:
    """Windows of some training episodes and what follows an action there; None if nothing does, or pictures show it."""
    keys = list(config.observation_shapes)
    if (
        any(map(is_image, config.observation_shapes.values()))
        or training.demonstrations.actions.shape[1] != config.action_dim
    ):
        return None
    some = some_episodes(training, keys)
    everything = np.arange(some.num_episodes)
    try:
        corrections = find_corrections(some, everything, keys, config.action_horizon)
    except ValueError:  # no number follows an action
        return None
    windows = Windows(
        some,
        everything,
        obs_horizon=config.obs_horizon,
        action_horizon=config.action_horizon,
        past_actions=config.past_actions,
    )
    return windows, corrections


def some_episodes(training: Windows, keys: Sequence[str]) -> Demonstrations:
    """Copy up to 200 training episodes, spread over all of them, with the observations of these keys."""
    data, episodes = training.demonstrations, thinned(training.episodes, EPISODES)
    spans = [slice(data.episode_starts[episode], data.episode_ends[episode]) for episode in episodes]
    return Demonstrations(
        observations={key: np.concatenate([data.observations[key][span] for span in spans]) for key in keys},
        actions=np.concatenate([data.actions[span] for span in spans]),
        episode_ends=np.cumsum([span.stop - span.start for span in spans]),
    )


def recoveries(policy: DiffusionPolicy, windows: Windows, corrections: Corrections, sampler: Sampler) -> Recoveries:
    """Move each number that follows the action to both sides, or slow all, and denoise the same noise.

    What the chunks of both sides differ by, times what an action moves, is the correction.

    Args:
        policy: the policy.
        windows: windows of the demonstrations that `corrections` was found in.
        corrections: what follows the policy's actions, and what moves along.
        sampler: settings of the sampler.

    Returns:
        Nothing if there is no window in which nothing moves but the robot and what it holds.
    """
    marked = windows.marking(held=corrections.held)
    movable = np.flatnonzero(corrections.held >= NOTHING)  # each transition is the newest of one window
    if not len(movable):
        return Recoveries()
    batch = marked.gather(thinned(movable, WINDOWS))
    mover = CorrectiveNoise(corrections, 1.0, policy.config.past_actions)
    program = compile_sampler(policy, sampler, backend=PLAIN_BACKEND)
    gains = torch.tensor([one.gain for one in corrections.followed])

    def moves(seen: Observations) -> torch.Tensor:
        """How far chunks move the followed numbers (N, F)."""
        shown = observed(policy.config, {**batch["observations"], **seen})
        actions = program.sample_actions(shown, generator=derive_generator(0)).cpu()
        return gains * actions[..., [one.action for one in corrections.followed]].sum(dim=1)

    def moved(offsets: torch.Tensor) -> torch.Tensor:
        return moves(mover.displaced(batch["observations"], offsets, batch["held"]))

    found = []
    for place, followed in enumerate(corrections.followed):
        offsets = torch.zeros(len(batch["held"]), len(corrections.followed))
        offsets[:, place] = ERROR * followed.reach
        apart = (moved(offsets) - moved(-offsets))[:, place].mean()
        found.append(Recovery(corrections.names[followed.number], float(-apart / (2 * ERROR * followed.reach))))
    if policy.config.obs_horizon > 1 or not any(one.velocity for one in corrections.blurred):
        return Recoveries(found)  # two observations show the speed, too
    usual, slow = (moves(mover.slowed(batch["observations"], share)) / mover.reach for share in (1.0, 0.5))
    moving = usual.square().mean(dim=1).sqrt() > MOVES
    usual, slow = usual[moving], slow[moving]
    stalls = (usual * slow).sum(dim=1) < 0.5 * usual.square().sum(dim=1)
    return Recoveries(found, float(stalls.float().mean()) if len(stalls) >= FEW else None)


def recoveries_in(history: Sequence[Mapping[str, float]]) -> Recoveries:
    """The newest recoveries in a run's history; nothing if there are none.

    >>> history = [{"step": 1000, "recovery/state[5]": 0.1}, {"step": 2000, "recovery/state[5]": 0.3}, {"step": 2020}]
    >>> recoveries_in(history)
    Recoveries(numbers=[Recovery(number='state[5]', corrected=0.3)], stalls=None)
    """
    for entry in reversed(history):
        if numbers := [
            Recovery(name.removeprefix(CORRECTED), share)
            for name, share in entry.items()
            if name.startswith(CORRECTED) and math.isfinite(share)
        ]:
            return Recoveries(numbers, entry.get(STALLED))
    return Recoveries()


def describe_recoveries(
    training: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    privileged: Collection[str] = (),
    *,
    weights_differ: bool = True,
) -> str:
    """Say what a chunk corrects and whether it follows its own speed, and what to do about it.

    Args:
        training: settings of the training, of which those that it has already are not advised.
        history: log entries of the training, the newest recoveries among them; nothing is advised where its last
            rollout solved nearly every episode, and a longer training only where they say that it is neither
            over-fitted nor under-trained.
        privileged: keys of the policy's privileged observations, which corrective noise may not be beside.
        weights_differ: whether `train.action_weights=spread` would change a weight, see `spread_matters`.

    Returns:
        The sentence; empty where nothing was measured.
    """
    found = recoveries_in(history)
    if not found.numbers:
        return ""
    shares = ", ".join(f"{one.number} {round(100 * one.corrected)}%" for one in found.numbers)
    told = [f"of an error in where the robot is, one chunk corrects {shares}"]
    success = [entry["rollout/success_rate"] for entry in history if "rollout/success_rate" in entry]
    if success and success[-1] >= SOLVED:
        return told[0]
    hardly = [one.number for one in found.numbers if one.corrected < HARDLY]
    stalls = found.stalls or 0.0
    if hardly:
        told.append(f"it hardly corrects {', '.join(hardly)}")
    if stalls >= STALLS:
        told.append(
            f"in {round(100 * stalls)}% of the windows in which it moves, seen at half of its speed, the robot would go"
            " less than half as far: where it is slowed down, it may stop or turn back"
        )
    noise = NOISE if not privileged and (hardly or stalls >= STALLS) else {}
    wanted = {**noise, **(WEIGHTS if hardly and weights_differ else {})}
    usual = {name: getattr(TrainSettings, name) for name in wanted}
    advised = [f"train.{name}={value}" for name, value in wanted.items() if {**usual, **training}[name] == usual[name]]
    if hardly and not advised and stalls < STALLS and _longer_may_help(training, history):
        told.append(f"a new training with train.steps={LONGER * training['steps']} may correct more")
    return "; ".join(told) + (f": train with {' '.join(advised)}" if advised else "")


def _longer_may_help(training: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> bool:
    """Whether a complete training from demonstrations alone, with all the noise, was neither over- nor under-fitted."""
    steps, fit = training.get("steps"), conclude(history)
    if not isinstance(steps, int) or not 0 < LONGER * steps <= LONGEST:
        return False
    if training.get("rectify_steps") or fit is None:
        return False
    noisy = training.get("corrective_noise", 0.0) >= NOISE["corrective_noise"]
    return noisy and history[-1]["step"] >= steps and fit.kind == "limited"
