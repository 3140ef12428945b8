"""Builds the edge and client images without a Docker engine, runs them together, and checks them.

buildah and podman do it, on a base that debootstrap makes: Debian with its Python in place of the
official Python image, which a machine without a registry cannot have. Packages come from where this
machine's pip and apt take theirs. Everything is removed at the end, the base is kept in a cache.

    python docker/images_check.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chestct.imaging.prepare import load_scan
from chestct.imaging.sources import list_scans

logger = logging.getLogger("images_check")

CHECKOUT = Path(__file__).resolve().parents[1]
TOOLS = ("buildah", "podman", "debootstrap", "runc", "tar")
BASE = "localhost/chestct-base:bookworm"
BASE_PACKAGES = "ca-certificates,libpython3.11,python3,python3-venv"
IMAGES = {"edge": ("openvino", "onnxruntime", "nvidia-pytriton"), "client": ("tritonclient",)}
USER = "10001"
MAX_EDGE_BYTES = 10**9
STOP_LIMIT_S = 30
SCANS_PER_CLASS = 4


class CheckError(Exception):
    """An image does not do what it should; the message says what was seen."""


def missing_tools() -> list[str]:
    """What this machine lacks for the check, empty if it can run."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    return lacking if os.geteuid() == 0 else [*lacking, "root"]


def run(command: Sequence[object], *, timeout_s: float = 120, **options: Any) -> str:
    """Standard output of a command.

    Raises:
        CheckError: It fails or takes longer than `timeout_s`.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, cwd=CHECKOUT, **options
        )
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"{shlex.join(words)}: not done within {timeout_s:g} s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise CheckError(f"{shlex.join(words)}: ended with {done.returncode}: {said}")
    return done.stdout


def expect(holds: bool, name: str, seen: object) -> None:
    """Log one line for a check that holds.

    Raises:
        CheckError: It does not.
    """
    if not holds:
        raise CheckError(f"{name}: {seen}")
    logger.info("ok: %s: %s", name, seen)


def pip_mounts(folder: Path) -> list[str]:
    """Options of `buildah build` by which pip inside finds packages as pip does here.

    A file `pip.conf` is written to `folder`; it and the local paths that it names are mounted
    while the image is built, and so are the authorities that this machine trusts.
    """
    listed = run([sys.executable, "-m", "pip", "config", "list"])
    settings = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    lines = [f"{key} = " + value.replace("\\n", "\n  ") for key, value in settings.items()]
    (folder / "pip.conf").write_text("[global]\n" + "\n".join(lines) + "\n")
    mounts = {"/etc/pip.conf": folder / "pip.conf"}
    paths = re.findall(r"(?:file://)?(/[^\s'\\]+)", " ".join(settings.values()))
    # An index on this disk names files beside it.
    paths = [str(Path(path).parent) if Path(path).name == "simple" else path for path in paths]
    for path in [*paths, "/etc/ssl/certs/ca-certificates.crt"]:
        if Path(path).exists():
            mounts[path] = Path(path).resolve()
    return [f"--volume={source}:{inside}:ro" for inside, source in mounts.items()]


class Engine:
    """buildah and podman with a storage of their own, which goes with the folder it lies in."""

    def __init__(self, folder: Path) -> None:
        self._storage = [
            f"--root={folder / 'storage'}",
            f"--runroot={folder / 'run'}",
            "--storage-driver=vfs",
        ]
        (folder / "containers.conf").write_text("[containers]\ndefault_ulimits = []\n")
        self._environment = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}
        self.containers: list[str] = []

    def buildah(self, *arguments: object, timeout_s: float = 600) -> str:
        """Standard output of a buildah command."""
        command = ["buildah", *self._storage, *arguments]
        return run(command, timeout_s=timeout_s, env=self._environment)

    def podman(self, *arguments: object, timeout_s: float = 120) -> str:
        """Standard output of a podman command."""
        fixed = ["--runtime=runc", "--cgroup-manager=cgroupfs"]
        command = ["podman", *self._storage, *fixed, *arguments]
        return run(command, timeout_s=timeout_s, env=self._environment)

    def start(self, image: str, *arguments: object, detach: bool = True) -> str:
        """Start a container as production does: read-only root, no capabilities, own /tmp."""
        name = f"chestct-{image}-{len(self.containers)}"
        self.containers.append(name)
        options = [
            *(["--detach"] if detach else ["--rm"]),
            f"--name={name}",
            "--pull=never",
            "--network=host",
            "--ulimit=host",
            "--read-only",
            "--read-only-tmpfs=false",
            "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777,size=256m",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            "--health-interval=disable",  # it needs systemd; the check is called by hand instead
        ]
        said = self.podman("run", *options, *arguments, timeout_s=300)
        return name if detach else said

    def remove(self) -> None:
        """Remove every container that was started."""
        for name in self.containers:
            with contextlib.suppress(CheckError):
                self.podman("rm", "--force", "--ignore", "--time=5", name)


def make_base(cache: Path) -> Path:
    """A tar file of Debian with Python, made once."""
    archive = cache / "base-bookworm.tar"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        root = Path(name) / "root"
        logger.info("making the base with debootstrap")
        run(
            ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root],
            timeout_s=600,
        )
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(root / waste, ignore_errors=True)
        unfinished = Path(name) / "base.tar"
        run(["tar", "--directory", root, "--exclude=./dev/*", "-cf", unfinished, "."])
        unfinished.rename(archive)
    return archive


def build(engine: Engine, image: str, mounts: Sequence[str], version: str, commit: str) -> int:
    """Build one image and return its size in bytes."""
    started_s = time.monotonic()
    engine.buildah(
        "build", "--isolation=chroot", "--format=docker", "--pull-never", "--layers=false",
        f"--build-arg=PYTHON_IMAGE={BASE}", f"--build-arg=VERSION={version}",
        f"--build-arg=COMMIT={commit}", *mounts, f"--file=docker/{image}.Dockerfile",
        f"--tag=localhost/chestct-{image}", ".", timeout_s=900,
    )  # fmt: skip
    [found] = json.loads(engine.podman("image", "inspect", f"localhost/chestct-{image}"))
    labels, size = found["Config"]["Labels"], int(found["Size"])
    logger.info("built %s in %.0f s, %.0f MB", image, time.monotonic() - started_s, size / 1e6)
    told = [labels.get(f"org.opencontainers.image.{key}") for key in ("version", "revision")]
    expect(told == [version, commit], f"{image} says version and commit", told)
    expect(found["Config"]["User"] == f"{USER}:{USER}", f"{image} has a user", USER)
    health = found["HealthCheck" if "HealthCheck" in found else "Healthcheck"]["Test"]
    expect("health" in health, f"{image} has a health check", shlex.join(health[1:]))
    return size


def small_network(num_classes: int) -> Any:
    """A small convolutional network with the inputs and outputs of the contract, untrained."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["scan"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["grey"], ["x0"], perm=[0, 3, 1, 2]),
    ]
    constants = []
    widths = (1, 8, 16, 16, 16)  # four strides of 2: 224 to 14
    for index in range(1, len(widths)):
        shape = (widths[index], widths[index - 1], 3, 3)
        kernel = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        kernel = kernel / 128 if index == 1 else kernel
        constants.append(numpy_helper.from_array(kernel.astype("float32"), f"kernel{index}"))
        nodes += [
            helper.make_node(
                "Conv", [f"x{index - 1}", f"kernel{index}"], [f"y{index}"], strides=[2, 2],
                pads=[1, 1, 1, 1],
            ),
            helper.make_node("Relu", [f"y{index}"], [f"x{index}"]),
        ]  # fmt: skip
    head = random.normal(0, 1, (num_classes, widths[-1], 1, 1)).astype("float32")
    constants += [
        numpy_helper.from_array(head, "head"),
        numpy_helper.from_array(np.array([1, 2]), "places"),
        numpy_helper.from_array(np.array([1]), "classes"),
    ]
    nodes += [
        helper.make_node("Conv", [f"x{len(widths) - 1}", "head"], ["evidence"]),
        helper.make_node("Transpose", ["evidence"], ["activation_map"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["activation_map", "places"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceL2", ["logits", "classes"], ["domain_distance"], keepdims=1),
    ]
    shapes = {
        "probabilities": [num_classes],
        "activation_map": [14, 14, num_classes],
        "domain_distance": [1],
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("scan", TensorProto.UINT8, ["N", 224, 224, 1])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *dims])
            for name, dims in shapes.items()
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def write_small_repository(folder: Path) -> Path:
    """A model repository as `export repository` writes it: ONNX Runtime and OpenVINO, one network.

    The network is untrained, and its parity report is made up: what is checked are the images.
    """
    import onnx

    from chestct.contract import LUNG_WINDOW, ModelMetadata
    from export.publish.repository import publish_variants
    from export.publish.settings import ServeConfig, VariantConfig
    from training.common.atomic_io import sha256_of
    from training.data.phantom import LABELS

    source = folder / "export"
    source.mkdir(parents=True)
    onnx.save(small_network(len(LABELS)), source / "model.onnx")
    facts = ModelMetadata(LABELS, LUNG_WINDOW, 1.0, 1e6, "images-check", "ab" * 32)
    (source / "facts.json").write_text(json.dumps(facts.to_parameters()))
    report = {"holds": True, "onnx_sha256": sha256_of(source / "model.onnx")}
    (source / "parity.json").write_text(json.dumps(report))
    config = ServeConfig(
        variants={
            "fp32": VariantConfig(source),
            "openvino": VariantConfig(source, "openvino"),
        },
        promoted="openvino",
        max_batch_size=8,
        repository=folder / "model_repository",
    )
    failures = publish_variants(config)
    if failures:
        raise CheckError("; ".join(failures))
    return config.repository


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def wait_healthy(engine: Engine, container: str, limit_s: float = 90) -> float:
    """Seconds until the image's own health check holds."""
    started_s = time.monotonic()
    while True:
        try:
            engine.podman("healthcheck", "run", container, timeout_s=60)
            return time.monotonic() - started_s
        except CheckError as error:
            if time.monotonic() - started_s > limit_s:
                logs = engine.podman("logs", container)[-3000:]
                raise CheckError(f"{container} is not healthy: {error}; log: {logs}") from error
            time.sleep(0.5)


def check_container(engine: Engine, container: str, image: str) -> None:
    """User, read-only root and list of parts of a running container."""
    expect(engine.podman("exec", container, "id", "-u").strip() == USER, f"{image} runs as", USER)
    for path in ("/usr/share/x", "/opt/chestct/x", "/x"):
        try:
            engine.podman("exec", "--user=0", container, "touch", path)
        except CheckError as error:
            expect("Read-only file system" in str(error), f"{image} cannot write", path)
        else:
            raise CheckError(f"{image} wrote {path}; expected a read-only root file system")
    name = f"/usr/share/sbom/chestct-{image}.cdx.json"
    parts = json.loads(engine.podman("exec", container, "cat", name))["components"]
    found = {part["name"] for part in parts}
    expect(found >= {*IMAGES[image], "chestct"}, f"{image} lists its parts", len(parts))
    unwanted = found & {"tensorflow", "keras", "mlflow"}
    expect(not unwanted, f"{image} holds nothing of the training", unwanted or "nothing")


def classify(engine: Engine, scans: Path, url: str, model: str) -> list[dict[str, Any]]:
    """The JSON lines of `chestct classify` in the client image."""
    said = engine.start(
        "client", f"--volume={scans}:/scans:ro", f"--env=CHESTCT_URL={url}",
        "localhost/chestct-client", "classify", "/scans", "--json", "--no-series", "--model", model,
        detach=False,
    )  # fmt: skip
    return [json.loads(line) for line in said.splitlines()]


def check_answers(lines: Sequence[dict[str, Any]], scans: Path, onnx_file: Path, name: str) -> None:
    """Hold what came through both images to ONNX Runtime here."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    paths = list(list_scans(scans))
    expected = session.run(["probabilities"], {"scan": np.stack([load_scan(p) for p in paths])})[0]
    rows = dict(zip((str(p.relative_to(scans)) for p in paths), expected, strict=True))
    states = {line["status"] for line in lines}
    expect(len(lines) == len(paths) and states == {"ok"}, f"{name}: scans answered", len(lines))
    errors = [
        np.abs(rows[line["path"].removeprefix("/scans/")] - list(line["probabilities"].values()))
        for line in lines
    ]
    spread = float(np.ptp(expected, axis=0).max())
    expect(spread > 1e-3, f"{name}: probabilities differ between scans by", f"{spread:.3f}")
    worst = float(np.max(errors))
    expect(worst < 1e-4, f"{name}: largest error of a probability", f"{worst:.1e}")


def check_together(engine: Engine, folder: Path) -> None:
    """Serve by the edge image, classify by the client image, then restart and stop the server."""
    from training.data.phantom import write_phantoms

    scans = folder / "scans"
    write_phantoms(scans, per_class={"test": SCANS_PER_CLASS}, seed=5, dicom_fraction=0.5)
    repository = write_small_repository(folder / "small")
    run(["chmod", "-R", "a+rX", folder])
    http, grpc, metrics = free_ports(3)
    url = f"grpc://127.0.0.1:{grpc}"
    edge = engine.start(
        "edge", f"--volume={repository}:/models:ro", f"--env=CHESTCT_URL={url}",
        "localhost/chestct-edge", "--address=127.0.0.1", f"--http-port={http}",
        f"--grpc-port={grpc}", f"--metrics-port={metrics}",
    )  # fmt: skip
    expect(True, "edge is healthy after", f"{wait_healthy(engine, edge):.1f} s")
    check_container(engine, edge, "edge")
    onnx_file = folder / "small" / "export" / "model.onnx"
    check_answers(classify(engine, scans, url, "chestct"), scans, onnx_file, "OpenVINO, gRPC")
    web = f"http://127.0.0.1:{http}"
    lines = classify(engine, scans, web, "chestct_fp32")
    check_answers(lines, scans, onnx_file, "ONNX Runtime, HTTP")
    check_page(engine, url)
    engine.podman("restart", f"--time={STOP_LIMIT_S}", edge)
    expect(True, "edge is healthy again after", f"{wait_healthy(engine, edge):.1f} s")
    check_stop(engine, edge, "edge")


def check_page(engine: Engine, url: str) -> None:
    """Run the client image as it is meant by default, and stop it."""
    [port] = free_ports(1)
    page = engine.start(
        "client", f"--env=CHESTCT_URL={url}", "localhost/chestct-client",
        "web", "--host=127.0.0.1", f"--port={port}",
    )  # fmt: skip
    expect(True, "page is healthy after", f"{wait_healthy(engine, page):.1f} s")
    check_container(engine, page, "client")
    check_stop(engine, page, "page")


def check_stop(engine: Engine, container: str, name: str) -> None:
    """SIGTERM is enough, and it is no failure."""
    started_s = time.monotonic()
    engine.podman("stop", f"--time={STOP_LIMIT_S}", container)
    stopped_s = time.monotonic() - started_s
    [state] = json.loads(engine.podman("inspect", container))
    code = state["State"]["ExitCode"]
    expect(code == 0, f"{name} stopped by SIGTERM in {stopped_s:.1f} s with", f"code {code}")


@contextlib.contextmanager
def own_engine() -> Iterator[tuple[Engine, Path]]:
    """An engine in a temporary folder; containers, images and the folder go at the end."""
    with tempfile.TemporaryDirectory(prefix="chestct-images-") as name:
        engine = Engine(Path(name))
        try:
            yield engine, Path(name)
        finally:
            engine.remove()


def main(argv: Sequence[str] | None = None) -> int:
    """Check the images; 0 if everything holds, 1 if not, 2 where a tool is missing."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cache", type=Path, default=CHECKOUT / ".cache" / "images")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lacking = missing_tools()
    if lacking:
        sys.stderr.write(
            f"images_check: needs {', '.join(lacking)}; on Debian, as root: apt install "
            "buildah podman debootstrap runc\n"
        )
        return 2
    commit = run(["git", "rev-parse", "HEAD"]).strip()
    version = run([sys.executable, "-c", "import chestct; print(chestct.__version__)"]).strip()
    started_s = time.monotonic()
    try:
        with own_engine() as (engine, folder):
            engine.podman("import", make_base(arguments.cache), BASE, timeout_s=300)
            mounts = pip_mounts(folder)
            sizes = {image: build(engine, image, mounts, version, commit) for image in IMAGES}
            size = f"{sizes['edge'] / 1e6:.0f} MB"
            expect(sizes["edge"] < MAX_EDGE_BYTES, "edge is below 1000 MB", size)
            check_together(engine, folder)
    except CheckError as error:
        sys.stderr.write(f"images_check: {error}\n")
        return 1
    logger.info("all holds, %.0f s", time.monotonic() - started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
