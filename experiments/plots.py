"""The plots of a study: every comparison as a dot with its interval, and scores by the share of labels."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from a2d2.images import whole_path
from experiments.analysis import Against, Study
from pictures.curves import COLORS, PAGE_WIDTH


def draw_plots(study: Study, folder: Path) -> list[Path]:
    """A PNG for each comparison that has results; returns their paths."""
    written = []
    for comparison in study.grid.study.comparisons:
        found = study.compare(comparison)
        if not found:
            continue
        name = "".join(letter if letter.isalnum() else "_" for letter in comparison.title.lower()).strip("_")
        path = folder / f"{name}.png"
        figure = draw_comparison(study, found, comparison.title)
        with whole_path(path) as temporary:
            figure.savefig(temporary, dpi=160, format="png")
        pyplot.close(figure)
        written.append(path)
    return written


def draw_comparison(study: Study, found: Sequence[Against], title: str) -> pyplot.Figure:
    """Delta-m of each arm, and its terms task by task, with 95 % intervals."""
    tasks = [name for name in study.grid.tasks if any(name in each.terms for each in found)]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(PAGE_WIDTH, 0.9 + 0.42 * len(found)), sharey=True, width_ratios=(1, 1.3), layout="constrained"
    )
    reference = study.arms[found[0].reference].arm.title
    for row, each in enumerate(found):
        _draw_dot(left, row, each.delta_m, each.interval, "black")
        for number, task in enumerate(tasks):
            if task in each.terms:
                offset = (number - (len(tasks) - 1) / 2) * 0.17
                _draw_dot(right, row + offset, each.terms[task], each.term_intervals[task], COLORS[number])
    for axes in (left, right):
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    left.set_yticks(range(len(found)), [f"{study.arms[each.arm].arm.title} ({len(each.seeds)})" for each in found])
    left.invert_yaxis()
    left.set_xlabel(f"Delta-m in % over {reference}", fontsize=7)
    right.set_xlabel("by task, in %; right is better", fontsize=7)
    handles = [right.plot([], [], "o", color=COLORS[number], markersize=3.5)[0] for number in range(len(tasks))]
    right.legend(handles, tasks, fontsize=6.5, loc="best", frameon=True)
    figure.suptitle(f"{title} ({study.subset} subset; number of seeds in brackets)", fontsize=8)
    return figure


def _draw_dot(axes, place: float, value: float | None, interval: tuple[float, float] | None, color: str) -> None:
    if value is None:
        return
    axes.plot(value, place, "o", color=color, markersize=3.5)
    if interval is not None:
        axes.plot(interval, (place, place), "-", color=color, linewidth=1.1)
