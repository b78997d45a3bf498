"""The plots of a study: every comparison as a dot with its interval, and scores by the number of labels."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from a2d2.images import whole_path
from experiments.analysis import Against, ArmResults, Study, find_score_interval
from experiments.grid import Comparison, Curves, name_file
from pictures.curves import COLORS, PAGE_WIDTH, STYLES
from tasks import TASKS


def draw_plots(study: Study, folder: Path) -> list[Path]:
    """A PNG for each comparison and each set of curves that has results; returns their paths."""
    written = []
    for comparison in study.grid.study.comparisons:
        found = study.compare(comparison)
        if not found:
            continue
        figure = draw_comparison(study, found, comparison)
        written.append(_save(figure, folder, comparison.title))
    for curves in study.grid.study.curves:
        figure = draw_curves(study, curves)
        if figure is not None:
            written.append(_save(figure, folder, curves.title))
    return written


def _save(figure: pyplot.Figure, folder: Path, title: str) -> Path:
    path = folder / f"{name_file(title)}.png"
    with whole_path(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png")
    pyplot.close(figure)
    return path


def draw_curves(study: Study, curves: Curves) -> pyplot.Figure | None:
    """Scores over the number of labels of the same task, on a logarithmic axis, with 95 % intervals; None without
    results."""
    figure, every = pyplot.subplots(
        1, len(curves.tasks), figsize=(PAGE_WIDTH, 2.7), layout="constrained", squeeze=False
    )
    empty = True
    for axes, task in zip(every[0], curves.tasks, strict=True):
        counts = set()
        for number, (name, arms) in enumerate(curves.lines.items()):
            points = []
            for own in (study.arms[arm] for arm in arms):
                scores = own.list_scores(task)
                if scores and own.labels.get(task):
                    points.append((own.labels[task], fmean(scores), find_score_interval(own, task)))
            if not points:
                continue
            color = COLORS[number]
            # beside each other, so that intervals do not hide each other
            places = [count * 1.03 ** (number - len(curves.lines) / 2) for count, _, _ in points]
            axes.plot(places, [score for _, score, _ in points], "o-", color=color, markersize=3.5, label=name)
            for place, (_, _, interval) in zip(places, points, strict=True):
                if interval is not None:
                    axes.plot((place, place), interval, "-", color=color, linewidth=1.1)
            counts |= {count for count, _, _ in points}
        empty &= not counts
        for number, (name, score) in enumerate(curves.others.get(task, {}).items()):
            axes.axhline(score, color="0.5", linewidth=0.8, linestyle=STYLES[1 + number % 3], label=name)
        axes.set_xscale("log")
        axes.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
        axes.minorticks_off()
        axes.set_xlabel(f"frames with a label of {task}", fontsize=7)
        axes.set_ylabel(f"{task} {TASKS[task].primary_metric}", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    entries = {}
    for axes in every[0]:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(entries.values(), entries, fontsize=6.5, loc="outside right center")  # beside the lines, not on them
    figure.suptitle(f"{curves.title} ({study.subset} subset)", fontsize=8)
    if empty:
        pyplot.close(figure)
        return None
    return figure


def draw_comparison(study: Study, found: Sequence[Against], comparison: Comparison) -> pyplot.Figure:
    """Delta-m of each arm, and its terms task by task, with 95 % intervals."""
    tasks = [name for name in study.grid.tasks if any(name in each.terms for each in found)]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(PAGE_WIDTH, 0.9 + 0.42 * len(found)), sharey=True, width_ratios=(1, 1.3), layout="constrained"
    )
    references = "\nand ".join(study.arms[name].arm.title for name in comparison.references)
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
    left.set_yticks(range(len(found)), [describe_row(study.arms[each.arm], each) for each in found])
    left.invert_yaxis()
    left.set_xlabel(f"Delta-m in % over {references}", fontsize=7)
    right.set_xlabel("by task, in %; right is better", fontsize=7)
    handles = [right.plot([], [], "o", color=COLORS[number], markersize=3.5)[0] for number in range(len(tasks))]
    figure.legend(handles, tasks, fontsize=6.5, loc="outside right center")  # beside the dots, not on them
    figure.suptitle(f"{comparison.title} ({study.subset} subset; number of seeds in brackets)", fontsize=8)
    return figure


def describe_row(own: ArmResults, against: Against) -> str:
    failed = f", {len(own.failed)} failed" if own.failed else ""
    return f"{own.arm.title} ({len(against.seeds)}{failed})"


def _draw_dot(axes, place: float, value: float | None, interval: tuple[float, float] | None, color: str) -> None:
    if value is None:
        return
    axes.plot(value, place, "o", color=color, markersize=3.5)
    if interval is not None:
        axes.plot(interval, (place, place), "-", color=color, linewidth=1.1)
