"""A Markdown text as one HTML page that needs nothing else: no network, no script, no picture."""

from __future__ import annotations

import html
from collections import Counter

from markdown_it import MarkdownIt
from markdown_it.token import Token

from training.common.markdown import slug


def page_from_markdown(text: str, title: str) -> str:
    """The whole page of a CommonMark text with tables.

    HTML in the text is shown, not obeyed. Headings get the anchors of GitHub, the first cell of
    each row of a table is its heading, a wide table scrolls by itself, and links between texts
    (`other.md#part`) become links between their pages. A link that leads elsewhere stays text.

    Args:
        text: Markdown.
        title: Of the page, plain text.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable(["image", "autolink"])
    markdown.validateLink = _leads_within  # type: ignore[method-assign, assignment]
    tokens, contents = _with_anchors(markdown.parse(text))
    items = "".join(
        f'<li><a href="#{anchor}">{html.escape(heading)}</a></li>' for anchor, heading in contents
    )
    parts = {
        "@TITLE@": html.escape(title),
        "@CONTENTS@": items,
        "@TEXT@": markdown.renderer.render(tokens, markdown.options, {}),
    }
    page = PAGE
    for mark, part in parts.items():
        page = page.replace(mark, part, 1)
    return page


def _leads_within(address: str) -> bool:
    """Whether a link leads to a part of this text or of one beside it."""
    file, _, _ = address.partition("#")
    return not file or (file.endswith(".md") and "/" not in file and ":" not in file)


def _with_anchors(tokens: list[Token]) -> tuple[list[Token], list[tuple[str, str]]]:
    """The tokens ready for a page, and anchor and text of each heading of the second level."""
    found: list[Token] = []
    contents: list[tuple[str, str]] = []
    taken: Counter[str] = Counter()
    anchor, in_body, is_first = "", False, False
    for index, token in enumerate(tokens):
        inner = tokens[index + 1] if index + 1 < len(tokens) else None
        if token.type == "heading_open" and inner is not None:
            heading = "".join(child.content for child in inner.children or ())
            name = slug(heading)
            anchor = f"{name}-{taken[name]}" if taken[name] else name
            taken[name] += 1
            token.attrSet("id", anchor)
            if token.tag == "h2":
                contents.append((anchor, heading))
        elif token.type == "table_open":
            region = f'<div role="region" tabindex="0" aria-labelledby="{html.escape(anchor)}">\n'
            found.append(Token("html_block", "", 0, content=region))
        elif token.type in ("tbody_open", "tbody_close"):
            in_body = token.type == "tbody_open"
        elif token.type == "tr_open":
            is_first = in_body
        elif token.type == "th_open":
            token.attrSet("scope", "col")
        elif token.type == "td_open" and is_first:
            if inner is not None and inner.content:
                token.tag = tokens[index + 2].tag = "th"
                token.attrSet("scope", "row")
            is_first = False
        for child in token.children or ():
            if child.type == "link_open":
                file, mark, part = str(child.attrs["href"]).partition("#")
                child.attrSet("href", file.removesuffix(".md") + ".html" * bool(file) + mark + part)
        found.append(token)
        if token.type == "table_close":
            found.append(Token("html_block", "", 0, content="</div>\n"))
    return found, contents


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 75rem; margin: 0 auto; padding: 1.5rem }
main > p, main > ul, main > blockquote { max-width: 50rem }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.6em 0 .5em }
h2 { border-bottom: 1px solid #767676 }
a { color: #0645ad }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: .4rem solid #b30000;
  font-weight: 600 }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
nav ul { columns: 16rem; padding-left: 1.2rem }
div[role="region"] { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border: 1px solid #bbb }
thead th { background: #eee }
tbody th { font-weight: 600 }
@media print {
  body { font-size: 9pt; max-width: none; padding: 0 }
  nav { display: none }
  a { color: inherit; text-decoration: none }
  div[role="region"] { overflow: visible }
  table { font-size: 8pt; width: 100% }
  tr { break-inside: avoid }
  h2, h3, h4 { break-after: avoid }
}
</style>
</head>
<body>
<nav aria-label="Contents"><ul>@CONTENTS@</ul></nav>
<main>
@TEXT@</main>
</body>
</html>
"""
