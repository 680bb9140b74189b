"""A report of tables and pictures, for benchmarks: report.json, report.md and report.html.

`report.py` is the report of a comparison of Base and MIM; this one takes any sections.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from mim_torchrec.embeddings.files import write_bytes, write_text
from mim_torchrec.training.report import environment
from mim_torchrec.training.report_pages import STYLE

MARKDOWN = """\
# {{ title }}

{{ summary }}
{% for s in sections %}

## {{ s.heading }}
{% for paragraph in s.text %}

{{ paragraph }}
{% endfor %}
{% if s.columns %}

| {% for c in s.columns %}{{ c }} | {% endfor %}

|{% for c in s.columns %}---|{% endfor %}

{% for row in s.rows %}
| {% for cell in row %}{{ cell }} | {% endfor %}

{% endfor %}
{% endif %}
{% for name in s.pictures %}

![{{ s.heading }}]({{ name }})
{% endfor %}
{% endfor %}

## Made

{{ made }}
"""

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for s in sections %}
<h2>{{ s.heading }}</h2>
{% for paragraph in s.text %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if s.columns %}
<div class="wide"><table>
<tr>{% for c in s.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in s.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% for name in s.pictures %}
<img alt="{{ s.heading }}" src="data:image/png;base64,{{ pictures[name] }}">
{% endfor %}
{% endfor %}
<h2>Made</h2>
<p class="quiet">{{ made }}</p>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then a table, then pictures."""

    heading: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[str] = field(default=())
    """Names of PNG files."""


def number(value: float | None) -> str:
    """A figure with four digits; "–" for one that is undefined.

    >>> number(0.305590), number(901120), number(2.4e-07), number(0), number(None)
    ('0.3056', '901,120', '2.4e-07', '0', '–')
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def targets_section(targets: Sequence[Mapping[str, Any]]) -> Section:
    """What figures were to show, as the last section of a report.

    Args:
        targets: as `comparison.target` makes them.
    """
    rows = [[t["claim"], number(t["value"]), "met" if t["met"] else "NOT MET"] for t in targets]
    return Section("Targets", columns=["claim", "value", ""], rows=rows)


def print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each target, those that are not met in capitals."""
    for entry in targets:
        print(f"{'met    ' if entry['met'] else 'NOT MET'} {entry['claim']}: {number(entry['value'])}")


def write_pages(
    report: dict[str, Any],
    title: str,
    summary: str,
    sections: Sequence[Section],
    pictures: dict[str, bytes],
    out: Path,
) -> dict[str, Any]:
    """Write report.json, report.md, report.html and the pictures into a directory.

    Args:
        report: what report.json holds; versions, hardware, date and commit are added.
        title: of the pages.
        summary: first paragraph.
        sections: of the pages.
        pictures: PNG files by name, as sections name them.
        out: directory; made if missing.

    Returns:
        The report with what was added.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot hold; undefined ones are None.
    """
    report = {**report, **environment()}
    text = json.dumps(report, indent=2, default=str, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        write_bytes(out / name, png)
    values = {
        "title": title, "summary": summary, "sections": sections, "made": made(report), "style": STYLE,
        "pictures": {name: base64.b64encode(png).decode() for name, png in pictures.items()},
    }  # fmt: skip
    write_text(out / "report.json", f"{text}\n")
    for name, template, escape in (("report.md", MARKDOWN, False), ("report.html", HTML, True)):
        jinja = jinja2.Environment(
            autoescape=escape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        page = jinja.from_string(template).render(values)
        write_text(out / name, f"{page.rstrip()}\n")
    return report


def made(report: dict[str, Any]) -> str:
    """One line: date, commit, hardware and versions of a report."""
    hardware = report["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    commit = f", commit {report['git_commit']}" if report["git_commit"] else ""
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    return (
        f"{report['date']}{commit}, {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB, {gpus}; {versions}"
    )
