"""The demo, and folders as other tools name and fill them: mixed endings, variants of Curator's names, float16 bits."""

import shlex
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import untwin
from inputs import snapshot, table_of, twin_ids, twin_table, twin_vectors, write_parquet
from untwin.errors import ParameterError

_REPOSITORY = Path(__file__).parents[2]


def test_the_demo_shows_removed_rows_beside_kept_ones_and_can_be_run_again(tmp_path, capsys):
    for _ in range(2):
        demo.packages(tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        removed = [line for line in lines if line.startswith("    removed  ")]
        kept = [line for line in lines if line.startswith("    kept     ")]
        similarities = [float(line.split()[1]) for line in lines if line.startswith("  similarity ")]
        assert len(removed) == len(kept) == len(similarities) == 3
        assert min(similarities) >= 0.95


@pytest.mark.slow
def test_the_demo_of_clips_runs_from_anywhere_and_what_it_says_to_try_next_works(tmp_path):
    pytest.importorskip("av")
    command = [sys.executable, str(_REPOSITORY / "examples" / "demo.py"), "out"]
    written = []
    for _ in range(2):
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        default = next(line.split() for line in run.stdout.splitlines() if "the encoder's default" in line)
        assert min(map(float, default[2:4])) >= 0.95
        assert "The film in bad quality was found" in run.stdout
        assert (tmp_path / "out" / "out" / "report.html").stat().st_size > 1_000_000
        written.append(snapshot(tmp_path / "out" / "clips"))
    assert written[0] == written[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    lines = [shlex.split(line) for line in run.stdout.splitlines() if "untwin apply" in line or "untwin show" in line]
    assert len(lines) == 3
    for _, *words in lines:
        answer = ["--yes"] if "link" in words else []  # it asks, and there is no terminal
        subprocess.run([sys.executable, "-m", "untwin", *words, *answer], cwd=tmp_path, check=True, capture_output=True)
    assert len([path for path in (tmp_path / "out" / "clean").rglob("*") if path.is_file()]) == 7


def test_mirrored_files_whose_names_differ_in_the_ending_only_do_not_overwrite_each_other(tmp_path):
    first, second = np.eye(8, dtype=np.float32)[:3], np.eye(8, dtype=np.float32)[3:6]
    write_parquet(tmp_path / "in" / "a.parquet", table_of(["a0", "a1", "a2"], first))
    write_parquet(tmp_path / "in" / "a.pq", table_of(["b0", "b1", "b2"], second))
    for _ in range(2):  # the second time over what the first has written
        untwin.deduplicate(tmp_path / "in", tmp_path / "out", eps=0.05, kept="mirror", overwrite=True)
    written = {path.name: pq.read_table(path)["id"].to_pylist() for path in (tmp_path / "out" / "kept").iterdir()}
    assert written == {"a.parquet": ["a0", "a1", "a2"], "a.pq": ["b0", "b1", "b2"]}


@pytest.mark.parametrize("name", ["iv2_embd_parquet", "ce1_embd_336p_parquet", "openai_embd_parquet"])
def test_an_output_folder_of_a_curation_pipeline_is_read_by_its_embeddings_only(tmp_path, name):
    write_parquet(tmp_path / "run" / name / "chunk.parquet", twin_table())
    write_parquet(tmp_path / "run" / "cds_parquet" / "chunk.parquet", pa.table({"url": ["x"]}))
    result = untwin.deduplicate(tmp_path / "run", tmp_path / "out", eps=0.05)
    assert (result.n_rows, result.n_duplicates) == (12, 6)


def test_of_several_sets_of_embeddings_the_variant_in_the_summary_is_read(tmp_path):
    write_parquet(tmp_path / "run" / "ce1_embd_224p_parquet" / "chunk.parquet", twin_table())
    write_parquet(tmp_path / "run" / "ce1_embd_336p_parquet" / "chunk.parquet", twin_table().slice(0, 5))
    with pytest.raises(ParameterError, match="ce1_embd_224p_parquet, ce1_embd_336p_parquet"):
        untwin.deduplicate(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "summary.json").write_text('{"embedding_algorithm": "cosmos-embed1-336p"}')
    assert untwin.deduplicate(tmp_path / "run", tmp_path / "out").n_rows == 5


@pytest.mark.parametrize("make", [pa.list_, pa.large_list])
def test_clusters_with_float16_numbers_as_uint16_bits_are_compared_by_the_numbers(tmp_path, make):
    halves = twin_vectors().astype(np.float16)
    bits = pa.array(halves.view(np.uint16).tolist(), make(pa.uint16()))
    distances = pa.array(np.arange(12, dtype=np.float32))
    table = pa.table({"id": twin_ids(), "embedding": bits, "cosine_dist_to_cent": distances})
    write_parquet(tmp_path / "kmeans" / "centroid=0" / "a_0.parquet", table.slice(0, 7))
    write_parquet(tmp_path / "kmeans" / "centroid=0" / "b_0.parquet", table.slice(7))
    stage = untwin.PairwiseStage("id", "embedding", str(tmp_path / "kmeans"), str(tmp_path / "pairs"))
    untwin.Pipeline(stages=[stage]).run()
    rows = pq.read_table(tmp_path / "pairs" / "cluster_0.parquet").to_pydict()
    unit = halves.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    products = unit @ unit.T
    order = [twin_ids().index(name) for name in rows["id"]]
    assert order == list(range(11, -1, -1))
    for rank in range(1, 12):
        best = max(order[:rank], key=lambda other: products[order[rank], other])
        assert rows["cosine_sim_score"][rank] == pytest.approx(products[order[rank], best], abs=1e-5)
    assert dict(zip(rows["id"], rows["max_id"], strict=True))["row00"] == "row06"
