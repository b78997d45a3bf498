"""What it costs that every derived file is on the disk before it gets its name, as a ratio of whole frames.

    python benchmarks/writing.py [--folder FOLDER] [--frames 40]

Frames of a synthetic scene are derived with and without the call that waits for the disk (fsync), turn by turn, by one
process. The disk is that of the folder; on another one the ratio is another.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2

from a2d2 import derive
from a2d2.calibration import load_calibration
from a2d2.derive import Recipe
from a2d2.frames import find_bus_root, find_calibration, list_frames
from a2d2.synthetic.writer import write_dataset

SIZE = (1024, 640)
KINDS = {
    "camera": ("camera", derive.derive_camera, {"format": "jpg"}),
    "segmentation": ("label", derive.derive_segmentation, {}),
    "depth": ("lidar", derive.derive_depth, {}),
    "boxes": ("label3D", derive.derive_boxes, {}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    scratch = Path(tempfile.mkdtemp(prefix="benchmark_writing_", dir=arguments.folder))
    try:
        write_dataset(scratch, scenes=1, frames=arguments.frames, size=(960, 604))
        raw = scratch / "camera_lidar_semantic_bboxes"
        cameras = {name: each.resize(SIZE) for name, each in load_calibration(find_calibration(raw)).cameras.items()}
        print("| kind | with / without waiting for the disk | ms a frame with | without |")
        print("|---|---|---|---|")
        for name, (kind, function, options) in KINDS.items():
            frames = list_frames(raw, kind, ["front_center"])
            times: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(2 * (arguments.repeats + 1)):
                waits = turn % 2 == 0
                recipe = Recipe(scratch / f"out{turn}", cameras, options, find_bus_root(raw))
                with mock.patch.object(os, "fsync", os.fsync if waits else lambda file: None):
                    begin = time.perf_counter()
                    for frame in frames:
                        function(frame, recipe)
                    took = 1000 * (time.perf_counter() - begin) / len(frames)
                if turn > 1:  # the first of each is not counted
                    times[waits].append(took)
                shutil.rmtree(recipe.out)
            ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
            with_it, without = statistics.median(times[True]), statistics.median(times[False])
            print(f"| {name} | {ratio:.2f} x | {with_it:.1f} | {without:.1f} |")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
