"""Draw the picture of the README: a synthetic street, its labels, and what the network of `make demo` predicts.

    make demo && python docs/draw_panel.py [--run runs/demo] [--frame SCENE/VIEW/ID] [--out docs/panel.jpg]

By default it shows the first test frame that has the labels of all tasks.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs without installation

import cv2
import torch

from a2d2.frames import parse_frame
from a2d2.images import write_bytes
from experiment import Data, Trained, load_data, load_trained
from visualize import draw_panel

LARGEST = 400 * 1024  # bytes of a picture in git


def choose_frame(data: Data, trained: Trained, name: str | None):
    """The frame of this name, else the first of the test subset that has every label."""
    if name:
        wanted = parse_frame(name)
        return next(frame for frames in data.subsets.values() for frame in frames if frame == wanted)
    return next(
        frame for frame in data.subsets["test"] if all(task.has_label(frame) for task in trained.tasks.values())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder or weights file")
    parser.add_argument("--frame", metavar="SCENE/VIEW/ID", help="frame to draw")
    parser.add_argument("--width", type=int, default=1200, help="pixels of the picture")
    parser.add_argument("--out", type=Path, default=Path("docs/panel.jpg"), help="JPEG to write")
    arguments = parser.parse_args()
    trained = load_trained(arguments.run, torch.device("cpu"))
    data = load_data(trained.split)
    panel = draw_panel(choose_frame(data, trained, arguments.frame), data, [trained], torch.device("cpu"))
    size = (arguments.width, round(panel.shape[0] * arguments.width / panel.shape[1]))
    small = cv2.cvtColor(cv2.resize(panel, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    for quality in range(92, 40, -4):
        encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(encoded) <= LARGEST:
            break
    write_bytes(arguments.out, encoded)
    print(f"wrote {arguments.out}: {size[0]}x{size[1]}, {len(encoded) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
