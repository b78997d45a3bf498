"""Folders of predictions on disk: which pictures are predicted, where the files go, and what says how they were made.

Files have the format of labels (docs/predictions.md). For a frame of a preprocessed dataset they have the same path as
its labels, below another root; for any other picture see frames.picture_path.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from a2d2.frames import Frame, list_frames, list_places, picture_path
from a2d2.images import ImageError, lock_folder, read_image, read_json, write_json

FORMAT_VERSION = 1
SAME_GRAY = 6  # levels that the means of a cell of one picture may differ
PICTURES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
VIDEOS = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"))


@dataclass(frozen=True)
class Picture:
    """A picture to predict: a frame of a preprocessed dataset, with the kind of its image, or a file.

    `path`: of the file. `place`: its path from the folder that all pictures have in common, None for a frame.
    """

    path: Path
    place: Path | None = None
    frame: Frame | None = None

    @property
    def name(self) -> str:
        return str(self.place if self.frame is None else self.frame)

    def find_file(self, out: Path, kind: str) -> Path:
        """Where the file of this kind is, in the folder `out`."""
        return self.frame.under(out).path(kind) if self.frame is not None else picture_path(out, kind, self.place)

    def read(self) -> UInt8[np.ndarray, "h w 3"]:
        """ImageError for a damaged file."""
        return read_image(self.path) if self.frame is not None else read_any_picture(self.path)


def read_any_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Read a picture of any common format as RGB, turned as its camera says; ImageError if it is none, or damaged.

    Transparency is dropped, 16 bits are cut to 8.
    """
    try:
        # from memory: Pillow 13 mixes up the rows of an uncompressed gray TIFF that is turned, if it maps the file
        with Image.open(io.BytesIO(path.read_bytes())) as opened:
            opened.load()  # raises for a truncated file
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):
                values = np.asarray(picture, dtype=np.float64)
                deep = picture.mode.startswith("I") and values.max(initial=0) > 255
                gray = np.clip(values / (257 if deep else 1), 0, 255).round().astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=2)
            return np.array(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: no picture, or a damaged one ({error})") from error


def sketch_picture(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """The mean gray values of a grid of 8 x 8 cells, as hexadecimal digits: those of another picture differ, those of
    the same one in another compression or size hardly."""
    gray = cv2.resize(image.mean(axis=2, dtype=np.float32), (8, 8), interpolation=cv2.INTER_AREA)
    return gray.round().astype(np.uint8).tobytes().hex()


def are_alike(first: str, second: str) -> bool:
    """Whether two sketches are of the same picture."""
    one, other = (np.frombuffer(bytes.fromhex(each), np.uint8).astype(int) for each in (first, second))
    return len(one) == len(other) and int(np.abs(one - other).max()) <= SAME_GRAY


def holds_predictions(folder: Path) -> bool:
    """Whether the dataset.json of a folder has a section of this name."""
    return "predictions" in _read_header(folder)


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(Path(folder) / "dataset.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def list_pictures(paths: Sequence[Path]) -> tuple[list[Picture], list[Picture], int]:
    """The pictures and the videos in files and folders, sorted, and the number of other files in the folders.

    Folders of predictions in them are passed over: a depth map is no photograph, though it is a PNG. ImageError for a
    preprocessed dataset, whose labels are none either, and for a named file that is no picture by its ending;
    FileNotFoundError for a path that is not there.
    """
    found: dict[Path, None] = {}
    others = 0
    for path in map(Path, paths):
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                header = _read_header(Path(folder)) if "dataset.json" in names else {}
                if "predictions" in header:
                    folders.clear()
                    continue
                if "kinds" in header:
                    raise ImageError(f"{folder} is a preprocessed dataset, with labels among its pictures: use --data")
                folders.sort()
                for name in sorted(names):
                    if Path(name).suffix.lower() in PICTURES | VIDEOS and not name.startswith("."):
                        found[Path(folder) / name] = None
                    else:
                        others += 1
        elif path.is_file():
            if path.suffix.lower() not in PICTURES | VIDEOS:
                known = " ".join(sorted(PICTURES | VIDEOS))
                raise ImageError(f"{path} is no picture or video: known endings are {known}")
            found[path] = None
        else:
            raise FileNotFoundError(f"no file or folder {path}")
    base = find_base(paths)
    unique = {os.path.abspath(path): path for path in found}
    listed = [Picture(path, Path(os.path.relpath(whole, base))) for whole, path in sorted(unique.items())]
    videos = [picture for picture in listed if picture.path.suffix.lower() in VIDEOS]
    return [picture for picture in listed if picture not in videos], videos, others


def list_predicted(out: Path, kinds: Sequence[str]) -> list[Picture]:
    """The pictures, which are no frames, that a folder holds predictions of any of these kinds for, sorted; those of
    videos are left out.

    FileNotFoundError if the folder they were made from is not there any more, or one of the pictures.
    """
    base = Path(read_json(out / "dataset.json")["predictions"]["source"])
    if not base.is_dir():
        raise FileNotFoundError(f"the pictures that {out} is about are not in {base} any more")
    places = {place for kind in kinds for place in list_places(out, kind)}
    pictures = [Picture(base / place, place) for place in sorted(places) if place.parent.suffix.lower() not in VIDEOS]
    if missing := [picture for picture in pictures if not picture.path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of the pictures that {out} is about are gone, such as {missing[0].path}"
        )
    return pictures


def find_base(paths: Sequence[Path]) -> Path:
    """The folder that all files and folders have in common."""
    folders = [os.path.abspath(path if Path(path).is_dir() else Path(path).parent) for path in paths]
    return Path(os.path.commonpath(folders))


def read_video(path: Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of a video, RGB; ImageError if it cannot be opened or has none."""
    capture = cv2.VideoCapture(str(path))
    try:
        done, frame = capture.read() if capture.isOpened() else (False, None)
        if not done:
            raise ImageError(f"{path}: no video, or a damaged one")
        while done:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            done, frame = capture.read()
    finally:
        capture.release()


def describe_video(path: Path) -> tuple[int, float]:
    """Number of frames and frames a second, as far as the file says so; 0 frames and 25 otherwise."""
    capture = cv2.VideoCapture(str(path))
    count, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return max(int(count), 0), rate if 1 <= rate <= 240 else 25.0


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(
    out: Path,
    size: tuple[int, int] | None,
    cameras: Mapping[str, Any],
    kinds: Mapping[str, Mapping[str, Any]],
    header: Mapping[str, Any],
    overwrite: bool = False,
    made_of_them: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> bool:
    """Write `dataset.json`, or add kinds to the one that is there; whether files that are there are to be made again.

    size: (width, height) of all pictures, None where each has its own. kinds: kind -> what its files mean. header: the
    section "predictions": which weights made them, from what. made_of_them: folders in `out` with what is made of
    predictions, such as their copies in another format. more: further sections, of which the newest are kept.

    ValueError if the folder holds something else, or predictions of other weights or pictures, unless they are to be
    overwritten; what is there of them then is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "dataset.json"
    wanted = json.loads(
        json.dumps(
            {
                "format": FORMAT_VERSION,
                "size": None if size is None else list(size),
                "cameras": dict(cameras),
                "kinds": {kind: dict(about) for kind, about in kinds.items()},
                "predictions": dict(header),
                **(more or {}),
            }
        )
    )
    with lock_folder(out):  # several shards may start at once
        try:
            found = read_json(path)
        except FileNotFoundError:
            found = {}
            if any(entry.name != "reports" for entry in out.iterdir()):
                raise ValueError(f"--out {out} is not empty and holds no predictions; name another folder") from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete the folder {out}, or name another") from error
        if found and "predictions" not in found:
            raise ValueError(f"--out {out} holds a preprocessed dataset, and no predictions; name another folder")
        differing = _find_differences(found, wanted) if found else []
        if differing and not overwrite:
            raise ValueError(
                f"{out} holds predictions that were made otherwise: {'; '.join(differing)}. Name another --out, or "
                "make them again with --overwrite"
            )
        if differing:
            # else those of other weights would stay among the new ones
            _remove_files(out, found.get("kinds", {}), made_of_them)
            found = {}
        merged = wanted | {"kinds": found.get("kinds", {}) | wanted["kinds"]}
        if merged != found:
            write_json(path, merged)
    return bool(differing)


def _find_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    differing = [
        f"{key} is {found.get(key)}, now {wanted[key]}" for key in ("format", "size") if found.get(key) != wanted[key]
    ]
    shared = found["kinds"].keys() & wanted["kinds"].keys()
    differing += [f"the meaning of {kind} differs" for kind in shared if found["kinds"][kind] != wanted["kinds"][kind]]
    before, now = found["predictions"], wanted["predictions"]
    for key in now.keys() | before.keys():
        if before.get(key) != now.get(key):
            values = [json.dumps(each.get(key)) for each in (before, now)]
            short = all(len(value) < 80 for value in values)
            differing.append(f"{key} is {values[0]}, now {values[1]}" if short else f"{key} differs")
    return sorted(differing)


def _remove_files(out: Path, kinds: Iterable[str], folders: Iterable[str]) -> None:
    for kind in kinds:
        for frame in list_frames(out, kind):
            frame.path(kind).unlink(missing_ok=True)
        shutil.rmtree(out / kind, ignore_errors=True)
    for name in folders:
        shutil.rmtree(out / name, ignore_errors=True)
