"""Time and disk space of every step on A2D2's whole boxes set, estimated from a few files of each kind.

    python benchmarks/boxes_set.py [--data RAW_ROOT] [--processes 4] [--repeats 5]

Measured: milliseconds and bytes of a frame, in one process, files in the page cache, the median of several repeats.
Estimated from that: the whole set's 12,497 frames, with perfect scaling over the processes. Kinds of file that the raw
dataset lacks are taken from synthetic scenes of A2D2's size; the last column says which.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2

from a2d2 import derive
from a2d2.calibration import load_calibration
from a2d2.checks.facts import read_frame
from a2d2.checks.known import BOX_SCENES
from a2d2.derive import Recipe
from a2d2.frames import RAW_KINDS, Frame, bus_path, find_bus_root, find_calibration, index_frames, list_frames
from a2d2.synthetic.writer import write_dataset

FRAMES = sum(BOX_SCENES.values())
SIZE = (1024, 640)
ARCHIVE_GB = 48  # docs/a2d2-format.md, section 1
# script -> raw kind, derived kind, function
STEPS = {
    "camera.py": ("camera", "image", derive.derive_camera),
    "segmentation.py": ("label", "segmentation", derive.derive_segmentation),
    "depth_preprocess.py": ("lidar", "depth", derive.derive_depth),
    "bounding_box.py": ("label3D", "boxes", derive.derive_boxes),
}


def find_root(given: Path | None) -> Path | None:
    """The raw dataset: the given one, else that of A2D2_REAL, else that in Datasets/; None if there is none."""
    real = Path(os.environ.get("A2D2_REAL", "no folder")) / "camera_lidar_semantic_bboxes"
    places = [given] if given else [real, Path("Datasets/camera_lidar_semantic_bboxes")]
    return next((place for place in places if place.is_dir()), None)


def time_frame(work: Callable[[Frame], object], frames: list[Frame], repeats: int) -> float:
    """Median milliseconds of a frame; a first turn is not counted."""
    turns = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for frame in frames:
            work(frame)
        turns.append(1000 * (time.perf_counter() - begin) / len(frames))
    return statistics.median(turns[1:])


def mean_size(paths: list[Path]) -> float:
    """Mean bytes of a file."""
    return statistics.mean(path.stat().st_size for path in paths)


def format_time(milliseconds: float) -> str:
    """Of the whole set, in minutes."""
    minutes = milliseconds * FRAMES / 60_000
    return "under 1 min" if minutes < 1 else f"{minutes:.0f} min"


def format_disk(size: float) -> str:
    """Of the whole set, from the mean bytes of a frame."""
    gigabytes = size * FRAMES / 1e9
    return f"{gigabytes:.1f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.0f} MB"


def count_files(paths: list, root: Path, synthetic: Path) -> str:
    """Where the measured files come from, such as "4 real files"."""
    return f"{len(paths)} {'synthetic' if root == synthetic else 'real'} file{'s' if len(paths) != 1 else ''}"


def measure_check(roots: dict[str, Path], repeats: int) -> float:
    """Milliseconds in which check.py reads the files of a frame, added up over the kinds."""
    total = 0.0
    for kind, root in roots.items():
        if kind in RAW_KINDS:
            cameras = load_calibration(find_calibration(root)).cameras
            frames = [frame for frame, kinds in index_frames(root, RAW_KINDS).items() if kind in kinds][:20]
            total += time_frame(partial(read_frame, kinds=(kind,), cameras=cameras), frames, repeats)
    return total


def list_rows(roots: dict[str, Path], synthetic: Path, scratch: Path, processes: int, repeats: int) -> list[list[str]]:
    """The lines of the table: step, time, disk space, from which measurements."""
    downloading = ARCHIVE_GB * 8e9 / 100e6 / 60
    rows = [
        ["`sh get_data.sh`", f"{downloading:.0f} min at 100 Mbit/s", f"2 x {ARCHIVE_GB} GB", "size as users report it"],
        ["... `--delete-archives`", "", f"{ARCHIVE_GB} GB", ""],
    ]
    check = measure_check(roots, repeats)
    rows.append(["`check.py`", format_time(check / processes), "-", f"{check:.1f} ms a frame"])
    total = 0.0
    for script, (raw, kind, work) in STEPS.items():
        root = roots[raw]
        cameras = load_calibration(find_calibration(root)).cameras
        recipe = Recipe(
            scratch / "out", {name: camera.resize(SIZE) for name, camera in cameras.items()}, {"format": "jpg"}
        )
        frames = [frame for frame in list_frames(root, raw)[:20] if work(frame, recipe).status == "done"]
        milliseconds = time_frame(partial(work, recipe=recipe), frames, repeats)
        size = mean_size([frame.under(recipe.out).path(kind) for frame in frames])
        total += size
        source = count_files(frames, root, synthetic)
        measured = f"{milliseconds:.1f} ms, {size / 1000:.1f} kB a frame; {source}"
        rows.append([f"`{script}`", format_time(milliseconds / processes), format_disk(size), measured])

    root = roots["bus"]
    recipe = Recipe(scratch / "out", {}, {}, find_bus_root(root))
    scene = [frame for frame in list_frames(root, "camera") if bus_path(recipe.bus_root, frame.scene).is_file()]
    scene = [frame for frame in scene if frame.scene == scene[0].scene]
    milliseconds = time_frame(lambda _: derive.derive_steering(scene, recipe), [scene[0]], repeats) / len(scene)
    written = [path for frame in scene if (path := frame.under(recipe.out).path("steering")).is_file()]
    size = mean_size(written)
    source = count_files(written, root, synthetic)
    measured = f"{milliseconds:.1f} ms, {size / 1000:.1f} kB a frame; {source}"
    rows.append(["`steering_angle.py`", format_time(milliseconds / processes), format_disk(size), measured])
    total += size
    rows.append(["preprocessed dataset", "", format_disk(total), "sum of the five"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="raw dataset")
    parser.add_argument("--processes", type=int, default=4, help="worker processes to estimate for")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement; the median counts")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    scratch = Path(tempfile.mkdtemp(prefix="benchmark_boxes_set_"))
    try:
        synthetic = scratch / "synthetic" / "camera_lidar_semantic_bboxes"
        write_dataset(scratch / "synthetic", scenes=2, frames=8, size=(1920, 1208))
        given = find_root(arguments.data)
        roots = {}
        for kind in RAW_KINDS:
            has_kind = given is not None and list_frames(given, kind)
            roots[kind] = given if has_kind else synthetic
        roots["bus"] = given if given is not None and find_bus_root(given) else synthetic
        print(f"\n{FRAMES:,} frames at {SIZE[0]}x{SIZE[1]}, {arguments.processes} processes\n")
        print("| step | time | disk | measured |\n|---|--:|--:|---|")
        for row in list_rows(roots, synthetic, scratch, arguments.processes, arguments.repeats):
            print(f"| {' | '.join(row)} |")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
