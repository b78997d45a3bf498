"""What this project assumes about the raw files, and the limits that the checks use.

Each assumption cites its section of docs/a2d2-format.md.
"""

from dataclasses import dataclass

from a2d2.bus import LIMIT_MS
from a2d2.checks.known import LARGEST_MAGNITUDE, REGRESSION_SCENE
from a2d2.classes import COLOUR_NAMES, OBJECT_CLASSES

# beyond these limits the verdict is "differs"; some are numbers for an "about" or "well below" of docs/a2d2-format.md
LENS_PIXELS = 1.0
GEOMETRY_PIXELS = 1.0
DEPTH_METRES = 1e-3
LIDAR_POINTS = (1e3, 1e5)
DUPLICATE_SHARE = 0.1
ANGLE_SAMPLES = (15, 30)
SENTINEL_SHARE = 0.1
MOST = 0.5  # of the files or frames
SAMPLE_GAP_US = 1000 * LIMIT_MS  # from a bus item's time to its nearest sample
FASTER_KMH = 10.0
LEAST_CORRELATION = 0.3
LEAST_TURNS = 10


@dataclass(frozen=True)
class Assumption:
    """An assumption about the raw files.

    `needed`: training depends on it, so a difference is an error. `source`: section of docs/a2d2-format.md.
    """

    text: str
    source: str
    needed: bool = False


# An assumption is needed if labels would be silently wrong without it, or a task would have no labels. Faults that the
# scripts and the index handle for each frame (missing and damaged files, duplicates, sentinels) do not make it needed.
ASSUMPTIONS = {
    "calibration": Assumption("cams_lidars.json can be read", "8", needed=True),
    "views": Assumption("the calibration has every camera that has frames", "8", needed=True),
    "lens": Assumption(f"the lens maps seven points to the known pixels, within {LENS_PIXELS:g} px", "8", needed=True),
    "colour_list": Assumption(f"class_list.json has the {len(COLOUR_NAMES)} known colours", "5", needed=True),
    "scenes": Assumption("the scenes are those of A2D2, and all are present", "2.2"),
    "frame_counts": Assumption("each scene has the known number of files", "2.2"),
    "complete_frames": Assumption("every frame has a file of every kind", "11.2"),
    "readable": Assumption("every file can be read", "10"),
    "frame_times": Assumption("every camera JSON has a cam_tstamp, which rises with the id", "3"),
    "picture_type": Assumption("pictures are 8 bit RGB PNGs of the calibration's size", "5", needed=True),
    "colours": Assumption("every label pixel has one of the known colours", "5", needed=True),
    "lidar_mapped": Assumption("most npz have row, col and depth", "4", needed=True),
    "lidar_unmapped": Assumption("the npz without them are the 15 known ones", "10"),
    "lidar_keys": Assumption("an npz has the nine known arrays", "4"),
    "lidar_types": Assumption("these arrays have the known types", "4"),
    "lidar_points": Assumption("a frame has in the order of 10,000 points", "4"),
    "lidar_finite": Assumption("every coordinate is a finite number", "4"),
    "lidar_range": Assumption("row and col lie in the picture, or at most a pixel outside", "4"),
    "lidar_geometry": Assumption(
        f"row and col are the projected points, within {GEOMETRY_PIXELS:g} px", "4", needed=True
    ),
    "lidar_depth": Assumption(f"depth is x, within {DEPTH_METRES * 1000:g} mm", "4", needed=True),
    "lidar_distance": Assumption(f"distance is the points' norm, within {DEPTH_METRES * 1000:g} mm", "4"),
    "box_geometry": Assumption(
        f"2d_bbox is the hull of the projected corners, median within {GEOMETRY_PIXELS:g} px", "6.1", needed=True
    ),
    "box_classes": Assumption(f"every box has one of the {len(OBJECT_CLASSES)} classes", "6.3", needed=True),
    "box_duplicates": Assumption(f"at most {DUPLICATE_SHARE:.0%} of the boxes are exact duplicates", "6.2"),
    "box_regression": Assumption(f"scene {REGRESSION_SCENE} has exactly the known boxes", "6.2"),
    "bus_scenes": Assumption("the scenes with bus signals are the 21 known ones, and all are present", "2.2"),
    "bus_items": Assumption("a scene has at least as many bus items as frames", "7"),
    "bus_join": Assumption("most frames have a bus item with their name", "7", needed=True),
    "bus_signals": Assumption("the angle and its sign are in most items", "7", needed=True),
    "bus_motion": Assumption("speed and yaw rate are in most items", "7"),
    "bus_samples": Assumption("an item has about 21 samples of the angle, and as many signs", "7"),
    "bus_sentinels": Assumption(f"at most {SENTINEL_SHARE:.0%} of the angle's samples are 614.10 or 614.25", "7.1"),
    "bus_magnitudes": Assumption(
        f"the angle's magnitude is in 0..{LARGEST_MAGNITUDE:g} degrees, without sign", "7.1", needed=True
    ),
    "bus_times": Assumption("an item has the time of its frame, and a sample near that time", "7", needed=True),
    "bus_sign": Assumption(
        f"the signed angle correlates with the yaw rate above {FASTER_KMH:g} km/h: r >= {LEAST_CORRELATION:g}",
        "7.1",
        needed=True,
    ),
}
