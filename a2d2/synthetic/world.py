"""The geometry of a synthetic street: the road, objects beside it, the traffic, and the recording car (the rig).

A scene is a function of its seed, so any process can build it again. World frame: metres, x and y on the flat ground,
z up from it. Road coordinates are (s, d): metres along the centre line, metres to its left. Traffic keeps to the right.
`World.moment` transforms a scene into the rig's frame, which is that of the front centre camera (x forward, y left,
z up, origin at the camera), because A2D2's boxes are upright in that frame.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float

CAMERA_HEIGHT = 1.75  # metres above the road, measured from the lower corners of real boxes
LANE = 3.5
WHEELBASE = 2.9
STEERING_RATIO = 15.0
LOOK_AHEAD = (
    10.0  # the steering angle follows the mean curvature of the next metres; the camera sees the ground from 5 m on
)

Number = float | int
Colour = tuple[Number, Number, Number]


@dataclass(frozen=True)
class Solid:
    """A block (its top may be smaller than its foot) or an ellipsoid, upright, turned by `yaw` about z.

    `size` is (length, width, height) in metres; `taper` is the distance in metres by which a block's top edge is inside
    its foot: at the rear, at the front, and at each side. `look` is the name of its texture. `item` is the index of its
    road user in the moment, -1 for a solid of no road user.
    """

    shape: str
    centre: tuple[Number, Number, Number]
    size: tuple[Number, Number, Number]
    label: str
    look: str
    colour: Colour
    yaw: Number = 0.0
    taper: tuple[Number, Number, Number] = (0.0, 0.0, 0.0)
    number: int = 1
    item: int = -1

    @property
    def radius(self) -> float:
        """Radius of a sphere about `centre` that contains the solid."""
        return 0.5 * math.hypot(*self.size)


def move(solid: Solid, x: Number, y: Number, yaw: Number, z: Number = 0.0) -> Solid:
    """Rotate about the z axis by `yaw`, then translate."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    a, b, c = solid.centre
    return replace(solid, centre=(cos * a - sin * b + x, sin * a + cos * b + y, c + z), yaw=solid.yaw + yaw)


@dataclass(frozen=True)
class Item:
    """A road user with a box: `kind` is one of the object classes, (x, y, z) the centre of the box, `size` l, w, h."""

    kind: str
    centre: tuple[Number, Number, Number]
    size: tuple[Number, Number, Number]
    yaw: Number
    number: int

    def corners(self) -> Float[np.ndarray, "8 3"]:
        """Corners in A2D2's order: rear left, front left, front right, rear right of the bottom, then of the top."""
        length, width, height = self.size
        x = np.array([-1, 1, 1, -1] * 2) * length / 2
        y = np.array([1, 1, -1, -1] * 2) * width / 2
        z = np.repeat([-1, 1], 4) * height / 2
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1) + np.array(self.centre)


class Road:
    """A centre line of varying curvature; its heading stays within 60 degrees of the x axis."""

    STEP = 0.5

    def __init__(self, curvature: Float[np.ndarray, " n"]):
        self.curvature = curvature
        self.s = np.arange(len(curvature)) * self.STEP
        self.heading = np.concatenate([[0], np.cumsum((curvature[1:] + curvature[:-1]) / 2 * self.STEP)])
        middle = (self.heading[1:] + self.heading[:-1]) / 2
        self.x = np.concatenate([[0], np.cumsum(np.cos(middle) * self.STEP)])
        self.y = np.concatenate([[0], np.cumsum(np.sin(middle) * self.STEP)])

    @property
    def length(self) -> float:
        return float(self.s[-1])

    def curve(self, s: Number, ahead: Number = 0.0) -> float:
        """Curvature in 1 / m, left positive: at s, or the mean over the next `ahead` metres."""
        return float(np.interp(np.linspace(s, s + ahead, 9), self.s, self.curvature).mean())

    def at(self, s: Number, d: Number = 0.0) -> tuple[Number, Number, Number]:
        """x, y and heading of the road coordinates (s, d)."""
        x, y, heading = (float(np.interp(s, self.s, values)) for values in (self.x, self.y, self.heading))
        return x - d * math.sin(heading), y + d * math.cos(heading), heading

    def locate(
        self, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"], low: Number, high: Number
    ) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
        """(s, d) of points (x, y), searched between s = low and high; beyond the ends s continues along the tangent."""
        nodes = np.arange(max(low, 0.0), min(high, self.length), 2.0)
        node_x, node_y = np.interp(nodes, self.s, self.x), np.interp(nodes, self.s, self.y)
        # |p - node|^2 without |p|^2, which is the same for all nodes
        gap = np.multiply.outer(x, -2 * node_x) + np.multiply.outer(y, -2 * node_y) + (node_x**2 + node_y**2)
        s = nodes[gap.argmin(axis=-1)]
        for _ in range(3):
            _, _, along, d, bend = self._offset(x, y, s)
            s = s + np.clip(along / np.maximum(1 - bend * d, 0.2), -4, 4)
        _, _, along, d, _ = self._offset(x, y, s)
        return s + along, d

    def _offset(self, x: np.ndarray, y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, ...]:
        heading = np.interp(s, self.s, self.heading)
        cos, sin = np.cos(heading), np.sin(heading)
        east, north = x - np.interp(s, self.s, self.x), y - np.interp(s, self.s, self.y)
        return cos, sin, cos * east + sin * north, cos * north - sin * east, np.interp(s, self.s, self.curvature)


ROADS = ("winding", "real")


def draw_road(rng: np.random.Generator, length: Number, roads: str = "winding") -> Road:
    """Draw a road whose pieces of constant curvature are joined by ramps.

    winding: straights, gentle and sharp bends (radius at least 28 m), from which steering is soon learned. real: mostly
    straight, with rare turns as at junctions, so that the steering angles are distributed as A2D2's
    (docs/a2d2-format.md, section 7.1): the 2,240 frames of configs/study/main.yaml have a median magnitude of 6
    degrees, 90 % under 88, 99 % under 415.
    """
    draw, limit, ramp, least = {"winding": (_draw_bend, 50, 13, 5.0), "real": (_draw_turn, 100, 7, 2.0)}[roads]
    pieces: list[np.ndarray] = []
    heading, done = 0.0, 0.0
    while done < length + 20:
        bend, extent = draw(rng)
        side = rng.choice([-1, 1])
        if abs(heading + side * extent * bend) > math.radians(limit):
            side = -1 if heading > 0 else 1
        extent = max(min(extent, (math.radians(limit) - side * heading) / bend), least)
        pieces.append(np.full(round(extent / Road.STEP), side * bend))
        heading += side * extent * bend
        done += extent
    curvature = np.concatenate(pieces)
    for _ in range(2):
        curvature = np.convolve(curvature, np.full(ramp, 1 / ramp), mode="same")
    return Road(curvature)


def _draw_bend(rng: np.random.Generator) -> tuple[float, float]:
    """Curvature in 1 / m and length in metres of a piece of a winding road."""
    kind = rng.choice(3, p=[0.2, 0.35, 0.45])
    radius = (1e9, rng.uniform(70, 250), rng.uniform(28, 70))[kind]
    return 1 / radius, (rng.uniform(15, 45), rng.uniform(25, 60), rng.uniform(22, 45))[kind]


# Of a piece of road: shares of the draws, and the greatest steering angle among them. The angles of the tail are
# greater than A2D2's, because ramps and the look-ahead take from them.
_SHARES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_ANGLES = (0.0, 5.0, 15.0, 72.0, 205.0, 465.0, 480.0)


def _draw_turn(rng: np.random.Generator) -> tuple[float, float]:
    """Curvature in 1 / m and length in metres of a piece of a road whose steering angles are as A2D2's."""
    angle = max(float(np.interp(rng.random(), _SHARES, _ANGLES)), 1e-3)
    return math.tan(math.radians(angle / STEERING_RATIO)) / WHEELBASE, float(rng.uniform(14, 30))


@dataclass(frozen=True)
class Strip:
    """A strip of ground along the road between d = low and high."""

    low: Number
    high: Number
    ground: str


@dataclass(frozen=True)
class Line:
    """A painted line along d; `dash` metres with paint alternate with `gap` metres without (0: a solid line)."""

    d: Number
    width: Number
    dash: Number = 1.0
    gap: Number = 0.0


@dataclass(frozen=True)
class Street:
    """The cross-section of a scene's road, the positions s of its crossings, and the colours of its surfaces."""

    style: str
    lanes: int
    strips: tuple[Strip, ...]
    lines: tuple[Line, ...]
    crossings: tuple[float, ...]
    colours: dict[str, Colour]

    def find(self, ground: str, side: int) -> Strip | None:
        """The strip of this ground on the left (1) or right (-1) side of the road, or None."""
        found = [strip for strip in self.strips if strip.ground == ground and (strip.low + strip.high) * side > 0]
        return found[0] if found else None

    def edge(self, side: int) -> float:
        """Distance in metres from the centre line to the outer edge of the strips on that side."""
        return max(abs(strip.low if side < 0 else strip.high) for strip in self.strips if strip.low * side >= -1e-9)


@dataclass(frozen=True)
class Light:
    """`sun` points to the sun in the world frame; `direct` and `ambient` are the intensities of sun and sky."""

    sun: tuple[Number, Number, Number]
    direct: Number
    ambient: Number
    tint: Colour
    zenith: Colour
    horizon: Colour
    clouds: Number
    haze: Number


@dataclass(frozen=True)
class Moment:
    """The state of a scene at one time, in the rig's frame; `pose` is the rig's (x, y, yaw) in the world frame."""

    solids: tuple[Solid, ...]
    items: tuple[Item, ...]
    road: Road
    street: Street
    light: Light
    pose: tuple[Number, Number, Number]
    s: Number
    seed: int


@dataclass(frozen=True)
class Actor:
    """A road user of a scene. It is at s at time 0 and moves along the road with `speed` in m/s; if `follows`, it stays
    s metres ahead of the rig instead. `turn` is its heading relative to the road's."""

    kind: str
    size: tuple[Number, Number, Number]
    colour: Colour
    number: int
    s: Number
    d: Number
    turn: Number = 0.0
    speed: Number = 0.0
    follows: bool = False


# ---------------------------------------------------------------- road users

_SIZES = {  # least and greatest length, width, height in metres
    "Car": ((3.8, 1.70, 1.40), (4.8, 1.85, 1.60)),
    "VanSUV": ((4.7, 1.85, 1.95), (5.8, 2.00, 2.50)),
    "Truck": ((6.5, 2.35, 2.90), (9.0, 2.55, 3.60)),
    "Bus": ((10.5, 2.50, 2.90), (12.0, 2.55, 3.20)),
    "Pedestrian": ((0.60, 0.55, 1.60), (0.80, 0.65, 1.90)),
    "Cyclist": ((1.70, 0.55, 1.65), (1.85, 0.65, 1.85)),
}
_PAINTS = ((205, 208, 210), (150, 155, 160), (60, 62, 68), (30, 32, 36), (150, 30, 30), (35, 60, 120), (225, 225, 222))
_CLOTHES = ((160, 45, 45), (45, 70, 140), (60, 60, 65), (200, 190, 60), (70, 120, 75), (210, 210, 205), (120, 70, 120))
_LORRIES = ((220, 220, 215), (190, 120, 40), (60, 95, 150), (170, 45, 45), (90, 130, 95))
_BUSES = ((200, 60, 50), (215, 190, 70), (70, 110, 170), (225, 225, 220))


def draw_actor(rng: np.random.Generator, kind: str, number: int, s: Number, d: Number, **motion) -> Actor:
    """Draw a road user of random size and colour; `motion` are the other fields of Actor."""
    low, high = _SIZES[kind]
    size = tuple(float(value) for value in rng.uniform(low, high))
    paints = {"Truck": _LORRIES, "Bus": _BUSES, "Pedestrian": _CLOTHES, "Cyclist": _CLOTHES}.get(kind, _PAINTS)
    colour = tuple(float(value) for value in np.array(paints[rng.integers(len(paints))]) * rng.uniform(0.85, 1.1))
    return Actor(kind, size, colour, number, s, d, **motion)


def build_body(actor: Actor) -> list[Solid]:
    """The solids of a road user at the origin that faces x."""
    length, width, height = actor.size
    build = {"Car": _build_car, "Pedestrian": _build_person, "Cyclist": _build_cyclist}.get(actor.kind)
    if build:
        return [replace(solid, number=actor.number) for solid in build(actor.size, actor.colour)]
    # one block that fills the 3-D box, so that the mask of an isolated vehicle touches all four sides of its 2-D box
    label = {"VanSUV": "Car", "Truck": "Truck", "Bus": "Truck"}[actor.kind]
    look = {"VanSUV": "van", "Truck": "truck", "Bus": "bus"}[actor.kind]
    block = Solid("block", (0, 0, height / 2), (length, width, height), label, look, actor.colour, number=actor.number)
    return [block]


def _build_car(size: tuple[Number, Number, Number], colour: Colour) -> list[Solid]:
    length, width, height = size
    belt = 0.60 * height
    cabin = (0.66 * length, 0.96 * width, height - belt)
    return [
        Solid("block", (0, 0, belt / 2), (length, width, belt), "Car", "body", colour, taper=(0.06, 0.22, 0.05)),
        Solid(
            "block",
            (-0.07 * length, 0, (belt + height) / 2),
            cabin,
            "Car",
            "cabin",
            colour,
            taper=(0.35, 0.75, 0.20),
        ),
    ]


def _build_person(size: tuple[Number, Number, Number], colour: Colour) -> list[Solid]:
    height = size[2]
    dark: Colour = (50.0, 52.0, 62.0)
    skin: Colour = (205.0, 160.0, 135.0)
    step = 0.16
    leg = (0.17, 0.16, 0.5 * height)
    look = "Pedestrian", "plain"
    return [
        Solid("block", (step, 0.11, 0.25 * height), leg, *look, dark),
        Solid("block", (-step, -0.11, 0.25 * height), leg, *look, dark),
        Solid("ellipsoid", (0, 0, 0.65 * height), (0.36, 0.54, 0.44 * height), *look, colour),
        Solid("ellipsoid", (0, 0, height - 0.13), (0.24, 0.21, 0.26), *look, skin),
    ]


def _build_cyclist(size: tuple[Number, Number, Number], colour: Colour) -> list[Solid]:
    length, _, height = size
    black: Colour = (25.0, 25.0, 28.0)
    look = "Bicycle", "plain"
    wheel = 0.68
    return [
        Solid("ellipsoid", (length / 2 - wheel / 2, 0, wheel / 2), (wheel, 0.07, wheel), *look, black),
        Solid("ellipsoid", (-length / 2 + wheel / 2, 0, wheel / 2), (wheel, 0.07, wheel), *look, black),
        Solid("block", (0.0, 0, 0.62), (0.9, 0.08, 0.12), *look, (170.0, 50.0, 45.0)),
        Solid("block", (-0.05, 0, 0.62), (0.2, 0.32, 0.7), *look, (55.0, 58.0, 75.0)),
        Solid("ellipsoid", (0.0, 0, 1.20), (0.38, 0.50, 0.75), *look, colour),
        Solid("ellipsoid", (0.12, 0, height - 0.13), (0.26, 0.22, 0.26), *look, (225.0, 225.0, 220.0)),
    ]


# ---------------------------------------------------------------- the street

_GROUNDS: dict[str, Colour] = {
    "road": (112, 111, 112),
    "line": (222, 222, 216),
    "zebra": (218, 218, 212),
    "curb": (168, 164, 156),
    "sidewalk": (158, 146, 138),
    "parking": (134, 118, 104),
    "grass": (98, 118, 58),
}


def draw_street(rng: np.random.Generator, length: Number, most_lanes: int = 2) -> Street:
    """Draw a cross-section: urban (curbs, paths, 1 or 2 lanes per side), residential or rural (grass to the edge)."""
    style = str(rng.choice(["urban", "residential", "rural"], p=[0.45, 0.35, 0.2]))
    lanes = min(2 if style == "urban" and rng.random() < 0.4 else 1, most_lanes)
    half = lanes * LANE
    strips, lines = [Strip(-half, 0.0, "road"), Strip(0.0, half, "road")], []
    for side in (-1, 1):
        widths = [("road", 0.5)]
        if style != "rural":
            parking = rng.random() < (0.7 if style == "residential" else 0.45)
            widths = [("parking", 2.4)] if parking else []
            widths += [("curb", 0.3)]
            widths += [("grass", float(rng.uniform(1.2, 2.5)))] if rng.random() < 0.5 else []
            widths += [("sidewalk", float(rng.uniform(1.8, 3.0)))]
        start = half
        for ground, width in widths:
            low, high = sorted((side * start, side * (start + width)))
            strips.append(Strip(low, high, ground))
            start += width
        lines += [Line(side * LANE, 0.16, 4.0, 5.0)] if lanes == 2 else []
        if style == "rural" or rng.random() < 0.35:
            lines.append(Line(side * (half - 0.15), 0.2))
    middle = rng.random()
    lines.append(Line(0.0, 0.18) if middle < 0.25 else Line(0.0, 0.18, *((4.0, 4.0) if middle < 0.7 else (3.0, 6.0))))
    spots = np.arange(rng.uniform(20, 60), length, rng.uniform(60, 110)) if style != "rural" else []
    return Street(style, lanes, tuple(strips), tuple(lines), tuple(float(s) for s in spots), _draw_grounds(rng))


def _draw_grounds(rng: np.random.Generator) -> dict[str, Colour]:
    """Draw the surfaces' colours, which vary between scenes; paths are gray slabs or reddish bricks."""
    colours = {
        name: tuple(float(c) for c in np.array(colour) * rng.uniform(0.92, 1.08)) for name, colour in _GROUNDS.items()
    }
    if rng.random() < 0.4:
        colours["sidewalk"] = (172.0, 132.0, 116.0)
    if rng.random() < 0.3:
        colours["grass"] = (136.0, 124.0, 70.0)
    return colours


_FACADES = ((222, 205, 170), (200, 192, 182), (236, 226, 206), (186, 132, 110), (172, 176, 180), (214, 178, 138))
_ROOFS = ((150, 74, 54), (96, 90, 90), (120, 60, 48))
_LEAVES = ((62, 96, 42), (78, 112, 48), (50, 82, 44), (96, 118, 50), (170, 118, 42), (150, 84, 36))


def _vary(rng: np.random.Generator, colours: tuple, spread: Number = 0.12) -> Colour:
    chosen = np.array(colours[rng.integers(len(colours))]) * rng.uniform(1 - spread, 1 + spread)
    return tuple(float(value) for value in np.minimum(chosen, 245))


def _build_house(rng: np.random.Generator, size: tuple[Number, Number, Number], gabled: bool) -> list[Solid]:
    """A house at the origin whose front faces -y."""
    length, depth, height = size
    walls = Solid("block", (0, 0, height / 2), size, "Buildings", "facade", _vary(rng, _FACADES))
    roof_size = (length + 0.5, depth + 0.5, 0.42 * depth if gabled else 0.4)
    taper = (0.0, 0.0, depth / 2 - 0.1) if gabled else (0.0, 0.0, 0.0)
    roof = Solid(
        "block", (0, 0, height + roof_size[2] / 2), roof_size, "Buildings", "plain", _vary(rng, _ROOFS), taper=taper
    )
    return [walls, roof]


def _build_tree(rng: np.random.Generator, height: Number) -> list[Solid]:
    """A trunk under a crown of a few overlapping ellipsoids, or a conifer."""
    nature = "Nature object"
    leaves = _vary(rng, _LEAVES)
    if rng.random() < 0.15:
        width = 0.45 * height
        crown = (width, width, 0.9 * height)
        taper = (0.45 * width, 0.45 * width, 0.45 * width)
        trunk = Solid("block", (0, 0, 0.05 * height), (0.35, 0.35, 0.1 * height), nature, "plain", (74, 60, 48))
        return [trunk, Solid("block", (0, 0, 0.55 * height), crown, nature, "foliage", leaves, taper=taper)]
    trunk_height = rng.uniform(0.28, 0.38) * height
    thick = 0.05 * height
    solids = [Solid("block", (0, 0, trunk_height / 2), (thick, thick, trunk_height), nature, "plain", (82, 68, 56))]
    spread = 0.5 * height
    for _ in range(4):
        x, y = rng.uniform(-0.17, 0.17, 2) * height
        z = trunk_height + rng.uniform(0.22, 0.42) * height
        size = tuple(float(value) for value in rng.uniform(0.75, 1.05, 3) * spread)
        shade = tuple(float(channel * rng.uniform(0.9, 1.1)) for channel in leaves)
        solids.append(Solid("ellipsoid", (float(x), float(y), float(z)), size, nature, "foliage", shade))
    return solids


def _build_sign(rng: np.random.Generator, number: int) -> list[Solid]:
    """A round, triangular or square plate on a pole, facing traffic that drives along x."""
    height = rng.uniform(2.2, 2.7)
    pole = Solid("block", (0, 0, height / 2), (0.11, 0.11, height), "Poles", "plain", (150, 154, 156))
    kind = rng.choice(["round", "triangle", "square"])
    centre, size = (-0.1, 0.0, height - 0.1), (0.05, 0.85, 0.85)
    if kind == "round":
        plate = Solid("ellipsoid", centre, size, "Traffic sign", "disc", (210, 30, 35), number=number)
    elif kind == "triangle":
        plate = Solid(
            "block", centre, (0.04, 0.95, 0.82), "Traffic sign", "warning", (215, 35, 40), taper=(0, 0, 0.46),
            number=number,
        )  # fmt: skip
    else:
        plate = Solid("block", centre, size, "Traffic sign", "info", (30, 85, 170), number=number)
    return [pole, plate]


def _build_signal(reach: Number, number: int) -> list[Solid]:
    """A traffic light: one lamp box at the pole, one on an arm that reaches `reach` metres to the left."""
    gray: Colour = (110.0, 114.0, 116.0)
    lamp = (0.3, 0.42, 1.1)
    dark: Colour = (38.0, 42.0, 40.0)
    return [
        Solid("block", (0, 0, 2.9), (0.18, 0.18, 5.8), "Poles", "plain", gray),
        Solid("block", (0, reach / 2, 5.7), (0.14, reach, 0.14), "Poles", "plain", gray),
        Solid("block", (-0.25, 0, 2.6), lamp, "Traffic signal", "signal", dark, number=number),
        Solid("block", (-0.25, reach, 5.4), lamp, "Traffic signal", "signal", dark, number=number + 1),
    ]


def _build_lamp(side: int) -> list[Solid]:
    """A street lamp; its arm reaches over the road."""
    gray: Colour = (138.0, 142.0, 144.0)
    return [
        Solid("block", (0, 0, 3.5), (0.16, 0.16, 7.0), "Poles", "plain", gray),
        Solid("block", (0, -side * 0.8, 7.0), (0.2, 1.8, 0.12), "Poles", "plain", gray),
    ]


class _Builder:
    """Collects the static solids of a scene, which are placed by road coordinates (s, d).

    clearance: metres that solids beside the street keep from all of the centre line; None for a road without turns,
    which does not come back to where it was.
    """

    def __init__(self, road: Road, clearance: Number | None = None):
        self.road = road
        self.clearance = clearance
        self.solids: list[Solid] = []

    def fits(self, s: Number, d: Number) -> bool:
        """Whether (s, d) are unique coordinates: beyond the centre of a bend, on its inner side, they are not."""
        if max(self.road.curve(s + step) * d for step in (-8, 0, 8)) >= 0.75:
            return False
        if self.clearance is None:
            return True
        x, y, _ = self.road.at(s, d)
        return bool(np.hypot(self.road.x - x, self.road.y - y).min() > min(abs(d), self.clearance) - 0.5)

    def put(self, solids: list[Solid], s: Number, d: Number, turn: Number = 0.0) -> None:
        if 0 < s < self.road.length and self.fits(s, d):
            x, y, heading = self.road.at(s, d)
            self.solids += [move(solid, x, y, heading + turn) for solid in solids]


def build_surroundings(rng: np.random.Generator, road: Road, street: Street, turns: bool = False) -> list[Solid]:
    """Draw houses, trees, hedges, lamps, signs, signals and far hills along a street, in the world frame.

    turns: whether the road may pass twice near a place."""
    builder = _Builder(road, max(street.edge(-1), street.edge(1)) + 7 if turns else None)
    for side in (-1, 1):
        _line_houses(rng, builder, street, side)
        _line_plants(rng, builder, street, side)
        _line_poles(rng, builder, street, side)
    for s in np.arange(0, road.length, 40.0):
        for side in (-1, 1):
            width, height = rng.uniform(60, 120), rng.uniform(14, 36)
            hill = Solid(
                "ellipsoid", (0, 0, 0), (width, width, height), "Nature object", "foliage", _vary(rng, _LEAVES[:3])
            )
            builder.solids.append(move(hill, *road.at(float(s), side * rng.uniform(110, 170))))
    # hills that close the view at the end of the road
    x, y, heading = road.at(road.length)
    for turn in np.linspace(-0.9, 0.9, 7):
        hill = Solid(
            "ellipsoid", (130.0, 0, 0), (40, 150, rng.uniform(24, 44)), "Nature object", "foliage", (70, 92, 52)
        )
        builder.solids.append(move(hill, x, y, heading + float(turn)))
    return builder.solids


def _line_houses(rng: np.random.Generator, builder: _Builder, street: Street, side: int) -> None:
    chance = {"urban": 0.85, "residential": 0.75, "rural": 0.15}[street.style]
    edge = street.edge(side)
    s = float(rng.uniform(0, 10))
    while s < builder.road.length:
        tall = street.style == "urban"
        size = (
            float(rng.uniform(11, 18) if tall else rng.uniform(8, 13)),
            float(rng.uniform(8, 11)),
            float(rng.uniform(7, 15) if tall else rng.uniform(4, 6.5)),
        )
        back = edge + (rng.uniform(1.0, 4.0) if tall else rng.uniform(4, 8)) + (6 if street.style == "rural" else 0)
        middle = s + size[0] / 2
        # in a bend around the house, the ends of its straight front are nearer to the road
        bend = max(0.0, side * builder.road.curve(middle))
        back += bend * size[0] ** 2 / 4
        if rng.random() < chance:
            house = _build_house(rng, size, gabled=not tall or rng.random() < 0.4)
            turn = 0.0 if side > 0 else math.pi
            builder.put(house, middle, side * (back + size[1] / 2), turn)
        s += size[0] * (1 + max(0.0, -side * builder.road.curve(middle)) * 5) + rng.uniform(1.0, 9.0)


def _line_plants(rng: np.random.Generator, builder: _Builder, street: Street, side: int) -> None:
    edge, verge = street.edge(side), street.find("grass", side)
    gap = {"urban": 13, "residential": 10, "rural": 7}[street.style]
    s = float(rng.uniform(0, gap))
    while s < builder.road.length:
        if verge is not None and rng.random() < 0.6:
            builder.put(_build_tree(rng, rng.uniform(5, 8)), s, (verge.low + verge.high) / 2)
        else:
            far = edge + (rng.uniform(0.8, 2.5) if rng.random() < 0.4 else rng.uniform(4, 16))
            builder.put(_build_tree(rng, rng.uniform(5, 11)), s, side * far)
        s += gap * rng.uniform(0.6, 1.6)
    if street.style == "residential":
        height = float(rng.uniform(0.9, 1.7))
        leaves = _vary(rng, _LEAVES[:4])
        for start in np.arange(0, builder.road.length, 4.0):
            if rng.random() < 0.75:
                hedge = Solid("block", (0, 0, height / 2), (3.9, 0.8, height), "Nature object", "foliage", leaves)
                builder.put([hedge], float(start), side * (edge + 0.7))


def _line_poles(rng: np.random.Generator, builder: _Builder, street: Street, side: int) -> None:
    curb = street.find("curb", side)
    inner = abs(curb.low + curb.high) / 2 + 0.6 if curb else street.edge(side) + 0.8
    for s in np.arange(rng.uniform(0, 24), builder.road.length, 24):
        builder.put(_build_lamp(side), float(s), side * inner)
    number = 1
    s = float(rng.uniform(2, 20))
    while s < builder.road.length:
        # plates face the lane on their side; the backs of signs are rarely visible, so they look like the fronts
        turn = 0.0 if side < 0 else math.pi
        builder.put(_build_sign(rng, number), s, side * (inner + rng.uniform(-0.1, 0.3)), turn + rng.normal(0, 0.06))
        number += 1
        s += rng.uniform(14, 32)
    if side < 0:
        for crossing in street.crossings:
            if rng.random() < 0.7:
                builder.put(_build_signal(inner - 0.5 * LANE, number), crossing - 3.5, side * inner)


# ---------------------------------------------------------------- the scene


class World:
    """One scene: a street, its traffic, and the rig's drive along it, of which `frames` moments are recorded.

    The scene is a function of `seed`, `index` and `roads`, see `draw_road`. For each frame: `times` in seconds,
    `speeds` in m/s, `steering` in degrees at the steering wheel and `yaw_rates` in degrees/s, both left positive, and
    `angle_rates`, the derivative of `steering` in degrees/s.
    """

    def __init__(self, seed: int, index: int, frames: int, roads: str = "winding"):
        rng = np.random.default_rng([seed, index])
        self.seed, self.index, self.frames = seed, index, frames
        self.road = draw_road(rng, frames * 15.0 + 240.0, roads)
        turns = roads == "real"
        # the outer one of two lanes would be beyond the centre of a sharp turn
        self.street = draw_street(rng, self.road.length, most_lanes=1 if turns else 2)
        self.light = draw_light(rng)
        self._drive(rng)
        self.statics = build_surroundings(rng, self.road, self.street, turns)
        self._static_positions = np.array([solid.centre[:2] for solid in self.statics])
        self._static_reach = np.array([solid.radius for solid in self.statics])
        # some roads are empty: their frames are labelled, with no box
        self.actors = [] if rng.random() < 0.06 else self._draw_traffic(rng)

    def _drive(self, rng: np.random.Generator) -> None:
        """Draw the rig's drive: slower in bends, with small errors in lateral position and heading."""
        s, time = 60.0, 0.0
        positions, times, speeds = [], [], []
        cruise = rng.uniform(9, 15)
        for _ in range(self.frames):
            speed = min(cruise, math.sqrt(2.2 / max(abs(self.road.curve(s, LOOK_AHEAD)), 1e-3)))
            speed = max(5.0, speed * rng.uniform(0.92, 1.05))
            positions.append(s)
            times.append(time)
            speeds.append(speed)
            pause = rng.uniform(0.3, 1.0)
            s, time = s + min(speed, 15.0) * pause, time + pause
        self.positions, self.times, self.speeds = np.array(positions), np.array(times), np.array(speeds)
        lane = -LANE * (0.5 + (rng.integers(2) if self.street.lanes == 2 else 0))
        self.lane = float(lane)
        self.offsets = lane + rng.normal(0, 0.15, self.frames)
        self.headings = rng.normal(0, math.radians(0.7), self.frames)
        bends = np.array([self._lane_curve(s) for s in positions])
        later = np.array([self._lane_curve(s + 1.0) for s in positions])
        self.steering = _steer(bends) + rng.normal(0, 1.5, self.frames)
        self.angle_rates = (_steer(later) - _steer(bends)) * self.speeds
        self.yaw_rates = np.degrees(self.speeds * bends) + rng.normal(0, 0.3, self.frames)

    def _lane_curve(self, s: Number) -> float:
        bend = self.road.curve(s, LOOK_AHEAD)
        return bend / (1 - bend * self.lane)

    def _draw_traffic(self, rng: np.random.Generator) -> list[Actor]:
        """Draw vehicles ahead, oncoming and parked vehicles, cyclists, pedestrians on paths and at crossings."""
        actors: list[Actor] = []

        def add(kind: str, s: Number, d: Number, **motion) -> None:
            actors.append(draw_actor(rng, kind, len(actors) + 1, s, d, **motion))

        def choose() -> str:
            return str(rng.choice(["Car", "VanSUV", "Truck", "Bus"], p=[0.48, 0.24, 0.19, 0.09]))

        ahead = rng.uniform(11, 26)
        while ahead < 85 and rng.random() < 0.65:
            add(choose(), ahead, self.lane + rng.normal(0, 0.15), follows=True)
            ahead += rng.uniform(16, 30)
        if self.street.lanes == 2:
            other = -2 * LANE - self.lane
            for gap in np.arange(rng.uniform(-3, 20), 85, rng.uniform(18, 32)):
                add(choose(), float(gap), other + rng.normal(0, 0.15), follows=True)
        speed = rng.uniform(7, 12)
        last = self.road.length + speed * self.times[-1]
        for lane in range(self.street.lanes):
            s = float(rng.uniform(50, 90))
            while s < last:
                add(choose(), s, (lane + 0.5) * LANE + rng.normal(0, 0.15), turn=math.pi, speed=-speed)
                s += rng.uniform(16, 48)
        for side in (-1, 1):
            self._fill_side(rng, side, add)
        return actors

    def _fill_side(self, rng: np.random.Generator, side: int, add) -> None:
        parking, path = self.street.find("parking", side), self.street.find("sidewalk", side)
        if parking is not None:
            for s in np.arange(rng.uniform(0, 7), self.road.length, 7.0):
                if rng.random() < 0.6 and min(abs(s - spot) for spot in (*self.street.crossings, -99)) > 7:
                    kind = "Car" if rng.random() < 0.65 else "VanSUV"
                    d = (parking.low + parking.high) / 2 + rng.normal(0, 0.06)
                    add(kind, float(s), d, turn=(0.0 if side < 0 else math.pi) + rng.normal(0, 0.02))
        if path is not None:
            s = float(rng.uniform(0, 15))
            while s < self.road.length:
                d = rng.uniform(path.low + 0.4, path.high - 0.4)
                add("Pedestrian", s, d, turn=rng.choice([0.0, math.pi]) + rng.normal(0, 0.4))
                s += rng.uniform(3, 26)
            for crossing in self.street.crossings:
                for _ in range(rng.integers(3)):
                    d = side * (abs(path.low if side > 0 else path.high) - rng.uniform(0.0, 0.6))
                    add("Pedestrian", crossing + rng.normal(0, 0.9), d, turn=math.pi / 2 * rng.choice([-1, 1]))
        edge = self.street.lanes * LANE - 0.6
        if side < 0:
            gap = float(rng.uniform(9, 24))
            while gap < 60 and rng.random() < 0.55:
                # cyclists ride at the edge of the lane, which leaves about 2 m of it to cars at the same s
                add("Cyclist", gap, -edge - rng.uniform(0, 0.25), follows=True)
                gap += rng.uniform(14, 30)
        else:
            for s in np.arange(rng.uniform(60, 100), self.road.length, rng.uniform(35, 70)):
                add("Cyclist", float(s), edge + rng.uniform(0, 0.25), turn=math.pi, speed=-4.5)

    def moment(self, frame: int) -> Moment:
        """All objects within 160 m of the rig (measured to their bounding sphere) at a frame, in the rig's frame."""
        s, time = float(self.positions[frame]), float(self.times[frame])
        x, y, heading = self.road.at(s, float(self.offsets[frame]))
        yaw = heading + float(self.headings[frame])
        cos, sin = math.cos(yaw), math.sin(yaw)
        shift = (-cos * x - sin * y, sin * x - cos * y, -yaw, -CAMERA_HEIGHT)
        far = np.hypot(*(self._static_positions - (x, y)).T) - self._static_reach
        solids = [move(self.statics[index], *shift) for index in np.flatnonzero(far < 160)]
        items: list[Item] = []
        taken: list[tuple[Number, Number]] = []
        for actor in self.actors:
            at = actor.s + (s if actor.follows else actor.speed * time)
            if not s - 25 < at < s + 110 or self.road.curve(at) * actor.d > 0.75:
                continue
            if any(abs(at - other) < 7 and abs(actor.d - d) < 1.9 for other, d in taken) and actor.kind == "Cyclist":
                continue
            taken.append((at, actor.d))
            pose = self.road.at(at, actor.d)
            turned = pose[2] + actor.turn
            body = [move(solid, pose[0], pose[1], turned) for solid in build_body(actor)]
            solids += [replace(move(solid, *shift), item=len(items)) for solid in body]
            centre = (
                cos * (pose[0] - x) + sin * (pose[1] - y),
                cos * (pose[1] - y) - sin * (pose[0] - x),
                actor.size[2] / 2 - CAMERA_HEIGHT,
            )
            items.append(Item(actor.kind, centre, actor.size, turned - yaw, actor.number))
        seed = int(np.random.default_rng([self.seed, self.index, frame, 1]).integers(1 << 31))
        return Moment(tuple(solids), tuple(items), self.road, self.street, self.light, (x, y, yaw), s, seed)


def _steer(bends: np.ndarray) -> np.ndarray:
    """Curvature in 1 / m -> degrees at the steering wheel, by the bicycle model."""
    return STEERING_RATIO * np.degrees(np.arctan(WHEELBASE * bends))


def draw_light(rng: np.random.Generator) -> Light:
    """Draw the light: sunny or overcast, low or high sun, warm or cool."""
    azimuth, height = rng.uniform(-math.pi, math.pi), rng.uniform(math.radians(22), math.radians(60))
    sun = (math.cos(azimuth) * math.cos(height), math.sin(azimuth) * math.cos(height), math.sin(height))
    gain = rng.uniform(0.82, 1.1)
    if rng.random() < 0.45:
        gray = rng.uniform(185, 225)
        zenith, horizon = (gray * 0.9, gray * 0.93, gray * 0.97), (gray * 1.05, gray * 1.06, gray * 1.07)
        return Light(sun, 0.12 * gain, 0.86 * gain, (1.0, 1.0, 1.0), zenith, horizon, rng.uniform(0.15, 0.3), 600.0)
    warm = rng.uniform(0.0, 0.06)
    zenith, horizon = (88.0, 138.0, 196.0), (205.0, 218.0, 228.0)
    tint = (1 + warm, 1.0, 1 - warm)
    return Light(sun, 0.55 * gain, 0.55 * gain, tint, zenith, horizon, rng.uniform(0.2, 0.9), 900.0)


@lru_cache(maxsize=4)
def build_world(seed: int, index: int, frames: int, roads: str = "winding") -> World:
    """The scene of this index; cached, because a worker renders its moments one after the other."""
    return World(seed, index, frames, roads)


def build_lone_moment(actor: Actor, yaw: Number = 0.0) -> Moment:
    """A straight road with one road user only: `actor.s` metres ahead and `actor.d` to the left of the rig."""
    street = Street("rural", 1, (Strip(-LANE, 0.0, "road"), Strip(0.0, LANE, "road")), (), (), dict(_GROUNDS))
    road = Road(np.zeros(400))
    solids = [move(solid, actor.s, actor.d, yaw, -CAMERA_HEIGHT) for solid in build_body(actor)]
    item = Item(actor.kind, (actor.s, actor.d, actor.size[2] / 2 - CAMERA_HEIGHT), actor.size, yaw, actor.number)
    light = Light((0.5, 0.3, 0.8), 0.5, 0.6, (1.0, 1.0, 1.0), (88, 138, 196), (205, 218, 228), 0.3, 900.0)
    solids = [replace(solid, item=0) for solid in solids]
    return Moment(tuple(solids), (item,), road, street, light, (20.0, -LANE / 2, 0.0), 20.0, 0)
