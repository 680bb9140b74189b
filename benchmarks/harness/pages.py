"""The report of a benchmark, of any sections: report.json, report.md and report.html."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from mim_torchrec.benchmarks.harness.environment import environment
from mim_torchrec.embeddings.files import write_bytes

MARKDOWN = """\
# {{ title }}

{{ summary }}
{% if headline %}

**{{ headline }}**
{% endif %}
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
{% for name in s.images %}

![{{ s.heading }}]({{ name }})
{% endfor %}
{% endfor %}

## Made

{{ made }}
"""

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #dfe3e8; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #4a5566; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eceff3; vertical-align: top; }
td.n { text-align: right; white-space: nowrap; }
.headline { font-size: 1.25rem; margin: .8rem 0; }
.quiet { color: #5b6676; font-size: .9rem; }
img { max-width: 100%; }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: .8rem; }
.wide { overflow-x: auto; }
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
{% if headline %}
<p class="headline">{{ headline }}</p>
{% endif %}
{% for s in sections %}
<h2>{{ s.heading }}</h2>
{% for paragraph in s.text %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if s.columns %}
<div class="wide"><table>
<tr>{% for c in s.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in s.rows %}
<tr>{% for cell in row %}<td{{ ' class="n"' | safe if cell is numeric }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% for name in s.images %}
<img alt="{{ s.heading }}" src="data:image/png;base64,{{ images[name] }}">
{% endfor %}
{% endfor %}
<h2>Made</h2>
<p class="quiet">{{ made }}</p>
{% if config %}
<details><summary>Configuration</summary><pre>{{ config }}</pre></details>
{% endif %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then a table, then images."""

    heading: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    images: Sequence[str] = ()
    """Names of PNG files."""


def number(value: float | None) -> str:
    """A figure with four digits; "–" for one that is undefined.

    >>> number(0.305590), number(901120), number(2.4e-07), number(0), number(None)
    ('0.3056', '901,120', '2.4e-07', '0', '–')
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def formatted(value: float | None, form: str = ".4f") -> str:
    """A figure in a form; "–" for one that is undefined."""
    return "–" if value is None else format(value, form)


def interval(ci: Sequence[float] | None) -> str:
    """A confidence interval of a difference in AUC; "–" where it is undefined."""
    return "–" if ci is None else f"[{ci[0]:+.4f}, {ci[1]:+.4f}]"


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
    images: dict[str, bytes],
    out: Path,
    headline: str = "",
) -> dict[str, Any]:
    """Write report.json, report.md, report.html and the images into a directory; print targets and the path.

    Args:
        report: what report.json holds; versions, hardware, date and commit are added.
        title: of the pages.
        summary: first paragraph.
        sections: of the pages.
        images: PNG files by name, as sections name them.
        out: directory; made if missing.
        headline: the main figure, in a line.

    Returns:
        The report with what was added.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot hold; undefined ones are None.
    """
    report = {**report, **environment()}
    text = json.dumps(report, indent=2, default=str, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    values = {
        "title": title, "summary": summary, "headline": headline, "sections": sections, "made": made(report),
        "style": STYLE, "config": json.dumps(report.get("config"), indent=2, default=str),
        "images": {name: base64.b64encode(png).decode() for name, png in images.items()},
    }  # fmt: skip
    files = {**images, "report.json": text.encode()}
    for name, template, escape in (("report.md", MARKDOWN, False), ("report.html", HTML, True)):
        files[name] = jinja(escape).from_string(template).render(values).rstrip().encode()
    for name, content in files.items():
        write_bytes(out / name, content if name in images else content + b"\n")
    print_targets(report.get("targets", ()))
    print(f"report: {out / 'report.html'}")
    return report


def jinja(escape: bool) -> jinja2.Environment:
    """The environment of all templates of reports."""
    made = jinja2.Environment(
        autoescape=escape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    made.tests["numeric"] = lambda cell: bool(re.match(r"[-+–\[]?[\d.]*\d|–$", str(cell)))
    return made


def made(report: Mapping[str, Any]) -> str:
    """One line: date, commit, hardware and versions of a report."""
    commit = f", commit {report['git_commit']}" if report["git_commit"] else ""
    return f"{report['date']}{commit}, {hardware(report['hardware'])}; {versions(report['versions'])}"


def hardware(found: Mapping[str, Any]) -> str:
    """One line about a machine."""
    gpus = ", ".join(map(str, found["gpus"])) or "no GPU"
    return f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, {gpus}"


def versions(found: Mapping[str, str]) -> str:
    """One line about packages."""
    return ", ".join(f"{name} {version}" for name, version in found.items())
