"""Markers give back exactly the tasks that were noted, wherever the output folder lies by then."""

import dataclasses
import logging

import pytest

from untwin.backends.ledger import Ledger
from untwin.stages.base import Task
from untwin.stages.tasks import CentroidsTask, Cluster, ClustersTask, ExamplePair, InputTask, PairsTask, ShardsTask
from untwin.storage.files import Recording, Storage


def tasks(root):
    """Tasks with all kinds of fields; ids that look like paths, and text of any script."""
    names = ("/", "=x", "\0", "", "数\n", "../x", "/elsewhere/y")
    pairs = tuple((2**64 - 1, ExamplePair(name, name * 2, 0.1)) for name in names)
    return (
        Task(0, 3),
        ShardsTask(1, 5, (f"{root}/kmeans/a",), (f"{root}/b",), f"{root}/n", 4, {"a reason": 1}, 0.1 + 0.2, 1e-300),
        CentroidsTask(0, 1, f"{root}/c", 8, (0, 4), 9, "digest", 3, 2, 1.5, 1 / 3),
        ClustersTask(2, 4, 8, (Cluster(3, 4, (f"{root}/kmeans/centroid=3/part-0.parquet",)),), rejected_path=""),
        PairsTask(2, 4, f"{root}/pairwise", ((3, 4),), "", (1, 2), (pairs, ())),
    )


@pytest.fixture
def ledger(tmp_path):
    root = tmp_path / "out"
    root.mkdir()
    return Ledger(Storage(), str(root)), root


def write(root, name, content=b"content"):
    recording = Recording()
    with recording.active():
        Storage().write_bytes(str(root / name), content)
    return list(recording.files.values())


def test_tasks_come_back_as_they_were_also_from_a_folder_that_was_moved(ledger, tmp_path):
    noted, root = ledger
    unit = InputTask(4, 10, 2, 3)
    noted.record("a.b", unit, tasks(root), write(root, "x"))
    noted.record("c", unit, tasks(root), [])
    noted.finish("c", [tasks(root)], 10)
    for place in (root, tmp_path / "moved"):
        if place != root:
            root.rename(place)
        again = Ledger(Storage(), str(place))
        again.load()
        assert again.reuse("a.b", unit) == tasks(place)
        assert again.finished("c").tasks == (tasks(place),)
        assert again.finished("c").n_rows == 10
        assert again.finished("a.b") is None
        assert again.tasks_of(PairsTask) == [tasks(place)[-1]]
        assert again.files() == {"x"}


def test_only_the_same_unit_is_reused(ledger):
    noted, root = ledger
    unit = InputTask(4, 10, 2, 3)
    noted.record("a", unit, tasks(root), [])
    assert noted.reuse("a", unit) is not None
    assert noted.reuse("b", unit) is None
    for change in ({"unit": 5}, {"n_rows": 11}, {"end_group": 4}):
        assert noted.reuse("a", dataclasses.replace(unit, **change)) is None


@pytest.mark.parametrize("damage", [b"", b"contenT", b"content "])
def test_a_unit_with_a_damaged_file_is_forgotten_and_no_other(ledger, damage):
    noted, root = ledger
    units = [InputTask(number, 10, number, number + 1) for number in range(3)]
    for unit in units:
        noted.record("a", unit, tasks(root), write(root, f"file-{unit.unit}"))
    (root / "file-1").write_bytes(damage)
    again = Ledger(Storage(), str(root))
    again.load()
    assert [again.reuse("a", unit) is not None for unit in units] == [True, False, True]
    assert again.files() == {"file-0", "file-2"}


def test_files_that_a_finished_chain_removed_are_not_looked_for(ledger, caplog):
    noted, root = ledger
    unit = InputTask(0, 10, 0, 1)
    noted.record("a", unit, (), write(root, "_work/x") + write(root, "kept/y"))
    noted.finish("a", [()], 10, [str(root / "_work")])
    (root / "_work" / "x").unlink()
    again = Ledger(Storage(), str(root))
    again.load()
    assert again.finished("a") is not None
    (root / "kept" / "y").unlink()
    with caplog.at_level(logging.WARNING):
        again.load()
    assert again.finished("a") is None
    assert "kept/y: is gone or damaged; the work starts anew" in caplog.text
    assert not (root / "_done").exists()


def test_markers_of_units_that_a_kill_left_beside_the_finished_chain_are_removed(ledger):
    noted, root = ledger
    unit = InputTask(0, 10, 0, 1)
    noted.record("a", unit, (), [])
    left = (root / "_done" / "a" / "0.json").read_bytes()
    noted.finish("a", [()], 10)
    (root / "_done" / "a").mkdir()
    (root / "_done" / "a" / "0.json").write_bytes(left)
    Ledger(Storage(), str(root)).load()
    assert [path.name for path in (root / "_done").rglob("*")] == ["a.json"]


def test_a_marker_that_cannot_be_read_counts_as_none(ledger):
    noted, root = ledger
    unit = InputTask(0, 10, 0, 1)
    noted.record("a", unit, (), [])
    (root / "_done" / "a" / "0.json").write_text('{"unit": ')
    again = Ledger(Storage(), str(root))
    again.load()
    assert again.reuse("a", unit) is None
