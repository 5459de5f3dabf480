"""The parameters of a run, checked; and what of them decides the answer."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from untwin.core import threshold
from untwin.errors import ParameterError
from untwin.stages import checks
from untwin.stages.ranking import RankingStrategy
from untwin.storage.files import normalize_path, redact

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


@dataclass(frozen=True)
class RunParameters:
    """What a user asks of a run.

    Attributes:
        inputs: Files, folders, globs, URLs.
        output: Output folder.
        eps: Threshold; None stops before the removal.
        n_clusters: Number of clusters; None chooses it.
        probes: Clusters that a row is compared with, its own and the next-nearest ones; None chooses it.
        target_recall: Share of the rows with a neighbour whose neighbour is to be compared, where probes are chosen.
        id_field: Column of ids.
        embedding_field: Column of embeddings.
        metadata_fields: Columns to carry along.
        which_to_keep: `hard`, `easy` or `random`.
        rank_by: Columns with directions, as in `duration:desc,size_bytes:desc`; overrules `which_to_keep`.
        compare_to: `kept` or `ranked`.
        pairwise_batch_size: Rows compared at a time; never changes the answer.
        seed: Seed of everything random.
        input_filetype: `parquet`, `jsonl` or `npy`.
        embedding_dim: Wanted length of the embeddings; None takes the commonest.
        on_repeated_id: `error` or `first`.
        skip_bad_files: Read every file before the run, and go on without those that cannot be read.
        kept: `compact`, `mirror` or `none`.
        drop_intermediate: Remove `kmeans/` and `pairwise/` at the end.
        audit: Measure what was missed at the end; never changes the answer.
        media: Folder of clips that the inputs are the embeddings of, in the output folder itself; None for others.
        report: Write the report at the end; never changes the answer.
        storage_options: For fsspec; never shown or written.
    """

    inputs: tuple[str, ...]
    output: str
    eps: float | None = None
    n_clusters: int | None = None
    probes: int | None = 1
    target_recall: float = 0.999
    id_field: str = "id"
    embedding_field: str = "embedding"
    metadata_fields: tuple[str, ...] = ()
    which_to_keep: str = "hard"
    rank_by: str | None = None
    compare_to: str = "kept"
    pairwise_batch_size: int = 1024
    seed: int = 42
    input_filetype: str = "parquet"
    embedding_dim: int | None = None
    on_repeated_id: str = "error"
    skip_bad_files: bool = False
    kept: str = "compact"
    drop_intermediate: bool = False
    audit: bool = False
    report: bool = False
    media: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the input."""
        for name, least in (
            ("n_clusters", 1),
            ("embedding_dim", 1),
            ("pairwise_batch_size", 1),
            ("seed", 0),
            ("probes", 1),
        ):
            value = getattr(self, name)
            # plain Python numbers: those of NumPy cannot be written as JSON
            none = value is None and name in ("n_clusters", "probes", "embedding_dim")
            object.__setattr__(self, name, None if none else checks.whole(name, value, least))
        if self.eps is not None:
            threshold(self.eps)
            object.__setattr__(self, "eps", float(self.eps))
        checks.text("id_field", self.id_field)
        checks.text("embedding_field", self.embedding_field)
        checks.one_of("which_to_keep", self.which_to_keep, ("hard", "easy", "random"))
        checks.one_of("compare_to", self.compare_to, ("kept", "ranked"))
        checks.one_of("kept", self.kept, ("compact", "mirror", "none"))
        checks.one_of("on_repeated_id", self.on_repeated_id, ("error", "first"))
        if self.probes != 1 and self.eps is None:
            raise ParameterError(
                f"probes is {self.probes or 'auto'} without eps; rows of different clusters are compared only where "
                "they can be within eps: give an eps, or leave probes at 1"
            )
        target = self.target_recall
        if isinstance(target, bool) or not isinstance(target, numbers.Real) or not 0 < target < 1:
            raise ParameterError(f"target_recall is {target!r}; it must be a number greater than 0 and less than 1")
        object.__setattr__(self, "target_recall", float(target))
        if self.drop_intermediate and self.eps is None:
            raise ParameterError(
                "drop_intermediate without eps would leave nothing; give an eps, or keep the intermediate files"
            )
        self.ranking()

    def ranking(self) -> RankingStrategy:
        """The order of rows inside a cluster."""
        if self.rank_by is None:
            return RankingStrategy.by_distance(self.which_to_keep, "cosine", self.seed)
        columns, ascending = parse_rank_by(self.rank_by)
        return RankingStrategy.metadata_based(columns, ascending)

    @property
    def carried_fields(self) -> tuple[str, ...]:
        """Metadata columns that are needed in the clusters."""
        ranked = parse_rank_by(self.rank_by)[0] if self.rank_by is not None else []
        named = dict.fromkeys((*self.metadata_fields, *ranked))
        distances = ("l2_dist_to_cent", "cosine_dist_to_cent")
        return tuple(name for name in named if name not in (self.id_field, *distances))

    def answer(self) -> dict[str, Any]:
        """What decides the answer, as JSON: two runs with the same of this give the same."""
        return {
            "input_path": [redact(normalize_path(path)) for path in self.inputs],
            "eps": self.eps,
            "n_clusters": self.n_clusters or "auto",
            "probes": self.probes or "auto",
            "target_recall": self.target_recall if self.probes is None else None,
            "id_field": self.id_field,
            "embedding_field": self.embedding_field,
            "metadata_fields": list(self.metadata_fields),
            "which_to_keep": self.which_to_keep if self.rank_by is None else None,
            "rank_by": self.rank_by,
            "compare_to": self.compare_to,
            "seed": self.seed,
            "input_filetype": self.input_filetype,
            "embedding_dim": self.embedding_dim,
            "on_repeated_id": self.on_repeated_id,
            "skip_bad_files": self.skip_bad_files,
            "kept": self.kept,
            "drop_intermediate": self.drop_intermediate,
            "media": None if self.media is None else redact(self.media),
        }


def parse_rank_by(text: str) -> tuple[list[str], list[bool]]:
    """Columns and directions (True: ascending) of `duration:desc,size_bytes:desc`.

    Raises:
        ParameterError: An empty name, or a direction other than asc and desc.
    """
    columns: list[str] = []
    ascending: list[bool] = []
    for part in text.split(","):
        name, separator, direction = part.strip().rpartition(":")
        if not separator or not name or direction.lower() not in ("asc", "desc"):
            raise ParameterError(
                f"rank_by: {part.strip()!r} is not COLUMN:asc or COLUMN:desc, as in 'duration:desc,size_bytes:desc'"
            )
        columns.append(name)
        ascending.append(direction.lower() == "asc")
    return columns, ascending


def parse_bytes(text: str | float) -> int:
    """Bytes of `4GB`, `512MB`, `1.5GiB` or a plain number; GB is 10^9, GiB is 2^30.

    Raises:
        ParameterError: Not a size.
    """
    if isinstance(text, int | float) and math.isfinite(text):
        return int(text)
    if not isinstance(text, str):
        raise ParameterError(f"memory is {text!r}; give a size such as 4GB or 512MB")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match.group(2) not in _UNITS:
        raise ParameterError(f"memory is {text!r}; give a size such as 4GB or 512MB")
    return int(float(match.group(1)) * _UNITS[match.group(2)])
