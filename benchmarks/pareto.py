"""Plot of the latency of one scan against macro AUROC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.common.atomic_io import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Okabe and Ito's colours, which the colour-blind can tell apart; other variants take the rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = {
    "keras_predict": "s", "keras_compiled": "D", "onnxruntime": "o", "openvino": "^",
    "openvino_bf16": "v", "triton_grpc": "*",
}  # fmt: skip
MARKER_SIZES = {"*": 14}  # a star fills little of its circle
CURVE_COLOUR, CURVE_MARKER = "#555555", "P"
# Where a label may stand: points to the right of and above its mark, the nearest first.
OFFSETS = [
    (right * far, up * far)
    for far in range(12, 180, 6)
    for right, up in ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1))
]


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """Draw a result of `benchmarks latency` as PNG or SVG, by the suffix of `path`.

    Raises:
        OSError: The file cannot be written.
    """
    figure, _ = draw(result)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=150)


def draw(result: dict[str, Any]) -> tuple[Figure, list[Annotation]]:
    """The figure, and the labels of the compression curve, none of which covers another one.

    One mark for each engine and variant at batch 1, with the 95 % interval of its AUROC; other
    protocols are left out, being the same engine by other ways. The line joins the marks that
    no other one beats in both. `result["curve"]` holds the points of `export compress`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = [
        row
        for row in result["rows"]
        if row["batch"] == 1
        and row["engine"] in MARKERS
        and row["macro_auroc"]["value"] is not None
    ]
    curve = [point for point in result["curve"] if point["macro_auroc"]["value"] is not None]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(variants)}
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for point in curve:
        face = CURVE_COLOUR if point["chosen"] else "white"
        _mark(axes, point["latency_ms"], point["macro_auroc"], CURVE_COLOUR, CURVE_MARKER, face)
    for row in rows:
        colour = colours[row["variant"]]
        _mark(axes, row["p50_ms"], row["macro_auroc"], colour, MARKERS[row["engine"]], colour)
    marks = [("p50_ms", row) for row in rows] + [("latency_ms", point) for point in curve]
    places = [(item[key], item["macro_auroc"]) for key, item in marks]
    _front(axes, [(ms, auroc["value"]) for ms, auroc in places])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("latency of one scan, median in ms (logarithmic)")
    axes.set_ylabel(f"macro AUROC with 95 % interval, n = {result['num_scored']} test scans")
    axes.set_title("Speed against worth, one scan a request")
    axes.margins(x=0.12, y=0.2)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.0))
    axes.grid(visible=True, alpha=0.25)
    used = {row["engine"] for row in rows}
    dots = [(name, colour, "o") for name, colour in colours.items()]
    shapes = [(name, "black", marker) for name, marker in MARKERS.items() if name in used]
    if curve:
        shapes.append(("tried by export compress,\nfilled: chosen", CURVE_COLOUR, CURVE_MARKER))
    figure.legend(
        handles=[
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                markersize=MARKER_SIZES.get(marker, 9),
                linestyle="",
                label=name,
            )
            for name, colour, marker in dots + shapes
        ],
        loc="outside right upper",
        fontsize=9,
    )
    return figure, _labels(axes, curve, places)


def _mark(
    axes: Axes, ms: float, auroc: dict[str, float], colour: str, marker: str, face: str
) -> None:
    value = auroc["value"]
    axes.errorbar(
        ms,
        value,
        [[value - end] if end < value else [end - value] for end in _ends(auroc)],
        color=colour,
        marker=marker,
        markersize=MARKER_SIZES.get(marker, 9),
        markerfacecolor=face,
        markeredgecolor=colour if face == "white" else "white",
        elinewidth=0.8,
        capsize=3,
        zorder=3,
    )


def _ends(auroc: dict[str, float]) -> tuple[float, float]:
    """The ends of an interval, the value itself where the interval is undefined."""
    value = auroc["value"]
    low, high = (auroc[end] if auroc[end] is not None else value for end in ("low", "high"))
    return min(low, value), max(high, value)


def _front(axes: Axes, places: list[tuple[float, float]]) -> None:
    """Join the places that none is both faster and better than."""
    best: list[tuple[float, float]] = []
    for ms, value in sorted(places, key=lambda place: (place[0], -place[1])):
        if not best or value > best[-1][1]:
            best.append((ms, value))
    axes.step(*zip(*best, strict=True), where="post", color="black", linewidth=0.8, alpha=0.5)


def _labels(
    axes: Axes, curve: list[dict[str, Any]], places: list[tuple[float, dict[str, float]]]
) -> list[Annotation]:
    """Name each point at the first place near it that covers no other name, mark or interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = []
    for ms, auroc in places:
        for low, high in ((auroc["value"], auroc["value"]), _ends(auroc)):
            (x, bottom), (_, top) = axes.transData.transform([(ms, low), (ms, high)])
            wide = 6 if low == high else 3
            taken.append(Bbox([[x - wide, bottom - wide], [x + wide, top + wide]]))
    labels = []
    for point in curve:
        label = axes.annotate(
            point["name"],
            (point["latency_ms"], point["macro_auroc"]["value"]),
            xytext=OFFSETS[0],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6},
        )
        for offset in OFFSETS:
            label.set_position(offset)
            label.update_positions(renderer)
            # Of the text alone: the line to the mark may pass over others.
            box = Text.get_window_extent(label, renderer).padded(2)
            within = inside.x0 < box.x0 and box.x1 < inside.x1
            within = within and inside.y0 < box.y0 and box.y1 < inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        labels.append(label)
    return labels
