"""Damaged files: whatever is cut off or flipped, there are frames or a reason, and nothing is left."""

import contextlib
import os
import time
from pathlib import Path

import films
import numpy as np
import pytest

from untwin.media.strips import Sprite, strips
from untwin.storage.files import Storage

pytest.importorskip("av")

KINDS = [
    ("mp4", "libx264", "yuv420p"),
    ("mov", "mpeg4", "yuv420p"),
    ("matroska", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("mpegts", "libx264", "yuv420p"),
    ("gif", "gif", "rgb8"),
    ("webp", "libwebp_anim", "bgra"),
]
IMAGES = [("jpg", "mjpeg", "yuvj420p"), ("png", "png", "rgb24"), ("bmp", "bmp", "bgr24"), ("tiff", "tiff", "rgb24")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of all kinds, small, so that a flipped byte often hits what matters."""
    folder = tmp_path_factory.mktemp("whole")
    pictures = [films.picture(i) for i in range(30)]
    paths = [
        films.film(folder / f"{codec}.{container}", codec, pictures, container=container, pix_fmt=pix_fmt)
        for container, codec, pix_fmt in KINDS
    ]
    paths += [films.image(folder / f"a.{ending}", codec, films.picture(9), fmt) for ending, codec, fmt in IMAGES]
    return [Path(path).read_bytes() for path in paths]


def _damaged(data, rng):
    """A copy that is cut off, or has some bytes changed, or some of it missing, or written over."""
    changed = bytearray(data)
    what = rng.integers(4)
    # half of the damage is where the description of the rest mostly is
    place = int(rng.integers(min(len(data), 600) if rng.integers(2) else len(data)))
    length = int(rng.integers(1, 200))
    if what == 0:
        del changed[place:]
    elif what == 1:
        for at in rng.integers(min(len(data), 1 << int(rng.integers(6, 16))), size=int(rng.integers(1, 30))):
            changed[at] = rng.integers(256)
    elif what == 2:
        del changed[place : place + length]
    else:
        changed[place : place + length] = rng.bytes(len(changed[place : place + length]))
    return bytes(changed)


def _check(folder, whole, n, seed):
    rng = np.random.default_rng(seed)
    files = []
    for i in range(n):
        path = folder / f"{i}.any"
        path.write_bytes(_damaged(whole[i % len(whole)], rng))
        files.append(str(path))
    n_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None  # noqa: PTH208
    made = []
    for strip in strips(Storage(), files, workers=2, timeout=10):
        if isinstance(strip, Sprite):
            assert strip.jpeg[:2] == b"\xff\xd8"
            assert 1 <= strip.frames <= 4
            assert (strip.height <= 90) and (strip.width <= 160)
        else:
            assert strip, "a reason is empty"
        made.append(strip)
    assert len(made) == n
    if n_files is not None:
        assert len(os.listdir("/proc/self/fd")) == n_files  # noqa: PTH208
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0), "a process is left"
    pictures = sum(isinstance(strip, Sprite) for strip in made)
    assert 0.1 * n < pictures < 0.95 * n, "damage is too weak or too strong to tell anything"
    return made


def test_a_damaged_file_gives_frames_or_a_reason(tmp_path, whole):
    _check(tmp_path, whole, 96, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_damaged_files_give_frames_or_a_reason(tmp_path, whole, seed):
    began = time.monotonic()
    _check(tmp_path, whole, 1200, seed)
    assert time.monotonic() - began < 300


@pytest.mark.slow
def test_every_cut_of_a_small_film_gives_frames_or_a_reason(tmp_path, whole):
    for data in whole:
        files = []
        for i, length in enumerate(np.linspace(0, len(data) - 1, 60).astype(int)):
            path = tmp_path / f"{i}.any"
            path.write_bytes(data[:length])
            files.append(str(path))
        made = list(strips(Storage(), files, workers=2, timeout=10))
        assert len(made) == 60
        assert all(made)
        assert isinstance(made[0], str)
