"""Build tasks, frames and networks from a config or a weights file, for the scripts and benchmarks."""

import contextlib
import hashlib
import inspect
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn
from tqdm import tqdm

from a2d2.dataset import Geometry, PreprocessedDataset, TeacherFiles, index_labels, index_roots
from a2d2.frames import VIEWS, Frame
from a2d2.images import ImageError, read_image, read_json, write_json
from a2d2.predictions import are_alike, digest_file, holds_predictions, sketch_picture
from a2d2.splits import SPLITS, SUBSETS, read_listed, split_frames
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
from training.checkpoint import is_own_weights, load_weights
from training.record import Record, group_names, ungroup_names
from training.run import find_recipe


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


WRITTEN = "pseudo_labels"  # section of the dataset.json of a folder of pseudo-labels, see describe_written
SKETCHES = 16  # pictures, at most, of which a folder of pseudo-labels has a sketch
DIGESTED_FILES = 100  # of each kind, whose content is in the fingerprint of pseudo-labels
KEPT_STATISTICS = 40  # entries of the file of label statistics in a root
SAME_PIXEL = 0.5  # pixels that the matrices of one camera may differ


class WrongUseError(ValueError):
    """An option or config that cannot work; programs print the message and end with exit code 2."""


@dataclass
class Data:
    """The frames of each subset, and the preprocessed datasets that contain them, by path.

    others: frames of the datasets that are in no subset.
    """

    subsets: dict[str, list[Frame]]
    roots: dict[Path, PreprocessedDataset]
    others: list[Frame] = field(default_factory=list)

    def find_identity(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """A fingerprint of each dataset, wherever it lies: size, cameras, and the options of these kinds of file."""
        kinds = sorted({*kinds})
        return tuple(root.find_identity(kinds) for root in self.roots.values())

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images in the preprocessed datasets."""
        return next(iter(self.roots.values())).size


@dataclass
class Split:
    """The rule that divides frames into subsets when a run starts; from then on the run's record says what is where."""

    name: str
    seed: int
    fractions: tuple[float, float, float]
    views: tuple[str, ...]
    roots: tuple[str, ...] = field(default_factory=tuple)
    file: str | None = None


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
        data_options.split_file,
    )


def load_data(split: Split, roots: list[str] | None = None, limit: int | None = None) -> Data:
    """Index preprocessed datasets (by default those of the split) and divide their frames by its rule; `limit`: per
    subset. What a run was trained on is another question, see `load_recorded_data`."""
    data = index_data(roots or split.roots, split.views)
    listed = None if split.file is None else read_listed(Path(split.file))
    subsets = split_frames(data.others, split.name, split.fractions, split.seed, listed)
    return Data({subset: members[:limit] for subset, members in subsets.items()}, data.roots)


def load_recorded_data(record: Record, split: Split, roots: list[str] | None = None) -> Data:
    """Index preprocessed datasets (by default those of the split), with the subsets that a run has recorded.

    Recorded frames that the datasets do not have are left out, and frames that were not recorded are in no subset.
    """
    data = index_data(roots or split.roots, split.views)
    by_name = {str(frame): frame for frame in data.others}
    subsets = {
        subset: [by_name[name] for name in record.subsets.get(subset, ()) if name in by_name] for subset in SUBSETS
    }
    recorded = {name for names in record.subsets.values() for name in names}
    return Data(subsets, data.roots, [frame for name, frame in by_name.items() if name not in recorded])


def index_data(roots: Sequence[str], views: Sequence[str]) -> Data:
    """All frames of the views in preprocessed datasets, none of them in a subset; ValueError if there are none."""
    frames, found = index_roots(roots, views)
    if not frames:
        raise ValueError(f"no images of {', '.join(views)} in {', '.join(map(str, found))}")
    return Data({subset: [] for subset in SUBSETS}, found, frames)


def find_labels(tasks: Mapping[str, Task], data: Data, views: Iterable[str]) -> dict[str, frozenset[Frame]]:
    """Task -> the frames, of any subset, that have a label of it; files are listed and not opened."""
    frames = [frame for members in [*data.subsets.values(), data.others] for frame in members]
    return {name: index_labels(frames, task.kind, views) for name, task in tasks.items()}


def check_recorded_data(
    record: Record, data: Data, labels: Mapping[str, Collection[Frame]], kinds: Iterable[str]
) -> list[str]:
    """What has become of the data since a run recorded them, one line each, for a run that goes on with the record.

    ValueError if a frame or label that it needs, for training or validation, is not there any more, or if the files of
    these kinds were made with other options since.
    """
    if sorted(data.find_identity(kinds)) != sorted(record.identity):
        raise ValueError(
            f"{', '.join(map(str, data.roots))}: size, cameras or the options of a kind of label are not those of the "
            "datasets this run started with: bring those back, or start another run with --run"
        )
    there = {str(frame) for members in data.subsets.values() for frame in members}
    notes = []
    where = ", ".join(map(str, data.roots))
    for subset in SUBSETS:
        missing = [name for name in record.subsets[subset] if name not in there]
        if missing and subset != "test":  # the test frames have no part in a run
            raise ValueError(
                f"{len(missing)} {subset} frames of this run are not in {where} any more, such as {missing[0]}: put "
                "them back, or start another run with --run"
            )
        if missing:
            notes.append(f"{len(missing)} of {len(record.subsets[subset])} recorded {subset} frames are not in {where}")
    needed = {*record.subsets["train"], *record.subsets["val"]}
    for task, found in labels.items():
        now, before = {str(frame) for frame in found}, set(record.labels[task])
        if gone := sorted((before & needed) - now):
            raise ValueError(
                f"{len(gone)} labels of {task} that this run uses are not in {where} any more, such as that of "
                f"{gone[0]}: make them again with preprocessing, or start another run with --run"
            )
        if added := (now & needed) - before:
            notes.append(f"{len(added)} labels of {task} are new since this run started; they are left out")
    if data.others:
        notes.append(f"{len(data.others)} frames are new since this run started, or in none of its subsets: left out")
    return notes


def build_tasks(options: dict[str, Any], label_statistics: dict[str, dict] | None = None) -> dict[str, Task]:
    """The task objects by name, in the order of TASKS."""
    return {name: TASKS[name](options[name], (label_statistics or {}).get(name)) for name in TASKS if name in options}


def adopt_classes(tasks: Mapping[str, Task], data: Data) -> dict[str, Task]:
    """The tasks, with the classes of the datasets where they take them from there. ValueError for datasets whose labels
    have different classes, or others than a task's."""
    settled = {}
    for name, task in tasks.items():
        given = {path: root.options[task.kind] for path, root in data.roots.items() if task.kind in root.options}
        options = task.adopt_classes(given)
        settled[name] = task if options == task.options else type(task)(options, task.label_statistics)
        for path, about in given.items():
            if conflict := settled[name].find_label_conflict(about):
                raise ValueError(f"{path}: {conflict}")
    return settled


def collect_label_statistics(
    tasks: Mapping[str, Task], having: Mapping[str, list[Frame]], protocol: Any, roots: Iterable[Path]
) -> None:
    """Compute the label statistics of each task, on some hundred training labels where that is enough.

    having: task -> the training frames, one or more, whose label of it is used. protocol: what is scored, as the
    constant baseline is the best one under it. Statistics of the same labels are kept in the first of the roots, and
    not computed again.
    """
    path = next(iter(roots)) / "reports" / "label_statistics.json"
    kept = _read_kept_statistics(path)
    computed = {}
    for name, task in tqdm(tasks.items(), desc="fit constants", leave=False):
        frames, block = having[name], getattr(protocol, name)
        step = -(-len(frames) // task.labels_for_statistics)
        sample = frames[::step]
        key = f"{name} {_digest_labels(task, frames, sample, block)}"
        if key in kept:
            task.label_statistics = kept[key]
        else:
            task.collect_statistics([task.load(frame) for frame in sample], block)
            computed[key] = task.label_statistics
        if doubt := task.find_doubt():  # also where statistics were kept
            warnings.warn(doubt, stacklevel=2)
    if computed:
        newest = dict(list((kept | computed).items())[-KEPT_STATISTICS:])
        with contextlib.suppress(OSError):  # a root that cannot be written to costs time at every start, no more
            write_json(path, newest)


def note_annotated(tasks: Mapping[str, Task], having: Mapping[str, list[Frame]], data: Data) -> None:
    """Add to the label statistics which classes the training labels do not annotate; `having` as above."""
    for name, task in tasks.items():
        roots = dict.fromkeys(frame.root for frame in having[name])
        lists = [(data.roots[root].options.get(task.kind) or {}).get("annotated_classes") for root in roots]
        task.label_statistics = task.label_statistics | task.list_annotated(lists)


def _read_kept_statistics(path: Path) -> dict[str, dict]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest_labels(task: Task, frames: list[Frame], sample: list[Frame], protocol: BaseModel) -> str:
    """What label statistics depend on: the task's code and options, the protocol, and the labels.

    A label that is written anew by renaming, as preprocessing and most copying programs do, changes the time of its
    folder. In case it was changed in place, some files are looked at too.
    """
    digest = hashlib.sha256(Path(inspect.getfile(type(task))).read_bytes())
    digest.update(f"{task.options.model_dump_json()} {protocol.model_dump_json()}".encode())
    folders = {(frame.root, frame.scene, frame.view): frame for frame in frames}
    for frame in folders.values():
        folder = frame.path(task.kind).parent
        digest.update(f"{folder.relative_to(frame.root)} {folder.stat().st_mtime_ns}".encode())
    for frame in sample[:: -(-len(sample) // 100)]:
        found = frame.path(task.kind).stat()
        digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    digest.update(" ".join(map(str, frames)).encode())
    return digest.hexdigest()[:32]


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


def find_ancestors(config: Any) -> tuple[str, ...] | None:
    """The names of the frames that the weights a run starts from, and its teachers, were trained on, by runs of this
    project; None if such weights do not say."""
    inherited: set[str] = set()
    for root in config.data.pseudo.roots if config.data.pseudo is not None else ():
        source = load_pseudo_labels(root)
        if not source.knows_frames:
            return None
        inherited |= source.record.trained
    for given in (config.train.init, config.model.encoder.weights):
        if given is None or not is_own_weights(find_weights(Path(given))):
            continue
        _, header = load_weights(find_weights(Path(given)))
        record = Record.from_dict(header["record"]) if "record" in header else None
        if record is None or record.inherited is None:
            return None
        inherited |= record.trained
    return tuple(sorted(inherited))


def initialise(net: nn.Module, init: str) -> list[str]:
    """Copy the weights of a run into a network, as far as names and shapes fit; notes on what did not.

    WrongUseError if nothing fits.
    """
    path = find_weights(Path(init))
    found, _ = load_weights(path)
    wanted = net.state_dict()
    fitting = {name: tensor for name, tensor in found.items() if name in wanted and wanted[name].shape == tensor.shape}
    if not fitting:
        raise WrongUseError(f"train.init={init}: none of its {len(found)} tensors fits this network")
    net.load_state_dict(fitting, strict=False)
    missing = [name for name in wanted if name not in fitting]
    notes = [f"{len(fitting)} of {len(wanted)} tensors start from {path}"]
    if missing:
        parts = Counter(".".join(name.split(".")[:2]) for name in missing)
        listed = ", ".join(f"{part} {number}" for part, number in parts.items())
        notes.append(f"{len(missing)} tensors start anew, because it has none of their name and shape: {listed}")
    return notes


def pick_device(name: str, option: str = "train.device") -> torch.device:
    """The device of this name; "auto": a GPU if there is one, else the CPU. WrongUseError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WrongUseError(f"{option} = {name!r}: {str(error).splitlines()[0]}") from error
    return device


@dataclass(kw_only=True)
class Source(ABC):
    """What scores and pictures need to know of where predictions come from: a network, or files.

    `name`; `tasks`; `split` and `record`, None where it is not known what was trained on; `header`: all that is known
    beside; `recipe`: see find_recipe.
    """

    name: str
    tasks: dict[str, Task]
    split: Split | None
    record: Record | None
    header: dict[str, Any]
    recipe: tuple[str, int] | None = None

    @property
    @abstractmethod
    def digest(self) -> str | None:
        """SHA-256 of the file with the weights; None if that is not known."""

    @abstractmethod
    def check_frames(self, frames: Iterable[Frame], data: Data) -> None:
        """ValueError unless predictions can belong to the pictures of these frames in `data`."""

    @property
    def knows_frames(self) -> bool:
        """Whether it is known which frames the network was trained on."""
        return self.record is not None and self.record.inherited is not None

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol of its own validation, as far as it concerns its tasks: "size" or "task.field" -> value."""
        values = {}
        for key, value in self.header.get("protocol", {}).items():
            if isinstance(value, dict):
                values |= {f"{key}.{field}": inner for field, inner in value.items() if key in self.tasks}
            else:
                values[key] = value
        return values


@dataclass(kw_only=True)
class Trained(Source):
    """A network from a weights file, in evaluation mode; `size`: (width, height) of its input; `header`: that of the
    file at `path`."""

    net: nn.Module
    size: tuple[int, int]
    split: Split
    path: Path

    @cached_property
    def digest(self) -> str | None:
        return digest_file(self.path)

    def check_frames(self, frames: Iterable[Frame], data: Data) -> None:
        """A network is given the pictures themselves."""

    def find_view_conflict(self, frames: Iterable[Frame], data: Data) -> str | None:
        """How the pictures of these frames differ in their field of view from those it was trained on, see
        find_view_conflict. Weights files of before do not say of which size these were, unless it is the input's."""
        size = self.header.get("picture_size")
        if size is None and self.header["model"].get("input_size") is None:
            size = self.size
        cameras = [
            {view: np.array(matrix) for view, matrix in views.items()}
            for views in self.header.get("cameras", {}).values()
        ]
        return find_view_conflict(cameras, None if size is None else tuple(size), frames, data)


@dataclass(kw_only=True)
class Predicted(Source):
    """A folder of predictions, as predict.py or another program has written it (docs/predictions.md).

    `size`: (width, height) of its maps, and of the pictures that its boxes are in, None if these are no frames of a
    dataset and each has its own; `cameras`: pinhole matrices by view, as far as it says them; `about`: of each task
    what its files mean; `header`: the section "predictions" of its dataset.json.
    """

    folder: Path
    size: tuple[int, int] | None
    cameras: dict[str, np.ndarray]
    about: dict[str, dict[str, Any]]

    @property
    def digest(self) -> str | None:
        return self.header.get("weights")

    def describe_teachers(self) -> str:
        """Of pseudo-labels, who has made them, and whose scores are calibrated."""
        names = ", ".join(str(each.get("run")) for each in self.header["teachers"]) or "no teacher"
        lines = self.header.get("calibration") or {}
        if not lines:
            return f"{names}; no scores are calibrated"
        return f"{names}; scores are calibrated of " + ", ".join(
            f"{name} (on {found.get('labels')} labels of {found.get('run')})" for name, found in lines.items()
        )

    def check_frames(self, frames: Iterable[Frame], data: Data) -> None:
        """Files of a dataset with another field of view have the same names, and would be scored and drawn without a
        word."""
        if conflict := find_view_conflict([self.cameras], self.size, frames, data):
            raise ValueError(
                f"{self.folder} was predicted on {conflict}; name its own dataset with --data, or predict this one"
            )


def find_view_conflict(
    cameras: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int] | None, frames: Iterable[Frame], data: Data
) -> str | None:
    """How the pictures of these frames differ in their field of view from those of (width, height) `size` that one of
    the `cameras`, pinhole matrices by view, has taken; None if they do not, as far as that is known."""
    for root, view in dict.fromkeys((frame.root, frame.view) for frame in frames):
        known = [each[view] for each in cameras if view in each]
        if not known or size is None or view not in data.roots[root].cameras:
            continue
        geometry, found = Geometry.identity(size, data.size), data.roots[root].cameras[view]
        expected = [geometry.map_camera(matrix) for matrix in known]
        if all(np.abs(matrix - found).max() > SAME_PIXEL for matrix in expected):
            (focal, middle), (own, its) = ((matrix[0, 0], matrix[0, 2]) for matrix in (expected[0], found))
            return (
                f"pictures of another field of view than those in {root}: its focal length is {focal:.1f} pixels, here "
                f"{own:.1f}, and its centre {middle:.1f}, here {its:.1f}"
            )
    return None


def load_trained_data(trained: Source, roots: list[str] | None = None) -> Data:
    """The frames in the subsets that a run has recorded, or, if its weights have no record, in those of its rule."""
    if trained.split is None:
        if not roots:
            raise WrongUseError(f"{trained.name} does not say which dataset it is about: name it with --data")
        return index_data(roots, VIEWS)
    if trained.record is None:
        return load_data(trained.split, roots)
    return load_recorded_data(trained.record, trained.split, roots)


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


def parse_split(content: Mapping[str, Any]) -> Split:
    """The split in a header, where JSON has made lists of its tuples."""
    return Split(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


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
        split = parse_split(header["split"])
        record = Record.from_dict(header["record"]) if "record" in header else None
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this version of the code: {error}") from error
    of_run = path.name == "best.safetensors"
    name = path.parent.name if of_run else path.stem
    recipe = find_recipe(path.parent, record) if of_run else None
    net = net.to(device).eval()
    return Trained(
        name=name, net=net, tasks=tasks, size=size, split=split, record=record, header=header, path=path, recipe=recipe
    )


def load_predictions(folder: Path) -> Predicted:
    """A folder of predictions for frames of a preprocessed dataset; ValueError if its dataset.json does not say enough.

    Of predictions of another program only `size` and the `classes` need to be there.
    """
    path = Path(folder) / "dataset.json"
    content = read_json(path)
    header = content["predictions"]
    try:
        size, kinds = content.get("size"), content.get("kinds", {})
        if size is not None and not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(each, int) and each > 0 for each in size)
        ):
            raise ValueError(f"size is {size}, expected [width, height]")
        given = header.get("tasks")
        if given is None:
            given = {name: {} for name, task in TASKS.items() if task.kind in kinds}
        if not given:
            raise ValueError(f"kinds has none of {', '.join(task.kind for task in TASKS.values())}")
        options = {name: TASKS[name].Options(**own) for name, own in given.items()}
        tasks = build_tasks(options, header.get("label_statistics"))
        about = {name: dict(kinds.get(task.kind, {})) for name, task in tasks.items()}
        cameras = {view: np.array(camera["matrix"]) for view, camera in (content.get("cameras") or {}).items()}
        if wrong := [view for view, matrix in cameras.items() if matrix.shape != (3, 3)]:
            raise ValueError(f"the matrix of camera {wrong[0]} is not 3 x 3")
        split = parse_split(header["split"]) if "split" in header else None
        record = Record.from_dict(header["record"]) if header.get("record") else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error} (docs/predictions.md has the format)") from error
    recipe = tuple(header["recipe"]) if header.get("recipe") else None
    name = Path(os.path.abspath(folder)).name
    size = None if size is None else tuple(size)
    return Predicted(
        name=name, folder=Path(folder), tasks=tasks, size=size, cameras=cameras, about=about, split=split,
        record=record, header=header, recipe=recipe,
    )  # fmt: skip


def load_pseudo_labels(root: str) -> Predicted:
    """A folder that pseudo_label.py has written; ValueError for another one."""
    if not holds_predictions(Path(root)):
        raise ValueError(f"data.pseudo.roots: {root} holds no pseudo-labels; make them with pseudo_label.py")
    source = load_predictions(Path(root))
    if "teachers" not in source.header:
        raise ValueError(
            f"data.pseudo.roots: {root} holds predictions without what their confidence needs: make pseudo-labels with "
            "pseudo_label.py"
        )
    if not isinstance(read_json(source.folder / "dataset.json").get("kinds"), dict):
        raise ValueError(
            f"data.pseudo.roots: {root}/dataset.json does not say what its files mean (kinds); write the pseudo-labels "
            "again with pseudo_label.py --overwrite"
        )
    return source


def describe_written(frames: Sequence[Frame], data: Data) -> dict[str, Any]:
    """Of pseudo-labels about these frames, the section WRITTEN of their dataset.json: `frames`, all that there will be,
    by scene and view, and `pictures`, sketches of some of them by frame. Damaged pictures are left out."""
    pictures = {}
    for frame in frames[:: -(-len(frames) // SKETCHES)]:
        with contextlib.suppress(OSError, ImageError):
            pictures[str(frame)] = sketch_picture(read_image(frame.path(data.roots[frame.root].image_kind)))
    return {"frames": group_names(map(str, frames)), "pictures": pictures}


def find_other_picture(content: Mapping[str, Any], frames: Iterable[Frame], data: Data) -> Frame | None:
    """The first of the frames in `data` that has another picture than that which pseudo-labels with this dataset.json
    were made of; None if there is none, as far as that is known. A damaged picture is found by whoever needs it."""
    known = content.get(WRITTEN, {}).get("pictures", {})
    for frame in sorted(frame for frame in frames if str(frame) in known):
        with contextlib.suppress(OSError, ImageError):
            found = sketch_picture(read_image(frame.path(data.roots[frame.root].image_kind)))
            if not are_alike(found, known[str(frame)]):
                return frame
    return None


def list_pseudo_labels(root: str, content: Mapping[str, Any], task: Task, frames: Sequence[Frame]) -> frozenset[Frame]:
    """Those of the frames, under the folder `root` with this dataset.json, that teachers say something about.
    ValueError if files are still missing, as far as the folder says which there will be."""
    views = {frame.view for frame in frames}
    having = [index_labels(frames, kind, views) for kind in task.soft_kinds]
    wanted = having[0]
    if WRITTEN in content:
        listed = set(ungroup_names(content[WRITTEN]["frames"]))
        wanted = frozenset(frame for frame in frames if str(frame) in listed)
    for kind, there in zip(task.soft_kinds, having, strict=True):
        if missing := sorted(wanted - there):
            raise ValueError(
                f"data.pseudo.roots: {root} is not finished: {len(missing)} of {len(wanted)} frames have no {kind} "
                f"file yet, such as {missing[0]}; run pseudo_label.py again as before (all of its shards), and see its "
                "reports"
            )
    return having[0]


def digest_pseudo_labels(task: Task, frames: Sequence[Frame]) -> str:
    """A fingerprint of the files that teachers have written about these frames: the sizes of all, and the content of
    some, because there may be gigabytes. Times are left out, so that a copy has the same one."""
    digest = hashlib.sha256()
    for kind in task.soft_kinds:
        paths = [frame.path(kind) for frame in frames]
        digest.update(" ".join(str(path.stat().st_size) for path in paths).encode())
        for path in paths[:: -(-len(paths) // DIGESTED_FILES) or 1]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def find_teacher_files(
    roots: Sequence[str],
    tasks: Mapping[str, Task],
    data: Data,
    assignment: Mapping[str, Sequence[int]],
    size: tuple[int, int],
) -> tuple[TeacherFiles, tuple[str, ...]]:
    """What teachers say about the training frames, of each task about those whose true label is not used, and a
    fingerprint of it; `size`: (width, height) of the network's input.

    ValueError for pseudo-labels that do not fit the tasks or the dataset, that two folders have, or that say nothing
    new.
    """
    frames = data.subsets["train"]
    found: dict[str, dict[Frame, Frame]] = {name: {} for name in tasks}
    about, identity, notes = {}, [], []
    for root in roots:
        source = load_pseudo_labels(root)
        if source.size != data.size:
            raise ValueError(
                f"data.pseudo.roots: {root} has pictures of {source.size}, this dataset {data.size}; make "
                "pseudo-labels of it with pseudo_label.py --data"
            )
        content = read_json(source.folder / "dataset.json")
        kinds = content["kinds"]
        about[source.folder] = kinds
        moved, spoken, files = [frame.under(source.folder) for frame in frames], set(), hashlib.sha256()
        digest = hashlib.sha256(json.dumps([source.header, kinds], sort_keys=True).encode())
        for name, task in tasks.items():
            if task.soft_kind not in kinds:
                continue
            conflict = task.find_soft_conflict(kinds, size)
            if name in source.tasks:
                conflict = conflict or task.find_teacher_conflict(source.tasks[name])
            if conflict:
                raise ValueError(f"data.pseudo.roots: {root}: {name}: {conflict}")
            there = list_pseudo_labels(root, content, task, moved)
            spoken |= there
            files.update(f"{name} {digest_pseudo_labels(task, sorted(there))}".encode())
            digest.update(f"{name} {' '.join(sorted(map(str, there)))}".encode())
            used = {frames[index] for index in assignment[name]}
            if twice := sorted(there & found[name].keys()):
                raise ValueError(
                    f"data.pseudo.roots: {root} and {found[name][twice[0]].root} both have pseudo-labels of {name}, "
                    f"such as for {twice[0]}: leave one of them out"
                )
            found[name] |= {frame: frame.under(source.folder) for frame in there - used}
        about_these = [frame for frame in frames if frame in spoken]
        source.check_frames(about_these, data)
        if (other := find_other_picture(content, about_these, data)) is not None:
            raise ValueError(
                f"data.pseudo.roots: {root} was made of other pictures with the same names, such as {other}: make "
                f"pseudo-labels of {other.root} with pseudo_label.py --data"
            )
        identity.append(f"{digest.hexdigest()[:16]}-{files.hexdigest()[:16]}")
        notes.append(f"pseudo-labels in {root} are of {source.describe_teachers()}")
    if not any(found.values()):
        raise ValueError(
            f"data.pseudo.roots: there is nothing to learn from {', '.join(roots)}: they have other tasks or other "
            "frames, or the true labels of all their frames are used"
        )
    return TeacherFiles(tasks, found, about, data.size, tuple(notes)), tuple(identity)


def load_source(path: Path, device: torch.device) -> Trained | Predicted:
    """A run folder, a weights file or a folder of predictions. ValueError for anything else."""
    return load_predictions(path) if holds_predictions(path) else load_trained(path, device)


def add_source(sources: dict[str, Source], path: Path, device: torch.device) -> str:
    """Load a source and add it by its name, or by its path if another has that name; returns the name."""
    source = load_source(path, device)
    name = source.name if source.name not in sources else str(path)
    sources[name] = source
    return name
