"""Encoders: the built-in one, and models of one's own in all shapes that are promised."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from untwin.errors import ParameterError
from untwin.jobs.embed import EmbedParameters
from untwin.media.encoder import load_encoder

FRAMES = np.random.default_rng(3).integers(0, 256, (5, 6, 8, 3), np.uint8)
"""Five frames of 8 x 6 pixels."""


def model(path, shape, axes, *, kind=TensorProto.FLOAT, outputs=("features",), inputs=1, keepdims=0):
    """A model that gives means over some axes."""
    given = [helper.make_tensor_value_info(f"x{i}", kind, shape) for i in range(inputs)]
    nodes, source = [], "x0"
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", ["x0"], ["wide"], to=TensorProto.FLOAT))
        source = "wide"
    nodes += [
        helper.make_node("ReduceMean", [source], [name], axes=axes if name == outputs[0] else [1], keepdims=keepdims)
        for name in outputs
    ]
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "means", given, found)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, str(path))
    return str(path)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_built_in_encoder_gives_the_features_that_it_gave_when_it_was_made():
    encoder = load_encoder()
    ramp = np.linspace(0, 255, 56).astype(np.uint8)
    frame = np.stack([np.tile(ramp, (56, 1)), np.tile(ramp[:, None], (1, 56)), np.full((56, 56), 99, np.uint8)], -1)
    vector = encoder.encode(np.stack([frame, frame[::-1], frame[:, ::-1]]))
    assert vector.shape == (1280,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert np.array_equal(vector, encoder.encode(np.stack([frame, frame[::-1], frame[:, ::-1]])))
    assert (encoder.name, 0 < encoder.eps < 1) == ("efficientnet-lite0", True)
    largest = np.argsort(-vector)[:3].tolist()
    assert largest == [113, 897, 930]
    assert vector[largest] == pytest.approx([0.20852, 0.20678, 0.19693], abs=1e-4)


def test_a_clip_is_the_mean_of_its_frames_each_of_length_one(tmp_path):
    encoder = load_encoder(model(tmp_path / "m.onnx", ["n", 6, 8, 3], [1, 2], kind=TensorProto.UINT8))
    assert (encoder.size, encoder.layout, encoder.frames, encoder.eps) == ((6, 8), "nhwc", None, None)
    expected = unit(unit(FRAMES.astype(np.float64).mean((1, 2))).mean(0))
    assert encoder.encode(FRAMES) == pytest.approx(expected, abs=1e-5)


def test_more_frames_than_a_batch_and_a_batch_give_the_same(tmp_path):
    encoder = load_encoder(model(tmp_path / "m.onnx", ["n", 6, 8, 3], [1, 2], kind=TensorProto.UINT8))
    many = np.concatenate([FRAMES] * 4)
    assert encoder.encode(many) == pytest.approx(encoder.encode(FRAMES), abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_a_model_that_takes_batches_of_one_size_only_gives_the_same(tmp_path, size):
    any_size = load_encoder(model(tmp_path / "any.onnx", ["n", 6, 8, 3], [1, 2], kind=TensorProto.UINT8))
    fixed = load_encoder(model(tmp_path / "fixed.onnx", [size, 6, 8, 3], [1, 2], kind=TensorProto.UINT8))
    assert fixed.encode(FRAMES) == pytest.approx(any_size.encode(FRAMES), abs=1e-6)


def test_pixels_are_scaled_as_the_yaml_file_beside_the_model_says_and_options_come_first(tmp_path):
    path = model(tmp_path / "clip.onnx", ["n", 3, "h", "w"], [2, 3])
    (tmp_path / "clip.yaml").write_text("size: [6, 8]\nmean: [0.1, 0.2, 0.3]\nstd: 0.5\neps: 0.07\nname: towers\n")
    encoder = load_encoder(path, {"eps": 0.2})
    assert (encoder.name, encoder.eps, encoder.layout) == ("towers", 0.2, "nchw")
    scaled = (FRAMES.astype(np.float64).mean((1, 2)) / 255 - [0.1, 0.2, 0.3]) / 0.5
    assert encoder.encode(FRAMES) == pytest.approx(unit(unit(scaled).mean(0)), abs=1e-5)


@pytest.mark.parametrize(("layout", "axes"), [("nthwc", [2, 3, 4]), ("ntchw", [2, 3, 4]), ("ncthw", [1, 3, 4])])
def test_a_model_of_videos_sees_all_frames_in_the_order_of_time(tmp_path, layout, axes):
    shape = {"n": "n", "t": 5, "c": 3, "h": 6, "w": 8}
    path = model(tmp_path / "video.onnx", [shape[axis] for axis in layout], axes)
    encoder = load_encoder(path, {"layout": layout})
    assert encoder.frames == 5
    assert encoder.encode(FRAMES) == pytest.approx(unit(FRAMES.astype(np.float64).mean((1, 2, 3))), abs=1e-5)


@pytest.mark.parametrize(("pooling", "take"), [("mean", lambda x: x.mean(1)), ("first", lambda x: x[:, 0])])
def test_an_output_of_several_vectors_is_pooled(tmp_path, pooling, take):
    path = model(tmp_path / "tokens.onnx", ["n", 6, 8, 3], [1], outputs=("tokens", "other"))
    encoder = load_encoder(path, {"layout": "nhwc", "pooling": pooling, "output": "tokens"})
    expected = unit(unit(take(FRAMES.astype(np.float64).mean(1))).mean(0))
    assert encoder.encode(FRAMES) == pytest.approx(expected, abs=1e-5)


def test_the_digest_tells_whatever_changes_vectors_and_nothing_else(tmp_path):
    path = model(tmp_path / "m.onnx", ["n", 3, 6, 8], [2, 3])
    plain = load_encoder(path)
    assert load_encoder(path, {"eps": 0.3, "name": "another"}).digest == plain.digest
    (tmp_path / "copy").mkdir()
    assert load_encoder(model(tmp_path / "copy" / "m.onnx", ["n", 3, 6, 8], [2, 3])).digest == plain.digest
    others = [{"mean": 0.5}, {"std": 2}, {"scale": 1.0}, {"resize": "crop"}]
    digests = {load_encoder(path, options).digest for options in others}
    assert len(digests) == len(others)
    assert plain.digest not in digests


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (["n", 3, 6, 8], {"sise": 224}, "unknown options sise; there are .*size"),
        (["n", 3, "h", "w"], {}, "does not say the size of its frames"),
        (["n", 3, 6, 8], {"size": 224}, "takes frames of 6 x 8, but size is"),
        (["n", 3, 6, 8], {"layout": "ntchw"}, "layout is 'ntchw', but its input has the shape"),
        (["n", 4, 6, 8], {}, "wants 4 channels"),
        (["n", 3, 6], {}, "it is no encoder of frames"),
        (["n", "t", 3, 6, 8], {"layout": "ntchw"}, "not how many frames"),
        (["n", 3, 6, 8], {"pooling": "max"}, "pooling is 'max'; it is one of"),
        (["n", 3, 6, 8], {"mean": [1, 2]}, "mean is .* give a number"),
        (["n", 3, 6, 8], {"std": 0}, "must not be 0"),
        (["n", 3, 6, 8], {"eps": 1.5}, "eps is 1.5"),
        (["n", 3, 6, 8], {"output": "logits"}, "has no output 'logits'; it has features"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, shape, options, message):
    path = model(tmp_path / "m.onnx", shape, [2])
    with pytest.raises(ParameterError, match=message) as told:
        load_encoder(path, options)
    assert "m.onnx" in str(told.value)


def test_an_output_that_is_no_vector_is_told(tmp_path):
    encoder = load_encoder(model(tmp_path / "m.onnx", ["n", 3, 6, 8], [2]))
    with pytest.raises(ParameterError, match=r"has the shape .* choose another output, or pooling"):
        encoder.encode(FRAMES)


def test_files_that_are_no_models_are_told(tmp_path):
    with pytest.raises(ParameterError, match=r"gone\.onnx cannot be read"):
        load_encoder(str(tmp_path / "gone.onnx"))
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ParameterError, match="no model that ONNX Runtime can read"):
        load_encoder(str(tmp_path / "text.onnx"))
    with pytest.raises(ParameterError, match="takes 2 inputs"):
        load_encoder(model(tmp_path / "two.onnx", ["n", 3, 6, 8], [2], inputs=2))
    path = model(tmp_path / "m.onnx", ["n", 3, 6, 8], [2])
    (tmp_path / "m.yaml").write_text("size: [")
    with pytest.raises(ParameterError, match=r"m\.yaml: is not YAML"):
        load_encoder(path)
    (tmp_path / "m.yaml").write_text("- 224")
    with pytest.raises(ParameterError, match="give names and values"):
        load_encoder(path)
    with pytest.raises(ParameterError, match="without an encoder"):
        load_encoder(None, {"size": 224})


def test_a_model_whose_output_is_no_vector_is_refused_before_any_clip_is_decoded(tmp_path):
    path = model(tmp_path / "map.onnx", ["n", 6, 8, 3], [1], kind=TensorProto.UINT8)
    with pytest.raises(ParameterError, match=r"has the shape \(1, 8, 3\).*choose another output, or pooling"):
        EmbedParameters(encoder=path).recipe()
    assert EmbedParameters(encoder=path, encoder_options={"pooling": "mean"}).recipe().frames == 8
