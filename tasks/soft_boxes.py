"""Dense soft targets for detection: what teachers say at every location of the student's own output.

After Dense Teacher (arXiv 2207.02541): the probabilities of all classes at the locations with the highest ones are
learned with a focal loss for soft targets, all others are background; there is no suppression and no threshold in
between. Here the probabilities are calibrated first, by a line through their logits (Platt 1999).
"""

import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from a2d2.dataset import Geometry, Holes
from models.heads import DetectionOutput, count_cells, locate_cells
from tasks.box_matching import fit_levels, measure_centreness

LEAST_KEPT = 0.01  # locations with a lower probability of every class are not stored
LEAST_COVERING = 0.1  # a box with a higher one may have locations that a zoom has left without a target
GAMMA = 2.0  # of the focal loss
BINS = np.linspace(-12.0, 12.0, 481)  # of logits

Array = np.ndarray


def find_mirror_order(size: tuple[int, int], strides: Sequence[int]) -> np.ndarray | None:
    """For each location of an image of `size` = (H, W) the row of that at its place in the mirror image; None if there
    is none, because a stride does not divide the width."""
    if any(size[1] % stride for stride in strides):
        return None
    order, first = [], 0
    for stride in strides:
        rows, columns = count_cells(size, stride)
        order.append(first + np.arange(rows * columns).reshape(rows, columns)[:, ::-1].ravel())
        first += rows * columns
    return np.concatenate(order)


def blend_outputs(
    outputs: Sequence[tuple[DetectionOutput, bool]], known: Sequence[Bool[Tensor, " K"]] | None = None
) -> dict[str, Tensor]:
    """The mean over teachers and mirror images: `scores` (B, L, K), probabilities of the classes; `boxes` (B, L, 4),
    distances in pixels of the input to the left, top, right and bottom edge; `centreness` (B, L), as a probability;
    `size` (B, 2), the (width, height) of the input.

    A mirror image whose locations are not those of the image is left out. known: of each output the classes that its
    teacher has learned, None if that is all of all; then the mean of a class is that over the teachers that know it, 0
    if none does, and a location has the mean box and centre-ness of those that know its likeliest class.
    """
    first = outputs[0][0]
    parts: dict[str, list[Tensor]] = {"scores": [], "boxes": [], "centreness": []}
    kept = []
    for number, (output, mirrored) in enumerate(outputs):
        if (output.strides, output.size) != (first.strides, first.size):
            raise ValueError(
                f"the teachers of detection look at strides {first.strides} of {first.size} and {output.strides} of "
                f"{output.size}: only those with the same locations can be averaged"
            )
        scores, boxes = output.classes.float().sigmoid(), output.boxes.float()
        centreness = output.centreness.float().sigmoid()
        if mirrored:
            order = find_mirror_order(output.size, output.strides)
            if order is None:
                continue
            rows = torch.from_numpy(order).to(scores.device)
            scores, centreness = scores.index_select(1, rows), centreness.index_select(1, rows)
            boxes = boxes.index_select(1, rows)[..., [2, 1, 0, 3]]
        for name, value in (("scores", scores), ("boxes", boxes), ("centreness", centreness)):
            parts[name].append(value)
        kept.append(number)
    stacked = {name: torch.stack(values) for name, values in parts.items()}
    if known is None:
        blended = {name: value.mean(dim=0) for name, value in stacked.items()}
    else:
        blended = _blend_known(stacked, torch.stack([known[number] for number in kept]).to(first.classes.device))
    size = torch.tensor(first.size[::-1], device=first.boxes.device).expand(len(first.boxes), 2)
    return blended | {"size": size}


def _blend_known(stacked: dict[str, Tensor], known: Bool[Tensor, "T K"]) -> dict[str, Tensor]:
    """The means over T outputs as `blend_outputs` has them where not all know all classes."""
    shares = known.to(stacked["scores"].dtype)
    shares = shares / shares.sum(dim=0).clamp(min=1)
    scores = (stacked["scores"] * shares[:, None, None]).sum(dim=0)
    own = shares[:, scores.argmax(dim=2)]  # T, B, L
    boxes = (stacked["boxes"] * own[..., None]).sum(dim=0)
    # no class at all is known: nothing is said there, but a box must have an extent
    boxes = torch.where(own.sum(dim=0)[..., None] > 0, boxes, 1.0)
    return {"scores": scores, "boxes": boxes, "centreness": (stacked["centreness"] * own).sum(dim=0)}


def unblend(said: dict[str, Tensor], strides: tuple[int, ...], row: int) -> DetectionOutput:
    """One row as an output again."""
    width, height = said["size"][row].tolist()
    one = slice(row, row + 1)
    return DetectionOutput(
        said["scores"][one].clamp(1e-6, 1 - 1e-6).logit(), said["boxes"][one],
        said["centreness"][one].clamp(1e-6, 1 - 1e-6).logit(), strides, (height, width),
    )  # fmt: skip


def encode_locations(said: dict[str, Tensor], row: int) -> bytes:
    """npz: `index` (n,) of the locations that are stored, `scores` (n, K), `boxes` (n, 4), `centreness` (n,)."""
    scores = said["scores"][row].cpu().numpy()
    index = np.flatnonzero(scores.max(axis=1, initial=0.0) >= LEAST_KEPT)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        index=index.astype(np.int32),
        scores=scores[index].astype(np.float16),
        boxes=said["boxes"][row].cpu().numpy()[index].astype(np.float32),
        centreness=said["centreness"][row].cpu().numpy()[index].astype(np.float16),
    )
    return buffer.getvalue()


def read_locations(path: Path, classes: int, locations: int) -> dict[str, np.ndarray]:
    """What `encode_locations` wrote, for so many classes and locations. ValueError where it does not fit, or is
    damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = {name: content[name] for name in ("index", "scores", "boxes", "centreness")}
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(f"no archive of locations, or a broken one: {error}") from error
    count = len(found["index"])
    shapes = {"scores": (count, classes), "boxes": (count, 4), "centreness": (count,)}
    if wrong := [name for name, shape in shapes.items() if found[name].shape != shape]:
        raise ValueError(f"{wrong[0]} has the shape {found[wrong[0]].shape}, expected {shapes[wrong[0]]}")
    if count and not 0 <= int(found["index"].min()) <= int(found["index"].max()) < locations:
        raise ValueError(f"its locations are not among the {locations} of the network")
    return found


def place_locations(
    found: dict[str, np.ndarray], own: tuple[int, int], strides: tuple[int, ...], geometry: Geometry, classes: int
) -> dict[str, Tensor]:
    """Stored locations as the soft target of an augmented image: `scores` (L, K), `boxes` (L, 4), `centreness` (L,),
    and `hidden` bool (L,), locations without a loss.

    own: (width, height) of the input they were made at. Of the whole picture, flipped or not, each goes to the cell, of
    its level, that contains it; of several the surest. Of a part of it, which is enlarged, boxes are cut at its edges
    and learned as true ones: each goes to the cell that contains it of every level whose cells there predict a box of
    this size and place (see box_matching.py), and its centre-ness is that of the box. A zoom leaves cells between them
    empty: those in a box are hidden, and so is what the geometry hides.
    """
    width, height = geometry.size
    centres = locate_cells((height, width), strides).numpy()
    stored = locate_cells(own[::-1], strides).numpy()[found["index"]]
    edges = np.concatenate([stored - found["boxes"][:, :2], stored + found["boxes"][:, 2:]], axis=1)
    scale = np.array([geometry.source[0] / own[0], geometry.source[1] / own[1]] * 2)
    edges = geometry.map_boxes(edges.astype(np.float64) * scale)
    points = geometry.map_boxes(np.concatenate([stored, stored], axis=1).astype(np.float64) * scale)[:, :2]
    sure = found["scores"].astype(np.float32).max(axis=1, initial=0.0)
    whole = geometry.crop == (0, 0, *geometry.source)
    if not whole:
        edges = np.clip(edges, 0, [width, height, width, height])

    cells = np.array([count_cells((height, width), stride) for stride in strides])
    begins = np.cumsum([0, *cells.prod(axis=1)])
    rank = np.argsort(sure, kind="stable")  # the surest is written last
    if whole:
        firsts = np.cumsum([0, *(int(np.prod(count_cells(own[::-1], stride))) for stride in strides)])
        level = (np.searchsorted(firsts, found["index"], side="right") - 1)[rank]
    else:
        level, rank = np.tile(np.arange(len(strides)), len(rank)), np.repeat(rank, len(strides))
    step = np.array(strides)[level]
    column, row = (np.floor(points[rank, axis] / step).astype(np.int64) for axis in (0, 1))
    inside = (points[rank] >= 0).all(axis=1) & (column < cells[level, 1]) & (row < cells[level, 0])
    place, rank, level = (begins[level] + row * cells[level, 1] + column)[inside], rank[inside], level[inside]
    distances = np.concatenate([centres[place] - edges[rank, :2], edges[rank, 2:] - centres[place]], axis=1)
    fits = (distances > 0).all(axis=1)
    if not whole:
        fits &= fit_levels(distances, np.array(strides)[level], strides)
    place, rank, distances = place[fits], rank[fits], distances[fits]

    count = begins[-1]
    scores = np.zeros((count, classes), np.float32)
    boxes, centreness = np.ones((count, 4), np.float32), np.zeros(count, np.float32)
    scores[place], boxes[place] = found["scores"][rank], distances
    centreness[place] = found["centreness"][rank]
    if not whole:  # the teacher's is about its own box and cell
        centreness[place] = measure_centreness(torch.from_numpy(distances)).numpy()

    hidden = np.zeros(count, dtype=bool)
    exact = whole and not (geometry.flip and any(width % stride for stride in strides))
    if not exact:
        covering = edges[sure > LEAST_COVERING]
        contained = (centres[:, None] > covering[None, :, :2]) & (centres[:, None] < covering[None, :, 2:])
        hidden |= contained.all(axis=2).any(axis=1) & (scores.max(axis=1, initial=0.0) == 0)
    hidden |= find_covered((width, height), strides, geometry.holes)
    values = {"scores": scores, "boxes": boxes, "centreness": centreness, "hidden": hidden}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def find_covered(size: tuple[int, int], strides: tuple[int, ...], holes: Holes) -> Bool[Array, " L"]:
    """The locations of an image of (width, height) `size` that lie in one of the holes of a Geometry."""
    width, height = size
    centres = locate_cells((height, width), strides).numpy()
    covered = np.zeros(len(centres), dtype=bool)
    for hole in holes:
        left, top, right, bottom = np.array(hole) * [width, height, width, height]
        covered |= (centres[:, 0] >= left) & (centres[:, 0] < right) & (centres[:, 1] >= top) & (centres[:, 1] < bottom)
    return covered


def find_learned(target: dict[str, Tensor], share: float) -> Bool[Tensor, "B L"]:
    """The locations that are learned: so large a share of an image's, those with the highest probabilities."""
    sure = target["scores"].amax(dim=2).masked_fill(target["hidden"], 0.0)
    kept = max(1, round(share * sure.shape[1]))
    return (sure >= sure.topk(kept, dim=1).values[:, -1:]) & (sure > 0)


def measure_focal(logits: Float[Tensor, "*n"], wanted: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Quality focal loss (arXiv 2006.04388): the cross-entropy with a soft target, times the distance from it
    squared."""
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return entropy * (logits.sigmoid() - wanted).abs().pow(GAMMA)


# ---------------------------------------------------------------- calibration


class LogitCounts:
    """Counts logits by whether they were right, so that a calibration needs no room for all of them."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, len(BINS) + 1))

    def add(self, probabilities: Float[Array, " n"], right: Bool[Array, " n"]) -> None:
        place = np.searchsorted(BINS, to_logits(probabilities))
        for index, mask in enumerate((~right, right)):
            self.counts[index] += np.bincount(place[mask], minlength=len(BINS) + 1)

    def fit(self) -> tuple[float, float]:
        """Slope and offset of the logits with the greatest likelihood, as Platt's; (1, 0) where nothing was right, or
        nothing wrong. A weak prior keeps the slope finite, and it is never negative, so that the order stays."""
        wrong, right = self.counts
        if not right.sum() or not wrong.sum():
            return 1.0, 0.0
        middles = np.concatenate([BINS[:1], (BINS[1:] + BINS[:-1]) / 2, BINS[-1:]])
        design = np.stack([middles, np.ones_like(middles)], axis=1)
        prior, total = np.array([1.0, 0.0]), wrong + right
        found = prior.copy()
        for _ in range(100):
            probability = 1 / (1 + np.exp(-design @ found))
            gradient = design.T @ (total * probability - right) + PRIOR * (found - prior)
            curvature = (design * (total * probability * (1 - probability))[:, None]).T @ design + PRIOR * np.eye(2)
            step = np.linalg.solve(curvature, gradient)
            found = found - np.clip(step, -1.0, 1.0)
            if np.abs(step).max() < 1e-8:
                break
        return max(float(found[0]), 1e-3), float(found[1])


PRIOR = 1.0  # observations that the prior weighs


def to_logits(probabilities: Float[Array, "*n"]) -> Float64[np.ndarray, "*n"]:
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def calibrate_probabilities(probabilities: Float[Tensor, "*n"], line: Iterable[float] | None) -> Float[Tensor, "*n"]:
    """The same, moved by a line through their logits; None leaves them."""
    if line is None:
        return probabilities
    slope, offset = line
    return (probabilities.clamp(1e-6, 1 - 1e-6).logit() * slope + offset).sigmoid()
