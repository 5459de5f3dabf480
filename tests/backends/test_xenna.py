"""Xenna does what every backend has to, and runs the tutorial of NeMo Curator."""

import contextlib
import importlib.util
import os
import signal
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
from conformance import OPTIONS, REFERENCE, RUNS, Conformance, Counted, expected, source  # noqa: F401 - fixtures
from test_ray_conformance import ray_of_this_process  # noqa: F401 - fixture

from inputs import Answer, table_of, write_split
from untwin import deduplicate
from untwin.backends import make_executor
from untwin.errors import MissingExtraError, ParameterError, ResourceError
from untwin.stages.base import Stage, Task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cosmos_xenna") is None, reason="cosmos-xenna is not installed; it is built for Linux only"
)

TUTORIAL = """
from untwin.pipeline import Pipeline
from untwin.backends.xenna import XennaExecutor
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage

pipe = Pipeline(name="video_semantic_dedup", description="KMeans + pairwise dedup")
pipe.add_stage(KMeansStage(
    n_clusters=1000, id_field="id", embedding_field="embedding",
    input_path=f"{OUT_DIR}/iv2_embd_parquet",            # or s3://…
    output_path=f"{OUT_DIR}/semantic_dedup/kmeans", input_filetype="parquet", embedding_dim=512,
    read_kwargs={"storage_options": None}, write_kwargs={"storage_options": None}))
pipe.add_stage(PairwiseStage(
    id_field="id", embedding_field="embedding",
    input_path=f"{OUT_DIR}/semantic_dedup/kmeans", output_path=f"{OUT_DIR}/semantic_dedup/pairwise",
    which_to_keep="hard",                                # or "easy" or "random"
    sim_metric="cosine",                                 # or "l2": which centroid distance the ranking uses
    pairwise_batch_size=1024,
    read_kwargs={"storage_options": None}, write_kwargs={"storage_options": None}))
pipe.run(XennaExecutor())                                # pipe.run() = the local backend
"""


def workers_of_xenna():
    """Processes below this one that Xenna has started."""
    psutil = pytest.importorskip("psutil")
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("StageWorker" in part for part in process.cmdline()):
                found.append(process.pid)
    return found


def assert_no_workers_are_left():
    end = time.monotonic() + 60
    while workers_of_xenna():
        assert time.monotonic() < end
        time.sleep(0.2)


class TestXenna(Conformance):
    options: ClassVar = {"backend": "xenna", "workers": 2}
    executor = staticmethod(lambda: make_executor("xenna", 2))

    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("plain", "probes"))) for name in RUNS],
    )
    def test_the_answer_is_that_of_one_thread(self, source, expected, tmp_path, name):  # noqa: F811 - fixtures
        super().test_the_answer_is_that_of_one_thread(source, expected, tmp_path, name)

    @pytest.mark.parametrize(
        ("step", "after"),
        [
            ("sample", 1),
            *(pytest.param(*at, marks=pytest.mark.slow) for at in [("assign", 900), ("pairwise", 300), ("remove", 1)]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("way", ["begun here", "finished here"])
    def test_interrupted_and_finished_on_another_backend(self, source, expected, tmp_path, step, after, way):  # noqa: F811 - fixtures
        super().test_interrupted_and_finished_on_another_backend(source, expected, tmp_path, step, after, way)

    def test_a_users_mistake_arrives_as_it_is(self, tmp_path):
        super().test_a_users_mistake_arrives_as_it_is(tmp_path)
        assert_no_workers_are_left()


def test_the_tutorial_runs_as_it_is_written_and_gives_what_the_local_backend_gives(tmp_path, capfd):
    rng = np.random.default_rng(8)
    vectors = rng.standard_normal((1500, 512))
    vectors[1::3] = vectors[::3] + 0.01 * rng.standard_normal((500, 512))
    table = table_of([f"clip-{number}" for number in range(1500)], list(vectors))
    found = {}
    for name, text in (("xenna", TUTORIAL), ("local", TUTORIAL.replace("pipe.run(XennaExecutor())", "pipe.run()"))):
        write_split(tmp_path / name / "iv2_embd_parquet", table, 10)
        exec(text, {"OUT_DIR": str(tmp_path / name)})
        folder = tmp_path / name / "semantic_dedup"
        found[name] = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert found["xenna"] == found["local"]
    assert len([path for path in found["xenna"] if path.parts[0] == "pairwise"]) > 500
    said = "".join(capfd.readouterr())
    assert not [line for line in said.splitlines() if "xenna" in line or "ray" in line or "INFO" in line]


class Killer(Counted):
    """Kills the worker processes of Xenna once so many rows of a step are done."""

    killed = 0

    def advance(self, n_rows):
        super().advance(n_rows)
        if self.name == "assign" and not self.killed and self.rows[self.name] >= 900:
            for process in workers_of_xenna():
                os.kill(process, signal.SIGKILL)
                self.killed += 1


def test_a_run_that_loses_workers_has_the_same_answer(source, expected, tmp_path):  # noqa: F811
    progress = Killer()
    deduplicate(source, tmp_path / "out", **OPTIONS, **TestXenna.options, progress=progress)
    assert progress.killed > 0
    assert progress.rows == progress.wanted
    assert Answer(tmp_path / "out") == expected("plain")[1]


def test_a_run_that_was_interrupted_on_the_local_backend_is_finished(source, expected, tmp_path):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        deduplicate(source, tmp_path / "out", **OPTIONS, **REFERENCE, progress=Counted("pairwise", 300))
    progress = Counted()
    deduplicate(source, tmp_path / "out", **OPTIONS, **TestXenna.options, progress=progress)
    assert Answer(tmp_path / "out") == expected("plain")[1]
    assert "remove" in progress.rows
    assert not {"sample", "fit"} & progress.rows.keys()


class Deadly(Stage):
    """A stage of which the second unit ends its process."""

    name = "deadly"

    def units(self, upstream):
        return [Task(unit, 1) for unit in range(3)]

    def process(self, task, context):
        if task.unit == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return task


@pytest.mark.slow
def test_a_unit_that_kills_each_of_its_workers_ends_in_an_error():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(ResourceError, match=r"stage deadly: the last of 6 pipelines of Xenna failed"):
        TestXenna.executor().execute([Deadly()])
    assert_no_workers_are_left()


def test_an_address_that_xenna_cannot_use_is_refused():
    with pytest.raises(ParameterError, match=r"'ray://here:10001'.*'auto'"):
        make_executor("xenna", ray_address="ray://here:10001")


@pytest.mark.parametrize("missing", ["cosmos_xenna.pipelines", "ray"])
def test_packages_that_are_not_installed_are_named(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "untwin.backends.xenna", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"untwin\[xenna\]"):
        make_executor("xenna")
