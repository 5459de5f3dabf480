"""What every backend has to do: each test file of a backend inherits `Conformance` and says how it is asked for.

The answers of all backends are compared with those of one thread of this process. The units are many and small, so
that they run at the same time and meet in any order.
"""

import json
import re
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from inputs import Answer, awkward_source, read_folder, snapshot, table_of, write_split
from untwin import apply, audit, deduplicate
from untwin.backends.base import NoProgress
from untwin.errors import DamagedFileError, MissingExtraError, RepeatedIdError, ResourceError, UntwinError
from untwin.pipeline import Pipeline
from untwin.stages.duplicates import IdentifyDuplicatesStage
from untwin.stages.kmeans import KMeansStage
from untwin.stages.pairwise import PairwiseStage
from untwin.stages.removal import RemoveDuplicatesStage

N_ROWS, DIM, N_CLUSTERS = 3000, 16, 12
OPTIONS = {"eps": 0.05, "n_clusters": N_CLUSTERS, "on_repeated_id": "first"}
PROBES = {**OPTIONS, "eps": 0.4, "probes": 3}
RUNS = {
    "plain": OPTIONS,
    "ranked": {**OPTIONS, "compare_to": "ranked", "which_to_keep": "random", "kept": "mirror"},
    "probes": PROBES,
    "probes chosen": {**PROBES, "probes": "auto"},
    "scores only": {**OPTIONS, "eps": None},
}
REFERENCE = {"workers": 1, "memory": "256MB"}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return awkward_source(tmp_path_factory.mktemp("conformance") / "in", N_ROWS, 9, DIM)


@pytest.fixture(scope="session")
def expected(source, tmp_path_factory):
    """The folder and the answer of a run by one thread, made when it is first asked for."""
    made = {}

    def expected(name):
        if name not in made:
            out = tmp_path_factory.mktemp("expected") / "out"
            deduplicate(source, out, **RUNS[name], **REFERENCE)
            made[name] = out, Answer(out)
        return made[name]

    return expected


class Counted(NoProgress):
    """Notes what it is told; raises KeyboardInterrupt, as Ctrl-C does, once so many rows of a step are done."""

    def __init__(self, stop_in="", after=0):
        self.rows, self.wanted, self.name = {}, {}, ""
        self._stop_in, self._after = stop_in, after

    def start(self, name, n_rows):
        self.name = name
        self.rows[name], self.wanted[name] = 0, n_rows

    def advance(self, n_rows):
        self.rows[self.name] += n_rows
        if self._stop_in and self._stop_in in self.name and self.rows[self.name] >= self._after:
            raise KeyboardInterrupt


class Conformance:
    """Inherit from this, give `options` (for `deduplicate`, `apply` and `audit`) and `executor` (for pipelines)."""

    options: ClassVar[dict]
    executor: staticmethod

    @pytest.mark.parametrize("name", RUNS)
    def test_the_answer_is_that_of_one_thread(self, source, expected, tmp_path, name):
        progress = Counted()
        deduplicate(source, tmp_path / "out", **RUNS[name], **self.options, progress=progress)
        assert Answer(tmp_path / "out") == expected(name)[1]
        assert progress.rows == progress.wanted
        assert len(progress.rows) >= 5
        resources = json.loads((tmp_path / "out" / "run.json").read_text())["resources"]
        assert resources["backend"] == self.options.get("backend", "local")

    def test_another_threshold_and_an_audit(self, source, expected, tmp_path):
        found = []
        for number, options in enumerate((REFERENCE, self.options)):
            out = tmp_path / str(number)
            deduplicate(source, out, **OPTIONS, **REFERENCE)
            n_kept = apply(out, eps=0.2, **options).n_kept
            tables = [read_folder(out / "eps=0.2" / name) for name in ("duplicates", "kept")]
            audited = audit(out, max_sample=500, **options).audit
            found.append((n_kept, tables, audited.recall_rows, audited.answer))
        assert found[0] == found[1]
        assert found[0][1][0].num_rows > 100

    def test_the_stages_as_a_pipeline(self, source, tmp_path):
        answers = []
        for number, executor in enumerate((None, self.executor())):
            out = str(tmp_path / str(number))
            stages = [
                KMeansStage(N_CLUSTERS, "id", "embedding", source, f"{out}/kmeans", on_repeated_id="first"),
                PairwiseStage("id", "embedding", f"{out}/kmeans", f"{out}/pairwise", eps=0.05, compare_to="kept"),
                IdentifyDuplicatesStage(out, 0.05),
            ]
            outcome = Pipeline("all", stages=stages).run(executor)
            again = PairwiseStage("id", "embedding", f"{out}/kmeans", f"{out}/alone", which_to_keep="easy")
            remove = RemoveDuplicatesStage(source, f"{out}/kept", duplicates_path=f"{out}/duplicates", id_field="id")
            Pipeline("again", stages=[again]).run(executor)
            kept = Pipeline("remove", stages=[remove]).run(executor)
            tables = [read_folder(f"{out}/{name}") for name in ("duplicates", "pairwise", "alone", "kept")]
            counts = [(report.name, report.n_units, report.n_rows) for report in outcome.reports + kept.reports]
            answers.append((tables, counts))
        assert answers[0] == answers[1]
        assert all(table.num_rows > 100 for table in answers[0][0])

    def test_little_memory(self, source, expected, tmp_path):
        """Units that do not fit their share run alone."""
        deduplicate(source, tmp_path / "out", **OPTIONS, **{**self.options, "memory": "220MB"})
        assert Answer(tmp_path / "out") == expected("plain")[1]

    def test_too_little_memory(self, source, tmp_path):
        with pytest.raises(ResourceError, match="memory"):
            deduplicate(source, tmp_path / "out", **OPTIONS, **{**self.options, "memory": "20MB"})
        assert not (tmp_path / "out" / "run.json").exists()

    def test_a_users_mistake_arrives_as_it_is(self, tmp_path):
        """An id with two vectors, found on a worker in the middle of the work."""
        rng = np.random.default_rng(3)
        vectors = rng.standard_normal((300, DIM)).astype(np.float32)
        ids = [f"clip-{number:03}" for number in range(300)]
        ids[250] = ids[10]
        folder = write_split(tmp_path / "in", table_of(ids, list(vectors)), 3)
        messages = []
        for number, options in enumerate((REFERENCE, self.options)):
            with pytest.raises(RepeatedIdError) as raised:
                deduplicate(folder, tmp_path / f"out{number}", eps=0.05, n_clusters=3, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
        assert "clip-010" in messages[0]

    def test_a_damaged_file_is_named(self, source, tmp_path):
        table = read_folder(source)
        folder = tmp_path / "in"
        write_split(folder, table, 3, compression="snappy", row_group_size=200)
        path = sorted(folder.rglob("*.parquet"))[1]
        last = pq.read_metadata(path).row_group(4).column(1)  # not looked into when the input is listed
        with path.open("r+b") as file:
            file.seek(last.dictionary_page_offset or last.data_page_offset)
            file.write(bytes(100))
        before = snapshot(folder)
        with pytest.raises(DamagedFileError, match=re.escape(path.name)):
            deduplicate(folder, tmp_path / "out", **OPTIONS, **self.options)
        assert snapshot(folder) == before

    @pytest.mark.parametrize(
        ("step", "after"), [("sample", 1), ("assign", 900), ("pairwise", 300), ("remove", 1)], ids=str
    )
    @pytest.mark.parametrize("way", ["begun here", "finished here"])
    def test_interrupted_and_finished_on_another_backend(self, source, expected, tmp_path, step, after, way):
        here, there = self.options, {**REFERENCE, "workers": 2}
        first, second = (here, there) if way == "begun here" else (there, here)
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            deduplicate(source, out, **OPTIONS, **first, progress=Counted(step, after))
        assert not (out / "run.json").exists()
        progress = Counted()
        deduplicate(source, out, **OPTIONS, **second, progress=progress)
        assert Answer(out) == expected("plain")[1]
        # steps that were done are not begun again; what "assign" leaves may have been in memory only
        done_before = {"sample": 0, "assign": 2, "pairwise": 2, "remove": 6}[step]
        assert 1 <= len(progress.rows) <= 7 - done_before

    def test_a_wrong_backend_is_refused(self, source, tmp_path):
        with pytest.raises(UntwinError, match=r"'slurm'.*local.*ray") as raised:
            deduplicate(source, tmp_path / "out", **OPTIONS, backend="slurm")
        assert not isinstance(raised.value, MissingExtraError)
        assert not (tmp_path / "out").exists()
