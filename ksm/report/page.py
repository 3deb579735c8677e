"""A page in one file: charts, tables and their scripts inlined, everything escaped, the network forbidden."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ksm.charts import CSS, DARK, LIGHT, Figure, need, theme
from ksm.plan.result import plain


@dataclass(frozen=True, slots=True)
class Listing:
    """A table of strings on a page, and what is to be said of it: rows that were left out, above all."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def page(
    template: str,
    *,
    title: str,
    figures: Sequence[Figure] = (),
    data: Mapping[str, Any] | None = None,
    scripts: Sequence[str] = (),
    **context: Any,
) -> str:
    """The page that a template of `ksm/report/templates`, an extension of base.html, makes.

    Args:
        template: its file name.
        title: of the page.
        figures: those that the template shows by `{{ figure(figures["name"]) }}`.
        data: for the page's scripts, which find it as `ksm.data`.
        scripts: file names beside the templates, run in this order after base.js.
        context: what else the template names.

    Raises:
        UnsupportedError: what `ksm[report]` has is not installed.
    """
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ksm.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    specs = {each.name: _spec(each) for each in figures if each.chart is not None}
    keys = {name: _keys(spec) for name, spec in specs.items()}
    island = {
        "specs": specs,
        "config": theme(CSS),
        "data": plain(data or {}),
    }
    code = [_bundle(), *(_beside(name) for name in ("base.js", *scripts))]
    markup = environment.get_template(template).render(
        title=title,
        figures={each.name: each for each in figures},
        keys=keys,
        island=environment.filters["safe"](_inert(island)),
        scripts=[environment.filters["safe"](one) for one in code],
        style=environment.filters["safe"](_beside("base.css")),
        light=LIGHT,
        dark=DARK,
        security=_content_security(code),
        **context,
    )
    return str(markup)


def _spec(figure: Figure) -> dict[str, Any]:
    found: dict[str, Any] = figure.chart.to_dict()
    found.pop("config", None)  # the page has its own
    return found | {"description": figure.caption, "autosize": {"type": "fit-x"}}


def _keys(said: Any) -> list[str]:
    """The names of a chart's colours, taken out of it: the page says them in words that wrap where it is narrow."""
    found: list[str] = []
    for inner in said.values() if isinstance(said, dict) else said if isinstance(said, list) else ():
        found = _keys(inner) or found
    color = said.get("encoding", {}).get("color", {}) if isinstance(said, dict) else {}
    if color.get("type") == "nominal":
        color["legend"] = None
        found = color["scale"]["domain"]
    return found


def _content_security(code: Sequence[str]) -> str:
    """No network, and no script but these: by their hashes, so that no name that slipped through would run."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in code)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _inert(said: Any) -> str:
    """JSON that cannot end the element that it is in."""
    text = json.dumps(said, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _beside(name: str) -> str:
    """A script or style sheet of the package; its newlines as the browser will see them, for the hash."""
    return resources.files("ksm.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8").strip()


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    found: str = need("vl_convert").javascript_bundle()
    return found.replace("</script", "<\\/script").replace("\r", "")
