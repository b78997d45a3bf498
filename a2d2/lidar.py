"""Lidar points -> sparse depth image at the derived size: the nearest point of a pixel wins; no interpolation."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt16

from a2d2.calibration import map_centres

DEPTH_SCALE = 256  # stored value = metres x 256 (KITTI's convention); 0 is "unknown"
_NEEDED = ("row", "col", "depth")


class MissingLidarError(ValueError):
    """An npz without row, col or depth: a known defect of A2D2, no damage (docs/a2d2-format.md, section 10)."""


def read_lidar(path: Path) -> dict[str, np.ndarray]:
    """`row`, `col` (undistorted pixels at the recorded size) and `depth` (metres along the optical axis), each (N,).

    Points that are not finite, or that the raw fusion set marks as not valid, are left out; N may be 0. Raises
    MissingLidarError if the file lacks one of the three arrays, ValueError if it is no npz, is damaged, or contains
    pickled objects or arrays of other shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys = {key.removeprefix("pcloud_attr."): key for key in stored.files}
            absent = [name for name in _NEEDED if name not in keys]
            if absent:
                raise MissingLidarError(
                    f"no {', '.join(absent)} in the npz; it has {', '.join(sorted(keys)) or 'nothing'}"
                )
            arrays = {name: np.asarray(stored[keys[name]], dtype=np.float64) for name in _NEEDED}
            valid = np.asarray(stored[keys["valid"]], dtype=bool) if "valid" in keys else None
    except (FileNotFoundError, MissingLidarError):
        raise
    except Exception as error:  # a damaged zip raises zlib's, zipfile's, struct's and other errors
        raise ValueError(f"a damaged npz, or one with other than plain arrays ({error})") from error
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"row, col and depth are not lists of equal length: {sorted(shapes)}")
    keep = np.isfinite(arrays["row"]) & np.isfinite(arrays["col"]) & np.isfinite(arrays["depth"])
    if valid is not None:
        keep &= valid
    return {name: array[keep] for name, array in arrays.items()}


def splat_depth(
    row: Float[np.ndarray, " n"],
    col: Float[np.ndarray, " n"],
    depth: Float[np.ndarray, " n"],
    full: tuple[int, int],
    derived: tuple[int, int],
) -> UInt16[np.ndarray, "h w"]:
    """Points at pixel positions of an image of size `full` -> depth image of size `derived`, both (width, height).

    Each pixel stores round(metres x DEPTH_SCALE) of the nearest of its points, 0 if it has none. Points outside the
    image, and points whose stored value would not be in 1..65535, are dropped.
    """
    pixels = map_centres(np.stack([col, row], axis=1), full, derived)
    column, line = np.floor(pixels + 0.5).T
    value = np.round(depth * DEPTH_SCALE)
    keep = (column >= 0) & (column < derived[0]) & (line >= 0) & (line < derived[1]) & (value >= 1) & (value <= 65535)
    column, line, value = column[keep].astype(np.intp), line[keep].astype(np.intp), value[keep].astype(np.uint16)
    far_to_near: Int[np.ndarray, " m"] = np.argsort(value, kind="stable")[::-1]
    image = np.zeros((derived[1], derived[0]), dtype=np.uint16)
    image[line[far_to_near], column[far_to_near]] = value[far_to_near]  # numpy keeps the last of equal indices
    return image
