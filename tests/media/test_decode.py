"""Frames of films and images: which ones, which way up, in which colours; and what is no film."""

import importlib.util
import io
from pathlib import Path

import films
import numpy as np
import pytest

from untwin.errors import MediaError, MissingExtraError
from untwin.media import decode
from untwin.media.decode import frames

av = pytest.importorskip("av")

N = 100
X264 = {"g": "25", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"}
KINDS = {
    "mp4": ("libx264", "mp4", "yuv420p", X264),
    "one key frame": ("libx264", "mp4", "yuv420p", {**X264, "g": "1000"}),
    "mpeg4 in mp4": ("mpeg4", "mp4", "yuv420p", {"g": "20", "bf": "2", "b": "800k"}),
    "fragmented": ("libx264", "mp4", "yuv420p", X264),
    "mkv": ("libx264", "matroska", "yuv420p", X264),
    "mkv with one key frame": ("libx264", "matroska", "yuv420p", {**X264, "g": "1000"}),
    "webm": ("libvpx-vp9", "webm", "yuv420p", {"g": "30", "b": "300k", "deadline": "realtime", "cpu-used": "8"}),
    "avi": ("mpeg4", "avi", "yuv420p", {"g": "20", "bf": "2", "b": "800k"}),
    "h264 in avi": ("libx264", "avi", "yuv420p", X264),
    "ts": ("libx264", "mpegts", "yuv420p", X264),
    "10 bit": ("libx264", "mov", "yuv420p10le", X264),
    "hevc": ("libx265", "mp4", "yuv420p", {"x265-params": "log-level=none:keyint=25", "preset": "ultrafast"}),
    "raw": ("libx264", "h264", "yuv420p", X264),
    "gif": ("gif", "gif", "rgb8", {}),
    "webp": ("libwebp_anim", "webp", "bgra", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def made(folder):
    """Paths of films of 100 frames in 10 s, made when they are first wanted."""
    paths = {}

    def make(kind):
        if kind not in paths:
            codec, container, pix_fmt, options = KINDS[kind]
            pictures = [films.picture(i) for i in range(N)]
            path = folder / f"{kind}.{container}"
            flags = {"movflags": "frag_keyframe+empty_moov"} if kind == "fragmented" else {}
            paths[kind] = films.film(
                path, codec, pictures, container=container, pix_fmt=pix_fmt, options=options, file_options=flags
            )
        return paths[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 4, 8, 40])
def test_the_frames_are_those_in_the_middle_of_equal_parts(made, kind, count):
    decoded = frames(made(kind), count, size=96)
    assert films.numbers(decoded) == [int((i + 0.5) * N / count) for i in range(count)]
    assert (decoded.width, decoded.height) == (96, 64)
    assert decoded.fps == pytest.approx(10, rel=0.01)
    assert decoded.duration_s == pytest.approx(10, rel=0.02)
    assert decoded.n_frames in (None, N)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "one key frame", "h264 in avi"])
def test_leaving_out_frames_on_the_way_changes_no_pixel(made, kind, monkeypatch):
    quick = frames(made(kind), 7, size=96)
    monkeypatch.setattr(decode._Reader, "_is_needed", lambda *_: True)
    monkeypatch.setattr(decode._Reader, "_is_worth_seeking", lambda *_: False)
    assert np.array_equal(quick.frames, frames(made(kind), 7, size=96).frames)


def test_a_seek_and_frames_left_out_spare_decoding(made, monkeypatch):
    decoded = []
    whole = decode._Reader._next

    def counting(reader, times):
        decoded.append(None)
        return whole(reader, times)

    monkeypatch.setattr(decode._Reader, "_next", counting)
    frames(made("mp4"), 2, size=96)
    assert len(decoded) < N / 4


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_of_uneven_frames_the_one_that_is_shown_is_chosen(folder, container):
    rng = np.random.default_rng(5)
    times = np.cumsum(rng.integers(20, 900, 60)).tolist()
    times = [time - times[0] for time in times]
    path = films.film(
        folder / f"uneven.{container}", "libx264", [films.picture(i) for i in range(60)],
        container=container, times=times, options=X264,
    )  # fmt: skip
    decoded = frames(path, 9, size=96)
    middles = [(i + 0.5) * decoded.duration_s * 1000 / 9 for i in range(9)]
    assert films.numbers(decoded) == [int(np.searchsorted(times, middle, side="right")) - 1 for middle in middles]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_film_of_few_frames_gives_each_once(folder, n):
    for container, codec in (("mp4", "libx264"), ("matroska", "mpeg4"), ("gif", "gif")):
        path = films.film(
            folder / f"{n}.{container}", codec, [films.picture(i) for i in range(n)],
            container=container, pix_fmt="rgb8" if codec == "gif" else "yuv420p",
        )  # fmt: skip
        assert films.numbers(frames(path, 8, size=96)) == list(range(n)), container


def test_a_film_without_a_duration_is_measured(folder, made):
    data = Path(made("mkv")).read_bytes()
    assert data.count(b"\x44\x89\x88") == 1
    # Duration, a float of 8 bytes, becomes a void element of the same length; the tag gets another name
    data = data.replace(b"\x44\x89\x88", b"\xec\x89\x00").replace(b"DURATION", b"DURATIOM")
    decoded = frames(io.BytesIO(data), 4, size=96)
    assert films.numbers(decoded) == [12, 37, 62, 87]
    assert decoded.n_frames == N
    assert decoded.duration_s == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("orientation", films.MATRICES)
def test_films_are_turned_and_mirrored_as_their_display_matrix_says(folder, orientation):
    stored = [films.as_stored(films.picture(i), orientation) for i in range(4)]
    path = films.film(folder / f"turned{orientation}.mp4", "libx264", stored)
    decoded = frames(io.BytesIO(films.with_display_matrix(Path(path).read_bytes(), orientation)), 2, size=96)
    assert films.numbers(decoded) == [1, 3]
    assert (decoded.width, decoded.height) == (96, 64)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", films.MATRICES)
def test_photographs_are_turned_and_mirrored_as_exif_says(folder, orientation, order):
    path = films.image(folder / "turned.jpg", "mjpeg", films.as_stored(films.picture(77), orientation), "yuvj420p")
    decoded = frames(io.BytesIO(films.with_exif(Path(path).read_bytes(), orientation, order)), 4, size=96)
    assert films.numbers(decoded) == [77]
    assert (decoded.width, decoded.height) == (96, 64)


IMAGES = {
    "jpg": ("mjpeg", "yuvj420p", "image2"),
    "png": ("png", "rgb24", "image2"),
    "bmp": ("bmp", "bgr24", "image2"),
    "tiff": ("tiff", "rgb24", "image2"),
    "webp": ("libwebp", "yuv420p", "webp"),
    "gif": ("gif", "rgb8", "gif"),
}


@pytest.mark.parametrize("ending", IMAGES)
def test_an_image_gives_its_one_frame(folder, ending):
    codec, pix_fmt, container = IMAGES[ending]
    path = films.image(folder / f"image.{ending}", codec, films.picture(201), pix_fmt, container)
    decoded = frames(path, 4, size=96)
    assert films.numbers(decoded) == [201]
    assert (decoded.n_frames, decoded.duration_s, decoded.fps) == (1, None, None)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("png", "rgba"), ("libwebp", "bgra"), ("libwebp", "yuva420p")])
def test_what_is_transparent_is_white(folder, codec, pix_fmt):
    rgba = np.full((64, 96, 4), 255, np.uint8)
    rgba[:, :48] = 200, 0, 0, 0
    rgba[:, 48:] = 0, 0, 200, 255
    path = films.image(folder / f"glass.{codec}", codec, rgba, pix_fmt, "image2" if codec == "png" else "webp")
    picture = frames(path, 1, size=96).frames[0].astype(int)
    assert np.abs(picture[:, :40] - 255).max() <= 3
    assert np.abs(picture[:, 56:] - (0, 0, 200)).max() <= 6


def test_frames_of_an_animation_are_put_on_those_before(folder):
    """The encoder stores only what changes: here a small square on a picture that stays."""
    pictures = []
    for i in range(8):
        rgb = films.picture(200)
        rgb[4:12, 4 + 8 * i : 12 + 8 * i] = 0, 255, 0
        pictures.append(rgb)
    path = films.film(folder / "square.webp", "libwebp_anim", pictures, container="webp", pix_fmt="bgra")
    decoded = frames(path, 8, size=96)
    assert len(decoded.frames) == 8
    for i, frame in enumerate(decoded.frames):
        assert films.number(frame) == 200
        green = [frame[8, 8 + 8 * j, 1] > 150 for j in range(8)]
        assert green == [j == i for j in range(8)]


@pytest.mark.parametrize(
    ("shape", "aspect", "size", "fit", "expected"),
    [
        ((64, 96), None, 48, "inside", (32, 48)),
        ((64, 96), None, (48, 16), "inside", (16, 24)),
        ((64, 96), None, 500, "inside", (64, 96)),
        ((64, 96), None, 32, "crop", (32, 32)),
        ((64, 96), None, (200, 100), "crop", (100, 200)),
        ((64, 96), None, (20, 30), "stretch", (30, 20)),
        ((64, 96), "2", 96, "inside", (32, 96)),
        ((64, 96), "1/2", 96, "inside", (64, 48)),
        ((65, 97), None, 500, "inside", (65, 97)),
        ((64, 2), None, 32, "inside", (32, 1)),
    ],
)
def test_frames_have_the_shape_that_is_asked_for(folder, shape, aspect, size, fit, expected):
    height, width = shape
    path = films.film(
        folder / f"shape{height}x{width}-{(aspect or '').replace('/', '-')}.mp4", "libx264",
        [films.picture(i, width, height) for i in range(4)], pix_fmt="yuv444p", aspect=aspect,
    )  # fmt: skip
    decoded = frames(path, 2, size=size, fit=fit)
    assert decoded.frames.shape == (2, *expected, 3)
    assert decoded.frames.dtype == np.uint8
    if width > 8 and fit == "inside":
        assert films.numbers(decoded) == [1, 3]


def test_a_crop_is_the_middle(folder):
    rgb = np.zeros((64, 128, 3), np.uint8)
    rgb[:, 32:96] = 0, 255, 0
    path = films.image(folder / "middle.png", "png", rgb, "rgb24")
    assert (frames(path, 1, size=64, fit="crop").frames == (0, 255, 0)).all()


BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


@pytest.mark.parametrize(
    ("height", "colorspace", "color_range", "meant"),
    [(96, 1, 1, BT709), (96, 6, 1, BT601), (96, 2, 0, BT601), (720, 2, 0, BT709), (96, 1, 2, BT709)],
)
def test_colours_are_those_that_the_film_means(folder, height, colorspace, color_range, meant):
    color = np.array([30, 160, 90])
    red, blue = meant
    y = color @ (red, 1 - red - blue, blue)
    cb, cr = (color[2] - y) / (2 - 2 * blue), (color[0] - y) / (2 - 2 * red)
    full = color_range == 2
    planes = (y, 128 + cb, 128 + cr) if full else (16 + y * 219 / 255, 128 + cb * 224 / 255, 128 + cr * 224 / 255)
    frame = av.VideoFrame(64, height, "yuv444p")
    for plane, value in zip(frame.planes, planes, strict=True):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    frame.colorspace, frame.color_range = colorspace, color_range
    path = folder / "colour.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    picture = frames(str(path), 1, size=32).frames[0].astype(int)
    assert np.abs(picture - color).max() <= 3


@pytest.mark.parametrize(
    "name", ["%03d.mp4", "a:b.mp4", "http:--x.mp4", "-i.mp4", "pipe:0", "ü 漢\n'\".mp4", "concat:a|b"]
)
def test_a_name_is_only_a_name(folder, made, name):
    path = folder / name
    path.write_bytes(Path(made("mp4")).read_bytes())
    assert films.numbers(frames(str(path), 1, size=96)) == [50]


def test_an_open_file_stays_open(made):
    with Path(made("mp4")).open("rb") as file:
        first = frames(file, 2, size=96)
        assert np.array_equal(first.frames, frames(file, 2, size=96).frames)


def test_a_cut_off_end_is_done_without_if_most_is_there(folder, made):
    for kind in ("mkv", "ts", "avi", "mp4"):
        path = (
            films.rewritten(made(kind), folder / "index-first.mp4", movflags="faststart")
            if kind == "mp4"
            else made(kind)
        )
        data = Path(path).read_bytes()
        decoded = frames(io.BytesIO(data[: int(len(data) * 0.8)]), 4, size=96)
        shown = films.numbers(decoded)
        assert len(shown) == 4, kind
        assert 6 <= decoded.duration_s <= 10, kind
        assert shown == sorted(shown), kind
        assert max(abs(n - (i + 0.5) * decoded.duration_s * 10 / 4) for i, n in enumerate(shown)) <= 1, kind


def test_a_film_of_which_little_is_left_is_refused_with_how_much(made):
    data = Path(made("mkv")).read_bytes()
    with pytest.raises(MediaError, match=r"pictures can be decoded for \d\.\d of 10\.0 s only"):
        frames(io.BytesIO(data[: int(len(data) * 0.3)]), 4, size=96)


def test_damage_in_the_middle_costs_no_frame_before_it(made):
    data = bytearray(Path(made("one key frame")).read_bytes())
    middle = (data.index(b"mdat") + data.index(b"moov")) // 2
    data[middle : middle + 150] = bytes(150)
    decoded = frames(io.BytesIO(bytes(data)), 4, size=96)
    assert films.number(decoded.frames[0]) == 12
    assert len(decoded.frames) >= 2


@pytest.fixture(scope="module")
def useless(folder, made):
    """Files that hold no pictures, and what is said about them."""
    films.rewritten(made("mp4"), folder / "encrypted.mp4", **_ENCRYPTION)
    films.mute(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    (folder / "zeros.mp4").write_bytes(bytes(5000))
    (folder / "text.mp4").write_text("This is no film.\n" * 100)
    (folder / "head.mp4").write_bytes(Path(made("mp4")).read_bytes()[:2000])
    (folder / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(20000))
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{made('ts')}\n#EXT-X-ENDLIST\n")
    (folder / "list.txt").write_text(f"ffconcat version 1.0\nfile '{made('mp4')}'\n")
    films.sound(folder / "sound.wav")
    return {
        "empty.mp4": "is empty",
        "zeros.mp4": "begins with zeros",
        "text.mp4": "no video or image",
        "head.mp4": "no video or image",
        "noise.mp4": "no video or image|no picture|sound and no pictures",
        "list.m3u8": "no video or image",
        "list.txt": "no video or image",
        "sound.wav": "sound and no pictures",
        "sound.mp4": "sound and no pictures",
        "encrypted.mp4": "is encrypted",
        "missing.mp4": "is not there",
        "": "cannot be opened",
    }


_ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "00112233445566778899aabbccddeeff",
}


def test_a_file_without_pictures_is_refused_with_the_reason(folder, useless):
    for name, reason in useless.items():
        with pytest.raises(MediaError, match=reason) as caught:
            frames(str(folder / name), 4, size=96)
        assert str(caught.value) == f"{folder / name}: {caught.value.reason}"


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"untwin\[video\]"):
        frames("any.mp4", 1, size=96)
