"""Frames of videos and images as arrays, with PyAV.

What runs here may crash, hang or take much memory on a hostile file: `workers` keeps that from the caller.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib.util
import io
import re
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from untwin.errors import MediaError, MissingExtraError, UntwinError
from untwin.media import webp
from untwin.storage.files import Storage, redact

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_FILMS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,mpeg1video,mpeg2video,m4v,h263,h264,hevc,vvc,av1,obu,ivf,flv,asf,"
    "ogg,mxf,dv,nut,rm,swf,gif,apng,yuv4mpegpipe,mjpeg,live_flv,wtv,dvr-ms,vob,3gp"
)
_IMAGES = "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe,gif_pipe,jpegxl_pipe,j2k_pipe,qoi_pipe"
_SOUNDS = "mp3,wav,w64,flac,aac,ac3,eac3,aiff,caf,au,amr,ape,wv,dts,loas,tta"
"""Known, so that a file of sound can be called one."""
_OPEN = {"format_whitelist": f"{_FILMS},{_IMAGES},{_SOUNDS}", "protocol_whitelist": "none"}
"""Without playlists and scripts, which name other files: a file of somebody else must not choose what is opened."""
_HEAD_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
"""Of a remote file at a time: what is between the wanted frames need not be read."""
_MOST_WEBP_BYTES = 64 << 20
_LOOK_AHEAD = 40
"""Packets; decoders reorder at most 16 frames."""
_LOOK_AHEAD_BYTES = 16 << 20
_SEEK_S = 1.0
"""A distance over which to decode on is about as fast as a seek that may lead nowhere."""
_BACK_S = 10.0
"""How much earlier a second seek begins, where the first one led behind what was sought."""
_NO_SEEKING = ("gif", "apng")
"""Formats without key frames."""
_REORDERED = ("h264", "hevc")
"""Codecs of which AVI, which knows only the order of decoding, does not tell when a frame is shown."""
_ATTACHED_PICTURE = 0x400
_ENCRYPTED = re.compile(rb"stsd.{12}(encv|drmi)", re.DOTALL)
"""Sample descriptions of encrypted pictures in MP4."""
_MOST_DESCRIBED_BYTES = 4 << 20
_HIGH_DEFINITION = 720
"""Rows from which on video that does not name its colours has those of BT.709, as players have it."""
_BT709, _BT601, _UNSPECIFIED, _FULL_RANGE = 1, 5, 2, 2
_SCALING = 0x20 | 0x2000 | 0x40000 | 0x80000
"""SWS_AREA, SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND and SWS_BITEXACT: the same pixels on every machine.

Without them FFmpeg 7 writes behind the end of rows of some widths.
"""
_MOST_ASPECT = Fraction(16)
Fit = Literal["inside", "crop", "stretch"]
Matrix = tuple[int, int, int, int]
"""a, b, c, d of x' = a x + c y and y' = b x + d y, with y downwards; each is -1, 0 or 1."""
_ORIENTATIONS: tuple[Matrix, ...] = (
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (-1, 0, 0, -1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, 1, -1, 0),
    (0, -1, -1, 0),
    (0, -1, 1, 0),
)
"""For the values 1 to 8 of the orientation in EXIF."""


@dataclass(frozen=True)
class Decoded:
    """Frames of a video or an image, and what is known about it.

    Attributes:
        frames: (n, height, width, 3) uint8, RGB.
        width: Of the file's pictures after rotation, in pixels as stored.
        height: Of them.
        fps: Frames per second on average; None for an image, or if it is not known.
        duration_s: Seconds; None for an image.
        codec: FFmpeg's name of it.
        n_frames: Of the file; None if they were not counted.
        bitrate: Bits per second of the pictures, or of the file; None if it is not known.
    """

    frames: NDArray[np.uint8]
    width: int
    height: int
    fps: float | None
    duration_s: float | None
    codec: str
    n_frames: int | None
    bitrate: int | None


def require() -> None:
    """Raise MissingExtraError if PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        raise MissingExtraError("videos and images need PyAV, which is not installed: pip install 'untwin[video]'")


def frames(
    file: str | BinaryIO,
    count: int,
    *,
    size: int | tuple[int, int],
    fit: Fit = "inside",
    storage: Storage | None = None,
) -> Decoded:
    """Decode evenly spaced frames of a video: those shown in the middle of `count` equal parts of it.

    A frame that is shown in the middle of several parts comes once, so a short video gives fewer. An image gives one.
    Rotation, mirroring and the shape of the pixels are applied; transparency shows white.

    Args:
        file: A path or URL, or a file open for reading at any position, which stays open.
        count: At least 1.
        size: Longest side, or width and height, that frames must fit into, in pixels; they are never enlarged.
        fit: `inside` that size, never enlarged; `crop`: frames of exactly that size (a square for a number), the middle
            of the picture; `stretch`: exactly that size, the whole picture, whatever its shape.
        storage: Access to a path.

    Raises:
        MediaError: No video or image, or too little of it can be decoded; says why.
        MemoryError: A picture is too large.
        MissingExtraError: PyAV is not installed.
        UntwinError: A remote storage cannot be used.
    """
    require()
    box = (size, size) if isinstance(size, int) else size
    if not isinstance(file, str):
        return _explained(getattr(file, "name", "a file"), file, count, box, fit)
    try:
        source = (storage or Storage()).open(file, block_size=_BLOCK_BYTES)
    except FileNotFoundError as error:
        raise MediaError(redact(file), "is not there") from error
    except UntwinError:
        raise
    except (OSError, UnicodeError) as error:
        raise MediaError(redact(file), f"cannot be opened ({error})") from error
    with source:
        return _explained(file, source, count, box, fit)


def _explained(name: str, file: BinaryIO, count: int, box: tuple[int, int], fit: Fit) -> Decoded:
    try:
        head = _head(file)
        if webp.is_animated(head):
            return _animated_webp(file, count, box, fit)
        if head[4:8] == b"ftyp" and _is_encrypted(file):
            raise _UnusableError("is encrypted")
        with contextlib.closing(_Reader(file)) as reader:
            return _decoded(reader, head, count, box, fit)
    except _UnusableError as error:
        raise MediaError(redact(name), str(error)) from error
    except _damage() as error:
        raise MediaError(redact(name), f"cannot be decoded ({_said(error)})") from error


class _UnusableError(Exception):
    """Why a file gives no frames."""


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    head = bytes(file.read(_HEAD_BYTES))
    if not head:
        raise _UnusableError("is empty")
    if not any(head):
        raise _UnusableError("begins with zeros only")
    return head


def _is_encrypted(file: BinaryIO) -> bool:
    """Whether the beginning of an MP4 file's index says so; FFmpeg decodes what is encrypted to noise."""
    at, end = 0, file.seek(0, io.SEEK_END)
    while at + 8 <= end:
        file.seek(at)
        size, kind, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        if kind == b"moov":
            return _ENCRYPTED.search(file.read(_MOST_DESCRIBED_BYTES)) is not None
        size = long if size == 1 else size
        if size < 8:
            return False
        at += size
    return False


def _decoded(reader: _Reader, head: bytes, count: int, box: tuple[int, int], fit: Fit) -> Decoded:
    chosen = reader.evenly(count)
    matrix = _exif_orientation(head) or _matrix(chosen[0])
    width, height = chosen[0].width, chosen[0].height
    stream = reader.stream
    return Decoded(
        frames=_pictures(chosen, matrix, _aspect(stream), box, fit),
        width=height if matrix[0] == 0 else width,
        height=width if matrix[0] == 0 else height,
        fps=None if reader.is_still else reader.fps,
        duration_s=None if reader.is_still else float(reader.duration * reader.base),
        codec=stream.codec_context.name,
        n_frames=reader.n_frames,
        bitrate=None if reader.is_still else stream.bit_rate or reader.container.bit_rate or None,
    )


class _Source:
    """A file as PyAV takes it.

    It has no name, in which FFmpeg could see a pattern, and damaged files may seek behind its end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, io.SEEK_END)
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= self._at < self._end:
            return b""
        self._file.seek(self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


class _Timed(NamedTuple):
    """A frame and when it is shown."""

    time: int
    frame: VideoFrame


class _Reader:
    """The video stream of a file, and how far it is decoded. Times are in units of the stream's time base."""

    container: InputContainer
    stream: VideoStream

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._open()
        self.base = self.stream.time_base or Fraction(1, 1000)
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.fps = float(rate) if rate else None
        self._step = max(1, round(1 / (rate or 25) / self.base))
        self._start = self.stream.start_time or 0
        self.duration = self._claimed_duration()
        self.n_frames: int | None = self.stream.frames or None
        name = self.container.format.name
        self._seeks = name not in _NO_SEEKING
        """Whether a seek may lead to where a frame is sooner than decoding on."""
        self.is_still = name.endswith("_pipe") or (name in _NO_SEEKING and self.n_frames == 1)
        self._damage = ""
        self._timed = name != "avi" or self.stream.codec_context.name not in _REORDERED
        """Whether packets say when they are shown."""
        if name == "avi":
            self._look_ahead()
            self._start = self._times[0] if self._timed and self._times else 0
            self._seeks = self._timed

    def _open(self) -> None:
        import av

        try:
            self.container = av.open(_Source(self._file), "r", options=dict(_OPEN), metadata_errors="replace")
        except av.error.EOFError as error:
            raise _UnusableError("is cut off at its beginning") from error
        except av.error.FFmpegError as error:
            _said(error)
            raise _UnusableError("is no video or image of a known format, or is damaged at its beginning") from error
        try:
            self.stream = _stream(self.container)
        except BaseException:
            self.close()
            raise
        self.stream.codec_context.thread_count = 1
        self.stream.codec_context.thread_type = "NONE"
        self._begin()

    def _begin(self) -> None:
        """Start decoding where the container is."""
        self._packets: Iterator[Packet[VideoStream]] | None = self.container.demux(self.stream)
        self._ahead: deque[Packet[VideoStream]] = deque()
        self._times: list[int] = []
        """When packets around the next one are shown, ascending."""
        self._decoded: deque[VideoFrame] = deque()
        self._next_shown: _Timed | None = None
        self._shown: _Timed | None = None
        """What is shown at the last time that was asked for."""
        self._last_dts = self._clock = 0
        self._ended = False

    def close(self) -> None:
        """Let go of the decoder; the file stays open."""
        self.container.close()

    def _claimed_duration(self) -> int:
        """What the stream or the container says; 0 if neither does, or if that makes no sense."""
        duration = self.stream.duration or 0
        if duration <= 0:
            with contextlib.suppress(ValueError):
                hours, minutes, seconds = self.stream.metadata.get("DURATION", "").split(":")
                duration = int((int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)) / self.base)
        if duration <= 0:
            duration = int(Fraction(self.container.duration or 0, 1_000_000) / self.base)
        return max(duration, 0)

    def _measure(self) -> None:
        """Set the duration and the number of frames by reading all packets."""
        times: list[int] = []
        length = self._step
        self.n_frames = 0
        with contextlib.suppress(_damage()):
            for packet in self.container.demux(self.stream):
                if packet.size:
                    self.n_frames += 1
                    length = packet.duration or length
                    if packet.pts is not None:
                        times += packet.pts, packet.pts + length
                        times = [min(times), max(times)]
        if times:
            self._start, self.duration = times[0], times[1] - times[0]
        else:
            self._step, self.fps = length, float(1 / (length * self.base))
            self.duration = self.n_frames * length
            self._seeks = self._timed = False
        self.is_still = self.is_still or (self.container.format.name in _NO_SEEKING and self.n_frames == 1)
        self.close()
        self._open()

    def evenly(self, count: int) -> list[VideoFrame]:
        """The frames in the middle of `count` equal parts, each once; the first one of an image."""
        if self.is_still:
            self.n_frames, count = 1, 1
        elif not self.duration:
            self._measure()
        chosen = self._choose(count)
        if not chosen:
            why = f" ({self._damage})" if self._damage else ""
            raise _UnusableError(f"no picture can be decoded{why}")
        end = self._clock - self._start
        if self._ended and not self.is_still and end <= self.duration * (2 * count - 1) // (2 * count):
            # the pictures end before the last time that was asked for
            if 2 * end < self.duration:
                got, wanted = float(end * self.base), float(self.duration * self.base)
                raise _UnusableError(f"pictures can be decoded for {got:.1f} of {wanted:.1f} s only")
            self.duration = end
            self.close()
            self._open()
            chosen = self._choose(count)
        if self._damage and 2 * len(chosen) < min(count, self.n_frames or count):
            raise _UnusableError(f"{len(chosen)} of {count} frames can be decoded only ({self._damage})")
        return chosen

    def _choose(self, count: int) -> list[VideoFrame]:
        times = [self._start + (2 * i + 1) * self.duration // (2 * count) for i in range(count)]
        chosen: dict[int, VideoFrame] = {}
        for time in times:
            if (shown := self._at(time, times)) is not None:
                chosen[shown.time] = shown.frame
        return [chosen[time] for time in sorted(chosen)]

    def _at(self, time: int, times: list[int]) -> _Timed | None:
        """The frame that is shown at a time, the first one if that is later; None if there is none.

        Args:
            time: Not before the last one that was asked for.
            times: All that are asked for; frames that none needs may be left out.
        """
        if self._is_worth_seeking(time):
            self._seek(time, times)
        while self._shown is None or self._shown.time <= time:
            self._next_shown = self._next_shown or self._next(times)
            if self._next_shown is None:
                self._ended = True
                break
            if self._shown is not None and self._next_shown.time > time:
                break
            self._shown, self._next_shown = self._next_shown, None
        return self._shown

    def _is_worth_seeking(self, time: int) -> bool:
        """Whether there is a key frame before that time which is not reached yet, or may be."""
        if not self._seeks:
            return False
        index: Any = getattr(self.stream, "index_entries", ())
        if self.n_frames and len(index) >= self.n_frames:
            entry = index.search_timestamp(time)
            return bool(entry > 0 and index[entry].timestamp > self._last_dts)
        reached = self._start if self._shown is None else self._shown.time
        return (time - reached) * self.base > _SEEK_S

    def _seek(self, time: int, times: list[int]) -> None:
        """Go to the key frame before a time, or to the beginning where that does not work."""
        shown = self._shown
        for back in (0, int(_BACK_S / self.base)):
            with contextlib.suppress(_damage()):
                self.container.seek(max(time - back, self._start), stream=self.stream)
                self._begin()
                self._next_shown = self._next(times)
                if self._next_shown is not None and self._next_shown.time <= time:
                    # if there is no key frame in between, it is not tried again
                    self._seeks = shown is None or self._next_shown.time > shown.time
                    return
        self._seeks = False
        self.close()
        self._open()

    def _next(self, times: list[int]) -> _Timed | None:
        """The next frame that is not damaged; None at the end. Frames that none of `times` needs may be left out."""
        while self._decoded or self._decode(times):
            if not self._decoded:
                continue
            frame = self._decoded.popleft()
            time = frame.pts if self._timed and frame.pts is not None else self._clock
            length = getattr(frame, "duration", 0) if self._timed else 0
            self._clock = max(self._clock, time + (length or self._step))
            if not frame.is_corrupt:
                return _Timed(time, frame)
            self._damage = self._damage or "damaged pictures"
        return None

    def _decode(self, times: list[int]) -> bool:
        """Decode one packet; False if there is none."""
        self._look_ahead()
        if not self._ahead:
            return False
        packet = self._ahead.popleft()
        context = self.stream.codec_context
        context.skip_frame = "DEFAULT" if self._is_needed(packet, times) else "NONREF"
        if packet.dts is not None:
            self._last_dts = packet.dts
        try:
            self._decoded.extend(packet.decode())
        except _damage() as error:
            self._damage = _said(error)
        return True

    def _look_ahead(self) -> None:
        """Read packets until enough are there to know in which order they are shown."""
        while self._packets is not None and len(self._ahead) < _LOOK_AHEAD:
            if len(self._ahead) > 1 and sum(packet.size for packet in self._ahead) > _LOOK_AHEAD_BYTES:
                return
            try:
                packet = next(self._packets, None)
            except _damage() as error:
                self._damage, packet = _said(error), None
            if packet is None:
                self._packets = None
                return
            self._ahead.append(packet)
            if packet.pts is not None:
                bisect.insort(self._times, packet.pts)
                del self._times[: -4 * _LOOK_AHEAD]

    def _is_needed(self, packet: Packet[VideoStream], times: list[int]) -> bool:
        """Whether a packet may hold what is shown at one of the times; else it is decoded only for others' sake."""
        if packet.pts is None or not self._timed:
            return True
        after = bisect.bisect_right(self._times, packet.pts)
        asked = bisect.bisect_left(times, packet.pts)
        return asked < len(times) and (after == len(self._times) or times[asked] < self._times[after])


def _stream(container: InputContainer) -> VideoStream:
    """The stream of moving pictures, or of the picture of an image."""
    films = [
        stream for stream in container.streams.video if not int(getattr(stream, "disposition", 0)) & _ATTACHED_PICTURE
    ]
    if not films:
        raise _UnusableError("holds sound and no pictures" if container.streams.audio else "holds no pictures")
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    context: Any = stream.codec_context
    if context is None:
        raise _UnusableError("uses a codec that cannot be decoded")
    return stream


def _damage() -> type[Exception]:
    """What PyAV raises about the data, rather than about the storage that they come from."""
    import av

    return av.error.FFmpegError


def _said(error: Exception) -> str:
    """The reason in FFmpeg's words; a lack of memory is raised again."""
    if not isinstance(error, MemoryError):
        return str(getattr(error, "strerror", error))
    raise error


def _aspect(stream: VideoStream) -> Fraction:
    """Width of a pixel by its height; 1 where that makes no sense."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return aspect if 1 / _MOST_ASPECT <= aspect <= _MOST_ASPECT else Fraction(1)


def _matrix(frame: VideoFrame) -> Matrix:
    """How a video's display matrix turns and mirrors its frames, to the next quarter turn."""
    data: Any = None
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except (ValueError, KeyError):  # PyAV meets a kind of side data that it does not know
        if turns := round(frame.rotation / 90) % 4:
            return _ORIENTATIONS[(0, 7, 2, 5)[turns]]
    if data is None:
        return _ORIENTATIONS[0]
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def _exif_orientation(head: bytes) -> Matrix | None:
    """The orientation that EXIF in the beginning of a JPEG file tells: PyAV passes on that of no mirrored picture."""
    at = head.find(b"Exif\0\0", 0, 1 << 12) + 6 if head[:2] == b"\xff\xd8" else 5
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[at : at + 4])
    if at == 5 or order is None:
        return None
    with contextlib.suppress(struct.error):
        (directory,) = struct.unpack_from(order + "I", head, at + 4)
        (entries,) = struct.unpack_from(order + "H", head, at + directory)
        for entry in range(min(entries, 100)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", head, at + directory + 2 + 12 * entry)
            if (tag, kind) == (0x112, 3) and 1 <= value <= 8:
                return _ORIENTATIONS[value - 1]
    return None


def _pictures(
    frames: list[VideoFrame], matrix: Matrix, aspect: Fraction, box: tuple[int, int], fit: Fit
) -> NDArray[np.uint8]:
    """Scale, turn and crop frames; (n, height, width, 3). All get the shape of the first one."""
    turned = matrix[0] == 0
    width, height = frames[0].width * aspect, Fraction(frames[0].height)
    wide, high = box[::-1] if turned else box
    scale = max(wide / width, high / height) if fit == "crop" else min(wide / width, high / height, Fraction(1))
    size = (wide, high) if fit == "stretch" else (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [_turn(_rgb(frame, *size), matrix) for frame in frames]
    if fit == "crop":
        top, left = (pictures[0].shape[0] - box[1]) // 2, (pictures[0].shape[1] - box[0]) // 2
        pictures = [picture[top : top + box[1], left : left + box[0]] for picture in pictures]
    return np.stack(pictures)


def _turn(picture: NDArray[np.uint8], matrix: Matrix) -> NDArray[np.uint8]:
    a, b, c, d = matrix
    if a == 0:
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[::d, ::a]


def _rgb(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """Scale a frame and convert it to RGB, (height, width, 3); what is transparent becomes white."""
    parts = frame.format.components
    seen_through = frame.format.name.startswith("pal") or any(part.is_alpha for part in parts)
    options: dict[str, Any] = {"interpolation": _SCALING}
    if frame.color_range != _FULL_RANGE:  # else PyAV 14 would take it for limited
        options["dst_color_range"] = _FULL_RANGE
    if not frame.format.is_rgb:
        if frame.colorspace == _UNSPECIFIED:
            options["src_colorspace"] = _BT709 if frame.height >= _HIGH_DEFINITION else _BT601
        if frame.color_range:
            options["src_color_range"] = frame.color_range
    shown = frame.reformat(width, height, "rgba" if seen_through else "rgb24", **options, **_one_thread())
    pixels = np.asarray(shown.to_ndarray(), np.uint8)
    if not seen_through:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


@functools.cache
def _one_thread() -> dict[str, int]:
    """What keeps PyAV from scaling with threads, where it knows them."""
    import av

    try:
        av.VideoFrame(2, 2, "rgb24").reformat(format="rgba", threads=1)
    except TypeError:
        return {}
    return {"threads": 1}


def _animated_webp(file: BinaryIO, count: int, box: tuple[int, int], fit: Fit) -> Decoded:
    file.seek(0)
    data = bytes(file.read(_MOST_WEBP_BYTES + 1))
    if len(data) > _MOST_WEBP_BYTES:
        raise _UnusableError(f"is an animated WebP of more than {_MOST_WEBP_BYTES >> 20} MiB")
    width, height, parts = webp.parts(data)
    if not parts:
        raise _UnusableError("is cut off before the end of its first picture")
    starts = np.cumsum([0, *(part.milliseconds for part in parts)])
    duration = float(starts[-1]) / 1000
    middles = (2 * np.arange(count) + 1) * starts[-1] // (2 * count)
    wanted = set(np.searchsorted(starts, middles, side="right") - 1)
    import av

    shown = [
        av.VideoFrame.from_ndarray(canvas, "rgba")
        for i, canvas in enumerate(webp.canvases(width, height, parts[: max(wanted) + 1], _still))
        if i in wanted
    ]
    return Decoded(
        frames=_pictures(shown, _ORIENTATIONS[0], Fraction(1), box, fit),
        width=width,
        height=height,
        fps=len(parts) / duration if len(parts) > 1 else None,
        duration_s=duration if len(parts) > 1 else None,
        codec="webp",
        n_frames=len(parts),
        bitrate=int(8 * len(data) / duration) if len(parts) > 1 else None,
    )


def _still(data: bytes) -> NDArray[np.uint8]:
    """All pixels of a WebP file without animation, (height, width, 4)."""
    with contextlib.closing(_Reader(io.BytesIO(data))) as reader:
        (frame,) = reader.evenly(1)
        return np.asarray(frame.reformat(format="rgba", interpolation=_SCALING, **_one_thread()).to_ndarray(), np.uint8)
