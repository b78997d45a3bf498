"""Known numbers of A2D2, each with its section of docs/a2d2-format.md; `a2d2/checks/verdicts.py` compares a raw dataset
with them."""

from a2d2.classes import OBJECT_CLASSES

MAIN_VIEW = "front_center"  # the only camera of the boxes set and of the bus files (sections 2.1 and 7)

# section 2.2: frames in the boxes set; None for a scene that only the semantic set has
SCENES = {
    "20180807_145028": 942,
    "20180810_142822": 563,
    "20180925_101535": 1060,
    "20180925_112730": 952,
    "20180925_124435": 976,
    "20180925_135056": 692,
    "20181008_095521": 727,
    "20181016_082154": None,
    "20181016_095036": None,
    "20181016_125231": 893,
    "20181107_132300": 571,
    "20181107_132730": 812,
    "20181107_133258": 117,
    "20181107_133445": None,
    "20181108_084007": 643,
    "20181108_091945": 862,
    "20181108_103155": 517,
    "20181108_123750": 1283,
    "20181108_141609": None,
    "20181204_135952": 624,
    "20181204_154421": 151,
    "20181204_170238": 112,
    "20181204_191844": None,
}
BOX_SCENES = {scene: frames for scene, frames in SCENES.items() if frames is not None}
BARE_SCENES = {"20181016_095036", "20181204_191844"}  # no lidar, no camera JSON, no bus (sections 2.2 and 10)
BUS_SCENES = SCENES.keys() - BARE_SCENES
# sections 2.2 and 9.1: labels of all cameras of the semantic set, compared if all of these scenes are present
LABEL_SUMS = {
    "all scenes": (tuple(SCENES), None, 41277),
    "the scenes without lidar": (tuple(sorted(BARE_SCENES)), None, 2796),
    "20181108_084007, _091945 and _103155": (("20181108_084007", "20181108_091945", "20181108_103155"), None, 6503),
    "the paper's training subset": (tuple(SCENES), "train", 30699),
    "the paper's validation subset": (tuple(SCENES), "val", 3246),
    "the paper's test subset": (tuple(SCENES), "test", 7332),
}
CAMERA_FOLDERS = 49  # of the semantic set, with labels (section 2.2)
MATCHED_FRAMES = 38481  # of the semantic set, with picture, camera JSON and label (section 2.2)
# section 10: frames of the boxes set whose npz has no row, col and depth
UNMAPPED = {
    "20180810_142822": (4,),
    "20181107_132300": (20, 22, 41, 49, 50, 55, 57, 63),
    "20181107_132730": (35, 51, 55, 61),
    "20181108_103155": (28, 33),
}
# section 4, and the real file listed at the top of docs/a2d2-format.md
LIDAR_TYPES = {
    "points": "float64",
    "row": "float64",
    "col": "float64",
    "depth": "float64",
    "distance": "float64",
    "azimuth": "float64",
    "lidar_id": "float64",
    "reflectance": "int64",
    "timestamp": "int64",
}
# section 6.2: exact numbers of the boxes of one scene
REGRESSION_SCENE = "20181016_125231"
REGRESSION = {
    "frames": 893,
    "first id": 1665,
    "last id": 185665,
    "boxes": 3446,
    "most boxes of a frame": 19,
    "frames without a box": 0,
    "surplus duplicates": 138,
    "frames with duplicates": 38,
    "most copies of a box": 10,
    "boxes partly outside": 875,
    "boxes wholly outside": 0,
    "boxes wider or taller than the picture": 101,
}
# in the order of OBJECT_CLASSES; of the two that are None, only the sum is known
REGRESSION_CLASSES = (1551, 512, 274, 610, 136, 186, 36, 40, 42, 29, None, 6, None, 0)
REGRESSION_REMAINDER = 24
# (pixels, tolerance)
REGRESSION_PIXELS = {
    "smallest x1": (-12521, 1),
    "smallest y1": (-1989, 1),
    "largest x2": (6699, 1),
    "largest y2": (6848, 1),
    "smallest width": (20.1, 0.1),
    "smallest height": (50.6, 0.1),
}
# section 8: recorded -> undistorted pixels of front_center, for a picture of FULL_SIZE
FULL_SIZE = (1920, 1208)
# section 8: CamMatrix of front_center: focal lengths in x and y, centre in x and y, pixels
FRONT_MATRIX = (1687.3369140625, 1783.428466796875, 965.43414055823814, 684.4193604186803)
LENS_POINTS = {
    (0, 0): (-68.5, -86.7),
    (480, 604): (513.5, 609.8),
    (960, 604): (961.4, 611.2),
    (1440, 604): (1408.8, 609.9),
    (0, 604): (0.0, 604.4),
    (960, 0): (961.0, 0.0),
    (1919, 1207): (1954.7, 1263.0),
}
LARGEST_MAGNITUDE = 614.25  # degrees (section 7.1)
REGRESSION_REMAINDER_NAME = " and ".join(
    name for name, known in zip(OBJECT_CLASSES, REGRESSION_CLASSES, strict=True) if known is None
)


def list_regression() -> dict[str, tuple[int | float, int | float]]:
    """Name -> (known number, tolerance) of REGRESSION_SCENE."""
    classes = {
        name: (known, 0) for name, known in zip(OBJECT_CLASSES, REGRESSION_CLASSES, strict=True) if known is not None
    }
    counts = {name: (known, 0) for name, known in REGRESSION.items()}
    return counts | classes | {REGRESSION_REMAINDER_NAME: (REGRESSION_REMAINDER, 0)} | REGRESSION_PIXELS
