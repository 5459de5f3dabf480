"""Thumbnails: a few frames of each video or image side by side in one small JPEG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from untwin.media.decode import frames as decode_frames
from untwin.media.decode import require
from untwin.media.workers import Problem, map_media
from untwin.storage.files import Storage

_BT601, _FULL_RANGE = 5, 2
_SCALING = 0x20 | 0x40000 | 0x80000
"""SWS_AREA, SWS_ACCURATE_RND and SWS_BITEXACT."""
_QUALITIES = (4, 6, 9, 13, 18)
"""Quantisers of MJPEG, best first."""
_PIXELS_A_BYTE = 4.8
"""At least: a strip of four frames of 160 x 90 has up to 12 KB, where the lowest quality can do it."""


@dataclass(frozen=True)
class Sprite:
    """A few frames of a clip side by side; an image has one.

    Attributes:
        jpeg: The picture, a JPEG file.
        frames: Number of frames.
        width: Of one frame, in pixels.
        height: In pixels.
    """

    jpeg: bytes
    frames: int
    width: int
    height: int


def strips(
    storage: Storage,
    files: Iterable[str],
    *,
    frames: int = 4,
    height: int = 90,
    workers: int | None = None,
    timeout: float = 20.0,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Sprite | str]:
    """Make a picture of each file, in processes of their own; the same file gives the same bytes.

    Args:
        storage: Access to the files; of a large remote one only the parts that are needed are read.
        files: Videos and images: local paths or URLs.
        frames: Of each video.
        height: Most of it, in pixels; the width is at most 16/9 of it.
        workers: Processes; default: the cores that this process may use.
        timeout: Seconds for each file.
        progress: Called with 1 after each file.

    Yields:
        For each file, in their order, the picture, or the reason why there is none.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    require()
    items = ((storage, file, frames, height) for file in files)
    for made in map_media(_sprite, items, workers=workers, timeout=timeout):
        if progress is not None:
            progress(1)
        yield made.reason if isinstance(made, Problem) else made.value


def _sprite(item: tuple[Storage, str, int, int]) -> Sprite:
    storage, file, count, height = item
    pictures = decode_frames(file, count, size=(height * 16 // 9, height), storage=storage).frames
    n, height, width, _ = pictures.shape
    picture = np.concatenate(list(pictures), axis=1)
    return Sprite(_small_enough(picture), n, width, height)


def _small_enough(picture: NDArray[np.uint8]) -> bytes:
    """A JPEG file in the best quality in which it is small, or in the lowest one."""
    for quality in _QUALITIES:
        jpeg = _jpeg(picture, quality)
        if len(jpeg) * _PIXELS_A_BYTE <= picture.size // 3:
            break
    return jpeg


def _jpeg(picture: NDArray[np.uint8], quality: int) -> bytes:
    """A JPEG file of an RGB picture, (height, width, 3)."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    frame = frame.reformat(
        format="yuvj420p", interpolation=_SCALING, dst_colorspace=_BT601, dst_color_range=_FULL_RANGE
    )
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    encoder.thread_count = 1
    encoder.qmin = encoder.qmax = quality
    encoder.options = {"flags": "+bitexact", "huffman": "optimal"}
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
