"""The report of a benchmark, of any sections: report.json, report.md and report.html."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

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
{% for strip in s.strips %}
{{ "\n" if loop.first }}- {{ strip.caption }}
{% endfor %}
{% endfor %}

## Made

{{ made }}
"""

STYLE = """\
:root { color-scheme: light dark; --ink: #1c2430; --muted: #566072; --line: #dfe3e8; --back: #fff;
  --block: #f5f7f9; --bad: #a83420; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #a5afbd; --line: #3a4350; --back: #14181e; --block: #1e242d;
    --bad: #ff9b85; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line);
  padding-bottom: .2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); vertical-align: bottom; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; white-space: nowrap; }
td.bad { color: var(--bad); font-weight: 600; }
.headline { font-size: 1.25rem; margin: .8rem 0; }
.quiet { color: var(--muted); font-size: .9rem; }
img { max-width: 100%; background: #fff; }
figure.strip { margin: .8rem 0; }
figure.strip div { display: flex; gap: .4rem; }
figure.strip img { flex: 0 1 96px; min-width: 0; border-radius: 4px; }
figure.strip img:last-child { outline: 3px solid #c2410c; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .4rem; }
pre { background: var(--block); padding: .8rem; font-size: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (max-width: 760px) {
  table, tbody, tr, td { display: block; }
  tr.head { display: none; }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  td, td.n { border: 0; padding: .05rem 0; text-align: left; white-space: normal; overflow-wrap: anywhere; }
  td[data-column]:not([data-column=""])::before { content: attr(data-column) ": "; color: var(--muted); }
}
"""

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style | safe }}
</style>
</head>
<body>
<main>
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
<table>
<tr class="head">{% for c in s.columns %}{% if c %}<th scope="col">{{ c }}</th>{% else %}<td></td>{% endif %}{% endfor %}</tr>
{% for row in s.rows %}
<tr>{% for cell in row %}<td data-column="{{ s.columns[loop.index0] }}"{{ cell | kind }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% for name in s.images %}
<img alt="{{ s.heading }}" src="data:image/png;base64,{{ images[name] }}">
{% endfor %}
{% for strip in s.strips %}
<figure class="strip">
<div>{% for picture, alt in strip.pictures %}<img alt="{{ alt }}" src="data:image/jpeg;base64,{{ picture | base64 }}">{% endfor %}</div>
<figcaption>{{ strip.caption }}</figcaption>
</figure>
{% endfor %}
{% endfor %}
<h2>Made</h2>
<p class="quiet">{{ made }}</p>
{% if config %}
<details><summary>Configuration</summary><pre>{{ config }}</pre></details>
{% endif %}
</main>
</body>
</html>
"""  # noqa: E501
NOT_MET = "NOT MET"
NUMBER = re.compile(r"[-+–\[]?[\d.]*\d|–$")


@dataclass(frozen=True)
class Strip:
    """Pictures beside one another, the last of which is what the caption is about."""

    pictures: Sequence[tuple[bytes, str]]
    """JPEG files, and what each shows in words."""
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then a table, then images, then strips of pictures."""

    heading: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    images: Sequence[str] = ()
    """Names of PNG files."""
    strips: Sequence[Strip] = ()
    """Only their captions are in the Markdown page."""


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
    has_thresholds = any("threshold" in t for t in targets)
    rows = [
        [t["claim"], number(t["value"]), *([t.get("threshold", "")] if has_thresholds else []),
         "met" if t["met"] else NOT_MET]
        for t in targets
    ]  # fmt: skip
    columns = ["claim", "value", *(["threshold"] if has_thresholds else []), ""]
    return Section("Targets", columns=columns, rows=rows)


def print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each target, those that are not met in capitals."""
    for entry in targets:
        print(f"{'met    ' if entry['met'] else NOT_MET} {entry['claim']}: {number(entry['value'])}")


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
    config = json.dumps(report["config"], indent=2, default=str) if report.get("config") else ""
    values = {
        "title": title, "summary": summary, "headline": headline, "sections": sections, "made": made(report),
        "style": STYLE, "config": config,
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
    made.filters["kind"] = _kind
    made.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return made


def _kind(cell: object) -> Markup:
    """The class of a cell of a table in HTML."""
    if cell == NOT_MET:
        return Markup(' class="bad"')
    return Markup(' class="n"' if NUMBER.match(str(cell)) else "")


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
