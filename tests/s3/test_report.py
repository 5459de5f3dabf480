"""A report of a run on S3 shows what a report of the same run in a local folder shows."""

import dataclasses

import pytest

import untwin
from untwin.jobs import report, report_rows

OPTIONS = {"eps": 0.02, "n_clusters": 3, "rank_by": "duration:desc"}


def test_the_report_of_a_run_on_s3_is_that_of_the_local_run(bucket, source, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "renderer", lambda: lambda found: shown.append(found) or "page")
    # clusters are read in parts, too
    monkeypatch.setattr(report_rows, "_BATCH", 90)
    bucket.upload(source, "in")
    untwin.deduplicate(bucket.url("in"), bucket.url("out"), storage_options=bucket.options, report=True, **OPTIONS)
    untwin.deduplicate(source, tmp_path / "out", report=True, **OPTIONS)
    page = untwin.write_report(bucket.url("out"), group_by="duration", storage_options=bucket.options)
    untwin.write_report(tmp_path / "out", group_by="duration")
    assert page == bucket.url("out/report.html")
    assert bucket.contents("out/")["report.html"] == b"page"
    assert len(shown) == 4
    for remote, local in (shown[:2], shown[2:]):
        place = {"output": "", "made": "", "finished": "", "reproduce": "", "apply": "", "parameters": {}}
        assert dataclasses.replace(remote, **place) == dataclasses.replace(local, **place)
        assert remote.total_seconds == pytest.approx(local.total_seconds)
        assert len(remote.pairs) > 60
        assert len(remote.groups) == 12
        assert dict(remote.clips[0].columns).keys() == {"duration", "text"}
        assert remote.apply == f"untwin apply {bucket.url('out')}"
        assert all(secret not in repr(remote) for secret in (bucket.options["key"], bucket.options["secret"]))
    assert len(shown[2].sources) == 8
