"""Thumbnails of files: their pictures, and the reason where there is none."""

import importlib.util
import io
import zipfile

import films
import numpy as np
import pytest

from untwin.errors import MissingExtraError
from untwin.media.strips import Sprite, strips
from untwin.storage.files import Storage

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    pictures = [films.picture(i, 320, 180) for i in range(60)]
    (folder / "broken.mp4").write_text("nothing")
    return [
        films.film(folder / "film.mp4", "libx264", pictures),
        str(folder / "broken.mp4"),
        films.film(folder / "preview.webp", "libwebp_anim", pictures[:8], container="webp", pix_fmt="bgra"),
        films.image(folder / "image.jpg", "mjpeg", films.picture(99, 320, 180), "yuvj420p"),
        str(folder / "missing.mp4"),
        films.film(folder / "tall.mkv", "libx264", [films.picture(i, 180, 320) for i in range(60)]),
        films.sound(folder / "sound.wav"),
        films.film(folder / "short.mp4", "libx264", pictures[:1]),
    ]


@pytest.fixture(scope="module")
def made(files):
    return list(strips(Storage(), files, workers=2))


def _shown(sprite):
    """Numbers of the frames of a sprite."""
    with av.open(io.BytesIO(sprite.jpeg)) as file:
        (frame,) = file.decode(video=0)
        picture = frame.to_ndarray(format="rgb24")
    assert picture.shape == (sprite.height, sprite.frames * sprite.width, 3)
    return [films.number(piece) for piece in np.split(picture, sprite.frames, axis=1)]


def test_each_file_has_its_frames_or_the_reason_in_the_order_of_the_files(made):
    film, broken, preview, image, missing, tall, sound, short = made
    assert _shown(film) == [7, 22, 37, 52]
    assert "no video or image" in broken
    assert _shown(preview) == [1, 3, 5, 7]
    assert _shown(image) == [99]
    assert missing == "is not there"
    assert _shown(tall) == [7, 22, 37, 52]
    assert sound == "holds sound and no pictures"
    assert _shown(short) == [0]
    assert (film.width, film.height, tall.width, tall.height) == (160, 90, 51, 90)


def test_the_same_file_gives_the_same_bytes(files, made):
    assert list(strips(Storage(), files, workers=1)) == made


def test_a_strip_is_small_also_of_noise(tmp_path):
    rng = np.random.default_rng(3)
    noise = [rng.integers(0, 256, (90, 160, 3), dtype=np.uint8) for _ in range(8)]
    soft = [np.kron(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8), np.ones((10, 10, 1), np.uint8)) for _ in range(8)]
    paths = [films.film(tmp_path / f"{i}.mp4", "libx264", kind) for i, kind in enumerate((noise, soft))]
    worst, usual = strips(Storage(), paths, workers=1)
    assert len(usual.jpeg) <= 12_000
    assert len(worst.jpeg) <= 40_000


def test_frames_and_height_are_those_asked_for(files):
    (sprite,) = strips(Storage(), files[:1], frames=6, height=45, workers=1)
    assert (sprite.frames, sprite.width, sprite.height) == (6, 80, 45)
    assert _shown(sprite) == [5, 15, 25, 35, 45, 55]


def test_progress_is_told_of_each_file(files):
    told = []
    list(strips(Storage(), files, workers=2, progress=told.append))
    assert told == [1] * len(files)


def test_a_remote_file_is_read_through_the_storage(files, tmp_path):
    archive = tmp_path / "clips.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.write(files[0], "film.mp4")
    storage = Storage({"fo": str(archive)})
    film, missing = strips(storage, ["zip://film.mp4", "zip://other.mp4"], workers=1)
    assert isinstance(film, Sprite)
    assert _shown(film) == [7, 22, 37, 52]
    assert missing == "is not there"


def test_without_pyav_the_extra_is_named(monkeypatch, files):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"untwin\[video\]"):
        list(strips(Storage(), files))
