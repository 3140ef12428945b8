"""Plots of `training compare`: Matplotlib figures, and one HTML page that needs no network.

Every figure is drawn once: PNG and page show the same one. On the page it is SVG whose parts carry
the number of their run, so that a few lines of script can light a run up everywhere at once.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.contract import NOT_A_MEDICAL_DEVICE
from training.track.compare import NOT_LOGGED, Comparison, notes, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot
    from matplotlib.figure import Figure

MOST_TICKS = 7
SPREAD = 0.07  # of an axis: runs with the same value of a parameter lie side by side


@dataclass(frozen=True)
class Scale:
    """One axis: where each run lies on it, and its ticks.

    Attributes:
        name: What it shows.
        at: For each run the place, 0 at the bottom to 1 at the top.
        ticks: Places and their labels.
    """

    name: str
    at: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]


def scale_of(name: str, values: list[str]) -> Scale:
    """The axis of a parameter: numbers by size, anything else in alphabetical order.

    Positive numbers that span a factor of 20 or more lie on a logarithmic axis.
    """
    try:
        numbers = [float(value) for value in values]
        numeric = all(math.isfinite(number) for number in numbers)
    except ValueError:
        numeric = False
    if not numeric:
        labels = sorted(set(values))
        places = {label: (index + 0.5) / len(labels) for index, label in enumerate(labels)}
        ticks = tuple((place, shortened(label)) for label, place in places.items())
        return Scale(name, tuple(places[value] for value in values), ticks)
    distinct = sorted(set(numbers))
    if len(distinct) == 1:
        return Scale(name, (0.5,) * len(numbers), ((0.5, f"{distinct[0]:.4g}"),))
    low, high = distinct[0], distinct[-1]
    logarithmic = low > 0 and high / low >= 20

    def place(number: float) -> float:
        if logarithmic:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    steps = [step / (MOST_TICKS - 3) for step in range(MOST_TICKS - 2)]
    if len(distinct) > MOST_TICKS:
        distinct = [
            low * (high / low) ** step if logarithmic else low + step * (high - low)
            for step in steps
        ]
    return Scale(
        name,
        tuple(place(number) for number in numbers),
        tuple((place(number), f"{number:.4g}") for number in distinct),
    )


def scales(found: Comparison) -> list[Scale]:
    """The axes of the parameters in which the runs differ, and last that of the metric."""
    last = len(found.ranked) - 1
    axes = []
    for name in found.differing:
        scale = scale_of(
            name.removeprefix("fit."),
            [row.parameters.get(name, NOT_LOGGED) for row in found.ranked],
        )
        beside = [(1 - SPREAD) * at + SPREAD * (1 - k / last) for k, at in enumerate(scale.at)]
        ticks = [((1 - SPREAD) * place + SPREAD / 2, label) for place, label in scale.ticks]
        axes.append(Scale(scale.name, tuple(beside), tuple(ticks)))
    return [*axes, scale_of(_metric_name(found), [repr(row.value) for row in found.ranked])]


def parallel_figure(found: Comparison) -> Figure:
    """One line a run through all axes, coloured by the metric."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    axes = scales(found)
    figure = Figure(figsize=(max(6.0, 1.7 * len(axes)), 5), layout="constrained")
    plot: Plot = figure.add_subplot()
    plot.set(xlim=(-0.5, len(axes) - 0.5), ylim=(-0.05, 1.05))
    plot.axis("off")
    for index, scale in enumerate(axes):
        plot.plot([index, index], [0, 1], color="0.3", linewidth=1)
        # Where the script listens for a drag, above the lines; its ends are those of the axis.
        plot.add_patch(
            Rectangle((index - 0.06, 0), 0.12, 1, alpha=0, zorder=5, gid=f"axis-{index}")
        )
        for place, label in scale.ticks:
            plot.text(
                index + 0.04, place, label, va="center", fontsize=8, parse_math=False,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
                zorder=4,
            )  # fmt: skip
        plot.text(index, 1.07, scale.name, ha="center", rotation=12, fontsize=9, parse_math=False)
    places = list(range(len(axes))) if len(axes) > 1 else [-0.3, 0.3]
    # The best last, so that it lies on top.
    for run, colour in reversed(list(enumerate(_colours(found)))):
        heights = [scale.at[run] for scale in axes]
        heights = heights if len(axes) > 1 else heights * 2
        width = 3.0 if run == 0 else 1.5
        plot.plot(places, heights, color=colour, linewidth=width, gid=f"run-{run}-line")
        plot.plot(places, heights, alpha=0, linewidth=10, gid=f"run-{run}-wide")
    return figure


def scatter_figure(found: Comparison) -> Figure:
    """The metric with its interval against each parameter in which the runs differ."""
    from matplotlib.figure import Figure

    axes = scales(found)[:-1]
    columns = max(1, min(3, len(axes)))
    lines = max(1, math.ceil(len(axes) / columns))
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    plots = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for plot in plots[len(axes) :]:
        plot.axis("off")
    if not axes:
        plots[0].text(0.5, 0.5, "the runs do not differ in any parameter", ha="center")
    for index, (plot, scale) in enumerate(zip(plots, axes, strict=False)):
        for run, (row, colour) in enumerate(zip(found.ranked, _colours(found), strict=True)):
            if row.low is not None and row.high is not None:
                plot.vlines(
                    scale.at[run], row.low, row.high, color=colour, linewidth=0.8,
                    gid=f"run-{run}-bar-{index}",
                )  # fmt: skip
            plot.plot(
                scale.at[run], row.value, "o", color=colour, gid=f"run-{run}-point-{index}"
            )  # fmt: skip
        plot.set_xticks([place for place, _ in scale.ticks])
        plot.set_xticklabels(
            [label for _, label in scale.ticks], rotation=20, fontsize=8, parse_math=False
        )
        plot.set_xlim(-0.1, 1.1)
        plot.set_xlabel(scale.name, parse_math=False)
        if index % columns == 0:
            plot.set_ylabel(_metric_name(found), parse_math=False)
    return figure


def write_page(found: Comparison, path: Path) -> None:
    """Both figures and the table as one HTML file that loads nothing from anywhere.

    Raises:
        OSError: The file cannot be written.
    """
    names = found.differing
    head = ["", "run", "name", _metric_name(found), "n", "model"]
    head += [name.removeprefix("fit.") for name in names]
    body = []
    for index, row in enumerate(found.ranked):
        cells = [str(index + 1), row.run, row.name, row.score]
        cells += [NOT_LOGGED if row.n is None else str(row.n), ", ".join(row.aliases)]
        cells += [row.parameters.get(name, NOT_LOGGED) for name in names]
        body.append(f'<tr id="run-{index}-row">{_cells("td", cells)}</tr>')
    places = [[scale.at[run] for scale in scales(found)] for run in range(len(found.ranked))]
    parts = {
        "@TITLE@": html.escape(f"Runs by {_metric_name(found)}"),
        "@NOTES@": "".join(f"<p>{html.escape(note)}</p>" for note in notes(found)),
        "@PARALLEL@": _svg(parallel_figure(found), "parallel"),
        "@SCATTER@": _svg(scatter_figure(found), "scatter"),
        "@TABLE@": f"<thead><tr>{_cells('th', head)}</tr></thead>{''.join(body)}",
        "@PLACES@": json.dumps(places),
        "@NOTICE@": NOT_A_MEDICAL_DEVICE,
    }
    pattern = re.compile("|".join(parts))
    path.write_text(pattern.sub(lambda match: parts[match[0]], PAGE), encoding="utf-8")


def _cells(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _metric_name(found: Comparison) -> str:
    config = found.config
    lower = " (lower is better)" if config.lower_is_better else ""
    return f"{config.protocol} {config.metric}{lower}"


def _colours(found: Comparison) -> list[Any]:
    """For each run a colour by its value, the best the darkest."""
    import matplotlib

    values = [row.value or 0.0 for row in found.ranked]
    spread = abs(values[0] - values[-1]) or 1.0
    colours = matplotlib.colormaps["viridis_r"]
    return [colours(0.95 - 0.85 * abs(value - values[0]) / spread) for value in values]


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element; of Matplotlib's ids only those that are referred to stay."""
    import matplotlib

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = io.StringIO()
    # Text stays text, and equal figures give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(text, format="svg", metadata=nothing)
    drawn = text.getvalue()
    return re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawn[drawn.index("<svg") :])


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
svg { max-width: 100%; height: auto; user-select: none }
#parallel { position: relative }
#parallel div { position: absolute; background: #4682b455; pointer-events: none }
[id^="axis-"] { cursor: ns-resize }
[id^="axis-"] path { pointer-events: all }
[id$="-wide"] path { pointer-events: stroke }
.focus g[id^="run-"]:not(.on), g.off { stroke-opacity: .1; fill-opacity: .1 }
.off path { pointer-events: none !important }
tr.off { color: #ccc }
table { border-collapse: collapse }
td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd }
tr.on { background: #fd6 }
</style>
<h1>@TITLE@</h1>
@NOTES@
<p>Point at a run to see it everywhere. Drag along an axis to keep only the runs in that part of it;
click the axis to take them all again.</p>
<div id="parallel">@PARALLEL@</div>
<div>@SCATTER@</div>
<table>@TABLE@</table>
<p>@NOTICE@</p>
<script>
"use strict";
const places = @PLACES@;
const parts = places.map((_, run) => document.querySelectorAll(`[id^="run-${run}-"]`));
const kept = new Map(), bars = new Map(), holder = document.getElementById("parallel");
function runOf(event) {
  const part = event.target.closest('[id^="run-"]');
  return part ? Number(part.id.split("-")[1]) : -1;
}
document.addEventListener("pointerover", event => {
  const run = runOf(event);
  document.body.classList.toggle("focus", run >= 0);
  parts.forEach((some, index) => some.forEach(part => part.classList.toggle("on", index === run)));
});
function filter() {
  places.forEach((at, run) => {
    const out = [...kept].some(([axis, [low, high]]) => at[axis] < low || at[axis] > high);
    parts[run].forEach(part => part.classList.toggle("off", out));
  });
}
document.querySelectorAll('[id^="axis-"]').forEach((element, axis) => {
  element.addEventListener("pointerdown", down => {
    const box = element.getBoundingClientRect(), place = y => (box.bottom - y) / box.height;
    const start = place(down.clientY), base = holder.getBoundingClientRect();
    if (!bars.has(axis)) bars.set(axis, holder.appendChild(document.createElement("div")));
    const bar = bars.get(axis);
    kept.delete(axis);
    bar.style.height = 0;
    filter();
    const move = event => {
      const ends = [start, place(event.clientY)].sort((a, b) => a - b);
      if ((ends[1] - ends[0]) * box.height < 3) return;
      kept.set(axis, ends);
      bar.style.left = `${box.left - base.left}px`;
      bar.style.width = `${box.width}px`;
      bar.style.top = `${box.bottom - ends[1] * box.height - base.top}px`;
      bar.style.height = `${(ends[1] - ends[0]) * box.height}px`;
      filter();
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup",
      () => window.removeEventListener("pointermove", move), { once: true });
    down.preventDefault();
  });
});
</script>
</html>
"""
