"""Processes that do work on hostile files: what they do to themselves harms nobody else."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import hostile
import pytest

from untwin.errors import ParameterError
from untwin.media.workers import Problem, Result, map_media

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at processes and files in /proc")


def _children():
    """Processes that this one has started, by /proc: their number and command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
    return found


def _open_files():
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(entry.readlink()))
    return sorted(found)


@pytest.fixture(autouse=True)
def nothing_is_left():
    gc.collect()
    children, n_files = _children(), len(_open_files())
    yield
    gc.collect()
    assert set(_children()) <= set(children)
    assert len(_open_files()) <= n_files, _open_files()


def test_results_come_in_the_order_of_the_items():
    assert list(map_media(hostile.double, range(50), workers=3)) == [Result(2 * i) for i in range(50)]


def test_whatever_an_item_does_only_it_is_lost():
    items = ["sleep", "a", "loop in C", "crash", "b", "allocate", "raise", "c", "leave", "print", "d"]
    began = time.monotonic()
    results = list(map_media(hostile.misbehave, items, workers=2, timeout=1.5, memory=300 << 20))
    assert time.monotonic() - began < 30
    assert dict(zip(items, results, strict=True)) == {
        "sleep": Problem("takes longer than 1.5 s to decode"),
        "a": Result("a"),
        "loop in C": Problem("takes longer than 1.5 s to decode"),
        "crash": Problem("crashed the decoder (SIGSEGV)"),
        "b": Result("b"),
        "allocate": Problem("takes more than 300 MiB of memory to decode"),
        "raise": Problem("ValueError: no good"),
        "c": Result("c"),
        "leave": Problem("ended the decoder (exit status 3)"),
        "print": Result("print"),
        "d": Result("d"),
    }


def test_no_more_processes_are_used_than_asked_for_and_each_is_used_again():
    processes = {result.value for result in map_media(hostile.process, range(30), workers=2)}
    assert 1 <= len(processes) <= 2
    assert os.getpid() not in processes


def test_a_process_that_is_killed_while_it_has_nothing_to_do_costs_nothing():
    results = map_media(hostile.process, range(40), workers=1)
    first = next(results).value
    time.sleep(0.5)  # it does what is in flight
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    rest = list(results)
    assert all(isinstance(result, Result) for result in rest)
    assert {result.value for result in rest} - {first}


def test_items_are_taken_as_they_are_needed():
    taken = []
    results = map_media(hostile.double, (taken.append(i) or i for i in range(1000)), workers=2)
    assert next(results) == Result(0)
    assert len(taken) <= 20
    results.close()
    assert len(taken) <= 20


def test_to_stop_in_the_middle_ends_what_still_runs():
    results = map_media(hostile.misbehave, ["a", "sleep", "sleep", "sleep"], workers=3, timeout=60)
    assert next(results) == Result("a")
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 10


def test_an_error_of_the_items_is_raised_and_ends_the_processes():
    def items():
        yield from range(3)
        raise KeyError("items")

    with pytest.raises(KeyError, match="items"):
        list(map_media(hostile.double, items(), workers=1))


def test_no_items_start_no_process():
    assert list(map_media(hostile.double, [], workers=2)) == []


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout": 0}, {"memory": 0}, {"timeout": float("nan")}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ParameterError, match="more than 0"):
        map_media(hostile.double, [1], **wrong)


_CALLER = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background ignore it
    sys.path.insert(0, sys.argv[1])
    import hostile
    from untwin.media.workers import map_media
    results = map_media(hostile.misbehave, ["a"] + ["sleep"] * 50, workers=2, timeout=1)
    next(results)
    print("ready", flush=True)
    try:
        next(results)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_their_caller(how, tmp_path):
    """Interrupted, it ends them; killed, they end themselves when the time for their item is over."""
    environment = {**os.environ, "UNTWIN_TEST_MARK": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(_CALLER), str(Path(__file__).parent)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout.readline() == "ready\n"
        assert len(_marked(tmp_path)) >= 2
        caller.send_signal(how)
        rest = caller.stdout.read()
    assert ("interrupted" in rest) == (how == signal.SIGINT)
    patience = time.monotonic() + (1 if how == signal.SIGINT else 20)
    while _marked(tmp_path) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not _marked(tmp_path)


def _marked(mark):
    """Numbers of the processes that have the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"UNTWIN_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
