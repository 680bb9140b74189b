"""Templates of the report's two pages; `r` is the report, `plots` base64 PNG by name, `style` is STYLE."""

MARKDOWN = """\
# {{ r.title }}

{{ r.summary }}

| model | test AUC | grouped AUC | normalized entropy |
|---|---|---|---|
| Base | {{ r.ctr.base.auc | auc }} | {{ r.ctr.base.gauc | auc }} | {{ r.ctr.base.ne | auc }} |
| MIM | {{ r.ctr.mim.auc | auc }} | {{ r.ctr.mim.gauc | auc }} | {{ r.ctr.mim.ne | auc }} |

**MIM − Base: {{ r.ctr.mim_minus_base_auc | signed }} AUC**, 95% interval \
{{ r.ctr.mim_minus_base_ci | ci }} (users resampled).

## Targets

| claim | figure | met |
|---|---|---|
{% for t in r.targets %}
| {{ t.claim }} | {{ t.value | auc }} | {{ "yes" if t.met else "**no**" }} |
{% endfor %}

## Negative controls

| control | gain over its Base | 95% interval | |
|---|---|---|---|
{% for name, c in r.controls.items() %}
| `{{ name }}`: {{ c.what }} | {{ c.gain | signed }} | {{ c.ci | ci }} | {{ c.verdict }} |
{% endfor %}
{% if r.variants %}

## Variants

| variant | Base AUC | AUC | difference | 95% interval |
|---|---|---|---|---|
{% for name, v in r.variants.items() %}
| `{{ name }}`: {{ v.what }} | {{ v.base_auc | auc }} | {{ v.auc | auc }} \
| {{ v.gain | signed }} | {{ v.ci | ci }} |
{% endfor %}
{% endif %}
{% if r.seeds %}

## Seeds

| {% for key in r.seeds[0] %}{{ key | words }} | {% endfor %}

|{% for key in r.seeds[0] %}---|{% endfor %}

{% for row in r.seeds %}
| {% for key, value in row.items() %}{{ value | cell(key) }} | {% endfor %}

{% endfor %}
{% endif %}
{% if r.tuning %}

## Tuning

{{ r.tuning.how }}

| setting | Base validation AUC | MIM validation AUC |
|---|---|---|
{% for row in r.tuning.grid %}
| {{ row.setting | setting }} | {{ row.base | auc }}{{ " (chosen)" if row.chosen_for_base }} \
| {{ row.mim | auc }}{{ " (chosen)" if row.chosen_for_mim }} |
{% endfor %}
{% endif %}

## Cold start

![AUC by item age](cold_start.png)

| items by age | Base AUC | MIM AUC | impressions |
|---|---|---|---|
{% for s in r.cold_start %}
| {{ s.set }} | {{ s.base_auc | auc }} | {{ s.mim_auc | auc }} | {{ s.n | count }} |
{% endfor %}

## Categories

| category | Base AUC | MIM AUC | impressions |
|---|---|---|---|
{% for name, c in r.by_category.items() %}
| {{ name or "(none)" }} | {{ c.base_auc | auc }} | {{ c.mim_auc | auc }} | {{ c.n | count }} |
{% endfor %}

## Loss curves

![Loss curves](curves.png)

## Table and stages

MM table: {{ r.table.rows | count }} rows of {{ r.table.dim }} {{ r.table.dtype }}, version \
`{{ r.table.table_version }}`{% if r.table.digest_before %}; its bytes on the ranks were \
{{ "the same" if r.table.digest_before == r.table.digest_after else "NOT the same" }} before and after \
training{% endif %}.

| stage | time |
|---|---|
{% for name, seconds in r.stages.items() %}
| {{ name }} | {{ seconds | seconds }} |
{% endfor %}
{% if r.notes %}

## Notes

{% for note in r.notes %}
- {{ note }}
{% endfor %}
{% endif %}

## Made

{{ r.date }}{% if r.git_commit %}, commit {{ r.git_commit }}{% endif %}, on {{ r.hardware.processor }}, \
{{ r.hardware.cores }} cores, {{ r.hardware.memory_gib }} GiB\
{% for gpu in r.hardware.gpus %}, {{ gpu }}{% endfor %}.
{% for name, version in r.versions.items() %}{{ name }} {{ version }}{{ " · " if not loop.last }}{% endfor %}

"""

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #dfe3e8; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #4a5566; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eceff3; vertical-align: top; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
.headline { font-size: 1.25rem; margin: .8rem 0; }
.yes { color: #17693a; } .no { color: #b3261e; font-weight: 600; }
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
<title>{{ r.title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
<h1>{{ r.title }}</h1>
<p>{{ r.summary }}</p>
<table>
<tr><th>model</th><th class="n">test AUC</th><th class="n">grouped AUC</th>
<th class="n">normalized entropy</th></tr>
{% for name, m in [("Base", r.ctr.base), ("MIM", r.ctr.mim)] %}
<tr><td>{{ name }}</td><td class="n">{{ m.auc | auc }}</td><td class="n">{{ m.gauc | auc }}</td>
<td class="n">{{ m.ne | auc }}</td></tr>
{% endfor %}
</table>
<p class="headline">MIM − Base: <b>{{ r.ctr.mim_minus_base_auc | signed }}</b> AUC
<span class="quiet">95% interval {{ r.ctr.mim_minus_base_ci | ci }}, users resampled</span></p>

<h2>Targets</h2>
<table>
<tr><th>claim</th><th class="n">figure</th><th>met</th></tr>
{% for t in r.targets %}
<tr><td>{{ t.claim }}</td><td class="n">{{ t.value | auc }}</td>
<td class="{{ 'yes' if t.met else 'no' }}">{{ "yes" if t.met else "no" }}</td></tr>
{% endfor %}
</table>

<h2>Negative controls</h2>
<table>
<tr><th>control</th><th class="n">gain over its Base</th><th class="n">95% interval</th><th></th></tr>
{% for name, c in r.controls.items() %}
<tr><td><b>{{ name }}</b><br><span class="quiet">{{ c.what }}</span></td>
<td class="n">{{ c.gain | signed }}</td>
<td class="n">{{ c.ci | ci }}</td><td>{{ c.verdict }}</td></tr>
{% endfor %}
</table>
{% if r.variants %}

<h2>Variants</h2>
<table>
<tr><th>variant</th><th class="n">Base AUC</th><th class="n">AUC</th><th class="n">difference</th>
<th class="n">95% interval</th></tr>
{% for name, v in r.variants.items() %}
<tr><td><b>{{ name }}</b><br><span class="quiet">{{ v.what }}</span></td>
<td class="n">{{ v.base_auc | auc }}</td><td class="n">{{ v.auc | auc }}</td>
<td class="n">{{ v.gain | signed }}</td><td class="n">{{ v.ci | ci }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if r.seeds %}

<h2>Seeds</h2>
<div class="wide"><table>
<tr>{% for key in r.seeds[0] %}<th class="n">{{ key | words }}</th>{% endfor %}</tr>
{% for row in r.seeds %}
<tr>{% for key, value in row.items() %}<td class="n">{{ value | cell(key) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% if r.tuning %}

<h2>Tuning</h2>
<p>{{ r.tuning.how }}</p>
<table>
<tr><th>setting</th><th class="n">Base validation AUC</th><th class="n">MIM validation AUC</th></tr>
{% for row in r.tuning.grid %}
<tr><td>{{ row.setting | setting }}</td>
<td class="n">{{ "chosen " if row.chosen_for_base }}{{ row.base | auc }}</td>
<td class="n">{{ "chosen " if row.chosen_for_mim }}{{ row.mim | auc }}</td></tr>
{% endfor %}
</table>
{% endif %}

<h2>Cold start</h2>
<img alt="AUC by item age" src="data:image/png;base64,{{ plots.cold_start }}">
<table>
<tr><th>items by age</th><th class="n">Base AUC</th><th class="n">MIM AUC</th><th class="n">difference</th>
<th class="n">impressions</th></tr>
{% for s in r.cold_start %}
<tr><td>{{ s.set }}</td><td class="n">{{ s.base_auc | auc }}</td><td class="n">{{ s.mim_auc | auc }}</td>
<td class="n">{{ (s.mim_auc, s.base_auc) | minus | signed }}</td><td class="n">{{ s.n | count }}</td></tr>
{% endfor %}
</table>

<h2>Categories</h2>
<table>
<tr><th>category</th><th class="n">Base AUC</th><th class="n">MIM AUC</th><th class="n">difference</th>
<th class="n">impressions</th></tr>
{% for name, c in r.by_category.items() %}
<tr><td>{{ name or "(none)" }}</td><td class="n">{{ c.base_auc | auc }}</td>
<td class="n">{{ c.mim_auc | auc }}</td>
<td class="n">{{ (c.mim_auc, c.base_auc) | minus | signed }}</td><td class="n">{{ c.n | count }}</td></tr>
{% endfor %}
</table>

<h2>Loss curves</h2>
<img alt="Loss curves" src="data:image/png;base64,{{ plots.curves }}">

<h2>Table and stages</h2>
<p>MM table: {{ r.table.rows | count }} rows of {{ r.table.dim }} {{ r.table.dtype }}, version
<code>{{ r.table.table_version }}</code>{% if r.table.digest_before %}; its bytes on the ranks were
{{ "the same" if r.table.digest_before == r.table.digest_after else "NOT the same" }} before and after
training{% endif %}.</p>
<table>
<tr><th>stage</th><th class="n">time</th></tr>
{% for name, seconds in r.stages.items() %}
<tr><td>{{ name }}</td><td class="n">{{ seconds | seconds }}</td></tr>
{% endfor %}
</table>
{% if r.notes %}

<h2>Notes</h2>
<ul>
{% for note in r.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}

<h2>Made</h2>
<p class="quiet">{{ r.date }}{% if r.git_commit %}, commit {{ r.git_commit }}{% endif %}, on
{{ r.hardware.processor }}, {{ r.hardware.cores }} cores, {{ r.hardware.memory_gib }} GiB
{%- for gpu in r.hardware.gpus %}, {{ gpu }}{% endfor %}.<br>
{% for name, version in r.versions.items() %}
{{ name }} {{ version }}{{ " ·" if not loop.last }}
{% endfor %}
</p>
<details><summary>Configuration</summary><pre>{{ r.config | pretty }}</pre></details>
</body>
</html>
"""
