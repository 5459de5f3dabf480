"""A real S3-speaking server on loopback, a bucket for each test, and the data of the tests."""

import http.server
import logging
import os
import threading
import uuid

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from proxy import Proxy

from untwin.storage import files

SECRET = "canary-3f9Zq-do-not-write-me"
KEY = "canary-key-71X"


class Bucket:
    """A bucket and what a user gives to reach it."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.options = {"key": KEY, "secret": SECRET, "endpoint_url": endpoint}
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=self.name)

    @property
    def environment(self):
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}

    def url(self, path):
        return f"s3://{self.name}/{path}"

    def upload(self, folder, prefix):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), self.name, f"{prefix}/{path.relative_to(folder)}")

    def uploads(self):
        """(key, number) of every upload that was begun and neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [(upload["Key"], upload["UploadId"]) for upload in found]

    def contents(self, prefix=""):
        """Name below the prefix → bytes."""
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
            for item in page.get("Contents", []):
                body = self.client.get_object(Bucket=self.name, Key=item["Key"])["Body"].read()
                found[item["Key"].removeprefix(prefix)] = body
        return found


@pytest.fixture(scope="session")
def endpoint():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def _no_other_credentials(monkeypatch):
    """Nothing of the machine's own AWS settings is used, and no client is left over from another test."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    files._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(endpoint):
    return Bucket(endpoint)


@pytest.fixture
def proxy(endpoint):
    """What stands between client and server where a test asks for faults."""
    with Proxy(endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxied(bucket, proxy, monkeypatch):
    """A bucket whose options lead through the proxy; the library retries as by default, but with short pauses."""
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setattr("botocore.retryhandler.random.random", lambda: 0.02)
    bucket.options["endpoint_url"] = proxy.url
    return bucket


@pytest.fixture
def denied():
    """The endpoint of a server that answers 403 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def source(tmp_path):
    """Six files of 50 rows, one without rows; near and exact copies, a zero vector and a repeated row among them."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 12))
    X[1::3] = X[::3] + 0.03 * rng.normal(size=(100, 12))
    X[2::9] = X[::9][: len(X[2::9])]
    ids = [f"clip-{at:03d}" for at in rng.permutation(300)]
    X[17] = 0
    ids[250], X[250] = ids[20], X[20]
    folder = tmp_path / "source"
    folder.mkdir()
    table = pa.table(
        {
            "id": pa.array(ids, pa.large_string()),
            "embedding": pa.array(X.tolist(), pa.list_(pa.float64())),
            "duration": pa.array(rng.integers(1, 9, 300)),
            "text": [f"text {at}" for at in range(300)],
        }
    )
    for number in range(6):
        pq.write_table(table.slice(50 * number, 50), folder / f"{number}.parquet", row_group_size=20)
    (folder / "empty").mkdir()
    pq.write_table(table.slice(0, 0), folder / "empty/x.parquet")
    return folder
