"""Score runs: one table of metrics, each primary metric beside that of the constant baseline.

    python evaluate.py runs/demo [runs/other ...] [--split val] [--data Datasets/processed/1024x640]

Scores are computed at the size of the preprocessed dataset: a network with another input size gets a resized image, and
its prediction is mapped back, so that the protocol is the same for all networks.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from a2d2.dataset import FrameDataset
from a2d2.frames import Frame
from experiment import Data, Trained, WrongUseError, load_data, load_trained, pick_device
from tasks.task import Task
from training.balancing import find_rows, move, take_rows
from training.checkpoint import write_json

Scores = dict[str, dict[str, Any]]


@torch.no_grad()
def evaluate(
    net: nn.Module,
    tasks: dict[str, Task],
    frames: list[Frame],
    data: Data,
    size: tuple[int, int],
    device: torch.device,
    micro_batch: int = 4,
    workers: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> Scores:
    """Score a network in evaluation mode on the labelled frames.

    Returns for each task: `headline` (name of its primary metric), `score`, `constant` (the score of the constant
    baseline on the same labels), `skill`, `frames` (number of frames with a label) and `metrics` (all of them); values
    are None if no frame has a label. `check_stop` is called between batches and may raise.
    """
    dataset = FrameDataset(frames, data.roots, tasks, size=size, target_size=data.size)
    loader = DataLoader(dataset, batch_size=micro_batch, num_workers=workers, collate_fn=dataset.collate)
    scored = {name: task.metrics() for name, task in tasks.items()}
    baseline = {name: task.metrics() for name, task in tasks.items()}
    counts = dict.fromkeys(tasks, 0)
    net.eval()
    for batch in tqdm(loader, desc="evaluate", leave=False, unit="batch"):
        check_stop()
        rows = find_rows(batch)
        if not rows:
            continue
        image = batch["image"].to(device)
        outputs = net(image, {name: found.to(device) for name, found in rows.items()})
        for name, output in outputs.items():
            target = move(take_rows(batch["targets"][name], rows[name]), device)
            scored[name].update(tasks[name].predict(output, data.size), target)
            baseline[name].update(tasks[name].predict_constant(target), target)
            counts[name] += len(rows[name])
    return {
        name: _summarise(task, scored[name].compute(), baseline[name].compute(), counts[name])
        for name, task in tasks.items()
    }


def _summarise(task: Task, metrics: dict[str, Any], baseline: dict[str, Any], frames: int) -> dict[str, Any]:
    score, constant = metrics[task.primary_metric], baseline[task.primary_metric]
    # a constant baseline that predicts nothing has the worst score
    if constant is None and score is not None and task.better == "higher":
        constant = 0.0
    defined = score is not None and constant is not None
    return {
        "headline": task.primary_metric,
        "better": task.better,
        "unit": task.unit,
        "score": score,
        "constant": constant,
        "skill": task.skill(score, constant) if defined else None,
        "frames": frames,
        "metrics": metrics,
    }


def mean_skill(scores: Scores) -> float | None:
    """The mean skill over the tasks of a run; None if no task has one.

    A skill below -1, an error of more than twice the constant baseline's, counts as -1: a task has at most the share
    of one task in the choice of the best weights.
    """
    skills = [max(score["skill"], -1.0) for score in scores.values() if score["skill"] is not None]
    return sum(skills) / len(skills) if skills else None


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def format_table(results: dict[str, Scores], markdown: bool = False) -> str:
    """One row for each run and task, then the mean skill of each run."""
    header = ["run", "task", "metric", "score", "constant", "skill", "frames"]
    lines = []
    for run, scores in results.items():
        for task, score in scores.items():
            metric = f"{score['headline']} ({score['better']} is better{', ' if score['unit'] else ''}{score['unit']})"
            values = [_show(score[key]) for key in ("score", "constant", "skill")]
            lines.append([run, task, metric, *values, str(score["frames"])])
        lines.append([run, "all", "mean skill", "", "", _show(mean_skill(scores)), ""])
    widths = [max(len(row[column]) for row in [header, *lines]) for column in range(len(header))]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *lines]]
    if markdown:
        rows.insert(1, ["-" * width for width in widths])
        text = ["| " + " | ".join(row) + " |" for row in rows]
    else:
        text = ["  ".join(row).rstrip() for row in rows]
    notes = [
        f"{run}, {task}: no skill, because the error of the constant baseline ({score['constant']:.4g}) is at or below "
        "the resolution of the labels"
        for run, scores in results.items()
        for task, score in scores.items()
        if score["skill"] is None and score["score"] is not None and score["constant"] is not None
    ]
    return "\n".join([*text, *([""] if markdown and notes else []), *notes])


def format_details(results: dict[str, Scores]) -> str:
    """All metrics, one a line."""
    return "\n".join(
        f"{run}  {task}  {name}  {_show(value)}"
        for run, scores in results.items()
        for task, score in scores.items()
        for name, value in score["metrics"].items()
    )


def _evaluate_run(run: Path, arguments: argparse.Namespace, device: torch.device) -> tuple[Trained, Scores]:
    trained = load_trained(run, device)
    data = load_data(trained.split, [arguments.data] if arguments.data else None)
    chosen = data.subsets if arguments.split == "all" else [arguments.split]
    frames = [frame for subset in chosen for frame in data.subsets[subset]][: arguments.limit]
    if not frames:
        sizes = ", ".join(f"{subset} {len(members)}" for subset, members in data.subsets.items())
        raise ValueError(f"{run}: no frames in subset {arguments.split!r} of split {trained.split.name!r} ({sizes})")
    scores = evaluate(
        trained.net, trained.tasks, frames, data, trained.size, device, arguments.micro_batch, arguments.workers
    )
    return trained, scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or weights files")
    parser.add_argument("--split", choices=["train", "val", "test", "all"], default="val", help="frames to score on")
    parser.add_argument("--data", help="preprocessed dataset to score on (default: that of the run)")
    parser.add_argument("--limit", type=int, help="score on the first so many frames only")
    parser.add_argument("--format", choices=["text", "json", "markdown"], default="text", help="of what is printed")
    parser.add_argument("--details", action="store_true", help="print all metrics, not only the primary ones")
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--micro-batch", type=int, default=4, help="frames at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that load frames")
    arguments = parser.parse_args()
    try:
        device = pick_device(arguments.device)
        results = {}
        for run in arguments.runs:
            trained, scores = _evaluate_run(run, arguments, device)
            results[trained.name if trained.name not in results else str(run)] = scores
        if arguments.output:
            write_json(arguments.output, results)
    except WrongUseError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    if arguments.format == "json":
        print(json.dumps(results, indent=2))
    else:
        print(format_table(results, arguments.format == "markdown"))
        if arguments.details:
            print(format_details(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
