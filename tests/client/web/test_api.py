"""The API of `chestct web` in front of a real Triton: answers, limits, and who is answered."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from chestct.client import ScanClient
from chestct.contract import LUNG_WINDOW, NOT_A_MEDICAL_DEVICE
from chestct.imaging.prepare import inspect_bytes, inspect_scan, load_scan
from chestct.imaging.window import apply_window
from tests.client.swelling import dicom_that_swells
from tests.support.waiting import until

from .conftest import (
    CARD,
    FACTS,
    LABELS,
    phantom_dicom,
    phantom_png,
    png_of,
    start_page,
    wait_for_model,
)  # fmt: skip

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("web")]


def ask(page, method, path, body=None, headers=None):
    """Status, headers and body of one request."""
    parts = urlsplit(page.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def multipart(*named, field="files"):
    parts = b"".join(
        f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        .encode() + content + b"\r\n"
        for name, content in named
    )  # fmt: skip
    return parts + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


def classify(page, *named, query="", headers=None):
    body, own = multipart(*named)
    status, _, content = ask(
        page, "POST", "/api/classify" + query, body, {**own, **(headers or {})}
    )
    assert status == 200, content
    return json.loads(content)["results"]


def test_answers_are_those_of_the_command_line(page, small_triton, files):
    names = ("chest.png", "chest.dcm", "notes.txt", "torn.png", "coronal.dcm")
    lines = classify(page, *((name, files[name].read_bytes()) for name in names))
    assert [line["path"] for line in lines] == list(names)
    assert [line["status"] for line in lines] == ["ok", "ok", "error", "error", "error"]
    with ScanClient(small_triton.grpc_url) as client:
        for line in lines[:2]:
            scan = load_scan(files[line["path"]])
            expected = client.infer(scan[None]).probabilities[0]
            np.testing.assert_allclose(list(line["probabilities"].values()), expected, atol=1e-6)
            assert line["model"] == {"name": "chestct", "version": "1", "run": "run-7"}
            assert "view" not in line
    kinds = [line["error"]["type"] for line in lines[2:]]
    assert kinds == ["ScanDecodeError", "ScanDecodeError", "OutOfDomainError"]
    assert "the plane is coronal" in lines[4]["error"]["message"]
    assert [line["error"].get("kind") for line in lines[2:]] == [None, None, "coronal"]
    assert {line["notice"] for line in lines} == {NOT_A_MEDICAL_DEVICE}


def test_records_fit_the_schema_of_the_api(page, files):
    import jsonschema

    api = json.loads(ask(page, "GET", "/openapi.json")[2])
    answer = api["paths"]["/api/classify"]["post"]["responses"]["200"]["content"]
    schema = jsonschema.Draft202012Validator(answer["application/json"]["schema"])
    named = [(name, path.read_bytes()) for name, path in files.items()]
    for query in ("", "?images=64"):
        results = classify(page, *named, query=query)
        schema.validate({"results": results})
        assert any("view" in line for line in results) == bool(query)
    assert not schema.is_valid({"results": [results[0] | {"patient": "Doe"}]})


def test_lines_come_as_lines_when_asked_for(page, files):
    body, headers = multipart(("a.png", files["chest.png"].read_bytes()), ("b.txt", b"x"))
    headers["Accept"] = "application/x-ndjson"
    status, got, content = ask(page, "POST", "/api/classify", body, headers)
    assert (status, got["content-type"]) == (200, "application/x-ndjson")
    assert [json.loads(line)["path"] for line in content.splitlines()] == ["a.png", "b.txt"]


def pixels(raster):
    shape = (raster["height"], raster["width"], raster["channels"])
    found = np.frombuffer(base64.b64decode(raster["data"]), raster["kind"]).reshape(shape)
    return found[..., 0] if shape[2] == 1 else found


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_view_holds_what_the_network_saw_and_the_original(
    page, small_triton, files, interpretation
):
    dataset = dcmread(files["chest.dcm"])
    dataset.PhotometricInterpretation = interpretation
    data = io.BytesIO()
    dataset.save_as(data)
    (line,) = classify(page, ("chest.dcm", data.getvalue()), query="?images=512")
    view = line["view"]
    seen = inspect_bytes(data.getvalue(), "chest.dcm").pixels
    np.testing.assert_array_equal(pixels(view["network"]), seen[..., 0])
    hu = pixels(view["original"])
    assert (hu.dtype, hu.shape) == (np.int16, (256, 256))
    assert hu.min() <= -1000
    assert hu.max() > 300
    top, left, bottom, right = (view["box"][k] for k in ("top", "left", "bottom", "right"))
    box = [round(256 * part) for part in (left, top, right, bottom)]
    grey = apply_window(hu, LUNG_WINDOW)
    assert view["inverted"] is (interpretation == "MONOCHROME1")
    if view["inverted"]:
        grey = 255 - grey
    shown = Image.fromarray(grey).resize((224, 224), 2, box)
    np.testing.assert_array_equal(np.asarray(shown), seen[..., 0])
    with ScanClient(small_triton.grpc_url) as client:
        maps = client.infer(seen[None], with_map=True).activation_map[0]
    found = np.array([view["activation_map"][label] for label in LABELS])
    np.testing.assert_allclose(found.transpose(1, 2, 0), maps, atol=6e-4)


def test_pictures_are_reduced_and_coloured_ones_stay_coloured(page, files):
    coloured = files["coloured.png"].read_bytes()
    (line,) = classify(page, ("c.png", coloured), query="?images=64")
    assert line["in_domain"] is False
    assert line["reasons"] == list(inspect_scan(files["coloured.png"]).reasons)
    original = pixels(line["view"]["original"])
    assert original.shape == (64, 64, 3)
    assert np.ptp(original.astype(int), axis=2).max() > 50
    assert line["view"]["size"] == {"width": 256, "height": 256}
    grey16 = png_of(Image.fromarray(np.tile(np.arange(0, 65536, 256, np.uint16), (200, 1))))
    (line,) = classify(page, ("16.png", grey16), query="?images=300")
    np.testing.assert_array_equal(pixels(line["view"]["original"])[0, ::85], [0, 85, 169, 254])


def test_zip_gives_one_record_a_slice_and_tells_their_places(page, files):
    lines = classify(page, ("series.zip", files["series.zip"].read_bytes()), query="?images=32")
    assert [line["path"] for line in lines] == [f"series.zip!IM{i}.dcm" for i in (5, 6, 7, 8, 9)]
    assert [line["view"]["position_mm"] for line in lines] == [-20, -15, -10, -5, 0]
    (series,) = {line["view"]["series"] for line in lines}
    assert series
    assert series != "1.2.3"


def test_nothing_of_the_patient_comes_back(page):
    data = phantom_dicom(
        "normal", 9, 128, PatientName="SECRET^NAME", PatientID="ID-4711471147",
        StudyInstanceUID="1.2.7777777777", SeriesInstanceUID="1.2.8888888888",
    )  # fmt: skip
    body, headers = multipart(("a.dcm", data), ("bad.dcm", data[:-2000]))
    content = ask(page, "POST", "/api/classify?images=64", body, headers)[2]
    for secret in (b"SECRET", b"4711471147", b"7777777777", b"8888888888"):
        assert secret not in content


def test_model_health_and_metrics(page, files):
    found = wait_for_model(page)
    assert found["labels"] == list(LABELS)
    assert found["card"] == CARD
    assert (found["run"], found["precision"]) == (FACTS.run, "fp32")
    status, _, content = ask(page, "GET", "/healthz")
    assert status == 200
    assert json.loads(content)["latency_ms"] > 0

    def counted():
        text = ask(page, "GET", "/metrics")[2].decode()
        assert "chestct_web_model_up 1.0" in text
        wanted = 'chestct_web_scans_total{kind="ScanDecodeError",status="error"} '
        return float(next((x for x in text.splitlines() if x.startswith(wanted)), "x 0").split()[1])

    before = counted()
    classify(page, ("notes.txt", files["notes.txt"].read_bytes()))
    assert counted() == before + 1


def test_browser_is_told_what_to_forbid(page):
    for path in ("/", "/static/app.js", "/api/model", "/nothing", "/metrics"):
        _, headers, _ = ask(page, "GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        stored = "no-cache" if path in ("/", "/static/app.js") else "no-store"
        assert headers["cache-control"] == stored
    static = Path(__file__).parents[3] / "client/src/chestct/web/static"
    for file in static.iterdir():
        if file.suffix in (".html", ".js", ".css"):
            text = file.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "://" not in text, f"{file.name} names another host"
            assert "innerHTML" not in text


def test_foreign_names_and_foreign_sites_are_refused(page, files):
    status, _, content = ask(page, "GET", "/api/model", headers={"Host": "evil.example"})
    assert (status, json.loads(content)["error"]["type"]) == (421, "HostError")
    body, headers = multipart(("a.png", files["chest.png"].read_bytes()))
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        status, _, _ = ask(page, "POST", "/api/classify", body, {**headers, **foreign})
        assert status == 403
    own = {"Origin": page.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(page, "POST", "/api/classify", body, {**headers, **own})[0] == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"Content-Type": "application/json"}, 415),
        (b"", {"Content-Type": "multipart/form-data"}, 400),
        (multipart()[0], multipart()[1], 400),
        (multipart(("a.png", b"x"), field="other")[0], multipart()[1], 400),
        (multipart(("a.png", b"x" * 99))[0][:-12], multipart()[1], 400),
        (b"no boundary here at all", multipart()[1], 400),
    ],
)
def test_broken_requests_are_told_why(page, body, headers, status):
    got, _, content = ask(page, "POST", "/api/classify", body, headers)
    assert got == status, content
    assert json.loads(content)["error"]["message"]


def test_limits_of_size_rate_token_and_proxy(make_page, files, tmp_path):
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length\n")
    page = make_page(
        "--max-upload-mb", "1", "--requests-a-minute", "1", "--token-file", str(token),
        "--user-header", "X-User",
    )  # fmt: skip
    right = {"Authorization": "Bearer a-token-of-some-length", "X-User": "ann"}
    for wrong in ({}, {"X-User": "ann"}, {**right, "Authorization": "Bearer no"}):
        assert ask(page, "GET", "/api/model", headers=wrong)[0] == 401
    no_user = {"Authorization": right["Authorization"]}
    assert ask(page, "GET", "/api/model", headers=no_user)[0] == 401
    assert ask(page, "GET", "/", headers={})[0] == 200
    until(lambda: ask(page, "GET", "/api/model", headers=right)[0] == 200, "the model")
    body, headers = multipart(("big.png", b"\x89PNG\r\n\x1a\n" + bytes(2**20)))
    # Told by the length alone, and by counting where no length is told.
    promised = {**headers, **right, "Content-Length": str(len(body))}
    status, _, content = ask(page, "POST", "/api/classify", b"", promised)
    assert (status, "1 MiB" in content.decode()) == (413, True)
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert ask(page, "POST", "/api/classify", pieces, {**headers, **right})[0] == 413
    body, headers = multipart(("n.txt", b"x"))
    statuses = [
        ask(page, "POST", "/api/classify", body, {**headers, **right})[0] for _ in range(310)
    ]
    assert statuses[0] == 200
    assert statuses[-1] == 429
    bob = {**headers, **right, "X-User": "bob"}
    assert ask(page, "POST", "/api/classify", body, bob)[0] == 200


def png_header(width, height):
    """A PNG that promises a size and holds nothing."""
    import struct
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_before_they_are_decoded(page):
    (line,) = classify(page, ("huge.png", png_header(60_000, 60_000)))
    assert "60000 x 60000 pixels, expected at most 16 million" in line["error"]["message"]


def test_workers_that_die_or_hang_cost_one_file(make_page, files):
    """Stopped, a worker hangs as a decoder in an endless loop does; killed, it crashes."""
    import signal

    page = make_page(settings="decode_timeout_s=4.0")
    wait_for_model(page)
    good = ("chest.png", files["chest.png"].read_bytes())
    with ThreadPoolExecutor(2) as pool:  # until both have started in full
        list(pool.map(lambda _: classify(page, good), range(2)))
    before = page.workers
    assert len(before) == 2
    for worker in before:
        os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        hung = [
            line for lines in pool.map(lambda _: classify(page, good), range(2)) for line in lines
        ]
    assert {line["error"]["type"] for line in hung} == {"ScanDecodeError"}
    assert all("longer than 4 s" in line["error"]["message"] for line in hung)
    assert not set(before) & set(page.workers)
    for worker in page.workers:
        os.kill(worker, signal.SIGKILL)
    answers = [classify(page, good)[0]["status"] for _ in range(4)]
    assert answers.count("error") <= 2
    assert answers[-1] == "ok"


def test_a_slice_that_needs_too_much_memory_leaves_the_rest_of_the_archive(make_page, files):
    """More than a worker has, between two good ones."""
    page = make_page(settings="worker_memory_bytes=256 * 2**20")
    wait_for_model(page)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("1.png", files["chest.png"].read_bytes())
        packed.writestr("2.dcm", dicom_that_swells(800_000))
        packed.writestr("3.png", files["other.png"].read_bytes())
    lines = classify(page, ("a.zip", archive.getvalue()))
    assert [line["status"] for line in lines] == ["ok", "error", "ok"]
    assert "memory" in lines[1]["error"]["message"]


@pytest.mark.slow
def test_a_slice_at_which_its_worker_dies_leaves_the_rest_of_the_archive(make_page, files):
    page = make_page("--workers", "1", settings="decode_timeout_s=4.0")
    wait_for_model(page)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("1.png", files["chest.png"].read_bytes())
        packed.writestr("2.dcm", b"\0" * 128 + b"DICM" + bytes(200 * 2**20))
        packed.writestr("3.png", files["other.png"].read_bytes())
    (worker,) = page.workers
    lines = classify(page, ("a.zip", archive.getvalue()))
    assert [line["status"] for line in lines] == ["ok", "error", "ok"]
    assert page.workers != [worker]


def test_nothing_is_written_to_disk(page, files, tmp_path_factory):
    """Neither the page nor its workers open a file for writing while they take a large upload."""
    large = b"\x89PNG\r\n\x1a\n" + os.urandom(20 * 2**20)  # above every threshold for spooling
    named = [("large.png", large), ("s.zip", files["series.zip"].read_bytes())]
    for _ in range(4):  # a module that is imported at its first use is compiled and cached
        classify(page, *named)
    body, headers = multipart(*named)
    parts = urlsplit(page.url)
    processes = [page.process.pid, *page.workers]

    def written():
        found = {}
        for process in processes:
            for link in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    flags = int(
                        Path(f"/proc/{process}/fdinfo/{link.name}").read_text().split()[3], 8
                    )
                    if target.startswith("/") and flags & 3 and not target.startswith("/dev/"):
                        found[target] = process
        return found

    def bytes_written():
        return [
            int(Path(f"/proc/{process}/io").read_text().split("write_bytes: ")[1].split()[0])
            for process in processes
        ]

    before = bytes_written()
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        head = f"POST /api/classify HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: {headers['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:-100])
        assert written() == {}  # nearly all of it has come
        connection.sendall(body[-100:])
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            assert written() == {}
    assert b"large.png" in answer
    assert bytes_written() == before
    for worker in page.workers:
        limits = Path(f"/proc/{worker}/limits").read_text()
        (size,) = [line for line in limits.splitlines() if line.startswith("Max file size")]
        assert size.split()[3] == "0"
        environment = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"CHESTCT" not in environment


def test_concurrent_users_never_get_each_others_scans(page):
    """200 uploads at once, every phantom another one, all under the same file name."""
    scans = {}
    for seed in range(20):
        scans[seed] = phantom_png("normal", seed, 128)
    seen = {
        seed: inspect_scan_bytes(data) for seed, data in scans.items()
    }  # fmt: skip
    assert len({seen_.tobytes() for seen_ in seen.values()}) == 20

    def upload(number):
        seed = number % 20
        (line,) = classify(page, ("scan.png", scans[seed]), query="?images=128")
        with Image.open(io.BytesIO(scans[seed])) as picture:
            np.testing.assert_array_equal(pixels(line["view"]["original"]), np.asarray(picture))
        np.testing.assert_array_equal(pixels(line["view"]["network"]), seen[seed])
        # The model's distance is the mean grey of what it was sent.
        assert line["domain_distance"] == pytest.approx(seen[seed].mean(), abs=1e-3)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(upload, range(200)))


def inspect_scan_bytes(data):
    from chestct.imaging.prepare import inspect_bytes

    return inspect_bytes(data, "scan.png").pixels[..., 0]


def test_openapi_description_holds_under_schemathesis(page):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{page.url}/openapi.json")
    assert "example" in json.dumps(schema.raw_schema["paths"]["/api/classify"])
    num_called = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25, deadline=None, database=None, derandomize=True,
            phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def holds(case):
            nonlocal num_called
            num_called += 1
            case.call_and_validate(timeout=30)

        holds()
    assert num_called > 25


def test_missing_extra_is_told_with_its_pip_line(monkeypatch, capsys):
    from chestct.cli.__main__ import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["web"]) == 2
    assert 'pip install "chestct[web]"' in capsys.readouterr().err


def test_address_as_json(closed_port_url):
    command = [sys.executable, "-m", "chestct.cli", "web", "--port", "0", "--url", closed_port_url]
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = json.loads(process.stdout.readline())
        assert said["url"] in process.stderr.readline()
        process.terminate()
        process.communicate(timeout=60)
    assert said == {"url": said["url"], "notice": NOT_A_MEDICAL_DEVICE}


def test_wrong_settings_are_wrong_usage(capsys, tmp_path):
    from chestct.cli.__main__ import main

    (tmp_path / "short").write_text("abc")
    for options in (["--workers", "0"], ["--token-file", str(tmp_path / "short")], ["--url", "x"]):
        assert main(["web", "--port", "0", *options]) == 2
        assert capsys.readouterr().err.startswith("chestct: ")


def test_page_starts_without_a_model_and_says_so(closed_port_url, files):
    from .conftest import stop_page

    page = start_page(closed_port_url)
    try:
        status, headers, content = ask(page, "GET", "/api/model")
        assert (status, json.loads(content)["error"]["type"]) == (503, "ServerUnavailableError")
        assert int(headers["retry-after"]) > 0
        body, own = multipart(("a.png", files["chest.png"].read_bytes()))
        assert ask(page, "POST", "/api/classify", body, own)[0] == 503
        assert ask(page, "GET", "/healthz")[0] == 503
        assert ask(page, "GET", "/")[0] == 200
    finally:
        stop_page(page)
