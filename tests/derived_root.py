"""A hand-made preprocessed dataset: six frames of 64x64 in three scenes; some labels are missing."""

import numpy as np

from a2d2.frames import VIEWS, Frame
from a2d2.images import encode_jpeg, encode_png, write_bytes, write_json, write_npy
from preprocessing._common import FORMAT_VERSION

SIZE = (64, 64)
SCENES = ("20180101_000000", "20180102_000000", "20180103_000000")
ALL = ("segmentation", "depth", "boxes", "steering")
LABELS = {  # (scene, id) -> kinds of the frame's labels; each scene has one frame with all
    (SCENES[0], "000000001"): ALL,
    (SCENES[0], "000000002"): ("segmentation", "depth"),
    (SCENES[1], "000000003"): ALL,
    (SCENES[1], "000000004"): ("boxes",),
    (SCENES[2], "000000005"): ALL,
    (SCENES[2], "000000006"): (),
}
WITHOUT_BOXES = (SCENES[1], "000000004")  # its label is an empty list of boxes
MATRIX = np.array([[50.0, 0, 30.0], [0, 52.0, 33.0], [0, 0, 1]])
OPTIONS = {"camera": {"format": "jpg"}, "segmentation": {}, "depth": {}, "boxes": {}, "steering": {"limit_ms": 100.0}}


def write_identity(root, size=SIZE, kinds=OPTIONS):
    """dataset.json as preprocessing writes it."""
    camera = {
        "lens": "Telecam",
        "matrix": MATRIX.tolist(),
        "original": MATRIX.tolist(),
        "distortion": [0.0] * 5,
        "recorded_size": [1920, 1208],
    }
    write_json(
        root / "dataset.json",
        {"format": FORMAT_VERSION, "size": list(size), "cameras": dict.fromkeys(VIEWS, camera), "kinds": kinds},
    )


def write_root(root, size=SIZE):
    """Write the dataset; return its frames, sorted."""
    write_identity(root, size)
    width, height = size
    frames = []
    for number, ((scene, identity), kinds) in enumerate(LABELS.items()):
        frame = Frame(scene, "front_center", identity, root)
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = coarse.repeat(height // 4, axis=0).repeat(width // 4, axis=1)
        write_bytes(frame.path("image"), encode_jpeg(image))
        if "segmentation" in kinds:
            write_npy(frame.path("segmentation"), rng.integers(0, 38, (height, width), dtype=np.uint8))
        if "depth" in kinds:
            depth = rng.integers(3 * 256, 70 * 256, (height, width)) * (rng.random((height, width)) < 0.2)
            write_bytes(frame.path("depth"), encode_png(depth.astype(np.uint16)))
        if "boxes" in kinds:
            boxes = [
                {"box": [8.0, 20.0, 40.0, 44.0], "class": "Car", "visible": 1.0},
                {"box": [44.0, 16.0, 60.0, 56.0], "class": "Pedestrian", "visible": 0.9},
            ]
            write_json(frame.path("boxes"), {"boxes": [] if (scene, identity) == WITHOUT_BOXES else boxes})
        if "steering" in kinds:
            angles = [10.0 * number - 15, 10.0 * number - 13]
            samples = {"angles_deg": angles, "timestamps_us": [1000, 6000]}
            write_json(frame.path("steering"), {"angle_deg": angles[0], "speed_kmh": 30.0, **samples})
        frames.append(frame)
    return frames
