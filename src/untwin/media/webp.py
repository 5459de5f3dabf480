"""Animated WebP, which FFmpeg does not decode: its frames are taken out as still images and put together here.

After the WebP container specification, https://developers.google.com/speed/webp/docs/riff_container.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ALPHA = 0x10
_ANIMATION = 0x02
_LEAST_MS = 10
"""A frame that claims to be shorter is shown as long as browsers show it."""
_SHOWN_MS = 100
_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class Part:
    """A frame's part of the canvas: what it shows, where, for how long and how it is put on what was there before.

    Attributes:
        x: Of its left edge, in pixels.
        y: Of its upper edge.
        width: In pixels.
        height: In pixels.
        milliseconds: How long it is shown.
        blended: Whether its alpha lets through what was there; else it replaces that.
        cleared: Whether its rectangle is transparent when it has been shown.
        still: It as a WebP file of its own.
    """

    x: int
    y: int
    width: int
    height: int
    milliseconds: int
    blended: bool
    cleared: bool
    still: bytes


def is_animated(head: bytes) -> bool:
    """Whether a file with these first 21 bytes or more is an animated WebP."""
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & _ANIMATION)


def parts(data: bytes) -> tuple[int, int, list[Part]]:
    """Width and height of the canvas, and the frames that are whole; a file that is cut off has fewer of them."""
    width, height = _u24(data, 24) + 1, _u24(data, 27) + 1
    if width * height > _MOST_PIXELS:
        raise MemoryError
    return width, height, [_part(body) for name, body in _chunks(data, 12) if name == b"ANMF" and len(body) > 16]


def canvases(
    width: int, height: int, frames: list[Part], decode: Callable[[bytes], NDArray[np.uint8]]
) -> Iterator[NDArray[np.uint8]]:
    """What is seen at each frame, (height, width, 4) uint8; the array is the same one, and changes.

    Args:
        width: Of the canvas.
        height: Of it.
        frames: From `parts`.
        decode: A still WebP's pixels, (h, w, 4) uint8.
    """
    canvas = np.zeros((height, width, 4), np.uint8)
    for part in frames:
        place = canvas[part.y : part.y + part.height, part.x : part.x + part.width]
        pixels = decode(part.still)[: place.shape[0], : place.shape[1]]
        place = place[: pixels.shape[0], : pixels.shape[1]]
        place[:] = _over(pixels, place) if part.blended else pixels
        yield canvas
        if part.cleared:
            place[:] = 0


def _over(above: NDArray[np.uint8], below: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blending of colours that are not multiplied by their alpha."""
    alpha = above[..., 3:].astype(np.float32) / 255
    under = below[..., 3:].astype(np.float32) / 255 * (1 - alpha)
    whole = alpha + under
    colours = (above[..., :3] * alpha + below[..., :3] * under) / np.maximum(whole, 1e-6)
    return np.concatenate([np.rint(colours), np.rint(whole * 255)], axis=-1).astype(np.uint8)


def _part(body: bytes) -> Part:
    milliseconds, flags = _u24(body, 12), body[15]
    chunks = [(name, piece) for name, piece in _chunks(body, 16) if name in (b"ALPH", b"VP8 ", b"VP8L")]
    if any(name == b"ALPH" for name, _ in chunks):
        chunks.insert(0, (b"VP8X", bytes([_ALPHA, 0, 0, 0]) + body[6:12]))
    still = b"WEBP" + b"".join(
        name + struct.pack("<I", len(piece)) + piece + b"\0" * (len(piece) % 2) for name, piece in chunks
    )
    return Part(
        x=2 * _u24(body, 0),
        y=2 * _u24(body, 3),
        width=_u24(body, 6) + 1,
        height=_u24(body, 9) + 1,
        milliseconds=milliseconds if milliseconds > _LEAST_MS else _SHOWN_MS,
        blended=not flags & 2,
        cleared=bool(flags & 1),
        still=b"RIFF" + struct.pack("<I", len(still)) + still,
    )


def _chunks(data: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks from a position on; the last one only if it is whole."""
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        body = data[start + 8 : start + 8 + size]
        if len(body) < size:
            return
        yield data[start : start + 4], body
        start += 8 + size + size % 2


def _u24(data: bytes, start: int) -> int:
    return int.from_bytes(data[start : start + 3], "little")
