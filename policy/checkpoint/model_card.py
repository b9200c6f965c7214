"""The model card of a policy: its inputs and outputs, how it was trained, and how it was evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from policy.checkpoint.description import dataset_names
from policy.common.markdown import markdown_code, markdown_table, markdown_text
from policy.common.terminal import printable
from policy.model.diffusion_policy import DiffusionPolicy
from policy.statistics.results import EpisodeResult, summarize

TEMPLATE = "model_card_template.md"
LIBRARY = "ddim-policy"
TAGS = ["diffusion-policy", "ddim", "imitation-learning", "robotics"]
NOT_NOTED = "not noted"

Figures = dict[str, Any]


def model_card(policy: DiffusionPolicy, evaluation: Path | None, license: str | None) -> ModelCard:
    """Write the card.

    Args:
        policy: the policy; if it has an `origin`, the card names its environment and training.
        evaluation: `sweep.json` or `episodes.json` of this policy, or None.
        license: for the metadata, or None.

    Returns:
        The card.

    Raises:
        ValueError: the evaluation cannot be read, or is of several checkpoints.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rows = read_figures(evaluation) if evaluation else []
    origin = policy.origin
    env = str(origin.env["name"]) if origin and origin.env else "an environment of your choice"
    env = " ".join(printable(env).split())
    keys = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: ..." for key in policy.config.observation_shapes)
    metadata = ModelCardData(
        library_name=LIBRARY,
        license=license,
        pipeline_tag="robotics",
        tags=TAGS,
        model_name=f"diffusion policy for {env}",
        eval_results=[_result(row, env) for row in rows] or None,
    )
    environment = Environment(  # Markdown: nothing is escaped
        loader=PackageLoader("policy.checkpoint", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    content = environment.get_template(TEMPLATE).render(
        metadata=metadata.to_yaml(),
        env=markdown_text(env),
        library=LIBRARY,
        observations=f"{{{keys}}}",
        interface=_interface(policy),
        rollouts=_rollouts(policy),
        training=_training(origin.training if origin else {}),
        evaluation=_evaluation(rows),
        latency=_latency(rows),
    )
    return ModelCard(content)


def read_figures(evaluation: Path) -> list[Figures]:
    """Read the figures of an evaluation: a row for each cell of a sweep, or a single row for a rollout.

    Args:
        evaluation: `sweep.json` or `episodes.json`.

    Returns:
        Rows with `episodes success_rate success_low success_high score_mean`; rows of a sweep also have `ddim_steps`
        and `latency_ms_median`.

    Raises:
        ValueError: the file cannot be read, or is of several checkpoints.
    """
    try:
        document = json.loads(evaluation.read_text(encoding="utf-8"))
        if isinstance(document, list):
            return [summarize([EpisodeResult.from_row(row) for row in document])]
        rows = document["cells"]
        names = {row["checkpoint"] for row in rows}
        for row in rows:
            _cells(row)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{evaluation} is neither the sweep.json of a finished sweep nor the episodes.json of a rollout ({error!r})"
        ) from error
    if len(names) != 1:
        raise ValueError(f"{evaluation} is of {len(names)} checkpoints; a model card needs a sweep of its own policy")
    return list(rows)


def _result(row: Figures, env: str) -> EvalResult:
    """A row as the Hub's metadata has it."""
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


def _interface(policy: DiffusionPolicy) -> str:
    """Table of the policy's inputs and outputs with their shapes, and of its size."""
    config = policy.config
    shapes = [
        (f"observation {markdown_code(key)}", f"(B, {config.obs_horizon}, {', '.join(map(str, shape))})")
        for key, shape in config.observation_shapes.items()
    ]
    chunk = ("action chunk", f"(B, {config.action_horizon}, {config.action_dim})")
    size = ("parameters", f"{policy.num_parameters:,}")
    return markdown_table(("", "shape"), [*shapes, chunk, size])


def _rollouts(policy: DiffusionPolicy) -> str:
    """The settings of rollouts that the checkpoint records, as a command takes them; empty for a new policy."""
    if policy.origin is None:
        return ""
    sampler = policy.origin.sampler.overrides if policy.origin.sampler else ""
    return markdown_code(f"execution_horizon={policy.origin.execution_horizon} {sampler}".rstrip())


def _training(training: Figures) -> str:
    """Table of what a checkpoint notes about its training, without the dataset's folder; empty if it notes nothing.

    `init` and `teacher` are digests of the checkpoints that it started from.
    """
    names = ("init", "teacher", "dataset", "episodes", "step", "batch_size", "seed")
    noted = [(key, training[key]) for key in names if key in training]
    if isinstance(imported := training.get("imported"), Mapping):
        noted.append(("imported", f"{imported.get('project')}: {imported.get('source')}"))
    named = ", ".join(dataset_names(training))
    rows = [(key, markdown_text(named if key == "dataset" else str(value))) for key, value in noted]
    return markdown_table(("", "value"), rows) if rows else ""


def _evaluation(rows: Sequence[Figures]) -> str:
    """Table of an evaluation's rows; empty without any."""
    heads = ("ddim_steps", "success", "95 % interval", "episodes", "mean score", "latency (median)")
    return markdown_table(heads, [_cells(row) for row in rows]) if rows else ""


def _latency(rows: Sequence[Figures]) -> str:
    """What the latencies are of; empty if none was measured."""
    measured = [row for row in rows if "latency_ms_median" in row]
    if not measured:
        return ""
    threads = " or ".join(map(str, sorted({row.get("latency_threads") or 1 for row in measured})))
    busy = (
        "; some were measured on a busy machine, and are too long" if any(row.get("busy") for row in measured) else ""
    )
    return f" Latencies are of a whole control step of one robot that plans, with {threads} thread(s){busy}."


def _cells(row: Figures) -> tuple[str, ...]:
    """The cells of one line in the table of the evaluation."""
    latency = f"{row['latency_ms_median']:.1f} ms" if "latency_ms_median" in row else NOT_NOTED
    return (
        str(row.get("ddim_steps", NOT_NOTED)),
        f"{row['success_rate']:.1%}",
        f"{row['success_low']:.1%} to {row['success_high']:.1%}",
        str(row["episodes"]),
        f"{row['score_mean']:.3f}",
        latency,
    )
