"""Runs untwin in a process of its own that ends itself by SIGKILL, or that counts its work. Not a test.

Arguments: JSON with `argv` (of the command), and `operation` (kill at this file operation), `seconds` (kill then),
`chain` and `marker` (kill after this many markers of a chain) or `file_bytes` (no file may be larger); `log` gets a
line for each unit of a stage that begins. Units are small, so that a small input has many.
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import untwin.plan
from untwin.backends import local
from untwin.backends.ledger import Ledger
from untwin.stages import removal

SMALL = 1 << 14


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_operation(number, output):
    """Count what opens, renames, makes or removes something in the output; a file's own writing lies in between."""
    count = 0
    lock = threading.Lock()

    def hook(event, arguments):
        nonlocal count
        if event not in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "shutil.rmtree"}:
            return
        if not str(arguments[0]).startswith(output):
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


def log_units(path):
    process = local._Chain._process

    def logged(self, unit, context):
        with Path(path).open("a") as sink:
            sink.write(f"{self.name} {unit.unit}\n")
        return process(self, unit, context)

    local._Chain._process = logged


def main():
    wanted = json.loads(sys.argv[1])
    untwin.plan._MIN_UNIT_BYTES = untwin.plan._MAX_UNIT_BYTES = SMALL
    untwin.plan._ROWS_PER_PARTITION = 256
    removal._FILE_BYTES = removal._MIRROR_BYTES = SMALL
    counted = None
    if "operation" in wanted:
        counted = kill_at_operation(wanted["operation"], wanted["output"])
    if "seconds" in wanted:
        timer = threading.Timer(wanted["seconds"], die)
        timer.daemon = True
        timer.start()
    if "chain" in wanted:
        kill_at_marker(wanted["chain"], wanted["marker"])
    if "file_bytes" in wanted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["file_bytes"], wanted["file_bytes"]))
    if "log" in wanted:
        log_units(wanted["log"])
    from untwin.cli import main as command

    try:
        command(wanted["argv"], standalone_mode=False)
    finally:
        if counted is not None:
            sys.stderr.write(f"operations {counted()}\n")


main()
