"""The learning curve of a run: metrics.jsonl -> curve.svg.

Training loss as a thin line, validation loss as points, over tokens; below it the learning rate. The legend names the
newest validation loss in nats per token and in bits per byte. The same metrics give the same bytes.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from clm.run_folder import read_metrics
from data_prep.errors import UserError

_MAX_POINTS = 1500  # wider than the picture has pixels; above it, neighbouring training points are averaged
_INK, _GREY, _BLUE, _RED = "#24292f", "#6e7781", "#0969da", "#cf222e"


def draw_curve(run: Path) -> Path:
    """Draw runs/<name>/curve.svg anew and return its path; readers never see a half-written picture.

    Raises:
        UserError: metrics.jsonl has no point yet.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    metrics = read_metrics(run)
    training = _points(metrics, "loss")
    validation = _points(metrics, "eval_loss")
    if not training and not validation:
        raise UserError(f"{run / 'metrics.jsonl'}: has no loss yet. The curve appears at the first logging step.")

    unit, unit_name = _unit(max(tokens for tokens, _ in training + validation))
    # hashsalt: SVG ids are random without it. A Figure of its own, so that pyplot's global state is never touched.
    with matplotlib.rc_context({"svg.hashsalt": "curve", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(8, 4.6), facecolor="white", layout="constrained")
        FigureCanvasSVG(figure)
        rates = _points(metrics, "learning_rate")
        if rates:
            top, strip = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
            strip.plot(*_columns(_thinned(rates), unit), color=_GREY, linewidth=1)
            strip.set_ylim(bottom=0)
            strip.set_ylabel("learning rate")
            strip.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            lowest = strip
        else:
            top = lowest = figure.subplots()
        if training:
            label = f"training loss (last {training[-1][1]:.3f})"
            top.plot(*_columns(_thinned(training), unit), color=_BLUE, linewidth=0.8, alpha=0.8, label=label)
        if validation:
            label = _validation_label(metrics, validation)
            style = {"color": _RED, "marker": "o", "markersize": 5, "linestyle": "none"}
            top.plot(*_columns(validation, unit), label=label, **style)
        top.set_title(run.resolve().name, loc="left", color=_INK, fontweight="bold")
        top.set_ylabel("loss, nats per token")
        top.legend(frameon=False, loc="upper right")
        lowest.set_xlabel(f"{unit_name} seen")
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.5)
        path = run / "curve.svg"
        temporary = run / ".curve.svg.tmp"
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    os.replace(temporary, path)
    return path


def _points(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(tokens, value) where the value is a finite number: one NaN must not take the axis with it."""
    pairs = ((record.get("tokens"), record.get(key)) for record in metrics)
    return [(t, v) for t, v in pairs if t is not None and isinstance(v, int | float) and math.isfinite(v)]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most _MAX_POINTS points, each the mean of as many neighbours as that takes."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(t for t, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _columns(points: list[tuple[float, float]], unit: float) -> tuple[list[float], list[float]]:
    return [tokens / unit for tokens, _ in points], [value for _, value in points]


def _unit(most: float) -> tuple[float, str]:
    for size, name in ((1e9, "B tokens"), (1e6, "M tokens"), (1e3, "K tokens")):
        if most >= size:
            return size, name
    return 1.0, "tokens"


def _validation_label(metrics: list[dict[str, Any]], validation: list[tuple[int, float]]) -> str:
    label = f"validation loss (last {validation[-1][1]:.3f}"
    bits = _points(metrics, "eval_bits_per_byte")
    return label + (f" = {bits[-1][1]:.3f} bits per byte)" if bits else ")")
