"""Runs the preprocessing scripts as a user does, and reads their output."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle")
SIZE = (48, 32)


def start(script, data, out, *options, threads="2"):
    command = [sys.executable, ROOT / "preprocessing" / f"{script}.py", "--data", data, "--out", out, *options]
    command += ["--threads", threads] + ([] if "--size" in options else ["--size", "48x32"])
    return subprocess.Popen(
        [str(part) for part in command],
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process):
    """Wait for the process; return its exit code and what it printed to both streams."""
    printed = "".join(process.communicate(timeout=60))
    assert "Traceback" not in printed, printed
    return process.returncode, printed


def run(*arguments, **options):
    return finish(start(*arguments, **options))


def read_tree(root):
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and "reports" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def read_report(out, name):
    return json.loads((out / "reports" / f"{name}.json").read_text())


def list_reasons(out, name, status="failed"):
    return {row["frame"]: row["reason"] for row in read_report(out, name)[status]}


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return result
