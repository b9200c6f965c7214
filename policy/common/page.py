"""Pages that need neither a network nor another file, from templates inside this package."""

from __future__ import annotations

import base64
import functools
from typing import Any

from policy.common.panel import DARK, DASHES, LIGHT, MARKERS, Frame
from policy.common.terminal import printable


def page_text(template: str, **values: Any) -> str:
    """Fill in a template; texts in the values are shown as they stand, whatever markup they look like.

    Args:
        template: path of an HTML file within this package; it extends `common/page.html`.
        **values: what the template names, and of every page the `title`, the `answer` below it, the `facts` and the
            `settings`, both by name.

    Returns:
        The page.
    """
    return printable(_environment().get_template(template).render(**values))


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("policy", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    environment.globals |= {
        "frame_of": lambda panel: Frame(panel=panel),
        "markers": list(MARKERS.values()),
        "styles": list(zip(LIGHT, DARK, DASHES, strict=True)),
    }
    return environment
