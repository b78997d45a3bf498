"""Which locations of a dense detector predict a box (FCOS, arXiv 2006.09214): of true labels, and of what teachers say
about a picture that was zoomed."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from models.heads import count_cells

IGNORED = -2  # class of an ignored box
BACKGROUND = -1  # in place of a box's row, of a location that has none; IGNORED where it may lie in an object
CENTRE_RADIUS = 1.5  # locations within so many strides of a box's centre predict it


def list_ranges(strides: Sequence[int]) -> tuple[Float32[np.ndarray, " S"], Float32[np.ndarray, " S"]]:
    """Of each level, how far in pixels the farthest edge of a box must be at least, and less than how far it must be:
    4 and 8 strides, but from 0 at the finest level and without limit at the coarsest."""
    steps = np.array(strides, dtype=np.float32)
    return np.where(steps == steps.min(), 0, 4 * steps), np.where(steps == steps.max(), np.inf, 8 * steps)


def fit_levels(
    distances: Float[np.ndarray, "n 4"], steps: Int64[np.ndarray, " n"], strides: Sequence[int]
) -> Bool[np.ndarray, " n"]:
    """Whether each of n locations, of levels with these `steps` among the `strides`, may predict a box, by the rule of
    `match_locations`, from the distances in pixels to its left, top, right and bottom edge."""
    middle = np.abs(distances[:, :2] - distances[:, 2:]) / 2
    least, most = (limits[np.searchsorted(np.array(strides), steps)] for limits in list_ranges(strides))
    farthest = distances.max(axis=1, initial=-np.inf)
    near = (middle < CENTRE_RADIUS * steps[:, None]).all(axis=1)
    return (distances > 0).all(axis=1) & near & (farthest >= least) & (farthest < most)


def match_locations(
    size: tuple[int, int],
    strides: tuple[int, ...],
    boxes: Float32[np.ndarray, "N 4"],
    classes: Int64[np.ndarray, " N"],
) -> Int32[np.ndarray, " L"]:
    """For each location of an image of `size` = (H, W) the row of its box, or BACKGROUND, or IGNORED.

    A location is matched with the smallest box that contains it, whose centre is within CENTRE_RADIUS strides in x and
    y, and whose farthest edge is between 4 and 8 strides away (from 0 at the finest level, without limit at the
    coarsest). It is IGNORED if it has no box but lies in an ignored one. So only a few locations of each level can
    belong to a box, and only these are looked at.
    """
    steps = np.array(strides, dtype=np.float32)[:, None]
    cells = np.array([count_cells(size, stride) for stride in strides])  # rows and columns of each level
    first = np.cumsum([0, *cells.prod(axis=1)])
    rows = np.full(first[-1], BACKGROUND, dtype=np.int32)
    for level, stride in enumerate(strides):
        y, x = ((np.arange(count, dtype=np.float32) + 0.5) * stride for count in cells[level])
        left, top, right, bottom = boxes[classes == IGNORED].T[..., None]
        covered = ((top < y) & (y < bottom))[:, :, None] & ((left < x) & (x < right))[:, None]
        rows[first[level] : first[level + 1]][covered.any(axis=0).ravel()] = IGNORED

    wanted = np.flatnonzero(classes >= 0)
    near = np.arange(2 * math.ceil(CENTRE_RADIUS))  # of the cells of a row or column, those that can be near enough
    candidates = []
    for axis in (0, 1):  # box, level, cell
        middle = ((boxes[wanted, axis] + boxes[wanted, axis + 2]) / 2)[:, None, None]
        index = np.floor(middle / steps - CENTRE_RADIUS).astype(np.int64) + near
        place = (index.astype(np.float32) + 0.5) * steps
        low, high = place - boxes[wanted, axis, None, None], boxes[wanted, axis + 2, None, None] - place
        inside = (index >= 0) & (index < cells[:, 1 - axis, None])
        close = np.abs(place - middle) < CENTRE_RADIUS * steps
        candidates.append((index, inside & close & (np.minimum(low, high) > 0), np.maximum(low, high)))
    (column, fits_x, far_x), (row, fits_y, far_y) = candidates
    farthest = np.maximum(far_y[..., :, None], far_x[..., None, :])  # box, level, row, column
    least, most = (limits[:, None, None] for limits in list_ranges(strides))
    fits = fits_y[..., :, None] & fits_x[..., None, :] & (farthest >= least) & (farthest < most)
    location = first[:-1, None, None] + row[..., :, None] * cells[:, 1, None, None] + column[..., None, :]
    areas = (boxes[wanted, 2] - boxes[wanted, 0]) * (boxes[wanted, 3] - boxes[wanted, 1])
    # the smallest, of equal ones the first, is written last
    for each in np.lexsort((-wanted, -areas)):
        rows[location[each][fits[each]]] = wanted[each]
    return rows


def measure_centreness(distances: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """1 in the middle of a box, 0 at its edges, from the distances to left, top, right and bottom."""
    left, top, right, bottom = distances.unbind(dim=-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()
