"""The report of a sweep: one page with the recommendation, the plots, the cells and episodes side by side."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from policy.common.drawing import drawing
from policy.common.files import write_text
from policy.common.terminal import printable
from policy.sweep.grid import Row
from policy.sweep.plot import draw_rows
from policy.sweep.table import table_cells

TEMPLATE = "report_template.html"
# The plots' matplotlib style, by the page's colour scheme.
STYLES = {"light": "default", "dark": "dark_background"}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recorded episode of one cell.

    Attributes:
        seed: the episode's seed.
        caption: the settings in which the cell differs from the others, and how the episode ended.
        file: the mp4 file.
    """

    seed: int
    caption: str
    file: Path

    def encoded(self) -> str:
        """The content of the file in base64."""
        return base64.b64encode(self.file.read_bytes()).decode()


def write_report(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    answer: str,
    comparisons: Sequence[str] = (),
    warnings: Sequence[str] = (),
    chosen: int | None,
    differences: Sequence[str],
    clips: Sequence[Clip],
    without_clips: str,
    settings: Mapping[str, Any],
    paired: bool = True,
) -> None:
    """Write the page. It needs neither a network nor any other file.

    Args:
        path: the HTML file.
        rows: the cells' rows.
        title: says what was swept.
        answer: the recommendation, in a sentence.
        comparisons: how checkpoints differ, in sentences.
        warnings: what a reader must know besides, in sentences.
        chosen: index of the recommended row, or None.
        differences: how each row compares with the best one, in words.
        clips: recorded episodes; those with the same seed stand side by side.
        without_clips: stands where the episodes would, if there are none.
        settings: listed at the end of the page, by name.
        paired: whether all cells ran the same episodes.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    heads, *lines = table_cells(rows)
    seeds = dict.fromkeys(clip.seed for clip in clips)
    environment = Environment(
        loader=PackageLoader("policy.sweep", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title,
        episodes_per_cell=rows[0]["episodes"],
        answer=answer,
        comparisons=comparisons,
        warnings=warnings,
        plots={scheme: _plot(rows, scheme) for scheme in STYLES},
        heads=[*heads, "against the best"],
        lines=[[*line, difference] for line, difference in zip(lines, differences, strict=True)],
        chosen=chosen,
        clips={seed: [clip for clip in clips if clip.seed == seed] for seed in seeds},
        without_clips=without_clips,
        settings=settings,
        paired=paired,
    )
    write_text(path, printable(page))


def _plot(rows: Sequence[Row], scheme: str) -> str:
    """The plots as an SVG element for a page of a light or dark colour scheme."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "savefig.transparent": True}
    with drawing(STYLES[scheme], settings):
        buffer = BytesIO()
        draw_rows(rows).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    svg = text[text.index("<svg") :]
    # Both schemes' plots stand in one page: a prefix keeps their ids apart. The metadata holds links to other sites.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{scheme}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
