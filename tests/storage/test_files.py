"""Local files: whole or not there; reading ahead in a thread; and many small files of a remote storage."""

import errno
import os
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from untwin.errors import DamagedFileError, MissingExtraError, ParameterError, ResourceError
from untwin.storage import files
from untwin.storage.files import (
    Recording,
    Storage,
    Writes,
    is_remote,
    join,
    normalize_path,
    read_ahead,
    read_many,
    redact,
)
from untwin.storage.memory import Space, space

STORAGE = Storage()


def write(path, content, **options):
    with STORAGE.writing(str(path), **options) as sink:
        sink.write(content)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_when_it_is_complete(tmp_path, durable):
    path = tmp_path / "new/folder/file"
    with STORAGE.writing(str(path), durable=durable) as sink:
        sink.write(b"half")
        assert not path.exists()
        (other,) = path.parent.iterdir()
        assert other.name.startswith("_tmp-")
        sink.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failing_writer_leaves_nothing_and_an_older_file_as_it_was(tmp_path, error):
    for older in (False, True):
        path = tmp_path / "file"
        if older:
            path.write_bytes(b"older")
        with pytest.raises(type(error)) as caught, STORAGE.writing(str(path)) as sink:
            sink.write(b"new and not complete")
            raise error
        assert caught.value is error
        assert [found.name for found in tmp_path.iterdir()] == (["file"] if older else [])
    assert path.read_bytes() == b"older"


def test_a_parquet_writer_that_fails_leaves_nothing(tmp_path):
    schema = pa.schema([("x", pa.int64())])
    wrong = pa.table({"y": ["text"]})
    with (
        pytest.raises(ValueError, match="schema"),
        STORAGE.writing(str(tmp_path / "x.parquet")) as sink,
        pq.ParquetWriter(sink, schema) as writer,
    ):
        writer.write_table(pa.table({"x": range(10)}, schema=schema))
        writer.write_table(wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"file: no space left on the device; make room"),
        STORAGE.writing(str(tmp_path / "file")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_disk(monkeypatch):
    """Which files were forced to the disk under which content, and in which folders names were."""
    forced = {}
    sync = files._sync

    def spy(path):
        forced[path] = sorted(found.name for found in path.iterdir()) if path.is_dir() else path.read_bytes()
        sync(path)

    monkeypatch.setattr(files, "_sync", spy)
    return forced


def test_durable_files_of_a_unit_get_their_names_together_once_all_are_on_the_disk(tmp_path, on_disk):
    paths = [tmp_path / "a" / "x", tmp_path / "a" / "y", tmp_path / "b" / "z"]
    recording = Recording()
    with recording.active():
        for path in paths:
            write(path, path.name.encode(), durable=True)
        write(tmp_path / "scratch", b"scratch")
        assert (tmp_path / "scratch").exists()
        assert not any(path.exists() for path in paths)
        assert on_disk == {}
    assert [path.read_bytes() for path in paths] == [b"x", b"y", b"z"]
    contents = [content for content in on_disk.values() if isinstance(content, bytes)]
    assert sorted(contents) == [b"x", b"y", b"z"]
    assert {path: names for path, names in on_disk.items() if isinstance(names, list)} == {
        tmp_path / "a": ["x", "y"],
        tmp_path / "b": ["z"],
    }
    assert set(recording.files) == {str(path) for path in (*paths, tmp_path / "scratch")}


@pytest.mark.parametrize("when", ["in the unit", "on the way to the disk", "stopped"])
def test_a_unit_that_fails_gives_none_of_its_durable_files_a_name(tmp_path, monkeypatch, when):
    stopped = threading.Event()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def unit():
        with Recording(stopped).active():
            for name in ("x", "y"):
                write(tmp_path / name, b"new", durable=True)
            if when == "in the unit":
                raise ValueError
            if when == "stopped":
                stopped.set()
            else:
                monkeypatch.setattr(files, "_sync", full)

    expected = {"in the unit": ValueError, "on the way to the disk": ResourceError, "stopped": KeyboardInterrupt}
    with pytest.raises(expected[when]) as caught:
        unit()
    if when == "on the way to the disk":
        assert "no space left on the device" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_writers_of_the_same_name_do_not_mix(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([65 + number]) * 300_000 for number in range(8)]
    threads = [threading.Thread(target=write, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_ranges_names_and_sizes(tmp_path):
    write(tmp_path / "b/x", b"0123456789")
    write(tmp_path / "a", b"a")
    assert STORAGE.read_range(str(tmp_path / "b/x"), 3, 4) == b"3456"
    assert STORAGE.read_bytes(str(tmp_path / "b/x")) == b"0123456789"
    assert STORAGE.names(str(tmp_path)) == ["a", "b"]
    assert STORAGE.names(str(tmp_path / "missing")) == []
    assert STORAGE.stat(str(tmp_path / "b/x")).size == 10
    assert sorted(file.path for file in STORAGE.find(str(tmp_path))) == [str(tmp_path / "a"), str(tmp_path / "b/x")]
    assert STORAGE.glob(str(tmp_path / "**/x")) == [str(tmp_path / "b/x")]


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "in/x", b"x")
    (tmp_path / "in/again").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link").symlink_to(tmp_path / "in", target_is_directory=True)
    assert [file.path for file in STORAGE.find(str(tmp_path / "in"))] == [str(tmp_path / "in/x")]
    assert [file.path for file in STORAGE.find(str(tmp_path / "other"))] == [str(tmp_path / "other/link/x")]


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    write(tmp_path / "data/x", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "data", target_is_directory=True)
    STORAGE.remove(str(tmp_path / "link"))
    STORAGE.remove(str(tmp_path / "nothing"))
    assert (tmp_path / "data/x").exists()
    assert not (tmp_path / "link").exists()


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normalize_path("x/y") == str(tmp_path / "x/y")
    assert normalize_path(f"file://{tmp_path}/x") == str(tmp_path / "x")
    assert normalize_path("s3://bucket/folder/") == "s3://bucket/folder"
    assert join("s3://bucket/folder", "a", "b") == "s3://bucket/folder/a/b"
    assert is_remote("s3://b/x")
    assert not is_remote("/x")
    assert not is_remote("file:///x")
    assert redact("ftp://user:secret@host/x") == "ftp://host/x"
    assert redact("s3://bucket/a@b") == "s3://bucket/a@b"
    assert redact("abfs://box@account.host/x") == "abfs://box@account.host/x"


def test_an_unknown_protocol_and_an_unwritable_option_are_the_users_mistake():
    with pytest.raises(ParameterError, match="nosuch:// is not a file system"):
        STORAGE.exists("nosuch://x/y")
    with pytest.raises(ParameterError, match="storage_options holds an object"):
        Storage({"session": object()}).exists("memory://x")


def test_a_password_in_a_url_is_refused_and_not_repeated():
    for url in ("ftp://user:hunter2@host/x", "s3://key:hunter2@bucket"):
        with pytest.raises(ParameterError, match="with a password in it; give that in storage_options") as caught:
            normalize_path(url)
        assert "hunter2" not in str(caught.value)
    assert normalize_path("hf://datasets/someone/set@main/x:y") == "hf://datasets/someone/set@main/x:y"


def test_options_do_not_show_in_a_storage_that_is_printed():
    assert "hunter2" not in repr(Storage({"secret": "hunter2"}))


def test_a_missing_package_names_the_extra(monkeypatch):
    def fail(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", fail)
    with pytest.raises(MissingExtraError, match=r"s3:// paths need .* pip install 'untwin\[s3\]'"):
        Storage({"probe": "missing package"}).exists("s3://bucket/x")


# ---- reading ahead ----------------------------------------------------------------------------------------------


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name == "untwin-read-ahead"]


def test_read_ahead_gives_every_item_in_order_and_ends_its_thread():
    assert list(read_ahead(lambda: iter(range(100)))) == list(range(100))
    assert ahead_threads() == []


def test_read_ahead_is_never_more_than_its_depth_ahead():
    produced = []

    def produce():
        for number in range(50):
            produced.append(number)
            yield number

    items = read_ahead(produce, depth=3)
    for number in range(5):
        assert next(items) == number
        time.sleep(0.02)
        # those taken, those that wait, and one in the hand of the thread
        assert len(produced) <= number + 1 + 3 + 1
    items.close()
    assert ahead_threads() == []
    assert len(produced) < 50


def test_read_ahead_passes_an_error_on_unchanged_after_what_came_before_it():
    error = RuntimeError("damaged")

    def produce():
        yield 1
        yield 2
        raise error

    items = read_ahead(produce)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError) as caught:
        next(items)
    assert caught.value is error
    assert ahead_threads() == []


def test_read_ahead_lets_the_producer_clean_up_when_the_consumer_stops():
    closed = threading.Event()

    def produce():
        try:
            yield from range(1000)
        finally:
            closed.set()

    with pytest.raises(KeyError):
        for number in read_ahead(produce):
            if number == 3:
                raise KeyError
    # the generator of the loop is closed when nothing refers to it any more
    deadline = time.monotonic() + 5
    while ahead_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ahead_threads() == []
    assert closed.is_set()


def test_open_files_are_closed(tmp_path):
    write(tmp_path / "x", b"abc")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None  # noqa: PTH112, PTH208
    for _ in range(50):
        STORAGE.read_bytes(str(tmp_path / "x"))
        STORAGE.read_range(str(tmp_path / "x"), 0, 1)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208


# ---- many small files -------------------------------------------------------------------------------------------


def _with_a_pause(lock, running, peak):
    def call(path):
        with lock:
            running.append(path)
            peak.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(path)
        return path

    return call


@pytest.mark.parametrize(("folder", "least", "most"), [("memory://many", 8, 16), ("/many", 1, 1)])
def test_many_small_reads_run_side_by_side_where_they_wait_and_come_in_order(folder, least, most):
    peak = []
    read = _with_a_pause(threading.Lock(), [], peak)
    paths = [f"{folder}/{number}" for number in range(60)]
    assert list(read_many(read, paths)) == paths
    assert least <= max(peak) <= most
    # no further ahead than that
    peak.clear()
    found = read_many(read, paths)
    assert next(found) == paths[0]
    time.sleep(0.2)
    assert len(peak) <= most
    found.close()
    assert len(peak) <= 2 * most


def test_an_error_of_a_read_comes_where_its_result_would():
    def read(path):
        if path.endswith("/30"):
            raise DamagedFileError(path)
        return path

    seen = []
    with pytest.raises(DamagedFileError, match="memory://many/30"):
        seen.extend(path for path in read_many(read, [f"memory://many/{number}" for number in range(60)]))
    assert list(read_many(read, [])) == []


@pytest.mark.parametrize(("size", "most"), [(1, 16), (4 << 20, 4), (64 << 20, 1)])
def test_writes_run_side_by_side_as_far_as_their_bytes_allow(size, most):
    peak, done = [], []
    write = _with_a_pause(threading.Lock(), [], peak)
    with Writes("memory://many") as writes:
        for number in range(24):
            writes.add(size, lambda path: done.append(write(path)), f"{number}")
    assert sorted(done, key=int) == [f"{number}" for number in range(24)]
    assert max(1, most // 2) <= max(peak) <= most


def test_a_write_that_fails_ends_the_others_with_its_error():
    def write(number):
        if number == 7:
            raise DamagedFileError("the seventh")
        done.append(number)

    for folder in ("memory://many", "/many"):
        done = []
        with pytest.raises(DamagedFileError, match="the seventh"), Writes(folder) as writes:
            for number in range(8):
                writes.add(1, write, number)
        assert sorted(done) == list(range(7))


def test_what_runs_side_by_side_is_part_of_the_unit_at_work():
    """Files that it writes are recorded, and what is held in memory is found."""
    storage, room = Storage(), Space(100)
    recording = Recording()
    with recording.active(), room.active():
        space().put("memory://many/x", "held", 1)
        assert list(read_many(lambda path: space().get(path), ["memory://many/x"])) == ["held"]
        with Writes("memory://many") as writes:
            for number in range(20):
                writes.add(1, storage.write_bytes, f"memory://many/{number}", b"1")
    assert sorted(recording.files) == sorted(f"memory://many/{number}" for number in range(20))
