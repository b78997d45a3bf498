"""A panel: the photograph once, then a row for each task with the ground truth and what each model says beside it."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from a2d2.calibration import Pose
from tasks.drawing import View, say_nothing, show_image
from tasks.task import Task

PAGE_WIDTH = 7.16  # inches, both columns of a page
LEAST_FIELD = 2.2  # inches
TEXT = 7.0  # points
RESOLUTION = 200  # pixels an inch, of PNG
TITLE = 1.6  # lines of text above a row


@dataclass
class Model:
    """A column: the `name` of a run, its `tasks`, and what it says of each, one row as `Task.predict` returns it."""

    name: str
    tasks: Mapping[str, Task]
    predictions: Mapping[str, Any]
    note: str = ""


@dataclass
class Panel:
    """What a panel shows. `image`: uint8 (H, W, 3), at the size of the predictions and targets. `targets`: of the tasks
    that have a label. `labels`: whether there could be any, so that a column for them makes sense."""

    title: str
    image: UInt8[np.ndarray, "H W 3"]
    models: Sequence[Model]
    tasks: Mapping[str, Task]
    targets: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = True
    matrix: Float[np.ndarray, "3 3"] | None = None
    pose: Pose | None = None


class Page:
    """A figure that grows downwards: fields and texts are placed in inches from its upper left corner."""

    def __init__(self, width: float, text: float):
        self.figure = Figure(figsize=(width, 1.0))
        FigureCanvasAgg(self.figure)
        self.width, self.text = width, text
        self.fields: list[tuple[Any, tuple[float, float, float, float]]] = []
        self.words: list[tuple[Any, float, float]] = []

    def add_field(self, left: float, top: float, wide: float, high: float) -> Axes:
        axes = self.figure.add_axes((0, 0, wide / self.width, 1))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        self.fields.append((axes, (left, top, wide, high)))
        return axes

    def write(self, left: float, top: float, words: str, **style: Any) -> None:
        self.words.append((self.figure.text(0, 0, words, fontsize=self.text, va="top", **style), left, top))

    def finish(self, height: float) -> Figure:
        """Put everything in its place on a page of this height."""
        self.figure.set_size_inches(self.width, height)
        for axes, (left, top, wide, high) in self.fields:
            axes.set_position((left / self.width, 1 - (top + high) / height, wide / self.width, high / height))
        for words, left, top in self.words:
            words.set_position((left / self.width, 1 - top / height))
        return self.figure


def draw_panel(
    panel: Panel, threshold: float = 0.5, errors: bool = False, scale: float = 1.0, steady: bool = False
) -> Figure:
    """Draw a panel at the width of a page, `scale` times as large; with more models than fit, it is wider.

    threshold: least score of boxes that are drawn. errors: also a row with the errors of each task that has a picture
    of them. steady: of the same size and layout for all frames of a video. Without a column for labels and with one
    model, the tasks stand in pairs.
    """
    columns = len(panel.models) + panel.labels
    across = max(columns, 2)  # fields side by side
    height, width = panel.image.shape[:2]
    text, margin, gap = TEXT * scale, 0.08 * scale, 0.06 * scale
    field_width = max((PAGE_WIDTH * scale - 2 * margin + gap) / across - gap, LEAST_FIELD * scale)
    field_height = field_width * height / width
    line = text * 1.35 / 72
    page = Page(across * (field_width + gap) - gap + 2 * margin, text)
    letters = int(field_width * 72 / (text * 0.52))

    def make_view() -> View:
        return View(
            panel.image, field_width, text, threshold, panel.matrix, panel.pose, labels=panel.labels, steady=steady
        )

    def find_left(column: int) -> float:
        return margin + column * (field_width + gap)

    top = margin
    page.write(margin, top, panel.title, weight="bold")
    top += line * TITLE
    notes = [f"{model.name}: {model.note}" for model in panel.models if model.note]
    wrapped = "\n".join(part for note in notes for part in textwrap.wrap(note, letters))
    if columns == 1:
        if wrapped:
            page.write(margin, top - line * 0.4, wrapped, linespacing=1.3)
            top += line * (wrapped.count("\n") + 1)
        cells = [None, *panel.tasks.values()]
        for pair in zip(cells[::2], [*cells[1::2], None][: len(cells[::2])], strict=True):
            ends = []
            for column, task in enumerate(pair):
                left, view = find_left(column), make_view()
                if column == 1 and task is None:
                    continue
                page.write(left, top + line * 0.25, "picture" if task is None else task.name)
                axes = page.add_field(left, top + line * TITLE, field_width, field_height)
                end = top + line * TITLE + field_height + gap / 2
                if task is None:
                    show_image(axes, view)
                else:
                    _draw_field(axes, view, panel, task, panel.models[0])
                    end = _add_key(page, view, task, left, end, field_width, line)
                ends.append(end)
            top = max(ends) + gap
        return page.finish(top + margin)
    show_image(page.add_field(margin, top, field_width, field_height), make_view())
    page.write(find_left(1), top, wrapped, linespacing=1.3)
    top += field_height + gap
    for task in panel.tasks.values():
        view = make_view()
        heads = ["ground truth"] * panel.labels + [model.name for model in panel.models]
        for column, head in enumerate(heads):
            page.write(
                find_left(column), top + line * 0.25, _shorten(f"{task.name}: {head}" if column == 0 else head, letters)
            )
            axes = page.add_field(find_left(column), top + line * TITLE, field_width, field_height)
            _draw_field(
                axes, view, panel, task, panel.models[column - panel.labels] if column >= panel.labels else None
            )
        top += line * TITLE + field_height
        top = _add_key(page, view, task, margin, top + gap / 2, page.width - 2 * margin, line) + gap
        if errors and task.error_key and task.name in panel.targets:
            page.write(margin, top + line * 0.25, f"{task.name}: errors")
            say_nothing(page.add_field(margin, top + line * TITLE, field_width, field_height), task.error_key, text)
            for column, model in enumerate(panel.models, 1):
                page.write(find_left(column), top + line * 0.25, _shorten(model.name, letters))
                axes = page.add_field(find_left(column), top + line * TITLE, field_width, field_height)
                if task.name in model.predictions:
                    model.tasks[task.name].draw_error(
                        axes, make_view(), model.predictions[task.name], panel.targets[task.name]
                    )
                else:
                    say_nothing(axes, f"{model.name} has no {task.name}", text)
            top += line * TITLE + field_height + gap
    return page.finish(top + margin)


def _add_key(page: Page, view: View, task: Task, left: float, top: float, wide: float, line: float) -> float:
    """The legend of a row; returns where it ends."""
    high = task.count_key_lines(view, wide) * line
    if high:
        # a legend is laid out by the width of its field, which is known before the height of the page
        task.draw_key(page.add_field(left, top, wide, high), view)
    return top + high


def _draw_field(axes: Axes, view: View, panel: Panel, task: Task, model: Model | None) -> None:
    target = panel.targets.get(task.name)
    if model is None:
        if target is None:
            say_nothing(axes, "no label", view.text)
        else:
            task.draw(axes, view, target=target)
    elif task.name not in model.predictions:
        say_nothing(axes, f"{model.name} has no {task.name}", view.text)
    else:
        model.tasks[task.name].draw(axes, view, model.predictions[task.name], target)


def _shorten(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(letters - 1, 1)] + "…"


def encode_figure(figure: Figure, style: str) -> bytes:
    """A figure as "png", "pdf" or "svg"; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    if style == "png":  # Matplotlib's own has transparency, which nothing here needs
        Image.fromarray(render_figure(figure)).save(buffer, "PNG", dpi=(RESOLUTION, RESOLUTION))
        return buffer.getvalue()
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}[style]
    # text stays text, so that it can be searched and edited
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "panel"}):
        figure.savefig(buffer, format=style, dpi=RESOLUTION, metadata=dates)
    return buffer.getvalue()


def render_figure(figure: Figure, width: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A figure as pixels, `width` pixels wide if given, else at RESOLUTION."""
    figure.set_dpi(RESOLUTION if width is None else width / figure.get_figwidth())
    canvas = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
