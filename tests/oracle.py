"""The answer by its definition, with plain NumPy in float64: the oracle of tests. No tests here, and no untwin."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Truth:
    """The answer for one cluster by brute force; positions are ranks, -1 is none."""

    X: np.ndarray
    score: np.ndarray
    match: np.ndarray
    kept: np.ndarray
    witness: np.ndarray

    def similarity(self, i, j):
        return np.minimum((self.X[i] * self.X[j]).sum(axis=-1), 1)


def brute_force(X, eps, compare_to):
    """Take the rows of `X` in order, each against all before it."""
    X = X.astype(np.float64)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    S = np.minimum(X @ X.T, 1.0)
    limit = np.float32(1 - eps)
    n = len(X)
    score, match = np.zeros(n), np.zeros(n, int)
    kept, witness = np.ones(n, bool), np.full(n, -1)
    for i in range(1, n):
        match[i] = np.argmax(S[i, :i])
        score[i] = S[i, match[i]]
        staying = np.flatnonzero(kept[:i])
        best = staying[np.argmax(S[i, staying])]
        near = np.float32(S[i, best]) >= limit
        if near:
            witness[i] = best
        kept[i] = not (near if compare_to == "kept" else np.float32(score[i]) >= limit)
    witness[kept] = -1
    return Truth(X, score, match, kept, witness)
