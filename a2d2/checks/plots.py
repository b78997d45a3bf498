"""Plots of a raw dataset: distributions of classes, depths, boxes and steering angles, as PNG."""

import io
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from a2d2.calibration import Camera
from a2d2.checks.bus_verdicts import list_turns
from a2d2.checks.facts import DEPTH_BINS, BoxFacts, BusFacts, FrameFacts
from a2d2.checks.known import LARGEST_MAGNITUDE, MAIN_VIEW
from a2d2.checks.report import Report
from a2d2.classes import CLASSES, COLOUR_NAMES, OBJECT_CLASSES, class_colour, colour_table, find_object_class
from a2d2.images import write_bytes

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "savefig.dpi": 200,
}
_BLUE = "#2b6cb0"
_MOST_DOTS = 3000  # a scatter plot of more points becomes a density plot


def write_plots(out: Path, report: Report) -> list[Path]:
    """Write the plots whose data exist; remove plots of an earlier run whose data do not. Return the written paths."""
    plots = {
        "classes.png": draw_classes(report.frames),
        "depth.png": draw_depths(report.frames),
        "boxes.png": draw_boxes(report.frames, report.raw.cameras.get(MAIN_VIEW)),
        "angles.png": draw_angles(report.buses),
    }
    for name, data in plots.items():
        if data is None:
            (out / name).unlink(missing_ok=True)
        else:
            write_bytes(out / name, data)
    return [out / name for name, data in plots.items() if data is not None]


def _draw(size: tuple[float, float], panels: list[Callable[[Axes], None]], widths: list[float] | None = None) -> bytes:
    """Panels side by side -> PNG; `size` in inches."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
        for panel, axis in zip(panels, axes, strict=True):
            panel(axis)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def _format_plain(value: float, _position: int | None = None) -> str:
    return f"{value:g}" if value < 1000 else f"{value:,.0f}"


def _scale_log(axis: Axes, which: str, values: Iterable[float]) -> None:
    """A logarithmic axis from the decade below the values to the decade above them, with plain tick labels."""
    values = list(values)
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}lim")(10.0**low, 10.0 ** max(high, low + 1))
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(LogLocator(numticks=12))
    scale.set_major_formatter(FuncFormatter(_format_plain))
    scale.set_minor_formatter(NullFormatter())


def _write_integers(axis: Axes, which: str, ticks: int = 5) -> None:
    """A linear axis with integer ticks."""
    axis.locator_params(axis=which, nbins=ticks, integer=True)
    getattr(axis, f"{which}axis").set_major_formatter(FuncFormatter(_format_plain))


def _scale_colour(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(value / 255 for value in colour)


def draw_classes(frames: list[FrameFacts]) -> bytes | None:
    """Plot the share of pixels of each of the 38 classes, and the share of labels in which it occurs; None without
    labels."""
    labels = [facts.label for facts in frames if facts.label]
    pixels, occurrences = Counter(), Counter()
    index = {text: int(colour_table()[int(text[1:], 16)]) for text in COLOUR_NAMES}
    for label in labels:
        for colour, count in label.known.items():
            pixels[index[colour]] += count
        occurrences.update({index[colour] for colour in label.known})
    if not pixels:
        return None
    order = sorted(pixels, key=lambda number: pixels[number])
    absent = [CLASSES[number] for number in range(len(CLASSES)) if number not in pixels]

    def draw_bars(axis: Axes) -> None:
        shares = [100 * pixels[number] / pixels.total() for number in order]
        occurring = [100 * occurrences[number] / len(labels) for number in order]
        positions = np.arange(len(order))
        colours = [_scale_colour(class_colour(CLASSES[number])) for number in order]
        axis.barh(positions, shares, color=colours, ec="0.35", lw=0.5)
        axis.scatter(occurring, positions, s=14, c="black", zorder=3, clip_on=False)
        axis.set_yticks(positions, [CLASSES[number] for number in order])
        axis.set_ylim(-0.7, len(order) - 0.3)
        _scale_log(axis, "x", [*shares, *occurring])
        axis.set_xlabel(f"share of the pixels (bars) and of the {len(labels):,} labels (dots), %")
        axis.grid(visible=False, axis="y")
        if absent:
            text = textwrap.fill(f"in no label: {', '.join(absent)}", 105)
            axis.set_title(text, fontsize=7, color="0.35", loc="left")

    return _draw((6.5, 1.4 + 0.19 * len(order) + 0.02 * len(absent)), [draw_bars])


def draw_depths(frames: list[FrameFacts]) -> bytes | None:
    """Plot histograms of the depth of lidar points and of the number of points of a frame; None without points."""
    scans = [facts.lidar for facts in frames if facts.lidar and facts.lidar.depths is not None]
    depths = sum((scan.depths.astype(np.int64) for scan in scans), np.zeros(len(DEPTH_BINS) - 1, dtype=np.int64))
    if not depths.any():
        return None

    def draw_depth(axis: Axes) -> None:
        last = int(np.flatnonzero(depths)[-1]) + 1
        axis.stairs(depths[:last], DEPTH_BINS[: last + 1], fill=True, color=_BLUE)
        axis.set_yscale("log")
        axis.set_xlim(0, last)
        axis.set_ylim(0.7 * depths[depths > 0].min(), 8 * depths.max())  # room for the annotations
        axis.set_xlabel("depth along the optical axis, m")
        axis.set_ylabel("lidar points per metre of depth")
        share = np.cumsum(depths) / depths.sum()
        middle, most = (int(np.searchsorted(share, part)) + 1 for part in (0.5, 0.95))
        for metres, name, height in ((middle, "50 %", 0.98), (most, "95 %", 0.85)):
            axis.axvline(metres, color="0.2", lw=0.9, ls="--")
            axis.annotate(
                f"{name} nearer\nthan {metres} m", (metres, height), xycoords=("data", "axes fraction"), va="top",
                xytext=(3, 0), textcoords="offset points", fontsize=7.5,
            )  # fmt: skip

    def draw_counts(axis: Axes) -> None:
        counts = [scan.points for scan in scans]
        step = 250
        axis.hist(counts, bins=np.arange(min(counts) // step * step, max(counts) + step + 1, step), color=_BLUE)
        axis.set_xlabel("lidar points in a frame")
        axis.set_ylabel(f"frames (of {len(counts):,})")
        _write_integers(axis, "x", ticks=4)
        _write_integers(axis, "y")

    return _draw((7.5, 3.0), [draw_depth, draw_counts], [1.5, 1.0])


def _clip(box: BoxFacts, size: tuple[int, int] | None) -> tuple[float, float]:
    """Width and height in pixels of a box after clipping it to the picture."""
    bounds = np.array(box.bounds)
    if size is not None:
        bounds = np.clip(bounds, 0, [*size, *size])
    return float(bounds[2] - bounds[0]), float(bounds[3] - bounds[1])


def draw_boxes(frames: list[FrameFacts], camera: Camera | None) -> bytes | None:
    """Plot classes, sizes in the picture and distances of the distinct boxes; None without boxes."""
    distinct = [
        box
        for facts in frames
        for box in {(box.label, box.bounds): box for box in facts.boxes or [] if box.bounds is not None}.values()
    ]
    extents = [(box, *_clip(box, camera.recorded_size if camera else None)) for box in distinct]
    extents = [(box, width, height) for box, width, height in extents if width > 0 and height > 0]
    if not extents:
        return None
    classes = Counter(find_object_class(box.label) for box, _, _ in extents)

    def draw_counts(axis: Axes) -> None:
        order = sorted(classes, key=lambda number: classes[number])
        counts, positions = [classes[number] for number in order], np.arange(len(order))
        bars = axis.barh(positions, counts, color=_BLUE)
        axis.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=7)
        axis.set_yticks(positions, [_name(number) for number in order])
        axis.set_xscale("log")
        axis.set_xlim(0.5, 5 * max(counts))  # from 0.5, so that a count of 1 has a bar; room for the numbers
        axis.set_xlabel("distinct boxes")
        axis.grid(visible=False, axis="y")

    def draw_extents(axis: Axes) -> None:
        widths, heights = (np.array(values) for values in zip(*(row[1:] for row in extents), strict=True))
        if len(extents) > _MOST_DOTS:
            _draw_density(axis, widths, heights, "log")
        else:
            kinds = np.array([find_object_class(box.label) for box, _, _ in extents], dtype=object)
            for rank, (number, _) in enumerate(classes.most_common(5)):
                of_class = kinds == number
                axis.scatter(
                    widths[of_class], heights[of_class], s=7, lw=0, clip_on=False, color=f"C{rank}", label=_name(number)
                )
            axis.legend(fontsize=7, markerscale=2, frameon=False, loc="upper left")
        _scale_log(axis, "x", widths)
        _scale_log(axis, "y", heights)
        axis.set_xlabel("width in the picture, px")
        axis.set_ylabel("height in the picture, px")

    def draw_distances(axis: Axes) -> None:
        distances = [min(box.distance, DEPTH_BINS[-1]) for box, _, _ in extents if box.distance is not None]
        axis.hist(distances, bins=np.arange(0, max(distances, default=0) + 2.5, 2.5), color=_BLUE)
        axis.set_xlim(left=0)
        axis.set_xlabel("distance to the centre of the box, m")
        axis.set_ylabel("distinct boxes per 2.5 m")
        _write_integers(axis, "y")

    return _draw((10.0, 3.2), [draw_counts, draw_extents, draw_distances], [1.0, 1.15, 1.0])


def _name(number: int | None) -> str:
    return "(foreign)" if number is None else OBJECT_CLASSES[number]


def _draw_density(axis: Axes, x: np.ndarray, y: np.ndarray, scale: str) -> None:
    """Plot the number of points in each hexagonal bin."""
    cells = axis.hexbin(x, y, xscale=scale, yscale=scale, gridsize=45, bins="log", mincnt=1, cmap="viridis", lw=0.1)
    axis.figure.colorbar(cells, ax=axis, format=FuncFormatter(_format_plain), pad=0.02).set_label("count", size=7)


def draw_angles(buses: list[BusFacts]) -> bytes | None:
    """Plot the histogram of the frames' steering angles, and the yaw rate over the angle; None without angles."""
    angles = [turn.angle for facts in buses for turn in facts.turns.values() if abs(turn.angle) <= LARGEST_MAGNITUDE]
    if not angles:
        return None
    turns = [turn for facts in buses for turn in list_turns(facts)]

    def draw_histogram(axis: Axes) -> None:
        widest = max(map(abs, angles))
        step = 5 if widest < 180 else 10
        edges = step * (np.arange(-(widest // step) - 1, widest // step + 3) - 0.5)  # one bar is centred at 0
        axis.hist(angles, bins=edges, color=_BLUE)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
        axis.yaxis.set_major_formatter(FuncFormatter(_format_plain))
        axis.set_xlabel("steering-wheel angle, degrees (left positive)")
        axis.set_ylabel(f"frames (of {len(angles):,}) in {step} degrees")

    def draw_turns(axis: Axes) -> None:
        x, y = np.array(turns).T
        if len(turns) > _MOST_DOTS:
            _draw_density(axis, x, y, "linear")
        else:
            axis.scatter(x, y, s=6, alpha=0.6, lw=0, color=_BLUE)
        axis.axhline(0, color="0.4", lw=0.7)
        axis.axvline(0, color="0.4", lw=0.7)
        axis.set_xlabel("steering-wheel angle, degrees (left positive)")
        axis.set_ylabel("yaw rate, degrees/s (left positive)")

    return _draw((7.5, 3.0), [draw_histogram, draw_turns] if turns else [draw_histogram])
