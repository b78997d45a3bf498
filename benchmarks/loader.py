"""How long a training sample takes to load, as a ratio to decoding its files, which nobody can avoid, on one core.

    python benchmarks/loader.py [--data DERIVED_ROOT] [--repeats 5]

A sample is image, segmentation and depth without augmentation, as FrameDataset gives it; the reference decodes its JPEG
and its depth PNG with OpenCV. Without --data a few synthetic frames are derived at 1024x640 for the occasion.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import torch

from a2d2.dataset import FrameDataset, index_roots
from a2d2.synthetic.writer import write_dataset
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
DENSE = [name for name, task in TASKS.items() if task.kind in ("segmentation", "depth")]
MOST_FRAMES, BAR = 20, 2.0


def derive_frames(folder: Path) -> Path:
    """A preprocessed dataset of a few synthetic frames at the default training size."""
    write_dataset(folder, scenes=2, frames=5, size=(960, 604))
    for script in ("camera", "segmentation", "depth_preprocess"):
        command = [sys.executable, str(ROOT / "preprocessing" / f"{script}.py"), "--out", str(folder / "derived")]
        command += ["--data", str(folder / "camera_lidar_semantic_bboxes"), "--threads", "2"]
        subprocess.run(command, check=True, capture_output=True)
    return folder / "derived"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="preprocessed dataset")
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="benchmark_loader_"))
    try:
        frames, roots = index_roots([arguments.data or derive_frames(scratch)], ["front_center"])
        tasks = {name: TASKS[name]() for name in DENSE}
        frames = [frame for frame in frames if all(task.has_label(frame) for task in tasks.values())][:MOST_FRAMES]
        if not frames:
            print(f"loader: {arguments.data} has no frame with {' and '.join(DENSE)}", file=sys.stderr)
            return 1
        dataset = FrameDataset(frames, roots, tasks)
        times: dict[str, list[float]] = {"sample": [], "decode": []}
        for turn in range(arguments.repeats + 1):  # the first is not counted
            begin = time.perf_counter()
            for index in range(len(dataset)):
                dataset[index]
            middle = time.perf_counter()
            for frame in frames:
                cv2.imread(str(frame.path("image")))
                cv2.imread(str(frame.path("depth")), cv2.IMREAD_UNCHANGED)
            end = time.perf_counter()
            if turn:
                times["sample"].append(1000 * (middle - begin) / len(frames))
                times["decode"].append(1000 * (end - middle) / len(frames))
    except (OSError, ValueError) as error:
        print(f"loader: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch)
    sample, decode = (statistics.median(found) for found in times.values())
    verdict = "holds" if sample / decode <= BAR else "MISSED"
    size = "x".join(map(str, dataset.size))
    print("| what | measured | bar | |\n|---|---|---|---|")
    measured = f"{sample / decode:.2f} x ({sample:.1f} against {decode:.1f} ms, {len(frames)} frames of {size})"
    print(f"| a sample / decoding its JPEG and depth PNG | {measured} | <= {BAR:g} x | {verdict} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
