"""Prune VGG-16 to narrower layers: choose and remove channels, refit the kernels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.network.vgg16 import (
    GREY_CENTER,
    VGG_MEAN_BGR,
    build_classifier,
    convolution_names,
    widths_of,
)

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Scans = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

CHUNK = 16  # scans that pass a layer at once


def pruned(
    model: keras.Model,
    widths: tuple[int, ...],
    scans: Scans,
    *,
    places: int = 64,
    ridge: float = 1e-3,
    seed: int = 0,
) -> keras.Model:
    """A classifier with `widths` channels that answers much as `model` does, before any training.

    Layer by layer, from the scan to the head (He et al. 2017, "Channel Pruning for Accelerating
    Very Deep Neural Networks", section 3; Luo et al. 2017, ThiNet):

    1. of the channels that enter a layer those are kept that best explain what it makes of them
       (`chosen_channels`); the others vanish, with the kernels that made them;
    2. kernels and biases of the layer are fitted anew by least squares, so that from what the
       narrow network really feeds it, it gives what the wide layer gives: errors of earlier
       layers are made good as far as they can be.

    The first layer reads one grey channel; the three that the wide network tiles are folded.
    The domain is not carried over: its features are others. Fit it again.

    Args:
        model: From `build_classifier`, trained.
        widths: Output channels of the 13 convolutions, none greater than in `model`.
        scans: uint8 (N, 224, 224, 1), training scans; a hundred are enough.
        places: Places sampled in each scan for the fit of a layer.
        ridge: Pull towards the wide kernels, as a fraction of the mean input energy.
        seed: Of the sampled places.

    Raises:
        ValueError: A width greater than the layer has.
    """
    before = widths_of(model)
    if len(widths) != len(before) or any(w > b for w, b in zip(widths, before, strict=True)):
        raise ValueError(f"widths are {widths}; expected 13 numbers, at most {before}")
    narrow = build_classifier(model.output["probabilities"].shape[-1], widths=widths)
    rng = np.random.default_rng(seed)
    kernel, bias = grey_kernel(model)
    wide_maps = narrow_maps = scans.astype(np.float32) - GREY_CENTER
    kept = np.arange(1)
    names = [*convolution_names(), "activation_map"]
    for index, name in enumerate(tqdm(names, "layers refitted", disable=None)):
        if index:
            kernel, bias = model.get_layer(name).get_weights()
        if name.endswith("conv1") and index:
            wide_maps, narrow_maps = _pooled(wide_maps), _pooled(narrow_maps)
        size = kernel.shape[0]
        rows, columns = _sampled_places(wide_maps.shape, places, rng)
        wanted = _patches(wide_maps, rows, columns, size) @ kernel.reshape(-1, kernel.shape[-1])
        fitted, new_bias = _refitted(
            _patches(narrow_maps, rows, columns, size),
            wanted + bias,
            kernel[:, :, kept].reshape(-1, kernel.shape[-1]),
            ridge,
        )
        fitted = fitted.reshape(size, size, len(kept), -1)
        if name == "activation_map":
            narrow.get_layer(name).set_weights([fitted, new_bias])
            break
        wide_maps = _convolved(wide_maps, kernel, bias)
        after = model.get_layer(names[index + 1]).get_weights()[0]
        kept = chosen_channels(wide_maps, after, widths[index], rng)
        fitted, new_bias = fitted[..., kept], new_bias[kept]
        narrow.get_layer(name).set_weights([fitted, new_bias])
        narrow_maps = _convolved(narrow_maps, fitted, new_bias)
    return narrow


def chosen_channels(maps: Floats, kernel: Floats, count: int, rng: np.random.Generator) -> Indices:
    """The `count` channels of `maps` that together explain most of what `kernel` makes of them.

    Each channel is scaled by the norm of the kernels that read it; then channels are taken by
    pivoting QR: the next is always the one with most variance that those before do not explain
    (Golub 1965). Constant parts do not count, biases take them.

    Args:
        maps: float32 (N, H, W, C), after the ReLU.
        kernel: float32 (h, w, C, K) of the layer that reads them.
        count: Channels to keep, at most C.
        rng: Draws the places that are looked at.

    Returns:
        Their indices, sorted.
    """
    from scipy.linalg import qr

    flat = maps.reshape(-1, maps.shape[-1])
    seen = flat[rng.integers(len(flat), size=min(len(flat), 20_000))].astype(np.float64)
    scaled = (seen - seen.mean(axis=0)) * np.sqrt((kernel.astype(np.float64) ** 2).sum((0, 1, 3)))
    # The pivots of X and of the triangular factor of X are the same, and the latter is small.
    order = qr(np.linalg.qr(scaled, mode="r"), mode="r", pivoting=True)[1]
    return np.sort(order[:count])


def grey_kernel(model: keras.Model) -> tuple[Floats, Floats]:
    """Kernel and bias of the first layer for one channel, the grey value minus `GREY_CENTER`.

    sum_c w_c (x - m_c) = (sum_c w_c) (x - 128) + sum_c w_c (128 - m_c); exact but for the outermost
    pixels, where zero padding stands for the mean of each channel.
    """
    kernel, bias = model.get_layer("block1_conv1").get_weights()
    if kernel.shape[2] == 1:
        return kernel, bias
    means = np.array(VGG_MEAN_BGR, np.float32)
    return (
        kernel.sum(axis=2, keepdims=True),
        bias + ((GREY_CENTER - means) @ kernel.sum(axis=(0, 1))),
    )


def _sampled_places(
    shape: tuple[int, ...], places: int, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """Rows and columns int64 (N, places)."""
    size = (shape[0], places)
    return rng.integers(shape[1], size=size), rng.integers(shape[2], size=size)


def _patches(maps: Floats, rows: Indices, columns: Indices, size: int) -> Floats:
    """Input patches of a kernel of `size` at the places: float32 (N * places, size * size * C)."""
    margin = size // 2
    parts = []
    for scan, row, column in zip(maps, rows, columns, strict=True):
        padded = np.pad(scan, ((margin, margin), (margin, margin), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))
        parts.append(windows[row, column].transpose(0, 2, 3, 1).reshape(len(row), -1))
    return np.concatenate(parts)


def _refitted(inputs: Floats, wanted: Floats, start: Floats, ridge: float) -> tuple[Floats, Floats]:
    """Kernel (I, K) and bias (K,) least squares from `inputs` (M, I) to `wanted` (M, K).

    Minimises |X W + b - Y|^2 + a |W - W0|^2, with a = `ridge` times the mean energy of an input:
    (X'X + a) (W - W0) = X' (Y - X W0), X and Y centred.
    """
    from scipy.linalg import solve

    mean, target = inputs.mean(axis=0), wanted.mean(axis=0)
    centred = (inputs - mean).astype(np.float64)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram) + 1e-12
    change = solve(gram, centred.T @ (wanted - target - centred @ start), assume_a="pos")
    kernel = start + change
    return kernel.astype(np.float32), (target - mean @ kernel).astype(np.float32)


def _convolved(maps: Floats, kernel: Floats, bias: Floats) -> Floats:
    import keras

    return _by_chunks(
        maps,
        lambda chunk: keras.ops.relu(keras.ops.conv(chunk, kernel, padding="same") + bias),
    )


def _pooled(maps: Floats) -> Floats:
    import keras

    return _by_chunks(maps, lambda chunk: keras.ops.max_pool(chunk, 2, 2))


def _by_chunks(maps: Floats, layer: Any) -> Floats:
    chunks = (maps[start : start + CHUNK] for start in range(0, len(maps), CHUNK))
    return np.concatenate([np.asarray(layer(chunk)) for chunk in chunks])
