"""Drawing functions that several tasks share: blended colours and text on a picture."""

import cv2
import numpy as np
from jaxtyping import UInt8


def blend(
    image: UInt8[np.ndarray, "H W 3"], colors: UInt8[np.ndarray, "H W 3"], share: float
) -> UInt8[np.ndarray, "H W 3"]:
    """`share` of the colours over the image."""
    return cv2.addWeighted(colors, share, image, 1 - share, 0)


def write_text(
    picture: UInt8[np.ndarray, "H W 3"],
    text: str,
    corner: tuple[int, int] | None = None,
    color: tuple[int, int, int] = (255, 255, 255),
) -> UInt8[np.ndarray, "H W 3"]:
    """Text on a dark plate, sized to the picture; `corner`: (x, y) of its lower left, by default at the upper left."""
    scale = max(picture.shape[0] / 640, 0.35)
    thick = max(1, round(scale * 1.5))
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale * 0.7, thick)
    x, y = corner or (height // 2, 2 * height)
    x = int(np.clip(x, 0, max(picture.shape[1] - width, 0)))
    y = int(np.clip(y, height + 2, picture.shape[0] - base))
    cv2.rectangle(picture, (x - 1, y - height - 2), (x + width + 1, y + base), (0, 0, 0), -1)
    cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale * 0.7, color, thick, cv2.LINE_AA)
    return picture
