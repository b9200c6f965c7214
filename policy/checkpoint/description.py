"""A checkpoint in words: where its policy acts, what it was trained on, what it measures, and how it samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policy.checkpoint.environment import only_of_the_user
from policy.checkpoint.reading import Checkpoint
from policy.common.control_rate import stated_rate
from policy.common.files import distinct_names
from policy.common.next_line import next_line
from policy.diffusion.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from policy.diffusion.sampler import Sampler

NOT_STATED = "not stated"
MEASURED = {"val/loss": ("validation loss", "{:.4g}"), "rollout/success_rate": ("rollout success", "{:.0%}")}


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """Describe a checkpoint for people.

    Args:
        checkpoint: the loaded checkpoint; what older versions did not note is `not stated`.

    Returns:
        Texts by name, in the order in which they are read.
    """
    policy, training, env = checkpoint.policy, checkpoint.training, checkpoint.env
    config, rate = policy.config, stated_rate(training.get("rate_hz"))
    shapes = ", ".join(f"{key} {shape}" for key, shape in config.observation_shapes.items())
    objective, settled = OBJECTIVES[config.objective], policy.settled(checkpoint.sampler).record()
    settings = " ".join(f"{name}={value}" for name, value in settled.items() if objective.has(name, value))
    estimate = "" if config.sigma_data is None else f", from an estimate for sigma_data {config.sigma_data:g}"
    betas = f", {config.schedule.get('beta_schedule', 'linear')}" if config.objective == DEFAULT_OBJECTIVE else ""
    return {
        "checkpoint": str(checkpoint.path),
        "environment": " ".join(f"{key}={value}" for key, value in env.items()) if env else "none: env=... chooses one",
        "control rate": f"{rate:g} Hz, that of the demonstrations" if rate else NOT_STATED,
        "tasks": _tasks(training, env or {}),
        **_started(training),
        "trained on": _data(training),
        "training": _steps(training),
        "measured": _measured(training),
        "observations": f"{shapes}; the last {config.obs_horizon}",
        "actions": f"({config.action_dim},), in chunks of {config.action_horizon}",
        "policy": f"{policy.num_parameters / 1e6:.2f} M parameters, encoder {config.encoder['name']}, denoiser"
        f" {config.denoiser['name']}, objective {config.objective}, predicts {config.predicts}{estimate}",
        "schedule": f"{policy.schedule.num_steps} timesteps{betas}",
        "sampler": f"{settings} execution_horizon={checkpoint.execution_horizon}, unless you choose others",
        **({"plugins": ", ".join(checkpoint.plugins)} if checkpoint.plugins else {}),
    }


def next_use(folder: Path, env: Mapping[str, Any] | None, sampler: Sampler) -> str:
    """The line that names what to do with a checkpoint: roll it out, or export it if it names no environment.

    Args:
        folder: the checkpoint folder.
        env: its environment, or None.
        sampler: the sampler settings that it records.
    """
    if env:
        return next_line("ddim-rollout", checkpoint=folder, env=only_of_the_user(env))
    # An exported model begins every chunk from noise.
    cold = {"warm_start": None} if sampler.warm_start is not None else None
    return next_line("ddim-export", checkpoint=folder, sampler=cold)


def _tasks(training: Mapping[str, Any], env: Mapping[str, Any]) -> str:
    found = training.get("tasks") or env.get("tasks") or env.get("task")
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found or NOT_STATED)


def _data(training: Mapping[str, Any]) -> str:
    if isinstance(imported := training.get("imported"), Mapping):
        return f"imported from {imported.get('project')}: {imported.get('source')}"
    counts = [f"{training[name]} {name}" for name in ("episodes", "transitions") if name in training]
    return ": ".join(filter(None, [", ".join(_datasets(training)), ", ".join(counts)])) or NOT_STATED


def dataset_names(training: Mapping[str, Any]) -> list[str]:
    """The names of the datasets that a policy was trained on, without their folders; empty if they are not noted."""
    return distinct_names(_datasets(training))


def _datasets(training: Mapping[str, Any]) -> list[str]:
    """The datasets that a checkpoint notes: a text, or a list of texts for several."""
    noted = training.get("dataset") or []
    return [str(one) for one in noted] if isinstance(noted, list) else [str(noted)]


def _started(training: Mapping[str, Any]) -> dict[str, str]:
    """The checkpoint that the training started from or learned from, by its digest; nothing if there was none."""
    roles = {"init": "whose weights it began with", "teacher": "whose chunks it learned"}
    found = [f"the checkpoint {training[role]}, {what}" for role, what in roles.items() if role in training]
    return {"started from": "; ".join(found)} if found else {}


def _steps(training: Mapping[str, Any]) -> str:
    named = {name: training[name] for name in ("batch_size", "learning_rate", "seed") if name in training}
    steps = [f"step {training['step']}"] if "step" in training else []
    return ", ".join([*steps, *(f"{name} {value}" for name, value in named.items())]) or NOT_STATED


def _measured(training: Mapping[str, Any]) -> str:
    """The newest validation loss and rollout success; a file that holds something else in their place has none."""
    measured, found = training.get("measured"), []
    for key, (name, form) in MEASURED.items():
        try:
            figure, step = form.format(measured[key]["value"]), int(measured[key]["step"])  # type: ignore[index]
        except (LookupError, TypeError, ValueError):
            continue
        episodes = f" of {training.get('rollout_episodes')} episodes" if key.startswith("rollout/") else ""
        found.append(f"{name} {figure}{episodes} (step {step})")
    return ", ".join(found) or "neither a validation loss nor a rollout"
