"""Draw the picture of the README: a synthetic street, its ground truth, and the predictions of the `make demo` network.

    make demo && python docs/draw_panel.py [--run runs/demo] [--frame SCENE/VIEW/ID] [--out docs/panel.jpg]

By default it shows the test frame with the most labels.
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs without installation

import torch
from PIL import Image

from a2d2.images import write_bytes
from experiment import load_trained, load_trained_data
from pictures.frames import make_panel
from pictures.panel import draw_panel, render_figure
from visualize import choose_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder or weights file")
    parser.add_argument("--frame", dest="frames", nargs=1, metavar="SCENE/VIEW/ID", help="frame to draw")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of drawn boxes")
    parser.add_argument("--width", type=int, default=960, help="pixels of the picture")
    parser.add_argument("--out", type=Path, default=Path("docs/panel.jpg"), help="JPEG to write")
    parser.set_defaults(split="test", count=1, scene=None, random=None, worst=None)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    trained = load_trained(arguments.run, device)
    data = load_trained_data(trained)
    (frame,) = choose_frames(data, trained, arguments, device)
    panel = make_panel(frame, data, {trained.name: trained}, device)
    picture = render_figure(draw_panel(panel, arguments.threshold), arguments.width)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    write_bytes(arguments.out, buffer.getvalue())
    print(f"wrote {arguments.out}: {picture.shape[1]}x{picture.shape[0]}, {len(buffer.getvalue()) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
