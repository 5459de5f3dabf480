"""The report with media: pictures of clips, or the reason why there is none."""

import dataclasses
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import untwin
from untwin.errors import InputNotFoundError
from untwin.jobs.output import OutputFolder
from untwin.jobs.report import collect_report
from untwin.report.page import render
from untwin.storage.files import Storage

av = pytest.importorskip("av", reason="needs pip install 'untwin[video]'")

IDS = ["film", "tall", "wide", "still", "broken", "empty", "nothing", "twice", "rig", "shown"]


def _picture(width, height, shade):
    return np.full((height, width, 3), shade, np.uint8)


def _film(path, width=160, height=90, n=8, codec="mpeg4"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=4)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(n):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(_picture(width, height, 20 * i), "rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The folder of Curator's output, with a run beside it."""
    root = tmp_path_factory.mktemp("media")
    folder = root / "curated" / "clips"
    _film(folder / "film.mp4")
    _film(folder / "tall.mp4", 90, 160)
    _film(folder / "wide.mp4", 320, 80)
    _film(folder / "still.jpg", n=1, codec="mjpeg")
    (folder / "broken.mp4").write_bytes((folder / "film.mp4").read_bytes()[:60])
    (folder / "empty.mp4").write_bytes(b"")
    for place in ("a", "b"):
        _film(folder / place / "twice.mp4")
    _film(folder / "rig" / "front.mp4", 200, 100)
    _film(folder / "rig" / "left.mp4", 100, 100)
    (folder / "shown.mp4").write_bytes(b"not looked at, because there is a preview")
    preview = root / "curated" / "previews" / "shown" / "0.0_5.0.webp"
    preview.parent.mkdir(parents=True)
    _film(root / "preview.jpg", 120, 60, n=1, codec="mjpeg")
    shutil.copy(root / "preview.jpg", preview)  # told by content, not by its ending
    (root / "curated" / "metas").mkdir()
    vectors = np.random.default_rng(0).normal(size=(1, 16)) + 0.01 * np.random.default_rng(1).normal(size=(10, 16))
    (root / "input").mkdir()
    pq.write_table(pa.table({"id": IDS, "embedding": list(vectors)}), root / "input" / "a.parquet")
    untwin.deduplicate(root / "input", root / "out", eps=0.1)
    return root


def _collect(root, media):
    return collect_report(OutputFolder(Storage({}), str(root / "out")), media=media)


def test_each_clip_has_its_picture_or_the_reason_why_not(clips):
    found = _collect(clips, str(clips / "curated"))
    assert sorted(clip.id for clip in found.clips) == sorted(IDS)
    shown = {clip.id: clip for clip in found.clips}
    sizes = {
        name: (clip.strip.frames, clip.strip.width, clip.strip.height) for name, clip in shown.items() if clip.strip
    }
    assert sizes == {
        "film": (4, 160, 90),
        "tall": (4, 51, 90),
        "wide": (4, 160, 40),
        "still": (1, 160, 90),
        "rig": (4, 160, 80),  # the first of its cameras
        "shown": (1, 120, 60),
    }
    assert shown["nothing"].problem == "no media file has this id"
    assert shown["twice"].problem == "media files at several places have this id"
    assert shown["empty"].problem == "is empty"
    assert "damaged" in shown["broken"].problem
    assert all(clip.strip.uri.startswith("data:image/jpeg;base64,") for clip in found.clips if clip.strip)
    page = render(found)
    assert page.count("data:image/jpeg;base64,") == len(sizes)
    assert "media files at several places have this id" in page


def test_the_commands_act_on_the_media_as_well(clips):
    media = str(clips / "curated")
    found = _collect(clips, media)
    assert found.apply_media == f"untwin apply {clips / 'out'} --mode move --media {media}"
    assert _collect(clips, None).apply_media == ""


def test_media_on_a_url_are_shown_as_well(clips):
    found = _collect(clips, f"file://{clips / 'curated' / 'clips'}")
    assert {clip.id for clip in found.clips if clip.strip} >= {"film", "tall", "wide", "still"}


def test_a_folder_that_is_not_there_is_an_error(clips):
    with pytest.raises(InputNotFoundError, match="no such folder of media"):
        _collect(clips, str(clips / "elsewhere"))


@pytest.mark.slow
def test_a_run_on_clips_shows_them_and_says_how_to_make_it_again(tmp_path, caplog):
    pytest.importorskip("onnxruntime", reason="needs pip install 'untwin[video]'")
    for i in range(3):
        _film(tmp_path / "clips" / f"{i}.mp4")
    untwin.deduplicate(tmp_path / "clips", tmp_path / "out", eps=0.2, frames=3, report=True)
    assert (tmp_path / "out" / "report.html").read_text("utf-8").count("data:image/jpeg;base64,") == 3
    found = _collect(tmp_path, None)
    assert found.reproduce == f"untwin run {tmp_path}/clips {tmp_path}/out --frames 3 --eps 0.2"
    assert found.apply_media == f"untwin apply {tmp_path}/out --mode move --media {tmp_path}/clips"
    (tmp_path / "clips").rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        bare = _collect(tmp_path, None)
    assert "no pictures of clips" in caplog.text
    assert not any(clip.strip for clip in bare.clips)
    assert dataclasses.replace(bare, clips=(), made="") == dataclasses.replace(found, clips=(), made="")
