"""Files that a run leaves behind, written whole or not at all: checkpoints to go on from, and weights to use.

A checkpoint holds everything a run needs to go on, and only plain values and tensors, so that reading one never runs
foreign code. A weights file (safetensors) holds the network alone, with a header from which it can be rebuilt.
"""

import json
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from training.files import make_json_ready, whole_file
from training.renamed import rename_all

WEIGHTS_FORMAT = 2  # 1 had other names, see training/renamed.py
CHECKPOINT_FORMAT = 4  # 1 had the state of a run under other names; 2 had no normaliser; 3 knew one way of balancing

_PLAIN_TYPES = (int, float, str, bool, type(None))


def save_checkpoint(folder: str | Path, step: int, state: dict, keep: int) -> Path:
    """Write `folder/step_<8 digits>.pt` and return its path; afterwards only the `keep` newest up to `step` remain.

    `state` is made of dicts with keys of text or whole numbers, lists, tuples, tensors and plain values. Checkpoints of
    later steps are deleted too: they are broken, or belong to a course that was left.

    Raises TypeError that names what is not plain, and OSError with the way out if the file cannot be written; the
    older checkpoints are then left alone.
    """
    assert keep >= 1, keep
    _check_plain(state, "state")
    folder = Path(folder)
    path = folder / f"step_{step:08d}.pt"
    with whole_file(path) as file:
        torch.save({"format": CHECKPOINT_FORMAT, "step": step, "state": state}, file)

    newest_first = _list_checkpoints(folder)
    kept = [other for other in newest_first if other.name <= path.name][:keep]
    for other in newest_first:
        if other not in kept:
            other.unlink(missing_ok=True)
    # A process that was killed while saving could not remove its own.
    for torn in folder.glob(".step_*.tmp"):
        torn.unlink(missing_ok=True)
    return path


def load_newest_checkpoint(folder: str | Path) -> tuple[int, dict] | None:
    """Return (step, state) of the newest checkpoint that can be read, tensors on the CPU; None where there is none.

    Broken ones are skipped with a warning that names them. Raises ValueError if there are some and all are broken, and
    for a checkpoint of another format, which another version of this code wrote.
    """
    paths = _list_checkpoints(Path(folder))
    for path in paths:
        try:
            # torch.load notices a file that was cut, but not a flipped bit; the checksums in the file do.
            damaged = zipfile.ZipFile(path).testzip()
            if damaged is not None:
                raise ValueError(f"its part {damaged} is damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
            step, state, version = content["step"], content["state"], content.get("format", 1)
        except Exception as error:  # whatever is wrong with this one, the one before it may be whole
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"skipping the broken checkpoint {path}: {reason}", stacklevel=2)
            continue
        if version != CHECKPOINT_FORMAT:
            raise ValueError(
                f"{path} has format {version} and this version of the code reads format {CHECKPOINT_FORMAT}: finish "
                "that run with the version that began it, or start another with --run"
            )
        return step, state
    if paths:
        raise ValueError(f"no checkpoint in {folder} can be read; delete them to start anew, or choose another run")
    return None


def save_weights(path: str | Path, tensors: dict[str, Tensor], header: dict) -> None:
    """Write named tensors and a header (anything `make_json_ready` takes) to one safetensors file.

    Raises OSError with the way out if it cannot be written.
    """
    header = make_json_ready({"format": WEIGHTS_FORMAT, **header})
    # Clones, because safetensors takes neither strided tensors nor two names for one memory.
    contiguous = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = safetensors.torch.save(contiguous, metadata={"header": json.dumps(header)})
    with whole_file(path) as file:
        file.write(content)


def is_own_weights(path: str | Path) -> bool:
    """Whether `save_weights` wrote this file; only its header is read."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return "header" in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError):
        return False


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Return (tensors, header) of a file that `save_weights` wrote, tensors on the CPU; old names become new ones.

    Raises FileNotFoundError, or ValueError with the way out for a file that is broken, foreign or too new.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file; give a run's folder or its best.safetensors")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        header = json.loads(metadata["header"]) if "header" in metadata else {}
    except (safetensors.SafetensorError, ValueError) as error:
        if zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is a file of PyTorch, such as a checkpoint to resume from, and no weights file; give the "
                "run's folder or its best.safetensors"
            ) from error
        raise ValueError(
            f"{path} is broken or no safetensors file ({error}); copy it again, or use the weights of another run"
        ) from error
    version = header.get("format")
    if version is None:
        raise ValueError(f"{path} was not written by this project: it has no header; give a run's best.safetensors")
    if version > WEIGHTS_FORMAT:
        raise ValueError(
            f"{path} has format {version}, and this program reads formats up to {WEIGHTS_FORMAT}; update the program"
        )
    return tensors, rename_all(header) if version < WEIGHTS_FORMAT else header


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)


def _check_plain(value: Any, where: str) -> None:
    """Raise TypeError for what `torch.load(weights_only=True)` would refuse, now and not when the run is resumed."""
    if isinstance(value, Tensor) or type(value) in _PLAIN_TYPES:
        return
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}; keys are texts or whole numbers")
            _check_plain(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")
