"""The sample: one frame's image and the targets of all tasks that the frame has labels for.

Reads preprocessed datasets, as the scripts in preprocessing/ write them. The caller passes the tasks.
"""

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from a2d2.calibration import Pose
from a2d2.frames import Frame, list_frames
from a2d2.images import read_image, read_json

GRAY = 124  # of what is hidden: about the mean of natural pictures
HOLE = (0.1, 0.3)  # smallest and largest side of a hole, in shares of the picture's
BLUR = (0.001, 0.006)  # smallest and largest standard deviation of a blur, in widths of the picture


class DatasetError(ValueError):
    """A preprocessed dataset cannot be used; the message gives the reason and what to do."""


Holes = tuple[tuple[float, float, float, float], ...]
"""Hidden rectangles of a picture: [left, top, right, bottom] in shares of width and height."""


@dataclass(frozen=True)
class Geometry:
    """A geometric transform: a crop [left, top, width, height] of the source, resized to `size`, then flipped
    horizontally if `flip`. Last, the rectangles `holes` of the result are hidden.

    All values are whole pixels; sizes are (width, height). Holes are [left, top, right, bottom] in shares of width and
    height. `Geometry.identity(size)` changes nothing.
    """

    source: tuple[int, int]
    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False
    holes: Holes = ()

    @classmethod
    def identity(cls, source: tuple[int, int], size: tuple[int, int] | None = None) -> "Geometry":
        """The whole source image, resized to `size` (default: not resized)."""
        return cls(source, (0, 0, *source), size or source)

    @property
    def scale(self) -> tuple[float, float]:
        """Factors in x and y by which the crop is enlarged."""
        return self.size[0] / self.crop[2], self.size[1] / self.crop[3]

    @property
    def zoom(self) -> float:
        """Factor by which objects are larger than in the whole image resized to `size`; 1 without a crop."""
        return self.source[0] / self.crop[2]

    def sample_nearest(self, array: np.ndarray) -> np.ndarray:
        """Transform a map (H, W) of the source, of any resolution, by nearest neighbour; the result has `size`."""
        height, width = array.shape[:2]
        left, top = self.crop[:2]
        columns = (left + (np.arange(self.size[0]) + 0.5) / self.scale[0]) * width / self.source[0]
        rows = (top + (np.arange(self.size[1]) + 0.5) / self.scale[1]) * height / self.source[1]
        if not self._keeps_pixels(array):
            array = array[rows.astype(np.intp)[:, None], columns.astype(np.intp)[None]]
        return np.ascontiguousarray(array[:, ::-1]) if self.flip else array

    def splat_nearest(self, array: np.ndarray) -> np.ndarray:
        """Transform a sparse map of distances (H, W), 0 for nothing, of any resolution; the result has `size`.

        Each point goes to the pixel that contains it, and the nearest of several stays: picking one pixel of each
        neighbourhood would lose most points of a map that shrinks, keep some that others hide, and double points of one
        that grows.
        """
        result = array
        if not self._keeps_pixels(array):
            height, width = array.shape
            x = (np.arange(width) + 0.5) * self.source[0] / width - self.crop[0]
            y = (np.arange(height) + 0.5) * self.source[1] / height - self.crop[1]
            new_columns = np.floor(x * self.scale[0]).astype(np.intp)
            new_rows = np.floor(y * self.scale[1]).astype(np.intp)
            left, right = np.searchsorted(new_columns, (0, self.size[0]))
            top, bottom = np.searchsorted(new_rows, (0, self.size[1]))
            array, new_columns, new_rows = array[top:bottom, left:right], new_columns[left:right], new_rows[top:bottom]
            rows, columns = np.divmod(np.flatnonzero(array), max(array.shape[1], 1))
            values = array[rows, columns]
            order = np.argsort(-values, kind="stable")  # the last of several values for one pixel stays
            result = np.zeros(self.size[::-1], array.dtype)
            result[new_rows[rows[order]], new_columns[columns[order]]] = values[order]
        return np.ascontiguousarray(result[:, ::-1]) if self.flip else result

    def _keeps_pixels(self, array: np.ndarray) -> bool:
        """Whether a map keeps its pixels, but for a flip."""
        return self.crop == (0, 0, *self.source) and array.shape[1::-1] == self.size

    def list_holes(self) -> list[tuple[slice, slice]]:
        """The rows and columns of each hole of a result of `size`."""
        width, height = self.size
        return [
            (slice(round(top * height), round(bottom * height)), slice(round(left * width), round(right * width)))
            for left, top, right, bottom in self.holes
        ]

    def hide(self, array: np.ndarray, nothing: int | float) -> np.ndarray:
        """A map (H, W) of the result, with the value for "nothing" in the holes."""
        if self.holes:
            array = array.copy()
            for hole in self.list_holes():
                array[hole] = nothing
        return array

    def measure_hidden(self, boxes: np.ndarray) -> np.ndarray:
        """The share of each box (n, 4), in pixels of the result, that holes hide; of overlapping ones at least."""
        areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)
        hidden = np.zeros(len(boxes))
        scale = np.array([*self.size, *self.size])
        for hole in self.holes:
            left, top, right, bottom = np.array(hole) * scale
            width = np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left)
            height = np.minimum(boxes[:, 3], bottom) - np.maximum(boxes[:, 1], top)
            hidden = np.maximum(hidden, width.clip(min=0) * height.clip(min=0) / areas)
        return hidden

    def map_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) [x1, y1, x2, y2] of edges in the source -> in the result, not clipped."""
        scale, offset = np.array([*self.scale, *self.scale]), np.array([*self.crop[:2], *self.crop[:2]])
        mapped = (boxes - offset) * scale
        if self.flip:
            mapped[:, [0, 2]] = self.size[0] - mapped[:, [2, 0]]
        return mapped

    def map_camera(self, matrix: np.ndarray) -> np.ndarray:
        """Pinhole matrix (3, 3) of the source -> of the result; pixel centres are at integers."""
        matrix = matrix.copy()
        for axis in (0, 1):
            matrix[axis, axis] *= self.scale[axis]
            matrix[axis, 2] = (matrix[axis, 2] + 0.5 - self.crop[axis]) * self.scale[axis] - 0.5
        if self.flip:
            matrix[0, 2] = self.size[0] - 1 - matrix[0, 2]
        return matrix

    def transform_image(self, image: UInt8[torch.Tensor, "3 h w"]) -> UInt8[torch.Tensor, "3 H W"]:
        left, top, width, height = self.crop
        if (left, top, width, height) != (0, 0, *self.source) or self.size != self.source:
            image = transforms.resized_crop(
                image, top, left, height, width, [self.size[1], self.size[0]], antialias=True
            )
        image = transforms.horizontal_flip(image) if self.flip else image
        if self.holes:
            image = image.clone()
            for rows, columns in self.list_holes():
                image[:, rows, columns] = GRAY
        return image


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a training frame: a horizontal flip with probability `flip`, a zoom drawn from the range
    `scale` (1 or more), brightness, contrast and saturation changed by up to `color`, a Gaussian blur with probability
    `blur`, and up to `cutouts` rectangles hidden."""

    flip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    color: float = 0.0
    blur: float = 0.0
    cutouts: int = 0

    def draw_geometry(self, source: tuple[int, int], size: tuple[int, int], rng: random.Random) -> Geometry:
        """Draw a geometry with `rng`.

        The number of draws does not depend on the options, so one option does not change the draws of another.
        """
        flip = rng.random() < self.flip
        zoom = rng.uniform(*self.scale)
        width, height = (max(1, round(extent / zoom)) for extent in source)
        left = round(rng.random() * (source[0] - width))
        top = round(rng.random() * (source[1] - height))
        return Geometry(source, (left, top, width, height), size, flip)

    def change_color(self, image: UInt8[torch.Tensor, "3 H W"], rng: random.Random) -> UInt8[torch.Tensor, "3 H W"]:
        for adjust in (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation):
            factor = rng.uniform(1 - self.color, 1 + self.color)
            if self.color:
                image = adjust(image, factor)
        return image

    def blur_some(self, image: UInt8[torch.Tensor, "3 H W"], rng: random.Random) -> UInt8[torch.Tensor, "3 H W"]:
        draw, sigma = rng.random(), rng.uniform(*BLUR) * image.shape[2]
        if draw >= self.blur:
            return image
        return transforms.gaussian_blur(image, 2 * math.ceil(2 * sigma) + 1, sigma)

    def cut_out(self, geometry: Geometry, rng: random.Random) -> Geometry:
        """The geometry with up to `cutouts` holes; draws come last, and their number depends on that of the holes."""
        holes = []
        for _ in range(rng.randint(0, self.cutouts)):
            width, height = rng.uniform(*HOLE), rng.uniform(*HOLE)
            left, top = rng.random() * (1 - width), rng.random() * (1 - height)
            holes.append((left, top, left + width, top + height))
        return replace(geometry, holes=tuple(holes))


@dataclass(frozen=True)
class PreprocessedDataset:
    """A preprocessed dataset as its dataset.json describes it: `size` (width, height), pinhole matrices of all
    cameras by view, the kind of its images ("image" or "image_lossless"), the options that each kind of file was made
    with, and the poses of the cameras, as far as they are known."""

    path: Path
    size: tuple[int, int]
    cameras: dict[str, np.ndarray]
    image_kind: str
    options: dict[str, Any]
    poses: dict[str, Pose] = field(default_factory=dict)

    def find_identity(self, kinds: Sequence[str]) -> str:
        """A fingerprint of the size, the cameras and the options of these kinds of file, and of the images."""
        cameras = {name: matrix.tolist() for name, matrix in sorted(self.cameras.items())}
        content = [list(self.size), cameras, {kind: self.options.get(kind) for kind in ("camera", *kinds)}]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_dataset(path: str | Path) -> PreprocessedDataset:
    """Read the dataset.json of a preprocessed dataset; DatasetError if it is missing, damaged, or lists no images."""
    path = Path(path)
    try:
        content = read_json(path / "dataset.json")
        cameras = {name: np.array(camera["matrix"]) for name, camera in content["cameras"].items()}
        poses = {
            name: Pose(np.array(camera["pose"]["origin"]), np.array(camera["pose"]["axes"]))
            for name, camera in content["cameras"].items()
            if "pose" in camera
        }
        camera_options = content["kinds"].get("camera")
        size = tuple(content["size"])
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is no preprocessed dataset: it has no dataset.json. Make one with the scripts in preprocessing/, "
            f"or give another folder in data.roots"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}/dataset.json cannot be read ({error!r}); run preprocessing again") from error
    if camera_options is None:
        raise DatasetError(f"{path} has no images: run preprocessing/camera.py for it")
    image_kind = "image" if camera_options["format"] == "jpg" else "image_lossless"
    return PreprocessedDataset(path, size, cameras, image_kind, content["kinds"], poses)


def index_roots(
    paths: Sequence[str | Path], views: Sequence[str]
) -> tuple[list[Frame], dict[Path, PreprocessedDataset]]:
    """All frames that have an image, sorted, each with its root, and the preprocessed datasets by path.

    DatasetError if the datasets differ in size, or if two of them contain the same frame.
    """
    roots = {Path(path): read_dataset(path) for path in paths}
    sizes = {root.size: path for path, root in roots.items()}
    if len(sizes) > 1:
        listed = ", ".join(f"{path} {size[0]}x{size[1]}" for size, path in sizes.items())
        raise DatasetError(f"preprocessed datasets of different size cannot be mixed: {listed}")
    owner: dict[Frame, Path] = {}
    for path, root in roots.items():
        found = list_frames(path, root.image_kind, views)
        if shared := owner.keys() & set(found):
            frame = min(shared)
            raise DatasetError(
                f"frame {frame} is in two roots, {owner[frame]} and {path}; leave one of them out. If they hold other "
                "pictures, whose folders have the same names, import one of them anew with a --prefix"
            )
        owner |= dict.fromkeys(found, path)
    return sorted(owner, key=lambda frame: (frame.scene, frame.view, frame.id)), roots


def index_labels(frames: Iterable[Frame], kind: str, views: Iterable[str]) -> frozenset[Frame]:
    """Those of the frames that have a derived file of this kind in the root they lie in; files are not opened."""
    by_root: dict[Path, list[Frame]] = defaultdict(list)
    for frame in frames:
        by_root[frame.root].append(frame)
    views = tuple(views)
    found: set[Frame] = set()
    for root, members in by_root.items():
        found |= set(members).intersection(list_frames(root, kind, views))
    return frozenset(found)


@dataclass(frozen=True)
class TeacherFiles:
    """What teachers say about frames, in folders that pseudo_label.py has written.

    `frames`: task -> frame -> the same frame under its folder, of the frames that learn from it. `about`: folder ->
    what its dataset.json says of each kind of file; `size`: (width, height) of the pictures they were made for;
    `notes`: a line about each folder, its teachers and whether their scores are calibrated.
    """

    tasks: Mapping[str, Any]
    frames: Mapping[str, Mapping[Frame, Frame]]
    about: Mapping[Path, Mapping[str, Mapping[str, Any]]]
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    def load(self, frame: Frame, names: Iterable[str], geometry: Geometry) -> dict[str, Any]:
        """The soft targets of a frame under a geometry, of those of the named tasks about which there are files.
        DatasetError if a file is not there any more."""
        found = {}
        for name in names:
            place = self.frames.get(name, {}).get(frame)
            if place is None:
                continue
            said = self.tasks[name].load_soft(place, self.about[place.root], self.size)
            if said is None:
                raise DatasetError(
                    f"the pseudo-label of {name} of {frame} has vanished from {place.root}; make it again"
                )
            found[name] = self.tasks[name].transform_soft(said, geometry)
        return found


class FrameDataset(Dataset):
    """Samples by index, or by (index, seed, task names[, names of tasks that learn from teachers]).

    With a seed the frame is augmented by a random generator with this seed, so a sample depends on its index and seed
    only, not on the worker that loads it. Only the labels of the named tasks are loaded; by default those of all tasks.
    With `labels`, task -> frames, a label is loaded only where it says so, and DatasetError if it is not there then.
    What teachers say about a frame, see TeacherFiles, is loaded where the frame has no true label that is used.

    A sample is a dict:
        image     uint8 (3, H, W), RGB, at the training size
        targets   {task: target} as `task.transform` returns it, of the tasks whose label was loaded
        camera    float32 (3, 3), the pinhole matrix of `image`, pixel centres at integers. A zoom leaves the focal
                  length, because it divides depth instead; NaN where the camera is unknown
        frame     "scene/view/id"
        soft      {task: soft target}, what the files of teachers say; only with `teachers`
        clean     `image` without changes of colour, blur and holes, for an online teacher; only with `taught`
        taught    the tasks that are to learn from it; only with `taught`
        holes     those of the geometry of `image`, see Geometry; only with `taught`

    A batch of B samples, as `collate` makes it, is the same with a first dimension, but of each task it holds only the
    n rows that have a label, and nothing of a task without any:
        targets   {task: target of n rows}
        rows      {task: int64 (n,)}, which samples of the batch these are
        counts    {task: int64 (n,)}, `task.count` of these rows; only with `for_training`
        frame     list of B names
    and in the same way soft_targets, soft_rows and soft_counts; `taught` is {task: int64 (n,)} then, the rows, and
    `holes` a list of B.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        roots: Mapping[Path, PreprocessedDataset],
        tasks: Mapping[str, Any],
        size: tuple[int, int] | None = None,
        augmentation: Augmentation | None = None,
        target_size: tuple[int, int] | None = None,
        labels: Mapping[str, Collection[Frame]] | None = None,
        for_training: bool = False,
        teachers: "TeacherFiles | None" = None,
        taught: Mapping[str, Collection[Frame]] | None = None,
    ):
        """`size`: (width, height) of images, by default that of the datasets; `target_size`: of targets, by default
        `size`; `for_training`: targets have all that the losses need, and batches have counts. `taught`: task -> the
        frames about which an online teacher is asked."""
        self.frames = list(frames)
        self.roots = dict(roots)
        self.tasks = dict(tasks)
        self.source = next(iter(self.roots.values())).size
        self.size = size or self.source
        self.target_size = target_size or self.size
        self.augmentation = augmentation or Augmentation()
        self.labels = labels
        self.for_training = for_training
        self._check_labels()
        self.teachers, self.taught = teachers, taught

    def _check_labels(self) -> None:
        """DatasetError if the ids in the labels of a dataset mean other classes than those of its task."""
        for path in dict.fromkeys(frame.root for frame in self.frames):
            root = self.roots[path]
            for task in self.tasks.values():
                about = root.options.get(task.kind)
                if about is not None and (conflict := task.find_label_conflict(about)):
                    raise DatasetError(f"{path}: {conflict}")

    def _load_label(self, name: str, frame: Frame) -> Any | None:
        if self.labels is None:
            return self.tasks[name].load(frame)
        if frame not in self.labels[name]:
            return None
        label = self.tasks[name].load(frame)
        if label is None:
            raise DatasetError(f"{frame.path(self.tasks[name].kind)} has vanished; run preprocessing again")
        return label

    def load_targets(self, frame: Frame, names: Collection[str], geometry: Geometry) -> dict[str, Any]:
        """The targets of a frame under a geometry, of those of the named tasks whose label is to be used."""
        targets = {}
        for name, task in self.tasks.items():
            label = self._load_label(name, frame) if name in names else None
            if label is not None:
                target = task.transform(label, geometry)
                about = self.roots[frame.root].options.get(task.kind) or {}
                if about.get("annotated_classes") is not None:
                    target = task.limit_classes(target, about["annotated_classes"])
                targets[name] = task.prepare_loss(target) if self.for_training else target
        return targets

    @property
    def target_geometry(self) -> Geometry:
        """That of targets without augmentation."""
        return Geometry.identity(self.source, self.target_size)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(
        self, key: int | tuple[int, int, tuple[str, ...]] | tuple[int, int, tuple[str, ...], tuple[str, ...]]
    ) -> dict[str, Any]:
        index, seed, names, *learning = key if isinstance(key, tuple) else (key, None, tuple(self.tasks))
        frame = self.frames[index]
        root = self.roots[frame.root]
        image = torch.from_numpy(read_image(frame.path(root.image_kind))).permute(2, 0, 1)
        if tuple(image.shape[1:]) != self.source[::-1]:
            found = f"{image.shape[2]}x{image.shape[1]}"
            expected = f"{self.source[0]}x{self.source[1]}"
            raise DatasetError(f"{frame.path(root.image_kind)} is {found}, its dataset {expected}")
        clean = image
        if seed is None:
            geometry = Geometry.identity(self.source, self.size)
        else:
            rng = random.Random(seed)
            geometry = self.augmentation.draw_geometry(self.source, self.size, rng)
            image = self.augmentation.blur_some(self.augmentation.change_color(image, rng), rng)
            geometry = self.augmentation.cut_out(geometry, rng)
        target_geometry = replace(geometry, size=self.target_size)
        targets = self.load_targets(frame, names, target_geometry)
        camera = np.full((3, 3), np.nan)
        if frame.view in root.cameras:
            camera = geometry.map_camera(root.cameras[frame.view])
            camera[[0, 1], [0, 1]] /= geometry.zoom
        sample = {
            "image": geometry.transform_image(image).contiguous(),
            "targets": targets,
            "camera": torch.from_numpy(camera).float(),
            "frame": str(frame),
        }
        wanted = learning[0] if learning else ()
        if self.teachers is not None:
            sample["soft"] = self.teachers.load(
                frame, [name for name in wanted if name not in targets], target_geometry
            )
        if self.taught is not None:
            sample["clean"] = replace(geometry, holes=()).transform_image(clean).contiguous()
            sample["holes"] = geometry.holes
            sample["taught"] = tuple(name for name in wanted if frame in self.taught[name] and name not in targets)
        return sample

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of samples, for a DataLoader: each task makes the batch of its targets."""
        own = ("targets", "soft", "taught", "holes")
        batch = default_collate([{key: sample[key] for key in sample if key not in own} for sample in samples])
        if self.taught is not None:
            asked = {name: [row for row, each in enumerate(samples) if name in each["taught"]] for name in self.tasks}
            batch["taught"] = {name: torch.tensor(found) for name, found in asked.items() if found}
            batch["holes"] = [sample["holes"] for sample in samples]
        if self.teachers is not None:
            batch |= {"soft_targets": {}, "soft_rows": {}, "soft_counts": {}}
            for name, task in self.tasks.items():
                rows = [row for row, sample in enumerate(samples) if name in sample["soft"]]
                if rows:
                    batch["soft_rows"][name] = torch.tensor(rows)
                    batch["soft_targets"][name] = task.collate_soft([samples[row]["soft"][name] for row in rows])
                    batch["soft_counts"][name] = task.count_soft(batch["soft_targets"][name])
        batch |= {"targets": {}, "rows": {}} | ({"counts": {}} if self.for_training else {})
        for name, task in self.tasks.items():
            rows = [row for row, sample in enumerate(samples) if name in sample["targets"]]
            if rows:
                batch["rows"][name] = torch.tensor(rows)
                batch["targets"][name] = task.collate([samples[row]["targets"][name] for row in rows])
                if self.for_training:
                    batch["counts"][name] = task.count(batch["targets"][name])
        return batch
