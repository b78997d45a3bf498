"""The log of a run: one JSON line per event in metrics.jsonl, TensorBoard, optionally W&B, and a line on the console.

The JSON lines are the record of the run: if they cannot be written, the run stops. The other two are a convenience: if
one fails, the run continues without it after one warning.
"""

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from tqdm import tqdm

from training.files import make_json_ready, whole_file, write_json

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "torchmetrics",
    "torchjd",
    "faster-coco-eval",
    "numpy",
    "opencv-python-headless",
    "kornia-rs",
    "pydantic",
    "safetensors",
)


class RunLog:
    """The log of the run in `folder`, made anew or continued; only one process of a run may have one.

    `events`: lines of the file that are of this run.

    `wandb` is None or the keyword arguments of wandb.init: project, entity, mode.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = True, wandb: dict | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self._file = _open_to_append(self.path)
        self.events = 0
        self._first_step: int | None = None
        self._dispensable = []
        if tensorboard:
            self._dispensable.append(_Dispensable("TensorBoard", self._make_tensorboard))
        if wandb is not None:
            self._dispensable.append(_Dispensable("W&B", lambda: _Wandb(self.folder, wandb)))

    def event(self, kind: str, step: int, **values: SupportsFloat) -> None:
        """Log numbers (also of NumPy and torch) that belong to one step; NaN and infinity become null in the file.

        `kind` groups them ("train", "evaluate", ...). The line holds kind, step, the time in seconds since 1970, and
        the values by name. Raises OSError that names the file if the line cannot be written.
        """
        numbers = {name: float(value) for name, value in values.items()}
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **numbers}
        try:
            self._file.write(json.dumps(make_json_ready(line)) + "\n")
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}; make room, then resume the run") from error
        self.events += 1
        tqdm.write(f"{kind} step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        for writer in self._dispensable:
            writer.add({f"{kind}/{name}": value for name, value in numbers.items()}, step)

    def truncate_after(self, step: int, events: int | None = None) -> None:
        """Drop what was logged after `step`, all but the first `events` lines, and a line that was cut off; a run calls
        this before its first event, and if it is resumed it then leaves the same file as one that was never stopped,
        but for the times."""
        self._file.close()
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [f"{line}\n" for line in lines if _belongs_to(line, step)][:events]
        with whole_file(self.path) as file:
            file.write("".join(kept).encode("utf-8"))
        self._file = _open_to_append(self.path)
        self.events = len(kept)
        self._first_step = step + 1

    def close(self) -> None:
        """Finish all files; the log takes no more events."""
        self._file.close()
        for writer in self._dispensable:
            writer.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _make_tensorboard(self) -> "_TensorBoard":
        return _TensorBoard(self.folder / "tensorboard", self._first_step)


def write_environment(folder: str | Path, command: list[str]) -> None:
    """Write `folder/environment.json`: commit, versions, device, command line and time, to explain a result later.

    `git.commit` and `git.changed` (whether files differ from that commit) are null outside a git checkout, and so is
    the version of a package that is not installed. `command` is sys.argv.
    """
    write_json(Path(folder) / "environment.json", {"command": shlex.join(command)} | describe_machine())


def describe_machine() -> dict[str, Any]:
    """Commit, versions, device and time, see `write_environment`."""
    source = Path(__file__).parent
    status = _ask_git(source, "status", "--porcelain")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": {
            "commit": _ask_git(source, "rev-parse", "HEAD"),
            "changed": None if status is None else status != "",
        },
        "python": platform.python_version(),
        "packages": {name: _find_version(name) for name in PACKAGES},
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
    }


class _Dispensable:
    """A writer that a run can do without: made at the first event, given up with one warning when it fails."""

    def __init__(self, name: str, make: Callable[[], "_TensorBoard | _Wandb"]):
        self._name = name
        self._make = make
        self._writer: _TensorBoard | _Wandb | None = None
        self._failed = False

    def add(self, scalars: dict[str, float], step: int) -> None:
        if self._failed:
            return
        with self._forgive():
            # Not made earlier: whether the run was resumed, and from which step, is only known now.
            if self._writer is None:
                self._writer = self._make()
            self._writer.add(scalars, step)

    def close(self) -> None:
        if self._writer is not None and not self._failed:
            with self._forgive():
                self._writer.close()

    @contextlib.contextmanager
    def _forgive(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no fault of a tracker is worth a training run
            self._failed = True
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{self._name} fails and is left out from here on ({reason})", stacklevel=2)


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier run logged at steps that come again.
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, options: dict):
        self._run = importlib.import_module("wandb").init(dir=str(folder), name=folder.name, **options)

    def add(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


def _open_to_append(path: Path):
    return path.open("a", encoding="utf-8", buffering=1)


def _belongs_to(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is complete and of `step` or earlier."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def _ask_git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints about the checkout at `folder`; None where there is no git or no checkout."""
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
