"""The fit and the comparison, which note what they were given. Workers of Ray import them. No tests here."""

import dataclasses
from pathlib import Path
from unittest import mock

from untwin.stages import pairwise
from untwin.stages.fit import FitStage
from untwin.stages.pairwise import PairwiseStage


class NotedFit(FitStage):
    folder = ""

    def process(self, task, context):
        return super().process(task, noting(context, Path(self.folder, "fit")))


class NotedPairwise(PairwiseStage):
    folder = ""

    def process(self, task, context):
        with mock.patch.multiple(pairwise, _SPREAD_WORK=0, _SPREAD_ROWS=(512, 512)):
            return super().process(task, noting(context, Path(self.folder, "pairwise")))


def noting(context, path):
    """The context, with a `spread` that counts its calls in a file."""
    if context.spread is None:
        return context
    n_calls = 0

    def spread(function, items):
        def counted():
            nonlocal n_calls
            for item in items:
                n_calls += 1
                path.write_text(str(n_calls))
                yield item

        return context.spread(function, counted())

    return dataclasses.replace(context, spread=spread)
