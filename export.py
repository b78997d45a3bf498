"""Take a network away: as ONNX for other programs, and with a model card.

    python export.py runs/demo --onnx demo.onnx [--images FILE FOLDER ...]
    python export.py runs/demo --card [--scores runs/demo/test.json]

ONNX needs `pip install onnx onnxscript onnxruntime`. The file takes RGB pictures as uint8 at the network's input size,
in any number, and returns what the tasks predict in physical units; boxes come before suppression. Its metadata say the
rest. It is compared with PyTorch on pictures before it is written. The card is README.md beside the weights, in the
layout that the Hugging Face hub shows; nothing is uploaded.
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
    parser.add_argument("run", type=Path, help="run folder or weights file")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the network to this ONNX file")
    parser.add_argument("--card", action="store_true", help="write README.md beside the weights")
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="for the card: what evaluate.py --output has written"
    )
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="PATH", help="pictures to compare on (default: of the run's dataset)"
    )
    parser.add_argument("--count", type=count, default=8, help="so many pictures to compare on (default: 8)")
    arguments = parser.parse_args()
    if not (arguments.onnx or arguments.card):
        parser.error("nothing to do: give --onnx FILE or --card")
    return arguments


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and Ctrl-C no traceback
    exit_on_interrupt("export")
    ARGUMENTS = read_arguments()

import copy
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from a2d2.dataset import DatasetError
from a2d2.images import read_json, write_bytes
from a2d2.predictions import Picture, list_pictures
from experiment import Trained, WrongUseError, load_trained, load_trained_data
from predict import describe_units, resize
from scoring.table import show

TOLERANCE = 1e-3  # of a difference, relative to the largest value of an output
REPEATS = 15


class Deployed(nn.Module):
    """A network with the pre- and post-processing of its tasks: uint8 pictures (B, 3, H, W) to named tensors."""

    def __init__(self, trained: Trained):
        super().__init__()
        self.net, self.tasks, self.size = trained.net, trained.tasks, trained.size
        self.names = [name for task in trained.tasks.values() for name in task.export_names()]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = self.net(image, dict.fromkeys(self.tasks))
        found: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            found |= task.export_output(outputs[name], self.size)
        return tuple(found[name] for name in self.names)


def describe(trained: Trained) -> dict[str, str]:
    """The metadata of the file."""
    (width, height), tasks = trained.size, trained.tasks
    return {
        "run": trained.name,
        "weights_sha256": str(trained.digest),
        "step": str(trained.header.get("step")),
        "input": f"image: uint8 (batch, 3, {height}, {width}), RGB 0..255; scale and normalisation are inside. "
        "Resize a picture with an antialiased bilinear filter, without keeping its aspect ratio",
        "outputs": json.dumps(
            {key: text for task in trained.tasks.values() for key, text in task.export_names().items()}
        ),
        "files": json.dumps({name: task.describe_files() for name, task in tasks.items()}),
    }


def load_pictures(trained: Trained, arguments: argparse.Namespace) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Pictures to compare on: the named ones, else evenly spaced ones of the run's dataset."""
    if arguments.images:
        pictures, _, _ = list_pictures(arguments.images)
    else:
        try:
            data = load_trained_data(trained)
        except DatasetError as error:
            raise WrongUseError(f"{error}; or give pictures to compare on with --images") from error
        frames = sorted({*data.others}.union(*data.subsets.values()))
        pictures = [Picture(frame.path(data.roots[frame.root].image_kind), frame=frame) for frame in frames]
    if not pictures:
        raise WrongUseError("there are no pictures to compare on: give some with --images")
    return [picture.read() for picture in pictures[:: -(-len(pictures) // arguments.count)]]


def write_onnx(trained: Trained, path: Path, pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> list[str]:
    """Write the network as ONNX and return what was measured, a line each; ValueError if it differs from PyTorch."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise WrongUseError(
            f"{error.name} is not installed: pip install onnx onnxscript onnxruntime (Apache 2.0 and MIT)"
        ) from error
    net = Deployed(trained).eval()
    images = torch.stack([resize(picture, trained.size) for picture in pictures])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        draft = Path(folder) / "net.onnx"
        torch.onnx.export(
            copy.deepcopy(net),  # what the tasks keep for a size must not be what the exporter has traced
            (images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1),),
            str(draft),
            dynamo=True,
            input_names=["image"],
            output_names=net.names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
        model = onnx.load(str(draft))
        for key, value in describe(trained).items():
            model.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(model)
        content = model.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        lines = compare(net, session, images)
        write_bytes(path, content)
        lines += time_both(net, session, images[:1])
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return [f"{path}: {len(content) / 1e6:.1f} MB, opset {opset}, {len(pictures)} pictures compared", *lines]


def compare(net: Deployed, session: Any, images: Tensor) -> list[str]:
    """The largest difference of each output over the pictures one by one, a line each; ValueError if one is too large,
    or if all pictures at once give another shape."""
    largest = dict.fromkeys(net.names, (0.0, 0.0))
    for image in images.split(1):
        for name, one, other in zip(net.names, net(image), session.run(None, {"image": image.numpy()}), strict=True):
            largest[name] = tuple(map(max, largest[name], measure(one.numpy(), other)))
    together = session.run(None, {"image": images.numpy()})
    for name, one, other in zip(net.names, net(images), together, strict=True):
        if tuple(one.shape) != other.shape:
            raise ValueError(
                f"ONNX gives {name} of shape {other.shape} for {len(images)} pictures, not {tuple(one.shape)}"
            )
    for name, (difference, scale) in largest.items():
        if difference > TOLERANCE * max(scale, 1.0):
            raise ValueError(f"the ONNX network differs from PyTorch: {name} by up to {difference:.3g}, of {scale:.3g}")
    return [f"  {name}: largest difference {by:.2g}, of values up to {of:.3g}" for name, (by, of) in largest.items()]


def measure(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Of class ids the share that differs, of other values the largest difference; and the largest value."""
    if one.dtype == np.uint8:
        return float((one != other).mean()), 1.0
    return float(np.abs(one.astype(np.float64) - other).max(initial=0)), float(np.abs(one).max(initial=0))


def time_both(net: Deployed, session: Any, image: Tensor) -> list[str]:
    """Milliseconds for one picture, in turns, medians."""
    times: dict[str, list[float]] = {"PyTorch": [], "ONNX Runtime": []}
    for _ in range(REPEATS + 2):
        for name, run in (
            ("PyTorch", lambda: net(image)),
            ("ONNX Runtime", lambda: session.run(None, {"image": image.numpy()})),
        ):
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    threads = torch.get_num_threads()
    shown = ", ".join(f"{name} {value:.1f} ms" for name, value in medians.items())
    return [
        f"  one picture on the CPU, {threads} threads: {shown} ({medians['ONNX Runtime'] / medians['PyTorch']:.2f} x)"
    ]


def find_scores(trained: Trained, scores: dict[str, Any] | None) -> dict[str, Any]:
    """The rows of the run in the given scores, else those of its own best validation."""
    if scores is not None:
        runs = scores.get("runs", {})
        if trained.name not in runs:
            raise WrongUseError(f"--scores has no run {trained.name}: it has {', '.join(runs) or 'none'}")
        rows = runs[trained.name]
        if any(row.get("weights") != trained.digest for row in rows.values()):
            raise WrongUseError(
                f"--scores are of a run {trained.name} with other weights than {trained.path}: let evaluate.py score "
                "these, with --output"
            )
        return rows
    best = trained.path.parent / "best.json"
    content = read_json(best) if trained.path.name == "best.safetensors" and best.is_file() else {}
    return content.get("scores", {}) if content.get("step") == trained.header.get("step") else {}


def write_card(trained: Trained, scores: dict[str, Any] | None) -> Path:
    """Write README.md beside the weights: what was trained on what, its scores, how to load it, and the licence of the
    data."""
    header, record = trained.header, trained.record
    rows = find_scores(trained, scores)
    table = [
        "| task | subset | metric | score | constant baseline | frames |",
        "|---|---|---|--:|--:|--:|",
        *(
            f"| {task} | {row.get('subset', 'val')} | {row['headline']} | {show(row['score'])} "
            f"| {show(row['constant'])} | {row['frames']} |"
            for task, row in rows.items()
        ),
    ]
    trained_on = ["Frames: unknown."]
    if record is not None:
        learned = set(record.subsets["train"])
        frames = ", ".join(f"{name} {len(members)}" for name, members in record.subsets.items())
        labels = ", ".join(f"{name} {len(learned & set(members))}" for name, members in record.labels.items())
        trained_on = [f"Frames: {frames}." + (f" Training labels: {labels}." if labels else "")]
        trained_on.append("The names of all frames are in the header of the weights file, under `record`.")
    roots = ", ".join(f"`{Path(root).name}`" for root in header["split"]["roots"])
    parameters = sum(parameter.numel() for parameter in trained.net.parameters()) / 1e6
    tags = [task.hub_tag for task in trained.tasks.values() if task.hub_tag]
    model, weights = header["model"], trained.path.name
    lines = [
        "---",
        "library_name: pytorch",
        "license: other",
        "license_name: see-the-licence-of-the-data",
        "tags:",
        *(f"- {tag}" for tag in [*tags, "autonomous-driving", "multi-task"]),
        "---",
        "",
        f"# {trained.name}",
        "",
        f"One network for {', '.join(trained.tasks)}, from one picture of a car's front camera.",
        f"{parameters:.1f} M parameters, input {trained.size[0]}x{trained.size[1]}, kind `{model.get('kind')}`, "
        f"encoder `{model.get('encoder', {}).get('name')}`, step {header.get('step')}.",
        "",
        "## Trained on",
        "",
        f"Preprocessed datasets: {roots}.",
        *trained_on,
        "",
        "A2D2 is licensed under CC BY-ND 4.0 (https://www.a2d2.audi). If these frames are of A2D2, cite Geyer et al.,",
        "arXiv 2004.06320, and do not publish files derived from the dataset itself.",
        "",
        "## Scores",
        "",
        *(table if rows else ["Not known: give `--scores FILE` to export.py."]),
        "",
        "## Use",
        "",
        "```python",
        "from pathlib import Path",
        "import torch",
        "from experiment import load_trained",
        "",
        f'trained = load_trained(Path("{weights}"), torch.device("cpu"))',
        "outputs = trained.net(images)  # uint8 (B, 3, H, W), RGB",
        "predictions = {name: trained.tasks[name].predict(output, trained.size) for name, output in outputs.items()}",
        "```",
        "",
        f"Or without code: `python predict.py {weights} --images FOLDER --out predictions`.",
        "",
        *(f"- {text}" for text in describe_units(trained, trained.tasks)),
        "",
        "The network knows what it was trained on; nothing is known of its behaviour elsewhere. Not for use in a car.",
        "",
    ]
    path = trained.path.parent / "README.md"
    write_bytes(path, "\n".join(lines).encode())
    return path


def run(arguments: argparse.Namespace) -> None:
    trained = load_trained(arguments.run, torch.device("cpu"))
    if arguments.onnx:
        if arguments.onnx.is_dir():
            raise WrongUseError(f"--onnx {arguments.onnx} is a folder; name a file")
        print("\n".join(write_onnx(trained, arguments.onnx, load_pictures(trained, arguments))))
    if arguments.card:
        scores = read_json(arguments.scores) if arguments.scores else None
        print(f"card: {write_card(trained, scores)}")


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    try:
        run(arguments)
    except WrongUseError as error:
        print(f"export: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError) as error:
        print(f"export: {error}", file=sys.stderr)
        return ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
