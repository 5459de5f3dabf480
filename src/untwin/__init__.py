"""untwin removes near-duplicates from a data set of embeddings: k-means, pairwise similarity, a keep policy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from untwin.backends.local import LocalExecutor
    from untwin.jobs.act import undo
    from untwin.jobs.apply import apply
    from untwin.jobs.audit import audit
    from untwin.jobs.embed import embed
    from untwin.jobs.report import write_report
    from untwin.jobs.result import RunResult
    from untwin.jobs.run import deduplicate
    from untwin.jobs.show import show
    from untwin.jobs.tune import tune
    from untwin.pipeline import Pipeline
    from untwin.stages.duplicates import IdentifyDuplicatesStage
    from untwin.stages.kmeans import KMeansStage
    from untwin.stages.pairwise import PairwiseStage
    from untwin.stages.ranking import RankingStrategy
    from untwin.stages.removal import RemoveDuplicatesStage

__version__ = "0.1.0"

_HOMES = {
    "IdentifyDuplicatesStage": "untwin.stages.duplicates",
    "KMeansStage": "untwin.stages.kmeans",
    "LocalExecutor": "untwin.backends.local",
    "PairwiseStage": "untwin.stages.pairwise",
    "Pipeline": "untwin.pipeline",
    "RankingStrategy": "untwin.stages.ranking",
    "RemoveDuplicatesStage": "untwin.stages.removal",
    "RunResult": "untwin.jobs.result",
    "apply": "untwin.jobs.apply",
    "audit": "untwin.jobs.audit",
    "deduplicate": "untwin.jobs.run",
    "embed": "untwin.jobs.embed",
    "undo": "untwin.jobs.act",
    "show": "untwin.jobs.show",
    "tune": "untwin.jobs.tune",
    "write_report": "untwin.jobs.report",
}

__all__ = [
    "IdentifyDuplicatesStage",
    "KMeansStage",
    "LocalExecutor",
    "PairwiseStage",
    "Pipeline",
    "RankingStrategy",
    "RemoveDuplicatesStage",
    "RunResult",
    "__version__",
    "apply",
    "audit",
    "deduplicate",
    "embed",
    "show",
    "tune",
    "undo",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that the command line starts fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'untwin' has no attribute {name!r}")
