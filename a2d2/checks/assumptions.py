"""What this project assumes of the raw files, each with its section of docs/a2d2-format.md, and the limits that the
verdicts use."""

from dataclasses import dataclass

from a2d2.checks.known import LARGEST_MAGNITUDE, REGRESSION_SCENE
from a2d2.classes import COLOUR_NAMES, OBJECT_CLASSES

# how far off is "differs"; where docs/a2d2-format.md only says "about" or "well below", that is put in a number here
LENS_PIXELS = 1.0
GEOMETRY_PIXELS = 1.0
DEPTH_METRES = 1e-3
LIDAR_POINTS = (1e3, 1e5)
DUPLICATE_SHARE = 0.1
ANGLE_SAMPLES = (15, 30)
SENTINEL_SHARE = 0.1
MOST = 0.5  # of the files or frames
SAMPLE_WAIT_US = 100_000
FASTER_KMH = 10.0
LEAST_CORRELATION = 0.3
LEAST_TURNS = 10


@dataclass(frozen=True)
class Assumption:
    """`needed`: training depends on it, so a difference is an error. `source`: section of docs/a2d2-format.md."""

    text: str
    source: str
    needed: bool = False


# Needed is what would make labels wrong without anybody noticing, or leave a task without any. What the scripts and
# the index handle frame by frame (missing and damaged files, duplicates, sentinels) is not.
ASSUMPTIONS = {
    "calibration": Assumption("cams_lidars.json can be read", "8", needed=True),
    "views": Assumption("the calibration has every camera that has frames", "8", needed=True),
    "lens": Assumption(f"the lens moves seven points as known, within {LENS_PIXELS:g} px", "8", needed=True),
    "colour_list": Assumption(f"class_list.json is the table of {len(COLOUR_NAMES)} colours", "5", needed=True),
    "scenes": Assumption("the scenes are A2D2's, and all are there", "2.2"),
    "frame_counts": Assumption("as many files in each scene as known", "2.2"),
    "complete_frames": Assumption("every frame has a file of every kind", "11.2"),
    "readable": Assumption("every file can be read", "10"),
    "frame_times": Assumption("every camera JSON has a cam_tstamp, and they rise with the id", "3"),
    "picture_type": Assumption("pictures are 8 bit RGB PNGs of the calibration's size", "5", needed=True),
    "colours": Assumption("every label pixel has a colour of the table", "5", needed=True),
    "lidar_mapped": Assumption("most npz have row, col and depth", "4", needed=True),
    "lidar_unmapped": Assumption("those without are the 15 that are known", "10"),
    "lidar_keys": Assumption("an npz has the nine known arrays", "4"),
    "lidar_types": Assumption("of the known types", "4"),
    "lidar_points": Assumption("a frame has in the order of 10,000 points", "4"),
    "lidar_finite": Assumption("every coordinate is a finite number", "4"),
    "lidar_range": Assumption("row and col lie in the picture, but for a pixel", "4"),
    "lidar_geometry": Assumption(
        f"row and col are the projected points, within {GEOMETRY_PIXELS:g} px", "4", needed=True
    ),
    "lidar_depth": Assumption(f"depth is x, within {DEPTH_METRES * 1000:g} mm", "4", needed=True),
    "lidar_distance": Assumption(f"distance is the points' norm, within {DEPTH_METRES * 1000:g} mm", "4"),
    "box_geometry": Assumption(
        f"2d_bbox is the hull of the projected corners, median within {GEOMETRY_PIXELS:g} px", "6.1", needed=True
    ),
    "box_classes": Assumption(f"every box is of one of the {len(OBJECT_CLASSES)} classes", "6.3", needed=True),
    "box_duplicates": Assumption(f"at most {DUPLICATE_SHARE:.0%} of the boxes are exact duplicates", "6.2"),
    "box_regression": Assumption(f"scene {REGRESSION_SCENE} has exactly the known boxes", "6.2"),
    "bus_scenes": Assumption("the scenes with bus signals are the 21 known ones, and all are there", "2.2"),
    "bus_items": Assumption("a scene has as many bus items as frames, or more", "7"),
    "bus_join": Assumption("most frames find their bus item by name", "7", needed=True),
    "bus_signals": Assumption("the angle and its sign are in most items", "7", needed=True),
    "bus_motion": Assumption("speed and yaw rate are in most items", "7"),
    "bus_samples": Assumption("about 21 samples of the angle an item, and as many signs", "7"),
    "bus_sentinels": Assumption(f"at most {SENTINEL_SHARE:.0%} of the angle's samples are 614.10 or 614.25", "7.1"),
    "bus_magnitudes": Assumption(
        f"the angle's magnitude is in 0..{LARGEST_MAGNITUDE:g} degrees, sign apart", "7.1", needed=True
    ),
    "bus_times": Assumption("an item's time is its frame's, and a sample is near", "7"),
    "bus_sign": Assumption(
        f"the signed angle goes with the yaw rate above {FASTER_KMH:g} km/h: r >= {LEAST_CORRELATION:g}",
        "7.1",
        needed=True,
    ),
}
