"""A threshold from pairs that somebody has looked at: precision and recall of each eps, with intervals."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from untwin.core import EPS_GRID, threshold
from untwin.core.tuning import Estimates, estimate
from untwin.errors import InputNotFoundError, ParameterError, SchemaError
from untwin.storage.files import Storage, normalize_path, redact

_COLUMNS = ("id", "other_id", "cosine_sim_score", "label")
_WEIGHTS = "pairs_at_least"
_IGNORED = ("", "unsure")
_FEWEST = 10
_SEED = 42
_CONFIDENCE = 0.95
_STEPS = 20


@dataclass(frozen=True)
class TunedRow:
    """What a threshold is worth. The ends are those of 95 % intervals.

    Attributes:
        eps: Threshold.
        pairs: Pairs of the run with a score of at least 1 - eps, about; None without weights.
        labelled: Labelled pairs among them.
        precision: Estimated share of these pairs that is "same".
        precision_low: Lower end.
        precision_high: Upper end.
        recall: Of all pairs that are "same" and no less similar than the least similar labelled one, the estimated
            share whose score is at least 1 - eps; None where no pair is estimated to be "same".
        recall_low: Lower end.
        recall_high: Upper end.
    """

    eps: float
    pairs: int | None
    labelled: int
    precision: float
    precision_low: float
    precision_high: float
    recall: float | None
    recall_low: float | None
    recall_high: float | None


@dataclass(frozen=True)
class Tuned:
    """Thresholds for a file of labelled pairs.

    Attributes:
        path: The file.
        precision: Wanted.
        n_same: Pairs labelled "same".
        n_different: Pairs labelled "different".
        n_ignored: Lines without a label, or with "unsure".
        n_repeated: Lines for a pair that has a later line, with the same label.
        n_changed: Lines for a pair that has a later line, with the other label: the later one counts.
        weighted: Whether the file says how many pairs of the run are behind each labelled one.
        rows: The eps grid within the labelled range, `likely` and `shown` included, by eps.
        likely: The largest eps whose estimated precision is at least the wanted one; None if there is none.
        shown: The largest eps whose precision is at least the wanted one also at the lower end of its interval.
        fewest_labels: Labels above a threshold that `shown` takes at least, if all of them are "same".
        label_next: Two values of eps, between whose scores labels would say most.
    """

    path: str
    precision: float
    n_same: int
    n_different: int
    n_ignored: int
    n_repeated: int
    n_changed: int
    weighted: bool
    rows: tuple[TunedRow, ...]
    likely: TunedRow | None
    shown: TunedRow | None
    fewest_labels: int
    label_next: tuple[float, float]


def tune(
    path: str | os.PathLike[str], *, precision: float = 0.95, storage_options: Mapping[str, Any] | None = None
) -> Tuned:
    """Suggest an eps from labelled pairs, with precision and recall at each value.

    Args:
        path: CSV with a header: `id`, `other_id`, `cosine_sim_score`, `label` (`same` or `different`; `unsure` and
            empty ones are left out), and `pairs_at_least`, the pairs of the run that are at least as similar. Without
            the last one each labelled pair counts the same.
        precision: Wanted share of "same" among the pairs that a threshold takes.
        storage_options: For fsspec.

    Raises:
        ParameterError: Too few labels, labels of one kind only, values that make no sense, or a precision outside
            (0, 1).
        SchemaError: Columns are missing.
        InputNotFoundError: There is no such file.
    """
    if not 0 < precision < 1:
        raise ParameterError(f"precision is {precision}; it must lie between 0 and 1, both excluded")
    storage, file = Storage(dict(storage_options or {})), normalize_path(os.fspath(path))
    if not storage.exists(file) or storage.is_folder(file):
        raise InputNotFoundError(f"{redact(file)}: no such file; the report page gives one to download")
    labels = _read(storage.read_bytes(file), redact(file))
    _check(labels, redact(file))
    scores, same = np.array(labels.scores), np.array(labels.same)
    weights = labels.at_least
    at_least = np.array(weights) if weights else (scores[:, None] >= scores).sum(axis=0).astype(np.float64)
    inside = _within(_thresholds(), scores)
    if len(inside) < _STEPS:
        finer = np.linspace(1 - scores.max(), 1 - scores.min(), _STEPS + 2)[1:-1].round(9)
        inside = _within(np.concatenate((inside, finer)), scores)
    if not len(inside):
        raise ParameterError(
            f"{redact(file)}: all labelled pairs are equally similar; label pairs of other scores, too"
        )
    found = estimate(scores, same, at_least, _limits(inside), seed=_SEED, confidence=_CONFIDENCE)
    likely, shown = (
        max(np.flatnonzero(values >= precision).tolist(), default=None)
        for values in (found.precision, found.precision_low)
    )
    grid = np.isin(inside, EPS_GRID)
    if grid.sum() < 2:
        grid[:] = True
    grid[[number for number in (likely, shown) if number is not None]] = True
    rows = {number: _row(inside, found, number, bool(weights)) for number in np.flatnonzero(grid).tolist()}
    return Tuned(
        path=redact(file),
        precision=precision,
        n_same=int(same.sum()),
        n_different=int((~same).sum()),
        n_ignored=labels.n_ignored,
        n_repeated=labels.n_repeated,
        n_changed=labels.n_changed,
        weighted=bool(weights),
        rows=tuple(rows.values()),
        likely=None if likely is None else rows[likely],
        shown=None if shown is None else rows[shown],
        fewest_labels=math.ceil(math.log((1 - _CONFIDENCE) / 2) / math.log(precision)),
        label_next=_label_next(tuple(rows.values()), likely, inside),
    )


def _thresholds() -> NDArray[np.float64]:
    """Values that can be suggested."""
    return np.unique(np.concatenate((np.arange(1, 100) / 1000, np.arange(20, 200) / 200, EPS_GRID)))


def _limits(eps: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([float(threshold(value)) for value in eps.tolist()])


def _within(eps: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those values of eps whose scores lie in the labelled range, distinct and ascending."""
    eps = np.unique(eps[(eps > 0) & (eps < 1)])
    limits = _limits(eps)
    inside: NDArray[np.float64] = eps[(limits >= scores.min()) & (limits <= scores.max())]
    return inside


def _label_next(rows: tuple[TunedRow, ...], likely: int | None, eps: NDArray[np.float64]) -> tuple[float, float]:
    """The scores above what looks right; else those of the widest interval."""
    if likely is not None:
        return 0.0, float(eps[likely])
    widths = [row.precision_high - row.precision_low for row in rows]
    widest = widths.index(max(widths))
    return (rows[widest - 1].eps if widest else 0.0), rows[widest].eps


def _row(eps: NDArray[np.float64], found: Estimates, number: int, weighted: bool) -> TunedRow:
    def value(values: NDArray[np.float64]) -> float:
        return float(np.clip(values[number], 0, 1))

    known = not math.isnan(found.recall[number])
    return TunedRow(
        eps=float(eps[number]),
        pairs=round(float(found.pairs[number])) if weighted else None,
        labelled=int(found.labelled[number]),
        precision=value(found.precision),
        precision_low=value(found.precision_low),
        precision_high=value(found.precision_high),
        recall=value(found.recall) if known else None,
        recall_low=value(found.recall_low) if known else None,
        recall_high=value(found.recall_high) if known else None,
    )


@dataclass(frozen=True)
class _Labels:
    scores: tuple[float, ...]
    same: tuple[bool, ...]
    at_least: tuple[float, ...]
    n_ignored: int
    n_repeated: int
    n_changed: int


def _read(content: bytes, path: str) -> _Labels:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        names = reader.fieldnames or []
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise SchemaError(
                f"{path}: no column {', '.join(map(repr, missing))}; wanted is a CSV file with the header "
                f"{','.join((*_COLUMNS, _WEIGHTS))}; it has {', '.join(map(repr, names)) or 'nothing'}"
            )
        weighted = _WEIGHTS in names
        known: dict[frozenset[str], tuple[float, bool, float]] = {}
        ignored = repeated = changed = 0
        for line in reader:
            place = f"{path}: line {reader.line_num}"
            label = (line["label"] or "").strip().lower()
            if label in _IGNORED:
                ignored += 1
                continue
            if label not in ("same", "different"):
                raise ParameterError(
                    f"{place}: the label is {label[:40]!r}; it must be same, different, unsure or empty"
                )
            score = _number(line["cosine_sim_score"], place, "cosine_sim_score", -1, 1)
            at_least = _number(line[_WEIGHTS], place, _WEIGHTS, 1, math.inf) if weighted else 0.0
            pair = frozenset((line["id"] or "", line["other_id"] or ""))
            if pair in known:
                same_label = known.pop(pair)[1] == (label == "same")
                repeated, changed = repeated + same_label, changed + (not same_label)
            known[pair] = score, label == "same", at_least
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise SchemaError(f"{path}: is not CSV ({error})") from None
    scores, same, weights = zip(*known.values(), strict=True) if known else ((), (), ())
    return _Labels(scores, same, weights if weighted else (), ignored, repeated, changed)


def _number(text: str | None, place: str, name: str, low: float, high: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (low <= value <= high and math.isfinite(value)):
        wanted = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise ParameterError(f"{place}: {name} is {(text or '')[:40]!r}; it must be a number {wanted}")
    return value


def _check(labels: _Labels, path: str) -> None:
    n, n_same = len(labels.same), sum(labels.same)
    counts = f"{n} labelled pairs ({n_same} same, {n - n_same} different)"
    if n < _FEWEST:
        raise ParameterError(f"{path}: {counts}; label {_FEWEST - n} more at least, better 50, of both kinds")
    if n_same in (0, n):
        other, where = ("different", "less") if n_same else ("same", "more")
        raise ParameterError(
            f"{path}: {counts}; label some that are {other}, too: look at {where} similar pairs, until both occur"
        )
    if labels.at_least:
        scores, place = np.unique(labels.scores, return_inverse=True)
        fewest, most = np.full(len(scores), np.inf), np.zeros(len(scores))
        np.minimum.at(fewest, place, labels.at_least)
        np.maximum.at(most, place, labels.at_least)
        wrong = np.flatnonzero(fewest[:-1] < most[1:])
        if len(wrong):
            i = int(wrong[0])
            raise ParameterError(
                f"{path}: {_WEIGHTS} says {fewest[i]:.0f} pairs at the score {scores[i]:.6g}, but "
                f"{most[i + 1]:.0f} at {scores[i + 1]:.6g}, which is more similar; label pairs of one run"
            )
