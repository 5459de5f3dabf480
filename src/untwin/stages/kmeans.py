"""`KMeansStage`: from embeddings to `centroid=K/*.parquet`, as one step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from untwin.errors import ParameterError
from untwin.plan import Plan, make_plan
from untwin.stages import checks
from untwin.stages.assign import AssignStage
from untwin.stages.base import CompositeStage, Stage, require_empty, storage_of, where_data_is
from untwin.stages.clustering import Clustering
from untwin.stages.fit import FitStage
from untwin.stages.gather import GatherStage
from untwin.stages.repeats import RepeatsStage
from untwin.stages.sample import SampleStage
from untwin.storage.files import join, normalize_path
from untwin.storage.inputs import FORMATS
from untwin.storage.listing import Fields, Listing, list_inputs


class KMeansStage(CompositeStage):
    """Clusters the rows of the input by Euclidean k-means on their unit vectors.

    Names and defaults are those of NeMo Curator's stage of the same name; `on_repeated_id` is ours.

    Args:
        n_clusters: Number of clusters; None chooses it from the number of rows (see `auto_n_clusters`).
        id_field: Column of ids.
        embedding_field: Column of embeddings.
        input_path: A file, folder, glob or URL, or a list of them.
        output_path: Folder for `centroid=K/*.parquet` and `_centroids.npy`; must not hold other results.
        metadata_fields: More columns to carry along, for ranking.
        verbose: Log each stage (logger `untwin`, level INFO).
        embedding_dim: Wanted length of the embeddings; None takes the commonest.
        input_filetype: `parquet`, `jsonl` or `npy`.
        input_file_extensions: File name endings to read instead of the type's own.
        read_kwargs: `storage_options` for the input.
        write_kwargs: `storage_options` for the output.
        max_iter: Most iterations of k-means.
        tol: Stop when the squared shifts of the centroids add up to less than `tol` times the mean variance.
        random_state: Seed of the sample and of the start.
        init: `k-means||` (Bahmani et al. 2012), `random`, or a (n_clusters, dim) array of first centroids.
        n_init: Runs from different starts, of which the best counts; "auto" and None mean 1, as an array `init` does.
        oversampling_factor: Candidates a round of `k-means||`, as a multiple of `n_clusters` (2.0 if not given).
        max_samples_per_batch: Most rows that are assigned at a time; never changes the result.
        fit_data_fraction: Share of the rows to fit on, in (0, 1]; None means all rows.
        cache_path: Folder below which scratch files lie, which are removed at the end; default: the output.
        on_repeated_id: `error` or `first`, for the same id with different vectors.

    Raises:
        ParameterError: A parameter that makes no sense.
    """

    def __init__(
        self,
        n_clusters: int | None,
        id_field: str,
        embedding_field: str,
        input_path: str | list[str],
        output_path: str,
        metadata_fields: Sequence[str] | None = None,
        verbose: bool = False,
        embedding_dim: int | None = None,
        input_filetype: str = "parquet",
        input_file_extensions: Sequence[str] | None = None,
        read_kwargs: dict[str, Any] | None = None,
        write_kwargs: dict[str, Any] | None = None,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 42,
        init: str | NDArray[Any] = "k-means||",
        n_init: int | str | None = 1,
        oversampling_factor: float | None = None,
        max_samples_per_batch: int = 1 << 15,
        fit_data_fraction: float | None = None,
        cache_path: str | None = None,
        on_repeated_id: str = "error",
    ) -> None:
        self.n_clusters = None if n_clusters is None else checks.whole("n_clusters", n_clusters)
        self.embedding_dim = None if embedding_dim is None else checks.whole("embedding_dim", embedding_dim)
        self.max_samples_per_batch = checks.whole("max_samples_per_batch", max_samples_per_batch)
        self.random_state = checks.whole("random_state", random_state, 0)
        self.on_repeated_id = checks.one_of("on_repeated_id", on_repeated_id, ("error", "first"))
        self.input_filetype = checks.one_of("input_filetype", input_filetype, tuple(FORMATS))
        self.fit_data_fraction = None
        if fit_data_fraction is not None:
            self.fit_data_fraction = checks.number("fit_data_fraction", fit_data_fraction)
            _check(0 < self.fit_data_fraction <= 1, "fit_data_fraction", fit_data_fraction, "must be in (0, 1]")
        _check(checks.number("tol", tol) >= 0, "tol", tol, "must not be negative")
        if isinstance(init, np.ndarray):
            _check(
                init.ndim == 2 and init.dtype.kind in "fiu", "init", init, "must be a 2-dimensional array of numbers"
            )
        else:
            _check(
                isinstance(init, str) and init in ("k-means||", "random"),
                "init",
                init,
                "must be 'k-means||', 'random' or an array of centroids",
            )
        n_runs = 1 if n_init is None or n_init == "auto" else checks.whole("n_init", n_init)
        _check(
            n_runs == 1 or isinstance(init, str),
            "n_init",
            n_init,
            "must be 1 with an array init: all runs would be the same",
        )
        if oversampling_factor is not None:
            _check(
                checks.number("oversampling_factor", oversampling_factor) > 0,
                "oversampling_factor",
                oversampling_factor,
                "must be positive",
            )
            _check(
                isinstance(init, str) and init == "k-means||",
                "oversampling_factor",
                oversampling_factor,
                "has a meaning with init='k-means||' only",
            )
        self.fields = Fields(
            checks.text("id_field", id_field),
            checks.text("embedding_field", embedding_field),
            tuple(dict.fromkeys(checks.texts("metadata_fields", metadata_fields))),
        )
        reserved = {
            embedding_field,
            "l2_dist_to_cent",
            "cosine_dist_to_cent",
            "_row",
            "_centroid",
            "_vector",
            "centroid",
        }
        for name in (id_field, *self.fields.metadata_fields):
            _check(
                name not in reserved,
                "metadata_fields",
                name,
                "is the name of a column that the stage writes itself",
            )
        self.input_paths = checks.paths("input_path", input_path)
        self.output_path = normalize_path(checks.path("output_path", output_path))
        self.verbose = verbose
        self.input_file_extensions = checks.texts("input_file_extensions", input_file_extensions)
        self.source = storage_of(read_kwargs)
        self.target = storage_of(write_kwargs)
        self.work_path = join(self.output_path, "_work")
        if cache_path:
            # a folder of its own, because it is removed whole
            digest = hashlib.sha256(self.output_path.encode()).hexdigest()
            self.work_path = join(normalize_path(checks.path("cache_path", cache_path)), f"_untwin-{digest[:16]}")
        self.fit_options: dict[str, Any] = {
            "init": init,
            "max_iter": checks.whole("max_iter", max_iter),
            "tol": float(tol),
            "n_init": n_runs,
            "oversampling_factor": oversampling_factor or 2.0,
        }
        self.rejected_path = join(self.output_path, "_rejected")
        self.rows_wanted = False
        self.clustering: Clustering | None = None

    def prepare(self, listing: Listing, plan: Plan) -> Clustering:
        """Fix the input and the plan, so that `stages` need not make them."""
        self.clustering = self._clustering(listing, plan)
        return self.clustering

    def _clustering(self, listing: Listing, plan: Plan) -> Clustering:
        return Clustering(
            plan=plan,
            listing=listing,
            groups=listing.groups(),
            fields=self.fields,
            source=self.source,
            target=self.target,
            output_path=self.output_path,
            work_path=self.work_path,
            rejected_path=self.rejected_path,
            dim=self.embedding_dim,
            seed=self.random_state,
            on_repeated_id=self.on_repeated_id,
            max_batch_rows=self.max_samples_per_batch,
            rows_wanted=self.rows_wanted,
        )

    def stages(self) -> list[Stage]:
        """Sample, fit, assign, find repeated ids, gather."""
        job = self.clustering
        if job is None:
            require_empty(self.target, self.output_path)
            listing = where_data_is(
                list_inputs,
                self.source,
                self.input_paths,
                self.fields,
                filetype=self.input_filetype,
                extensions=self.input_file_extensions,
                exclude=[self.output_path],
                dim=self.embedding_dim,
            )
            plan = make_plan(
                listing.groups().rows,
                dim=listing.dim,
                n_clusters=self.n_clusters,
                fit_data_fraction=self.fit_data_fraction,
                sample=False,
            )
            init = self.fit_options["init"]
            if isinstance(init, np.ndarray) and init.shape[:1] != (plan.n_clusters,):
                raise ParameterError(f"init has shape {init.shape}, but there are {plan.n_clusters} clusters")
            job = self._clustering(listing, plan)
        stages: list[Stage] = [
            SampleStage(job),
            FitStage(job, **self.fit_options),
            AssignStage(job),
            RepeatsStage(job),
            GatherStage(job),
        ]
        for stage in stages:
            stage.verbose = self.verbose
        return stages


def _check(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ParameterError(f"{name} is {value!r}; it {rule}")
