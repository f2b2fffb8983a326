"""Writes formulas as MathML at build time: browsers draw it themselves, without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves: inline in a span, a line of its own in a div.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Return the page with each LaTeX formula replaced by MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    formula: str = convert(html.unescape(found[2]).strip(), display=display)
    return formula
