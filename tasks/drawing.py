"""What the tasks' pictures share: the view they are drawn on, legends, and labels of boxes that cover no others.

Everything is drawn with Matplotlib, so that lines and text stay sharp in PDF and SVG. Our own colours are those of
Okabe and Ito, which the colour-blind can tell apart; the colours of classes are A2D2's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from a2d2.calibration import Pose

FOUND, FALSE, MISSED, IGNORED_COLOR, TRUTH = "#009E73", "#D55E00", "#56B4E9", "#999999", "#F0E442"
DARK = "#222222"


@dataclass
class View:
    """A picture to draw on, and what is the same for all fields of a panel.

    image: uint8 (H, W, 3). matrix: pinhole matrix of the image, None if it is unknown. pose: where the camera looks.
    inches: width of a field. text: size of its text in points. threshold: least score of boxes that are drawn. shown:
    what the fields of a task have drawn so far, for its legend. labels: whether there is a field with ground truth.
    steady: the legend has all there could be and not only what was drawn, so that all frames of a video are alike.
    """

    image: UInt8[np.ndarray, "H W 3"]
    inches: float
    text: float = 7.0
    threshold: float = 0.5
    matrix: Float[np.ndarray, "3 3"] | None = None
    pose: Pose | None = None
    shown: dict[Any, Any] = field(default_factory=dict)
    labels: bool = True
    steady: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]

    @property
    def pixels_per_point(self) -> float:
        """Pixels of the image in a point of the page."""
        return self.size[0] / (self.inches * 72)


def show_image(axes: Axes, view: View, dark: float = 0.0, gray: bool = False) -> None:
    """The photograph, `dark` of it black; `gray`: without colours."""
    image = view.image
    if gray:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    if dark:
        image = (image * (1 - dark)).astype(np.uint8)
    show_map(axes, image)


def show_map(axes: Axes, image: np.ndarray, **options: Any) -> Any:
    """A map or picture that fills the field; edges of pixels are at whole numbers, as those of boxes are."""
    height, width = image.shape[:2]
    return axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest", **options)


def write_note(axes: Axes, view: View, text: str, corner: str = "upper left", color: str = "white") -> None:
    """Text in a corner of a field, readable on any ground."""
    right, lower = "right" in corner, "lower" in corner
    axes.text(
        0.985 if right else 0.015, 0.03 if lower else 0.97, text, transform=axes.transAxes, fontsize=view.text,
        color=color, ha="right" if right else "left", va="bottom" if lower else "top", path_effects=outline(view.text),
    )  # fmt: skip


def outline(size: float) -> list[Any]:
    """A dark rim for text and lines."""
    return [effects.withStroke(linewidth=size / 4, foreground="black")]


def say_nothing(axes: Axes, text: str, size: float) -> None:
    """A field without a picture, and why."""
    axes.set_facecolor("#eeeeee")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, fontsize=size, color=DARK, ha="center", va="center")


def draw_box(axes: Axes, box: Sequence[float], color: str, dashed: bool = False, width: float = 1.1) -> None:
    x1, y1, x2, y2 = box
    style: Any = (0, (3, 2)) if dashed else "-"
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, linestyle=style))


def place_labels(
    view: View, boxes: Sequence[Sequence[float]], texts: Sequence[str], size: float
) -> list[tuple[float, float] | None]:
    """For each box the upper left corner of its label in pixels, in the given order: at one of its corners, where it
    covers no label placed before and does not leave the picture; None where there is no room."""
    width, height = view.size
    high = size * 1.3 * view.pixels_per_point
    taken: list[tuple[float, float, float, float]] = []
    places: list[tuple[float, float] | None] = []
    for (x1, y1, x2, y2), text in zip(boxes, texts, strict=True):
        wide = (len(text) * 0.6 + 0.6) * size * view.pixels_per_point
        corners = [(x1, y1 - high), (x2 - wide, y1 - high), (x1, y2), (x2 - wide, y2), (x1, y1), (x1, y2 - high)]
        chosen = None
        for left, top in corners:
            left = min(max(left, 0.0), width - wide)
            inside = left >= 0 and top >= 0 and top + high <= height
            free = all(
                left >= right or left + wide <= other or top >= bottom or top + high <= upper
                for other, upper, right, bottom in taken
            )
            if inside and free:
                chosen = (left, top)
                taken.append((left, top, left + wide, top + high))
                break
        places.append(chosen)
    return places


def write_label(axes: Axes, view: View, place: tuple[float, float], text: str, color: str, size: float) -> None:
    high = size * 1.3 * view.pixels_per_point
    wide = (len(text) * 0.6 + 0.6) * size * view.pixels_per_point
    axes.add_patch(Rectangle(place, wide, high, facecolor=color, edgecolor="none", alpha=0.9))
    axes.text(
        place[0] + wide / 2, place[1] + high / 2, text, fontsize=size, color="black" if color != DARK else "white",
        ha="center", va="center_baseline",
    )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A line of a legend: a patch or a line of this colour, and what it means; no colour: only text."""

    text: str
    color: Any = None
    dashed: bool = False
    patch: bool = False


def arrange(entries: Sequence[Entry], inches: float, size: float) -> list[list[tuple[float, Entry]]]:
    """Rows of entries that fit into a width, each with its place from the left in inches."""
    rows: list[list[tuple[float, Entry]]] = [[]]
    left = 0.0
    for entry in entries:
        wide = (len(entry.text) * 0.56 + (2.4 if entry.color is not None else 0.6)) * size / 72
        if rows[-1] and left + wide > inches:
            rows.append([])
            left = 0.0
        rows[-1].append((left, entry))
        left += wide
    return rows if entries else []


def draw_legend(axes: Axes, entries: Sequence[Entry], size: float) -> None:
    """A legend in rows, in a field that is as high as `arrange` has rows of 1.35 times the size of the text."""
    inches = axes.get_position().width * axes.figure.get_figwidth()
    high = size * 1.35 / 72
    rows = arrange(entries, inches, size)
    axes.set_xlim(0, inches)
    axes.set_ylim(max(len(rows), 1) * high, 0)
    for row, members in enumerate(rows):
        middle = (row + 0.5) * high
        for left, entry in members:
            start = left
            if entry.color is not None:
                start += 1.7 * size / 72
                if entry.patch:
                    axes.add_patch(
                        Rectangle(
                            (left, middle - 0.3 * size / 72), 1.2 * size / 72, 0.6 * size / 72, facecolor=entry.color,
                            edgecolor="#666666", linewidth=0.4,
                        )
                    )  # fmt: skip
                else:
                    style = (0, (3, 2)) if entry.dashed else "-"
                    axes.plot(
                        [left, left + 1.3 * size / 72],
                        [middle, middle],
                        color=entry.color,
                        linewidth=1.5,
                        linestyle=style,
                    )
            axes.text(start, middle, entry.text, fontsize=size, va="center_baseline", color=DARK)
