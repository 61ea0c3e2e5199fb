"""HTML of a page that needs nothing but itself: its style is inside, its pictures are data, and it has no scripts.

Texts that are passed in are escaped here; what is called HTML is taken as it is.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from lowrank_ft.report import plots
from lowrank_ft.report.summary import Row


def document(title: str, header: str, sections: Sequence[str]) -> str:
    """A whole document; ``header`` and ``sections`` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{header}\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, *body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(body)}\n</section>\n"


def comparison_table(caption: str, rows: Sequence[Row]) -> str:
    body = "".join(
        f"<tr><th scope=row>{escape(r.name)}</th>{''.join(f'<td>{escape(c)}</td>' for c in r[1:])}</tr>" for r in rows
    )
    head = "<th scope=col>measure</th><th scope=col>dense</th><th scope=col>low-rank</th><th scope=col>change</th>"
    return (
        f"<div class=wide><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(figure: Any, alt: str, caption: str) -> str:
    return (
        f'<figure><img src="{plots.data_uri(figure)}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def missing(what: str, how: str) -> str:
    return f"<p class=missing>{escape(what)}{f': {escape(how)}' if how else ''}.</p>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #5a6472; --line: #d9dee6; --page: #f7f8fa; --card: #ffffff;
  --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adba; --line: #343b46; --page: #14171c;
  --card: #1c2128; --accent: #7fb2e5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .8rem; }
header p { color: var(--soft); margin: 0 0 1.4rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1.2rem 1.3rem;
  margin: 0 0 1.2rem; }
.tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem;
  margin: 0 0 1.2rem; padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tiles li > * { display: block; }
.tiles span { color: var(--soft); font-size: .85rem; }
.tiles b { font-size: 1.05rem; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tiles .change { color: var(--accent); }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .38rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 400; }
tbody tr:last-child > * { border-bottom: 0; }
.wide { overflow-x: auto; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; border-radius: 6px;
  padding: .4rem; }
figcaption, .note { color: var(--soft); font-size: .87rem; margin: .8rem 0 0; }
.missing { color: var(--soft); margin: 0; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; margin: 0 0 .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
summary { cursor: pointer; color: var(--accent); }
details table { margin-top: .8rem; }
@media print { body { background: #ffffff; } section { break-inside: avoid; } }
"""
