"""A page of HTML from the plain Markdown of a bundle's papers: headings, lists, paragraphs, code, bold.

It is not a Markdown reader for others' texts. The subset is ours and small, so that the page follows byte for byte
from its source on every machine, whatever is installed there. No script, nothing loaded, no link.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

_INLINE = re.compile(r"\\(.)|`([^`]*)`|\*\*(.+?)\*\*")
_STYLE = (
    "body{font:16px/1.5 Georgia,serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}"
    "h1,h2{font-family:Helvetica,Arial,sans-serif;line-height:1.2}h1{font-size:1.6rem}"
    "h2{font-size:1.15rem;margin-top:1.8rem;border-bottom:1px solid #ccc;padding-bottom:.2rem}"
    "code{font:.85em Menlo,Consolas,monospace;background:#f3f3f0;overflow-wrap:anywhere}"
    "@page{size:A4;margin:20mm}@media print{body{margin:0;max-width:none}h2{break-after:avoid}}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def plain_page(markdown: str) -> str:
    """The page; its title is the first heading."""
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_inline(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(_blocks(markdown))
        + "\n</body>\n</html>\n"
    )


def _blocks(markdown: str) -> Iterator[str]:
    listed = False
    for line in markdown.splitlines():
        if line.startswith("- ") != listed:
            listed = not listed
            yield "<ul>" if listed else "</ul>"
        if line.startswith("- "):
            yield f"<li>{_inline(line[2:])}</li>"
        elif line.startswith("## "):
            yield f"<h2>{_inline(line[3:])}</h2>"
        elif line.startswith("# "):
            yield f"<h1>{_inline(line[2:])}</h1>"
        elif line:
            yield f"<p>{_inline(line)}</p>"
    if listed:
        yield "</ul>"


def _inline(text: str) -> str:
    """Words with code and bold; a backslash makes the next character a plain one."""
    out, at = [], 0
    for match in _INLINE.finditer(text):
        out.append(html.escape(text[at : match.start()]))
        escaped, code, bold = match.groups()
        if escaped is not None:
            out.append(html.escape(escaped))
        elif code is not None:
            out.append(f"<code>{html.escape(code)}</code>")
        else:
            out.append(f"<strong>{_inline(bold)}</strong>")
        at = match.end()
    return "".join(out) + html.escape(text[at:])
