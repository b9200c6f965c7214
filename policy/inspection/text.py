"""A dataset's figures as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from policy.common.listing import first_of
from policy.common.markdown import markdown_table
from policy.common.observations import is_image
from policy.inspection.figures import EpisodeFigures, Inspection, KeyFigures, Range, WindowTimes
from policy.model.normalizer import CONSTANT_RANGE

# The largest number of entries in a list; `inspect.json` has all of them.
LISTED = 8
MAX_COLUMNS = 14


def format_inspection(inspection: Inspection, dimensions: int = 32) -> str:
    """Format the figures as a page of text.

    Args:
        inspection: the figures.
        dimensions: vectors up to this width have a row for each dimension.

    Returns:
        The page, of several paragraphs.
    """
    parts = [
        _format_summary(inspection),
        _format_histogram(inspection.episodes.histogram),
        format_keys(inspection.keys, dimensions),
        _format_constants(inspection.keys),
        format_windows(inspection),
    ]
    return "\n\n".join(part for part in parts if part)


def _format_summary(inspection: Inspection) -> str:
    episodes, rate = inspection.episodes, inspection.rate_hz
    lengths = f"{episodes.min} to {episodes.max} transitions, median {episodes.median:g}"
    if rate:
        lengths += f" ({episodes.min / rate:.1f} to {episodes.max / rate:.1f} s, median {episodes.median / rate:.1f} s)"
    lines = {
        "source": inspection.source,
        "format": inspection.format or "not stated",
        "environment": _format_env(inspection.env),
        "rate": f"{rate:g} Hz" if rate else "not stated",
        "episodes": f"{episodes.count} with {episodes.transitions} transitions"
        + (f", made of {episodes.originals} by relabelling" if episodes.originals < episodes.count else ""),
        "lengths": lengths,
        "held out": f"{first_of(episodes.held_out, LISTED)}, set aside by the file"
        if episodes.held_out
        else "none by the file",
        "identical": _format_identical(episodes),
        "idle": "no action has a previous one"
        if episodes.idle_share is None
        else f"{episodes.idle_share:.1%} of the actions repeat the previous one",
        "bad": "none",
    }
    if episodes.bad:
        lines["bad"] = f"{len(episodes.bad)} left out, and not counted in any figure here:"
    text = [f"{name:<12} {value}" for name, value in lines.items()]
    text += [f"{'':<12}   episode {name}: {reason}" for name, reason in list(episodes.bad.items())[:LISTED]]
    if len(episodes.bad) > LISTED:
        text.append(f"{'':<12}   and {len(episodes.bad) - LISTED} more, in inspect.json")
    if episodes.bad:
        text.append(f"{'':<12}   training refuses them, or leaves them out with dataset.on_bad_episode=skip")
    return "\n".join(text)


def _format_env(env: Any) -> str:
    if isinstance(env, list):
        return "; ".join(map(_format_env, env))
    return " ".join(f"{k}={v}" for k, v in env.items()) if isinstance(env, Mapping) else str(env or "not named")


def _format_identical(episodes: EpisodeFigures) -> str:
    if not episodes.identical:
        return "no two episodes"
    copies = sum(len(group) - 1 for group in episodes.identical)
    groups = [" = ".join(_some(group)) for group in episodes.identical]
    text = f"{copies} of the episodes repeat{'s' * (copies == 1)} another one ({'; '.join(_some(groups))}): copies"
    if episodes.held_out:
        return f"{text} leak from training into validation; {episodes.held_out_copies} of the held-out episodes do"
    return f"{text} leak from training into validation"


def _format_histogram(histogram: Sequence[tuple[int, int, int]]) -> str:
    most = max(count for _, _, count in histogram)
    spans = [f"{low}" if low == high else f"{low}..{high}" for low, high, _ in histogram]
    width = max(len(span) for span in (*spans, "transitions"))
    lines = [
        f"{span:>{width}}  {count:>8}  {'#' * math.ceil(40 * count / most)}".rstrip()
        for span, (_, _, count) in zip(spans, histogram, strict=True)
    ]
    return "\n".join([f"{'transitions':>{width}}  episodes", *lines])


def format_keys(keys: Sequence[KeyFigures], dimensions: int) -> str:
    """Format the keys as a plain text table, which is also valid Markdown.

    Args:
        keys: figures of the keys.
        dimensions: vectors up to this width have a row for each dimension.

    Returns:
        The table.
    """
    rows = []
    for figures in keys:
        shape = " x ".join(map(str, figures.shape))
        rows.append([figures.key, shape, figures.dtype, *_format_range(figures.whole)])
        if not is_image(figures.shape) and 1 < len(figures.dimensions) <= dimensions:
            rows += [[f"{figures.key}[{n}]", "", "", *_format_range(r)] for n, r in enumerate(figures.dimensions)]
    return markdown_table(("key", "shape", "dtype", "min", "mean", "max"), rows, align="lrrrrr")


def _format_range(values: Range) -> list[str]:
    return [f"{value:.4g}" for value in (values.min, values.mean, values.max)]


def _format_constants(keys: Sequence[KeyFigures]) -> str:
    lines = []
    for figures in keys:
        for kind, numbers in (("constant", figures.constant), ("nearly constant", figures.nearly_constant)):
            found = [f"{n} ({figures.dimensions[n].mean:.4g})" for n in numbers]
            unit = "channels" if is_image(figures.shape) else "dimensions"
            if found:
                lines.append(
                    f"{kind}: {len(found)} of {len(figures.dimensions)} {unit} of {figures.key}:"
                    f" {first_of(found, LISTED)}"
                )
    if not lines:
        return "constant: no dimension"
    rule = f"They carry no information: a range within {CONSTANT_RANGE:g} of the magnitude is normalised to 0."
    return "\n".join([*lines, rule])


def format_windows(inspection: Inspection) -> str:
    """Format an episode's first, middle and last training window, with a column for each offset from now.

    Args:
        inspection: the figures.

    Returns:
        A table and its legend.
    """
    rate, horizon = inspection.rate_hz, inspection.execution_horizon
    offsets = _columns(inspection.obs_horizon, inspection.action_horizon)
    rows = [["", *("..." if o is None else f"t{o:+d}" if o else "t" for o in offsets)]]
    if rate:
        rows.append(["seconds from t", *("" if o is None else seconds(o / rate) for o in offsets)])
    marks = set()
    for window in inspection.windows:
        cells = _cells(window)
        marks |= {cell[-1] for held in cells.values() for cell in held.values()} & {"*", "x"}
        rows.append([f"{window.place}, t = {window.now}" + (f" ({seconds(window.now / rate)} s)" if rate else "")])
        for name, held in cells.items():
            rows.append([f"  {name}", *("..." if o is None else held.get(o, "") for o in offsets)])
    legend = {
        "*": "* the episode's first observation, repeated before its start",
        "x": "x the episode's last action, repeated after its end, and masked: left out of the loss",
    }
    executed = f"actions of t to t+{horizon - 1}" if horizon > 1 else "action of t"
    time = f" ({seconds(horizon / rate)} s)" if rate else ""
    return "\n".join(
        [
            f"Training windows of episode {inspection.window_episode} ({inspection.window_episode_length} transitions):"
            f" obs_horizon {inspection.obs_horizon}, action_horizon {inspection.action_horizon}",
            "",
            *_aligned(rows),
            "",
            *(text for mark, text in legend.items() if mark in marks),
            f"A rollout executes the {executed}{time}, observes, and plans again at t+{horizon}"
            f" (execution_horizon {horizon}).",
        ]
    )


def _cells(window: WindowTimes) -> dict[str, dict[int, str]]:
    """A window's times by row and by offset from now; a mark after a time says that it is a repetition."""
    seen, done = window.observations, window.actions
    return {
        "observations": {
            n + 1 - len(seen): f"{time}*" if time in seen[n + 1 :] else f"{time} " for n, time in enumerate(seen)
        },
        "actions": {n: f"{time}x" if window.masked[n] else f"{time} " for n, time in enumerate(done)},
    }


def _columns(obs_horizon: int, action_horizon: int) -> list[int | None]:
    """The offsets from now in a window; if there are too many, some are left out and None stands for them."""
    offsets = range(1 - obs_horizon, action_horizon)
    if len(offsets) <= MAX_COLUMNS:
        return list(offsets)
    kept = sorted({*offsets[:3], *offsets[-4:], *({-1, 0, 1, 2} & set(offsets))})
    columns: list[int | None] = []
    for before, offset in zip([kept[0], *kept], kept, strict=False):
        columns += [None, offset] if offset - before > 1 else [offset]
    return columns


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns; a row of one cell is a heading and may extend over the columns."""
    tables = [row for row in rows if len(row) > 1]
    first = max(len(row[0]) for row in tables) + 2
    width = max(len(cell) for row in tables for cell in row[1:]) + 1
    # Times are followed by a mark or a space, and so are the heads.
    return [
        (
            row[0].ljust(first) + "".join((cell if cell[-1:] in "*x " else f"{cell} ").rjust(width) for cell in row[1:])
        ).rstrip()
        for row in rows
    ]


def seconds(value: float) -> str:
    """Format seconds with three decimals at most."""
    return f"{round(value, 3):g}"


def _some(names: Sequence[str]) -> list[str]:
    return [*names[:LISTED], *(["..."] if len(names) > LISTED else [])]
