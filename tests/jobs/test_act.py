"""`untwin apply` on media: what is listed, linked, copied, moved is just what the answer says; nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

import untwin
from inputs import TWINS, cli, ids_of, read_folder, snapshot, table_of, twin_table, twin_vectors, write_parquet
from untwin.cli import main
from untwin.errors import (
    DamagedFileError,
    InputNotFoundError,
    OutputExistsError,
    ParameterError,
    TooManyRemovedError,
    UntwinError,
)
from untwin.storage.relocate import UNDO

DRIVER = Path(__file__).with_name("killed_run.py")
SHM = Path("/dev/shm")
KEPT, REMOVED = sorted(TWINS.values()), sorted(TWINS)
FILES = {
    "row00": ["row00.mp4"],
    "row01": ["a/row01.mp4"],
    "row02": ["cams/row02/left.mp4", "cams/row02/right.mp4"],
    "row03": ["row03.jpg", "row03.mp4"],
    "row04": ["a/row04.webm"],
    "row05": ["row05.MP4"],
    "row06": ["row06.mp4"],
    "row07": ["a/row07.mp4"],
    "row08": ["cams/row08/left.mp4", "cams/row08/right.mp4"],
    "row09": ["a/b/row09.mp4"],
    "row10": ["a/b/row10.mp4"],
    "row11": ["linked.d/row11.mp4"],
}
"""Of each row of `twin_table`. row09 is a symbolic link with a relative target."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with eps 0.05 over the twins, who have columns `source`, `path` and a number; nobody writes there."""
    folder = tmp_path_factory.mktemp("finished")
    table = twin_table(source=["x", "y"] * 6, path=[f"deep/{n}.bin" for n in range(12)], n=pa.array(range(12)))
    source = write_parquet(folder / "in.parquet", table)
    untwin.deduplicate(source, folder / "out", eps=0.05, rank_by="id:asc", kept="none")
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def media(tmp_path):
    """A file for each name of FILES, whose content is its name, one of no row, and one that is no media."""
    return make_media(tmp_path / "media")


def make_media(folder):
    for name in [*files_of(FILES), "nobody.mp4", "row06.json"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "a/b/row09.mp4":
            (folder / "store.txt").write_text(name)
            path.symlink_to("../../store.txt")
        else:
            path.write_text(name)
    return folder


def files_below(folder):
    """Name -> content of the files below a folder, links followed; what is not ours to compare is left out."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in (UNDO, "_lock.json")
    }


def state(folder):
    """Everything below a folder: folders, links with their targets, files with content and times."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = str(path.readlink())
        elif path.is_dir():
            found[str(path.relative_to(folder))] = None
        else:
            found[str(path.relative_to(folder))] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


def files_of(ids):
    """Name -> content of the files that belong to rows."""
    return {name: name for row in ids for name in FILES[row]}


# --- the answer ------------------------------------------------------------------------------------------------------


def test_the_runs_own_answer_is_used_where_it_has_this_eps(out, media, tmp_path):
    before = snapshot(out)
    result = untwin.apply(out, eps=0.05, mode="copy", media=media, to=tmp_path / "to")
    assert result.output_path == str(out)
    assert snapshot(out) == before


def test_without_eps_the_one_in_force_is_meant(out, media, tmp_path):
    before = snapshot(out)
    untwin.apply(out, eps=0.05, mode="copy", media=media, to=tmp_path / "given")
    untwin.apply(out, mode="copy", media=media, to=tmp_path / "taken")
    assert snapshot(out) == before
    assert snapshot(tmp_path / "taken") == snapshot(tmp_path / "given") != {}


def test_without_one_in_force_an_eps_has_to_be_given(tmp_path):
    untwin.deduplicate(write_parquet(tmp_path / "in.parquet", twin_table()), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert "the run had no eps; choose one with --eps" in cli("apply", tmp_path / "out", code=2).output
    assert snapshot(tmp_path / "out") == before


def test_an_answer_without_kept_gets_it_later_and_one_with_it_serves_all(out, media, tmp_path):
    result = untwin.apply(out, eps=0.1, mode="list")
    folder = out / "eps=0.1"
    assert result.output_path == str(folder)
    assert not (folder / "kept").exists()
    pairs = snapshot(folder / "pairwise")
    result = untwin.apply(out, eps=0.1, kept="mirror")
    assert (result.n_reused, ids_of(folder / "kept")) == (3, KEPT)
    assert result.run["parameters"]["kept"] == "mirror"
    assert snapshot(folder / "pairwise") == pairs
    before = snapshot(folder)
    assert {"kept.txt", "removed.txt"} < set(before)
    untwin.apply(out, eps=0.1, mode="copy", media=media, to=tmp_path / "to")
    untwin.apply(out, eps=0.1, mode="list")
    assert untwin.apply(out, eps=0.1, kept="mirror") == result
    assert snapshot(folder) == before
    with pytest.raises(OutputExistsError, match="something else"):
        untwin.apply(out, eps=0.1, kept="compact")


def test_parquet_takes_the_runs_own_answer_only_if_its_kept_is_there(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc")
    assert untwin.apply(tmp_path / "out", eps=0.05).output_path == str(tmp_path / "out")
    assert not (tmp_path / "out" / "eps=0.05").exists()
    shutil.rmtree(tmp_path / "out" / "kept")
    assert untwin.apply(tmp_path / "out", eps=0.05).output_path == str(tmp_path / "out" / "eps=0.05")
    assert ids_of(tmp_path / "out" / "eps=0.05" / "kept") == KEPT


def test_a_folder_of_an_answer_can_be_acted_on(out, tmp_path):
    untwin.apply(out, eps=0.1, mode="list")
    result = untwin.apply(out / "eps=0.1", eps=0.1, mode="list", to=tmp_path / "to")
    assert result.output_path == str(out / "eps=0.1")
    assert (tmp_path / "to" / "removed.txt").read_text().split() == REMOVED


# --- list ------------------------------------------------------------------------------------------------------------


def test_lists_have_every_row_once_rejected_ones_excepted(tmp_path):
    rng = np.random.default_rng(3)
    vectors = list(rng.standard_normal((40, 8)))
    vectors[20:30] = [vector + 1e-4 for vector in vectors[:10]]
    ids = [f"é {n}" for n in rng.permutation(40)]
    vectors[35], ids[36], vectors[36] = None, ids[3], vectors[3]
    for name, rows in (("a", slice(0, 25)), ("b", slice(25, 40))):
        write_parquet(tmp_path / "in" / f"{name}.parquet", table_of(ids[rows], vectors[rows]))
    result = untwin.deduplicate(tmp_path / "in", tmp_path / "out", eps=0.05)
    text = cli("apply", tmp_path / "out", "--eps", "0.05", "--mode", "list", "--to", tmp_path / "to").stdout
    kept, removed = ((tmp_path / "to" / name).read_text("utf-8").splitlines() for name in ("kept.txt", "removed.txt"))
    assert kept == ids_of(tmp_path / "out" / "kept")
    assert removed == ids_of(tmp_path / "out" / "duplicates")
    assert len(removed) == 10
    assert {*kept, *removed} == {*ids} - {ids[35]}
    assert (len(kept), result.n_rejected) == (28, 2)
    assert str(tmp_path / "to" / "kept.txt") in text


def test_a_list_that_is_there_is_not_overwritten(out, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "removed.txt").write_text("mine\n")
    with pytest.raises(OutputExistsError, match=r"removed\.txt"):
        untwin.apply(out, eps=0.05, mode="list", to=tmp_path / "to")
    assert files_below(tmp_path / "to") == {"removed.txt": "mine\n"}


@pytest.mark.parametrize("bad", [b"a\nb", b"a\rb", b"\xff"])
@pytest.mark.parametrize("row", [0, 11])
def test_an_id_that_is_no_line_of_text_is_named_and_nothing_is_written(tmp_path, bad, row):
    ids = [b"row%02d" % n for n in range(12)]
    ids[row] = bad
    kind = pa.string() if bad != b"\xff" else pa.binary()
    values = [value.decode() for value in ids] if kind == pa.string() else ids
    source = write_parquet(tmp_path / "in.parquet", table_of(values, twin_vectors(), id_type=kind, n=range(12)))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="n:asc")
    text = cli("apply", tmp_path / "out", "--eps", "0.05", "--mode", "list", "--to", tmp_path / "to", code=2).stderr
    assert repr(bad) in text
    assert "duplicates" in text
    assert not (tmp_path / "to").exists()


# --- link and copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_the_media_of_rows_that_stay_are_linked_or_copied(out, media, tmp_path, mode):
    before = state(media)
    to = tmp_path / "to"
    text = cli("apply", out, "--eps", 0.05, "--mode", mode, "--media", media, "--to", to, "--yes").stdout
    assert files_below(to) == files_of(KEPT)
    assert "8  files of rows that stay" in text
    assert state(media) == before
    for name in files_of(KEPT):
        assert (to / name).samefile(media / name) == (mode == "link")
        assert (to / name).stat().st_mtime_ns == (media / name).stat().st_mtime_ns
    # again, after some were lost: what is there counts
    done = state(to)
    (to / "row00.mp4").unlink()
    text = cli("apply", out, "--eps", 0.05, "--mode", mode, "--media", media, "--to", to, "--yes").stdout
    assert state(to) == done
    assert "7  files were" in text


@pytest.mark.parametrize("mode", ["link", "copy", "move"])
def test_another_file_in_the_way_is_found_before_anything_happens(out, media, tmp_path, mode):
    name = "a/b/row10.mp4" if mode == "move" else "row05.MP4"
    (tmp_path / "to" / name).parent.mkdir(parents=True)
    (tmp_path / "to" / name).write_text("x" * len(name))
    before = state(tmp_path)
    with pytest.raises(OutputExistsError, match=name):
        untwin.apply(out, eps=0.05, mode=mode, media=media, to=tmp_path / "to")
    assert state(tmp_path) == before
    # a file where a folder has to be
    shutil.rmtree(tmp_path / "to")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "a").write_text("no folder")
    with pytest.raises(OutputExistsError, match="is a file"):
        untwin.apply(out, eps=0.05, mode=mode, media=media, to=tmp_path / "to")
    assert files_below(tmp_path / "to") == {"a": "no folder"}


@pytest.mark.skipif(not SHM.is_dir(), reason="needs a second file system at /dev/shm")
def test_links_to_another_disk_are_symbolic_and_this_is_said(out, media, tmp_path, elsewhere):
    text = cli("apply", out, "--eps", 0.05, "--mode", "link", "--media", media, "--to", elsewhere, "--yes").stdout
    assert files_below(elsewhere) == files_of(KEPT)
    assert all((elsewhere / name).readlink() == media / name for name in files_of(KEPT))
    assert "8 of them by symbolic links" in text
    again = cli("apply", out, "--eps", 0.05, "--mode", "link", "--media", media, "--to", elsewhere, "--yes").stdout
    assert "nothing is left to link" in again


@pytest.fixture
def elsewhere(tmp_path):
    folder = SHM / f"untwin-{os.getpid()}-{tmp_path.name}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# --- move and undo ---------------------------------------------------------------------------------------------------


def test_duplicates_are_moved_beside_the_media_and_put_back(out, media, tmp_path):
    before = state(media)
    text = cli("apply", out, "--eps", 0.05, "--mode", "move", "--media", media, "--yes").stdout
    to = tmp_path / "media-duplicates"
    assert files_below(to) == files_of(REMOVED)
    assert files_below(media) == {
        **files_of(KEPT),
        **{n: n for n in ("nobody.mp4", "row06.json")},
        "store.txt": "a/b/row09.mp4",
    }
    assert f"untwin undo {to}" in text
    assert [json.loads(line)["name"] for line in (to / UNDO).read_text().splitlines() if "name" in line][:1]
    assert "nothing is left" in cli("apply", out, "--eps", 0.05, "--mode", "move", "--media", media, "--yes").stdout
    assert cli("undo", to).stdout == "7 files put back\n"
    assert state(media) == before
    assert not to.exists()
    assert UNDO in cli("undo", to, code=2).stderr


def test_undo_works_where_the_folder_was_moved_and_keeps_what_others_put_there(out, media, tmp_path):
    (tmp_path / "to" / "a").mkdir(parents=True)
    before = state(media)
    untwin.apply(out, eps=0.05, mode="move", media=media, to=tmp_path / "to")
    (tmp_path / "to").rename(tmp_path / "other")
    (tmp_path / "other" / "cams" / "mine.txt").write_text("mine")
    shutil.rmtree(media / "linked.d")
    assert untwin.undo(tmp_path / "other") == 7
    assert state(media) == before
    assert state(tmp_path / "other").keys() == {"a", "cams", "cams/mine.txt"}


def test_undo_overwrites_nothing(out, media, tmp_path):
    untwin.apply(out, eps=0.05, mode="move", media=media, to=tmp_path / "to")
    (media / "row06.mp4").write_text("new here!")
    before = state(tmp_path)
    with pytest.raises(OutputExistsError, match=r"row06\.mp4"):
        untwin.undo(tmp_path / "to")
    assert state(tmp_path) == before
    (media / "row06.mp4").unlink()
    (tmp_path / "to" / "a" / "row07.mp4").unlink()
    with pytest.raises(UntwinError, match=r"6 files were put back, but 1 are neither.*row07\.mp4"):
        untwin.undo(tmp_path / "to")


@pytest.mark.parametrize("cut", [1, 30, 10**6])
def test_an_undo_file_that_was_cut_off_in_a_line_is_gone_on_with(out, media, tmp_path, cut):
    """As a power cut leaves it: in the first line, or in one of a file that was not moved yet."""
    before = state(media)
    to = tmp_path / "to"
    untwin.apply(out, eps=0.05, mode="move", media=media, to=to)
    lines = (to / UNDO).read_text().splitlines(keepends=True)
    (to / json.loads(lines[-1])["name"]).rename(media / json.loads(lines[-1])["name"])
    (to / UNDO).write_text("".join(lines[:-1]) + lines[-1][: min(cut, len(lines[-1]) - 1)])
    untwin.apply(out, eps=0.05, mode="move", media=media, to=to)
    assert (to / UNDO).read_text() == "".join(lines)
    assert files_below(to) == files_of(REMOVED)
    (to / UNDO).write_text("".join(lines) + '{"name": "row')
    assert untwin.undo(to) == 7
    assert state(media) == before
    to.mkdir()
    (to / UNDO).write_text(lines[0][:20])
    untwin.apply(out, eps=0.05, mode="move", media=media, to=to)
    assert untwin.undo(to) == 7
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / UNDO).write_text(lines[0][:20])
    assert untwin.undo(tmp_path / "half") == 0
    assert state(media) == before


@pytest.mark.parametrize("name", ["../secret", "/etc/secret", "a/../../secret"])
def test_an_undo_file_cannot_lead_out_of_its_folder(out, media, tmp_path, name):
    to = tmp_path / "to"
    untwin.apply(out, eps=0.05, mode="move", media=media, to=to)
    (tmp_path / "secret").write_text("secret")
    with (to / UNDO).open("a") as sink:
        sink.write(json.dumps({"name": name, "size": 6, "mtime_ns": 0, "link": None}) + "\n")
    before = state(tmp_path)
    with pytest.raises(DamagedFileError, match="not followed"):
        untwin.undo(to)
    assert state(tmp_path) == before


def test_a_folder_takes_the_duplicates_of_one_answer_only(out, media, tmp_path):
    untwin.apply(out, eps=0.05, mode="move", media=media, to=tmp_path / "to")
    before = state(tmp_path / "to")
    for mode in ("move", "copy"):
        with pytest.raises(OutputExistsError, match="moved"):
            untwin.apply(out, eps=0.1, mode=mode, media=media, to=tmp_path / "to", skip_missing=True)
    assert state(tmp_path / "to") == before


def test_a_file_that_belongs_to_a_kept_row_too_is_not_moved(tmp_path):
    table = twin_table(path=["whole.mp4"] * 11 + ["own.mp4"])
    untwin.deduplicate(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out", eps=0.05, rank_by="id:asc")
    (tmp_path / "media").mkdir()
    for name in ("whole.mp4", "own.mp4"):
        (tmp_path / "media" / name).write_text(name)
    arguments = ["--mode", "move", "--media", tmp_path / "media", "--path-field", "path", "--yes"]
    text = cli("apply", tmp_path / "out", "--eps", 0.05, *arguments).stdout
    assert "1  files belong to kept rows as well, and stay" in text
    assert files_below(tmp_path / "media") == {"whole.mp4": "whole.mp4"}
    assert files_below(tmp_path / "media-duplicates") == {"own.mp4": "own.mp4"}


@pytest.mark.skipif(not SHM.is_dir(), reason="needs a second file system at /dev/shm")
def test_moving_to_another_disk_and_back(out, media, elsewhere):
    before = state(media)
    untwin.apply(out, eps=0.05, mode="move", media=media, to=elsewhere)
    assert files_below(elsewhere) == files_of(REMOVED)
    assert untwin.undo(elsewhere) == 7
    assert state(media) == before
    assert not elsewhere.exists()


NAMES = ["line\nbreak", "q'u\"o$(te)", "\u202eevil\u202c", os.fsdecode(b"\xff\xfe"), " ", "-rf", "日本"]


def test_names_of_all_kinds_are_moved_and_put_back(tmp_path):
    ids = [os.fsencode(name) for name in NAMES]
    vectors = np.repeat(np.eye(8)[:1], len(ids), axis=0)
    source = write_parquet(
        tmp_path / "in.parquet", table_of([b"first", *ids], [vectors[0], *vectors], n=range(len(ids) + 1))
    )
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="n:asc")
    media = tmp_path / "media"
    media.mkdir()
    for name in ["first", *NAMES]:
        (media / f"{name}.mp4").write_bytes(os.fsencode(name))
    before = state(media)
    cli("apply", tmp_path / "out", "--eps", 0.05, "--mode", "move", "--media", media, "--yes")
    assert {path.name for path in (tmp_path / "media-duplicates").iterdir()} == {UNDO, *(f"{n}.mp4" for n in NAMES)}
    assert [path.name for path in media.iterdir()] == ["first.mp4"]
    assert untwin.undo(tmp_path / "media-duplicates") == len(NAMES)
    assert state(media) == before


# --- killed ----------------------------------------------------------------------------------------------------------


def killed(folders, operation, *argv):
    """Run a command that is killed at its n-th operation on files below folders; whether it was."""
    wanted = {"argv": [str(part) for part in argv], "output": [str(path) for path in folders], "operation": operation}
    command = [sys.executable, str(DRIVER), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def check_killed(finished, work, to, mode, operation):
    """Kill a command, look, do it again; then undo, killed at the same operation, and again. Whether any was killed."""
    media = make_media(work / "media")
    before = state(media)
    apply = ["apply", finished, "--eps", 0.05, "--mode", mode, "--media", media, "--to", to, "--yes"]
    first = killed([work, to], operation, *apply)
    everything = {**files_below(media), **{n: text for n, text in files_below(to).items() if "_tmp-" not in n}}
    assert everything.items() >= {**files_of(FILES), "nobody.mp4": "nobody.mp4"}.items()
    if mode != "move":
        assert state(media) == before
        cli(*apply)
        assert files_below(to) == files_of(KEPT)
        assert state(media) == before
        return first
    if operation % 2:  # put back from where it was killed, else from the end
        cli(*apply)
        assert files_below(to) == files_of(REMOVED)
        assert not {*files_below(media)}.intersection(files_below(to))
    if not (to / UNDO).exists():
        assert state(media) == before
        return first
    second = killed([work, to], operation, "undo", to)
    if (to / UNDO).exists():
        cli("undo", to)
    assert state(media) == before
    assert not to.exists() or state(to) == {}
    return first or second


@pytest.mark.parametrize("operation", [9, 16, 25])
def test_a_move_and_its_undo_that_were_killed_go_on(finished, tmp_path, operation):
    work = tmp_path / "work"
    assert check_killed(finished, work / "in", work / "to", "move", operation)


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["same", "other"])
@pytest.mark.parametrize("mode", ["link", "copy", "move"])
def test_killed_at_every_operation(finished, tmp_path, elsewhere, mode, disk, monkeypatch):
    if disk == "other" and not SHM.is_dir():
        pytest.skip("needs a second file system at /dev/shm")
    operation, killed_once = 0, True
    while killed_once:
        operation += 1
        work = tmp_path / str(operation)
        to = work / "to" if disk == "same" else elsewhere / "to"
        killed_once = check_killed(finished, work / "in", to, mode, operation)
        shutil.rmtree(work)
        shutil.rmtree(elsewhere, ignore_errors=True)
    assert operation > (15 if disk == "same" else 5)


# --- finding, guards, questions --------------------------------------------------------------------------------------


def test_rows_without_a_file_are_an_error_unless_they_may_be_skipped(out, media, tmp_path):
    (media / "row07.mp4").unlink(missing_ok=True)
    (media / "a" / "row07.mp4").unlink()
    before = state(tmp_path)
    arguments = ["apply", out, "--eps", 0.05, "--mode", "move", "--media", media, "--yes"]
    text = cli(*arguments, code=2).stderr
    assert "1 of 6 rows have no file there by id, as row07" in text
    assert state(tmp_path) == before
    text = cli(*arguments, "--skip-missing").stdout
    assert "1  rows, as row07" in text
    assert files_below(tmp_path / "media-duplicates") == files_of(set(REMOVED) - {"row07"})


def test_an_ambiguous_id_stops_before_anything_happens(out, media, tmp_path):
    (media / "cams" / "row07.mp4").write_text("another")
    with pytest.raises(ParameterError, match=r"id row07 fits a/row07\.mp4 and cams/row07\.mp4"):
        untwin.apply(out, eps=0.05, mode="move", media=media)
    assert not (tmp_path / "media-duplicates").exists()
    # of a kept row it does not matter, but no file that may be its own is moved
    (media / "cams" / "row07.mp4").rename(media / "cams" / "row01.mp4")
    untwin.apply(out, eps=0.05, mode="move", media=media)
    assert files_below(tmp_path / "media-duplicates") == files_of(REMOVED)


def test_media_are_found_by_a_column_of_paths(out, tmp_path):
    media = tmp_path / "media"
    (media / "deep").mkdir(parents=True)
    for n in range(12):
        (media / "deep" / f"{n}.bin").write_text(str(n))
    untwin.apply(out, eps=0.05, mode="copy", media=media, path_field="path", to=tmp_path / "to")
    assert files_below(tmp_path / "to") == {f"deep/{n}.bin": str(n) for n in range(6)}
    text = cli("apply", out, "--eps", 0.05, "--mode", "move", "--media", media, "--path-field", "nope", "--yes", code=2)
    assert "no column 'nope'; it has id, embedding, source, path, n" in text.stderr


@pytest.mark.parametrize("limit", ["49%", 0.49, "0"])
def test_too_many_removed_stops_before_kept_is_written(out, media, tmp_path, limit):
    for options in ({"mode": "move", "media": media}, {"mode": "list"}, {"kept": "compact"}):
        with pytest.raises(TooManyRemovedError, match=r"6 of 12 rows \(50.00%\)"):
            untwin.apply(out, eps=0.1, max_removed=limit, **options)
    assert (out / "eps=0.1" / "duplicates").exists()
    assert not {"kept", "kept.txt"} & {path.name for path in (out / "eps=0.1").iterdir()}
    assert not (tmp_path / "media-duplicates").exists()
    untwin.apply(out, eps=0.1, max_removed="50%", kept="compact")
    assert ids_of(out / "eps=0.1" / "kept") == KEPT


def test_too_many_removed_of_a_group_is_named(tmp_path):
    """Rows 6 to 11 go; groups of other sizes lose none, a half, all."""
    group = ["none"] * 3 + ["half"] * 3 + [None, None, "all"] + ["half"] * 3
    table = twin_table(group=pa.array(group).dictionary_encode(), lists=[[1.0]] * 12)
    source = write_parquet(tmp_path / "in.parquet", table)
    out = tmp_path / "out"
    untwin.deduplicate(source, out, eps=0.05, rank_by="id:asc", kept="none")
    arguments = ["apply", out, "--eps", "0.05", "--mode", "list", "--group-by", "group", "--max-removed"]
    text = cli(*arguments, "60%", code=2).stderr
    assert "null: 2 of 2 rows (100.00%); 'all': 1 of 1 rows (100.00%)" in text
    assert "group: 2 of 4 values" in text
    assert "half" not in text
    assert not (out / "kept.txt").exists()
    assert "no column 'sauce'" in cli(*arguments[:-2], "sauce", "--max-removed", "60%", code=2).stderr
    assert "cannot be groups" in cli(*arguments[:-2], "lists", "--max-removed", "60%", code=2).stderr
    cli(*arguments, "1.0")
    assert (out / "removed.txt").read_text().split() == REMOVED


@pytest.mark.parametrize("limit", ["15", "-1%", "101%", "x", "", "1e-1", True, float("nan")])
def test_a_share_that_makes_no_sense(out, limit):
    with pytest.raises(ParameterError, match="max_removed"):
        untwin.apply(out, eps=0.05, mode="list", max_removed=limit)


def test_without_a_terminal_nothing_is_done_unless_told_so(out, media, tmp_path):
    before = state(tmp_path)
    arguments = ["apply", out, "--eps", 0.1, "--mode", "move", "--media", media]
    text = cli(*arguments, code=2).stderr
    assert "--yes" in text
    assert state(tmp_path) == before
    text = cli(*arguments, "--dry-run").stdout
    assert f"7  files of duplicates, {sum(map(len, files_of(REMOVED)))} bytes" in text
    assert state(media) == {n.removeprefix("media/"): v for n, v in before.items() if n.startswith("media/")}
    assert not (tmp_path / "media-duplicates").exists()


def test_a_question_is_asked_on_a_terminal(out, media, tmp_path, monkeypatch):
    monkeypatch.setattr("untwin.cli._asks", lambda: True)
    arguments = [str(part) for part in ("apply", out, "--eps", 0.05, "--mode", "move", "--media", media)]
    before = state(media)
    answered = CliRunner().invoke(main, arguments, input="n\n")
    assert (answered.exit_code, "Move 7 files? [y/N]" in answered.output) == (0, True)
    assert "nothing was done" in answered.output
    assert state(media) == before
    assert CliRunner().invoke(main, arguments, input="y\n").exit_code == 0
    assert files_below(tmp_path / "media-duplicates") == files_of(REMOVED)


def test_a_dry_run_of_parquet_writes_no_kept(out):
    text = cli("apply", out, "--eps", 0.1, "--kept", "compact", "--dry-run").stdout
    assert "0.1" in text
    assert not (out / "eps=0.1" / "kept").exists()


def test_json_is_run_json_and_nothing_else(out, media, tmp_path):
    arguments = ["--mode", "copy", "--media", media, "--to", tmp_path / "to", "--yes", "--json"]
    assert json.loads(cli("apply", out, "--eps", 0.05, *arguments).stdout)["parameters"]["eps"] == 0.05
    assert files_below(tmp_path / "to") == files_of(KEPT)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "remove"}, "mode is 'remove'"),
        ({"mode": "copy"}, "--media"),
        ({"mode": "copy", "media": "media"}, "--to"),
        ({"mode": "list", "media": "media"}, "does not look"),
        ({"mode": "move", "media": "media", "to": "media/inside"}, "inside the media folder"),
        ({"mode": "move", "media": "s3://bucket/clips"}, "--mode manifest"),
        ({"mode": "copy", "media": "media", "to": "s3://bucket/to"}, "--mode manifest"),
        ({"mode": "manifest", "media": "media"}, "not an s3://"),
        ({"mode": "list", "group_by": "source"}, "group_by"),
        ({"mode": "move", "media": "nothing"}, "no such folder"),
        ({"mode": "list", "path_field": "path"}, "--media"),
    ],
)
def test_what_makes_no_sense_is_told(out, media, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    with pytest.raises((ParameterError, InputNotFoundError), match=told):
        untwin.apply(out, eps=0.05, **options)
    assert state(tmp_path) == before


def test_an_input_that_changed_is_no_base_to_act_on(media, tmp_path):
    source = write_parquet(tmp_path / "in.parquet", twin_table())
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc")
    write_parquet(tmp_path / "in.parquet", twin_table().slice(0, 11))
    with pytest.raises(UntwinError, match=r"in\.parquet.*changed"):
        untwin.apply(tmp_path / "out", eps=0.05, mode="move", media=media)
    assert files_below(media).items() >= files_of(FILES).items()


def test_overwrite_removes_the_lists_with_the_run(out, tmp_path):
    untwin.apply(out, eps=0.05, mode="list")
    untwin.apply(out, eps=0.1, mode="list")
    source = write_parquet(tmp_path / "other.parquet", twin_table())
    untwin.deduplicate(source, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"_done", "_plan", "kmeans", "pairwise", "run.json"}
    assert read_folder(out / "kmeans").num_rows == 12
