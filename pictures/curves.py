"""How runs went: losses, validation scores, weights and gradients from their metrics.jsonl, as one figure."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PAGE_WIDTH, TEXT = 7.16, 7.0
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")

Curves = dict[str, dict[str, tuple[list[int], list[float]]]]
"""name of a field -> name of a curve -> (steps, values)"""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off is left out. ValueError for anything else."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{folder} has no metrics.jsonl; is it a run folder?") from None
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.append({"kind": str(event["kind"]), "step": int(event["step"])} | event)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from error
    return events


def collect_curves(events: Sequence[Mapping[str, Any]]) -> Curves:
    """The curves of one run, in the fields they belong to."""
    curves: Curves = {}
    for event in events:
        for key, value in event.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or key in ("step", "time"):
                continue
            place = _find_field(event["kind"], key)
            if place is not None:
                steps, values = curves.setdefault(place[0], {}).setdefault(place[1], ([], []))
                steps.append(event["step"])
                values.append(float(value))
    return curves


def _find_field(kind: str, key: str) -> tuple[str, str] | None:
    first, _, rest = key.partition("/")
    if kind == "evaluate":
        if key == "skill":
            return "mean skill in validation", "all"
        return (f"{first}: {rest} in validation", rest) if rest and rest != "skill" else None
    if kind != "train":
        return None
    if first == "loss":
        return f"loss of {rest}", rest
    if first == "weight":
        return f"weight of {rest}", rest
    if first == "gradient":
        what, _, task = rest.partition("/")
        names = {"cosine": "cosine of the gradients of", "norm": "norm of the gradient of", "share": "share of"}
        return (f"{names[what]} {task}", task) if what in names and task else None
    return {"gradient_norm": ("norm of the gradient", "all"), "lr_factor": ("learning rate / its peak", "all")}.get(key)


def draw_curves(runs: Mapping[str, Curves], scale: float = 1.0) -> Figure:
    """One field for each quantity, a colour for each run."""
    fields = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    columns = min(3, max(1, len(fields)))
    rows = max(1, -(-len(fields) // columns))
    text = TEXT * scale
    figure = Figure(figsize=(PAGE_WIDTH * scale, (rows * 1.75 + 0.35) * scale), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(every, fields, strict=False):
        lowest = math.inf
        for number, curves in enumerate(runs.values()):
            for steps, values in curves.get(name, {}).values():
                marker = "o" if len(steps) < 12 else None
                style = STYLES[number // len(COLORS) % len(STYLES)]
                color = COLORS[number % len(COLORS)]
                axes.plot(steps, values, color=color, linestyle=style, linewidth=1.0, marker=marker, markersize=2)
                lowest = min(lowest, *values)
        if name.startswith("loss") and lowest > 0:
            axes.set_yscale("log")
        axes.set_title(name, fontsize=text)
        axes.tick_params(labelsize=text * 0.9, which="both")
        axes.grid(alpha=0.3, linewidth=0.4)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in every[max(0, len(fields) - columns) : len(fields)]:
        axes.set_xlabel("step", fontsize=text)
    for axes in every[len(fields) :]:
        axes.axis("off")
    if len(runs) > 1:
        lines = [
            Line2D([], [], color=COLORS[number % len(COLORS)], linestyle=STYLES[number // len(COLORS) % len(STYLES)])
            for number in range(len(runs))
        ]
        figure.legend(
            lines, list(runs), loc="outside upper center", ncols=min(4, len(runs)), fontsize=text, frameon=False
        )
    return figure
