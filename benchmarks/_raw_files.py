"""Which raw files the preprocessing benchmarks measure on, and how long work on them takes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from a2d2.calibration import load_calibration
from a2d2.derive import Recipe
from a2d2.frames import RAW_KINDS, find_bus_root, find_calibration, list_frames
from a2d2.synthetic.writer import write_dataset

SIZE = (1024, 640)
MOST_FILES = 20  # of a kind, evenly spaced


def make_recipe(root: Path, out: Path, options: dict | None = None) -> Recipe:
    cameras = load_calibration(find_calibration(root)).cameras
    resized = {name: camera.resize(SIZE) for name, camera in cameras.items()}
    return Recipe(out, resized, options or {}, find_bus_root(root))


def find_root(given: Path | None) -> Path | None:
    places = [given] if given else [Path("Datasets/camera_lidar_semantic_bboxes")]
    if not given and "A2D2_REAL" in os.environ:
        places.insert(0, Path(os.environ["A2D2_REAL"]) / "camera_lidar_semantic_bboxes")
    return next((place for place in places if place.is_dir()), None)


def choose_roots(given: Path | None, scratch: Path) -> dict[str, Path]:
    """Kind of raw file -> a root that has some: the given one, else synthetic scenes at A2D2's size."""
    root = find_root(given)
    roots = {kind: root for kind in RAW_KINDS if root and list_frames(root, kind)}
    if root and find_bus_root(root):
        roots["bus"] = root
    missing = [kind for kind in (*RAW_KINDS, "bus") if kind not in roots]
    if missing:
        write_dataset(scratch / "synthetic", scenes=2, frames=8, size=(1920, 1208))
        roots |= dict.fromkeys(missing, scratch / "synthetic" / "camera_lidar_semantic_bboxes")
    for kind, place in roots.items():
        print(f"{kind}: {'synthetic scenes' if kind in missing else place}")
    return roots


def pick(frames: list) -> list:
    """At most MOST_FILES of them, evenly spaced."""
    return frames[:: max(1, -(-len(frames) // MOST_FILES))]


def time_once(work: Callable, frames: list) -> float:
    """Seconds that `work` takes for all frames, one after the other."""
    begin = time.perf_counter()
    for frame in frames:
        work(frame)
    return time.perf_counter() - begin
