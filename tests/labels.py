"""Runs whose pairs are "same" with a known probability, and labels drawn from them. No tests here."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

N_PAIRS = 100_000
EPS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25)


class World(NamedTuple):
    """Scores of all pairs, ascending, and P(same | score)."""

    scores: np.ndarray
    same: np.ndarray

    def truth(self, eps, least):
        """Precision and recall of each eps among the pairs down to the least labelled score."""
        first = np.searchsorted(self.scores, 1 - np.asarray(eps))
        above = np.cumsum(self.same[::-1])[::-1]
        return above[first] / (len(self.scores) - first), above[first] / above[np.searchsorted(self.scores, least)]


def _logistic(scores, middle, width):
    return 1 / (1 + np.exp(-(scores - middle) / width))


CURVES = {
    "logistic": lambda scores: _logistic(scores, 0.9, 0.02),
    "gentle": lambda scores: _logistic(scores, 0.88, 0.05),
    "a step": lambda scores: np.where(scores > 0.88, 1.0, 0.0),
    "nearly all same": lambda scores: 0.9 + 0.1 * (scores - 0.7) / 0.3,
    "never sure": lambda scores: 0.55 + 0.4 * (scores - 0.7) / 0.3,
    "mostly different": lambda scores: 0.3 * (scores - 0.7) / 0.3,
}


def world(curve, rng, *, copies=0.0):
    """A run with ever more pairs at ever smaller scores, as runs have them, and a share that are almost copies."""
    scores = 1 - 0.3 * np.sqrt(rng.random(N_PAIRS))
    scores = np.sort(np.where(rng.random(N_PAIRS) < copies, 1 - 0.001 * rng.random(N_PAIRS), scores))
    return World(scores, CURVES[curve](scores))


def drawn(known, n, rng):
    """Scores, labels and pairs that are at least as similar, for pairs drawn evenly over the scores."""
    edges = np.searchsorted(known.scores, np.linspace(known.scores[0], known.scores[-1], n + 1))
    rows = np.array([rng.integers(low, high) for low, high in pairwise(edges) if high > low])
    return known.scores[rows], rng.random(len(rows)) < known.same[rows], (N_PAIRS - rows).astype(float)
