"""A real Triton, started, used, hurt and stopped."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http

from chestct.client import ScanClient
from chestct.errors import InferenceTimeoutError
from serving.local import LocalTriton, LocalTritonError, find_installation
from serving.local.__main__ import main
from serving.local.process import free_ports
from tests.support.triton import serve
from tests.support.waiting import until

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("serving")]

CHECKOUT = Path(__file__).parents[2]
OUTPUTS = ("probabilities", "activation_map", "domain_distance")
LIMIT_S = 30.0


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def stubs(server_pid: int) -> dict[str, int]:
    """Model name -> number of its backend process."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(server_pid)}
    return {
        command.split(b"\0")[-3].decode().rsplit("_", 2)[0]: pid
        for pid, command in commands.items()
        if b"triton_python_backend_stub" in command
    }


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def leftovers(run_folder: Path) -> set[Path]:
    """What is there of a server: its run folder, and shared memory, which bears its name."""
    found = {run_folder} if run_folder.exists() else set()
    return found | set(Path("/dev/shm").glob(f"{run_folder.name}*"))


@pytest.fixture
def run_folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The run folder of each server that the test starts, one that fails to start included."""
    made: list[Path] = []
    mkdtemp = tempfile.mkdtemp

    def note(*arguments: Any, **options: Any) -> str:
        made.append(Path(mkdtemp(*arguments, **options)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", note)
    return made


def infer_grpc(address: str, model: str, scans: np.ndarray, outputs: Any = OUTPUTS) -> Any:
    with tritonclient.grpc.InferenceServerClient(address.removeprefix("grpc://")) as client:
        tensor = tritonclient.grpc.InferInput("scan", list(scans.shape), "UINT8")
        tensor.set_data_from_numpy(scans)
        wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
        return client.infer(model, [tensor], outputs=wanted, client_timeout=LIMIT_S)


def infer_http(address: str, model: str, scans: np.ndarray) -> Any:
    with tritonclient.http.InferenceServerClient(address.removeprefix("http://")) as client:
        tensor = tritonclient.http.InferInput("scan", list(scans.shape), "UINT8")
        tensor.set_data_from_numpy(scans)
        wanted = [tritonclient.http.InferRequestedOutput(name) for name in OUTPUTS]
        return client.infer(model, [tensor], outputs=wanted)


@pytest.fixture(scope="session")
def reference(repository: Path) -> onnxruntime.InferenceSession:
    """The same model inside this process."""
    return onnxruntime.InferenceSession(repository / "chestct" / "1" / "model.onnx")


def assert_answer(answer: Any, session: onnxruntime.InferenceSession, scans: np.ndarray) -> None:
    expected = session.run(OUTPUTS, {"scan": scans})
    for name, want in zip(OUTPUTS, expected, strict=True):
        got = answer.as_numpy(name)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("num_scans", [1, 3])
@pytest.mark.parametrize("model", ["chestct", "threads", "openvino"])
def test_answers_equal_onnxruntime(
    server: LocalTriton, reference: Any, scans: np.ndarray, model: str, num_scans: int
) -> None:
    batch = scans[:num_scans]
    assert_answer(infer_grpc(server.grpc_url, model, batch), reference, batch)
    assert_answer(infer_http(server.http_url, model, batch), reference, batch)


def test_model_without_batch_axis_answers(
    server: LocalTriton, reference: Any, scans: np.ndarray
) -> None:
    assert_answer(infer_grpc(server.grpc_url, "unbatched", scans[:1]), reference, scans[:1])


def test_only_the_requested_outputs_come_back(server: LocalTriton, scans: np.ndarray) -> None:
    answer = infer_grpc(server.grpc_url, "chestct", scans[:2], ["domain_distance"])
    assert [output.name for output in answer.get_response().outputs] == ["domain_distance"]


def test_strings_pass_unharmed(server: LocalTriton) -> None:
    words = np.array([["Lunge", "größer 5 µm"], ["", "肺"]], dtype=object)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as client:
        tensor = tritonclient.grpc.InferInput("text", [2, 2], "BYTES")
        tensor.set_data_from_numpy(words)
        answer = client.infer("text", [tensor], client_timeout=LIMIT_S).as_numpy("result")
    assert [[item.decode() for item in row] for row in answer] == words.tolist()


def statistics(server: LocalTriton, model: str) -> Any:
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/stats", timeout=5) as reply:
        return json.load(reply)["model_stats"][0]


def test_concurrent_requests_share_runs_and_stay_apart(
    server: LocalTriton, reference: Any, scans: np.ndarray
) -> None:
    sizes = [1, 3, 2, 1, 4, 1, 2, 3, 1, 1, 2, 1, 3, 1, 2, 4]
    batches = [np.roll(scans, i, axis=1)[i % 4 : i % 4 + size] for i, size in enumerate(sizes)]
    before = statistics(server, "chestct")
    with ThreadPoolExecutor(len(batches)) as pool:
        answers = list(
            pool.map(lambda batch: infer_grpc(server.grpc_url, "chestct", batch), batches)
        )
    # Triton counts after it has answered.
    counted = before["inference_count"] + sum(sizes)
    until(lambda: statistics(server, "chestct")["inference_count"] >= counted, "the statistics")
    after = statistics(server, "chestct")
    for answer, batch in zip(answers, batches, strict=True):
        assert_answer(answer, reference, batch)
    assert after["inference_count"] == counted
    assert after["execution_count"] - before["execution_count"] < len(sizes)


def test_thread_counts_are_honoured(server: LocalTriton) -> None:
    found = stubs(server.pid)
    num_threads = {
        model: len(list(Path(f"/proc/{pid}/task").iterdir())) for model, pid in found.items()
    }
    # onnxruntime calculates in the calling thread and in one fewer of its own.
    assert num_threads["threads"] - num_threads["chestct"] == 4 - 1


def test_openvino_runs_without_onnxruntime_in_its_memory(server: LocalTriton) -> None:
    found = stubs(server.pid)
    libraries = {name: Path(f"/proc/{pid}/maps").read_text() for name, pid in found.items()}
    assert "onnxruntime_pybind11" in libraries["chestct"]
    assert "libopenvino" not in libraries["chestct"]
    assert "libopenvino" in libraries["openvino"]
    assert "onnxruntime_pybind11" not in libraries["openvino"]


def test_peak_memory_is_that_of_the_server_and_its_backend_processes(server: LocalTriton) -> None:
    def peak_mb(pid: int) -> float:
        (line,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(line) * 1024 / 1e6

    pids = [server.pid, *children(server.pid)]
    assert len(pids) == 9  # seven models, one of them with two instances
    before = sum(map(peak_mb, pids))
    assert before - 0.1 <= server.peak_memory_mb() <= sum(map(peak_mb, pids)) + 0.1


def test_every_model_is_checked_by_inference(server: LocalTriton) -> None:
    before = {name: statistics(server, name)["inference_count"] for name, _ in server.models()}
    assert server.check() == []
    whole = {"whole", "whole_patient"}
    assert set(before) == {"chestct", "threads", "openvino", "unbatched", "text", *whole}
    for name in before:  # Triton counts after it has answered
        until(lambda name=name: statistics(server, name)["inference_count"] > before[name], name)


def test_metrics_are_served(server: LocalTriton) -> None:
    with urllib.request.urlopen(server.metrics_url, timeout=5) as reply:
        assert b'nv_inference_count{model="chestct"' in reply.read()


def test_only_the_loopback_address_listens(server: LocalTriton) -> None:
    for url in (server.http_url, server.grpc_url, server.metrics_url):
        port = int(re.findall(r":(\d+)", url)[0])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):  # a server on 0.0.0.0 would answer here
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_admin_apis_need_the_key(server: LocalTriton) -> None:
    request = urllib.request.Request(f"{server.http_url}/v2/repository/index", data=b"{}")
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        urllib.request.urlopen(request, timeout=5)
    refused.value.close()
    request.add_header("admin-key", server.admin_key)
    with urllib.request.urlopen(request, timeout=5) as reply:
        assert len(json.load(reply)) == 7


def client_of(
    server: LocalTriton, protocol: str, model: str = "whole", **options: Any
) -> ScanClient:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    return ScanClient(url, model, **options)


def test_client_gives_the_same_answers_over_both_protocols(
    server: LocalTriton, scans: np.ndarray
) -> None:
    batch = np.concatenate([scans, scans[:3] // 2])  # two pieces, 8 and 3
    with client_of(server, "grpc") as one, client_of(server, "http") as other:
        expected, found = one.infer(batch, with_map=True), other.infer(batch, with_map=True)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    np.testing.assert_array_equal(found.activation_map, expected.activation_map)
    np.testing.assert_array_equal(found.domain_distance, expected.domain_distance)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_threads_share_a_client(server: LocalTriton, scans: np.ndarray, protocol: str) -> None:
    with client_of(server, "grpc") as client:
        expected = client.infer(scans).probabilities
    with client_of(server, protocol) as client, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda i: client.infer(scans[i % 8 :], with_map=True), range(48))
        for place, found in enumerate(answers):
            np.testing.assert_allclose(found.probabilities, expected[place % 8 :], rtol=1e-5)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_late_answer_is_not_taken_for_that_of_the_next_request(
    server: LocalTriton, scans: np.ndarray, protocol: str
) -> None:
    with client_of(server, protocol, "whole_patient") as client:
        expected = client.infer(scans[:3]).probabilities
        with pytest.raises(InferenceTimeoutError, match=r"no answer within 0\.1 s"):
            client.infer(scans[3:6], timeout_s=0.1)
        found = client.infer(scans[:3]).probabilities
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def small_repository(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Path:
    """One model that starts quickly."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder, "chestct")
    return folder


@pytest.fixture(scope="module")
def patient_repository(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Path:
    """One model whose requests wait a second for company."""
    folder = tmp_path_factory.mktemp("patient")
    write_model(folder, "chestct", "dynamic_batching { max_queue_delay_microseconds: 1000000 }")
    return folder


@pytest.fixture(scope="module")
def mortal_whole(repository: Path, environment: Path) -> Iterator[LocalTriton]:
    """A server that tests may restart; of all models in its repository it loads one."""
    with serve(repository, environment, models=["whole"]) as running:
        yield running


def test_only_the_named_models_are_loaded(mortal_whole: LocalTriton) -> None:
    assert mortal_whole.models() == [("whole", "1")]
    assert mortal_whole.check() == []
    mortal_whole.restart()
    assert mortal_whole.models() == [("whole", "1")]
    assert list(stubs(mortal_whole.pid)) == ["whole"]


def test_named_model_that_is_unloaded_is_missed(mortal_whole: LocalTriton) -> None:
    url = f"{mortal_whole.http_url}/v2/repository/models/whole"
    for action, expected in (("unload", ["model 'whole' is not ready"]), ("load", [])):
        request = urllib.request.Request(f"{url}/{action}", data=b"{}")
        request.add_header("admin-key", mortal_whole.admin_key)
        urllib.request.urlopen(request, timeout=LIMIT_S).close()
        until(lambda want=expected: mortal_whole.check() == want, f"{action} seen")


def test_named_model_that_is_not_there(repository: Path, environment: Path) -> None:
    server = LocalTriton(repository, environment=environment, models=["whole", "chestct_int4"])
    expected = (
        f"{repository} holds no chestct_int4; its models are chestct, openvino, text, threads, "
        "unbatched, whole"
    )
    with pytest.raises(LocalTritonError, match=re.escape(expected)):
        server.start()
    with pytest.raises(LocalTritonError, match="does not run"):
        server.peak_memory_mb()


def test_named_model_that_does_not_load_is_told_with_its_reason(
    tmp_path: Path, environment: Path, write_model: Callable[..., Path]
) -> None:
    write_model(tmp_path, "sound")
    openvino = 'cpu_execution_accelerator [{ name: "openvino" }]'
    extra = f"optimization {{ execution_accelerators {{ {openvino} }} }}"
    write_model(tmp_path, "dims", extra, replace=("dims: [3]", "dims: [4]"))
    server = LocalTriton(tmp_path, environment=environment, models=["dims"])
    expected = "model 'dims', tensor 'probabilities': the model expects 2 dimensions"
    with pytest.raises(LocalTritonError, match=expected):
        server.start()


@pytest.fixture(scope="module")
def mortal(small_repository: Path, environment: Path) -> Iterator[LocalTriton]:
    """A server that tests may kill, under watch."""
    with serve(small_repository, environment) as running:
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(running.watch, stop, period_s=0.2)
            yield running
            stop.set()
            watching.result(LIMIT_S)


@pytest.mark.parametrize("victim", ["backend process", "server"])
def test_killed_process_is_noticed_and_the_server_restarted(
    mortal: LocalTriton, reference: Any, scans: np.ndarray, victim: str
) -> None:
    urls, old_pid = (mortal.grpc_url, mortal.http_url), mortal.pid
    old_stub = stubs(old_pid)["chestct"]
    os.kill(old_pid if victim == "server" else old_stub, signal.SIGKILL)

    def answers() -> Any:
        with contextlib.suppress(tritonclient.grpc.InferenceServerException):
            return mortal.pid != old_pid and infer_grpc(mortal.grpc_url, "chestct", scans)
        return None

    assert_answer(until(answers, "an answer after the restart"), reference, scans)
    assert (mortal.grpc_url, mortal.http_url) == urls
    assert not alive(old_pid)
    assert not alive(old_stub)
    until(lambda: mortal.check() == [], "a sound check")  # HTTP opens after gRPC


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_goes_on_over_a_restart(
    mortal_whole: LocalTriton, scans: np.ndarray, protocol: str
) -> None:
    """Calls wait for the server, by default for a minute."""
    with client_of(mortal_whole, protocol) as client, ThreadPoolExecutor(1) as pool:
        expected = client.infer(scans).probabilities
        restart = pool.submit(mortal_whole.restart)
        while not restart.done():
            np.testing.assert_array_equal(client.infer(scans).probabilities, expected)
        restart.result()
        np.testing.assert_array_equal(client.infer(scans).probabilities, expected)


def test_watch_gives_up_on_a_server_that_cannot_restart(
    tmp_path: Path,
    environment: Path,
    write_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.local.server.RESTART_LIMIT", 1)
    path = write_model(tmp_path, "chestct")
    with LocalTriton(tmp_path, environment=environment, exit_timeout_s=5) as server:
        path.write_bytes(b"not a model")
        os.kill(server.pid, signal.SIGKILL)
        expected = "failed again after 1 restarts within 300 s: the server process has ended"
        with pytest.raises(LocalTritonError, match=expected):
            server.watch(threading.Event(), period_s=0.1)


def run_main(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serving", "local", *arguments],
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def foreground(
    patient_repository: Path, environment: Path
) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """`python -m serving local` once it is ready, its gRPC address, and the server's number."""
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    process = run_main(f"--repository={patient_repository}", f"--environment={environment}", *ports)
    with process:
        timer = threading.Timer(LIMIT_S, process.kill)
        timer.start()
        try:
            lines = iter(process.stderr.readline, "")
            address = next(m[1] for line in lines if (m := re.search(r"at (grpc://\S+)", line)))
            timer.cancel()
            (guard,) = children(process.pid)
            (server,) = children(guard)
            yield process, address, server
        finally:
            timer.cancel()
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_server_finishes_requests_in_flight_and_exits_with_0(
    foreground: tuple[subprocess.Popen[str], str, int],
    reference: Any,
    scans: np.ndarray,
    number: signal.Signals,
) -> None:
    process, address, server = foreground
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            pending = [
                pool.submit(infer_grpc, address, "chestct", scans[:1]),
                pool.submit(infer_grpc, address, "chestct", scans[1:3]),
            ]
            time.sleep(0.3)  # both wait in the queue, which holds them for a second
            if not any(request.done() for request in pending):  # unless this process was held up
                break
        else:
            pytest.fail("no request was in flight")
        process.send_signal(number)
        assert_answer(pending[0].result(LIMIT_S), reference, scans[:1])
        assert_answer(pending[1].result(LIMIT_S), reference, scans[1:3])
    assert process.wait(LIMIT_S) == 0
    assert "Traceback" not in process.stderr.read()
    assert not alive(server)


def test_nothing_survives_a_killed_parent(
    foreground: tuple[subprocess.Popen[str], str, int],
) -> None:
    process, _, server = foreground
    run_directory = next(
        argument.decode().split("=")[1].removesuffix("/backends")
        for argument in Path(f"/proc/{server}/cmdline").read_bytes().split(b"\0")
        if argument.startswith(b"--backend-directory=")
    )
    processes = [server, *children(server), *children(process.pid)]
    assert len(leftovers(Path(run_directory))) > 1  # the folder and shared memory
    process.kill()
    until(lambda: not any(map(alive, processes)), "the end of the server and its processes")
    until(lambda: not leftovers(Path(run_directory)), "the guard's tidying up")


def test_stopping_leaves_nothing(small_repository: Path, environment: Path) -> None:
    server = LocalTriton(small_repository, environment=environment, exit_timeout_s=5)
    with server:
        pid, run_folder = server.pid, server.log_path.parent
        assert b"chestct" in server.log_path.read_bytes()
        assert len(leftovers(run_folder)) > 1  # the folder and shared memory
    assert not alive(pid)
    assert leftovers(run_folder) == set()
    server.stop()
    assert server.check() == ["the server process has ended"]


def test_given_port_in_use_is_named(small_repository: Path, environment: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = LocalTriton(small_repository, grpc_port=port, environment=environment)
        expected = f"gRPC port {port} on 127.0.0.1: Address already in use"
        with pytest.raises(LocalTritonError, match=expected):
            server.start()


def test_equal_ports_are_refused(small_repository: Path, environment: Path) -> None:
    server = LocalTriton(small_repository, http_port=8, grpc_port=8, environment=environment)
    with pytest.raises(LocalTritonError, match="expected three different ones"):
        server.start()


def test_port_taken_between_choice_and_bind_is_chosen_again(
    small_repository: Path, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        choices = iter([[taken, *free_ports(2)], free_ports(3)])
        monkeypatch.setattr("serving.local.server.free_ports", lambda _: next(choices))
        with serve(small_repository, environment) as server:
            assert str(taken) not in server.http_url
            assert server.check() == []


def test_models_that_do_not_load_are_named_with_their_reason(
    tmp_path: Path,
    environment: Path,
    write_model: Callable[..., Path],
    run_folders: list[Path],
) -> None:
    write_model(tmp_path, "corrupt").write_bytes(b"not a model")
    write_model(tmp_path, "fixed", batch=1)
    write_model(tmp_path, "dims", replace=("dims: [3]", "dims: [4]"))
    write_model(tmp_path, "name", replace=('"scan"', '"image"'))
    write_model(tmp_path, "type", replace=("TYPE_UINT8", "TYPE_INT8"))
    mode = 'parameters { key: "execution_mode" value { string_value: "3" } }'
    write_model(tmp_path, "mode", mode)
    warp = (
        'optimization { execution_accelerators { cpu_execution_accelerator [{ name: "warp" }] } }'
    )
    write_model(tmp_path, "accelerator", warp)
    write_model(tmp_path, "syntax", "{{{")
    write_model(tmp_path, "sound")
    with pytest.raises(LocalTritonError) as failed, LocalTriton(tmp_path, environment=environment):
        pass
    reasons = str(failed.value)
    assert "\n" not in reasons
    for expected in (
        "failed to load 'corrupt' version 1: [ONNXRuntimeError] : 7 : INVALID_PROTOBUF",
        "'fixed' version 1: model 'fixed', tensor 'scan': for the model to support batching the "
        "shape should have at least 1 dimension and the first dimension must be -1; but shape "
        "expected by the model is [1,224,224,1]",
        "model 'dims', tensor 'probabilities': the model expects 2 dimensions (shape [-1,3]) but",
        "'name' version 1: unexpected inference input 'image', allowed inputs are: scan",
        "configuration expects datatype TYPE_INT8 for input 'scan', model provides TYPE_UINT8",
        "'mode' version 1: Invalid configuration value provided. Expected values for  "
        "execution_mode are 0 or 1 but got 3 .",
        "'accelerator' version 1: unknown Execution Accelerator 'warp' is requested",
        "Poll failed for model directory 'syntax'",
    ):
        assert expected in reasons
    assert "sound" not in reasons
    (run_folder,) = run_folders
    assert leftovers(run_folder) == set()


def test_model_that_does_not_answer_is_named_though_triton_is_ready(
    tmp_path: Path, environment: Path, write_model: Callable[..., Path]
) -> None:
    write_model(tmp_path, "sound")
    write_model(tmp_path, "number")  # an empty string, the zero of its input, is not a number
    server = LocalTriton(tmp_path, environment=environment, exit_timeout_s=5)
    with pytest.raises(LocalTritonError, match="Triton started, but ") as failed, server:
        pass
    reasons = str(failed.value)
    assert "model 'number' version 1 answers with HTTP 500" in reasons
    assert "sound" not in reasons
    assert not alive(server.pid)


def test_full_disk_is_one_clear_error(
    small_repository: Path,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_folders: list[Path],
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy", no_space)
    with pytest.raises(LocalTritonError, match="No space left on device"):
        LocalTriton(small_repository, environment=environment).start()
    (run_folder,) = run_folders
    assert leftovers(run_folder) == set()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "holds no models"),
        (lambda folder: (folder / "empty").mkdir(parents=True), "holds no models"),
    ],
)
def test_missing_models_are_one_clear_line(
    tmp_path: Path,
    environment: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    expected: str,
) -> None:
    repository = tmp_path / "repository"
    make(repository)
    assert run_main_here(f"--repository={repository}", f"--environment={environment}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(repository) in line
    assert expected in line


def run_main_here(*arguments: str) -> int:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main(list(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_missing_environment_names_the_remedy(tmp_path: Path) -> None:
    expected = "no Python environment there. Run `make environments`"
    with pytest.raises(LocalTritonError, match=expected):
        find_installation(tmp_path)


def test_environment_without_triton_is_refused(tmp_path: Path) -> None:
    environment = tmp_path / "bare"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=LIMIT_S
    )
    expected = "lacks nvidia-pytriton, numpy, onnxruntime. Run `make environments`"
    with pytest.raises(LocalTritonError, match=expected):
        find_installation(environment)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"python": "3.13"}, r"has Python 3.13, expected 3.11 or 3.12"),
        ({"packages": {"numpy": "2.1.0"}}, r"has numpy 2.1.0, .* expected numpy < 2"),
        ({"library_folder": None}, r"libpython3.11.so.1.0 is not on this machine"),
    ],
)
def test_environment_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    report = {
        "python": "3.11",
        "packages": {"numpy": "1.26.4"},
        "site_packages": "/",
        "library": "libpython3.11.so.1.0",
        "library_folder": "",
        **change,
    }
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(report)}\nEND\n")
    python.chmod(0o755)
    with pytest.raises(LocalTritonError, match=expected):
        find_installation(tmp_path)


def test_other_platforms_are_sent_to_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(LocalTritonError, match=r"Linux on aarch64: .* nvcr.io/nvidia/tritonserver"):
        find_installation(tmp_path)
