"""`untwin tune`: reading labels, what it suggests, and what it refuses."""

import csv
import json

import numpy as np
import pytest

import untwin
from inputs import cli
from labels import drawn, world
from untwin.core import EPS_GRID
from untwin.errors import InputNotFoundError, ParameterError, SchemaError

HEADER = ("id", "other_id", "cosine_sim_score", "label", "pairs_at_least")


def write(path, rows, header=HEADER):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def labelled(scores, same, at_least):
    kinds = ("different", "same")
    lines = zip(scores.tolist(), same.tolist(), at_least.tolist(), strict=True)
    return [(f"a{i}", f"b{i}", f"{s:.9g}", kinds[y], int(n)) for i, (s, y, n) in enumerate(lines)]


def simple(n=20):
    """Same above 0.9, different below; 100 pairs between any two labels."""
    scores = np.linspace(0.8, 1, n).round(3)
    return labelled(scores, scores > 0.9, np.arange(n, 0, -1) * 100)


@pytest.fixture
def labels(tmp_path):
    return write(tmp_path / "labels.csv", simple())


def test_the_suggestion_is_the_largest_eps_whose_estimate_is_good_enough(labels):
    tuned = untwin.tune(labels, precision=0.8)
    assert (tuned.n_same, tuned.n_different, tuned.weighted, tuned.precision) == (10, 10, True, 0.8)
    rows = {row.eps: row for row in tuned.rows}
    assert tuned.likely == rows[tuned.likely.eps]
    assert tuned.likely.precision >= 0.8
    assert set(rows) == {eps for eps in EPS_GRID if eps <= 0.2} | {tuned.likely.eps}
    # 1,000 pairs are same for sure; between the labels at 0.895 and 0.905 half of 100 are; then none
    assert rows[0.13].precision == pytest.approx(1000 / rows[0.13].pairs, rel=0.06)
    assert rows[0.05].precision == 1 > rows[0.05].precision_low
    assert 0.11 <= tuned.likely.eps <= 0.13
    assert all(row.precision < 0.8 for row in tuned.rows if row.eps > tuned.likely.eps)
    assert all(row.precision_low <= row.precision <= row.precision_high for row in tuned.rows)
    assert all(row.recall_low <= row.recall <= row.recall_high for row in tuned.rows)
    assert tuned.rows[-1].recall == 1
    assert untwin.tune(labels, precision=0.8) == tuned


def test_what_is_shown_needs_enough_labels(tmp_path, labels):
    few = untwin.tune(labels, precision=0.9)
    assert few.shown is None
    assert few.fewest_labels == 36
    assert few.label_next == (0, few.likely.eps)
    many = untwin.tune(write(tmp_path / "many.csv", simple(200)), precision=0.9)
    assert many.shown.precision_low >= 0.9
    assert many.shown.labelled >= 36
    assert many.shown.eps < many.likely.eps


def test_no_eps_reaches_what_no_label_supports(tmp_path):
    rows = [(f"a{i}", f"b{i}", 0.8 + 0.01 * i, "same" if i % 2 else "different", 100 - i) for i in range(20)]
    tuned = untwin.tune(write(tmp_path / "labels.csv", [*rows, ("x", "y", 0.995, "different", 1)]), precision=0.99)
    assert (tuned.likely, tuned.shown) == (None, None)
    low, high = tuned.label_next
    assert 0 <= low < high <= 0.2
    printed = cli("tune", tmp_path / "labels.csv", "--precision", "0.99").stdout
    assert "No eps in the labelled range reaches a precision of 0.99. Label more pairs with scores" in printed


def test_without_weights_each_label_counts_the_same_and_it_says_so(tmp_path, labels):
    rows = [row[:4] for row in simple()]
    plain = untwin.tune(write(tmp_path / "plain.csv", rows, HEADER[:4]))
    assert not plain.weighted
    assert plain.rows[-1].pairs is None
    assert plain.rows[-1].precision == pytest.approx(0.5, abs=0.03)
    assert "no column pairs_at_least" in cli("tune", tmp_path / "plain.csv").stdout
    assert "no column pairs_at_least" not in cli("tune", labels).stdout


def test_unsure_and_repeated_labels_are_counted_and_the_later_one_wins(tmp_path, labels):
    rows = simple()
    other = [
        (two, one, score, "different" if i == 19 else label, n) for i, (one, two, score, label, n) in enumerate(rows)
    ]
    wrong_first = [*other[18:], *rows]
    extra = [("u", "v", 0.9, "unsure", 5), ("u", "w", 0.9, "", 5), ("u", "x", "", "Unsure ", "")]
    tuned = untwin.tune(write(tmp_path / "more.csv", [*wrong_first, *extra]))
    assert (tuned.n_ignored, tuned.n_repeated, tuned.n_changed) == (3, 1, 1)
    assert (tuned.n_same, tuned.rows) == (10, untwin.tune(labels).rows)
    printed = cli("tune", tmp_path / "more.csv").stdout
    assert "3 without a label, or unsure; 1 labelled again, the same; 1 labelled again otherwise" in printed


def test_ids_may_hold_anything_that_csv_can(tmp_path, labels):
    rows = [(f'a,"\n{one}', f"\u202e{two}\r\n", *rest) for one, two, *rest in simple()]
    tuned = untwin.tune(write(tmp_path / "odd.csv", rows))
    assert tuned.rows == untwin.tune(labels).rows
    with_mark = tmp_path / "mark.csv"
    with_mark.write_bytes(b"\xef\xbb\xbf" + labels.read_bytes())
    assert untwin.tune(with_mark).rows == tuned.rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: (rows, ("id", "other", "cosine_sim_score", "label", "n")), SchemaError, "no column 'other_id'"),
        (lambda rows: ([], ()), SchemaError, "it has nothing"),
        (lambda rows: ([], HEADER), ParameterError, r"0 labelled pairs .* label 10 more"),
        (
            lambda rows: (rows[:4] + rows[-4:], HEADER),
            ParameterError,
            r"8 labelled pairs \(4 same, 4 different\); label 2",
        ),
        (lambda rows: (simple(60)[31:], HEADER), ParameterError, "label some that are different, too: look at less"),
        (lambda rows: (simple(60)[:25], HEADER), ParameterError, "label some that are same, too: look at more similar"),
        (
            lambda rows: ([*rows, ("a", "b", 1.2, "same", 1)], HEADER),
            ParameterError,
            r"line 22: cosine_sim_score is '1.2'",
        ),
        (lambda rows: ([*rows, ("a", "b", "nan", "same", 1)], HEADER), ParameterError, "cosine_sim_score is 'nan'"),
        (lambda rows: ([*rows, ("a", "b", 1, "perhaps", 1)], HEADER), ParameterError, "the label is 'perhaps'"),
        (lambda rows: ([*rows, ("a", "b", 1, "same", 0)], HEADER), ParameterError, "pairs_at_least is '0'"),
        (lambda rows: ([*rows, ("a", "b", 1, "same")], HEADER), ParameterError, "pairs_at_least is ''"),
        (lambda rows: ([*rows, ("a", "b", 1, "same", 999)], HEADER), ParameterError, "label pairs of one run"),
        (
            lambda rows: ([(*row[:2], 0.9, *row[3:]) for row in rows], HEADER),
            ParameterError,
            "all labelled pairs are equally similar",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, change, error, message):
    path = write(tmp_path / "labels.csv", *change(simple()))
    with pytest.raises(error, match=message):
        untwin.tune(path)
    assert str(path) in cli("tune", path, code=2).stderr


def test_files_that_are_no_labels_and_precisions_that_make_no_sense(tmp_path, labels):
    with pytest.raises(InputNotFoundError, match="no such file"):
        untwin.tune(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(SchemaError, match="not text in UTF-8"):
        untwin.tune(tmp_path / "binary.csv")
    for wrong in (0, 1, 1.5, float("nan")):
        with pytest.raises(ParameterError, match="precision is"):
            untwin.tune(labels, precision=wrong)


def test_the_command_marks_the_suggestion(tmp_path):
    path = write(tmp_path / "labels.csv", simple(120))
    tuned = untwin.tune(path, precision=0.9)
    lines = cli("tune", path, "--precision", "0.9").stdout.splitlines()
    assert lines[0] == "120 labelled pairs: 60 same, 60 different"
    (likely,) = [line for line in lines if line.endswith("<- likely")]
    (shown,) = [line for line in lines if line.endswith("<- shown")]
    assert float(likely.split()[0]) == tuned.likely.eps
    assert f"{tuned.shown.precision_low:.2%}" in shown
    assert lines[-1].startswith(f"shown   eps {tuned.shown.eps:g},")
    table = [line for line in lines if "%" in line and " to " in line]
    assert len(table) == len(tuned.rows)
    assert len({line.index(" to ") for line in table}) == 1
    as_json = json.loads(cli("tune", path, "--precision", "0.9", "--json").stdout)
    assert as_json["likely"]["eps"] == tuned.likely.eps


def suggested(tmp_path, n_sims, n_labels, precision):
    """True precision of what is likely and of what is shown, in simulations."""
    rng = np.random.default_rng(6)
    known = world("logistic", rng)
    found = {"likely": [], "shown": []}
    for _ in range(n_sims):
        path = write(tmp_path / "labels.csv", labelled(*drawn(known, n_labels, rng)))
        tuned = untwin.tune(path, precision=precision)
        for name, values in found.items():
            row = getattr(tuned, name)
            if row is not None:
                values.append(known.truth([row.eps], known.scores[0])[0][0])
    return np.array(found["likely"]), np.array(found["shown"])


def test_a_likely_eps_comes_near_what_was_wanted_in_most_simulations(tmp_path):
    likely, _ = suggested(tmp_path, 12, 50, 0.8)
    assert len(likely) == 12
    assert np.mean(likely >= 0.7) > 0.6


@pytest.mark.slow
def test_suggestions_hold_what_they_say(tmp_path):
    likely, shown = suggested(tmp_path, 200, 50, 0.8)
    # it is the largest whose estimate is good enough, which it owes to luck, too
    assert len(likely) == 200
    assert np.mean(likely >= 0.7) > 0.7
    assert np.mean(likely) > 0.75
    likely, shown = suggested(tmp_path, 60, 400, 0.8)
    assert len(shown) > 50
    assert np.mean(shown >= 0.8) > 0.9
    assert np.mean(likely >= 0.75) > 0.7
