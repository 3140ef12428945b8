"""The page in a real Chromium, in front of a real Triton."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.triton import end, serve

from .conftest import start_page, stop_page, wait_for_model, write_repository

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("web")]
sync_api = pytest.importorskip("playwright.sync_api")
WAIT_MS = 60_000
FIRST_VIEW_BYTES = 150_000


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium: install Debian's chromium, or name one with CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., sync_api.Page]]:
    """A fresh visit; at its end no script may have failed and nothing may have been forbidden."""
    contexts, complaints, hosts_of = [], [], {}

    def visit(url: str, width: int = 1440, height: int = 900, **options) -> sync_api.Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if "Content Security Policy" in message.text
                else None
            ),
        )
        hosts = {url.split("/")[2]}
        tab.on("request", lambda request: hosts.add(request.url.split("/")[2])
               if request.url.startswith("http") else None)  # fmt: skip
        hosts_of[tab] = hosts
        tab.goto(url)
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert all(len(hosts) == 1 for hosts in hosts_of.values()), hosts_of
    assert complaints == []


def drop(tab, *paths: Path) -> None:
    """As a hand would, by a drop event that carries the files."""
    handle = tab.evaluate_handle("() => new DataTransfer()")
    for path in paths:
        tab.evaluate(
            "([to, name, text]) => to.items.add("
            "new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name))",
            [handle, path.name, base64.b64encode(path.read_bytes()).decode()],
        )
    tab.dispatch_event("body", "drop", {"dataTransfer": handle})


def wait_for_rows(tab, number: int) -> None:
    deadline = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < deadline:
        # Not wait_for_function: it needs eval, which the page forbids.
        rows = tab.locator("#rows tr").all_inner_texts()
        is_waiting = any(word in row for row in rows for word in ("waiting", "sending"))
        if len(rows) == number and not is_waiting and tab.locator("#progress").is_hidden():
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"{tab.locator('#rows tr').count()} rows, expected {number} that are done")


def drawn(tab, canvas: str) -> int:
    """A sum over the pixels of a canvas that tells pictures apart, once it has been drawn again."""
    tab.wait_for_timeout(150)
    return tab.evaluate(
        """(id) => { const c = document.getElementById(id);
        const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let sum = 0;
        for (const value of data) sum = (sum * 31 + value) % 4294967291;
        return sum }""",
        canvas,
    )


def require_accessible(tab) -> None:
    from axe_playwright_python.sync_playwright import Axe

    tab.wait_for_timeout(400)  # colours that are on their way have contrasts of their own
    found = Axe().run(tab).response["violations"]
    serious = [item for item in found if item["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:3000]


def test_dropped_scan_is_shown_with_window_and_evidence(page, open_page, files):
    tab = open_page(page.url)
    require_accessible(tab)
    drop(tab, files["chest.dcm"])
    wait_for_rows(tab, 1)
    label = tab.locator("#label").inner_text()
    bars = dict(
        zip(
            tab.locator("#bars li > span:first-child").all_inner_texts(),
            tab.locator("#bars .value").all_inner_texts(),
            strict=True,
        )
    )
    assert label in bars
    assert tab.locator("#warning").is_hidden()
    assert "run-7" in tab.locator("#model-facts").inner_text()
    assert "FP32" in tab.locator("#model-facts").inner_text()
    assert tab.locator("#time-facts dt").count() == 4
    lung = drawn(tab, "original")
    tab.get_by_role("button", name="Mediastinum").click()
    mediastinum = drawn(tab, "original")
    assert mediastinum != lung
    assert tab.locator("#window-center").input_value() == "40"
    bounds = tab.locator("#original").bounding_box()
    tab.mouse.move(bounds["x"] + 100, bounds["y"] + 100)
    tab.mouse.down()
    tab.mouse.move(bounds["x"] + 160, bounds["y"] + 120, steps=4)
    tab.mouse.up()
    assert tab.locator("#window-width").input_value() == "640"
    assert tab.get_by_role("button", name="Custom").get_attribute("aria-pressed") == "true"
    assert "HU" in tab.locator("#original-readout").inner_text()
    before = drawn(tab, "network")
    tab.locator("#map-opacity").fill("60")
    first = drawn(tab, "network")
    assert first != before
    other = next(name for name in bars if name != label)
    tab.locator("#map-label").select_option(other)
    assert drawn(tab, "network") != first
    tab.locator("#map-opacity").fill("0")
    assert drawn(tab, "network") == before
    tab.mouse.move(bounds["x"] + 100, bounds["y"] + 100)
    tab.mouse.wheel(0, -300)
    zoomed = drawn(tab, "original")
    tab.get_by_role("button", name="Reset view").click()
    assert zoomed != drawn(tab, "original") == lung
    tab.get_by_role("link", name="Model card").click()
    card = tab.locator("#card-body").inner_text()
    assert "0.705 (0.596 to 0.796)" in card
    assert "grouped distinct" in card
    require_accessible(tab)
    tab.get_by_role("button", name="Light").click()
    require_accessible(tab)


@pytest.mark.slow
def test_many_files_bad_ones_among_them_are_listed_sorted_and_saved(page, open_page, files):
    tab = open_page(page.url)
    names = ("chest.png", "other.png", "coloured.png", "torn.png", "notes.txt", "coronal.dcm")
    tab.set_input_files("#files", [*(files[name] for name in names), files["series.zip"]])
    wait_for_rows(tab, 11)
    require_accessible(tab)
    rows = dict(
        tab.evaluate(
            "() => [...document.querySelectorAll('#rows tr')]"
            ".map((row) => [row.cells[0].textContent, row.textContent])"
        )
    )
    assert "error" in rows["notes.txt"]
    assert "refused" in rows["coronal.dcm"]
    assert "out" in rows["coloured.png"]
    tab.locator("#rows").get_by_text("notes.txt").click()
    assert "neither PNG, JPEG nor DICOM" in tab.locator("#refused-text").inner_text()
    assert tab.locator("#label-card").is_hidden()
    tab.locator("#rows").get_by_text("coloured.png").click()
    text = tab.locator("#answer").inner_text()
    assert text.index("coloured: ") < text.index(tab.locator("#label").inner_text())
    assert "not to be relied on" in text
    tab.get_by_role("button", name="Prob.").click()
    values = [float(v.strip("<>%")) for v in tab.locator("#rows td.number").all_inner_texts() if v]
    assert len(values) == 8
    assert values == sorted(values, reverse=True)
    with tab.expect_download() as saving:
        tab.get_by_role("button", name="JSON").click()
    lines = json.loads(Path(saving.value.path()).read_text())
    assert len(lines) == 11
    assert not any("view" in line for line in lines)
    with tab.expect_download() as saving:
        tab.get_by_role("button", name="CSV").click()
    table = list(csv.DictReader(io.StringIO(Path(saving.value.path()).read_text())))
    assert [row["path"] for row in table] == [line["path"] for line in lines]
    best = next(row for row in table if row["status"] == "ok")
    assert float(best[f"probabilities.{best['label']}"]) > 0.25


@pytest.mark.slow
def test_series_is_sorted_by_position_and_stepped_through(page, open_page, files):
    tab = open_page(page.url)
    drop(tab, files["series.zip"])
    wait_for_rows(tab, 5)
    slider = tab.locator("#slice")
    slider.focus()
    tab.keyboard.press("Home")
    assert tab.locator("#slice-text").inner_text() == "1 of 5, 0.0 mm"
    assert tab.locator("#look-title").inner_text() == "series.zip!IM9.dcm"
    first = drawn(tab, "original")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#slice-text").inner_text() == "2 of 5, -5.0 mm"
    assert drawn(tab, "original") != first
    assert "over 5 slices" in tab.locator("#chart-text").inner_text()
    tab.locator("#original").hover()
    tab.mouse.wheel(0, 100)
    tab.wait_for_timeout(200)
    assert tab.locator("#slice-text").inner_text() == "3 of 5, -10.0 mm"
    require_accessible(tab)


@pytest.mark.slow
def test_keyboard_alone_is_enough(page, open_page, files):
    tab = open_page(page.url)
    focused = "() => document.activeElement.id || document.activeElement.textContent"
    reached = []
    for _ in range(8):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate(focused))
    assert {"files", "sample", "theme"} <= set(reached)
    tab.locator("#sample").focus()
    tab.keyboard.press("Enter")
    wait_for_rows(tab, 1)
    tab.set_input_files("#files", [files["chest.png"]])
    wait_for_rows(tab, 2)
    tab.locator("#rows button").first.focus()
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#look-title").inner_text() == "chest.png"
    tab.keyboard.press("ArrowUp")
    assert tab.locator("#look-title").inner_text() == "phantom.dcm"
    tab.locator("#original").focus()
    before = drawn(tab, "original")
    tab.keyboard.press("+")
    zoomed = drawn(tab, "original")
    tab.keyboard.press("ArrowLeft")
    moved = drawn(tab, "original")
    tab.keyboard.press("0")
    assert before == drawn(tab, "original") != zoomed != moved
    assert tab.locator("#announce").inner_text()


@pytest.mark.slow
def test_phone_has_no_sideways_scrolling_and_the_notice_in_sight(page, open_page, files):
    tab = open_page(page.url, 390, 844, has_touch=True, is_mobile=True, reduced_motion="reduce")
    tab.set_input_files("#files", [files["coloured.png"]])
    wait_for_rows(tab, 1)
    assert tab.evaluate("() => document.documentElement.scrollWidth") <= 390
    for name in ("#warning", "#label-card"):
        tab.locator(name).wait_for()
    warning, label = (tab.locator(name).bounding_box() for name in ("#warning", "#label-card"))
    assert warning["y"] < label["y"]
    tab.evaluate("() => scrollTo(0, document.body.scrollHeight)")
    notice = tab.locator(".notice")
    assert notice.inner_text() == "Research use only. Not a medical device."
    assert 0 <= notice.bounding_box()["y"] < 200
    require_accessible(tab)


@pytest.mark.slow
def test_first_view_is_small(page, open_page):
    tab = open_page(page.url)
    tab.wait_for_load_state("networkidle")
    sizes = tab.evaluate(
        "() => ['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))"
        ".map((entry) => entry.decodedBodySize)"
    )
    assert len(sizes) >= 8
    assert sum(sizes) > 50_000
    assert sum(sizes) < FIRST_VIEW_BYTES  # as they are; on the wire they are packed


@pytest.mark.slow
def test_server_that_goes_and_comes_back_is_waited_for(
    small_repository, write_model, triton_environment, open_page, files, tmp_path
):
    """Down, then another contract, then right again at the same address."""
    with serve(small_repository, triton_environment) as triton:
        port = int(triton.grpc_url.rpartition(":")[2])
        page = start_page(triton.grpc_url)
        try:
            wait_for_model(page)
            tab = open_page(page.url)
            drop(tab, files["chest.png"])
            wait_for_rows(tab, 1)
            end(triton)
            wait_for_model(page, is_up=False)
            drop(tab, files["other.png"])
            tab.locator("#trouble").wait_for()
            assert "does not answer" in tab.locator("#trouble").inner_text()
            assert "waiting" in tab.locator("#rows tr").nth(1).inner_text()
            wrong = write_repository(write_model, tmp_path / "wrong", without="training_run")
            with serve(wrong, triton_environment, grpc_port=port):
                told = tab.locator("#trouble-text", has_text="training_run")
                told.wait_for()
                assert "not made for" in tab.locator("#trouble-title").inner_text()
            with serve(small_repository, triton_environment, grpc_port=port):
                wait_for_rows(tab, 2)
                assert tab.locator("#trouble").is_hidden()
                assert tab.locator("#rows tr").nth(1).locator(".tag").inner_text() == "in"
        finally:
            stop_page(page)


@pytest.mark.slow
def test_token_is_asked_for(make_page, open_page, files):
    page = make_page(CHESTCT_WEB_TOKEN="a-token-of-some-length")
    tab = open_page(page.url)
    tab.locator("#token-box").wait_for()
    require_accessible(tab)
    tab.locator("#token").fill("wrong")
    tab.keyboard.press("Enter")
    tab.locator("#token-wrong").wait_for()
    tab.locator("#token").fill("a-token-of-some-length")
    tab.get_by_role("button", name="Go on").click()
    tab.locator("#server[data-state=ready]").wait_for()
    drop(tab, files["chest.png"])
    wait_for_rows(tab, 1)
