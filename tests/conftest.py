from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CHECKOUT = Path(__file__).resolve().parents[1]
LABELS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")
# Of what is trained in tests: VGG-16 in all but the number of channels, and 200 times as fast.
NARROW = (16, 16, 16, 16, 24, 24, 24, 32, 32, 32, 32, 32, 32)
BuildOnce = Callable[[str, Callable[[], object]], None]


@dataclass(frozen=True)
class Workspace:
    """A folder with phantoms, their split, and a model trained on them for one epoch."""

    folder: Path
    scans: Path
    split: Path
    model: Path
    cache: Path


@pytest.fixture(scope="session")
def real_scans() -> Path:
    folder = Path(os.environ.get("CHESTCT_REAL_SCANS", CHECKOUT.parent / "shared" / "data"))
    if not (folder / "chest-ct").is_dir():
        pytest.skip("no real scans: name their folder with CHESTCT_REAL_SCANS")
    return folder


@pytest.fixture(scope="session")
def triton_environment() -> Path:
    """Triton's own environment; without it the test is skipped."""
    from serving.local import LocalTritonError, find_installation

    folder = CHECKOUT / ".venv-triton"
    try:
        find_installation(folder)
    except LocalTritonError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and their children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def build_once(common_folder: Path) -> BuildOnce:
    """Calls a function in the worker of pytest-xdist that asks first; the others wait for it."""

    def build_once(name: str, build: Callable[[], object]) -> None:
        with (common_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = common_folder / f"{name}.done"
            if not done.exists():
                build()
                done.touch()

    return build_once


@pytest.fixture(scope="session", autouse=True)
def _own_tracking_store(common_folder: Path, build_once: BuildOnce) -> None:
    """No test writes into the checkout's MLflow store, nor into a server of the environment.

    All workers share one, as they share the model whose run is in it.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    from training.track.mlflow_run import EXPERIMENT

    store = common_folder / "mlflow"
    store.mkdir(exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store / 'mlflow.db'}"
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    artifacts = (store / "artifacts").as_uri()
    build_once("mlflow", lambda: mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts))
    os.environ.pop("DATA", None)


@pytest.fixture(scope="session")
def narrow_widths() -> tuple[int, ...]:
    """The channels of every network that `training fit` trains in tests."""
    return NARROW


@pytest.fixture(scope="session", autouse=True)
def _narrow_training() -> Iterator[None]:
    """`training fit` builds a narrow network: the same graph, contract and code."""
    import training.learn.fit
    from training.network.vgg16 import build_classifier

    with pytest.MonkeyPatch.context() as patch:
        narrow = functools.partial(build_classifier, widths=NARROW)
        patch.setattr(training.learn.fit, "build_classifier", narrow)
        yield


def write_split(scans: Path, file: Path) -> None:
    """The split file of a folder train|valid|test/CLASS/*, every scan its own group."""
    paths = sorted(path for path in scans.rglob("*") if path.is_file())
    rows = ["path,label,split,group"]
    for group, path in enumerate(paths):
        split, label = path.relative_to(scans).parts[:2]
        rows.append(f"{path.relative_to(scans).as_posix()},{label},{split},{group}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n")
    (file.parent / "split.json").write_text(json.dumps({"protocol": "official"}))


@pytest.fixture(scope="session")
def phantoms(common_folder: Path, build_once: BuildOnce) -> Workspace:
    """Phantoms and their split; `model` is where a training would go."""
    from training.data.phantom import write_phantoms

    folder = common_folder / "workspace"
    scans, split = folder / "data" / "scans", folder / "results" / "split" / "split.csv"

    def build() -> None:
        per_class = {"train": 5, "valid": 3, "test": 3}
        write_phantoms(scans, per_class=per_class, seed=3, dicom_fraction=0.4)
        write_split(scans, split)

    build_once("phantoms", build)
    return Workspace(folder, scans, split, folder / "results" / "train", folder / ".cache")


@pytest.fixture(scope="session")
def trained(phantoms: Workspace, build_once: BuildOnce) -> Workspace:
    """The same with a trained model: random convolutions, a fitted head, one epoch of block 5."""
    from training.learn.fit import FitConfig, fit

    config = FitConfig(
        scans=phantoms.scans,
        split=phantoms.split,
        output=phantoms.model,
        cache=phantoms.cache,
        weights="random",
        epochs=1,
        augmented_copies=1,
    )
    build_once("trained", lambda: fit(config))
    return phantoms


@pytest.fixture(scope="session")
def scan_batch(phantoms: Workspace) -> np.ndarray:
    """The test phantoms, uint8 (12, 224, 224, 1)."""
    from chestct.imaging.prepare import load_scan
    from chestct.imaging.sources import list_scans

    return np.stack([load_scan(path) for path in list_scans(phantoms.scans / "test")])


@pytest.fixture(scope="session")
def exported(trained: Workspace, build_once: BuildOnce) -> Path:
    """The ONNX file of the trained phantom model."""
    from export.convert.onnx import OnnxConfig, write_onnx

    file = trained.folder / "results" / "export" / "model.onnx"
    build_once("exported", lambda: write_onnx(OnnxConfig(trained.model, file)))
    return file


# Tiny models that keep the contract's names, for tests of what surrounds a model.
CONFIG = """
name: "NAME"
backend: "onnxruntime"
max_batch_size: 8
input [{ name: "scan" data_type: TYPE_UINT8 dims: [224, 224, 1] }]
output [
  { name: "probabilities" data_type: TYPE_FP32 dims: [3] },
  { name: "activation_map" data_type: TYPE_FP32 dims: [14, 14, 3] },
  { name: "domain_distance" data_type: TYPE_FP32 dims: [1] }
]
instance_group [{ kind: KIND_CPU count: 1 }]
"""
TEXT_CONFIG = """
name: "NAME"
backend: "onnxruntime"
max_batch_size: 4
input [{ name: "text" data_type: TYPE_STRING dims: [2] }]
output [{ name: "result" data_type: RESULT_TYPE dims: [2] }]
"""
TEXT_OUTPUTS = {
    "text": ("TYPE_STRING", TensorProto.STRING),
    "number": ("TYPE_FP32", TensorProto.FLOAT),  # fails on text that is not a number
}


def scan_model(batch: str | int, num_labels: int = 3) -> onnx.ModelProto:
    """Block means of the scan times a kernel; the distance is the mean grey, so it tells scans."""
    kernel = np.random.default_rng(0).normal(0, 0.05, (1, num_labels)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["scan"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["grey"], ["channels_first"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["channels_first"], ["means"], kernel_shape=[16, 16], strides=[16, 16]
        ),
        helper.make_node("Transpose", ["means"], ["places"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["places", "kernel"], ["activation_map"]),
        helper.make_node("ReduceMean", ["activation_map", "place_axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceMean", ["places", "place_axes"], ["domain_distance"], keepdims=0),
    ]
    outputs = {
        "probabilities": [num_labels],
        "activation_map": [14, 14, num_labels],
        "domain_distance": [1],
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("scan", TensorProto.UINT8, [batch, 224, 224, 1])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *dims])
            for name, dims in outputs.items()
        ],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.array([1, 2]), "place_axes"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def text_model(output_type: int) -> onnx.ModelProto:
    """Gives back its strings as another type."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["text"], ["result"], to=output_type)],
        "text",
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["N", 2])],
        [helper.make_tensor_value_info("result", output_type, ["N", 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Writes a tiny model and its config into a repository; gives the path of the ONNX file."""

    def write(
        repository: Path,
        name: str,
        extra: str = "",
        *,
        replace: tuple[str, str] = ("", ""),
        batch: str | int = "N",
        num_labels: int = 3,
    ) -> Path:
        path = repository / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        if name in TEXT_OUTPUTS:
            type_name, output_type = TEXT_OUTPUTS[name]
            model, config = text_model(output_type), TEXT_CONFIG.replace("RESULT_TYPE", type_name)
        else:
            model, config = scan_model(batch, num_labels), CONFIG
            config = config.replace("dims: [3]", f"dims: [{num_labels}]")
            config = config.replace("14, 3]", f"14, {num_labels}]")
        onnx.save(model, path)
        config = config.replace("NAME", name)
        if replace[0]:
            config = config.replace(*replace)
        (repository / name / "config.pbtxt").write_text(config + extra)
        return path

    return write
