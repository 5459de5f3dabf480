"""Input is data: nothing in it is ever executed or unpickled."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import TWINS, twin_ids, twin_table, twin_vectors, witnesses, write_parquet
from untwin import deduplicate
from untwin.errors import DamagedFileError, SchemaError


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self._canary = str(canary)

    def __reduce__(self):
        return open, (self._canary, "w")


@pytest.fixture
def bomb(tmp_path):
    """A pickle that would make a file, and that file's path; it works."""
    content = pickle.dumps(Bomb(tmp_path / "works"))
    pickle.loads(content).close()
    assert (tmp_path / "works").exists()
    return Bomb(tmp_path / "canary"), tmp_path / "canary"


@pytest.mark.parametrize("skip_bad_files", [False, True])
def test_an_array_of_pickled_objects_is_refused(tmp_path, bomb, skip_bad_files):
    source = tmp_path / "in"
    source.mkdir()
    np.save(source / "img_emb_0.npy", np.array([bomb[0]] * 3, dtype=object), allow_pickle=True)
    write_parquet(source / "metadata_0.parquet", pa.table({"id": ["a", "b", "c"]}))
    with pytest.raises(SchemaError, match=r"img_emb_0\.npy: holds pickled Python objects, which are never loaded"):
        deduplicate(str(source), str(tmp_path / "out"), input_filetype="npy", skip_bad_files=skip_bad_files)
    assert not bomb[1].exists()


def test_the_header_of_an_array_is_no_program(tmp_path, bomb):
    header = f"{{'descr': open({str(bomb[1])!r}, 'w'), 'fortran_order': False, 'shape': (3, 2)}}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(24)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "img_emb_0.npy").write_bytes(content)
    write_parquet(tmp_path / "in" / "metadata_0.parquet", pa.table({"id": ["a", "b", "c"]}))
    with pytest.raises(DamagedFileError, match=r"img_emb_0\.npy: .*header is damaged"):
        deduplicate(str(tmp_path / "in"), str(tmp_path / "out"), input_filetype="npy")
    assert not bomb[1].exists()


@pytest.mark.parametrize("kept", ["compact", "mirror"])
def test_pickles_in_the_metadata_of_parquet_are_bytes(tmp_path, bomb, kept):
    evil = pickle.dumps(bomb[0])
    names = ("arrow.py_extension_type", "some.extension")
    fields = [
        pa.field(
            name,
            kind,
            metadata={b"ARROW:extension:name": names[number % 2].encode(), b"ARROW:extension:metadata": evil},
        )
        for number, (name, kind) in enumerate(
            [("id", pa.string()), ("embedding", pa.list_(pa.float32())), ("blob", pa.binary())]
        )
    ]
    table = twin_table(blob=pa.array([evil] * 12))
    table = table.cast(pa.schema(fields, metadata={"pandas": evil, "huggingface": evil, "PANDAS_ATTRS": evil}))
    path = write_parquet(tmp_path / "in" / "a.parquet", table)
    assert pq.read_metadata(path).metadata[b"pandas"] == evil
    deduplicate(str(tmp_path / "in"), str(tmp_path / "out"), eps=0.05, rank_by="id:asc", kept=kept)
    assert witnesses(tmp_path / "out") == TWINS
    assert not bomb[1].exists()


def test_lines_that_look_like_objects_are_text(tmp_path, bomb):
    (tmp_path / "in").mkdir()
    tag = f'"!!python/object/apply:open": ["{bomb[1]}", "w"], "__reduce__": "open"'
    lines = [
        f'{{"id": "{name}", "embedding": {vector.tolist()}, {tag}}}'
        for name, vector in zip(twin_ids(), twin_vectors(), strict=True)
    ]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    deduplicate(str(tmp_path / "in"), str(tmp_path / "out"), eps=0.05, rank_by="id:asc", input_filetype="jsonl")
    assert not bomb[1].exists()
