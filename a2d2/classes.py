"""The 55 label colours, the 38 classes, the 19-class grouping and the 14 object classes.

The only module of the project that defines colours and class names. Colours and names are those of `class_list.json`,
the grouping is the paper's (docs/a2d2-format.md, sections 5 and 9.1); object classes are those of the box labels
(section 6.3).
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import UInt8

IGNORE = 255  # in a class map: unknown colour, or outside the recorded image

# (colour, name in class_list.json, id among the 38 classes)
_COLOURS = (
    ("#ff0000", "Car 1", 0),
    ("#c80000", "Car 2", 0),
    ("#960000", "Car 3", 0),
    ("#800000", "Car 4", 0),
    ("#b65906", "Bicycle 1", 1),
    ("#963204", "Bicycle 2", 1),
    ("#5a1e01", "Bicycle 3", 1),
    ("#5a1e1e", "Bicycle 4", 1),
    ("#cc99ff", "Pedestrian 1", 2),
    ("#bd499b", "Pedestrian 2", 2),
    ("#ef59bf", "Pedestrian 3", 2),
    ("#ff8000", "Truck 1", 3),
    ("#c88000", "Truck 2", 3),
    ("#968000", "Truck 3", 3),
    ("#00ff00", "Small vehicles 1", 4),
    ("#00c800", "Small vehicles 2", 4),
    ("#009600", "Small vehicles 3", 4),
    ("#0080ff", "Traffic signal 1", 5),
    ("#1e1c9e", "Traffic signal 2", 5),
    ("#3c1c64", "Traffic signal 3", 5),
    ("#00ffff", "Traffic sign 1", 6),
    ("#1edcdc", "Traffic sign 2", 6),
    ("#3c9dc7", "Traffic sign 3", 6),
    ("#ffff00", "Utility vehicle 1", 7),
    ("#ffffc8", "Utility vehicle 2", 7),
    ("#e96400", "Sidebars", 8),
    ("#6e6e00", "Speed bumper", 9),
    ("#808000", "Curbstone", 10),
    ("#ffc125", "Solid line", 11),
    ("#400040", "Irrelevant signs", 12),
    ("#b97a57", "Road blocks", 13),
    ("#000064", "Tractor", 14),
    ("#8b636c", "Non-drivable street", 15),
    ("#d23273", "Zebra crossing", 16),
    ("#ff0080", "Obstacles / trash", 17),
    ("#fff68f", "Poles", 18),
    ("#960096", "RD restricted area", 19),
    ("#ccff99", "Animals", 20),
    ("#eea2ad", "Grid structure", 21),
    ("#212cb1", "Signal corpus", 22),
    ("#b432b4", "Drivable cobblestone", 23),
    ("#ff46b9", "Electronic traffic", 24),
    ("#eee9bf", "Slow drive area", 25),
    ("#93fdc2", "Nature object", 26),
    ("#9696c8", "Parking area", 27),
    ("#b496c8", "Sidewalk", 28),
    ("#48d1cc", "Ego car", 29),
    ("#c87dd2", "Painted driv. instr.", 30),
    ("#9f79ee", "Traffic guide obj.", 31),
    ("#8000ff", "Dashed line", 32),
    ("#ff00ff", "RD normal street", 33),
    ("#87ceff", "Sky", 34),
    ("#f1e6ff", "Buildings", 35),
    ("#60458f", "Blurred area", 36),
    ("#352e52", "Rain dirt", 37),
)

COLOUR_NAMES = {colour: name for colour, name, _ in _COLOURS}  # the content of class_list.json


def _strip_number(name: str) -> str:
    """ "Car 3" -> "Car": the number distinguishes neighbouring instances of one class."""
    return name[:-2] if name[-2] == " " and name[-1].isdigit() else name


CLASSES = tuple(dict.fromkeys(_strip_number(name) for _, name, _ in _COLOURS))  # 38 names, by id

_PAPER_NAMES = (
    "Background",
    "Road",
    "Sky",
    "Nature",
    "Poles",
    "Cars",
    "Lane lines",
    "Buildings",
    "Irrelevant",
    "Traffic info",
    "Curb stones",
    "Side walk",
    "Trucks",
    "Grid structure",
    "Obstacles",
    "Pedestrians",
    "Ego car",
    "Small traffic participants",
    "Parking area",
)
# for each id of the 38 classes: the one of the 19 classes that A2D2's authors merge it into; they ignore rain dirt
# (docs/a2d2-format.md, section 9.1)
_PAPER_GROUPS = (
    *(5, 17, 15, 12, 17, 9, 9, 12, 4, 1, 10, 6, 8, 13, 12, 11, 1, 14, 4),
    *(1, 15, 13, 8, 1, 9, 1, 3, 18, 11, 16, 1, 9, 6, 1, 2, 7, 0, IGNORE),
)


def _parse_colour(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


@cache
def colour_table() -> UInt8[np.ndarray, "16777216"]:
    """Packed colour r * 65536 + g * 256 + b -> id among the 38 classes; IGNORE for a colour that is not in the list."""
    table = np.full(1 << 24, IGNORE, dtype=np.uint8)
    for text, _, index in _COLOURS:
        red, green, blue = _parse_colour(text)
        table[(red << 16) | (green << 8) | blue] = index
    table.setflags(write=False)
    return table


def class_colour(name: str, number: int = 1) -> tuple[int, int, int]:
    """RGB of one of the 38 classes; for classes with several colours, that of instance `number` (from 1, wraps).

    ValueError for another name.
    """
    colours = [text for text, label, _ in _COLOURS if _strip_number(label) == name]
    if not colours:
        raise ValueError(f"{name!r} is none of the {len(CLASSES)} classes: {', '.join(CLASSES)}")
    return _parse_colour(colours[(number - 1) % len(colours)])


@dataclass(frozen=True)
class Grouping:
    """A set of classes to train on. `table`: id among the 38 classes -> class of this grouping, IGNORE -> IGNORE;
    `palette`: class of this grouping -> RGB."""

    names: tuple[str, ...]
    table: UInt8[np.ndarray, "256"]
    palette: UInt8[np.ndarray, "256 3"]


def _build_grouping(names: tuple[str, ...], groups: tuple[int, ...]) -> Grouping:
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(groups)] = groups
    palette = np.zeros((256, 3), dtype=np.uint8)
    # by default a group has the colour of its first class
    for index, group in reversed(list(enumerate(groups))):
        if group != IGNORE:
            palette[group] = class_colour(CLASSES[index])
    return Grouping(names, table, palette)


def load_grouping(classes: str | Mapping[str, Sequence[int]]) -> Grouping:
    """ "all": the 38 classes of A2D2; "paper": the 19 of its authors (docs/a2d2-format.md, section 9.1); a mapping of
    names to RGB: the classes of another dataset, by id.

    ValueError for another name.
    """
    if isinstance(classes, str):
        return _load_own_grouping(classes)
    return _build_foreign_grouping(tuple((name, tuple(colour)) for name, colour in classes.items()))


@cache
def _build_foreign_grouping(classes: tuple[tuple[str, tuple[int, ...]], ...]) -> Grouping:
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(classes)] = np.arange(len(classes))
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(classes)] = [colour for _, colour in classes]
    return Grouping(tuple(name for name, _ in classes), table, palette)


def choose_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours for classes that have none: hues by the golden ratio, so that neighbours differ."""
    hues = [(index * 0.618034) % 1.0 for index in range(count)]
    shades = [colorsys.hsv_to_rgb(hue, 0.55 + 0.35 * (index % 2), 0.95 - 0.25 * (index % 3 == 2))
              for index, hue in enumerate(hues)]  # fmt: skip
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in shades]


@cache
def _load_own_grouping(name: str) -> Grouping:
    if name == "all":
        return _build_grouping(CLASSES, tuple(range(len(CLASSES))))
    if name == "paper":
        # these groups have the colour of a typical class in place of that of their first class
        grouping = _build_grouping(_PAPER_NAMES, _PAPER_GROUPS)
        palette = grouping.palette.copy()
        palette[_PAPER_NAMES.index("Road")] = class_colour("RD normal street")
        palette[_PAPER_NAMES.index("Small traffic participants")] = class_colour("Small vehicles")
        palette[_PAPER_NAMES.index("Traffic info")] = class_colour("Traffic sign")
        palette[_PAPER_NAMES.index("Poles")] = class_colour("Poles")
        palette[_PAPER_NAMES.index("Side walk")] = class_colour("Sidewalk")
        return Grouping(grouping.names, grouping.table, palette)
    raise ValueError(f"no grouping {name!r}: choose 'all' (38 classes) or 'paper' (19)")


def map_classes(names: tuple[str, ...], grouping: Grouping) -> UInt8[np.ndarray, "256"]:
    """Table from ids of classes with these names to ids of a grouping.

    A name is one of the grouping's own, or one of the 38 classes, which the grouping merges. What the grouping ignores
    is IGNORE, and so is an id without a name. ValueError for a name of neither, and if a class of the grouping is
    among none of them.
    """
    table = np.full(256, IGNORE, dtype=np.uint8)
    for index, name in enumerate(names):
        if name in grouping.names:
            table[index] = grouping.names.index(name)
        elif name in CLASSES:
            table[index] = grouping.table[CLASSES.index(name)]
        else:
            raise ValueError(f"no class {name!r} among {', '.join(grouping.names)}")
    if missing := [name for index, name in enumerate(grouping.names) if index not in table]:
        raise ValueError(f"the classes {', '.join(missing)} are never predicted")
    return table


# by frequency in A2D2 (docs/a2d2-format.md, section 6.3)
OBJECT_CLASSES = (
    "Car",
    "Pedestrian",
    "Truck",
    "VanSUV",
    "Cyclist",
    "Bus",
    "MotorBiker",
    "Bicycle",
    "UtilityVehicle",
    "Motorcycle",
    "CaravanTransporter",
    "Animal",
    "Trailer",
    "EmergencyVehicle",
)
_OBJECT_IDS = {name.lower(): index for index, name in enumerate(OBJECT_CLASSES)}

# groupings of object classes to train detection on; each of the 14 classes is in exactly one group
OBJECT_GROUPINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "all": {name: (name,) for name in OBJECT_CLASSES},
    "merged": {
        "Car": ("Car", "VanSUV"),
        "Truck": ("Truck", "UtilityVehicle", "Trailer", "CaravanTransporter", "EmergencyVehicle"),
        "Bus": ("Bus",),
        "Pedestrian": ("Pedestrian", "Animal"),
        "TwoWheeler": ("Cyclist", "MotorBiker", "Bicycle", "Motorcycle"),
    },
    "object": {"Object": OBJECT_CLASSES},
}


def find_object_class(text: str) -> int | None:
    """Id among the 14 object classes, ignoring case, spaces and underscores; None for an unknown name."""
    return _OBJECT_IDS.get(text.lower().replace(" ", "").replace("_", ""))


def object_colour(index: int) -> tuple[int, int, int]:
    """RGB in which boxes of this class are drawn: easy to distinguish on an image, unlike the label colours."""
    colours = (
        (255, 59, 48),
        (255, 204, 0),
        (0, 199, 255),
        (52, 199, 89),
        (255, 45, 210),
        (255, 149, 0),
        (125, 122, 255),
    )
    return colours[index % len(colours)]
