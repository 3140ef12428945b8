"""The page of `training compare`: parallel coordinates, scatter plots and the table of the runs."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.contract import NOT_A_MEDICAL_DEVICE
from training.common.templates import template_environment
from training.track.ranking import Comparison, short_name, shortened

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LOG_FROM = 20  # the factor between smallest and largest value from which an axis is logarithmic
MOST_TICKS = 25
COLUMNS = 3


def write_page(
    found: Comparison, notes: Sequence[str], table: Sequence[Sequence[str]], path: Path
) -> None:
    """Write plots, notes and table as one HTML file that needs no network.

    Args:
        found: The ranked runs.
        notes: Lines above the plots.
        table: Its header and rows.
        path: File to write.

    Raises:
        OSError: The file cannot be written.
    """
    figures = {"parallel": parallel_coordinates(found)}
    if found.differing:
        figures["scatter"] = scatter_plots(found)
    page = template_environment(Path(__file__).parent / "templates").get_template("compare.html.j2")
    text = page.render(
        title=f"Runs by {metric_name(found)}",
        notes=notes,
        plots=[
            figure.to_html(
                {"displaylogo": False, "responsive": True}, full_html=False, div_id=name,
                include_plotlyjs=number == 0,
            )
            for number, (name, figure) in enumerate(figures.items())
        ],
        header=table[0],
        rows=table[1:],
        notice=NOT_A_MEDICAL_DEVICE,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def metric_name(found: Comparison) -> str:
    """Protocol and metric, and the direction where less is better."""
    lower = " (lower is better)" if found.config.lower_is_better else ""
    return f"{found.config.protocol} {found.config.metric}{lower}"


def parallel_coordinates(found: Comparison) -> Figure:
    """One line a run through its rank, the parameters that differ, and the metric."""
    import plotly.graph_objects as go

    scores = [row.value for row in found.ranked]
    last = len(scores)
    ranks = list(range(1, last + 1))
    dimensions = [
        {"label": "rank", "values": ranks, "range": (last + 0.5, 0.5),
         "tickvals": ranks[:: math.ceil(last / MOST_TICKS)]},
        *(
            {"label": short_name(name)} | axis_of(values)
            for name, values in found.differing.items()
        ),
        {"label": metric_name(found), "values": scores},
    ]  # fmt: skip
    best_is_dark = not found.config.lower_is_better
    line = {"color": scores, "colorscale": "Viridis", "reversescale": best_is_dark}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line))
    return figure.update_layout(width=max(600, 170 * len(dimensions)), height=450)


def scatter_plots(found: Comparison) -> Figure:
    """The metric with its interval against each parameter that differs."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    runs, num_plots = found.ranked, len(found.differing)
    columns, rows = min(COLUMNS, num_plots), math.ceil(num_plots / COLUMNS)
    figure = make_subplots(rows, columns, shared_yaxes=True)
    error = {
        "array": [None if run.high is None else run.high - (run.value or 0.0) for run in runs],
        "arrayminus": [None if run.low is None else (run.value or 0.0) - run.low for run in runs],
    }
    for index, (name, values) in enumerate(found.differing.items()):
        axis = axis_of(values)
        place = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        points = go.Scatter(
            x=axis["values"], y=[run.value for run in runs], error_y=error, mode="markers", name="",
            # Plotly reads some HTML in texts, but not in the ticks of parallel coordinates.
            text=[html.escape(f"{rank} {run.name}") for rank, run in enumerate(runs, start=1)],
        )  # fmt: skip
        figure.add_trace(points, **place)
        figure.update_xaxes(
            title_text=short_name(name), tickvals=axis.get("tickvals"),
            ticktext=[html.escape(text) for text in axis.get("ticktext", ())] or None, **place,
        )  # fmt: skip
    figure.update_yaxes(title_text=metric_name(found), col=1)
    return figure.update_layout(showlegend=False, width=400 * columns, height=320 * rows)


def axis_of(values: Sequence[str]) -> dict[str, Any]:
    """A parameter's values as positions on an axis, with the ticks where these are no numbers.

    Words stand in alphabetical order. Positive numbers that span a factor of 20 or more are placed
    by their logarithm, with a tick at each power of ten.
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        labels = sorted(set(values))
        return {
            "values": [labels.index(value) for value in values],
            "tickvals": list(range(len(labels))),
            "ticktext": [shortened(label) for label in labels],
        }
    if min(numbers) <= 0 or max(numbers) / min(numbers) < LOG_FROM:
        return {"values": numbers}
    powers = [math.log10(number) for number in numbers]
    ends = math.floor(min(powers)), math.ceil(max(powers))
    decades = list(range(ends[0], ends[1] + 1))
    return {
        "values": powers,
        "range": ends,
        "tickvals": decades,
        "ticktext": [f"{10.0**power:g}" for power in decades],
    }
