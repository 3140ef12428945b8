from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.cards.rendering import page_from_markdown
from training.common.markdown import below, code, plain, slug, table, visible

HOSTILE = [
    "<script>alert(1)</script>.png",
    "a|b`c``d`.png",
    "![x](http://example.org/x.png)",
    "[x](javascript:alert(1))",
    "two\nlines\t.png",
    "*bold* _low_ __lower__ ~~gone~~ a_b_c.png",
    "back\\slash\\|.png",
    "&lt;b&gt; &amp; # 1. $x$",
    "right\u202eleft\udcff.png",
    "` lonely",
    "]( and [ref]: http://example.org",
    "",
]


class Cells(HTMLParser):
    """The text of every cell of the tables, and all tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._inside = True
            self.cells.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self._inside:
            self.cells[-1] += data


def shown(text: str, as_text) -> Cells:
    lines = table(["first", "second"], [[as_text(text), "end"]])
    return Cells(page_from_markdown("\n".join(lines), "t"))


@pytest.mark.parametrize("as_text", [plain, code])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_is_shown_and_obeyed_by_nothing(text, as_text):
    found = shown(text, as_text)
    assert [cell.strip() for cell in found.cells] == ["first", "second", visible(text), "end"]
    assert not {"script", "img", "b", "em", "strong", "del"} & {tag for tag, _ in found.tags}
    assert not [a for tag, a in found.tags if tag == "a"]


@pytest.mark.parametrize("as_text", [plain, code])
@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_name_is_shown_as_it_is(text, as_text):
    found = shown(text, as_text)
    assert [cell.strip() for cell in found.cells] == [
        "first", "second", visible(text).strip(), "end",
    ]  # fmt: skip


def test_ordinary_names_stay_readable_in_the_source():
    assert plain("large.cell.carcinoma") == "large.cell.carcinoma"
    assert plain("official_without_duplicates") == "official_without_duplicates"
    assert code("test/normal/000108 (3).png") == "`test/normal/000108 (3).png`"


def test_headings_move_below_a_level_and_no_deeper_than_six():
    lines = ["# a", "text # b", "##### c", "#d"]
    assert below(lines, 2) == ["### a", "text # b", "###### c", "#d"]
    assert below(["#### a", "##### b"], 2) == ["### a", "#### b"]
    assert below(["text"], 2) == ["text"]


def test_anchors_are_those_of_github():
    assert slug("CLAIM 2024") == "claim-2024"
    assert slug("TRIPOD+AI") == "tripodai"
    assert slug("Data and its faults") == "data-and-its-faults"


def test_page_links_to_texts_beside_it_alone():
    text = "[a](other.md#part) [b](#here) [c](http://x.org) [d](../up.md) [e](javascript:x)"
    links = [a["href"] for tag, a in Cells(page_from_markdown(text, "t")).tags if tag == "a"]
    assert links == ["other.html#part", "#here"]


def test_equal_headings_get_anchors_of_their_own():
    page = page_from_markdown("## a\n\n## a\n\n### a", "t")
    ids = [a["id"] for tag, a in Cells(page).tags if tag in ("h2", "h3")]
    assert ids == ["a", "a-1", "a-2"]


def test_cells_of_a_table_have_headings():
    page = page_from_markdown("## top\n\n" + "\n".join(table(["a", "b"], [["x", 1], ["", 2]])), "t")
    tags = Cells(page).tags
    assert [a.get("scope") for tag, a in tags if tag == "th"] == ["col", "col", "row"]
    assert ("div", {"role": "region", "tabindex": "0", "aria-labelledby": "top"}) in tags


def test_html_in_a_text_is_shown_and_not_obeyed():
    page = page_from_markdown("a <b>x</b>\n\n<script>y</script>\n", "t")
    assert not {"b", "script"} & {tag for tag, _ in Cells(page).tags}
    assert "&lt;script&gt;y&lt;/script&gt;" in page


def test_title_is_escaped():
    assert "<title>a &lt;b&gt;</title>" in page_from_markdown("x", "a <b>")
