"""Strict readers of images, and atomic writers of files.

A damaged label, or an image of another type, must never be read as class 0. Readers therefore check the header first
and refuse every file that is not exactly of the type that A2D2 or a preprocessed dataset has. kornia-rs decodes PNG
files and refuses damaged ones.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from jaxtyping import UInt8, UInt16
from kornia_rs import io as kornia_io

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TYPES = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGBA"}
_TEMPORARY = ".partial"
_DAY_SECONDS = 24 * 3600


class ImageError(ValueError):
    """A file is not the expected image; the message describes what the file is."""


def read_png_header(data: bytes) -> tuple[int, int, int, str]:
    """Width, height, bits per channel and colour type of a PNG; ImageError if the header is no PNG header."""
    if not data:
        raise ImageError("the file is empty")
    if data[:8] != _PNG_SIGNATURE:
        raise ImageError(f"no PNG: it starts with {data[:8]!r}")
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageError("a PNG that ends within its header")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    return width, height, bits, _PNG_TYPES.get(colour, f"colour type {colour}")


def _check_png_type(found: tuple[int, str], wanted: tuple[int, str]) -> None:
    if found != wanted:
        raise ImageError(f"a PNG of {found[0]} bit {found[1]}, expected {wanted[0]} bit {wanted[1]}")


def decode_rgb_png(data: bytes, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an 8-bit RGB PNG, of (width, height) `size` if given; ImageError for another type or size, or damage."""
    width, height, bits, colour = read_png_header(data)
    _check_png_type((bits, colour), (8, "RGB"))
    if size is not None and (width, height) != tuple(size):
        raise ImageError(f"{width}x{height} pixels, the calibration has {size[0]}x{size[1]}")
    try:
        return kornia_io.decode_image_png_u8(data, (height, width), "rgb")
    except Exception as error:  # kornia-rs raises bare Exception for damaged data
        raise ImageError(f"a damaged PNG ({error})") from error


def read_rgb_png(path: Path, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Read a camera or label picture of A2D2, as `decode_rgb_png` does."""
    return decode_rgb_png(Path(path).read_bytes(), size)


def read_depth_png(path: Path) -> UInt16[np.ndarray, "h w"]:
    """Read a 16-bit gray PNG: metres x 256, 0 where the depth is unknown (KITTI's convention). ImageError, with the
    file's name, for another file, or a damaged one."""
    data = Path(path).read_bytes()
    try:
        width, height, bits, colour = read_png_header(data)
        _check_png_type((bits, colour), (16, "gray"))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    try:
        return kornia_io.decode_image_png_u16(data, (height, width), "mono").reshape(height, width)
    except Exception as error:
        raise ImageError(f"{path}: a damaged PNG ({error})") from error


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Read a derived camera image, JPEG or PNG, as RGB; ImageError, with the file's name, if it is damaged."""
    path = Path(path)
    try:
        if path.suffix == ".png":
            return read_rgb_png(path)
        # a truncated JPEG still decodes, with gray in place of what is missing, so the end marker is checked first
        data = path.read_bytes()
        if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
            raise ImageError("no JPEG, or a truncated one")
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if decoded is None:
            raise ImageError("a damaged JPEG")
        return decoded
    except ImageError as error:
        raise ImageError(f"{path}: {error}; delete it and run preprocessing/camera.py again") from error


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """RGB -> JPEG of quality 95, without chroma subsampling, which would blur thin coloured objects."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)


def encode_png(image: UInt8[np.ndarray, "h w 3"] | UInt16[np.ndarray, "h w"]) -> bytes:
    """8-bit RGB or 16-bit gray -> PNG, with OpenCV's default (fast) compression."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return _encode(".png", image, [])


def _encode(extension: str, image: np.ndarray, options: list[int]) -> bytes:
    done, data = cv2.imencode(extension, image, options)
    if not done:
        raise ValueError(f"OpenCV could not encode an array {image.shape} of {image.dtype} as {extension}")
    return data.tobytes()


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a program that opens its file itself; it takes that name when the block ends
    well and vanishes when it fails. OSError with the name `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{_TEMPORARY}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: under a temporary name in the same folder, then renamed. OSError if it fails."""
    with whole_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut can leave the new name with no content behind it


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically; ValueError for a value that JSON does not have, such as NaN."""
    write_bytes(path, encode_json(content))


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8; ValueError if it is none, or gives a key of an object twice."""
    return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that lists in `duplicates` the keys of a mapping that are given twice: YAML has no such mappings, and
    PyYAML takes the last of the two."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here, and not where a mapping is constructed: by then PyYAML may have put in what `<<` refers to
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in first_line:
                self.duplicates.append(
                    f"line {line}: key '{key.value}' is given again, first in line {first_line[key.value]}"
                )
            first_line.setdefault(key.value, line)
        return node


def read_yaml(path: Path) -> Any:
    """The content of a YAML file that somebody wrote; ValueError, with the path, if it cannot be read, is none, or
    gives a key of a mapping twice."""
    try:
        loader = _UniqueKeyLoader(Path(path).read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from error
    if loader.duplicates:
        raise ValueError(f"{path}, {loader.duplicates[0]}")
    return content


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return content


def encode_npy(array: np.ndarray) -> bytes:
    """The content of a .npy file with one array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write one array as a .npy file, atomically."""
    write_bytes(path, encode_npy(array))


def encode_json(content: object) -> bytes:
    """The content of a JSON file; ValueError for a value that JSON does not have, such as NaN."""
    return (json.dumps(content, allow_nan=False) + "\n").encode()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # without /proc the process counts as alive
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return state != "Z"  # a zombie: ended, but its parent has not waited for it; in a container it may stay so
    return True


def sweep_temporary(root: Path) -> int:
    """Remove the temporary files of interrupted writers under a root; return the number of removed files.

    A temporary file is removed if its writer was a process of this host that has ended, or if the file is older than a
    day. Newer files of other hosts stay, because another machine may be writing to the same folder.
    """
    host, removed = socket.gethostname(), 0
    for path in Path(root).rglob(f".*{_TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):  # another run may sweep the same folder
            name, writer = path.name.removesuffix(_TEMPORARY).rsplit(".", 1)
            dead = name.endswith(f".{host}") and not _is_alive(int(writer))
            if dead or time.time() - path.stat().st_mtime > _DAY_SECONDS:
                path.unlink()
                removed += 1
    return removed


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the kernel frees when the process ends; without one where there are none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"{folder} is on a file system without locks ({error.strerror}): do not start two programs on it in "
                "the same moment",
                file=sys.stderr,
            )
        yield
    finally:
        os.close(handle)
