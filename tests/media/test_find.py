"""Media files are found by ids and by paths, and what is not clear is said, not guessed."""

import os
import posixpath
import random

import numpy as np
import pyarrow as pa
import pytest

from untwin.errors import InputNotFoundError, ParameterError
from untwin.media.find import list_media
from untwin.storage.files import Storage


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def listed(folder, **options):
    return list_media(Storage(), folder, **options)


def names_of(media, ids, kind=None):
    """The names of each row's files."""
    return [[os.path.relpath(file.path, media.path) for file in files] for files in media.files_of(pa.array(ids, kind))]


def test_an_id_is_a_path_a_stem_or_a_folder_of_cameras(tmp_path):
    make(
        tmp_path, "one.mp4", "a/two.MOV", "a/three.jpg", "b/uuid/left.mp4", "b/uuid/right.mp4", "four.json", "v1.2.webp"
    )
    media = listed(tmp_path)
    assert len(media) == 6
    assert names_of(media, ["one", "one.mp4", "a/two", "two", "two.MOV", "v1.2", "uuid", "b/uuid"]) == [
        ["one.mp4"],
        ["one.mp4"],
        *[["a/two.MOV"]] * 3,
        ["v1.2.webp"],
        *[["b/uuid/left.mp4", "b/uuid/right.mp4"]] * 2,
    ]
    assert names_of(media, ["four", "four.json", "", None, "mp4", ".mp4", "on", "a/", "/one", "../one"]) == [[]] * 10
    (file,) = media.files_of(pa.array(["three"]))[0]
    assert (file.path, file.size) == (str(tmp_path / "a" / "three.jpg"), 11)
    assert file == Storage().stat(file.path)


def test_files_that_differ_in_their_ending_only_belong_to_one_clip(tmp_path):
    make(tmp_path, "x/clip.mp4", "x/clip.jpg", "x/clip.txt", "x/clip2.mp4")
    assert names_of(listed(tmp_path), ["clip", "x/clip.mp4"]) == [["x/clip.jpg", "x/clip.mp4"], ["x/clip.mp4"]]


def test_an_id_that_fits_two_places_is_an_error_that_names_both(tmp_path):
    media = listed(make(tmp_path, "a/x.mp4", "b/x.mp4", "c/uuid/1.mp4", "d/uuid/1.mp4", "a/y.mp4"))
    assert names_of(media, ["a/x", "b/x.mp4", "y", "c/uuid"]) == [
        ["a/x.mp4"],
        ["b/x.mp4"],
        ["a/y.mp4"],
        ["c/uuid/1.mp4"],
    ]
    for name, places in (("x", ("a/x.mp4", "b/x.mp4")), ("x.mp4", ("a/x.mp4", "b/x.mp4")), ("uuid", ("c/", "d/"))):
        with pytest.raises(ParameterError, match=f"id {name} fits") as error:
            names_of(media, ["y", name])
        assert all(place in str(error.value) for place in places)
    matches = media.match_ids(pa.array(["y", "x", "nobody"]))
    assert (matches.rows.tolist(), matches.ambiguous.tolist()) == ([0, 1, 1], [1])
    assert matches.missing(3).tolist() == [2]


def test_a_whole_path_goes_before_a_mere_name(tmp_path):
    media = listed(make(tmp_path, "x.mp4", "a/x.mp4", "x/left.mp4", "a.mp4/b.mp4"))
    assert names_of(media, ["x", "a/x", "a.mp4", "left", "x/left"]) == [
        ["x.mp4"],
        ["a/x.mp4"],
        ["a.mp4/b.mp4"],
        ["x/left.mp4"],
        ["x/left.mp4"],
    ]


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([b"\xff\xfe", b"caf\xc3\xa9"], pa.binary()),
        ([7, 12], pa.int32()),
        (["line\nbreak", "a'b\"c $(d)"], pa.large_string()),
        (["\u202egnp\u202c", "日本"], pa.dictionary(pa.int32(), pa.string())),
        ([b"ab", b"cd"], pa.binary(2)),
    ],
    ids=str,
)
def test_any_name_is_found(tmp_path, ids, kind):
    names = [os.fsdecode(value) if isinstance(value, bytes) else str(value) for value in ids]
    media = listed(make(tmp_path, *(f"d/{name}.mp4" for name in names), "d/other.mp4"))
    assert names_of(media, ids, kind) == [[f"d/{name}.mp4"] for name in names]


def test_links_to_files_and_folders_are_followed_and_loops_end(tmp_path):
    make(tmp_path / "store", "real.mp4", "deep/inner.mp4")
    make(tmp_path / "media", "own/a.mp4")
    (tmp_path / "media" / "alias").symlink_to("own")  # the folder itself comes first
    (tmp_path / "media" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "media" / "own" / "up").symlink_to("..")
    (tmp_path / "media" / "file.mp4").symlink_to("../store/real.mp4")
    (tmp_path / "media" / "dangling.mp4").symlink_to("nowhere.mp4")
    media = listed(tmp_path / "media")
    found = [media.name(number) for number in range(len(media))]
    assert found == ["file.mp4", "linked/deep/inner.mp4", "linked/real.mp4", "own/a.mp4"]


def test_paths_may_be_relative_absolute_or_through_a_link(tmp_path):
    make(tmp_path / "real", "a/x.bin", "y.mp4")
    (tmp_path / "media").symlink_to("real")
    media = listed(tmp_path / "media", any_ending=True)
    paths = ["a/x.bin", "./y.mp4", f"{tmp_path}/media/a/x.bin", f"{tmp_path}/real//y.mp4", None, "", "x.bin", "/y.mp4"]
    matches = media.match_paths(pa.array(paths))
    assert matches.rows.tolist() == [0, 1, 2, 3]
    assert [media.name(number) for number in matches.files] == ["a/x.bin", "y.mp4", "a/x.bin", "y.mp4"]


def test_curators_output_folder_and_its_previews(tmp_path):
    make(tmp_path, "clips/u1.mp4", "clips/u2/left.mp4", "clips/u2/right.mp4", "metas/v0/u1.json")
    make(tmp_path, "previews/u1/10_15.webp", "previews/u1/0.0_5.0.webp", "previews/u1/notes.txt", "previews/u3.webp")
    for folder in (tmp_path, tmp_path / "clips"):
        media = listed(folder)
        assert media.path == str(tmp_path / "clips")
        assert names_of(media, ["u1", "u2"]) == [["u1.mp4"], ["u2/left.mp4", "u2/right.mp4"]]
        assert media.preview_of("u1").path == str(tmp_path / "previews" / "u1" / "0.0_5.0.webp")
        for other in ("u2", "u3", "", "../previews/u1", "/", ".."):
            assert media.preview_of(other) is None


def test_a_folder_without_media_is_told(tmp_path):
    make(tmp_path, "a.txt", "b.parquet")
    with pytest.raises(InputNotFoundError, match="holds no media"):
        listed(tmp_path)
    with pytest.raises(InputNotFoundError, match="no such folder"):
        listed(tmp_path / "nothing")


def test_many_ids_at_once_are_found_as_one_by_one_by_hand(tmp_path, monkeypatch):
    """Against a plain search; equal hashes change nothing."""
    monkeypatch.setattr("untwin.media.find._CHUNK", 7)
    monkeypatch.setattr("untwin.media.find.hash_bytes", weak_hash)
    rng = random.Random(5)
    parts = ["a", "b", "a.b", "c", "d", "e", "f", "g"]
    names = {
        "/".join(rng.choices(parts, k=rng.randint(2, 3))) + rng.choice([".mp4", ".webm", ".b.mp4"]) for _ in range(40)
    }
    names = {name for name in names if not any(other.startswith(name + "/") for other in names)}
    media = listed(make(tmp_path, *names))
    asked = ["/".join(rng.choices([*parts, "a.mp4", "c.webm"], k=rng.randint(1, 2))) for _ in range(400)] + [*names]
    matches = media.match_ids(pa.array(asked))
    found = [set() for _ in asked]
    for row, number in zip(matches.rows, matches.files, strict=True):
        found[row].add(media.name(number))
    expected = [by_hand(name, names) for name in asked]
    assert found == [files for files, _ in expected]
    assert matches.ambiguous.tolist() == [row for row, (_, clear) in enumerate(expected) if not clear]
    assert 0 < len(matches.ambiguous) < len(asked) / 2
    assert sum(not files for files in found) > 10


def weak_hash(data, offsets, seed):
    return (np.diff(offsets) % 3).astype(np.uint64)


def by_hand(asked, names):
    """The files of an id, and whether they are clear."""

    def stem(name):
        return posixpath.splitext(name)[0]

    keys = [lambda name: name, stem, posixpath.dirname]
    for key in keys:
        if found := {name for name in names if key(name) == asked}:
            return found, True
    for key, place in zip(keys, [stem, stem, posixpath.dirname], strict=True):
        found = {name for name in names if key(name) and posixpath.basename(key(name)) == asked}
        if found:
            return found, len({place(name) for name in found}) == 1
    return set(), True
