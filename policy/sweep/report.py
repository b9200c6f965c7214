"""One self-contained page about a sweep: the answer, the plots, the cells, and the same episodes side by side."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from policy.sweep.grid import Row
from policy.sweep.table import draw_rows, table_cells

STYLES = {"light": "default", "dark": "dark_background"}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recorded episode of one cell.

    Attributes:
        seed: of the episode.
        caption: what tells the cell from others, and how the episode ended.
        file: mp4.
    """

    seed: int
    caption: str
    file: Path


def write_report(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    answer: str,
    chosen: int | None,
    differences: Sequence[str],
    clips: Sequence[Clip],
    without_clips: str,
    settings: Mapping[str, Any],
) -> None:
    """Write the page; it needs no network and no other file.

    Args:
        path: of the HTML file.
        rows: of the cells.
        title: what was swept.
        answer: the recommendation, in a sentence.
        chosen: number of the recommended cell.
        differences: of each cell to the best one, in words.
        clips: recorded episodes; those of one seed stand side by side.
        without_clips: what to say where there are none.
        settings: what else to state.
    """
    template = Template(files("policy.sweep").joinpath("report_template.html").read_text())
    page = template.substitute(
        title=escape(title),
        subtitle=f"{rows[0]['episodes']} episodes a cell, the same in each; {len(rows)} cells",
        answer=escape(answer),
        plot_light=_plot(rows, "light"),
        plot_dark=_plot(rows, "dark"),
        table=_table(rows, chosen, differences),
        videos=_videos(clips) if clips else f'<p class="faint">{escape(without_clips)}</p>',
        settings="".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in settings.items()),
    )
    path.write_text(page)


def _plot(rows: Sequence[Row], style: str) -> str:
    import matplotlib.style
    from matplotlib import rc_context

    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep", "savefig.transparent": True}),
        matplotlib.style.context(STYLES[style]),
    ):
        buffer = BytesIO()
        draw_rows(rows).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    svg = text[text.index("<svg") :]
    # Both plots are in one page: their names must not meet. No link leads out of it.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{style}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _table(rows: Sequence[Row], chosen: int | None, differences: Sequence[str]) -> str:
    heads, *lines = table_cells(rows)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in (*heads, "against the best"))
    body = []
    for number, (line, difference) in enumerate(zip(lines, differences, strict=True)):
        mark = ' class="chosen"' if number == chosen else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in (*line, difference)) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _videos(clips: Sequence[Clip]) -> str:
    parts = []
    for seed in dict.fromkeys(clip.seed for clip in clips):
        figures = "".join(_figure(clip) for clip in clips if clip.seed == seed)
        parts.append(f"<h3>Episode {seed}</h3>" + f'<div class="episode">{figures}</div>')
    return "".join(parts)


def _figure(clip: Clip) -> str:
    data = base64.b64encode(clip.file.read_bytes()).decode()
    source = f'<video controls muted playsinline loop preload="metadata" src="data:video/mp4;base64,{data}"></video>'
    return f"<figure>{source}<figcaption>{escape(clip.caption)}</figcaption></figure>"
