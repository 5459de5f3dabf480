"""The report as one HTML file that needs nothing else: no server, no network. What it shows comes from `data`."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import shlex
import unicodedata
from importlib import resources
from typing import Any

from untwin.core import EPS_GRID
from untwin.errors import MissingExtraError
from untwin.report.data import Clip, Report

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise MissingExtraError("the report needs a package that is not installed: pip install 'untwin[report]'") from error

MAX_BYTES = 15_000_000
"""Of the page; pictures beyond it are left out."""
START_EPS = 0.05
"""Where the slider starts for a run without eps."""
_LEFT_OUT = "picture left out: the page would be larger than 15 MB"
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories of characters that are shown by their number."""


def render(report: Report) -> str:
    """A page that shows a report.

    It is smaller than 15 MB: pictures of the pairs closest to the threshold go in first, then those of groups, and a
    clip whose picture is left out says so.

    Args:
        report: What is on the page; all of its texts are treated as hostile.

    Returns:
        HTML, to be written as UTF-8.
    """
    strips = {index for index, clip in enumerate(report.clips) if clip.strip is not None}
    room = MAX_BYTES - len(_page(report, set()).encode()) if strips else 0
    fitting = set()
    for index in _by_importance(report):
        strip = report.clips[index].strip
        if strip is not None and index not in fitting and (size := len(_json(dataclasses.asdict(strip)))) <= room:
            fitting.add(index)
            room -= size
    return _page(report, fitting)


def _by_importance(report: Report) -> list[int]:
    """Indices of clips, some of them more than once: those that matter most on the page come first."""
    line = 1 - (START_EPS if report.eps is None else report.eps)
    pairs = sorted(report.pairs, key=lambda pair: abs(pair.score - line))
    groups = [index for group in report.groups for index in (group.kept, *(member for member, _ in group.shown))]
    return [*(index for pair in pairs for index in (pair.row, pair.other)), *groups, *range(len(report.clips))]


def _page(report: Report, strips: set[int]) -> str:
    """The page with the pictures of some of the clips."""
    files = resources.files("untwin.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = _visible
    script, plotly = (files / "page.js").read_text("utf-8"), get_plotlyjs()
    if "</script" in plotly.lower() or "<!--" in plotly:
        plotly = ""  # it would end the page; without it there are tables for all charts
    return environment.from_string((files / "page.html.j2").read_text("utf-8")).render(
        report=report,
        audit=f"untwin audit {shlex.quote(report.output)}",
        # The page's two scripts and no others.
        hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in (script, plotly)),
        style=Markup((files / "page.css").read_text("utf-8")),
        data=Markup(_json(_content(report, strips))),
        script=Markup(script),
        plotly=Markup(plotly),
    )


def _content(report: Report, strips: set[int]) -> dict[str, Any]:
    """What the page's script works with."""
    clips = tuple(_without_strip(clip) if index not in strips else clip for index, clip in enumerate(report.clips))
    static = {"recall", "audit_note", "kmeans", "parameters", "packages"}  # the template shows them
    content = dataclasses.asdict(dataclasses.replace(report, clips=clips, kmeans={}, parameters={}, packages={}))
    content = {name: value for name, value in content.items() if name not in static}
    return content | {"grid": EPS_GRID, "start_eps": START_EPS}


def _without_strip(clip: Clip) -> Clip:
    return clip if clip.strip is None else dataclasses.replace(clip, strip=None, problem=clip.problem or _LEFT_OUT)


def _json(content: object) -> str:
    """JSON in ASCII that can stand inside a script element."""
    text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(content: object) -> object:
    """JSON has no number for NaN and infinity."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _visible(text: object) -> Markup:
    """Text in which characters that show nothing, or that turn the text around, stand as their number."""
    return Markup().join(
        Markup('<span class="code">U+{:04X}</span>').format(ord(character))
        if unicodedata.category(character) in _INVISIBLE
        else escape(character)
        for character in str(text)
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
