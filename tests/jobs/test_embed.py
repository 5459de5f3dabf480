"""A folder of clips becomes embeddings, once, and a run on a folder of clips finds those that are nearly the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("av")

from inputs import cli, ids_of, read_folder, snapshot, witnesses
from media.films import film, mute
from untwin import deduplicate, embed
from untwin.errors import MediaError, OutputExistsError, ParameterError, SchemaError, TooManyRejectedError
from untwin.media.decode import frames as decode
from untwin.media.encoder import load_encoder
from untwin.stages.embed import Clip, Recipe, embed_clip
from untwin.storage.files import Storage


def scene(kind, n=12, width=192, height=128):
    """Pictures of something that moves: tiles, stripes, rings, a ball, noise."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width].astype(float)
    tiles = np.kron(rng.integers(0, 256, (9, 12, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    noise = rng.integers(0, 256, (height + n, width, 1)).astype(np.uint8).repeat(3, 2)

    def colours(weight, one, other):
        return (weight[..., None] * np.array(one) + (1 - weight[..., None]) * np.array(other)).astype(np.uint8)

    def picture(i):
        r = np.hypot(y - 64, x - 60 - 4 * i)
        return {
            "tiles": tiles[i : i + height, :width],
            "stripes": colours((np.sin((x + y + 3 * i) / 6) > 0) * 1.0, (250, 240, 20), (10, 40, 160)),
            "rings": colours((np.sin(r / 3) > 0) * 1.0, (220, 30, 30), (245, 245, 245)),
            "ball": colours((r < 30) * 1.0, (230, 120, 20), (60, 130, 60)),
            "noise": noise[i : i + height],
        }[kind]

    return [np.ascontiguousarray(picture(i)) for i in range(n)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three scenes, one of them in three qualities; an image; and files that give no vector."""
    folder = tmp_path_factory.mktemp("media") / "clips"
    (folder / "a").mkdir(parents=True)
    film(folder / "a" / "first.mp4", "libx264", scene("tiles"))
    film(folder / "a" / "first-small.mkv", "libx264", [rgb[::2, ::2].copy() for rgb in scene("tiles")])
    film(folder / "a" / "first-poor.mp4", "mpeg4", scene("tiles"), options={"qscale": "9", "flags": "+qscale"})
    film(folder / "second.mp4", "libx264", scene("stripes"))
    film(folder / "thírd, ok.avi", "mpeg4", scene("rings"))
    film(
        folder / "third.jpg",
        "mjpeg",
        scene("ball")[:1],
        pix_fmt="yuvj420p",
        container="image2",
        file_options={"update": "1"},
    )
    (folder / "empty.mp4").touch()
    (folder / "text.mov").write_text("nothing to see")
    mute(folder / "sound.mp4")
    (folder / "notes.txt").write_text("no media")
    (folder / "loop").symlink_to("a", target_is_directory=True)
    return folder


GOOD = ["a/first", "a/first-poor", "a/first-small", "second", "third", "thírd, ok"]


@pytest.fixture(scope="module")
def embedded(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "out"
    return out, embed(clips, out)


def table_of(out):
    return read_folder(out / "embeddings").sort_by("id")


def test_every_media_file_has_a_vector_or_a_reason(embedded):
    out, found = embedded
    assert table_of(out)["id"].to_pylist() == GOOD
    assert (found.n_clips, found.n_embedded, found.n_rejected, found.n_reused) == (9, 6, 3, 0)
    rejected = {row["id"]: row["reason"] for row in read_folder(out / "rejected").to_pylist()}
    assert sorted(rejected) == ["empty", "sound", "text"]
    assert rejected["empty"] == "is empty"
    assert all(rejected.values())


def test_a_row_holds_the_vector_of_its_frames_and_the_facts_of_its_file(clips, embedded):
    out, _ = embedded
    encoder = load_encoder()
    for row in table_of(out).to_pylist():
        path = clips / row["path"]
        height, width = encoder.size
        decoded = decode(str(path), 8, size=(width, height), fit=encoder.resize)
        assert np.array_equal(np.asarray(row["embedding"], np.float32), encoder.encode(decoded.frames))
        assert row["size_bytes"] == path.stat().st_size
        assert (row["width"], row["height"]) == ((96, 64) if "small" in row["id"] else (192, 128))
        if path.suffix != ".jpg":
            assert row["duration_s"] == pytest.approx(1.2, abs=0.15)
            assert row["fps"] == pytest.approx(10)
            assert row["n_frames"] == (None if path.suffix == ".mkv" else 12)  # which Matroska does not tell
            assert row["codec"] in ("h264", "mpeg4")


def test_nothing_is_decoded_twice_and_what_changed_is_followed(clips, tmp_path):
    source, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, source, symlinks=True)
    embed(source, out)
    before, seen, seen_all = table_of(out), snapshot(out / "embeddings"), snapshot(out)
    del seen_all["_embed.json"]
    again = embed(source, out)
    assert (again.n_reused, again.n_embedded, again.n_rejected) == (6, 6, 3)
    assert snapshot(out).items() >= seen_all.items()
    assert snapshot(out / "embeddings") == seen
    assert len(read_folder(out / "rejected")) == 3
    failed = snapshot(out / "rejected")
    assert embed(source, out, timeout=59).n_rejected == 3
    assert snapshot(out / "rejected") != failed  # tried again

    (source / "second.mp4").unlink()
    shutil.copy(clips / "a" / "first.mp4", source / "new.mp4")
    film(source / "thírd, ok.avi", "mpeg4", scene("noise"))
    (source / "empty.mp4").unlink()
    changed = embed(source, out)
    assert (changed.n_clips, changed.n_reused, changed.n_embedded, changed.n_rejected) == (8, 4, 6, 2)
    after = table_of(out)
    assert after["id"].to_pylist() == sorted([*(set(GOOD) - {"second"}), "new"])
    old, new = (dict(zip(t["id"].to_pylist(), t["embedding"].to_pylist(), strict=True)) for t in (before, after))
    assert new["new"] == old["a/first"] == new["a/first"]
    assert new["thírd, ok"] != old["thírd, ok"]
    assert len(read_folder(out / "rejected")) == 2


def test_a_killed_one_goes_on_and_has_each_clip_once(clips, tmp_path):
    source, out = tmp_path / "clips", tmp_path / "out"
    for number in range(12):
        shutil.copytree(clips / "a", source / f"{number:02}")
    code = f"import untwin; untwin.embed({str(source)!r}, {str(out)!r}, workers=1)"
    running = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if out.exists() and len(list(out.glob("embeddings/part-*.parquet"))) >= 2:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    written = sum(pq.read_metadata(path).num_rows for path in out.glob("embeddings/part-*.parquet"))
    assert 0 < written < 36
    found = embed(source, out)
    assert found.n_reused >= written
    assert found.n_embedded == 36
    assert len(set(ids_of(out / "embeddings"))) == len(ids_of(out / "embeddings")) == 36
    assert not list(out.rglob("_tmp-*"))
    assert not (out / "_embed").exists()


def test_vectors_of_different_encoders_or_frames_are_not_mixed(clips, embedded):
    out, _ = embedded
    before = snapshot(out)
    with pytest.raises(OutputExistsError, match=r"differ in frames .was 8, now 4.; vectors of different encoders"):
        embed(clips, out, frames=4)
    assert snapshot(out) == before


def test_a_run_refuses_vectors_of_different_encoders(clips, embedded, tmp_path):
    out, _ = embedded
    embed(clips, tmp_path / "other", frames=4, pattern="second*")
    (tmp_path / "other" / "embeddings").rename(tmp_path / "moved")
    with pytest.raises(SchemaError, match=r"efficientnet-lite0 \(.*, 4 frames\).*cannot be compared"):
        deduplicate([out / "embeddings", tmp_path / "moved"], tmp_path / "run", eps=0.1, on_repeated_id="first")
    assert not (tmp_path / "run").exists()


def test_what_was_embedded_is_an_input_of_a_run(embedded, tmp_path):
    out, found = embedded
    whole = deduplicate(out, tmp_path / "whole", eps=0.1)
    deduplicate(found.path, tmp_path / "part", eps=0.1)
    assert whole.n_rows == found.n_embedded == 6
    assert witnesses(tmp_path / "whole") == witnesses(tmp_path / "part") != {}


def test_clips_that_differ_in_their_ending_only_keep_it_in_their_ids(clips, tmp_path):
    source = tmp_path / "clips"
    source.mkdir()
    shutil.copy(clips / "second.mp4", source / "x.mp4")
    shutil.copy(clips / "a" / "first-small.mkv", source / "x.mkv")
    shutil.copy(clips / "second.mp4", source / "y.mp4")
    embed(source, tmp_path / "out")
    assert sorted(ids_of(tmp_path / "out" / "embeddings")) == ["x.mkv", "x.mp4", "y"]


def test_a_pattern_chooses_by_name_or_path(clips, tmp_path):
    embed(clips, tmp_path / "names", pattern="first*.mp4")
    assert sorted(ids_of(tmp_path / "names" / "embeddings")) == ["a/first", "a/first-poor"]
    embed(clips, tmp_path / "paths", pattern="a/*.mkv")
    assert ids_of(tmp_path / "paths" / "embeddings") == ["a/first-small"]


def test_a_clip_that_changes_while_it_is_read_has_no_vector(clips):
    path = clips / "second.mp4"
    clip = Clip("second", "second.mp4", str(path), path.stat().st_size, "another time")
    with pytest.raises(MediaError, match="changed while it was read"):
        embed_clip(Storage(), Recipe(load_encoder(), 8), clip)


def test_mistakes_are_told_and_nothing_is_written(clips, tmp_path):
    out = tmp_path / "out"
    assert "no such folder of media" in cli("embed", tmp_path / "gone", out, code=2).output
    assert "no media file fits the pattern" in cli("embed", clips, out, "--pattern", "*.webm", code=2).output
    assert "frames is 0" in cli("embed", clips, out, "--frames", "0", code=2).output
    assert "timeout is 0" in cli("embed", clips, out, "--timeout", "0", code=2).output
    assert "cannot be read" in cli("embed", clips, out, "--encoder", tmp_path / "gone.onnx", code=2).output
    assert "is not YAML" in cli("embed", clips, out, "--encoder-options", "size: [", code=2).output
    assert not out.exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert "no embeddings of untwin (mine.txt)" in cli("embed", clips, tmp_path / "other", code=2).output
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.mp4").touch()
    with pytest.raises(TooManyRejectedError, match=r"not one of 1 media files gives a vector \(1 is empty\)"):
        embed(bad, out)


def test_a_run_on_a_folder_of_clips_keeps_the_best_of_similar_ones(clips, tmp_path):
    out = tmp_path / "out"
    said = cli("run", clips, out).output
    assert "9 clips in" in said
    assert "6 with a vector; 3 without" in said
    run = json.loads((out / "run.json").read_text())
    assert run["parameters"]["eps"] == load_encoder().eps
    assert run["parameters"]["rank_by"] == "height:desc,bitrate:desc,duration_s:desc"
    assert (run["media"]["n_clips"], run["media"]["n_rejected"], run["media"]["encoder"]) == (
        9,
        3,
        "efficientnet-lite0",
    )
    rates = {row["id"]: row["bitrate"] for row in read_folder(out / "embeddings").to_pylist()}
    best = max(("a/first", "a/first-poor"), key=rates.get)
    assert witnesses(out) == dict.fromkeys({"a/first", "a/first-poor", "a/first-small"} - {best}, best)
    assert sorted(ids_of(out / "kept")) == sorted([best, "second", "third", "thírd, ok"])
    assert len(read_folder(out / "rejected")) == 3

    before = snapshot(out)
    assert "finished already" in cli("run", clips, out).output
    assert snapshot(out).keys() == before.keys()
    vectors = snapshot(out / "embeddings")
    cli("run", clips, out, "--overwrite", "--which-to-keep", "easy")
    assert json.loads((out / "run.json").read_text())["parameters"]["which_to_keep"] == "easy"
    assert snapshot(out / "embeddings") == vectors
    assert len(read_folder(out / "rejected")) == 3


def test_a_dry_run_writes_nothing_and_options_for_clips_need_clips(clips, tmp_path):
    out = tmp_path / "out"
    assert "9 clips in" in cli("run", clips, out, "--dry-run").output
    assert not out.exists()
    table = Path(__file__).parents[2] / "examples" / "data" / "debian-packages-sample.parquet"
    assert "is no folder of videos or images" in cli("run", table, out, "--frames", "4", code=2).output
    with pytest.raises(ParameterError, match="leave id_field and embedding_field out"):
        deduplicate(clips, out, id_field="name")
    assert not out.exists()


def test_no_process_and_no_descriptor_is_left(clips, tmp_path):
    embed(clips, tmp_path / "one")
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    embed(clips, tmp_path / "two")
    if before:
        assert len(list(descriptors.iterdir())) <= before
    children = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    mine = [line for line in children.splitlines() if line.split()[0] == str(os.getpid())]
    assert not any("media.workers" in line for line in mine), mine
