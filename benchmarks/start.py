"""How long a training takes from its config to its first batch, on a root of as many frames as A2D2's boxes set.

    python benchmarks/start.py [--frames 41000]

The root is made of hard links to a few synthetic frames, derived at 1024x640. Each start is a process of its own, with
the files' metadata in the cache of the system: the first start of a run, another start, and a resume.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from a2d2.frames import DERIVED_KINDS, Frame, list_frames
from a2d2.synthetic.writer import write_dataset
from a2d2.synthetic.writer import write_json as write_plain_json

ROOT = Path(__file__).resolve().parent.parent
SCENES = 23
SCRIPTS = ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle")
KINDS = ("image", "segmentation", "depth", "boxes", "steering")

MEASURE = """
import json, sys, time
begin = time.perf_counter()
import train
from pathlib import Path
from tasks.options import OPTIONS
from training.config import load_config
from training.record import Record
imported = time.perf_counter()
counts = {"open": 0, "os.scandir": 0, "os.listdir": 0}

def count(event, given):
    if event in counts:
        counts[event] += 1

root, record = sys.argv[1:]
overrides = [f"data.roots=[{root}]", "data.workers=0", "train.micro_batch=1"]
config = load_config("configs/demo.yaml", overrides, OPTIONS)
sys.addaudithook(count)
begin_work = time.perf_counter()
path = Path(record)
setup = train.prepare(config, Record.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None)
prepared, opens = time.perf_counter(), counts["open"]
next(train.load_cycles(setup, 0))
done = time.perf_counter()
path.write_text(setup.record.to_json(), encoding="utf-8")
print(json.dumps({
    "imports": imported - begin, "first_batch": done - begin_work, "frames": len(setup.frames), "opens": opens,
    "listings": counts["os.scandir"] + counts["os.listdir"],
}))
"""


def make_root(folder: Path, frames: int) -> Path:
    """A preprocessed dataset with all kinds of label for every frame, of hard links to ten derived frames."""
    write_dataset(folder, scenes=2, frames=5, size=(960, 604))
    for script in SCRIPTS:
        command = [sys.executable, str(ROOT / "preprocessing" / f"{script}.py"), "--out", str(folder / "derived")]
        command += ["--data", str(folder / "camera_lidar_semantic_bboxes"), "--threads", "2"]
        subprocess.run(command, check=True, capture_output=True)
    sources = [
        frame for frame in list_frames(folder / "derived", "image") if all(frame.path(kind).is_file() for kind in KINDS)
    ]
    root = folder / "root"
    for number in range(frames):
        scene = f"201801{1 + number * SCENES // frames:02d}_000000"
        frame = Frame(scene, "front_center", f"{number:09d}", root)
        for kind in KINDS:
            frame.path(kind).parent.mkdir(parents=True, exist_ok=True)
            os.link(sources[number % len(sources)].path(kind), frame.path(kind))
    write_plain_json(
        root / "dataset.json", json.loads((folder / "derived" / "dataset.json").read_text(encoding="utf-8"))
    )
    return root


def measure(root: Path, record: Path) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root), str(record)], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=41000)
    arguments = parser.parse_args()
    assert set(KINDS) <= set(DERIVED_KINDS)
    scratch = Path(tempfile.mkdtemp(prefix="benchmark_start_"))
    try:
        root = make_root(scratch, arguments.frames)
        print(f"| start, {arguments.frames} frames | imports, s | to the first batch, s | files opened | listings |")
        print("|---|---|---|---|---|")
        for name, record, bar in (
            ("the first", scratch / "first.json", 6.0),
            ("another", scratch / "second.json", 2.0),
            ("a resume", scratch / "first.json", 2.0),
        ):
            found = measure(root, record)
            verdict = "holds" if found["first_batch"] <= bar else "FAILS"
            print(
                f"| {name} | {found['imports']:.1f} | {found['first_batch']:.2f} (<= {bar:g}: {verdict}) "
                f"| {found['opens']} | {found['listings']} |"
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
