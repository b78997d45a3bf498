"""Ray casting in a synthetic street: rays of the camera's recorded pixels and of the lidars' beams.

Coordinates are in the rig's frame (metres; x forward, y left, z up, origin at the front centre camera). A ray has a
direction d and an origin o, and hits at o + t d. Camera rays have d[0] = 1, so t is the depth along the optical axis.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from a2d2.boxes import NEAR_METRES, find_hull
from a2d2.calibration import Calibration, Camera
from a2d2.classes import class_colour
from a2d2.synthetic.world import CAMERA_HEIGHT, Moment, Solid

GROUND, SKY = -1, -2  # in place of the index of a solid
_GROUND_LABELS = {
    "road": "RD normal street",
    "parking": "Parking area",
    "curb": "Curbstone",
    "grass": "Nature object",
    "sidewalk": "Sidewalk",
    "solid": "Solid line",
    "dashed": "Dashed line",
    "zebra": "Zebra crossing",
}
_NEAREST = 0.05  # metres; nearer hits are ignored, because they are at the sensor itself


# ---------------------------------------------------------------- geometry


def _turn(yaw: float) -> Float[np.ndarray, "3 3"]:
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def list_planes(solid: Solid) -> tuple[Float[np.ndarray, "6 3"], Float[np.ndarray, " 6"]]:
    """The planes n . p <= d of a block, in the order front, rear, left, right, top, bottom; n is not normalised."""
    length, width, height = solid.size
    rear, front, side = (value / height for value in solid.taper)
    normals = np.array(
        [[1, 0, front], [-1, 0, rear], [0, 1, side], [0, -1, side], [0, 0, 1], [0, 0, -1]], dtype=np.float64
    )
    limits = np.array([length, length, width, width, height, height]) / 2 - normals[:, 2] * height / 2
    limits[4:] = height / 2
    normals = normals @ _turn(solid.yaw).T
    return normals, limits + normals @ np.array(solid.centre)


def hit_solid(
    solid: Solid, origin: Float[np.ndarray, " 3"], rays: Float[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Distance t along each ray (inf for a miss) and the face hit (as in `list_planes`; 0 for an ellipsoid)."""
    if solid.shape == "ellipsoid":
        shrink = (_turn(solid.yaw) * (2 / np.array(solid.size))).astype(rays.dtype)
        start = (origin - np.array(solid.centre)) @ shrink
        d = rays @ shrink
        a, b, c = np.einsum("nd,nd->n", d, d), d @ start.astype(rays.dtype), float(start @ start) - 1
        root = b * b - a * c
        with np.errstate(invalid="ignore"):
            t = (-b - np.sqrt(root)) / a
        return np.where((root > 0) & (t > _NEAREST), t, np.inf), np.zeros(len(rays), dtype=np.int8)
    normals, limits = list_planes(solid)
    slack = (limits - normals @ origin).astype(rays.dtype)
    speed = rays @ normals.T.astype(rays.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = slack / speed
    enter = np.where(speed < 0, t, -np.inf)
    leave = np.where(speed > 0, t, np.inf)
    face = enter.argmax(axis=1)
    first = enter[np.arange(len(rays)), face]
    hit = (first < leave.min(axis=1)) & (first > _NEAREST)
    return np.where(hit, first, np.inf), face.astype(np.int8)


def _list_corners(solids: tuple[Solid, ...]) -> Float[np.ndarray, "n 8 3"]:
    """Corners of the bounding boxes of the solids."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    half = np.array([solid.size for solid in solids]).reshape(-1, 1, 3) / 2 * signs
    yaw = np.array([solid.yaw for solid in solids])[:, None]
    x = np.cos(yaw) * half[..., 0] - np.sin(yaw) * half[..., 1]
    y = np.sin(yaw) * half[..., 0] + np.cos(yaw) * half[..., 1]
    return np.stack([x, y, half[..., 2]], axis=-1) + np.array([solid.centre for solid in solids]).reshape(-1, 1, 3)


def trace_rays(
    moment: Moment, origin: Float[np.ndarray, " 3"], rays: Float[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The first hit of each ray: t (inf for the sky), and the index of the solid, or GROUND or SKY."""
    azimuth = np.arctan2(rays[:, 1], rays[:, 0])
    order = np.argsort(azimuth)
    rays, azimuth = rays[order], azimuth[order]
    with np.errstate(divide="ignore"):
        t = np.where(rays[:, 2] < 0, (-CAMERA_HEIGHT - origin[2]) / rays[:, 2], np.inf)
    index = np.where(np.isfinite(t), GROUND, SKY)
    corners = _list_corners(moment.solids) - origin
    reach = np.arctan2(corners[..., 1], corners[..., 0])
    beside = (corners[..., 0] <= 0).any(axis=1)
    first = np.where(beside, 0, np.searchsorted(azimuth, reach.min(axis=1)))
    last = np.where(beside, len(rays), np.searchsorted(azimuth, reach.max(axis=1)))
    last[(corners[..., 0] <= 0).all(axis=1)] = 0
    for number in np.flatnonzero(first < last):
        span = slice(first[number], last[number])
        found, _ = hit_solid(moment.solids[number], origin, rays[span])
        closer = found < t[span]
        t[span][closer] = found[closer]
        index[span][closer] = number
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return t[back], index[back]


def measure_depth(moment: Moment, camera: Camera, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """The ground-truth depth in metres at undistorted pixels of `camera`, inf in the sky."""
    tangents = (pixels - camera.matrix[:2, 2]) / np.array([camera.matrix[0, 0], camera.matrix[1, 1]])
    rays = np.concatenate([np.ones((len(tangents), 1)), -tangents], axis=1)
    return trace_rays(moment, np.zeros(3), rays)[0]


@lru_cache(maxsize=4)
def list_camera_rays(camera: Camera) -> Float[np.ndarray, "h w 3"]:
    """The viewing direction of every recorded (distorted) pixel, float32."""
    width, height = camera.recorded_size
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2).astype(np.float64)
    tangents = camera.undistort_to_tangents(grid)
    rays = np.concatenate([np.ones((len(tangents), 1)), -tangents], axis=1)
    return rays.reshape(height, width, 3).astype(np.float32)


def find_rectangles(corners: Float[np.ndarray, "n 8 3"], camera: Camera) -> Int[np.ndarray, "n 4"]:
    """Recorded pixels [x1, y1, x2, y2) that may show objects with these corners; x1 >= x2 if no pixel does."""
    width, height = camera.recorded_size
    hulls = np.full((len(corners), 4), np.nan)
    ahead = (corners[..., 0] > NEAR_METRES).all(axis=1)
    pixels = camera.project(corners[ahead].reshape(-1, 3)).reshape(-1, 8, 2)
    hulls[ahead] = np.concatenate([pixels.min(axis=1), pixels.max(axis=1)], axis=1)
    for number in np.flatnonzero(~ahead & (corners[..., 0] > NEAR_METRES).any(axis=1)):
        hulls[number] = find_hull(corners[number], camera)
    margin = 0.12 * max(width, height)  # the distorted image shows a margin outside the undistorted image
    hulls[:, :2] = np.maximum(hulls[:, :2], -margin)
    hulls[:, 2:] = np.minimum(hulls[:, 2:], [width + margin, height + margin])
    seen = (hulls[:, :2] < hulls[:, 2:]).all(axis=1)
    rectangles = np.zeros((len(corners), 4), dtype=int)
    share = np.linspace(0, 1, 9)
    grid = np.stack(np.meshgrid(share, share), axis=-1).reshape(1, -1, 2)
    low, high = hulls[seen, None, :2], hulls[seen, None, 2:]
    recorded = camera.distort((low + grid * (high - low)).reshape(-1, 2)).reshape(-1, grid.shape[1], 2)
    rectangles[seen, :2] = np.maximum(np.floor(recorded.min(axis=1)) - 2, 0)
    rectangles[seen, 2:] = np.minimum(np.ceil(recorded.max(axis=1)) + 3, [width, height])
    rectangles[(rectangles[:, 1] >= rectangles[:, 3])] = 0
    return rectangles


# ---------------------------------------------------------------- paint


@lru_cache(maxsize=1)
def _noise() -> Float[np.ndarray, "512 512"]:
    """A tile of smooth noise of several scales, with standard deviation 1; it repeats without seams."""
    rng = np.random.default_rng(7)
    total = np.zeros((512, 512), dtype=np.float32)
    for size in (8, 32, 128, 512):
        coarse = rng.normal(size=(size, size)).astype(np.float32)
        wrapped = np.pad(coarse, 1, mode="wrap")
        scale = 512 // size
        grown = cv2.resize(wrapped, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        total += grown[scale : scale + 512, scale : scale + 512]
    return total / total.std()


def _sample_noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nearest value of the noise at (x, y), in units of 1 / 64 of the tile's width."""
    return _noise()[(y * 8).astype(np.int64) & 511, (x * 8).astype(np.int64) & 511]


def _sample_smooth_noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The same with bilinear interpolation, for surfaces on which a value of the tile covers several pixels."""
    positions = np.stack([x, y]).astype(np.float32) * 8 % 512
    parts = np.array_split(positions, positions.shape[1] // 30000 + 1, axis=1)  # OpenCV accepts no longer rows
    sampled = [cv2.remap(_noise(), part[:1], part[1:], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP) for part in parts]
    return np.concatenate(sampled, axis=1)[0]


def _paint_solid(solid: Solid, local: Float[np.ndarray, "n 3"], face: Int[np.ndarray, " n"]) -> np.ndarray:
    """Colours of points on a solid; `local`: relative to its centre and axes; faces as in `list_planes`."""
    length, width, height = solid.size
    x, y, z = local.T
    up = z / height + 0.5
    side = (face == 2) | (face == 3)
    ends = face <= 1
    along = np.where(side, x, y)
    span = np.where(side, length, width)
    colour = np.tile(np.array(solid.colour, dtype=np.float32), (len(local), 1))
    glass, tyre = np.array([52, 66, 80], np.float32), np.array([28, 28, 30], np.float32)
    look = solid.look
    if look == "facade":
        floor = 3.0
        window = ((along + span / 2) % 2.6 > 0.8) & ((along + span / 2) % 2.6 < 2.0)
        window &= ((z + height / 2) % floor > 0.9) & ((z + height / 2) % floor < 2.3) & (face < 4)
        colour[window] = glass * 1.2
    elif look == "foliage":
        colour *= (1 + 0.22 * _sample_noise(x * 3 + 2.7 * y, z * 3 + 1.3 * y))[:, None]
    elif look in ("body", "van", "truck", "bus"):
        metres = z + height / 2
        radius = 0.33 if look in ("body", "van") else 0.48
        wheel = np.zeros(len(local), dtype=bool)
        for axle in (-0.32 * length, 0.32 * length):
            wheel |= side & ((x - axle) ** 2 + (metres - radius) ** 2 < radius**2)
        if look == "truck":
            colour[x > 0.3 * length] *= 0.7
            band = (side & (x > 0.33 * length) & (x < 0.47 * length)) | ((face == 0) & (np.abs(y) < 0.45 * width))
            colour[band & (up > 0.45) & (up < 0.7)] = glass
            colour[side & (np.abs(x % 1.2) < 0.08) & (x < 0.3 * length)] *= 0.9
        elif look in ("van", "bus"):
            low, high = (0.5, 0.85) if look == "van" else (0.38, 0.8)
            band = (up > low) & (up < high) & (np.abs(along) < 0.46 * span)
            pillar = side & (np.abs((x + length / 2) % (length / 4 if look == "van" else 1.6)) < 0.12)
            colour[band & (side | ends) & ~pillar] = glass
        lamps = (metres > 0.28 * min(height, 2.2)) & (metres < 0.45 * min(height, 2.2)) & (np.abs(y) > 0.36 * width)
        colour[(face == 1) & lamps] = (190, 22, 24)
        colour[(face == 0) & lamps] = (240, 238, 215)
        plate = ends & (np.abs(y) < 0.27) & (metres > 0.4) & (metres < 0.55)
        colour[plate] = (225, 225, 220)
        colour[(side | ends) & (metres < 0.25)] = tyre * 1.3
        colour[wheel] = tyre
    elif look == "cabin":
        window = (up > 0.12) & (up < 0.85) & (side | ends) & (np.abs(along) < 0.44 * span)
        colour[window & ~(side & (np.abs(x) < 0.04 * length))] = glass
    elif look == "disc":
        colour[(y / width) ** 2 + (z / height) ** 2 < 0.09] = (240, 240, 238)
    elif look == "warning":
        colour[(np.abs(y) < (0.3 - 0.45 * (up - 0.15)) * width) & (up > 0.15) & (up < 0.7)] = (240, 240, 238)
    elif look == "info":
        colour[(np.abs(y) < 0.3 * width) & (np.abs(z) < 0.12 * height)] = (240, 240, 240)
    elif look == "signal":
        for lamp, light in ((0.8, (225, 40, 35)), (0.5, (90, 70, 30)), (0.2, (30, 80, 45))):
            colour[ends & ((up - lamp) ** 2 * height**2 + y**2 < 0.13**2)] = light
    return colour


def _find_normals(solid: Solid, local: np.ndarray, face: np.ndarray) -> np.ndarray:
    if solid.shape == "ellipsoid":
        normals = local / (np.array(solid.size) / 2) ** 2 @ _turn(solid.yaw).T
    else:
        normals = list_planes(solid)[0][face]
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def _find_ground(moment: Moment, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and label numbers (indices of _GROUND_LABELS) of points on the ground, given in the rig's frame."""
    east, north, yaw = moment.pose
    cos, sin = math.cos(yaw), math.sin(yaw)
    world_x, world_y = east + cos * x - sin * y, north + sin * x + cos * y
    s, d = np.empty_like(world_x), np.empty_like(world_y)
    # in blocks of the picture's rows, from far to near: each block needs a short piece of the road only
    for begin in range(0, len(x), 20000):
        part = slice(begin, begin + 20000)
        low, high = moment.s + 0.5 * x[part].min() - 15, moment.s + 1.6 * x[part].max() + 15
        s[part], d[part] = moment.road.locate(world_x[part], world_y[part], low, high)
    street = moment.street
    names = list(_GROUND_LABELS)
    number = np.full(len(x), names.index("grass"), dtype=np.int8)
    colour = np.tile(np.array(street.colours["grass"], dtype=np.float32), (len(x), 1))
    rough = np.full(len(x), 0.16, dtype=np.float32)
    for strip in street.strips:
        within = (d >= strip.low) & (d < strip.high)
        number[within] = names.index(strip.ground)
        colour[within] = street.colours[strip.ground]
        rough[within] = 0.14 if strip.ground == "grass" else 0.05
    slab = (number == names.index("sidewalk")) & ((s % 0.8 < 0.05) | (d % 0.8 < 0.05))
    colour[slab] *= 0.85
    bay = (number == names.index("parking")) & (s % 7.0 < 0.14)
    colour[bay] = street.colours["line"]
    for line in street.lines:
        painted = (np.abs(d - line.d) < line.width / 2) & (s % (line.dash + line.gap) < line.dash)
        number[painted] = names.index("dashed" if line.gap else "solid")
        colour[painted] = street.colours["line"]
    on_road = np.abs(d) < street.lanes * 3.5
    for spot in street.crossings:
        crossing = on_road & (np.abs(s - spot) < 2.0)
        number[crossing] = names.index("zebra")
        stripe = crossing & (d % 1.0 < 0.5)
        colour[crossing] = street.colours["road"]
        colour[stripe] = street.colours["zebra"]
    fade = np.clip(20 / np.maximum(np.hypot(x, y), 1), 0.1, 1)
    fine, coarse = _sample_noise(world_x * 4, world_y * 4), _sample_noise(s * 0.3, d * 0.3)
    colour *= (1 + rough * fade * fine + 0.04 * coarse)[:, None]
    return colour, number


def _paint_sky(moment: Moment, rays: np.ndarray) -> np.ndarray:
    light = moment.light
    elevation = np.clip(rays[:, 2] / np.linalg.norm(rays, axis=1), 0, 1)
    share = np.clip(elevation * 2.2, 0, 1)[:, None] ** 0.7
    colour = share * np.array(light.zenith) + (1 - share) * np.array(light.horizon)
    height = np.maximum(rays[:, 2], 0.03)
    heading = moment.pose[2]
    x = np.cos(heading) * rays[:, 0] - np.sin(heading) * rays[:, 1]
    y = np.sin(heading) * rays[:, 0] + np.cos(heading) * rays[:, 1]
    noise = _sample_smooth_noise(x / height + moment.seed % 61, y / height)
    cloud = np.clip(noise * 0.5 - 0.1, 0, 1)
    cloud *= light.clouds * np.clip(elevation * 6, 0, 1)
    return colour * (1 - cloud[:, None]) + 245 * cloud[:, None]


# ---------------------------------------------------------------- camera


def render_camera(
    moment: Moment, camera: Camera
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"], dict[int, int]]:
    """Recorded picture, label picture, and the number of pixels of each visible road user, by its index in items."""
    rays = list_camera_rays(camera)
    shape = rays.shape[:2]
    with np.errstate(divide="ignore"):
        depth = np.where(rays[..., 2] < 0, -CAMERA_HEIGHT / rays[..., 2], np.inf).astype(np.float32)
    index = np.where(np.isfinite(depth), GROUND, SKY).astype(np.int32)
    faces = np.zeros(shape, dtype=np.int8)
    origin = np.zeros(3)
    corners = _list_corners(moment.solids)
    rectangles = find_rectangles(corners, camera)
    for number in np.flatnonzero(rectangles[:, 0] < rectangles[:, 2]):
        solid, (left, top, right, bottom) = moment.solids[number], rectangles[number]
        part = np.s_[top:bottom, left:right]
        found, face = hit_solid(solid, origin, rays[part].reshape(-1, 3))
        found, face = found.reshape(depth[part].shape), face.reshape(depth[part].shape)
        closer = found < depth[part]
        depth[part][closer] = found[closer]
        index[part][closer] = number
        faces[part][closer] = face[closer]

    picture = np.zeros((*shape, 3), dtype=np.float32)
    label = np.zeros((*shape, 3), dtype=np.uint8)
    yaw = moment.pose[2]
    sun = np.array(moment.light.sun) @ _turn(yaw)  # into the rig's frame
    sky = index == SKY
    if sky.any():
        picture[sky] = _paint_sky(moment, rays[sky])
    label[sky] = class_colour("Sky")
    _paint_ground(moment, rays, depth, index, picture, label, sun)
    order = np.argsort(index, axis=None, kind="stable")
    bounds = np.searchsorted(index.ravel()[order], np.arange(len(moment.solids) + 1))
    flat_rays, flat_depth, flat_faces = rays.reshape(-1, 3), depth.ravel(), faces.ravel()
    flat_picture, flat_label = picture.reshape(-1, 3), label.reshape(-1, 3)
    shown: dict[int, int] = {}
    for number, solid in enumerate(moment.solids):
        pixels = order[bounds[number] : bounds[number + 1]]
        if len(pixels) == 0:
            continue
        local = (flat_rays[pixels] * flat_depth[pixels, None] - np.array(solid.centre)) @ _turn(solid.yaw)
        colour = _paint_solid(solid, local, flat_faces[pixels])
        normals = _find_normals(solid, local, flat_faces[pixels])
        flat_picture[pixels] = colour * _shade(moment, normals @ sun)
        flat_label[pixels] = class_colour(solid.label, solid.number)
        if solid.item >= 0:
            shown[solid.item] = shown.get(solid.item, 0) + len(pixels)
    return _expose(moment, picture, depth), label, shown


def _shade(moment: Moment, facing: np.ndarray) -> np.ndarray:
    light = moment.light
    return (light.ambient + light.direct * np.clip(facing, 0, 1))[:, None] * np.array(light.tint)


def _paint_ground(moment, rays, depth, index, picture, label, sun) -> None:
    ground = index == GROUND
    x, y = (rays[ground][:, axis].astype(np.float64) * depth[ground] for axis in (0, 1))
    far = x > 150
    x, y = np.where(far, 150.0, x), np.clip(y, -150, 150)
    colour, number = _find_ground(moment, x, y)
    shadow = np.ones(len(x))
    for item in moment.items:
        near = (np.abs(x - item.centre[0]) < 9) & (np.abs(y - item.centre[1]) < 9)
        if not near.any():
            continue
        local = np.stack([x[near] - item.centre[0], y[near] - item.centre[1]], 1) @ _turn(item.yaw)[:2, :2]
        beyond = np.maximum(np.abs(local) - np.array(item.size[:2]) / 2, 0).max(axis=1)
        shadow[near] *= 1 - 0.55 * np.exp(-((beyond / 0.35) ** 2))
    picture[ground] = colour * _shade(moment, np.full(len(x), sun[2])) * shadow[:, None]
    table = np.array([class_colour(name) for name in _GROUND_LABELS.values()], dtype=np.uint8)
    label[ground] = table[number]


def _expose(moment: Moment, picture: np.ndarray, depth: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Add haze, the blur of the lens and the noise of the sensor."""
    clear = np.exp(-np.where(np.isfinite(depth), depth, 0) / moment.light.haze)[..., None]
    picture = picture * clear + np.array(moment.light.horizon, dtype=np.float32) * (1 - clear)
    picture = cv2.GaussianBlur(picture.astype(np.float32), (3, 3), 0.6)
    rng = np.random.default_rng(moment.seed)
    noise = rng.normal(0, 2.0, (64, picture.shape[1], 1)).astype(np.float32)
    rows = np.arange(picture.shape[0])
    picture += noise[rng.integers(0, 64, len(rows))]
    return np.clip(picture, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- lidar


@lru_cache(maxsize=2)
def _list_beams(step: float) -> Float[np.ndarray, "n 3"]:
    """Directions of a lidar with 16 beams from -15 to 15 degrees, such as a VLP-16, in its own frame; `step`: degrees
    between azimuths."""
    azimuth = np.deg2rad(np.arange(0, 360, step))
    elevation = np.deg2rad(np.arange(-15, 16, 2.0))
    a, e = np.meshgrid(azimuth, elevation, indexing="ij")
    return np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1).reshape(-1, 3)


def scan_lidars(moment: Moment, calibration: Calibration, camera: Camera, step: float = 0.25) -> dict[str, np.ndarray]:
    """Points of all lidars in the undistorted view, in the rig's frame: points, lidar_id, reflectance, azimuth (of the
    beam, in radians). Each lidar has its own origin, so a lidar may hit surfaces that the camera does not see."""
    rng = np.random.default_rng([moment.seed, 5])
    pose = camera.pose
    width, height = camera.size
    parts = []
    for number, lidar in enumerate(calibration.lidars.values()):
        origin = pose.axes.T @ (lidar.origin - pose.origin)
        rays = _list_beams(step) @ lidar.axes.T @ pose.axes
        ahead = rays[:, 0] > 0.5
        sideways = np.abs(rays[:, 1] / np.where(ahead, rays[:, 0], 1)) < width / camera.matrix[0, 0]
        rays = rays[ahead & sideways & (rng.random(len(rays)) > 0.04)]
        t, index = trace_rays(moment, origin, rays)
        kept = (t < 100) & (t > 1.5)
        noisy = t[kept] + rng.normal(0, 0.02, int(kept.sum()))
        points = origin + rays[kept] * noisy[:, None]
        parts.append((points, np.full(len(points), number), index[kept], np.arctan2(rays[kept, 1], rays[kept, 0])))
    points, scanner, index, azimuth = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    front = points[:, 0] > 0.5
    points, scanner, index, azimuth = points[front], scanner[front], index[front], azimuth[front]
    pixels = camera.project(points)
    inside = (pixels >= -0.45).all(axis=1) & (pixels[:, 0] < width - 0.55) & (pixels[:, 1] < height - 0.55)
    bright = np.array([sum(solid.colour) / 7.65 for solid in moment.solids] + [20.0, 20.0])
    reflectance = np.clip(bright[index[inside]] + rng.normal(0, 6, int(inside.sum())), 0, 255)
    return {
        "points": points[inside],
        "lidar_id": scanner[inside],
        "reflectance": reflectance.astype(np.int64),
        "azimuth": azimuth[inside],
    }
