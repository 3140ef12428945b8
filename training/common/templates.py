"""Jinja2 templates of Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.common.markdown import cell, code, plain, slug


def template_environment(folder: Path, **filters: Callable[..., str]) -> Environment:
    """The templates of a folder; an undefined name in one is an error.

    `*.html.j2` escapes what it is given. `*.md.j2` does not: the filters `plain` and `code` do it
    there, and `cell` after them inside of a table.

    Args:
        folder: Holds the templates.
        **filters: More filters, by name.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "code": code, "cell": cell, "slug": slug, **filters}
    return environment
