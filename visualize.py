"""Draw frames: image | ground truth | the prediction of each run, one row for each task.

python visualize.py runs/demo [runs/other ...] [--split val] [--frames scene/view/id ...] [--output runs/demo/panels]
"""

import argparse
import sys
from pathlib import Path

from a2d2.console import allow_any_text
from training.arguments import count
from training.stopping import exit_on_interrupt

DONE, ERROR, WRONG_USE = 0, 1, 2


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or weights files")
    parser.add_argument("--frames", nargs="+", metavar="SCENE/VIEW/ID", help="frames to draw")
    parser.add_argument("--split", choices=["train", "val", "test"], default="val", help="else: frames of this subset")
    parser.add_argument("--count", type=count, default=6, help="else: how many of them")
    parser.add_argument("--data", help="preprocessed dataset (default: that of the first run)")
    parser.add_argument("--output", type=Path, help="folder for the pictures (default: panels/ in the first run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser.parse_args()


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and Ctrl-C no traceback
    exit_on_interrupt("visualize")
    ARGUMENTS = read_arguments()

import math

import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from a2d2.dataset import DatasetError, FrameDataset
from a2d2.frames import Frame, parse_frame
from a2d2.images import encode_png, write_bytes
from experiment import Data, Trained, WrongUseError, load_trained, load_trained_data, pick_device
from tasks.drawing import write_text

LEAST_WIDTH = 480  # pixels of a field


def choose_frames(data: Data, trained: Trained, arguments: argparse.Namespace) -> list[Frame]:
    """The named frames, else evenly spaced ones of the subset: of each stretch the frame with the most labels."""
    if arguments.frames:
        available = {frame: frame for members in [*data.subsets.values(), data.others] for frame in members}
        wanted = [parse_frame(text) for text in arguments.frames]
        if missing := [str(frame) for frame in wanted if frame not in available]:
            raise ValueError(f"no image of {', '.join(missing)} in {', '.join(map(str, data.roots))}")
        return [available[frame] for frame in wanted]
    frames = data.subsets[arguments.split]
    if not frames:
        raise ValueError(f"no frames in subset {arguments.split!r}; choose another with --split, or name --frames")
    labels = {frame: sum(task.has_label(frame) for task in trained.tasks.values()) for frame in frames}
    count = min(arguments.count, len(frames))
    groups = np.array_split(np.arange(len(frames)), count)
    return [max((frames[index] for index in group), key=labels.get) for group in groups]


@torch.no_grad()
def draw_panel(frame: Frame, data: Data, runs: list[Trained], device: torch.device) -> UInt8[np.ndarray, "H W 3"]:
    """Rows: the tasks of all runs. Columns: image, ground truth, each run's prediction; a black field where missing.

    The caption of a run says so if it was trained on this frame.
    """
    tasks = {name: task for trained in runs for name, task in trained.tasks.items()}
    # small images are enlarged, so that lines and text on them are sharp
    enlarge = math.ceil(LEAST_WIDTH / data.size[0])
    size = (enlarge * data.size[0], enlarge * data.size[1])
    sample = FrameDataset([frame], data.roots, tasks, size=size)[0]
    image = sample["image"].permute(1, 2, 0).numpy()
    predictions = []
    for trained in runs:
        given = FrameDataset([frame], data.roots, {}, size=trained.size)[0]["image"][None].to(device)
        outputs = trained.net(given, dict.fromkeys(trained.tasks))
        predictions.append({name: trained.tasks[name].predict(output, size) for name, output in outputs.items()})

    nothing = np.zeros_like(image)
    rows = []
    for name, task in tasks.items():
        fields = [write_text(image.copy(), f"{name}  {frame}")]
        if name in sample["targets"]:
            fields.append(
                write_text(task.draw_label(image, sample["targets"][name]), "ground truth", (0, image.shape[0]))
            )
        else:
            fields.append(write_text(nothing.copy(), "no label"))
        for trained, prediction in zip(runs, predictions, strict=True):
            drawn = nothing.copy()
            if name in prediction:
                drawn = trained.tasks[name].draw(image, prediction[name][0])
            seen = trained.record is not None and str(frame) in trained.record.trained
            caption = f"{trained.name}, trained on this frame" if seen else trained.name
            fields.append(write_text(drawn, caption, (0, image.shape[0])))
        rows.append(np.concatenate(fields, axis=1))
    return np.concatenate(rows, axis=0)


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    try:
        device = pick_device(arguments.device, "--device")
        runs = [load_trained(run, device) for run in arguments.runs]
        try:
            data = load_trained_data(runs[0], [arguments.data] if arguments.data else None)
        except DatasetError as error:
            raise ValueError(str(error).replace("data.roots", "--data")) from error
        for trained in runs:
            if not trained.knows_frames:
                print(
                    f"visualize: {trained.name} does not say which frames it was trained on; these may be among them",
                    file=sys.stderr,
                )
        first = arguments.runs[0]
        output = arguments.output or (first if first.is_dir() else first.parent) / "panels"
        if output.exists() and not output.is_dir():
            raise WrongUseError(f"--output {output} is a file; name a folder for the pictures")
        for frame in tqdm(choose_frames(data, runs[0], arguments), desc="draw", unit="frame"):
            path = output / f"{str(frame).replace('/', '_')}.png"
            write_bytes(path, encode_png(draw_panel(frame, data, runs, device)))
    except WrongUseError as error:
        print(f"visualize: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError) as error:
        print(f"visualize: {error}", file=sys.stderr)
        return ERROR
    print(f"pictures in {output}")
    return DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
