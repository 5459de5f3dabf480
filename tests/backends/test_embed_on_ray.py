"""Embedding on a Ray of its own ends with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("ray")

from media.films import film, picture

PROGRAM = """
import sys, untwin
found = untwin.embed(sys.argv[1], sys.argv[2], backend="ray", workers=2)
print(found.n_embedded)
"""


def decoders(mark):
    """Numbers of decoding processes whose environment names a folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"media.workers" in (folder / "cmdline").read_bytes() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_decoding_process_outlives_the_driver(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(40):
        film(clips / f"{number}.mp4", "libx264", [picture(number)] * 3)
    mark = str(tmp_path).encode()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "UNTWIN_TEST": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(clips), str(tmp_path / "out")]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seen = 0
    while running.poll() is None:
        seen = max(seen, len(decoders(mark)))
        time.sleep(0.05)
    assert running.stdout.read().split()[-1] == "40"
    assert seen >= 1
    deadline = time.monotonic() + 20
    while decoders(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert decoders(mark) == []
