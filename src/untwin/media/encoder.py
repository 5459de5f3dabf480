"""Encoders: ONNX models that turn frames into a vector, with what has to be known about them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from untwin.errors import MissingExtraError, ParameterError
from untwin.media.decode import Fit

if TYPE_CHECKING:
    import onnxruntime

BUILT_IN = "efficientnet-lite0"
"""In the place of a path: the model lies elsewhere on another machine."""
_LAYOUTS = ("nhwc", "nchw", "nthwc", "ntchw", "ncthw")
_POOLINGS = ("none", "mean", "first")
_RESIZES = ("stretch", "crop")
_BATCH = 8


@dataclass(frozen=True)
class Encoder:
    """A model file, and how it wants its input.

    Attributes:
        path: The ONNX file, or the name of the built-in one.
        digest: SHA-256 of the file and of everything below that changes vectors.
        name: For messages and metadata.
        size: Height and width of a frame, in pixels.
        resize: `stretch` a frame to this size, or scale its shorter side and `crop` the middle.
        scale: Pixels, 0 to 255, are divided by it first. A model with uint8 input gets them as they are.
        mean: Of each channel, R, G, B; subtracted then.
        std: Of each channel; the result is divided by it.
        layout: Order of the model's axes: `nhwc`, `nchw`; with time, for a model of videos, `nthwc`, `ntchw`, `ncthw`.
        frames: Frames that a model of videos takes at a time; None takes what the model says.
        output: Name of the output; None takes the only one, or the first.
        pooling: What to do with an output of several vectors (n, k, D): take their `mean`, or the `first` (CLS token);
            `none` for (n, D).
        eps: Threshold that fits its vectors; None where nobody has measured it.
    """

    path: str
    digest: str
    name: str
    size: tuple[int, int]
    resize: Fit = "stretch"
    scale: float = 255.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: str = "nchw"
    frames: int | None = None
    output: str | None = None
    pooling: str = "none"
    eps: float | None = None

    @property
    def of_videos(self) -> bool:
        """Whether the model sees several frames at a time."""
        return "t" in self.layout

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The vector of a clip.

        A model of images gives a vector for each frame; these are scaled to length 1, and their mean is scaled to
        length 1. A model of videos gives one, which is scaled to length 1.

        Args:
            frames: (t, height, width, 3) uint8, RGB.

        Returns:
            (D,) float32.

        Raises:
            ParameterError: The model does not take such frames, or gives something else than vectors.
        """
        session = _session(self.path)
        wanted = session.get_inputs()[0]
        x: NDArray[Any] = frames
        if wanted.type != "tensor(uint8)":
            mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
            x = ((frames.astype(np.float32) / np.float32(self.scale)) - mean) / std
            if wanted.type == "tensor(float16)":
                x = x.astype(np.float16)
        fixed = isinstance(wanted.shape[0], int)  # as models are that were exported without axes of any length
        size = wanted.shape[0] if fixed else _BATCH
        batches = [x[None]] if self.of_videos else [x[start : start + size] for start in range(0, len(x), size)]
        axes = _axes(self.layout)
        vectors = []
        try:
            for batch in batches:
                full = batch[np.arange(size) % len(batch)] if fixed else batch
                (found,) = session.run([self.output_name], {wanted.name: np.ascontiguousarray(full.transpose(axes))})
                vectors.append(found[: len(batch)])
        except Exception as error:  # the runtime has classes of its own for each kind, none of which is public
            raise ParameterError(
                f"{self.path}: the encoder refuses frames of {frames.shape[1]} x {frames.shape[2]} pixels in the "
                f"layout {self.layout} ({_first_line(error)}); say size, layout and frames beside it or in "
                "--encoder-options"
            ) from error
        each = np.concatenate([self._pooled(np.asarray(part, np.float32)) for part in vectors])
        vector: NDArray[np.float32] = _unit(_unit(each).mean(0, keepdims=True))[0]
        return vector

    @property
    def output_name(self) -> str:
        """The output that is used."""
        names = [output.name for output in _session(self.path).get_outputs()]
        if self.output is not None and self.output not in names:
            raise ParameterError(f"{self.path}: has no output {self.output!r}; it has {', '.join(names)}")
        return self.output or names[0]

    def _pooled(self, found: NDArray[np.float32]) -> NDArray[np.float32]:
        if found.ndim == 4 and self.pooling == "mean":  # a map of features, (n, D, height, width)
            found = found.mean((2, 3))
        elif found.ndim == 3 and self.pooling == "mean":
            found = found.mean(1)
        elif found.ndim == 3 and self.pooling == "first":
            found = found[:, 0]
        if found.ndim != 2:
            raise ParameterError(
                f"{self.path}: the output {self.output_name} has the shape {found.shape}, which pooling "
                f"{self.pooling!r} makes no vectors (n, D) of; choose another output, or pooling mean or first"
            )
        return found


def load_encoder(path: str | None = None, options: Mapping[str, Any] | None = None) -> Encoder:
    """An encoder: the built-in one, or a model file with what is said of it in the YAML file beside it and in options.

    Args:
        path: `MODEL.onnx`, beside which `MODEL.yaml` may lie; None for the built-in one.
        options: As in the YAML file; they come before it.

    Raises:
        MissingExtraError: The extra is not installed.
        ParameterError: The model cannot be read, or is described in a wrong way.
    """
    described = dict(_BUILT_IN_OPTIONS) if path is None else {**_beside(Path(path)), **(options or {})}
    if path is None and options:
        raise ParameterError("encoder options are given without an encoder; they describe a model of your own")
    model = Path(path) if path is not None else Path(BUILT_IN)
    try:
        content = model_file(str(model)).read_bytes()
    except OSError as error:
        raise ParameterError(f"encoder: {model} cannot be read ({error.strerror})") from None
    known = {field.name for field in fields(Encoder)} - {"path", "digest"}
    unknown = sorted(set(described) - known)
    if unknown:
        raise ParameterError(
            f"encoder {model}: unknown options {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    digest = hashlib.sha256(content)
    session = _session(str(model))
    encoder = _checked(model, session, described)
    settled = {field.name: getattr(encoder, field.name) for field in fields(Encoder)}
    for name in sorted(known - {"name", "eps"}):
        digest.update(f"{name}={settled[name]!r};".encode())
    return replace(encoder, digest=digest.hexdigest())


def _checked(model: Path, session: onnxruntime.InferenceSession, given: Mapping[str, Any]) -> Encoder:
    described = dict(given)
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ParameterError(f"encoder {model}: takes {len(inputs)} inputs; an encoder takes frames only")
    shape = inputs[0].shape
    layout = described.get("layout") or ("nhwc" if len(shape) == 4 and shape[-1] == 3 else "nchw")
    if layout not in _LAYOUTS or len(layout) != len(shape):
        fitting = ", ".join(name for name in _LAYOUTS if len(name) == len(shape))
        what = f"layout is {layout!r}, but its input has the shape {shape}"
        raise ParameterError(
            f"encoder {model}: {what}; " + (f"give one of {fitting}" if fitting else "it is no encoder of frames")
        )
    told = {axis: length for axis, length in zip(layout, shape, strict=True) if isinstance(length, int)}
    if told.get("c", 3) != 3:
        raise ParameterError(f"encoder {model}: wants {told['c']} channels in the layout {layout}, but frames have 3")
    size = described.get("size") or (told.get("h"), told.get("w"))
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= 4096 for side in size):
        raise ParameterError(f"encoder {model}: does not say the size of its frames; say it as size: 224")
    if any(told.get(axis, side) != side for axis, side in zip("hw", size, strict=True)):
        raise ParameterError(f"encoder {model}: takes frames of {told['h']} x {told['w']}, but size is {size}")
    frames = described.get("frames") or told.get("t")
    if "t" in layout and not isinstance(frames, int):
        raise ParameterError(f"encoder {model}: takes videos, but not how many frames; say it as frames: 8")
    for name, choices in (("pooling", _POOLINGS), ("resize", _RESIZES)):
        if described.get(name, choices[0]) not in choices:
            raise ParameterError(f"encoder {model}: {name} is {described[name]!r}; it is one of {', '.join(choices)}")
    for name in ("mean", "std"):
        if name in described:
            described[name] = _three(model, name, described[name])
    if any(value == 0 for value in described.get("std", (1,))) or described.get("scale", 1) == 0:
        raise ParameterError(f"encoder {model}: std and scale must not be 0")
    eps = described.get("eps")
    if eps is not None and not (isinstance(eps, float) and 0 < eps < 1):
        raise ParameterError(f"encoder {model}: eps is {eps!r}; it must be greater than 0 and less than 1")
    described.update(size=size, layout=layout, frames=frames if "t" in layout else None)
    described.setdefault("name", model.stem)
    encoder = Encoder(path=str(model), digest="", **described)
    _ = encoder.output_name
    return encoder


def _three(model: Path, name: str, value: Any) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise ParameterError(f"encoder {model}: {name} is {value!r}; give a number, or one for each of R, G, B")
    red, green, blue = map(float, values)
    return red, green, blue


def _beside(model: Path) -> dict[str, Any]:
    """What the YAML file beside a model says of it."""
    path = next((p for p in (model.with_suffix(".yaml"), model.with_suffix(".yml")) if p.exists()), None)
    return {} if path is None else parse_options(path.read_text(encoding="utf-8"), str(path))


def parse_options(text: str, origin: str) -> dict[str, Any]:
    """Options of an encoder, from YAML.

    Raises:
        MissingExtraError: The extra is not installed.
        ParameterError: Not YAML, or not names with values.
    """
    try:
        import yaml
    except ImportError as error:
        raise _missing() from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ParameterError(f"{origin}: is not YAML ({_first_line(error)})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ParameterError(f"{origin}: give names and values, as in 'size: 224'")
    return found


_BUILT_IN_OPTIONS = {"name": BUILT_IN, "layout": "nhwc", "eps": 0.1}


def model_file(path: str) -> Path:
    """Where a model lies on this machine: a path, or the name of the built-in one."""
    return Path(__file__).parent / "encoders" / f"{BUILT_IN}.onnx" if path == BUILT_IN else Path(path)


@functools.lru_cache(maxsize=2)
def _session(path: str) -> onnxruntime.InferenceSession:
    """The model, ready. One thread: several processes encode at a time."""
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing() from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model_file(path)), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ParameterError(f"encoder {path}: is no model that ONNX Runtime can read ({_first_line(error)})") from None


def _missing() -> MissingExtraError:
    return MissingExtraError("embedding media needs packages that are not installed: pip install 'untwin[video]'")


def _axes(layout: str) -> list[int]:
    """How frames as (n, h, w, c) or (n, t, h, w, c) are transposed."""
    ours = "nthwc" if "t" in layout else "nhwc"
    return [ours.index(axis) for axis in layout]


def _unit(X: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(X.astype(np.float64), axis=1, keepdims=True)
    return (X / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
