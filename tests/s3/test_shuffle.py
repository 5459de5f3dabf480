"""Reading a group of clusters out of many shards on S3: how many requests, and whether their latency adds up."""

import time

import numpy as np
import pyarrow as pa
import pytest

from untwin.errors import UntwinError
from untwin.storage.files import Storage
from untwin.storage.shards import Slices, make_shard, write_shard

N_SHARDS, N_GROUPS, LATENCY = 48, 5, 0.1


@pytest.fixture
def slices(bucket):
    """Shards with rows of all groups but the last, and of group 1 in every other shard only."""
    storage = Storage(bucket.options)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(N_SHARDS):
        labels = rng.permutation(np.repeat([0, 1, 2, 3] if number % 2 else [0, 2, 3], 20)).astype(np.int32)
        side = pa.table({"id": [f"{number}-{at}" for at in range(len(labels))]})
        vectors = rng.normal(size=(len(labels), 8)).astype(np.float32)
        paths.append(bucket.url(f"shards/{number:06d}.arrow"))
        write_shard(
            storage, paths[-1], make_shard(side, vectors, labels, np.arange(N_GROUPS, dtype=np.int32), N_GROUPS)
        )
    found = Slices(tuple(paths), N_GROUPS, bucket.url("index"))
    assert found.collect(storage).tolist() == [20 * N_SHARDS, 10 * N_SHARDS, 20 * N_SHARDS, 20 * N_SHARDS, 0]
    return found


def test_a_slice_with_rows_is_one_request_and_their_latency_does_not_add_up(bucket, proxy, slices):
    storage = Storage({**bucket.options, "endpoint_url": proxy.url})
    proxy.delay = LATENCY
    next(slices.rows(storage, 3))  # connects
    for group, n_shards in enumerate((N_SHARDS, N_SHARDS // 2, N_SHARDS, N_SHARDS, 0)):
        proxy.reset(lambda _: "delay")
        started = time.monotonic()
        rows = list(slices.rows(storage, group))
        seconds = time.monotonic() - started
        assert [part.columns["id"][0].as_py().split("-")[0] for part in rows] == [
            str(number) for number in range(N_SHARDS) if n_shards == N_SHARDS or (n_shards and number % 2)
        ]
        assert [entry.request.kind for entry in proxy.log] == ["GET"] * (1 + n_shards)
        assert all("bytes=" in entry.request.query for entry in proxy.log)
        if n_shards == N_SHARDS:
            assert seconds < 0.5 * LATENCY * n_shards


@pytest.mark.parametrize("size", [0, 100, -100])
def test_an_object_that_is_cut_off_is_named(bucket, slices, size):
    key = "shards/000007.arrow"
    content = bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=content[:size])
    with pytest.raises(UntwinError, match=r"shards/000007\.arrow: "):
        list(slices.rows(Storage(bucket.options), 3))
