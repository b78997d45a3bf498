"""How fast preprocessing is, as ratios to what nobody can avoid, all measured in one run on one core.

    python benchmarks/preprocessing.py [--data RAW_ROOT] [--frames 300] [--repeats 5]

The raw root is by default the boxes set under the folder that A2D2_REAL names, else that in Datasets/, else a small
synthetic set at A2D2's size, written for the occasion; a kind of file that the root lacks is taken from the synthetic
set too. Each figure is the median of interleaved repeats, each over all files of the kind, OpenCV at one thread.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
from tqdm import tqdm

from a2d2 import derive
from a2d2.calibration import load_calibration
from a2d2.derive import Recipe, reduce_picture
from a2d2.frames import Frame, bus_path, find_calibration, list_frames
from a2d2.images import read_depth_png, read_rgb_png
from benchmarks._raw_files import SIZE, choose_roots, make_recipe, pick, time_once
from preprocessing._pool import map_units

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle")


def compare(ours: Callable, reference: Callable, frames: list, repeats: int) -> tuple[float, float]:
    """Median milliseconds a frame of both, taken in turns; a first turn of each is not counted."""
    times: dict[Callable, list[float]] = {ours: [], reference: []}
    for turn in range(repeats + 1):
        for work, found in times.items():
            seconds = time_once(work, frames)
            if turn:
                found.append(1000 * seconds / len(frames))
    return statistics.median(times[ours]), statistics.median(times[reference])


# ---------------------------------------------------------------- what nobody can avoid


def read_with_opencv(frame: Frame, kind: str) -> None:
    assert cv2.imread(str(frame.path(kind))) is not None, frame


def copy_lidar(frame: Frame, recipe: Recipe, folder: Path) -> None:
    """Read the arrays a depth image needs, and write the finished one again as a 16-bit PNG."""
    with np.load(frame.path("lidar")) as stored:
        for name in ("row", "col", "depth"):
            stored[name]
    cv2.imwrite(str(folder / "depth.png"), _read_finished_depth(frame.under(recipe.out)))


_finished: dict[Frame, np.ndarray] = {}


def _read_finished_depth(frame: Frame) -> np.ndarray:
    if frame not in _finished:
        _finished[frame] = read_depth_png(frame.path("depth"))
    return _finished[frame]


def copy_boxes(frame: Frame, folder: Path) -> None:
    with frame.path("label3D").open(encoding="utf-8") as file:
        content = json.load(file)
    with (folder / "boxes.json").open("w", encoding="utf-8") as file:
        json.dump(content, file)


def copy_bus(frames: list[Frame], recipe: Recipe, folder: Path) -> None:
    """Parse the scene's bus file once, and write one small JSON for each frame."""
    with bus_path(recipe.bus_root, frames[0].scene).open(encoding="utf-8") as file:
        content = json.load(file)
    small = {key: list(range(21)) for key in ("angles_deg", "timestamps_us")}
    for _ in content:
        with (folder / "steering.json").open("w", encoding="utf-8") as file:
            json.dump(small, file)


# ---------------------------------------------------------------- the figures


class Report:
    """Rows of a Markdown table, printed as they come."""

    def __init__(self):
        self.lines = ["| what | measured | bar | |", "|---|---|---|---|"]

    def add(self, what: str, measured: str, bar: str = "", holds: bool | None = None) -> None:
        verdict = "" if holds is None else "holds" if holds else "MISSED"
        self.lines.append(f"| {what} | {measured} | {bar} | {verdict} |")
        tqdm.write(self.lines[-1])

    def add_ratio(self, what: str, frames: int, ours: float, reference: float, bar: float | None) -> None:
        measured = f"{ours / reference:.2f} x ({ours:.1f} against {reference:.1f} ms a frame, {frames} files)"
        self.add(what, measured, "" if bar is None else f"<= {bar} x", None if bar is None else ours / reference <= bar)


def measure_ratios(report: Report, roots: dict[str, Path], scratch: Path, repeats: int) -> None:
    for kind, name, work, bar in (
        ("label", "segmentation / cv2.imread of the same PNGs", derive.derive_segmentation, 0.7),
        ("camera", "camera / cv2.imread of the same PNGs", derive.derive_camera, 1.0),
        ("lidar", "depth / reading the npz arrays and writing a 16-bit PNG", derive.derive_depth, 2.0),
        ("label3D", "boxes / json.load and json.dump", derive.derive_boxes, 3.0),
    ):
        recipe = make_recipe(roots[kind], scratch, {"format": "jpg"})
        frames = [frame for frame in pick(list_frames(roots[kind], kind)) if work(frame, recipe).status == "done"]
        reference = {
            "lidar": partial(copy_lidar, recipe=recipe, folder=scratch),
            "label3D": partial(copy_boxes, folder=scratch),
        }.get(kind, partial(read_with_opencv, kind=kind))
        ours, unavoidable = compare(partial(work, recipe=recipe), reference, frames, repeats)
        report.add_ratio(name, len(frames), ours, unavoidable, bar)

    recipe = make_recipe(roots["bus"], scratch)
    scene = [frame for frame in list_frames(roots["bus"], "camera") if bus_path(recipe.bus_root, frame.scene).is_file()]
    scene = [frame for frame in scene if frame.scene == scene[0].scene]
    ours, unavoidable = compare(
        partial(derive.derive_steering, recipe=recipe),
        partial(copy_bus, recipe=recipe, folder=scratch),
        [scene],
        repeats,
    )
    report.add_ratio("steering, a scene / parsing its bus file and writing as many JSONs", 1, ours, unavoidable, None)


def measure_quality(report: Report, root: Path) -> None:
    camera = load_calibration(find_calibration(root)).cameras["front_center"]
    found = []
    for frame in pick(list_frames(root, "camera")):
        picture = read_rgb_png(frame.path("camera"), camera.recorded_size)
        full = cv2.undistort(picture, camera.original, camera.distortion, None, camera.matrix)
        found.append(
            cv2.PSNR(reduce_picture(picture, camera.resize(SIZE)), cv2.resize(full, SIZE, interpolation=cv2.INTER_AREA))
        )
    report.add(
        "camera before JPEG, against undistorting at full size and INTER_AREA",
        f"PSNR {min(found):.1f} to {max(found):.1f} dB ({len(found)} files)",
        ">= 40 dB",
        min(found) >= 40,
    )


def work_and_weigh(frame: Frame, work: Callable, recipe: Recipe) -> float:
    """Derive a frame; the peak memory of this process in MB."""
    work(frame, recipe)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def run_pool(work: Callable, frames: list[Frame], recipe: Recipe, workers: int) -> tuple[float, float]:
    """Frames a second once every worker has returned a frame, and the largest worker's peak memory in MB."""
    warm, begin, megabytes = 4 * workers, 0.0, 0.0
    for count, (_, peak) in enumerate(map_units(partial(work_and_weigh, work=work, recipe=recipe), frames, workers), 1):
        megabytes = max(megabytes, peak)
        if count == warm:
            begin = time.perf_counter()
    return (len(frames) - warm) / (time.perf_counter() - begin), megabytes


def link_frames(frames: list[Frame], kind: str, count: int, folder: Path) -> list[Frame]:
    """`count` frames under other ids, links to the given ones in turn."""
    linked = []
    for number in range(count):
        original = frames[number % len(frames)]
        frame = Frame(original.scene, original.view, f"{900_000_000 + number:09d}", folder)
        frame.path(kind).parent.mkdir(parents=True, exist_ok=True)
        frame.path(kind).symlink_to(original.path(kind).resolve())
        linked.append(frame)
    return linked


def measure_scaling(report: Report, roots: dict[str, Path], scratch: Path, count: int, repeats: int) -> None:
    largest = 0.0
    for kind, work in (("label", derive.derive_segmentation), ("camera", derive.derive_camera)):
        recipe = make_recipe(roots[kind], scratch / "scaling", {"format": "jpg"})
        frames = link_frames(pick(list_frames(roots[kind], kind)), kind, count, scratch / "linked")
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(repeats):
            for workers, found in rates.items():
                rate, megabytes = run_pool(work, frames, recipe, workers)
                found.append(rate)
                largest = max(largest, megabytes)
        one, two = (statistics.median(found) for found in rates.values())
        report.add(
            f"{work.__name__}: 2 processes / 1 process, start-up left out",
            f"{two / one:.2f} x ({two:.0f} against {one:.0f} frames/s, {count} frames)",
            ">= 1.6 x",
            two / one >= 1.6,
        )
    report.add("memory of a worker, at most", f"{largest:.0f} MB", "<= 300 MB", largest <= 300)


def measure_start(report: Report, root: Path, scratch: Path, repeats: int) -> None:
    """Seconds of each script from the shell when there is nothing left to do; the slowest script's median."""
    command = ["--data", str(root), "--out", str(scratch / "start"), "--threads", "2"]
    medians = {}
    for script in SCRIPTS:
        run = [sys.executable, str(ROOT / "preprocessing" / f"{script}.py"), *command]
        subprocess.run(run, capture_output=True)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            subprocess.run(run, capture_output=True)
            times.append(time.perf_counter() - begin)
        medians[script] = statistics.median(times)
    slowest = max(medians, key=medians.get)
    seconds = medians[slowest]
    report.add(
        "starting a script without work, the slowest", f"{seconds:.2f} s ({slowest})", "<= 1.5 s", seconds <= 1.5
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="raw root")
    parser.add_argument("--frames", type=int, default=300, help="frames for the comparison of one and two processes")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each figure; the median counts")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    scratch = Path(tempfile.mkdtemp(prefix="benchmark_preprocessing_"))
    try:
        roots = choose_roots(arguments.data, scratch)
        report = Report()
        measure_ratios(report, roots, scratch, arguments.repeats)
        measure_quality(report, roots["camera"])
        measure_scaling(report, roots, scratch, arguments.frames, arguments.repeats)
        measure_start(report, roots["bus"], scratch, arguments.repeats)
        print("\n" + "\n".join(report.lines))
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
