"""The recipes that `recipe=auto` tries, and what of them is left beside the settings that a user keeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policy.common.registry import Registry, check_spec
from policy.data.relations import Relations
from policy.model.config import PolicySettings
from policy.model.denoisers import DENOISERS
from policy.model.encoders import ENCODERS
from policy.training.preparation import check_settings
from policy.training.recovery import NOISE, WEIGHTS
from policy.training.settings import TrainSettings

# The command line or preset as it is. It is tried first, and wins where recipes are equally good.
AS_GIVEN = "as_given"
_RELATIONS: dict[str, Any] = {"obs_horizon": 1, "find_differences": True}
# For few demonstrations, which a large network learns by heart.
_SMALL: dict[str, Any] = {
    "denoiser.hidden_size": 64,
    "denoiser.dropout": 0.1,
    "encoder.hidden_size": 128,
    "encoder.dropout": 0.1,
}
_NOISE_AND_WEIGHTS: dict[str, Any] = {f"train.{name}": value for name, value in {**NOISE, **WEIGHTS}.items()}
_CORRECTIVE: dict[str, Any] = {
    **_RELATIONS,
    "denoiser.dropout": 0.1,
    "encoder.dropout": 0.1,
    **_NOISE_AND_WEIGHTS,
}
# Each recipe: settings, as on the command line, that replace those of the command line or the preset. Where
# the budget is too small for all, those that are as fast as others are left out from the end.
CANDIDATES: dict[str, dict[str, Any]] = {
    AS_GIVEN: {},
    "few_demonstrations": {**_RELATIONS, **_SMALL, **_NOISE_AND_WEIGHTS},
    "relations": _RELATIONS,
    "dropout": {"denoiser.dropout": 0.1},
    "corrective": _CORRECTIVE,
    "regularised": {"denoiser.dropout": 0.3, "encoder.noise": 0.02, "train.weight_decay": 0.1},
    "estimate": {**_CORRECTIVE, "sigma_data": 0.5},
    "narrow": {"denoiser.hidden_size": 128, "denoiser.num_layers": 3, "encoder.noise": 0.02},
    "longer_history": {"obs_horizon": 4, "denoiser.dropout": 0.3, "encoder.noise": 0.02},
    "unet": {"denoiser": "unet", "encoder.noise": 0.02},
    "transformer": {"denoiser": "transformer", "denoiser.dropout": 0.1, "encoder.noise": 0.02},
}
# This setting stands for the relations that are found in the demonstrations.
FIND_DIFFERENCES = "find_differences"
# This one needs actions that are displacements.
CORRECTIVE_NOISE = "train.corrective_noise"
# With this one the network does not see the noise.
SIGMA_DATA = "sigma_data"
# The parts of a policy whose settings depend on which one is chosen.
PARTS: dict[str, Registry[Any]] = {"encoder": ENCODERS, "denoiser": DENOISERS}

Policy = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that is tried.

    Attributes:
        name: its name.
        changes: what of its settings is in force.
        policy: all settings of the policy, see `PolicySettings`.
        train: all settings of the training.
    """

    name: str
    changes: Mapping[str, Any]
    policy: Policy
    train: TrainSettings


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What the demonstrations allow a recipe to do.

    Attributes:
        relations: the settings of the policy that `find_differences=true` stands for; empty if none are found.
        corrections: whether corrective noise is possible, see `find_corrections`.
    """

    relations: Policy
    corrections: bool


def candidates_for(
    names: Sequence[str], keep: Sequence[str], policy: Policy, train: TrainSettings, allowed: Allowed
) -> tuple[list[Candidate], dict[str, str]]:
    """Apply recipes to the user's settings.

    A setting that the user keeps, or that the chosen part does not have, is left out of a recipe, and so is one that
    the demonstrations do not allow.

    Args:
        names: names of recipes; none for all.
        keep: names of settings that stay as they are; a part's name stands for all of its settings.
        policy: the user's settings of the policy.
        train: the user's settings of the training.
        allowed: what the demonstrations allow.

    Returns:
        The recipes that differ from each other, and why each other one is not tried, by name.
    """
    found: list[Candidate] = []
    fallen: dict[str, str] = {}
    for name in names or CANDIDATES:
        keeping = {setting: _keeping(setting, keep) for setting in CANDIDATES[name]}
        changes = {setting: value for setting, value in CANDIDATES[name].items() if not keeping[setting]}
        changes = {
            setting: changes[setting] for setting in changes if _exists(setting, changes, policy, train, allowed)
        }
        settings = {setting: value for setting, value in changes.items() if setting != FIND_DIFFERENCES}
        settings |= allowed.relations if FIND_DIFFERENCES in changes else {}
        candidate = Candidate(
            name=name, changes=changes, policy=_policy_with(settings, policy), train=_train_with(settings, train)
        )
        same = next((f for f in found if (f.policy, f.train) == (candidate.policy, candidate.train)), None)
        if same is None:
            found.append(candidate)
        else:
            kept = dict.fromkeys(itertools.chain(*keeping.values()))
            reason = f"you keep {', '.join(kept)}, so that it is" if kept else "with your settings it is"
            fallen[name] = f"{reason} the same as {same.name}"
    return found, fallen


def _keeping(setting: str, keep: Sequence[str]) -> list[str]:
    """Names of kept settings because of which a recipe leaves this one as it is.

    They are its own, that of its part, or those of the part that it chooses; for `find_differences`, any list of
    relations: an empty one, too, says what the policy observes.
    """
    relations = Relations._fields if setting == FIND_DIFFERENCES else ()
    return [
        name
        for name in keep
        if f"{setting}.".startswith(f"{name}.") or name.startswith(f"{setting}.") or name in relations
    ]


def _exists(setting: str, changes: Mapping[str, Any], policy: Policy, train: TrainSettings, allowed: Allowed) -> bool:
    """Whether what is chosen, or the part that the recipe chooses, has this setting, and the data what it looks for."""
    if setting == FIND_DIFFERENCES:
        return bool(allowed.relations)
    if setting == CORRECTIVE_NOISE:
        return allowed.corrections
    if setting == SIGMA_DATA:
        return _may_hide_the_noise({**policy, setting: changes[setting]}, train)
    part, _, name = setting.partition(".")
    if part not in PARTS or not name:
        return True
    try:
        check_spec(PARTS[part], {"name": changes.get(part, _part(part, policy)["name"]), name: changes[setting]})
    except ValueError:
        return False
    return True


def _may_hide_the_noise(policy: Policy, train: TrainSettings) -> bool:
    """Whether a policy can be trained with `sigma_data`."""
    try:
        check_settings(PolicySettings(**policy), train)
    except ValueError:
        return False
    return True


def _part(part: str, policy: Policy) -> dict[str, Any]:
    return dict(policy.get(part, getattr(PolicySettings(), part)))


def _policy_with(changes: Mapping[str, Any], policy: Policy) -> Policy:
    """The settings of the policy with a recipe's changes."""
    changed = dict(policy)
    for setting, value in changes.items():
        part, _, name = setting.partition(".")
        if part in PARTS and not name:
            changed[part] = {"name": value}
    for setting, value in changes.items():
        part, _, name = setting.partition(".")
        if part in PARTS and name:
            changed[part] = {**_part(part, changed), name: value}
        elif part not in (*PARTS, "train"):
            changed[part] = value
    return changed


def _train_with(changes: Mapping[str, Any], train: TrainSettings) -> TrainSettings:
    """The settings of the training with a recipe's changes."""
    of_train = {
        name: value
        for setting, value in changes.items()
        for name in [setting.removeprefix("train.")]
        if setting.startswith("train.")
    }
    return dataclasses.replace(train, **of_train)
