"""The frame: one moment of one camera, the one rule that names its files, and the index of what is on disk.

A2D2 names a file `<scene>/<folder>/<cam>/<stamp>_<token>_<view>_<id>.<extension>` (docs/a2d2-format.md, section 2.1); the
derived files follow the same rule. Nothing here assumes that a file exists: the index lists folders and intersects
sets, because every kind of file is missing for some frames.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

VIEWS = ("front_center", "front_left", "front_right", "side_left", "side_right", "rear_center")

SCENE_PATTERN = re.compile(r"^\d{8}_\d{6}$")
_ID_PATTERN = re.compile(r"^[0-9]{1,9}$")
_FILE_PATTERN = re.compile(r"^(\d{14})_([A-Za-z0-9]+)_([a-z]+)_(\d{9})\.([a-z]+)$")

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
_KINDS = RAW_KINDS | DERIVED_KINDS


@dataclass(frozen=True, order=True)
class Frame:
    """One moment of one camera.

    scene: "YYYYMMDD_hhmmss"; view: one of VIEWS; id: nine digits. `root` is the folder that holds the scene; it is
    no part of the frame's identity, so the same frame found under two roots compares equal.
    """

    scene: str
    view: str
    id: str
    root: Path = field(default=Path(), compare=False)

    def __str__(self) -> str:
        return f"{self.scene}/{self.view}/{self.id}"

    def path(self, kind: str) -> Path:
        """Where the file of this kind is, or would be."""
        folder, extension = _KINDS[kind]
        stem = f"{self.scene.replace('_', '')}_{folder}_{self.view.replace('_', '')}_{self.id}"
        return self.root / self.scene / folder / f"cam_{self.view}" / f"{stem}.{extension}"

    def under(self, root: Path) -> "Frame":
        """The same frame under another root."""
        return Frame(self.scene, self.view, self.id, Path(root))


def parse_frame(text: str, root: Path = Path()) -> Frame:
    """Read "scene/view/id", as frames are printed; the id may lack its leading zeros."""
    parts = text.strip().split("/")
    known = len(parts) == 3 and SCENE_PATTERN.match(parts[0]) and parts[1] in VIEWS and _ID_PATTERN.match(parts[2])
    if not known:
        raise ValueError(
            f"{text!r} names no frame: expected scene/view/id such as 20180807_145028/front_center/000001617, "
            f"with a view among {', '.join(VIEWS)}"
        )
    return Frame(parts[0], parts[1], parts[2].zfill(9), Path(root))


def list_scenes(root: Path) -> list[str]:
    """Names of the scene folders under a root, sorted; other folders and files are not scenes."""
    if not Path(root).is_dir():
        return []
    return sorted(entry.name for entry in Path(root).iterdir() if SCENE_PATTERN.match(entry.name) and entry.is_dir())


def list_frames(root: Path, kind: str, views: Iterable[str] = VIEWS) -> list[Frame]:
    """Frames that have a file of this kind under the root, sorted; files with foreign names are left out."""
    root = Path(root)
    folder, extension = _KINDS[kind]
    frames = []
    for scene in list_scenes(root):
        for view in views:
            directory = root / scene / folder / f"cam_{view}"
            if not directory.is_dir():
                continue
            for entry in directory.iterdir():
                match = _FILE_PATTERN.match(entry.name)
                if match is None or match[5] != extension:
                    continue
                frame = Frame(scene, view, match[4], root)
                if frame.path(kind).name == entry.name:
                    frames.append(frame)
    return sorted(frames)


def index_frames(root: Path, kinds: Iterable[str], views: Iterable[str] = VIEWS) -> dict[Frame, frozenset[str]]:
    """Every frame that has at least one of the kinds, with the kinds it has; sorted by frame."""
    found: dict[Frame, set[str]] = defaultdict(set)
    views = tuple(views)
    for kind in kinds:
        for frame in list_frames(root, kind, views):
            found[frame].add(kind)
    return {frame: frozenset(found[frame]) for frame in sorted(found)}


def find_bus_root(data: Path) -> Path | None:
    """The folder with the bus signals that belongs to a raw root, or None.

    The bus archive has no wrapper folder (docs/a2d2-format.md, section 1), so its scenes lie where it was unpacked: in the
    raw root itself, in its parent, or in a folder a user made beside it.
    """
    data = Path(data)
    for root in (data.parent / "camera_lidar_semantic_bus", data.parent / "bus", data, data.parent):
        if any(bus_path(root, scene).is_file() for scene in list_scenes(root)):
            return root
    return None


def bus_path(root: Path, scene: str) -> Path:
    """The one bus file of a scene (docs/a2d2-format.md, section 7)."""
    return Path(root) / scene / "bus" / f"{scene.replace('_', '')}_bus_signals.json"


def find_calibration(data: Path) -> Path:
    """`cams_lidars.json` in the raw root, its parent, or the boxes set beside it (only that archive contains one)."""
    data = Path(data)
    places = [data, data.parent, data.parent / "camera_lidar_semantic_bboxes"]
    for place in places:
        if (place / "cams_lidars.json").is_file():
            return place / "cams_lidars.json"
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"no cams_lidars.json in {looked}; get it with `sh get_data.sh calibration` or --calibration"
    )
