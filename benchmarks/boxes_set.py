"""Time and disk space of every step on A2D2's whole boxes set, estimated from a few files of each kind.

    python benchmarks/boxes_set.py [--data RAW_ROOT] [--processes 4] [--repeats 5]

Measured: milliseconds and bytes of a frame, in one process, files in the page cache, the median of several repeats.
Estimated from that: the whole set's 12,497 frames, with perfect scaling over the processes. Kinds of file that the raw
dataset lacks are taken from synthetic scenes of A2D2's size; the last column says which.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2

from a2d2 import derive
from a2d2.calibration import load_calibration
from a2d2.checks.facts import read_frame
from a2d2.checks.known import BOX_SCENES
from a2d2.frames import RAW_KINDS, bus_path, find_calibration, list_frames
from benchmarks._raw_files import SIZE, choose_roots, make_recipe, pick, time_once

FRAMES = sum(BOX_SCENES.values())
ARCHIVE_GB = 48  # docs/a2d2-format.md, section 1
# script -> raw kind, derived kind, function
STEPS = {
    "camera.py": ("camera", "image", derive.derive_camera),
    "segmentation.py": ("label", "segmentation", derive.derive_segmentation),
    "depth_preprocess.py": ("lidar", "depth", derive.derive_depth),
    "bounding_box.py": ("label3D", "boxes", derive.derive_boxes),
}


def time_frame(work: Callable, frames: list, repeats: int) -> float:
    """Median milliseconds of a frame; a first turn is not counted."""
    seconds = [time_once(work, frames) for _ in range(repeats + 1)]
    return 1000 * statistics.median(seconds[1:]) / len(frames)


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


def count_files(paths: list, root: Path, scratch: Path) -> str:
    """Where the measured files come from, such as "4 real files"."""
    origin = "synthetic" if root.is_relative_to(scratch) else "real"
    return f"{len(paths)} {origin} file{'s' if len(paths) != 1 else ''}"


def measure_check(roots: dict[str, Path], repeats: int) -> float:
    """Milliseconds in which check.py reads the files of a frame, added up over the kinds."""
    total = 0.0
    for kind, root in roots.items():
        if kind in RAW_KINDS:
            cameras = load_calibration(find_calibration(root)).cameras
            frames = pick(list_frames(root, kind))
            total += time_frame(partial(read_frame, kinds=(kind,), cameras=cameras), frames, repeats)
    return total


def list_rows(roots: dict[str, Path], scratch: Path, processes: int, repeats: int) -> list[list[str]]:
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
        recipe = make_recipe(root, scratch / "out", {"format": "jpg"})
        frames = [frame for frame in pick(list_frames(root, raw)) if work(frame, recipe).status == "done"]
        milliseconds = time_frame(partial(work, recipe=recipe), frames, repeats)
        size = mean_size([frame.under(recipe.out).path(kind) for frame in frames])
        total += size
        source = count_files(frames, root, scratch)
        measured = f"{milliseconds:.1f} ms, {size / 1000:.1f} kB a frame; {source}"
        rows.append([f"`{script}`", format_time(milliseconds / processes), format_disk(size), measured])

    root = roots["bus"]
    recipe = make_recipe(root, scratch / "out")
    scene = [frame for frame in list_frames(root, "camera") if bus_path(recipe.bus_root, frame.scene).is_file()]
    scene = [frame for frame in scene if frame.scene == scene[0].scene]
    milliseconds = time_frame(lambda _: derive.derive_steering(scene, recipe), [scene[0]], repeats) / len(scene)
    written = [path for frame in scene if (path := frame.under(recipe.out).path("steering")).is_file()]
    size = mean_size(written)
    source = count_files(written, root, scratch)
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
        roots = choose_roots(arguments.data, scratch)
        print(f"\n{FRAMES:,} frames at {SIZE[0]}x{SIZE[1]}, {arguments.processes} processes\n")
        print("| step | time | disk | measured |\n|---|--:|--:|---|")
        for row in list_rows(roots, scratch, arguments.processes, arguments.repeats):
            print(f"| {' | '.join(row)} |")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
