"""Markdown in which a user's text stays text: names of files and classes format nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

DEEPEST = 6  # levels of headings in Markdown and HTML


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; a `|` in a cell stays a character of the cell."""
    return [f"| {' | '.join(map(cell, row))} |" for row in (head, ["---"] * len(head), *rows)]


def cell(text: object) -> str:
    """Markdown as one cell of a table: a `|` stays a character of the cell."""
    return str(text).replace("|", r"\|")


def plain(text: object) -> str:
    """`text` as words of a sentence, a heading or a cell."""
    # Within a word an underscore emphasises nothing (CommonMark 0.31, section 6.2).
    return re.sub(r"[\\`*\[\]<>&~#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text))


def code(text: object) -> str:
    """`text` as inline code, whatever backticks it holds (CommonMark 0.31, section 6.1)."""
    shown = visible(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    # One space on both sides is taken away again.
    padding = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def visible(text: object) -> str:
    """`text` on one line: control characters and the like as their escapes."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii")
        for sign in str(text)
    )


def below(lines: Sequence[str], level: int) -> list[str]:
    """The same lines with all headings moved so that the highest is just below `level`."""
    heading = re.compile(r"^#+(?= )")
    levels = [len(match[0]) for line in lines if (match := heading.match(line))]
    deeper = level + 1 - min(levels, default=0)
    return [
        heading.sub(lambda marks: "#" * min(DEEPEST, len(marks[0]) + deeper), line)
        for line in lines
    ]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it: `What it is worth` is `what-it-is-worth`."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
