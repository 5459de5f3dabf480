"""`LocalExecutor`: order, memory, errors and threads, with stages that only write down what happens to them."""

import errno
import logging
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pyarrow as pa
import pytest
from threadpoolctl import threadpool_info

from untwin.backends.base import segments
from untwin.backends.local import LocalExecutor
from untwin.errors import ParameterError, ResourceError
from untwin.pipeline import Pipeline
from untwin.stages.base import Stage, Task, Upstream

MB = 1 << 20


@dataclass(frozen=True)
class Piece(Task):
    needs: int = MB
    work: float = 1.0


class Recorded(Stage):
    """Writes down (stage, what, unit, context) in the order in which things happen."""

    name = "recorded"

    def __init__(self, events, name="a", pieces=None, barrier=False, splittable=False, minimum=None, action=None):
        self.events, self.name, self.pieces = events, name, pieces
        self.barrier, self.splittable, self.minimum, self.action = barrier, splittable, minimum, action
        self.upstream = None

    def units(self, upstream):
        self.upstream = upstream
        self.events.append((self.name, "units", None, None))
        return self.pieces if self.pieces is not None else upstream.last

    def process(self, task, context):
        self.events.append((self.name, "start", task.unit, context))
        if self.action:
            self.action(task, context)
        self.events.append((self.name, "end", task.unit, context))
        return Piece(task.unit, task.n_rows)

    def finish(self):
        self.events.append((self.name, "finish", None, None))

    def memory(self, task):
        return task.needs

    def minimum_memory(self, task):
        return task.needs if self.minimum is None else self.minimum

    def cost(self, task):
        return task.work


def pieces(n, **options):
    return [Piece(unit, 10 + unit, **options) for unit in range(n)]


def nap(task, _):
    """The earlier the unit, the later it is done."""
    time.sleep(0.02 * (5 - task.unit % 5))


def at(events, name, what, unit=None):
    return next(i for i, event in enumerate(events) if event[:3] == (name, what, unit))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_barrier_waits_for_all_units_and_a_chain_does_not(workers):
    events = []
    stages = [
        Recorded(events, "a", pieces(6), action=nap),
        Recorded(events, "b", action=nap),
        Recorded(events, "c", pieces(3), barrier=True),
    ]
    assert [[stage.name for stage in chain] for chain in segments(stages)] == [["a", "b"], ["c"]]
    outcome = LocalExecutor(workers, 64 * MB).execute(stages)
    for unit in range(6):
        assert at(events, "a", "end", unit) < at(events, "b", "start", unit)
        assert at(events, "b", "end", unit) < at(events, "c", "units")
    assert any(at(events, "b", "start", 0) < at(events, "a", "start", unit) for unit in range(1, 6))
    assert at(events, "a", "finish") < at(events, "c", "units")
    assert at(events, "b", "finish") < at(events, "c", "units")
    assert [event[0] for event in events if event[1] == "units"] == ["a", "c"]
    assert [[task.unit for task in tasks] for tasks in outcome.tasks.values()] == [
        *(list(range(6)), list(range(6)), list(range(3)))
    ]
    assert outcome.last == tuple(outcome.tasks["c"])
    assert [[task.unit for task in tasks] for tasks in stages[2].upstream.stages] == [list(range(6))] * 2
    assert [(report.name, report.n_units, report.n_rows) for report in outcome.reports] == [
        *(("a", 6, 75), ("b", 6, 75), ("c", 3, 33))
    ]
    assert all(report.seconds >= 0 for report in outcome.reports)


def test_upstream_gives_tasks_by_kind_over_all_stages():
    upstream = Upstream(((Piece(0, 1), Task(1, 2)), (Piece(5, 6),)))
    assert upstream.of(Piece) == [Piece(0, 1), Piece(5, 6)]
    assert upstream.last == (Piece(5, 6),)
    assert Upstream().last == ()


def test_units_run_at_the_same_time_on_so_many_workers():
    meeting = threading.Barrier(3, timeout=10)
    events = []
    LocalExecutor(3, 64 * MB).execute([Recorded(events, pieces=pieces(6), action=lambda *_: meeting.wait())])
    assert sum(event[1] == "end" for event in events) == 6


def test_a_unit_larger_than_its_share_runs_alone_with_all_threads_and_all_memory():
    busy, most = [0], [0]
    alone_with = []
    lock = threading.Lock()

    def work(task, context):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            if task.unit == 2:
                alone_with.append(busy[0])
        time.sleep(0.02)
        with lock:
            if task.unit == 2:
                alone_with.append(busy[0])
            busy[0] -= 1

    events = []
    units = [*pieces(2), Piece(2, 12, needs=40 * MB), *[Piece(unit, 10) for unit in range(3, 6)]]
    LocalExecutor(2, 64 * MB).execute([Recorded(events, pieces=units, action=work)])
    contexts = {unit: context for _, what, unit, context in events if what == "start"}
    assert (contexts[2].threads, contexts[2].memory) == (2, 64 * MB)
    assert {(contexts[unit].threads, contexts[unit].memory) for unit in (0, 1, 3, 4, 5)} == {(1, 32 * MB)}
    assert alone_with == [1, 1]
    assert most == [2]


def test_a_unit_with_most_of_the_work_runs_alone_only_if_it_can_be_split():
    for splittable in (True, False):
        events = []
        units = [Piece(0, 1), Piece(1, 1, work=1000.0), Piece(2, 1)]
        LocalExecutor(2, 64 * MB).execute([Recorded(events, pieces=units, splittable=splittable)])
        contexts = {unit: context for _, what, unit, context in events if what == "start"}
        assert contexts[1].threads == (2 if splittable else 1)
        assert contexts[0].threads == contexts[2].threads == 1


def test_the_map_of_a_unit_that_runs_alone_keeps_order_and_uses_all_threads():
    meeting = threading.Barrier(2, timeout=10)
    seen = []

    def square(number):
        meeting.wait()
        return number * number

    def work(_, context):
        seen.extend(context.map(square, range(6)))

    LocalExecutor(2, 64 * MB).execute([Recorded([], pieces=[Piece(0, 1, needs=60 * MB)], action=work)])
    assert seen == [0, 1, 4, 9, 16, 25]


def test_too_little_memory_is_found_before_any_unit_runs():
    events = []
    units = [*pieces(3), Piece(3, 1, needs=80 * MB)]
    with pytest.raises(ResourceError, match=r"budget of 67 MB is too small: big needs 84 MB .*raise --memory"):
        LocalExecutor(2, 64 * MB).execute([Recorded(events, "big", pieces=units)])
    assert [event[1] for event in events] == ["units"]
    LocalExecutor(2, 64 * MB).execute([Recorded(events, "big", pieces=units, minimum=64 * MB)])
    assert sum(event[1] == "end" for event in events) == 4


@pytest.mark.parametrize("needs", [MB, 60 * MB], ids=["together", "alone"])
def test_an_error_comes_out_unchanged_with_a_note_and_ends_the_rest(needs):
    error = ResourceError("the disk is full")
    events = []

    def work(task, _):
        time.sleep(0.01)
        if task.unit == 1:
            raise error

    stages = [
        Recorded(events, "before", pieces(40, needs=needs)),
        Recorded(events, "fails", action=work),
        Recorded(events, "after", barrier=True),
    ]
    with pytest.raises(ResourceError) as caught:
        LocalExecutor(2, 64 * MB).execute(stages)
    assert caught.value is error
    assert caught.value.__notes__ == ["in stage fails, unit 1"]
    assert len({unit for name, what, unit, _ in events if (name, what) == ("before", "start")}) < 10
    assert not any(name == "after" or what == "finish" for name, what, *_ in events)
    started = {(name, unit) for name, what, unit, _ in events if what == "start"}
    ended = {(name, unit) for name, what, unit, _ in events if what == "end"}
    assert started - ended == {("fails", 1)}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("untwin")]


def test_an_error_of_the_map_inside_a_unit_comes_out():
    def work(_, context):
        list(context.map(lambda number: 1 / number, [1, 0]))

    with pytest.raises(ZeroDivisionError):
        LocalExecutor(2, 64 * MB).execute([Recorded([], pieces=[Piece(0, 1, needs=60 * MB)], action=work)])


def test_blas_has_one_thread_inside_and_what_it_had_outside():
    def blas():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before = blas()
    assert before  # else this machine cannot tell
    inside = []
    LocalExecutor(2, 64 * MB).execute(
        [Recorded([], pieces=[*pieces(3), Piece(3, 1, needs=60 * MB)], action=lambda *_: inside.append(blas()))]
    )
    assert inside == [[1] * len(before)] * 4
    assert blas() == before


def test_progress_is_told_of_every_row_and_of_the_end_even_after_an_error():
    class Told:
        def __init__(self):
            self.calls = []

        def start(self, name, n_rows):
            self.calls.append(("start", name, n_rows))

        def advance(self, n_rows):
            self.calls.append(("advance", n_rows))

        def finish(self):
            self.calls.append(("finish",))

    told = Told()
    stages = [Recorded([], "a", pieces(3)), Recorded([], "b"), Recorded([], "c", pieces(2), barrier=True)]
    Pipeline(stages=stages).run(LocalExecutor(2, 64 * MB), told)
    assert [call for call in told.calls if call[0] == "start"] == [("start", "a + b", 33), ("start", "c", 21)]
    assert sum(call[1] for call in told.calls if call[0] == "advance") == 54
    assert sum(call[0] == "finish" for call in told.calls) == 2

    def fail(*_):
        raise KeyError

    told = Told()
    with pytest.raises(KeyError):
        LocalExecutor(1, 64 * MB).execute([Recorded([], "a", pieces(3), action=fail)], told)
    assert told.calls == [("start", "a", 33), ("finish",)]


def test_only_verbose_stages_are_logged(caplog):
    stages = [Recorded([], "a", pieces(3)), Recorded([], "b")]
    stages[1].verbose = True
    with caplog.at_level(logging.INFO, logger="untwin"):
        LocalExecutor(1, 64 * MB).execute(stages)
    assert [record.getMessage().rpartition(",")[0] for record in caplog.records] == ["b: 3 units, 33 rows"]


@pytest.mark.parametrize(("arguments", "message"), [((0, None), "workers is 0"), ((1, 1000), "memory is 1000 bytes")])
def test_parameters_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ParameterError, match=message):
        LocalExecutor(*arguments)


def test_what_is_no_executor_is_refused():
    with pytest.raises(ParameterError, match="'local' is no executor"):
        Pipeline(stages=[Recorded([], "a", pieces(1))]).run("local")


def test_stages_check_what_is_before_them_before_any_unit_runs():
    events = []

    class Checked(Recorded):
        def check(self, before):
            self.events.append((self.name, "check", tuple(stage.name for stage in before), None))

    Pipeline(stages=[Recorded(events, "a", pieces(1)), Checked(events, "b"), Checked(events, "c")]).run()
    assert [event[:3] for event in events[:2]] == [("b", "check", ("a",)), ("c", "check", ("a", "b"))]
    assert events[2][:2] == ("a", "units")


def test_a_full_disk_met_by_a_scratch_file_is_told():
    """Scratch files are not written through storage, which would tell itself."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="stage a: no space left on the device; make room"):
        LocalExecutor(1, 64 * MB).execute([Recorded([], "a", pieces(3), action=fail)])


def test_arrow_takes_its_memory_from_jemalloc_during_a_run_only():
    before = pa.default_memory_pool().backend_name
    seen = []
    stage = Recorded([], "a", pieces(1), action=lambda *_: seen.append(pa.default_memory_pool().backend_name))
    LocalExecutor(1, 64 * MB).execute([stage])
    assert seen == ["jemalloc" if "jemalloc" in pa.supported_memory_backends() else before]
    assert pa.default_memory_pool().backend_name == before


def test_arrow_keeps_its_allocator_where_it_is_built_without_jemalloc(monkeypatch):
    def missing():
        raise NotImplementedError

    monkeypatch.setattr(pa, "jemalloc_memory_pool", missing)
    before = pa.default_memory_pool().backend_name
    seen = []
    stage = Recorded([], "a", pieces(1), action=lambda *_: seen.append(pa.default_memory_pool().backend_name))
    LocalExecutor(1, 64 * MB).execute([stage])
    assert seen == [before]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this is about glibc")
@pytest.mark.parametrize(("megabytes", "is_mapped"), [(256, True), (900, False)])
def test_below_a_budget_of_half_a_gigabyte_large_blocks_go_back_to_the_system_one_by_one(megabytes, is_mapped):
    """By itself glibc takes further blocks from its heaps once a block so large was freed, and holes stay there."""
    code = f"""
import ctypes
from untwin.backends.local import LocalExecutor
LocalExecutor(1, {megabytes} << 20).execute([])
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    raise SystemExit(77)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(f"n{{i}}", ctypes.c_size_t) for i in range(10)]  # the fifth is bytes in blocks of their own
libc.mallinfo2.restype = Info
libc.free(libc.malloc(30 << 20))
before = libc.mallinfo2().n4
libc.malloc(20 << 20)
print(libc.mallinfo2().n4 - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("a C library without mallinfo2")
    assert (int(done.stdout) >= 20 << 20) == is_mapped, done.stderr
