"""The page of a report, as a jinja2 template. All text is escaped, except the figures, which are drawn here."""

from __future__ import annotations

PAGE_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ study }}: scaling report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 0.5rem; }
table { border-collapse: collapse; }
td, th { padding: 0.2rem 0.9rem 0.2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .num td { font-variant-numeric: tabular-nums; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.long { min-width: 14rem; } td.some { min-width: 8rem; }
.wide { overflow-x: auto; } .wide { margin: 0.6rem 0 0.3rem; } p.quiet { margin: 0.2rem 0; }
.flag { border-left: 3px solid #9a6700; padding-left: 0.7rem; margin: 0.4rem 0; } .serious { border-color: #cf222e; }
.verdict { font-size: 1.15rem; font-weight: 600; border-left: 4px solid #1a7f37; padding-left: 0.7rem; }
.verdict.serious { border-color: #cf222e; } .answer td { min-width: 7rem; }
summary { cursor: pointer; color: #57606a; font-size: 0.9rem; margin: 0.4rem 0; }
figure { margin: 0 0 0.8rem; } figcaption { margin-top: 0.4rem; } svg { display: block; width: 100%; height: auto; }
figcaption, .quiet { color: #57606a; font-size: 0.9rem; }
.panels { display: grid; gap: 0.6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.panels.lone { max-width: 36rem; } .panels.small { grid-template-columns: repeat(4, 1fr); }
@media (max-width: 48rem) { .panels.small { grid-template-columns: 1fr 1fr; } }
</style></head><body>
{% macro table(t) %}
{% if t.rows %}
<div class="wide"><table class="num"><tr>
{% for c in t.columns %}<th{% if c.is_number %} class="n"{% endif %}>{{ c.name }}</th>{% endfor %}</tr>
{% for row in t.rows %}
<tr>{% for cell in row %}
<td{% if t.columns[loop.index0].is_number %} class="n"{% elif cell|length > 60 %} class="long"
{%- elif cell|length > 20 %} class="some"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% for note in t.notes %}<p class="quiet">{{ note }}</p>
{% endfor %}
{% endmacro %}
<h1>{{ study }}</h1>
<p class="quiet">{{ counted | join("; ") }}. Losses in nats per token on held-out text.</p>
{% if recommendation %}{% set r = recommendation %}
<p class="verdict{% if not trustworthy %} serious{% endif %}">{{ r.verdict }}</p>
<table class="num answer">
<tr><th></th><th>{{ "estimate" if trustworthy else "untrusted" }}</th>
<th>{{ "{:.0f} %".format(100 * r.mass) }} interval</th></tr>
{% for name, value, text in rows %}
<tr><th>{{ name }}</th><td>{{ value }}</td><td>{{ text }}</td></tr>
{% endfor %}
</table>
<p class="quiet">{{ target }}</p>
{% for text in caveats %}
<p class="flag{% if text.startswith("SERIOUS") %} serious{% endif %}">{{ text }}</p>
{% endfor %}
<details><summary>All {{ flags|length }} remarks in full</summary>
{% for f in flags %}
<p class="flag{% if f.serious %} serious{% endif %}">
{% if f.serious %}<strong>Serious.</strong> {% endif %}{{ f.text }}</p>
{% endfor %}
</details>
{% if next_run %}
<h2>What to run next to narrow this most</h2>
<table class="num">{% for k, v in next_run %}<tr><th>{{ k }}</th><td>{{ v }}</td></tr>
{% endfor %}</table>
{% endif %}
{% endif %}
{% for text in doubts %}
<p class="flag">{{ text }}</p>
{% endfor %}
{% if warm_start %}
<h2>Warm start against scratch</h2>
<table>{% for k, v in warm_start.items() %}<tr><th>{{ k }}</th><td>{{ v }}</td></tr>
{% endfor %}</table>
{% endif %}
{% for s in sections %}
<h2>{{ s.title }}</h2>
{% if s.panels %}<figure><div class="panels{% if s.small %} small{% elif s.panels|length == 1 %} lone{% endif %}">
{% for svg in s.panels %}<div>{{ svg | safe }}</div>
{% endfor %}</div>{% if s.caption %}<figcaption>{{ s.caption }}</figcaption>{% endif %}</figure>
{% elif s.caption %}<p class="quiet">{{ s.caption }}</p>
{% endif %}
{% for t in s.tables if t %}{{ table(t) }}{% endfor %}
{% endfor %}
{% if provenance %}
<h2>Provenance</h2>
<table>{% for k, v in provenance %}<tr><th>{{ k }}</th><td>{{ v }}</td></tr>
{% endfor %}</table>
{% endif %}
</body></html>
"""
