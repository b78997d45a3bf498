"""Draw the network of a config: encoder, neck and heads, which features each head reads, and their parameters.

    python docs/draw_network.py [--config configs/symmetric.yaml] [--out docs/network.svg]

Everything in the drawing is read from the network that the config builds; run it again when the network changes.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs without installation

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

from experiment import build_network, build_tasks
from models.layers import stride_of
from tasks import TASKS
from training.config import load_config

SIZE = (1024, 640)  # (width, height) of the image in the drawing
# colours of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
GREY = "#555555"
STEP = 1.0  # distance of two rows


def count_parameters(module: nn.Module) -> str:
    """In millions, such as "23.5 M"."""
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"


def draw_box(axes, x: float, y: float, width: float, text: str, colour: str, height: float = 0.62) -> None:
    """A rounded box whose left edge is at x and whose middle is at y."""
    box = FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0.02", fc="white", ec=colour, lw=1.5)
    axes.add_patch(box)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, color="black")


def draw_arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, lw=1.1, shrinkA=0, shrinkB=0)
    axes.add_patch(arrow)


def draw_levels(axes, x: float, names: list[str], channels: dict[str, int], rows: dict[int, float]) -> None:
    """One box for each feature map: its name, channels, height and width."""
    for name in names:
        stride = stride_of(name)
        shape = f"{channels[name]} x {-(-SIZE[1] // stride)} x {-(-SIZE[0] // stride)}"
        draw_box(axes, x, rows[stride], 2.3, f"{name}\n{shape}", GREY, 0.7)


def draw_network(config_path: Path) -> Figure:
    """The drawing of a config with `model.kind: multitask`."""
    config = load_config(config_path, [], {name: task.Options for name, task in TASKS.items()})
    tasks = build_tasks(config.tasks)
    # the class weights and scales of labels change no shape
    net = build_network(config.model, tasks, SIZE, load_pretrained=False)
    encoder, neck = list(net.encoder.channels), list(net.neck.channels)
    strides = sorted({stride_of(name) for name in encoder + neck})
    rows = {stride: -index * STEP for index, stride in enumerate(strides)}
    channels = net.encoder.channels | net.neck.channels

    figure = Figure(figsize=(11, 5.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.1, 14.2)
    axes.set_ylim(rows[strides[-1]] - 0.8, 1.15)
    axes.axis("off")
    first = rows[strides[0]]
    draw_box(axes, 0, first, 1.5, f"image\n3 x {SIZE[1]} x {SIZE[0]}", GREY, 0.7)
    draw_arrow(axes, (1.52, first), (2.35, first), GREY)

    titles = (
        (3.5, f"encoder: {config.model.encoder.name}, {count_parameters(net.encoder)}"),
        (7.2, f"neck: BiFPN x {config.model.neck.repeats}, {count_parameters(net.neck)}"),
        (12.2, "heads"),
    )
    for x, title in titles:
        axes.text(x, first + 0.75, title, ha="center", va="center", fontsize=10, weight="bold")
    draw_levels(axes, 2.35, encoder, channels, rows)
    draw_levels(axes, 6.05, neck, channels, rows)
    for name in encoder:
        y = rows[stride_of(name)]
        draw_arrow(axes, (4.67, y), (6.03, y), GREY)
    for fine, coarse in pairwise(neck):
        ends = rows[stride_of(fine)] - 0.36, rows[stride_of(coarse)] + 0.36
        draw_arrow(axes, (7.05, ends[0]), (7.05, ends[1]), GREY)
        draw_arrow(axes, (7.35, ends[1]), (7.35, ends[0]), GREY)

    span = rows[strides[0]] - rows[strides[-1]]
    for index, ((name, head), colour) in enumerate(zip(net.heads.items(), COLOURS, strict=False)):
        y = first - span * (index + 0.5) / len(net.heads)
        text = f"{name}, {count_parameters(head)}\nprimary metric {tasks[name].primary_metric}"
        draw_box(axes, 10.4, y, 3.7, text, colour, 0.8)
        for feature in head.reads:
            level = rows[stride_of(feature)]
            if feature in net.neck.channels:
                draw_arrow(axes, (8.37, level), (10.38, y), colour)
            else:  # around the neck, below its last level
                low = rows[strides[-1]] - 0.6
                axes.plot([3.5, 3.5, 9.2], [level - 0.37, low, low], color=colour, lw=1.1)
                draw_arrow(axes, (9.2, low), (10.38, y), colour)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/symmetric.yaml"), help="config of the network")
    parser.add_argument("--out", type=Path, default=Path("docs/network.svg"), help="file to write (svg, png or pdf)")
    arguments = parser.parse_args()
    # the same network gives the same file: no date in it, text as text, ids that are no random numbers
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "network"}):
        is_svg = arguments.out.suffix == ".svg"
        draw_network(arguments.config).savefig(arguments.out, dpi=150, metadata={"Date": None} if is_svg else None)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
