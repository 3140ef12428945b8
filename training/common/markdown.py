"""Markdown helpers: tables, escaped text, inline code, headings and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

DEEPEST = 6  # levels of headings in Markdown and HTML


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(map(cell, row))} |" for row in (head, ["---"] * len(head), *rows)]


def cell(text: object) -> str:
    """Escape `|`, so that Markdown stays within one cell of a table."""
    return str(text).replace("|", r"\|")


def plain(text: object) -> str:
    """Escape text for a sentence, a heading or a cell, so that it formats nothing."""
    # Within a word an underscore emphasises nothing (CommonMark 0.31, section 6.2).
    return re.sub(r"[\\`*\[\]<>&~#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text))


def code(text: object) -> str:
    """Inline code, with a fence longer than any in `text` (CommonMark 0.31, section 6.1)."""
    shown = visible(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    # Renderers strip one space on both sides.
    padding = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def visible(text: object) -> str:
    """Escape unprintable characters, line breaks among them."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii")
        for sign in str(text)
    )


def below(lines: Sequence[str], level: int) -> list[str]:
    """Demote all headings so that the highest is just below `level`."""
    heading = re.compile(r"^#+(?= )")
    levels = [len(match[0]) for line in lines if (match := heading.match(line))]
    deeper = level + 1 - min(levels, default=0)
    return [
        heading.sub(lambda marks: "#" * min(DEEPEST, len(marks[0]) + deeper), line)
        for line in lines
    ]


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: `shortcut-checks` for `Shortcut checks`."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
