"""Clips on S3 are embedded as those of a local folder are, and only what is needed of a large one is read."""

import re

import pytest

pytest.importorskip("av")

import numpy as np

import untwin
from inputs import read_folder
from media.films import film


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for number in range(3):
        tiles = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        picture = np.kron(tiles, np.ones((8, 8, 1), np.uint8))
        film(folder / f"{number}.mp4", "libx264", [picture] * 3)
        film(folder / "sub" / f"{number}.mkv", "mpeg4", [picture] * 3)
    (folder / "empty.mp4").touch()
    return folder


def rows(folder):
    table = read_folder(folder).sort_by("id")
    return table.select([name for name in table.column_names if name != "file"])


def downloaded(bucket, prefix, folder):
    for name, content in bucket.contents(prefix).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_run_on_clips_on_s3_gives_the_local_answer(bucket, clips, tmp_path):
    bucket.upload(clips, "in")
    options = {"storage_options": bucket.options}
    remote = untwin.deduplicate(bucket.url("in"), bucket.url("out"), **options)
    local = untwin.deduplicate(clips, tmp_path / "local")
    assert (remote.n_kept, remote.n_duplicates) == (local.n_kept, local.n_duplicates)
    assert remote.n_duplicates >= 3
    found = downloaded(bucket, "out/", tmp_path / "remote")
    for name in ("embeddings", "rejected", "duplicates", "kept"):
        assert rows(found / name).equals(rows(tmp_path / "local" / name)), name
    before = bucket.contents("out/embeddings/")
    again = untwin.embed(bucket.url("in"), bucket.url("out"), **options)
    assert (again.n_reused, again.n_rejected) == (6, 1)
    assert bucket.contents("out/embeddings/") == before
    assert not bucket.uploads()


@pytest.mark.slow
def test_a_large_clip_is_not_read_whole(proxied, proxy, tmp_path):
    """Pictures of noise, so that the file is large, each of which can be decoded alone."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "large"
    folder.mkdir()
    noise = [rng.integers(0, 256, (720, 1280, 3), np.uint8) for _ in range(4)]
    film(folder / "noise.mkv", "mjpeg", [noise[i % 4] for i in range(300)], pix_fmt="yuvj420p")
    size = (folder / "noise.mkv").stat().st_size
    assert size > 30e6
    proxied.upload(folder, "in")
    proxy.reset()
    found = untwin.embed(proxied.url("in"), tmp_path / "out", frames=2, storage_options=proxied.options)
    assert found.n_embedded == 1
    ranges = [re.search(r"bytes=(\d+)-(\d+)", entry.request.query) for entry in proxy.entries(kind="GET")]
    read = sum(min(int(found[2]) + 1, size) - int(found[1]) for found in ranges)
    assert 0 < read < size / 2
