"""Predictions in the formats of other programs: COCO's detections and KITTI's depth maps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from a2d2.images import read_json, write_bytes, write_json
from a2d2.predictions import Picture
from experiment import Data, WrongUseError
from tasks.task import Task


class Export(ABC):
    """Writes what a folder of predictions holds of one kind of file in another format."""

    name: str
    kind: str

    def check(self, tasks: Mapping[str, Task]) -> None:
        """WrongUseError if there is nothing of this kind."""
        self.find_task(tasks)

    def find_task(self, tasks: Mapping[str, Task]) -> Task:
        for task in tasks.values():
            if task.kind == self.kind:
                return task
        raise WrongUseError(f"--format {self.name} needs predictions of {self.kind}; there are {', '.join(tasks)}")

    @abstractmethod
    def write(self, out: Path, tasks: Mapping[str, Task], pictures: Sequence[Picture], data: Data | None) -> str:
        """Write it into the folder, of those of the pictures that are predicted; returns a line that says what."""


class Coco(Export):
    """`coco/detections.json`, as COCO's tools take results; `coco/images.json`, with images and categories, and, of
    frames with labels, the ground truth as annotations. Categories are numbered from 1.

    COCO's tools count every detection without an annotation as false. So the whole picture is a crowd, which neither
    rewards nor costs a detection, of each category that is not annotated in it: of all, where other frames have a label
    and this one has none. All images are listed, because the tools refuse results of others."""

    name, kind = "coco", "boxes"

    def write(self, out, tasks, pictures, data):
        task = self.find_task(tasks)
        classes = list(task.describe_files()["classes"])
        images, detections, annotations = [], [], []
        labelled = any(picture.frame is not None and task.has_label(picture.frame) for picture in pictures)
        for picture in pictures:
            path = picture.find_file(out, self.kind)
            if not path.is_file():
                continue
            number = len(images) + 1
            width, height = data.size if data is not None else _read_size(picture.path)
            images.append({"id": number, "file_name": picture.name, "width": width, "height": height})
            for box in read_json(path)["boxes"]:
                detections.append(
                    {
                        "image_id": number,
                        "category_id": classes.index(box["class"]) + 1,
                        "bbox": _turn(box["box"]),
                        "score": box["score"],
                    }
                )
            label = task.load(picture.frame) if picture.frame is not None else None
            found = [(box["box"], *each) for box in label or () for each in task.find_categories(box)]
            unknown = list(range(len(classes))) if labelled and label is None else []
            if label is not None and data is not None:
                about = data.roots[picture.frame.root].options.get(self.kind) or {}
                unknown = task.find_unannotated(about.get("annotated_classes"))
            found += [([0.0, 0.0, float(width), float(height)], own, True) for own in unknown]
            for box, own, crowd in found:
                area = float(np.prod(_turn(box)[2:]))
                about = {"id": len(annotations) + 1, "image_id": number, "category_id": own + 1, "area": area}
                annotations.append(about | {"bbox": _turn(box), "iscrowd": int(crowd)})
        folder = out / self.name
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        write_json(folder / "detections.json", detections)
        content = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
        write_json(folder / "images.json", content)
        return f"COCO: {len(detections)} detections in {len(images)} of {len(pictures)} images; {folder}"


def _turn(box: Sequence[float]) -> list[float]:
    """Edges x1, y1, x2, y2 -> COCO's x, y, width, height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _read_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        size = opened.size
        return size[::-1] if opened.getexif().get(0x0112) in (5, 6, 7, 8) else size  # turned by a quarter


class Kitti(Export):
    """`kitti/depth/<name>.png`: 16-bit PNG, metres x 256."""

    name, kind = "kitti", "depth"

    def write(self, out, tasks, pictures, data):
        self.find_task(tasks)
        folder, count = out / self.name / "depth", 0
        for picture in pictures:
            path = picture.find_file(out, self.kind)
            if path.is_file():
                write_bytes(folder / f"{picture.name}.png", path.read_bytes())
                count += 1
        return f"KITTI: depth maps of {count} of {len(pictures)} pictures; {folder}"


EXPORTS: dict[str, list[Export]] = {"labels": [], "coco": [Coco()], "kitti": [Kitti()]}
