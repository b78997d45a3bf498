"""Bus signals -> the signed steering-wheel angle of each frame.

`steering_angle_calculated` is the magnitude of the wheel's angle in degrees; the sign is a separate signal, 0 for left
(positive) and 1 for right (negative). `steering_angle` is the displacement of the steering link, not an angle, and is
not used (docs/a2d2-format.md, section 7.1).
"""

from pathlib import Path

import numpy as np

from a2d2.images import read_json

ANGLE = "steering_angle_calculated"
SPEED = "vehicle_speed"
SENTINELS = (614.10, 614.25)  # "not yet known" and "error"
LIMIT_MS = 100.0  # a sample farther from its moment is no sample of it; signals come every 20 ms or so
_STEP = 0.15  # the signal's resolution in degrees


def read_bus(path: Path) -> dict[str, dict]:
    """Items of a scene's bus file, by the name of the camera JSON they belong to (never by their index in the list).

    ValueError if the file is no JSON list.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} is no bus file of a labelled dataset: expected a list of frames")
    return {item["frame_name"]: item for item in content if isinstance(item, dict) and "frame_name" in item}


def read_signal(item: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Timestamps (microseconds, int64) and values (float64) of one signal, in the order of time, whatever their order
    in the file; both empty if the item lacks the signal."""
    signal = (item.get("flexray") or {}).get(name) or {}
    timestamps, values = signal.get("timestamps") or [], signal.get("values") or []
    if len(timestamps) != len(values):
        raise ValueError(f"{name} has {len(timestamps)} timestamps and {len(values)} values")
    values = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    timestamps = np.array(timestamps, dtype=np.int64)
    order = np.argsort(timestamps, kind="stable")
    return timestamps[order], values[order]


def sign_magnitudes(item: dict, name: str, limit_ms: float = LIMIT_MS) -> tuple[np.ndarray, np.ndarray]:
    """Timestamps and signed values of a signal whose sign is the signal `<name>_sign`, matched by time.

    Samples without a sign, or with the nearest one farther than `limit_ms` away, are left out.
    """
    timestamps, magnitudes = read_signal(item, name)
    sign_timestamps, signs = read_signal(item, f"{name}_sign")
    if len(timestamps) == 0 or len(sign_timestamps) == 0:
        return timestamps[:0], magnitudes[:0]
    gaps = np.abs(timestamps[:, None] - sign_timestamps[None])
    if not np.array_equal(timestamps, sign_timestamps):  # equal times may occur twice, each with a sign of its own
        signs = signs[gaps.argmin(axis=1)]
    known = np.isfinite(magnitudes) & np.isin(signs, (0, 1)) & (gaps.min(axis=1) <= 1000 * limit_ms)
    return timestamps[known], (magnitudes * (1 - 2 * signs))[known]


def is_sentinel(magnitudes: np.ndarray) -> np.ndarray:
    """Boolean mask of the magnitudes that mean "not yet known" or "error"."""
    return (np.abs(np.abs(magnitudes)[:, None] - np.array(SENTINELS)) < _STEP / 3).any(axis=1)


def _read_angles(item: dict, limit_ms: float) -> tuple[np.ndarray, np.ndarray]:
    timestamps, angles = sign_magnitudes(item, ANGLE, limit_ms)
    usable = ~is_sentinel(angles)
    return timestamps[usable], angles[usable]


def explain_missing(item: dict, limit_ms: float = LIMIT_MS) -> str:
    """Why `convert_steering` finds no angle in this item."""
    timestamps, _ = _read_angles(item, limit_ms)
    if len(timestamps):
        gap = np.abs(timestamps - _find_time(item, timestamps)).min()
        return f"nearest sample {gap / 1000:.0f} ms away"
    own, signs = read_signal(item, ANGLE)[0], read_signal(item, f"{ANGLE}_sign")[0]
    if len(own) and len(signs) and (gap := np.abs(own[:, None] - signs[None]).min()) > 1000 * limit_ms:
        return f"nearest sample of the sign {gap / 1000:.0f} ms away"
    return "no usable sample of the steering angle"


def convert_steering(item: dict, limit_ms: float = LIMIT_MS) -> dict | None:
    """A frame's item -> the content of the derived steering file; None if no sample of the angle is usable, or none is
    within `limit_ms` of the frame's time (`explain_missing` says which).

    `angle_deg`: the sample nearest to the frame's time, left positive; `angles_deg`, `timestamps_us`: all usable
    samples, in the order of time; `speed_kmh`: the sample of the speed nearest to the frame's time, or None. Of an item
    without a time, the middle of its samples is the frame's time, because they surround it (docs/a2d2-format.md,
    section 7).
    """
    timestamps, angles = _read_angles(item, limit_ms)
    if len(angles) == 0:
        return None
    frame_time = _find_time(item, timestamps)
    angle = _pick_nearest(timestamps, angles, frame_time, limit_ms)
    if angle is None:
        return None
    speed_timestamps, speeds = read_signal(item, SPEED)
    known = np.isfinite(speeds)
    return {
        "angle_deg": angle,
        "speed_kmh": _pick_nearest(speed_timestamps[known], speeds[known], frame_time, limit_ms),
        "angles_deg": [float(angle) for angle in angles],
        "timestamps_us": [int(timestamp) for timestamp in timestamps],
    }


def _find_time(item: dict, timestamps: np.ndarray) -> int:
    return int(np.median(timestamps) if item.get("timestamp") is None else item["timestamp"])


def _pick_nearest(timestamps: np.ndarray, values: np.ndarray, time: int, limit_ms: float) -> float | None:
    gaps = np.abs(timestamps - time)
    return float(values[gaps.argmin()]) if len(values) and gaps.min() <= 1000 * limit_ms else None
