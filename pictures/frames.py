"""Panels of frames: what networks and files with predictions say about a frame, beside its labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from a2d2.checks.known import MAIN_VIEW
from a2d2.dataset import FrameDataset
from a2d2.frames import Frame
from experiment import Data, Source
from pictures.panel import Model, Panel
from scoring.predictors import make_predictor
from tasks.options import OPTIONS
from tasks.task import Task
from training.cycle import copy_to_cpu


def predict_frame(source: Source, frame: Frame, data: Data, device: torch.device) -> dict[str, Any]:
    """What a source says about a frame, at the size of the dataset: task -> one row, on the CPU; tasks without a file
    are left out."""
    found = make_predictor(source, device).predict_frame(frame, data.roots, source.tasks, data.size)
    return {name: copy_to_cpu(prediction) for name, prediction in found.items()}


def make_panel(
    frame: Frame,
    data: Data,
    sources: Mapping[str, Source],
    device: torch.device,
    names: Sequence[str] | None = None,
) -> Panel:
    """The panel of a frame, of the named tasks, by default of all; the note of a run says so if it was trained on this
    frame."""
    found = {name: task for source in sources.values() for name, task in source.tasks.items()}
    tasks: dict[str, Task] = {
        name: found[name] for name in OPTIONS if name in found and (names is None or name in names)
    }
    sample = FrameDataset([frame], data.roots, tasks, size=data.size)[0]
    models = []
    for name, source in sources.items():
        predictions = predict_frame(source, frame, data, device)
        models.append(Model(name, source.tasks, predictions, describe_source(source, frame)))
    root = data.roots[frame.root]
    return Panel(
        str(frame),
        sample["image"].permute(1, 2, 0).numpy(),
        models,
        tasks,
        sample["targets"],
        matrix=sample["camera"].double().numpy() if frame.view == MAIN_VIEW and frame.view in root.cameras else None,
        pose=root.poses.get(frame.view),
    )


def describe_weights(source: Source) -> str:
    """Which weights of which run predict, as far as that is known; a run's own name is not repeated."""
    run, step = source.header.get("run", source.name), source.header.get("step")
    parts = ([str(run)] if run != source.name else []) + ([f"step {step}"] if step is not None else [])
    return ", ".join(parts)


def describe_source(source: Source, frame: Frame) -> str:
    parts = [describe_weights(source)]
    if source.record is not None and str(frame) in source.record.trained:
        parts.append("trained on this frame")
    elif not source.knows_frames:
        parts.append("it is unknown what it was trained on")
    return ", ".join(filter(None, parts))
