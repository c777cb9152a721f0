"""A report as one HTML file that needs no network: styles and pictures stand in it."""

import base64

from jinja2 import Environment

from .content import Code, Picture, Report, Table, Text

MIME = {"svg": "image/svg+xml", "png": "image/png"}
MARKED = ("better", "worse")

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 75rem;
       padding: 1rem clamp(0.75rem, 4vw, 2.5rem) 4rem; }
h1 { line-height: 1.2; margin-bottom: 0.2rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: 0.2rem; }
.lead, p { max-width: 48rem; }
nav ul { padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; }
a { color: #0058a3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.45rem; text-align: left; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { border-bottom: 2px solid #999; }
.better { color: #00693e; font-weight: 600; }
.worse { color: #a80000; font-weight: 600; }
.note, figcaption { color: #555; font-size: 0.88rem; max-width: 60rem; }
figure { margin: 1.2rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
img.svg { min-width: min(36rem, 180vw); }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; white-space: pre-wrap;
      overflow-wrap: anywhere; }
details { margin: 0.4rem 0; }
summary { cursor: pointer; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide, figure { overflow: visible; }
  img.svg { min-width: 0; }
  th, td { white-space: normal; padding: 0.15rem 0.4rem; font-size: 8.5pt; }
}
</style>
</head>
<body>
<h1>{{ report.title }}</h1>
<p class="lead">{{ report.lead }}</p>
<nav aria-label="Sections"><ul>
{% for section in report.sections %}<li><a href="#s{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}</ul></nav>
{% for section in report.sections %}
<section id="s{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}
{% if block is text %}<p>{{ block.text }}</p>
{% elif block is table %}<div class="wide"><table>
<thead><tr>{% for heading in block.headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}<tr>{% for cell in row %}<td{% if cell in marked %} class="{{ cell }}"{% endif %}>\
{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% if block.note %}<p class="note">{{ block.note }}</p>{% endif %}
{% elif block is picture %}<figure>
<img class="{{ block.kind }}" src="{{ block | data }}" alt="{{ block.caption }}">
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% else %}<details{% if not block.folded %} open{% endif %}><summary>{{ block.title }}</summary>
<pre>{{ block.text }}</pre></details>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


def render(report: Report) -> str:
    """The page. All text is escaped: names, configs and samples come from users and nets."""
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    for name, kind in (("text", Text), ("table", Table), ("picture", Picture), ("code", Code)):
        environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    environment.filters["data"] = _data
    return environment.from_string(TEMPLATE).render(report=report, marked=MARKED)


def _data(picture: Picture) -> str:
    return f"data:{MIME[picture.kind]};base64,{base64.b64encode(picture.content).decode()}"
