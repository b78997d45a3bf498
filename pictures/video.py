"""Videos of pictures, as H.264 in an mp4 file.

Needs PyAV (`pip install av`), which is optional, because its packages contain FFmpeg with encoders that have licences
of their own: libx264 is GPL, and H.264 is patented in some countries.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from a2d2.images import whole_path

ENCODERS = ("libx264", "libopenh264", "mpeg4")


class VideoError(ValueError):
    """A video cannot be written; the message says what to do."""


def check_video_support() -> None:
    """VideoError if PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise VideoError(
            "videos need PyAV, which is not installed: pip install av (BSD; its packages contain FFmpeg with the "
            "encoder libx264, which is GPL)"
        ) from error


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]], rate: float) -> int:
    """Write RGB pictures of one size as a video, whole or not at all; returns their number. `rate`: frames a second."""
    import av

    count, stream = 0, None
    with whole_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        for frame in frames:
            even = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]  # chroma is halved
            if stream is not None and even.shape[:2] != (stream.height, stream.width):
                raise ValueError(f"the frames of {path} differ in size")
            if stream is None:
                name = next(name for name in ENCODERS if name in av.codecs_available)
                stream = container.add_stream(name, rate=Fraction(rate).limit_denominator(1001))
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "20"} if name == "libx264" else {}
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
            count += 1
        for packet in stream.encode() if stream is not None else ():
            container.mux(packet)
    return count
