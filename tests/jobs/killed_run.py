"""Runs untwin in a process of its own that ends itself by SIGKILL, or that counts its work. Not a test.

Arguments: JSON with `argv` (of the command), and `operation` (kill at this file operation), `seconds` (kill then),
`chain` and `marker` (kill after this many markers of a chain), `full` (what this chain writes meets a full disk) or
`stuck` (a stage hangs); `log` gets a line for each unit of a chain that begins. Units are small (`small` bytes), so
that a small input has many.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa

import untwin.plan
from untwin.backends import local
from untwin.backends.ledger import Ledger
from untwin.stages import removal

SMALL = 1 << 14
OPERATIONS = {"open", "os.scandir", "shutil.rmtree", "shutil.copyfile", "os.truncate"}
OPERATIONS |= {f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "link", "symlink")}

# a shell that starts its commands in the background has them ignore interrupts, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_operation(number, output):
    """Count what opens, names, makes or removes something in the output; a file's own writing lies in between."""
    count = 0
    lock = threading.Lock()

    def hook(event, arguments):
        nonlocal count
        if event not in OPERATIONS or not str(arguments[0]).startswith(output):
            return
        with lock:
            count += 1
            if count == number:
                die()

    sys.addaudithook(hook)
    return lambda: count


def kill_at_marker(chain, number):
    record = Ledger.record
    count = 0

    def counted(self, name, *arguments):
        nonlocal count
        record(self, name, *arguments)
        count += name == chain
        if name == chain and count == number:
            die()

    Ledger.record = counted


def chain_of(stages):
    return ".".join(stage.name.replace(" ", "-") for stage in stages)


def fill_the_disk(chain):
    """Every file that units of a chain write goes to the device that is always full."""
    do_unit, open_file = local.do_unit, pa.OSFile
    at_work = threading.local()

    def marked(stages, *given, **options):
        at_work.full = chain_of(stages) == chain
        try:
            return do_unit(stages, *given, **options)
        finally:
            at_work.full = False

    def opened(path, mode):
        return open_file("/dev/full" if mode == "wb" and getattr(at_work, "full", False) else path, mode)

    local.do_unit, pa.OSFile = marked, opened


def get_stuck(stage, busy):
    """A stage takes a minute for a unit, and touches the file `busy` before."""
    module, _, name = stage.rpartition(".")

    def process(*_):
        Path(busy).touch()
        time.sleep(60)

    getattr(importlib.import_module(f"untwin.stages.{module}"), name).process = process


def log_units(path):
    do_unit = local.do_unit

    def logged(stages, unit, *given, **options):
        with Path(path).open("a") as sink:
            sink.write(f"{chain_of(stages)} {unit.unit}\n")
        return do_unit(stages, unit, *given, **options)

    local.do_unit = logged


def main():
    wanted = json.loads(sys.argv[1])
    small = wanted.get("small", SMALL)
    untwin.plan._MIN_UNIT_BYTES = untwin.plan._MAX_UNIT_BYTES = small
    untwin.plan._ROWS_PER_PARTITION = 256
    removal._FILE_BYTES = removal._MIRROR_BYTES = small
    counted = None
    if "operation" in wanted:
        places = wanted["output"]
        counted = kill_at_operation(wanted["operation"], tuple(places) if isinstance(places, list) else places)
    if "seconds" in wanted:
        timer = threading.Timer(wanted["seconds"], die)
        timer.daemon = True
        timer.start()
    if "chain" in wanted:
        kill_at_marker(wanted["chain"], wanted["marker"])
    if "full" in wanted:
        fill_the_disk(wanted["full"])
    if "stuck" in wanted:
        get_stuck(**wanted["stuck"])
    if "log" in wanted:
        log_units(wanted["log"])
    from untwin.cli import main as command

    try:
        command(wanted["argv"])
    finally:
        if counted is not None:
            sys.stderr.write(f"operations {counted()}\n")


main()
