"""Build tasks, frames and networks from a config or a weights file, for the scripts and benchmarks."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn
from tqdm import tqdm

from a2d2.dataset import PreprocessedDataset, index_roots
from a2d2.frames import VIEWS, Frame
from a2d2.splits import SPLITS, split_frames
from models.bifpn import BiFPN
from models.densedepth import STRIDES, DenseDepth
from models.encoders import Encoder
from models.multitask import MultitaskNet
from models.pilotnet import PilotNet
from models.thesis import HEADS, ThesisNet
from models.unet import UNet
from models.yolo import Yolo
from tasks import TASKS
from tasks.task import Task
from training.checkpoint import load_weights


@dataclass(frozen=True)
class Kind:
    """Which options of a config a kind of network uses.

    output_formats: those of its own heads (see Task.output_format); None: every task builds its head.
    one_task: the network is for a single task.
    encoder, neck, tasks_heads: it uses these blocks of the config; the others must have their defaults.
    """

    output_formats: tuple[str, ...] | None
    one_task: bool = True
    encoder: bool = False
    neck: bool = False
    tasks_heads: bool = False


KINDS = {
    "multitask": Kind(None, one_task=False, encoder=True, neck=True, tasks_heads=True),
    "unet": Kind(("map",)),
    "densedepth": Kind(("log_depth",), encoder=True),
    "yolo": Kind(("boxes",), tasks_heads=True),
    "pilotnet": Kind(("numbers",)),
    "thesis": Kind(tuple(HEADS), one_task=False, encoder=True),
}


class WrongUseError(ValueError):
    """An option or config that cannot work; programs print the message and end with exit code 2."""


@dataclass
class Data:
    """The frames of each subset, and the preprocessed datasets that contain them, by path."""

    subsets: dict[str, list[Frame]]
    roots: dict[Path, PreprocessedDataset]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images in the preprocessed datasets."""
        return next(iter(self.roots.values())).size


@dataclass
class Split:
    """The rule that divides frames into subsets. Weights files contain it, so that evaluation divides them alike."""

    name: str
    seed: int
    fractions: tuple[float, float, float]
    views: tuple[str, ...]
    roots: tuple[str, ...] = field(default_factory=tuple)


def read_split(data_options: Any) -> Split:
    """The split of a config's `data` block; WrongUseError for an unknown split or camera."""
    if data_options.split not in SPLITS:
        raise WrongUseError(f"data.split = {data_options.split!r}: choose one of {', '.join(SPLITS)}")
    if unknown := [view for view in data_options.views if view not in VIEWS]:
        raise WrongUseError(f"data.views: no camera {', '.join(unknown)}; there are {', '.join(VIEWS)}")
    return Split(
        data_options.split,
        data_options.split_seed,
        tuple(data_options.split_fractions),
        tuple(data_options.views),
        tuple(data_options.roots),
    )


def load_data(split: Split, roots: list[str] | None = None, limit: int | None = None) -> Data:
    """Index preprocessed datasets (by default those of the split) and divide their frames; `limit`: per subset."""
    frames, found = index_roots(roots or split.roots, split.views)
    if not frames:
        raise ValueError(f"no images of {', '.join(split.views)} in {', '.join(map(str, found))}")
    subsets = split_frames(frames, split.name, split.fractions, split.seed)
    return Data({subset: members[:limit] for subset, members in subsets.items()}, found)


def build_tasks(options: dict[str, Any], label_statistics: dict[str, dict] | None = None) -> dict[str, Task]:
    """The task objects by name, in the order of TASKS."""
    return {name: TASKS[name](options[name], (label_statistics or {}).get(name)) for name in TASKS if name in options}


def collect_label_statistics(tasks: dict[str, Task], frames: list[Frame]) -> None:
    """Compute the label statistics of each task, on some hundred training labels where that is enough."""
    for task in tqdm(tasks.values(), desc="fit constants", leave=False):
        having = [frame for frame in frames if task.has_label(frame)]
        if not having:
            raise ValueError(
                f"no training frame has a label for {task.name}: run its preprocessing script, or leave the task out "
                f"(tasks.{task.name}=null)"
            )
        limit = task.labels_for_statistics or len(having)
        step = max(1, len(having) // limit)
        task.collect_statistics([task.load(frame) for frame in having[::step]])


def build_network(model: Any, tasks: dict[str, Task], size: tuple[int, int], load_pretrained: bool = True) -> nn.Module:
    """The network of a config's `model` block; `size` is (width, height) of its input.

    Without `load_pretrained` the encoder starts untrained, whatever the config, because a file provides its weights.

    WrongUseError: a kind of network that does not fit the tasks, or options that it would ignore. ValueError: an
    unknown encoder, or one whose weights cannot be loaded.
    """
    check_fit(model, tasks)

    def build_encoder(**given: Any) -> Encoder:
        options = model.encoder.model_dump()
        if not load_pretrained:
            options |= {"pretrained": False, "weights": None}
        return Encoder(**options, size=(size[1], size[0]), **given)

    if model.kind == "multitask":
        encoder = build_encoder()
        neck = BiFPN(encoder.channels, **model.neck.model_dump())
        channels = encoder.channels | neck.channels
        return MultitaskNet(encoder, neck, {name: build_head(task, channels) for name, task in tasks.items()})
    if model.kind == "thesis":
        heads = {name: (task.output_format, task.head_arguments()) for name, task in tasks.items()}
        return ThesisNet(build_encoder(), heads, (size[1], size[0]))
    ((name, task),) = tasks.items()
    if model.kind == "yolo":
        return Yolo(name, partial(build_head, task))
    if model.kind == "densedepth":
        return DenseDepth(name, build_encoder(strides=STRIDES), **task.head_arguments())
    return {"unet": UNet, "pilotnet": PilotNet}[model.kind](name, **task.head_arguments())


def build_head(task: Task, channels: dict[str, int]) -> nn.Module:
    """The task's own head; WrongUseError if its options do not fit the features."""
    try:
        return task.head(channels)
    except ValueError as error:
        raise WrongUseError(f"tasks.{task.name}.head: {error}") from error


def check_fit(model: Any, tasks: dict[str, Task]) -> None:
    """WrongUseError if a kind of network lacks the output format of a task, or would ignore given options."""
    kind = KINDS[model.kind]
    if kind.one_task and len(tasks) != 1:
        raise WrongUseError(
            f"model.kind={model.kind} is for one task, not for {', '.join(tasks) or 'none'}: leave the others out "
            f"(tasks.NAME=null), or take model.kind=multitask"
        )
    for name, task in tasks.items():
        if kind.output_formats is not None and task.output_format not in kind.output_formats:
            fitting = [
                other
                for other, its in KINDS.items()
                if its.output_formats is None or task.output_format in its.output_formats
            ]
            raise WrongUseError(
                f"model.kind={model.kind} has the output format {' or '.join(kind.output_formats)}, but tasks.{name} "
                f"asks for {task.output_format}: take model.kind={' or '.join(fitting)}, change that task's options, "
                f"or leave it out (tasks.{name}=null)"
            )
    ignored = []
    if not kind.encoder:
        ignored += list_changed("model.encoder", model.encoder)
    if not kind.neck:
        ignored += list_changed("model.neck", model.neck)
    if not kind.tasks_heads:
        heads = {name: getattr(task.options, "head", None) for name, task in tasks.items()}
        for name, options in heads.items():
            ignored += list_changed(f"tasks.{name}.head", options) if options is not None else []
    if ignored:
        raise WrongUseError(f"model.kind={model.kind} has no use for {', '.join(ignored)}: leave it at its default")


def list_changed(key: str, options: BaseModel) -> list[str]:
    """The options of a block that differ from their defaults, as key=value."""
    values, defaults = options.model_dump(mode="json"), type(options)().model_dump(mode="json")
    return [f"{key}.{name}={value}" for name, value in values.items() if value != defaults[name]]


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto": a GPU if there is one, else the CPU. WrongUseError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WrongUseError(f"train.device = {name!r}: {str(error).splitlines()[0]}") from error
    return device


@dataclass
class Trained:
    """A network from a weights file, in evaluation mode, with the contents of the file's header."""

    name: str
    net: nn.Module
    tasks: dict[str, Task]
    size: tuple[int, int]
    split: Split
    header: dict[str, Any]


def find_weights(run: Path) -> Path:
    """The best weights of a run folder; the path of a weights file is returned as it is. ValueError if missing."""
    run = Path(run)
    if run.is_dir():
        if not (run / "best.safetensors").is_file():
            raise ValueError(f"{run} has no best.safetensors; is it a run folder whose training has been evaluated?")
        return run / "best.safetensors"
    if not run.is_file():
        raise ValueError(f"no run folder or weights file {run}")
    return run


def load_trained(run: Path, device: torch.device) -> Trained:
    """Build a network from a weights file alone, without the config. ValueError if the file does not fit this code."""
    from training.config import Model

    path = find_weights(run)
    tensors, header = load_weights(path)
    try:
        options = {name: TASKS[name].Options(**given) for name, given in header["tasks"].items()}
        tasks = build_tasks(options, header["fitted"])
        size = tuple(header["input_size"])
        net = build_network(Model(**header["model"]), tasks, size, load_pretrained=False)
        net.load_state_dict(tensors)
        split = Split(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in header["split"].items()}
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this version of the code: {error}") from error
    name = path.parent.name if path.name == "best.safetensors" else path.stem
    return Trained(name, net.to(device).eval(), tasks, size, split, header)
