"""Bus signals -> the signed steering-wheel angle of each frame.

`steering_angle_calculated` is the magnitude of the wheel's angle in degrees; the sign is a separate signal, 0 for left
(positive) and 1 for right (negative). `steering_angle` is the displacement of the steering link, not an angle, and is
not used (docs/a2d2-format.md, section 7.1).
"""

import json
from pathlib import Path

import numpy as np

ANGLE = "steering_angle_calculated"
SPEED = "vehicle_speed"
SENTINELS = (614.10, 614.25)  # "not yet known" and "error"
_STEP = 0.15  # the signal's resolution in degrees


def read_bus(path: Path) -> dict[str, dict]:
    """Items of a scene's bus file, by the name of the camera JSON they belong to (never by their index in the list).

    ValueError if the file is no JSON list.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} is no bus file of a labelled dataset: expected a list of frames")
    return {item["frame_name"]: item for item in content if isinstance(item, dict) and "frame_name" in item}


def read_signal(item: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Timestamps (microseconds, int64) and values (float64) of one signal; both empty if the item lacks the signal."""
    signal = (item.get("flexray") or {}).get(name) or {}
    timestamps, values = signal.get("timestamps") or [], signal.get("values") or []
    if len(timestamps) != len(values):
        raise ValueError(f"{name} has {len(timestamps)} timestamps and {len(values)} values")
    values = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.array(timestamps, dtype=np.int64), values


def sign_magnitudes(item: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Timestamps and signed values of a signal whose sign is the signal `<name>_sign`, matched by time.

    Samples without a sign are left out.
    """
    timestamps, magnitudes = read_signal(item, name)
    sign_timestamps, signs = read_signal(item, f"{name}_sign")
    if len(timestamps) == 0 or len(sign_timestamps) == 0:
        return timestamps[:0], magnitudes[:0]
    if not np.array_equal(timestamps, sign_timestamps):
        nearest = np.abs(timestamps[:, None] - sign_timestamps[None]).argmin(axis=1)
        signs = signs[nearest]
    known = np.isfinite(magnitudes) & np.isin(signs, (0, 1))
    return timestamps[known], (magnitudes * (1 - 2 * signs))[known]


def is_sentinel(magnitudes: np.ndarray) -> np.ndarray:
    """Boolean mask of the magnitudes that mean "not yet known" or "error"."""
    return (np.abs(np.abs(magnitudes)[:, None] - np.array(SENTINELS)) < _STEP / 3).any(axis=1)


def convert_steering(item: dict) -> dict | None:
    """A frame's item -> the content of the derived steering file; None if no sample of the angle is usable.

    `angle_deg`: the sample nearest to the frame's time, left positive; `angles_deg`, `timestamps_us`: all usable
    samples; `speed_kmh`: the sample of the speed nearest to the frame's time, or None.
    """
    timestamps, angles = sign_magnitudes(item, ANGLE)
    usable = ~is_sentinel(angles)
    timestamps, angles = timestamps[usable], angles[usable]
    if len(angles) == 0:
        return None
    frame_time = int(item.get("timestamp") or np.median(timestamps))
    speed_timestamps, speeds = read_signal(item, SPEED)
    known = np.isfinite(speeds)
    speed = _pick_nearest(speed_timestamps[known], speeds[known], frame_time)
    return {
        "angle_deg": _pick_nearest(timestamps, angles, frame_time),
        "speed_kmh": speed,
        "angles_deg": [float(angle) for angle in angles],
        "timestamps_us": [int(timestamp) for timestamp in timestamps],
    }


def _pick_nearest(timestamps: np.ndarray, values: np.ndarray, time: int) -> float | None:
    return float(values[np.abs(timestamps - time).argmin()]) if len(values) else None
