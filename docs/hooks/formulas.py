"""MkDocs hook: formulas between `$` or `$$` become MathML, which browsers draw without a script."""

import html
import re

from latex2mathml.converter import convert


def on_page_content(page_html: str, **_: object) -> str:
    """Replace what the extension arithmatex marks as a formula."""
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _mathml, page_html, flags=re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")
