"""The frame: one image of one camera, the rule that names its files, and the index of the files on disk.

A2D2 names a file `<scene>/<folder>/<cam>/<stamp>_<token>_<view>_<id>.<extension>` (docs/a2d2-format.md, section 2.1);
derived files follow the same rule. No function assumes that a file exists: the index lists folders, because every kind
of file is missing for some frames.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

VIEWS = ("front_center", "front_left", "front_right", "side_left", "side_right", "rear_center")

SCENE_PATTERN = re.compile(r"^\d{8}_\d{6}$")  # of A2D2
SCENE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # of any preprocessed dataset (docs/own-data.md)
NO_SCENES = frozenset(("reports",))  # folders of a preprocessed dataset that are none
_ID_PATTERN = re.compile(r"^[0-9]{1,9}$")

# kind -> (folder and token in the file name, extension)
RAW_KINDS = {
    "camera": ("camera", "png"),
    "camera_info": ("camera", "json"),
    "label": ("label", "png"),
    "lidar": ("lidar", "npz"),
    "label3D": ("label3D", "json"),
}
DERIVED_KINDS = {
    "image": ("camera", "jpg"),
    "image_lossless": ("camera", "png"),
    "segmentation": ("segmentation", "npy"),
    "depth": ("depth", "png"),
    "boxes": ("boxes", "json"),
    "steering": ("steering", "json"),
}
# beside predictions, how sure they are (docs/predictions.md)
CONFIDENCE_KINDS = {
    "segmentation_confidence": ("segmentationconfidence", "png"),
    "depth_confidence": ("depthconfidence", "png"),
    "boxes_confidence": ("boxesconfidence", "json"),
    "boxes_dense": ("boxesdense", "npz"),
    "steering_confidence": ("steeringconfidence", "json"),
}
_KINDS = RAW_KINDS | DERIVED_KINDS | CONFIDENCE_KINDS


@dataclass(frozen=True, order=True)
class Frame:
    """One recording time of one camera.

    scene: "YYYYMMDD_hhmmss", or any name in a dataset that is not A2D2; view: one of VIEWS; id: nine digits. `root` is
    the folder that contains the scene; it is not compared, so the same frame under two roots is equal.
    """

    scene: str
    view: str
    id: str
    root: Path = field(default=Path(), compare=False)

    def __str__(self) -> str:
        return f"{self.scene}/{self.view}/{self.id}"

    def path(self, kind: str) -> Path:
        """Path of the frame's file of this kind, which need not exist."""
        folder, extension = _KINDS[kind]
        stem = f"{self.scene.replace('_', '')}_{folder}_{self.view.replace('_', '')}_{self.id}"
        return self.root / self.scene / folder / f"cam_{self.view}" / f"{stem}.{extension}"

    def under(self, root: Path) -> "Frame":
        """The same frame under another root."""
        return Frame(self.scene, self.view, self.id, Path(root))


def picture_path(out: Path, kind: str, place: Path) -> Path:
    """Path of the file of this kind that belongs to a picture which is no frame: `<kind>/<place>.<extension>`.

    place: of the picture from the folder that all given pictures have in common, so equal names in two folders differ.
    """
    return out / kind / place.parent / f"{place.name}.{_KINDS[kind][1]}"


def list_places(out: Path, kind: str) -> list[Path]:
    """The places of all pictures that have a file of this kind, see picture_path."""
    ending = f".{_KINDS[kind][1]}"
    found = (out / kind).rglob(f"*{ending}")
    return sorted(path.relative_to(out / kind).with_name(path.name.removesuffix(ending)) for path in found)


def times_path(frame: Frame) -> Path:
    """Path of the recording times of the frames of this scene and camera, beside their pictures."""
    return frame.path("image").parent / "frames.json"


def listing_path(out: Path) -> Path:
    """Path of what says which frame of an imported dataset is which picture."""
    return out / "pictures.json"


def sources_path(out: Path) -> Path:
    """Path of what says from which files the pictures of an imported dataset were made."""
    return out / "sources.json"


def report_path(out: Path, name: str, shard: tuple[int, int]) -> Path:
    """Path of what a program says about the shard (i, n) of its frames in the folder."""
    suffix = "" if shard == (1, 1) else f".{shard[0]}-of-{shard[1]}"
    return out / "reports" / f"{name}{suffix}.json"


def parse_frame(text: str, root: Path = Path()) -> Frame:
    """Parse "scene/view/id", the form in which frames are printed; leading zeros of the id may be missing.

    ValueError for any other text.
    """
    parts = text.strip().split("/")
    known = len(parts) == 3 and SCENE_NAME.match(parts[0]) and parts[1] in VIEWS and _ID_PATTERN.match(parts[2])
    if not known:
        raise ValueError(
            f"{text!r} is no frame: expected scene/view/id such as 20180807_145028/front_center/000001617, "
            f"with a view among {', '.join(VIEWS)}"
        )
    return Frame(parts[0], parts[1], parts[2].zfill(9), Path(root))


def list_scenes(root: Path, any_name: bool = False) -> list[str]:
    """Names of the scene folders under a root, sorted; other folders and files are not scenes. `any_name`: those of a
    preprocessed dataset, which need not be named as A2D2's."""
    if not Path(root).is_dir():
        return []
    pattern = SCENE_NAME if any_name else SCENE_PATTERN
    with os.scandir(root) as entries:
        return sorted(
            entry.name
            for entry in entries
            if pattern.match(entry.name) and entry.name not in NO_SCENES and entry.is_dir()
        )


def list_frames(root: Path, kind: str, views: Iterable[str] = VIEWS, empty: bool = True) -> list[Frame]:
    """Frames that have a file of this kind under the root, sorted; files with other names are ignored.

    Each folder is listed once, and no file is asked for anything, unless files without content, which a power cut can
    leave behind, are not to count (`empty` is False).
    """
    root = Path(root)
    folder, extension = _KINDS[kind]
    frames = []
    for scene in list_scenes(root, any_name=kind not in RAW_KINDS):
        for view in sorted(views):
            stem = f"{scene.replace('_', '')}_{folder}_{view.replace('_', '')}_"
            pattern = re.compile(rf"{stem}([0-9]{{9}})\.{extension}")
            found = []
            try:
                with os.scandir(root / scene / folder / f"cam_{view}") as entries:
                    for entry in entries:
                        match = pattern.fullmatch(entry.name)
                        if match and (empty or _is_whole(entry)):
                            found.append(match[1])
            except (FileNotFoundError, NotADirectoryError):
                continue
            frames += [Frame(scene, view, identity, root) for identity in sorted(found)]
    return frames


def _is_whole(entry: os.DirEntry) -> bool:
    try:
        return entry.stat().st_size > 0
    except OSError:
        return False


def anchor(data: Path) -> Path:
    """The same folder with its own name last, so that `parent` is the folder around it, for "." and ".." too."""
    return data if data.name not in ("", "..") else Path(os.path.abspath(data))


def index_frames(root: Path, kinds: Iterable[str], views: Iterable[str] = VIEWS) -> dict[Frame, frozenset[str]]:
    """Every frame that has a file of at least one of the kinds -> the kinds it has; sorted by frame."""
    found: dict[Frame, set[str]] = defaultdict(set)
    views = tuple(views)
    for kind in kinds:
        for frame in list_frames(root, kind, views):
            found[frame].add(kind)
    return {frame: frozenset(found[frame]) for frame in sorted(found)}


def find_bus_root(data: Path) -> Path | None:
    """The folder with the bus signals of a raw dataset, or None if there are no bus signals.

    The bus archive has no top-level folder (docs/a2d2-format.md, section 1), so its scenes are where the user unpacked
    it: in the raw dataset itself, in its parent, or in a folder beside it.
    """
    data = anchor(Path(data))
    for root in (data.parent / "camera_lidar_semantic_bus", data.parent / "bus", data, data.parent):
        if any(bus_path(root, scene).is_file() for scene in list_scenes(root)):
            return root
    return None


def bus_path(root: Path, scene: str) -> Path:
    """Path of the bus file of a scene (docs/a2d2-format.md, section 7)."""
    return Path(root) / scene / "bus" / f"{scene.replace('_', '')}_bus_signals.json"


def find_calibration(data: Path) -> Path:
    """Path of `cams_lidars.json`: in the raw dataset, in its parent, or in the boxes set beside it (only the archive of
    the boxes set contains the file). FileNotFoundError if none of them has it."""
    data = anchor(Path(data))
    folders = [data, data.parent, data.parent / "camera_lidar_semantic_bboxes"]
    for folder in folders:
        if (folder / "cams_lidars.json").is_file():
            return folder / "cams_lidars.json"
    listed = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"no cams_lidars.json in {listed}; fetch it with `sh get_data.sh calibration`, or name it with --calibration"
    )
