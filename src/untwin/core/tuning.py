"""What thresholds are worth, from labelled pairs: precision and recall with intervals.

A pair is "same" with a probability that does not fall as its score rises. That curve is fitted to the labels by
isotonic regression; how many pairs of the whole run lie between the labelled scores is known, and gives its parts their
weights. So the labelled pairs may be chosen by their scores in any way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from untwin.core.recall import share_bound

Float64 = npt.NDArray[np.float64]
_STEPS = 24


@dataclass(frozen=True)
class Estimates:
    """Precision and recall at some thresholds, each as (T,) float64, with the ends of their intervals.

    Attributes:
        pairs: Pairs of the run with at least that score.
        labelled: Labelled pairs among them.
        precision: Share of them that is "same".
        recall: Of the "same" pairs down to the least labelled score, the share with at least that score; NaN where no
            pair is estimated to be "same".
    """

    pairs: Float64
    labelled: npt.NDArray[np.int64]
    precision: Float64
    precision_low: Float64
    precision_high: Float64
    recall: Float64
    recall_low: Float64
    recall_high: Float64


def isotonic(sums: Float64, weights: Float64) -> Float64:
    """Fit a curve that never falls to weighted means, by pooling adjacent violators, for many sets of data at a time.

    Barlow, Bartholomew, Bremner and Brunk, "Statistical Inference under Order Restrictions", 1972, section 1.2.

    Args:
        sums: (B, K) float64, weight times mean at each of K places.
        weights: (B, K) float64, at least 0; a row needs one that is not 0.

    Returns:
        (B, K) float64. A place without weight gets the mean of the values at the places beside it.
    """
    n_sets, n_places = sums.shape
    every = np.arange(n_sets)
    block_sum, block_weight = np.zeros((n_places + 1, n_sets)), np.ones((n_places + 1, n_sets))
    block_start = np.zeros((n_places + 1, n_sets), np.int64)
    last = np.zeros(n_sets, np.int64)  # block 0 stays empty
    for place in range(n_places):
        rows = every[weights[:, place] > 0]
        last[rows] += 1
        block = last[rows]
        block_sum[block, rows], block_weight[block, rows] = sums[rows, place], weights[rows, place]
        block_start[block, rows] = place
        while len(rows):
            block = last[rows]
            before = block - 1
            falls = (before > 0) & (
                block_sum[before, rows] * block_weight[block, rows]
                > block_sum[block, rows] * block_weight[before, rows]
            )
            rows, block, before = rows[falls], block[falls], before[falls]
            block_sum[before, rows] += block_sum[block, rows]
            block_weight[before, rows] += block_weight[block, rows]
            last[rows] = before
    number = np.zeros((n_sets, n_places), np.int64)
    block, row = np.nonzero((np.arange(n_places + 1)[:, None] <= last) & (np.arange(n_places + 1)[:, None] > 0))
    number[row, block_start[block, row]] = block
    number = np.maximum.accumulate(number, axis=1)
    fitted = (block_sum / block_weight)[number, every[:, None]]
    places = np.arange(n_places)
    below = np.maximum.accumulate(np.where(weights > 0, places, -1), axis=1)
    above = np.minimum.accumulate(np.where(weights > 0, places, n_places)[:, ::-1], axis=1)[:, ::-1]
    below, above = np.where(below < 0, above, below), np.where(above == n_places, below, above)
    filled: Float64 = (np.take_along_axis(fitted, below, 1) + np.take_along_axis(fitted, above, 1)) / 2
    return filled


def _parts(scores: Float64, at_least: Float64, thresholds: Float64) -> Float64:
    """How much the probability at each labelled score counts for the number of "same" pairs above a threshold.

    Between two labelled scores pairs are taken to be spread evenly and the probability to be a line; above the
    highest it is what it is there.

    Args:
        scores: (K,) distinct labelled scores, ascending.
        at_least: (K,) pairs with at least these scores.
        thresholds: (T,) between the first and the last score.

    Returns:
        (T, K) float64; the rows add up to the pairs with at least that score.
    """
    parts = np.zeros((len(thresholds), len(scores)))
    parts[:, -1] = at_least[-1]
    width, count = np.diff(scores), -np.diff(at_least)
    share = np.clip((scores[1:] - thresholds[:, None]) / np.where(width, width, 1), 0, 1)
    parts[:, 1:] += count * share * (1 - share / 2)
    parts[:, :-1] += count * share**2 / 2
    return parts


def _labels_behind(parts: Float64, labels: Float64, *, rising: bool) -> Float64:
    """How many labels of equal weight say as much as these about the share of "same" in (T, K) parts of pairs.

    After Kish, "Survey Sampling", 1965, section 8.2. As the probability never falls, a bound from below still holds if
    pairs are counted at lower scores than they have, and one from above if they are counted at higher ones. So
    weights are pooled first, to rise (for a bound from above) or to fall (from below).

    Returns:
        (T,) float64.
    """
    weights = np.where(parts > 0, labels, 0)
    weights[:, -1] += ~weights.any(axis=1)
    order = slice(None) if rising else slice(None, None, -1)
    each = isotonic(parts[:, order], weights[:, order])[:, order]
    total, squares = (each * weights).sum(axis=1), (each**2 * weights).sum(axis=1)
    n: Float64 = total**2 / np.where(squares > 0, squares, 1)
    return n


def _bounds(parts: Float64, labels: Float64, share: Float64, confidence: float) -> tuple[Float64, Float64]:
    """Binomial interval of the share of "same" in each of T parts; (0, 1) where there are no pairs."""
    below, above = (_labels_behind(parts, labels, rising=rising) for rising in (False, True))
    # sums that are 0 or 1 but for rounding
    shares = np.clip(share, 0, 1).round(12).tolist()
    tail = (1 - confidence) / 2
    low = [share_bound(p * n, n, tail, _STEPS) for p, n in zip(shares, below.tolist(), strict=True)]
    high = [1 - share_bound((1 - p) * n, n, tail, _STEPS) for p, n in zip(shares, above.tolist(), strict=True)]
    return np.array(low), np.array(high)


def _share(hits: Float64, n: Float64) -> Float64:
    shares: Float64 = np.divide(hits, n, out=np.full(np.broadcast_shapes(hits.shape, n.shape), np.nan), where=n > 0)
    return shares


def estimate(
    scores: Float64,
    same: npt.NDArray[np.bool_],
    at_least: Float64,
    thresholds: Float64,
    *,
    n_replicates: int = 2000,
    seed: int = 42,
    confidence: float = 0.95,
) -> Estimates:
    """Estimate precision and recall of thresholds on the score from labelled pairs.

    The intervals are percentile intervals of a bootstrap over the labelled pairs (Efron 1979), widened to exact
    binomial ones (see `share_bound`), because a bootstrap of labels that are all equal claims certainty.

    Args:
        scores: (n,) of the labelled pairs.
        same: (n,) bool, the labels.
        at_least: (n,) for each, how many pairs of the run are at least as similar.
        thresholds: (T,) within the range of the scores.
        n_replicates: Of the bootstrap.
        seed: Of the bootstrap.
        confidence: Of the intervals.
    """
    places, place_of, counts = np.unique(scores, return_inverse=True, return_counts=True)
    pairs_at = np.zeros(len(places))
    np.maximum.at(pairs_at, place_of, at_least)
    labels = counts.astype(np.float64)
    hits: Float64 = np.bincount(place_of, same, len(places)).astype(np.float64)
    above = _parts(places, pairs_at, thresholds)
    (everything,) = _parts(places, pairs_at, places[:1])
    below = everything - above
    fitted = isotonic(hits[None], labels[None])

    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), n_replicates).astype(np.float64)
    belongs = np.zeros((len(scores), len(places)))
    belongs[np.arange(len(scores)), place_of] = 1
    replicates = isotonic((drawn * same) @ belongs, drawn @ belongs)

    def shares(curve: Float64) -> tuple[Float64, Float64]:
        found = curve @ above.T
        return _share(found, above.sum(axis=1)), _share(found, (curve @ everything)[:, None])

    (precision,), (recall,) = shares(fitted)
    tails = [100 * (1 - confidence) / 2, 100 * (1 + confidence) / 2]
    again, recalled = shares(replicates)
    ends = np.percentile(again, tails, axis=0)
    low, high = _bounds(above, labels, precision, confidence)
    precision_low, precision_high = np.minimum(ends[0], low), np.maximum(ends[1], high)

    n_above, n_below = above.sum(axis=1), below.sum(axis=1)
    rest = np.nan_to_num(_share((fitted @ below.T)[0], n_below))
    rest_low, rest_high = _bounds(below, labels, rest, confidence)
    ends = np.nanpercentile(np.nan_to_num(recalled, nan=1.0), tails, axis=0)
    lows = [_share(p * n_above, p * n_above + q * n_below) for p, q in ((precision, rest_high), (low, rest))]
    highs = [_share(p * n_above, p * n_above + q * n_below) for p, q in ((precision, rest_low), (high, rest))]
    return Estimates(
        pairs=n_above,
        labelled=(scores[:, None] >= thresholds).sum(axis=0),
        precision=precision,
        precision_low=precision_low,
        precision_high=precision_high,
        recall=recall,
        recall_low=np.fmin.reduce([ends[0], *lows]),
        recall_high=np.fmax.reduce([ends[1], *highs]),
    )
