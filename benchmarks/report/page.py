# SPDX-License-Identifier: Apache-2.0
"""Markdown as one HTML page that needs no other file: its pictures are in it."""

from __future__ import annotations

import re
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --page: #ffffff; --faint: #d0d7de;
  --soft: #f6f8fa; --link: #0969da; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #0d1117; --faint: #3d444d;
  --soft: #161b22; --link: #4493f8; } }
body { color: var(--text); background: var(--page); font: 16px/1.55 system-ui, sans-serif;
  max-width: 70rem; margin: 2rem auto; padding: 0 1.2rem; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--faint); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--faint); vertical-align: top; }
thead th { background: var(--soft); text-align: left; }
code { background: var(--soft); padding: .1em .3em; border-radius: 4px; font-size: .88em; }
svg { max-width: 100%; height: auto; }
.dark { display: none; }
@media (prefers-color-scheme: dark) { .light { display: none; } .dark { display: block; } }
"""

PICTURE = re.compile(r"<picture>.*?srcset=\"([^\"]+)\".*?src=\"([^\"]+)\".*?</picture>", re.DOTALL)


def to_html(markdown: str, folder: Path, title: str) -> str:
    """A whole page.

    Args:
        markdown: its `<picture>` elements name a dark and a light SVG file in `folder`.
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    body = body.replace("<table>", '<div class="table"><table>').replace(
        "</table>", "</table></div>"
    )
    body = PICTURE.sub(lambda found: _inline(folder, found[1], found[2]), body)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n{body}</html>\n"
    )


def _inline(folder: Path, dark: str, light: str) -> str:
    parts = []
    for theme, name in (("light", light), ("dark", dark)):
        text = (folder / name).read_text(encoding="utf-8")
        svg = text[text.index("<svg") :]
        # names within a picture must be its own: the page holds several
        for kind in sorted(set(re.findall(r'id="([^"]+)"', svg)), key=len, reverse=True):
            own = f"{Path(name).stem}-{kind}"
            svg = svg.replace(f'id="{kind}"', f'id="{own}"')
            svg = svg.replace(f'href="#{kind}"', f'href="#{own}"').replace(
                f"url(#{kind})", f"url(#{own})"
            )
        parts.append(f'<div class="{theme}">{svg}</div>')
    return "".join(parts)
