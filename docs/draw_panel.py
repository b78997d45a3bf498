"""Draw the picture of the README: a synthetic street, its ground truth, and the predictions of the `make demo` network.

    make demo && python docs/draw_panel.py [--run runs/demo] [--frame SCENE/VIEW/ID] [--out docs/panel.jpg]

By default it shows the test frame with the most labels.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs without installation

import cv2
import torch

from a2d2.images import encode_jpeg, write_bytes
from experiment import load_trained, load_trained_data
from visualize import choose_frames, draw_panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder or weights file")
    parser.add_argument("--frame", dest="frames", nargs=1, metavar="SCENE/VIEW/ID", help="frame to draw")
    parser.add_argument("--width", type=int, default=960, help="pixels of the picture")
    parser.add_argument("--out", type=Path, default=Path("docs/panel.jpg"), help="JPEG to write")
    parser.set_defaults(split="test", count=1)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    trained = load_trained(arguments.run, device)
    data = load_trained_data(trained)
    (frame,) = choose_frames(data, trained, arguments)
    panel = draw_panel(frame, data, [trained], device)
    size = (arguments.width, round(panel.shape[0] * arguments.width / panel.shape[1]))
    encoded = encode_jpeg(cv2.resize(panel, size, interpolation=cv2.INTER_AREA))
    write_bytes(arguments.out, encoded)
    print(f"wrote {arguments.out}: {size[0]}x{size[1]}, {len(encoded) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
