from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from benchmarks.pareto import draw, write_plot

MILLISECONDS = {
    ("keras_predict", "fp32"): (120.0, 0.990), ("keras_compiled", "fp32"): (74.0, 0.990),
    ("onnxruntime", "fp32"): (67.0, 0.990), ("openvino", "fp32"): (66.0, 0.990),
    ("triton_grpc", "fp32"): (69.0, 0.990), ("triton_http", "fp32"): (69.5, 0.990),
    ("openvino", "int8"): (21.0, 0.9893), ("triton_grpc", "int8"): (22.0, 0.9893),
    ("openvino", "compressed"): (2.3, 0.986), ("triton_grpc", "compressed"): (3.2, 0.986),
}  # fmt: skip


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": min(1.0, value + 0.008)}


def measured(curve: list[dict] | None = None) -> dict:
    rows = [
        {
            "engine": engine,
            "variant": variant,
            "batch": batch,
            "p50_ms": batch * ms,
            "macro_auroc": interval(auroc),
        }
        for (engine, variant), (ms, auroc) in MILLISECONDS.items()
        for batch in (1, 8)
    ]
    return {"rows": rows, "curve": curve or [], "num_scored": 272}


CURVE = [
    {
        "name": f"x {width}",
        "latency_ms": ms,
        "macro_auroc": interval(auroc),
        "chosen": width == 0.35,
    }
    for width, ms, auroc in (
        (1.0, 21.0, 0.9893), (0.75, 9.9, 0.989), (0.5, 4.7, 0.988), (0.45, 4.3, 0.988),
        (0.4, 4.1, 0.988), (0.35, 2.4, 0.986), (0.25, 1.6, 0.955), (0.2, 15.0, 0.97),
    )
]  # fmt: skip


def test_labels_cover_neither_each_other_nor_the_frame():
    figure, labels = draw(measured(CURVE))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [Text.get_window_extent(label, renderer) for label in labels]
    assert len(boxes) == len(CURVE)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    frame = figure.axes[0].get_window_extent(renderer)
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
    assert all(frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)


def test_each_engine_and_variant_is_one_mark_at_batch_1():
    figure, _ = draw(measured())
    marks = [bars.lines[0] for bars in figure.axes[0].containers]
    found = {(float(mark.get_xdata()[0]), float(mark.get_ydata()[0])) for mark in marks}
    expected = {place for key, place in MILLISECONDS.items() if key[0] != "triton_http"}
    assert found == expected
    assert len(marks) == len(expected)


def test_axes_are_titled_with_units():
    axes = draw(measured())[0].axes[0]
    assert axes.get_xscale() == "log"
    assert "ms" in axes.get_xlabel()
    assert "n = 272" in axes.get_ylabel()
    assert axes.get_title()
    assert axes.get_ylim()[1] <= 1.0  # no AUROC is higher


def test_no_mark_beats_one_of_the_front():
    axes = draw(measured(CURVE))[0].axes[0]
    (front,) = [line for line in axes.lines if len(line.get_xdata()) > 2]
    corners = list(zip(front.get_xdata(), front.get_ydata(), strict=True))
    places = [
        *MILLISECONDS.values(),
        *((p["latency_ms"], p["macro_auroc"]["value"]) for p in CURVE),
    ]
    for ms, auroc in corners:
        assert not [place for place in places if place[0] < ms and place[1] > auroc]


def test_undefined_auroc_is_left_out():
    result = measured()
    result["rows"][0]["macro_auroc"] = {"value": None, "low": None, "high": None}
    figure, _ = draw(result)
    assert len(figure.axes[0].containers) == len(MILLISECONDS) - 2


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_written(tmp_path, suffix):
    path = tmp_path / f"plot{suffix}"
    write_plot(path, measured(CURVE))
    if suffix == ".png":
        with Image.open(path) as picture:
            assert picture.width >= 1000
            assert np.asarray(picture.convert("L")).std() > 5
    else:
        assert "<svg" in path.read_text()
