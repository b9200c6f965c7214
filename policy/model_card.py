"""The model card of a policy: what it takes and gives, how it was trained, and what it was measured to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.episodes import EpisodeResult, summarize

LIBRARY = "ddim-policy"
TAGS = ["diffusion-policy", "ddim", "imitation-learning", "robotics"]
NOT_NOTED = "not noted"

Figures = dict[str, Any]


def model_card(policy: DiffusionPolicy, evaluation: Path | None, license: str | None) -> ModelCard:
    """Write the card.

    Args:
        policy: its `origin`, where it has one, says what it acts in.
        evaluation: `sweep.json` or `episodes.json` of this policy, or None.
        license: for the metadata, or None.

    Returns:
        The card.

    Raises:
        ValueError: the evaluation cannot be read, or is of several checkpoints.
    """
    rows = read_figures(evaluation) if evaluation else []
    origin = policy.origin
    env = str(origin.env["name"]) if origin and origin.env else "an environment of your choice"
    data = ModelCardData(
        library_name=LIBRARY,
        license=license,
        pipeline_tag="robotics",
        tags=TAGS,
        model_name=f"diffusion policy for {env}",
        eval_results=[_result(row, env) for row in rows] or None,
    )
    parts = [
        f"# A diffusion policy for {env}",
        "It encodes the last observations, denoises a chunk of actions with DDIM, and is asked again once a part of the"
        f" chunk is executed. Made with `{LIBRARY}`.",
        _use(policy),
        _interface(policy),
        _training(origin.training if origin else {}),
        _evaluation(rows),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def read_figures(evaluation: Path) -> list[Figures]:
    """What was measured: a row for each cell of a sweep, or one for a rollout.

    Args:
        evaluation: `sweep.json` or `episodes.json`.

    Returns:
        Rows with `episodes success_rate success_low success_high score_mean`; of a sweep also `ddim_steps` and
        `latency_ms_median`.

    Raises:
        ValueError: it cannot be read, or is of several checkpoints.
    """
    try:
        document = json.loads(evaluation.read_text(encoding="utf-8"))
        if isinstance(document, list):
            return [summarize([EpisodeResult.from_row(row) for row in document])]
        rows = document["cells"]
        names = {row["checkpoint"] for row in rows}
        for row in rows:
            _line(row)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{evaluation} is neither the sweep.json of a finished sweep nor the episodes.json of a rollout ({error!r})"
        ) from error
    if len(names) != 1:
        raise ValueError(f"{evaluation} is of {len(names)} checkpoints; a model card needs a sweep of its own policy")
    return list(rows)


def _result(row: Figures, env: str) -> EvalResult:
    noted = ("episodes", "success_low", "success_high", "ddim_steps", "latency_ms_median")
    return EvalResult(
        task_type="robotics",
        dataset_type=env,
        dataset_name=env,
        metric_type="success_rate",
        metric_name="success rate",
        metric_value=row["success_rate"],
        metric_args={key: row[key] for key in noted if key in row},
    )


def _use(policy: DiffusionPolicy) -> str:
    keys = ", ".join(f'"{key}": ...' for key in policy.config.observation_shapes)
    return (
        "## Use\n\n```python\nfrom policy import DiffusionPolicy\n\n"
        'policy = DiffusionPolicy.from_pretrained("owner/name")  # or the folder\n'
        f"chunk = policy.sample_actions({{{keys}}}, ddim_steps=8)\n```\n\n"
        "`python scripts/rollout.py checkpoint=FOLDER` runs it in its environment. Loading it executes nothing."
    )


def _interface(policy: DiffusionPolicy) -> str:
    config = policy.config
    shapes = [
        (f"observation `{key}`", f"(B, {config.obs_horizon}, {', '.join(map(str, shape))})")
        for key, shape in config.observation_shapes.items()
    ]
    chunk = ("action chunk", f"(B, {config.action_horizon}, {config.action_dim})")
    size = ("parameters", f"{sum(p.numel() for p in policy.parameters()):,}")
    return "## What it takes and gives\n\n" + _table(("", "shape"), [*shapes, chunk, size])


def _training(training: Figures) -> str:
    noted = [(key, training[key]) for key in ("dataset", "episodes", "step", "batch_size", "seed") if key in training]
    if not noted:
        return "## Training\n\nNothing is noted about it."
    rows = [(key, Path(str(value)).name if key == "dataset" else str(value)) for key, value in noted]
    return "## Training\n\n" + _table(("", "value"), rows)


def _evaluation(rows: Sequence[Figures]) -> str:
    if not rows:
        return "## Evaluation\n\nNo evaluation was given."
    heads = ("ddim_steps", "success", "95 % interval", "episodes", "mean score", "latency of a chunk (median)")
    return (
        "## Evaluation\n\n"
        + _table(heads, [_line(row) for row in rows])
        + "\n\nEpisodes from seeds that training never saw; Wilson intervals; one thread, batch 1."
    )


def _line(row: Figures) -> tuple[str, ...]:
    latency = f"{row['latency_ms_median']:.1f} ms" if "latency_ms_median" in row else NOT_NOTED
    return (
        str(row.get("ddim_steps", NOT_NOTED)),
        f"{row['success_rate']:.1%}",
        f"{row['success_low']:.1%} to {row['success_high']:.1%}",
        str(row["episodes"]),
        f"{row['score_mean']:.3f}",
        latency,
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
