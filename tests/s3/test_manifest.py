"""`untwin apply --mode manifest`: the objects to remove, as S3 Batch Operations takes them; nothing is removed."""

import csv
from urllib.parse import unquote

import pyarrow as pa
import pytest

import untwin
from inputs import table_of, twin_table, twin_vectors, write_parquet
from untwin.errors import InputNotFoundError, OutputExistsError

NAMES = [
    "a/row 06+x.mp4",
    'b%2F,"c".mp4',
    "cams/日本/left.mp4",
    "cams/日本/right.mp4",
    "d&e=f;#?.webm",
    "\u202egnp.mp4",
    "~p.mp4",
    "q.mp4",
]
IDS = ["row 06+x", 'b%2F,"c"', "日本", "d&e=f;#?", "\u202egnp", "~p"]
"""Six duplicates, of which one has two objects; the last object belongs to nobody."""


@pytest.fixture
def finished(bucket, tmp_path):
    """A run whose duplicates are IDS, and media for all rows."""
    ids = [f"kept{n}" for n in range(6)] + IDS
    source = write_parquet(tmp_path / "in.parquet", table_of(ids, twin_vectors(), n=pa.array(range(12))))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="n:asc")
    for name in [*NAMES, *(f"kept{n}.mp4" for n in range(6)), "notes.txt"]:
        bucket.client.put_object(Bucket=bucket.name, Key=f"set 1/clips/{name}", Body=b"12345")
    return tmp_path / "out"


def test_the_objects_of_duplicates_are_listed_and_stay(bucket, finished, tmp_path):
    media = bucket.url("set 1/clips")
    before = bucket.contents()
    result = untwin.apply(finished, eps=0.05, mode="manifest", media=media, storage_options=bucket.options)
    text = (tmp_path / "out" / "remove.csv").read_bytes()
    text.decode("ascii")
    lines = list(csv.reader(text.decode().splitlines()))
    assert {name for name, _ in lines} == {bucket.name}
    keys = [key for _, key in lines]
    assert sorted(map(unquote, keys)) == sorted(f"set 1/clips/{name}" for name in NAMES[:-1])
    assert "set%201/clips/a/row%2006%2Bx.mp4" in keys
    assert bucket.contents() == before
    assert result.n_duplicates == 6
    # to S3, again, and with something else in its place
    for _ in range(2):
        options = {"mode": "manifest", "media": media, "to": bucket.url("lists"), "storage_options": bucket.options}
        untwin.apply(finished, eps=0.05, **options)
        assert bucket.contents("lists/") == {"remove.csv": text}
    bucket.client.put_object(Bucket=bucket.name, Key="lists/remove.csv", Body=b"mine")
    with pytest.raises(OutputExistsError, match=r"lists/remove\.csv"):
        untwin.apply(finished, eps=0.05, **options)


def test_objects_are_found_by_a_column_of_urls(bucket, tmp_path):
    paths = [bucket.url(f"c/{n}.bin") if n % 2 else f"{n}.bin" for n in range(12)]
    source = write_parquet(tmp_path / "in.parquet", twin_table(url=paths))
    untwin.deduplicate(source, tmp_path / "out", eps=0.05, rank_by="id:asc")
    for n in range(11):
        bucket.client.put_object(Bucket=bucket.name, Key=f"c/{n}.bin", Body=b"1")
    options = {"mode": "manifest", "media": bucket.url("c"), "path_field": "url", "storage_options": bucket.options}
    with pytest.raises(InputNotFoundError, match="1 of 6 rows have no file there by column 'url', as row11"):
        untwin.apply(tmp_path / "out", eps=0.05, **options)
    untwin.apply(tmp_path / "out", eps=0.05, skip_missing=True, **options)
    expected = "".join(f"{bucket.name},c/{n}.bin\n" for n in (6, 7, 8, 9, 10))
    assert sorted((tmp_path / "out" / "remove.csv").read_text().splitlines()) == sorted(expected.splitlines())
