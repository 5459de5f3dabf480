"""What the figures of the benchmarks rest on: the data, the copy, the measuring of a process, and recall."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import baselines
import generate
import measure
import recall
from inputs import write_parquet


@pytest.fixture
def small_file(tmp_path):
    X = np.random.default_rng(3).standard_normal((50, 24)).astype(np.float32)
    write_parquet(tmp_path / "small.parquet", pa.table({"id": [f"p{k}" for k in range(50)], "embedding": list(X)}))
    return tmp_path / "small.parquet", X / np.linalg.norm(X, axis=1, keepdims=True)


def all_rows(made):
    blocks = list(made.blocks())
    ids = pa.concat_arrays([block.ids for block in blocks]).to_pylist()
    return ids, np.concatenate([block.vectors for block in blocks]), np.concatenate([b.similarity for b in blocks])


def test_tiles_are_the_rows_first_and_then_copies_with_their_own_similarity_and_id(small_file):
    path, X = small_file
    ids, vectors, similarity = all_rows(generate.Tiles(20_000, path, seed=5))
    np.testing.assert_allclose(vectors[:50], X, atol=1e-6)
    assert (similarity[:50] == 1).all() and ids[:50] == [f"p{k}" for k in range(50)]
    assert len(set(ids)) == 20_000 and ids[50:52] == ["p0~1", "p1~1"]
    cosine = np.einsum("ij,ij->i", vectors, X[np.arange(20_000) % 50])
    np.testing.assert_allclose(cosine, similarity, atol=1e-5)
    shares = np.histogram(cosine[50:], bins=6, range=(0.7, 1.0))[0] / (20_000 - 50)
    np.testing.assert_allclose(shares, 1 / 6, atol=0.02)
    again = all_rows(generate.Tiles(9_000, path, seed=5))  # another number of rows, other blocks
    assert again[0] == ids[:9_000] and (again[1] == vectors[:9_000]).all()
    assert (all_rows(generate.Tiles(100, path, seed=6))[1][50:] != vectors[50:100]).any(axis=1).all()


def test_frames_hardly_differ_from_their_scene():
    ids, vectors, similarity = all_rows(generate.Scenes(10_000, 64, 20, seed=5))
    scene = np.concatenate([block.group for block in generate.Scenes(10_000, 64, 20, seed=5).blocks()])
    assert len(set(ids)) == 10_000 and np.bincount(scene).min() > 400
    means = np.stack([vectors[scene == number].mean(axis=0) for number in range(20)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(means @ means.T - np.eye(20)).max() < 0.5
    np.testing.assert_allclose(np.einsum("ij,ij->i", vectors, means[scene]), similarity, atol=3e-5)
    assert 0.999 <= similarity.min() < 0.9991 and 0.99998 < similarity.max() <= 0.99999
    again = all_rows(generate.Scenes(9_000, 64, 20, seed=5))
    assert again[0] == ids[:9_000] and (again[1] == vectors[:9_000]).all()


@pytest.mark.parametrize("layout", generate.LAYOUTS)
def test_the_copy_holds_the_same_rows_compressed_and_encoded_as_they_were(tmp_path, layout):
    generate.write(tmp_path / "in", generate.Rows(300, 16), layout, files=3)
    baselines.copy(tmp_path / "in", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir()) and len(names) >= 3
    for name in names:
        one, other = (pq.ParquetFile(tmp_path / folder / name) for folder in ("in", "out"))
        assert one.read().equals(other.read())
        columns = [
            [(c.path_in_schema, c.compression, c.encodings) for c in (g.column(k) for k in range(g.num_columns))]
            for g in (one.metadata.row_group(0), other.metadata.row_group(0))
        ]
        assert columns[0] == columns[1]


def test_all_layouts_are_read_as_the_same_vectors(tmp_path):
    made = generate.Rows(300, 16)
    (block,) = made.blocks()
    for layout, error in (("plain", 0), ("zstd", 0), ("float16", 1e-3)):
        generate.write(tmp_path / layout, made, layout, files=3)
        X = baselines.read_vectors(tmp_path / layout)
        assert X.dtype == np.float32
        np.testing.assert_allclose(X, block.vectors, atol=error)
    generate.write(tmp_path / "upstream", made, "upstream")  # its files have random names
    X = baselines.read_vectors(tmp_path / "upstream")
    assert sorted(map(bytes, X)) == sorted(map(bytes, block.vectors))


def test_a_measured_process_has_its_memory_and_that_of_its_children_its_report_and_a_clean_environment(monkeypatch):
    for name in measure.REMOVED:
        monkeypatch.setenv(name, "1")
    hold = "held = b'x' * (80 << 20); import time; time.sleep(0.5)"
    script = (
        "import json, os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {hold!r}])\n"
        f"{hold}\nchild.wait()\nprint('text'); print(json.dumps(dict(os.environ)))"
    )
    done = measure.measure([sys.executable, "-c", script])
    assert 2 * (80 << 20) <= done.peak_bytes < 3 * (80 << 20)
    assert done.seconds >= 0.5 and done.cpu_seconds > 0
    assert "PATH" in done.report and not set(measure.REMOVED) & set(done.report)


def test_a_measured_process_that_fails_says_so():
    with pytest.raises(measure.CommandError, match="code 3"):
        measure.measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_most_similar_row_of_a_label_is_that_of_brute_force(monkeypatch):
    monkeypatch.setattr(recall, "_BLOCK", 7)
    monkeypatch.setattr(recall, "_COLUMNS", 11)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 4)).astype(np.float32)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    sample, labelings = rng.permutation(60)[:40], [np.zeros(60, int), rng.integers(0, 3, 60)]
    found = recall.most_similar(X, sample, np.float32(0.8), labelings)
    products = X @ X.T
    np.fill_diagonal(products, -1)
    for labels, row in zip(labelings, found, strict=True):
        expected = np.where(labels[:, None] == labels, products, -1).max(axis=1)[sample]
        np.testing.assert_allclose(row, np.where(expected >= np.float32(0.8), expected, -1), atol=1e-6)
    assert 0 < (found[1] > 0).sum() < (found[0] > 0).sum()


def test_the_baseline_of_embedding_decodes_and_encodes_the_same_frames(tmp_path):
    pytest.importorskip("av")
    import embed
    from media.films import film, picture
    from untwin.media.decode import frames
    from untwin.media.encoder import load_encoder

    path = film(tmp_path / "film.mp4", "libx264", [picture(number, 1280, 720) for number in range(20)])
    encoder = load_encoder()
    ours = frames(path, 8, size=(56, 56), fit=encoder.resize).frames
    assert np.array_equal(embed._bare_frames(path, 56, 56), ours)
    np.testing.assert_allclose(embed._bare_vector(path, encoder.path), encoder.encode(ours), atol=1e-6)


@pytest.mark.parametrize("path", sorted(Path(measure.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_finds_what_it_takes_from_the_product(path):
    importlib.import_module(path.stem)
