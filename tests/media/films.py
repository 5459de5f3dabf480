"""Films and images whose frames tell their number, and whether they are the right way up."""

import struct
import wave
from fractions import Fraction

import av
import numpy as np

MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""a, b, c, d of x' = a x + c y and y' = b x + d y for the values of EXIF's orientation."""


def picture(number, width=96, height=64):
    """Red and blue above; below, the number as eight bars, the highest bit at the left."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[: height // 2, : width // 2] = 255, 0, 0
    rgb[: height // 2, width // 2 :] = 0, 0, 255
    for bit in range(8):
        rgb[height // 2 :, bit * width // 8 : (bit + 1) * width // 8] = 255 if number >> (7 - bit) & 1 else 0
    return rgb


def number(rgb):
    """The number that a frame shows; fails if the frame is not the right way up."""
    height, width, _ = rgb.shape
    left, right = rgb[height // 4, width // 4].astype(int), rgb[height // 4, 3 * width // 4].astype(int)
    assert left[0] > 150 > left[2], f"above left is {left}, not red"
    assert right[2] > 150 > right[0], f"above right is {right}, not blue"
    bars = [rgb[3 * height // 4, (2 * bit + 1) * width // 16].mean() > 127 for bit in range(8)]
    return int("".join(str(int(bar)) for bar in bars), 2)


def numbers(decoded):
    return [number(frame) for frame in decoded.frames]


def film(
    path,
    codec,
    pictures,
    *,
    container=None,
    pix_fmt="yuv420p",
    rate=10,
    times=None,
    options=None,
    aspect=None,
    file_options=None,
):
    """Write a film; `times` are in milliseconds, else there are `rate` pictures a second."""
    height, width, _ = pictures[0].shape
    with av.open(str(path), "w", format=container, options=file_options or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for i, rgb in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pix_fmt)
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def mute(path):
    """An mp4 file of sound."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
    frame.sample_rate, frame.pts = 16000, 0
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def rewritten(path, into, **options):
    """Write the packets of a film into another file."""
    with av.open(path) as source, av.open(str(into), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return into


def image(path, codec, rgb, pix_fmt, container="image2"):
    height, width, channels = rgb.shape
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        frame = av.VideoFrame.from_ndarray(rgb, "rgba" if channels == 4 else "rgb24").reformat(format=pix_fmt)
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def sound(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    return str(path)


def as_stored(rgb, orientation):
    """What a camera stores so that it is seen as `rgb` when that orientation is applied to it."""
    a, b, c, d = MATRICES[orientation]
    height, width, _ = rgb.shape
    stored = np.zeros((width, height, 3) if a == 0 else rgb.shape, np.uint8)
    for y in range(stored.shape[0]):
        for x in range(stored.shape[1]):
            shown_x, shown_y = a * x + c * y, b * x + d * y
            stored[y, x] = rgb[
                shown_y if b + d > 0 else shown_y + height - 1, shown_x if a + c > 0 else shown_x + width - 1
            ]
    return stored


def with_display_matrix(data, orientation):
    """An mp4 file whose track header tells that orientation."""
    a, b, c, d = MATRICES[orientation]
    at = data.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


def with_exif(jpeg, orientation, order="<"):
    """A JPEG file with that orientation in EXIF."""
    tiff = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    tiff += struct.pack(order + "HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
