"""Draw what runs and predictions say: panels, videos and curves.

    python visualize.py runs/demo [runs/other predictions/third ...] [--split test] [--worst 6 --task depth] [--error]
    python visualize.py predictions/mine                                  # on pictures without labels
    python visualize.py runs/demo --scene 20200302_111357 --video         # needs: pip install av
    python visualize.py runs/demo runs/other --curves [--format pdf]      # losses and scores over the steps
    python visualize.py runs/demo --scene 20200302_111357 --rerun scene.rrd   # needs: pip install rerun-sdk

A panel has the photograph once, then a row for each task: the ground truth, and each run beside it.
"""

import argparse
import sys
from pathlib import Path

from a2d2.console import allow_any_text
from tasks.options import OPTIONS
from training.arguments import between, count
from training.stopping import exit_on_interrupt

DONE, ERROR, WRONG_USE = 0, 1, 2


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, weights files or folders of predictions")
    which = parser.add_argument_group("frames").add_mutually_exclusive_group()
    which.add_argument("--frames", nargs="+", metavar="SCENE/VIEW/ID", help="these frames")
    which.add_argument("--scene", help="all frames of this scene")
    which.add_argument("--random", type=count, metavar="N", help="N frames of the subset, drawn by --seed")
    which.add_argument(
        "--worst", type=count, metavar="N", help="the N frames on which the first run is worst in --task"
    )
    parser.add_argument("--count", type=count, default=6, help="else: so many, evenly spaced (default: 6)")
    parser.add_argument("--split", choices=["train", "val", "test", "all"], default="val", help="the subset")
    parser.add_argument("--task", choices=list(OPTIONS), help="for --worst")
    parser.add_argument("--seed", type=int, default=0, help="for --random")
    parser.add_argument("--data", help="preprocessed dataset (default: that of the first run)")
    parser.add_argument("--error", action="store_true", help="also draw where segmentation and depth are wrong")
    parser.add_argument(
        "--threshold", type=between(0.0, 1.0), default=0.5, help="least score of boxes that are drawn (default: 0.5)"
    )
    parser.add_argument("--video", action="store_true", help="one mp4 of the panels of --scene")
    parser.add_argument(
        "--rate", type=between(0.25, 10.0), default=5.0, help="frames a second of the video (default: 5)"
    )
    parser.add_argument("--curves", action="store_true", help="losses and validation scores of the runs, no panels")
    parser.add_argument("--rerun", type=Path, metavar="FILE.rrd", help="a recording for the Rerun viewer, no panels")
    parser.add_argument("--format", choices=["png", "pdf", "svg"], default="png", help="of the pictures")
    parser.add_argument(
        "--scale", type=between(0.25, 10.0), default=1.0, help="size; 1 is the width of a page (default: 1)"
    )
    parser.add_argument("--output", type=Path, help="folder for the pictures (default: panels/ in the first run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser.parse_args()


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and Ctrl-C no traceback
    exit_on_interrupt("visualize")
    ARGUMENTS = read_arguments()

import random
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from a2d2.dataset import DatasetError
from a2d2.frames import Frame, parse_frame
from a2d2.images import write_bytes
from a2d2.predictions import list_predicted
from evaluate import choose_protocol, score_frames
from experiment import Data, Predicted, Source, WrongUseError, add_source, load_trained_data, pick_device
from pictures.curves import collect_curves, draw_curves, read_log
from pictures.frames import describe_weights, make_panel, predict_frame
from pictures.panel import Model, Panel, draw_panel, encode_figure, render_figure
from pictures.video import check_video_support, write_video
from scoring.predictors import make_predictor


def list_subset(data: Data, subset: str) -> list[Frame]:
    """The frames of a subset, or all."""
    if subset == "all":
        return sorted({*data.others}.union(*data.subsets.values()))
    return data.subsets[subset]


def choose_frames(data: Data, source: Source, arguments: argparse.Namespace, device: torch.device) -> list[Frame]:
    """The frames that are asked for, else evenly spaced ones of the subset: of each stretch that with the most labels.

    ValueError if there are none.
    """
    where = ", ".join(map(str, data.roots))
    if arguments.frames:
        available = {frame: frame for frame in list_subset(data, "all")}
        wanted = [parse_frame(text) for text in arguments.frames]
        if missing := [str(frame) for frame in wanted if frame not in available]:
            raise ValueError(f"no image of {', '.join(missing)} in {where}")
        return [available[frame] for frame in wanted]
    if arguments.scene:
        every = list_subset(data, "all")
        frames = [frame for frame in every if frame.scene == arguments.scene]
        if not frames:
            scenes = ", ".join(sorted({frame.scene for frame in every})[:6])
            raise ValueError(f"no frames of scene {arguments.scene} in {where}; there are {scenes}, ...")
        return frames
    frames = list_subset(data, arguments.split)
    if not frames:
        raise ValueError(f"no frames in subset {arguments.split!r}; choose another with --split, or name --frames")
    if arguments.random:
        return sorted(random.Random(arguments.seed).sample(frames, min(arguments.random, len(frames))))
    if arguments.worst:
        return find_worst(data, source, frames, arguments.task, arguments.worst, device)
    labels = {frame: sum(task.has_label(frame) for task in source.tasks.values()) for frame in frames}
    groups = np.array_split(np.arange(len(frames)), min(arguments.count, len(frames)))
    return [max((frames[index] for index in group), key=labels.get) for group in groups]


def find_worst(
    data: Data, source: Source, frames: list[Frame], name: str | None, number: int, device: torch.device
) -> list[Frame]:
    """The frames with the worst primary metric of a task, by the protocol of the run, the worst first."""
    if name not in source.tasks:
        raise WrongUseError(f"--worst needs --task with one of {', '.join(source.tasks)}")
    task, predictor = source.tasks[name], make_predictor(source, device)
    protocol = choose_protocol({source.name: source}, {})
    scored = score_frames(predictor, {name: task}, frames, data, device, 4, 0, lambda: None, protocol)[name]
    values = zip(scored.frames, scored.metrics.score_frames(), strict=True)
    ranked = sorted(
        ((value if task.better == "higher" else -value), frame) for frame, value in values if value is not None
    )
    if not ranked:
        raise ValueError(f"no frame of this subset has a label of {name}")
    by_name = {str(frame): frame for frame in frames}
    return [by_name[frame] for _, frame in ranked[:number]]


def draw_pictures(source: Predicted, arguments: argparse.Namespace, output: Path) -> int:
    """Panels of predictions on pictures without labels; returns their number."""
    places = list_predicted(source.folder, [task.kind for task in source.tasks.values()])
    if arguments.random:
        places = random.Random(arguments.seed).sample(places, min(arguments.random, len(places)))
    for picture in tqdm(places, desc="draw", unit="picture"):
        image = picture.read()
        size = (image.shape[1], image.shape[0])
        predictions = {}
        for name, task in source.tasks.items():
            path = picture.find_file(source.folder, task.kind)
            if path.is_file():
                predictions[name] = task.load_prediction(path, source.about[name], size, size)
        model = Model(source.name, source.tasks, predictions, describe_weights(source))
        panel = Panel(picture.name, image, [model], source.tasks, labels=False)
        figure = draw_panel(panel, arguments.threshold, scale=arguments.scale)
        path = output / f"{picture.place}.{arguments.format}"
        write_bytes(path, encode_figure(figure, arguments.format))
    return len(places)


def choose_output(arguments: argparse.Namespace) -> Path:
    first = arguments.runs[0]
    output = arguments.output or (first if first.is_dir() else first.parent) / "panels"
    if output.exists() and not output.is_dir():
        raise WrongUseError(f"--output {output} is a file; name a folder for the pictures")
    return output


def run(arguments: argparse.Namespace) -> str:
    """Draw what is asked for; returns a line that says where it is."""
    device = pick_device(arguments.device, "--device")
    if arguments.video and not arguments.scene:
        raise WrongUseError("--video is of one scene: name it with --scene")
    if arguments.worst and not arguments.task:
        raise WrongUseError("--worst needs --task")
    output = choose_output(arguments)
    if arguments.curves:
        folders = list(dict.fromkeys(arguments.runs))
        names = Counter(folder.name for folder in folders)
        runs = {
            folder.name if names[folder.name] == 1 else str(folder): collect_curves(read_log(folder))
            for folder in folders
        }
        path = (arguments.output or arguments.runs[0]) / f"curves.{arguments.format}"
        write_bytes(path, encode_figure(draw_curves(runs, arguments.scale), arguments.format))
        return f"curves in {path}"
    if arguments.video:
        check_video_support()
    sources: dict[str, Source] = {}
    for path in arguments.runs:
        add_source(sources, path, device)
    first = next(iter(sources.values()))
    if isinstance(first, Predicted) and first.size is None:
        if len(sources) > 1:
            raise WrongUseError("predictions on pictures without labels are drawn alone")
        for option in ("frames", "scene", "worst", "video", "rerun", "error"):
            if getattr(arguments, option):
                raise WrongUseError(f"--{option} is for frames of a dataset; {first.name} is about other pictures")
        number = draw_pictures(first, arguments, output)
        return f"{number} pictures in {output}"
    try:
        data = load_trained_data(first, [arguments.data] if arguments.data else None)
    except DatasetError as error:
        raise ValueError(str(error).replace("data.roots", "--data")) from error
    for name, source in sources.items():
        if not source.knows_frames:
            print(
                f"visualize: {name} does not say which frames it was trained on; these may be among them",
                file=sys.stderr,
            )
    frames = choose_frames(data, first, arguments, device)
    for source in sources.values():
        source.check_frames(frames, data)
    if arguments.rerun:
        from pictures.recording import write_recording

        number = write_recording(arguments.rerun, frames, data, sources, lambda s, f: predict_frame(s, f, data, device))
        return f"{number} frames in {arguments.rerun}"
    panels = (make_panel(frame, data, sources, device) for frame in tqdm(frames, desc="draw", unit="frame"))
    drawn = (
        (panel, draw_panel(panel, arguments.threshold, arguments.error, arguments.scale, steady=arguments.video))
        for panel in panels
    )
    if arguments.video:
        path = output / f"{arguments.scene}.mp4"
        number = write_video(path, (render_figure(figure) for _, figure in drawn), arguments.rate)
        return f"{number} frames in {path}"
    for place, (panel, figure) in enumerate(drawn, 1):
        rank = f"worst{place:02d}_{arguments.task}_" if arguments.worst else ""
        path = output / f"{rank}{panel.title.replace('/', '_')}.{arguments.format}"
        write_bytes(path, encode_figure(figure, arguments.format))
    return f"pictures in {output}"


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    try:
        print(run(arguments))
    except WrongUseError as error:
        print(f"visualize: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError) as error:
        print(f"visualize: {error}", file=sys.stderr)
        return ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
