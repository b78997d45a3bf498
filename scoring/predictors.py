"""Where predictions come from when they are scored or drawn: a network that is run, or files that say what one said."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from a2d2.dataset import DatasetError, FrameDataset, PreprocessedDataset, index_labels
from a2d2.frames import Frame
from experiment import Predicted, Source, Trained
from tasks.task import Task
from training.cycle import move


class Predictor(ABC):
    """Predictions for the labelled rows of batches."""

    @abstractmethod
    def load(
        self,
        frames: Sequence[Frame],
        roots: Mapping[Path, PreprocessedDataset],
        scorers: Mapping[str, Task],
        size: tuple[int, int],
        labels: Mapping[str, Collection[Frame]] | None,
    ) -> FrameDataset:
        """The frames with all that `predict` needs, and with the targets of `scorers`, the tasks that load labels and
        score, at (width, height) `size`."""

    @abstractmethod
    def predict_frame(
        self, frame: Frame, roots: Mapping[Path, PreprocessedDataset], tasks: Mapping[str, Task], size: tuple[int, int]
    ) -> dict[str, Any]:
        """For each task one row for a frame, for labels of (width, height) `size`; a task without a prediction is left
        out."""

    @abstractmethod
    def predict(self, batch: Mapping[str, Any], scorers: Mapping[str, Task], size: tuple[int, int]) -> dict[str, Any]:
        """For each task with labelled rows in the batch the predictions for them, in the classes of its scorer."""


class NetPredictor(Predictor):
    """A network in evaluation mode. `size`: (width, height) of its input; `autocast` opens a context of mixed
    precision."""

    def __init__(
        self, net: nn.Module, tasks: Mapping[str, Task], size: tuple[int, int], device: torch.device, autocast: Callable
    ):
        self.net, self.tasks, self.size, self.device, self.autocast = net, tasks, size, device, autocast

    def load(self, frames, roots, scorers, size, labels):
        return FrameDataset(frames, roots, scorers, size=self.size, target_size=size, labels=labels)

    def predict_frame(self, frame, roots, tasks, size):
        image = FrameDataset([frame], roots, {}, size=self.size)[0]["image"][None]
        batch = {"image": image, "rows": dict.fromkeys(tasks)}
        return {name: rows[0] for name, rows in self.predict(batch, tasks, size).items()}

    @torch.no_grad()
    def predict(self, batch, scorers, size):
        self.net.eval()
        image = batch["image"].to(self.device, non_blocking=True)
        with self.autocast():
            outputs = self.net(image, move(batch["rows"], self.device))
        return {
            name: self.tasks[name].translate(self.tasks[name].predict(output, size), scorers[name])
            for name, output in outputs.items()
        }


class FilePredictor(Predictor):
    """A folder of predictions. `about`: of each task what `describe_files` said; `size`: (width, height) they were made
    for."""

    def __init__(self, folder: Path, about: Mapping[str, Mapping[str, Any]], size: tuple[int, int]):
        self.folder, self.about, self.size = folder, about, size

    def load(self, frames, roots, scorers, size, labels):
        self.check_complete(frames, scorers, labels)
        return _PredictedFrames(self, frames, roots, scorers, size, labels)

    def check_complete(
        self,
        frames: Sequence[Frame],
        scorers: Mapping[str, Task],
        labels: Mapping[str, Collection[Frame]] | None,
    ) -> None:
        """DatasetError if a labelled frame has no prediction: to leave it out would change the score without a word."""
        views = {frame.view for frame in frames}
        for name, task in scorers.items():
            wanted = index_labels(frames, task.kind, views) if labels is None else set(frames) & set(labels[name])
            found = index_labels([frame.under(self.folder) for frame in frames], task.kind, views)
            if missing := sorted(wanted - found):
                raise DatasetError(
                    f"{self.folder} has no prediction of {name} for {len(missing)} of {len(wanted)} labelled frames, "
                    f"such as {missing[0]}: let predict.py finish it, or score a subset that it has"
                )

    def read(self, frame: Frame, task: Task, size: tuple[int, int]) -> Any:
        """One frame's prediction for labels of (width, height) `size`."""
        path = frame.under(self.folder).path(task.kind)
        return task.load_prediction(path, self.about[task.name], size, self.size)

    def predict_frame(self, frame, roots, tasks, size):
        found = {}
        for name, task in tasks.items():
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.read(frame, task, size)
        return found

    def predict(self, batch, scorers, size):
        return {name: scorers[name].batch_predictions(rows) for name, rows in batch["predictions"].items()}


def make_predictor(
    source: Source, device: torch.device, autocast: Callable = contextlib.nullcontext
) -> NetPredictor | FilePredictor:
    """What predicts for a run, whose network is moved to the device, or for files. ValueError for files that are about
    no frames of a dataset."""
    if isinstance(source, Trained):
        net = source.net.to(device, memory_format=torch.channels_last)
        return NetPredictor(net, source.tasks, source.size, device, autocast)
    assert isinstance(source, Predicted)
    if source.size is None:
        raise ValueError(f"{source.folder} is about pictures without labels, so there is nothing to score")
    return FilePredictor(source.folder, source.about, source.size)


class _PredictedFrames(FrameDataset):
    """Targets and predictions from files; pictures are not read."""

    def __init__(self, source: FilePredictor, frames, roots, scorers, size, labels):
        super().__init__(frames, roots, scorers, target_size=size, labels=labels)
        self.predictions = source

    def __getitem__(self, index: int) -> dict[str, Any]:
        frame = self.frames[index]
        targets = self.load_targets(frame, self.tasks, self.target_geometry)
        predictions = {name: self.predictions.read(frame, self.tasks[name], self.target_size) for name in targets}
        return {"frame": str(frame), "targets": targets, "predictions": predictions}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().collate([{key: sample[key] for key in ("frame", "targets")} for sample in samples])
        batch["predictions"] = {
            name: [sample["predictions"][name] for sample in samples if name in sample["targets"]]
            for name in batch["rows"]
        }
        return batch
