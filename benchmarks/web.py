"""Measure the web page: its time beside the bare client's, and 200 uploads at once."""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.environment import environment
from chestct.client import ScanClient
from chestct.contract import MODEL_NAME
from chestct.imaging.prepare import inspect_scan
from serving.local import LocalTriton, LocalTritonError
from training.common.atomic_io import write_json
from training.common.cli import run_command
from training.data.phantom import make_phantom, write_dicom, write_png

logger = logging.getLogger(__name__)

GOAL_FACTOR, GOAL_MS = 1.5, 20.0  # from drop to result, against the bare client
FIRST_VIEW = ("index.html", "style.css", "app.js", "api.js", "results.js", "viewer.js", "panels.js",
              "icon.svg")  # fmt: skip
BOUNDARY = "chestct-benchmark"
START_TIMEOUT_S = 60.0


def measure(
    repository: Path,
    *,
    model: str = MODEL_NAME,
    scans: int = 30,
    uploads: int = 200,
    triton_environment: Path = Path(".venv-triton"),
) -> dict[str, Any]:
    """Times of one scan by three ways, taken in turns, then many uploads at once.

    Args:
        repository: Model repository.
        model: Which of its models.
        scans: Phantoms for each kind of file; each is sent once by each way.
        uploads: Uploads at once.
        triton_environment: Environment of the Triton server.

    Returns:
        `one_scan`: for each kind of file, median milliseconds of the bare client, of the API and of
        the page in a browser (None without Chromium), and the goal; `concurrent`: uploads, HTTP
        statuses, seconds; `first_view`: bytes as they are and packed; `environment`.

    Raises:
        serving.local.LocalTritonError: Triton does not start.
        ValueError: The page does not start or answers something else than the client.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalTriton(repository, environment=triton_environment, models=(model,)) as triton,
        _page(triton.grpc_url, model) as url,
        ScanClient(triton.grpc_url, model) as client,
        _browser(url) as browser,
    ):
        rows = {}
        for kind in ("png", "dicom"):
            paths = _phantoms(Path(folder), kind, scans + 3)
            rows[kind] = _one_scan(client, url, browser, paths)
            logger.info("%s: %s", kind, rows[kind])
        concurrent = _concurrent(url, paths[0].read_bytes(), uploads)
        logger.info("%s", concurrent)
        window = client.metadata.window
    contents = [(files("chestct.web") / "static" / name).read_bytes() for name in FIRST_VIEW]
    return {
        "goal": f"{GOAL_FACTOR} times the bare client plus {GOAL_MS:g} ms",
        "window_hu": [window.center_hu, window.width_hu],
        "one_scan": rows,
        "concurrent": concurrent,
        "first_view": {
            "bytes": sum(map(len, contents)),
            "packed": sum(len(gzip.compress(content)) for content in contents),
        },
        "environment": environment(triton_environment),
    }


def _phantoms(folder: Path, kind: str, number: int) -> list[Path]:
    write, suffix = (write_png, "png") if kind == "png" else (write_dicom, "dcm")
    paths = [folder / f"{seed}.{suffix}" for seed in range(number)]
    for seed, path in enumerate(paths):
        write(make_phantom("normal", seed), path)
    return paths


@contextmanager
def _page(triton_url: str, model: str) -> Iterator[str]:
    """A `chestct web` whose limits leave the measurement alone."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "chestct.cli",
            "web", "--port", "0", "--url", triton_url, "--model", model,
            "--requests-a-minute", "100000",
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "CHESTCT_WEB_TOKEN": ""},
    )  # fmt: skip
    try:
        said = process.stderr.readline() if process.stderr else ""
        found = re.search(r"http://\S+", said)
        if not found:
            raise ValueError(f"chestct web does not start: {said}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while _get(found[0], "/healthz") != 200:
            if time.monotonic() > deadline:
                raise ValueError(f"{found[0]}: no model within {START_TIMEOUT_S:g} s")
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait(timeout=20)


def _connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)


def _get(url: str, path: str) -> int:
    with closing(_connection(url)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
        except OSError:
            return 0
        return answer.status


def _post(connection: http.client.HTTPConnection, name: str, data: bytes) -> tuple[int, bytes]:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    )
    body = head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    connection.request("POST", "/api/classify?images=512", body, {"Content-Type": kind})
    answer = connection.getresponse()
    return answer.status, answer.read()


@contextmanager
def _browser(url: str) -> Iterator[Any]:
    """The page in a Chromium, None where there is none."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        logger.warning("no Chromium: the page itself is not measured")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = opened.new_page()
        tab.goto(url)
        tab.wait_for_selector("#server[data-state=ready]")
        yield tab
        opened.close()


def _one_scan(client: ScanClient, url: str, browser: Any, paths: list[Path]) -> dict[str, Any]:
    times: dict[str, list[float]] = {"client": [], "api": [], "page": []}
    with closing(_connection(url)) as connection:
        for path in paths:
            start = time.perf_counter()
            scan = inspect_scan(path, client.metadata.window)
            expected = client.infer(scan.pixels[None]).predicted_labels[0]
            times["client"].append(1000 * (time.perf_counter() - start))
            start = time.perf_counter()
            status, content = _post(connection, path.name, path.read_bytes())
            (line,) = json.loads(content)["results"]
            times["api"].append(1000 * (time.perf_counter() - start))
            if status != 200 or line.get("label") != expected:
                raise ValueError(f"{path.name}: the page says {line}, the client {expected}")
            if browser is not None:
                times["page"].append(_page_ms(browser, path))
    # The first ones find connections and caches cold.
    medians = {
        name: round(statistics.median(values[3:]), 2) if values else None
        for name, values in times.items()
    }
    allowed = GOAL_FACTOR * float(medians["client"] or 0) + GOAL_MS
    return {
        **{f"{name}_ms": value for name, value in medians.items()},
        "goal_ms": round(allowed, 2),
    }


def _page_ms(browser: Any, path: Path) -> float:
    """The time from drop to result, as the page shows it."""
    clear = browser.locator("#clear")
    if clear.is_visible():
        clear.click()
    browser.set_input_files("#files", str(path))
    shown = browser.locator("#time-facts dd").nth(3)
    shown.wait_for()
    return float(shown.inner_text().split()[0])


def _concurrent(url: str, data: bytes, uploads: int) -> dict[str, Any]:
    def upload(number: int) -> tuple[int, str]:
        with closing(_connection(url)) as connection:
            status, content = _post(connection, f"{number}.dcm", data)
        return status, json.loads(content)["results"][0]["status"] if status == 200 else ""

    start = time.perf_counter()
    with ThreadPoolExecutor(uploads) as pool:
        answers = list(pool.map(upload, range(uploads)))
    seconds = time.perf_counter() - start
    return {
        "uploads": uploads,
        "answers": {
            f"{status} {kind}".strip(): n for (status, kind), n in Counter(answers).items()
        },
        "seconds": round(seconds, 2),
        "uploads_a_second": round(uploads / seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure the page in front of a real Triton."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks web", description=main.__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default=MODEL_NAME, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)

    def work() -> None:
        result = measure(arguments.repository, model=arguments.model)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)

    return run_command(work, errors=(LocalTritonError,))
