"""Render the cards: templates, and HTML pages that need no network, script or image."""

from __future__ import annotations

import functools
import html
from collections import Counter
from pathlib import Path

from jinja2 import Environment
from markdown_it import MarkdownIt
from markdown_it.token import Token

from training.common.markdown import slug
from training.common.templates import template_environment
from training.score.report import class_table, interval, side_by_side


@functools.cache
def templates() -> Environment:
    """The templates of the cards."""
    return template_environment(
        Path(__file__).parent / "templates",
        stated=stated,
        interval=interval,
        class_table=lambda scores: "\n".join(class_table(scores)),
        side_by_side=lambda protocols: "\n".join(side_by_side(protocols)),
    )


def stated(text: str | None) -> str:
    """A statement of the config on one line."""
    return " ".join(text.split()) if text else "Not stated."


def page_from_markdown(text: str, title: str) -> str:
    """The HTML page of a CommonMark text with tables.

    HTML in the text is escaped. Headings get GitHub's anchors, the first cell of each row of a
    table is its heading, and a wide table scrolls by itself. Links between texts (`other.md#part`)
    become links between their pages; a link that leads elsewhere stays text.

    Args:
        text: Markdown.
        title: Of the page, plain text.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable(["image", "autolink"])
    markdown.validateLink = _is_local  # type: ignore[method-assign, assignment]
    tokens, contents = _with_anchors(markdown.parse(text))
    text = markdown.renderer.render(tokens, markdown.options, {})
    page = templates().get_template("page.html.j2")
    return page.render(title=title, contents=contents, text=text)


def _is_local(address: str) -> bool:
    """Whether a link points into this text or to a text in the same folder."""
    file, _, _ = address.partition("#")
    return not file or (file.endswith(".md") and "/" not in file and ":" not in file)


def _with_anchors(tokens: list[Token]) -> tuple[list[Token], list[tuple[str, str]]]:
    """The tokens with anchors and table headings, and anchor and text of each `h2`."""
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
